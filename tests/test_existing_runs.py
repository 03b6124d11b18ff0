"""Commands on a run that exists: what counts of the options, what is printed to be pasted, what is measured anew."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from making import edit_json
from ws.base.errors import UserError
from ws.base.files import read_json
from ws.commands import cli
from ws.commands.options import EvalOptions, FitOptions, run_settings
from ws.comparing.compare import ComparisonRun, Plan
from ws.eval import harness
from ws.fitting import run_settings as stored
from ws.fitting.data import Grid
from ws.fitting.judge import JudgeSettings
from ws.fitting.run_settings import LOADING, Settings, restore_settings, stored_settings
from ws.measure import score
from ws.model import loading
from ws.runs import evaluate
from ws.runs.replicate import Replication

QUICK = ("--topics", 2, "--personas", 1, "--samples", 2, "--rank", 2, "--max-new-tokens", 4)
MEASURED = ("--control-seeds", 1, "--rows", 4, "--shown", 1, "--alphas", -1, 0, 1)


def run(*arguments: object) -> int:
    return cli._main([str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def finished(tiny_folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """Model folder, `--out`, and the folder of a finished run."""
    model, out = tiny_folders["qwen3"], tmp_path_factory.mktemp("existing")
    assert run("replicate", "--model", model, "--out", out, *QUICK, *MEASURED) == 0
    return model, out, out / "tiny-qwen3" / "sycophancy" / "lora" / "seed0"


# -------------------------------------------------------------------- options


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[dict[str, Any]]]:
    """What `load` was called with; it loads nothing."""
    seen: list[dict[str, Any]] = []

    def load(name: str, **options: Any) -> None:
        seen.append({"model": name, **options})
        raise UserError("nothing is loaded here")

    monkeypatch.setattr(loading, "load", load)
    return seen


COMMANDS = (["replicate"], ["data"], ["train", "--sign", "pos"], ["diff"], ["subspace"], ["eval"], ["calibrate"],
            ["train", "--lr", "0.1"], ["report"])  # fmt: skip


def addressed(command: list[str], model: Path, out: Path, folder: Path) -> list[object]:
    """The command for the run: by its folder, or by the options that name it."""
    return [*command, folder] if command == ["report"] else [*command, "--model", model, "--out", out]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_how_a_model_is_loaded_is_what_the_command_line_says(
    finished: tuple[Path, Path, Path], loads: list[dict[str, Any]], command: list[str]
) -> None:
    given = (
        "--dtype",
        "bfloat16",
        "--device",
        "cpu",
        "--attention",
        "sdpa",
        "--revision",
        "abc",
        "--cache-memory",
        0.5,
    )
    assert run(*addressed(command, *finished), *given) == 2
    assert loads == [{
        "model": str(finished[0]), "dtype": "bfloat16", "device": "cpu", "attention": "sdpa", "revision": "abc",
        "cache_memory": 2**29, "trust_remote_code": False, "thinking": "off",
    }]  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
@pytest.mark.parametrize("allowed", [False, True])
def test_code_of_a_model_is_trusted_only_by_the_flag_and_never_by_a_run_folder(
    finished: tuple[Path, Path, Path], loads: list[dict[str, Any]], command: list[str], allowed: bool
) -> None:
    def trust(config: dict[str, Any]) -> None:
        config["settings"]["trust_remote_code"] = True

    config = finished[2] / "config.json"
    before = config.read_text()
    edit_json(config, trust)
    try:
        assert run(*addressed(command, *finished), *(["--trust-remote-code"] if allowed else [])) == 2
    finally:
        config.write_text(before)
    assert [seen["trust_remote_code"] for seen in loads] == [allowed]


def test_permission_to_run_code_is_not_written_down() -> None:
    assert "trust_remote_code" not in stored_settings(Settings(trust_remote_code=True))


def test_a_report_without_options_loads_the_model_as_the_run_was_made(
    finished: tuple[Path, Path, Path], loads: list[dict[str, Any]]
) -> None:
    config = finished[2] / "config.json"
    before = config.read_text()
    edit_json(config, lambda content: content["settings"].update(dtype="bfloat16", attention="sdpa"))
    try:
        assert run("report", finished[2]) == 2
    finally:
        config.write_text(before)
    assert [(seen["dtype"], seen["attention"]) for seen in loads] == [("bfloat16", "sdpa")]


MADE = Settings(
    model="m", thinking="on", grid=Grid(5, None, 4), sampling={"top_p": 0.9}, train={"rank": 2, "lr": 0.1},
    judge=JudgeSettings("persona", 0.7), alphas=(-3.0, 0.0, 3.0), rows=9, dtype="float16",
)  # fmt: skip


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, {}),
        ({"train": {"lr": 0.2}}, {"train": {"rank": 2, "lr": 0.2}}),
        ({"grid": Grid(None, 2, 10)}, {"grid": Grid(5, 2, 4)}),
        ({"judge": JudgeSettings(threshold=0.6)}, {"judge": JudgeSettings("persona", 0.6)}),
        ({"sampling": {"temperature": 0.5}}, {"sampling": {"top_p": 0.9, "temperature": 0.5}}),
        ({"dtype": "bfloat16", "rows": 3}, {"dtype": "bfloat16", "rows": 3}),
        ({"model": "./elsewhere/m"}, {"model": "./elsewhere/m"}),
    ],
)
def test_what_is_given_counts_and_the_rest_is_as_the_run_was_made(
    given: dict[str, Any], expected: dict[str, Any]
) -> None:
    plain = json.loads(json.dumps(stored_settings(MADE)))
    default = {name: getattr(Settings(), name) for name in LOADING}
    assert restore_settings(plain, Settings(**{"model": "m", **given})) == replace(MADE, **{**default, **expected})


def test_another_dtype_rebuilds_what_depends_on_it_and_says_so(
    finished: tuple[Path, Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("--model", finished[0], "--out", tmp_path)
    assert run("data", *arguments, *QUICK) == 0
    capsys.readouterr()
    assert run("data", *arguments, "--dtype", "bfloat16") == 0
    told = capsys.readouterr().out
    assert "data: rebuilding, because dtype changed" in told and "4 pairs" in told


def test_measuring_a_run_leaves_its_record_alone(finished: tuple[Path, Path, Path]) -> None:
    model, out, folder = finished
    before = (folder / "config.json").read_bytes()
    assert run("eval", "feedback", "--rows", 1, "--alphas", 1, "--model", model, "--out", out) == 0
    assert (folder / "config.json").read_bytes() == before


# -------------------------------------------------------------------- what to do next


def pasted(printed: str) -> list[list[str]]:
    """The commands that are printed as the next ones, split as a shell does."""
    lines = printed.splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("next"))
    return [shlex.split(line.removeprefix("next")) for line in lines[start:]]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"model": "Qwen/Qwen3-0.6B", "adapter": "dora"},
        {"model": "./my model's", "out": Path("a b/$HOME"), "behaviour": "./mine; rm.toml"},
        {"seed": 3, "data_seed": 1, "thinking": "on"},
        {"dtype": "bfloat16", "device": "cuda", "attention": "sdpa", "revision": "main", "cache_memory": 0.0},
        {"trust_remote_code": True},
    ],
)
@pytest.mark.parametrize("words", [("eval", "dilemmas", "--alphas", -3, 3), ("train", "--sign", "neg"), ("diff",)])
def test_a_printed_command_names_the_run_that_it_was_printed_for(
    changes: dict[str, Any], words: tuple[object, ...]
) -> None:
    settings = Settings(**changes)
    program, *arguments = shlex.split(stored.command(settings, *words))
    assert program == "ws"
    command = cli._parse(arguments)
    assert run_settings(command, FitOptions(), EvalOptions()) == settings
    assert len(arguments) == len(words) + sum(1 if value is True else 2 for value in changes.values())


def test_following_the_printed_commands_makes_one_whole_run(
    tiny_folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "o u t"
    naming = ["--model", str(tiny_folders["llama"]), "--adapter", "ia3", "--seed", "1", "--out", str(out)]
    command = ["ws", "data", *naming, *QUICK]
    followed = []
    for _ in range(4):
        assert run(*command[1:]) == 0
        followed.append(command[1])
        command = pasted(capsys.readouterr().out)[0]
    assert followed == ["data", "train", "train", "diff"] and command[1] == "eval"
    assert run(*command[1:], "--rows", 2) == 0
    assert {path.parent for path in out.rglob("identity.json")} == {out / "tiny-llama" / "sycophancy" / "ia3" / "seed1"}
    assert list(out.rglob("scores-sycophancy.parquet"))


@pytest.mark.parametrize(
    "command", [["replicate"], ["report"], ["diff"], ["calibrate", "--prompts", "1", "--tokens", "2"]]
)
def test_every_printed_command_works(
    finished: tuple[Path, Path, Path], command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    fit = [*QUICK, *MEASURED] if command == ["replicate"] else []
    assert run(*addressed(command, *finished), *fit) == 0
    found = pasted(capsys.readouterr().out)
    assert found
    for program, *words in found:
        assert program == "ws" and run(*words, *(["--rows", 1] if words[0] == "eval" else [])) == 0
    assert not re.search(r"^(?!eval-).*rebuilding", capsys.readouterr().out, re.MULTILINE)


def test_a_remedy_names_the_run(
    finished: tuple[Path, Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    naming = ["--model", str(finished[0]), "--out", str(tmp_path), "--adapter", "ia3"]
    for command in (["eval"], ["calibrate"]):
        assert run(*command, *naming) == 2
        remedy = capsys.readouterr().err.partition("Make it with: ")[2]
        parsed = run_settings(cli._parse(shlex.split(remedy)[1:]), FitOptions(), EvalOptions())
        assert (parsed.model, parsed.out, parsed.adapter) == (str(finished[0]), tmp_path, "ia3")


# -------------------------------------------------------------------- scores of an older engine


def rebuilt(folder: Path, before: dict[str, int]) -> set[str]:
    return {name for name, stamp in stamps(folder).items() if stamp != before.get(name)}


def stamps(folder: Path) -> dict[str, int]:
    return {path.stem: path.stat().st_mtime_ns for path in (folder / "stages").iterdir()}


def newer_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored, "SCORES_VERSION", score.SCORES_VERSION + 1)


def test_what_a_run_has_scored_is_scored_anew_by_another_engine(
    tiny_folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = Settings(
        model=str(tiny_folders["qwen3"]), out=tmp_path, dtype="bfloat16", grid=Grid(2, 1, 2), rows=2, samples=1,
        train={"rank": 2}, sampling={"max_new_tokens": 4}, alphas=(0.0, 1.0), control_seeds=1,
    )  # fmt: skip

    def measured() -> Path:
        with Replication(settings) as one:
            one.report()
            evaluate.existing_run(one, evaluate.Ask("feedback", rows=2), [1.0])
            return one.folder.path

    folder = measured()
    before = stamps(folder)
    measured()
    assert rebuilt(folder, before) == set()
    newer_engine(monkeypatch)
    measured()
    assert rebuilt(folder, before) == {"eval", "rounding", "eval-feedback", "replies", "other-replies"}


def test_what_a_comparison_has_scored_is_scored_anew_by_another_engine(
    tiny_folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = Settings(
        model=str(tiny_folders["qwen3"]), out=tmp_path, grid=Grid(2, 1, 2), rows=40, train={"rank": 2},
        sampling={"max_new_tokens": 4},
    )  # fmt: skip

    def measured() -> Path:
        with ComparisonRun(settings, Plan(families=("lora",))) as comparison:
            comparison.strengths([], [])
            comparison.dev_scores([], {})
            comparison.scores([], [], {})
            return comparison.folder.path

    folder = measured()
    before = stamps(folder)
    measured()
    assert rebuilt(folder, before) == set()
    newer_engine(monkeypatch)
    measured()
    assert rebuilt(folder, before) == {"scores", "scores_equal", "scores_controls", "scores_dev", "calibration"}


# -------------------------------------------------------------------- resuming


def test_a_killed_eval_keeps_its_finished_pieces(
    finished: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, out, folder = finished
    arguments = ("eval", "dilemmas", "--rows", 2, "--alphas", 1, 2, 3, "--model", model, "--out", out)
    written: list[Path] = []
    original = score.write_table

    def killed_late(path: Path, table: Any) -> None:
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(path)
        original(path, table)

    with monkeypatch.context() as patch:
        patch.setattr(score, "write_table", killed_late)
        assert run(*arguments) == 130
    before, kept = list(written), [path for path in written if path.is_file()]
    assert kept == before and not (folder / "stages" / "eval-dilemmas.json").exists()
    written.clear()
    with monkeypatch.context() as patch:
        patch.setattr(score, "write_table", lambda path, table: (written.append(path), original(path, table)))
        assert run(*arguments) == 0
    assert written and not {*written} & {*before}, "no piece is scored twice"
    assert len(pl.read_parquet(folder / "scores-dilemmas.parquet")["alpha"].unique()) == 4
    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "score", lambda *_, **__: pytest.fail("the table is there already"))
        assert run(*arguments) == 0


def test_a_killed_task_of_the_harness_keeps_its_finished_strengths(
    finished: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model, out, folder = finished
    asked: list[float] = []

    def evaluated(_: Any, task: str, conditions: Any, **options: Any) -> Iterator[list[dict[str, Any]]]:
        for condition in conditions:
            alpha = condition.key()["alpha"]
            asked.append(alpha)
            if asked == [-1.0, 0.0]:
                raise KeyboardInterrupt
            yield [{"task": task, "metric": "acc", "alpha": alpha, "value": alpha / 2, "stderr": None, "edit": "dW"}]

    monkeypatch.setattr(harness, "evaluate", evaluated)
    monkeypatch.setattr(harness, "version", lambda: "1")
    arguments = ("eval", "--task", "lm-eval:mine", "--alphas", -1, 1, "--model", model, "--out", out, "--json")
    assert run(*arguments) == 130
    asked.clear()
    capsys.readouterr()
    assert run(*arguments) == 0
    assert asked == [0.0, 1.0]
    assert [(row["alpha"], row["value"]) for row in json.loads(capsys.readouterr().out)] == [
        (-1, -0.5),
        (0, 0),
        (1, 0.5),
    ]
    assert len(read_json(folder / "lm-eval-mine.json")) == 3


# -------------------------------------------------------------------- commands that only read a run


def test_looking_at_a_run_never_trains_it_again(finished: tuple[Path, Path, Path]) -> None:
    model, out, folder = finished
    before = (folder / "direction.safetensors").read_bytes(), (folder / "pairs.parquet").stat().st_mtime_ns
    assert run("subspace", "--model", model, "--out", out, "--dtype", "bfloat16") in (0, 2)
    assert run("subspace", "--model", model, "--out", out) == 0
    assert ((folder / "direction.safetensors").read_bytes(), (folder / "pairs.parquet").stat().st_mtime_ns) == before


def test_the_export_that_is_suggested_works_for_families_that_are_not_low_rank(
    finished: tuple[Path, Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("diff", "--model", finished[0], "--out", tmp_path, "--adapter", "dora", *QUICK) == 0
    export = next(words for _, *words in pasted(capsys.readouterr().out) if words[0] == "export")
    assert export[-2:] == ["--format", "merged"] and run(*export, "--out", tmp_path / "merged") == 0


def test_a_run_whose_record_is_no_object_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text("[]")
    assert run("report", tmp_path) == 2
    assert "config.json is not a JSON object. Repeat the ws replicate command" in capsys.readouterr().err


def test_replies_are_measured_too_where_the_model_cannot_answer_the_choices(
    finished: tuple[Path, Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The random model answers at chance, so the instrument of its headline is the replies."""
    model, out, folder = finished
    copy = tmp_path / "out"
    shutil.copytree(out, copy)
    assert run("eval", "sycophancy", "--model", model, "--out", copy, "--rows", 4, "--json") == 0
    means = json.loads(capsys.readouterr().out)
    told = [line for line in means if line["probe"] == "sycophancy-replies"]
    scores = pl.read_parquet(copy / folder.relative_to(out) / "scores-sycophancy.parquet")
    for line in told:
        rows = scores.filter(
            pl.col("probe") == line["probe"], pl.col("metric") == "logratio", pl.col("alpha") == line["alpha"]
        )
        expected = (rows["value"] * rows["label"]).mean()
        assert line["mean"] == pytest.approx(expected) and line["metric"] == "logratio"
    assert {line["alpha"] for line in told} == {-2, -1, 0, 1, 2}
