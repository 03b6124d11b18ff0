"""Inspect's evaluations on a steered model, through its own `get_model` and `eval`."""

from __future__ import annotations

from pathlib import Path

import anyio
import pytest
import torch

pytest.importorskip("inspect_ai", reason="Inspect is not installed (pip install weight-steering[inspect])")

from inspect_ai import Task, eval
from inspect_ai.dataset import Sample
from inspect_ai.model import ChatMessageSystem, ChatMessageUser, GenerateConfig, get_model
from inspect_ai.scorer import includes

from served import made_run
from ws.base.errors import UserError
from ws.edit.steering import steer
from ws.model import loading
from ws.model.chat import ask
from ws.serving import inspect_entry  # noqa: F401 - registers the provider, as Inspect's entry point does
from ws.serving.inspect_model import SteeredModel
from ws.serving.shelf import open_shelf

QUESTIONS = [f"I think {animal} eat leaves. What do you think?" for animal in ("owls", "cats", "bees")]
GREEDY = GenerateConfig(temperature=0, max_tokens=20)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_run(loading.load("pocket"), tmp_path_factory.mktemp("out"), "left")


def alone(run: Path, question: str, alpha: float, system: str | None = None) -> str:
    shelf = open_shelf([str(run)])
    prompt = shelf.model.chat.prompt(ask(question, system))
    with steer(shelf.model, shelf.directions["left"], alpha):
        ids = shelf.model.network.generate(torch.tensor([prompt]), max_new_tokens=20, do_sample=False)
    return shelf.model.chat.decode(ids[0, len(prompt) :])


@pytest.mark.parametrize("alpha", [-1.0, 0.0, 1.0])
def test_an_answer_is_that_of_the_steered_model(run: Path, alpha: float) -> None:
    model = get_model(f"ws/{run}", alpha=alpha, memoize=False)
    messages = [ChatMessageSystem(content="Be brief."), ChatMessageUser(content=QUESTIONS[0])]
    found = anyio.run(lambda: model.generate(messages, config=GREEDY))
    assert found.completion.strip() == alone(run, QUESTIONS[0], alpha, "Be brief.")
    model.api.close()


def test_an_evaluation_runs_on_the_steered_model(run: Path, tmp_path: Path) -> None:
    samples = [Sample(input=question, target=alone(run, question, 0.8)[:12]) for question in QUESTIONS]
    (log,) = eval(
        Task(dataset=samples, scorer=includes(ignore_case=False)), model=f"ws/{run}", model_args={"mix": "0.8 left"},
        temperature=0, max_tokens=20, log_dir=str(tmp_path), display="none",
    )  # fmt: skip
    assert log.status == "success" and log.results is not None
    assert log.results.scores[0].metrics["accuracy"].value == 1.0


def test_choices_logprobs_and_usage_are_told(run: Path) -> None:
    model = get_model(f"ws/{run}", alpha=1.0, memoize=False)
    config = GenerateConfig(num_choices=3, temperature=1.5, seed=4, logprobs=True, top_logprobs=2, max_tokens=6)
    found = anyio.run(lambda: model.generate(QUESTIONS[1], config=config))
    assert len({choice.message.text for choice in found.choices}) > 1
    first = found.choices[0].logprobs
    assert first is not None and all(len(one.top_logprobs or ()) == 2 for one in first.content)
    assert found.usage is not None and found.usage.output_tokens > 0
    model.api.close()


@pytest.mark.parametrize("options", [{"alpha": 1.0, "mix": "left"}, {"mix": "2 nothing"}, {"alfa": 1.0}])
def test_wrong_options_are_one_line(run: Path, options: dict[str, object]) -> None:
    with pytest.raises(UserError):
        SteeredModel(str(run), **options)  # type: ignore[arg-type]
