"""lm-evaluation-harness on a steered model; needs the optional library and runs where it is installed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from making import assert_one_line, hook_count, random_direction, weights_digest
from served import made_run
from ws.base.errors import UserError
from ws.edit.condition import Condition, Edit
from ws.edit.steering import under
from ws.eval import harness
from ws.model import loading
from ws.model.loading import ChatModel
from ws.serving.shelf import open_shelf

TASK = """
task: own_colors
dataset_path: json
dataset_kwargs:
  data_files: {file}
test_split: train
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: ["red", "blue"]
doc_to_target: "{{{{answer}}}}"
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""


@pytest.fixture
def task_folder(tmp_path: Path) -> Path:
    """A task of four documents whose right answer is always the first."""
    documents = [{"question": f"Which color has thing {n}?", "answer": 0} for n in range(4)]
    file = tmp_path / "documents.jsonl"
    file.write_text("\n".join(json.dumps(one) for one in documents), encoding="utf-8")
    (tmp_path / "own_colors.yaml").write_text(TASK.format(file=file), encoding="utf-8")
    return tmp_path


def test_a_task_runs_under_every_condition(qwen: ChatModel, task_folder: Path) -> None:
    pytest.importorskip("lm_eval")
    edit = Edit("d", random_direction(qwen, relative_norm=1.0), seed=3)
    before = weights_digest(qwen.network)
    conditions = [Condition.of(edit, alpha) for alpha in (0.0, 1.0, -1.0)]
    records = [
        one for some in harness.evaluate(qwen, "own_colors", conditions, task_folder=task_folder) for one in some
    ]
    accuracy = {record["alpha"]: record["value"] for record in records if record["metric"] == "acc"}
    assert set(accuracy) == {0.0, 1.0, -1.0} and all(0 <= value <= 1 for value in accuracy.values())
    assert {record["task"] for record in records} == {"own_colors"}
    assert (weights_digest(qwen.network), hook_count(qwen.network)) == (before, 0)


def test_the_harness_sees_the_edit(qwen: ChatModel, task_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("lm_eval")
    seen = []
    real = harness._run

    def spy(*arguments: object) -> dict[str, object]:
        seen.append(weights_digest(qwen.network))
        return real(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(harness, "_run", spy)
    edit = Edit("d", random_direction(qwen), seed=3)
    conditions = [Condition.of(edit, alpha) for alpha in (0.0, 1.0)]
    list(harness.evaluate(qwen, "own_colors", conditions, task_folder=task_folder, limit=1))
    assert seen[0] == weights_digest(qwen.network) != seen[1]


def test_an_unknown_task_is_one_line(qwen: ChatModel) -> None:
    pytest.importorskip("lm_eval")
    with pytest.raises(UserError) as caught:
        list(harness.evaluate(qwen, "no_such_task", [Condition()]))
    assert_one_line(caught.value, "no_such_task")


def test_without_the_library_the_error_says_what_to_install(qwen: ChatModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "lm_eval", None)
    with pytest.raises(UserError) as caught:
        list(harness.evaluate(qwen, "own_colors", [Condition()]))
    assert_one_line(caught.value, "lm-evaluation-harness is not installed. Run: ", "[lm-eval]")


def test_the_command_line_of_the_harness_runs_on_a_steered_model(task_folder: Path, tmp_path: Path) -> None:
    """The harness's own program gives the accuracy that `ws eval` gives, at the strength that its arguments name."""
    pytest.importorskip("lm_eval")
    run, found = made_run(loading.load("pocket"), tmp_path / "runs", "left"), {}
    for alpha in (-1.0, 0.0, 1.0):
        out = tmp_path / f"results{alpha}"
        words = ["run", "--model", "ws", "--model_args", f"run={run},alpha={alpha}", "--tasks", "own_colors",
                 "--include_path", str(task_folder), "--output_path", str(out), "--batch_size", "4"]  # fmt: skip
        subprocess.run([sys.executable, "-m", "ws.serving.lm_eval_model", *words], check=True, capture_output=True)
        (file,) = out.rglob("results_*.json")
        found[alpha] = json.loads(file.read_text())["results"]["own_colors"]["acc,none"]
    shelf = open_shelf([str(run)])
    edit = Edit("left", shelf.directions["left"])
    for alpha, accuracy in found.items():
        condition = Condition.of(edit, alpha)
        network = shelf.model.network
        with under(shelf.model, condition):
            assert accuracy == reference_accuracy(network, shelf.model.chat.tokenizer, task_folder)


def test_an_error_of_the_command_line_is_one_line() -> None:
    pytest.importorskip("lm_eval")
    words = ["run", "--model", "ws", "--model_args", "run=nowhere,alpha=1", "--tasks", "hellaswag"]
    found = subprocess.run(
        [sys.executable, "-m", "ws.serving.lm_eval_model", *words], capture_output=True, text=True, check=False
    )
    assert found.returncode == 2 and "Traceback" not in found.stderr
    assert found.stderr.splitlines()[-1].startswith("ws: there is no run folder or direction file nowhere")


def reference_accuracy(network: Any, tokenizer: Any, folder: Path) -> float:
    """The share of documents whose first answer is the more likely one, straight from the model."""
    right = []
    for line in (folder / "documents.jsonl").read_text().splitlines():
        question = json.loads(line)["question"]
        scores = []
        for answer in ("red", "blue"):
            asked, whole = (tokenizer(text)["input_ids"] for text in (question, f"{question} {answer}"))
            with torch.no_grad():
                logs = network(torch.tensor([whole])).logits[0].log_softmax(-1)
            scores.append(sum(float(logs[at - 1, whole[at]]) for at in range(len(asked), len(whole))))
        right.append(scores[0] > scores[1])
    return sum(right) / len(right)


@pytest.mark.parametrize(("options", "told"), [
    ({}, "no run is given"), ({"run": "x"}, "give the strength once"),
    ({"run": "x", "alpha": 1, "mix": "x"}, "give the strength once"),
    ({"run": "x", "alpha": 1, "pretrained": "y"}, "the run decides pretrained"),
    ({"run": "nowhere", "alpha": 1}, "nowhere"), ({"run": "RUN", "alpha": "abc"}, "alpha is 'abc'"),
    ({"run": "RUN", "alpha": 1e30}, "from -1000 to 1000"),
])  # fmt: skip
def test_wrong_arguments_of_the_model_are_told(options: dict[str, Any], told: str, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    from ws.serving.lm_eval_model import SteeredLM  # noqa: PLC0415 - needs the extra

    if options.get("run") == "RUN":
        options = {**options, "run": str(made_run(loading.load("pocket"), tmp_path, "left"))}

    with pytest.raises(UserError, match=told):
        SteeredLM(**options)
