"""`ws verify` finds every kind of damage and names it; `ws reproduce` gives the same bytes, or says where they part."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from safetensors.torch import load_file, save_file

from making import assert_one_line, edit_json
from test_cli import one_line, run
from ws.algebra.direction import Direction
from ws.base import environment
from ws.base.errors import UserError
from ws.base.files import digest, read_json
from ws.base.store import RunFolder, stage_records
from ws.fitting.data import Grid
from ws.fitting.run_settings import Settings, settings_of
from ws.model.loading import ChatModel
from ws.pocket import tiny
from ws.runs import reproduce, verify
from ws.runs.replicate import Replication

SMALL: dict[str, Any] = {
    "grid": Grid(topics=2, personas=1, samples=2), "train": {"rank": 2}, "sampling": {"max_new_tokens": 4},
    "alphas": (-1.0, 0.0, 1.0), "control_seeds": 1, "rows": 2, "samples": 1, "judged": 1,
}  # fmt: skip
STAGES = {
    "personas",
    "data",
    "train-pos",
    "train-neg",
    "diff",
    "eval",
    "alignment",
    "samples",
    "replies",
    "other-replies",
}


@pytest.fixture(scope="module")
def finished(tiny_folders: dict[str, Path], qwen: ChatModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run; tests that change it take a copy."""
    out = tmp_path_factory.mktemp("verified")
    with Replication(Settings(model=str(tiny_folders["qwen3"]), out=out, **SMALL), qwen) as replication:
        replication.report()
        return replication.folder.path


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished run, at its own place in another out folder."""
    out = finished.parents[3]
    shutil.copytree(out, tmp_path / "out")
    return tmp_path / "out" / finished.relative_to(out)


def failure(target: Path, model: str | None = None) -> verify.Check:
    """The check that failed."""
    *passed, last = verify.verify(target, model)
    assert all(check.passed for check in passed) and not last.passed
    return last


# ---------------------------------------------------------------- what is stored


def test_a_run_stores_what_decided_it(finished: Path) -> None:
    stored = read_json(finished / "reproduce.json")
    assert stored.keys() == {"schema", "identity", "settings", "environment", "stages"}
    assert stored["stages"].keys() == STAGES == stage_records(finished).keys()
    assert stored["settings"] == read_json(finished / "config.json")["settings"]
    assert {"seed", "data_seed", "fingerprint"} <= stored["identity"].keys()
    assert {"torch", "transformers", "peft"} <= stored["environment"]["packages"].keys()
    for stage in stored["stages"].values():
        assert stage.keys() == {"inputs", "outputs"}, "all stages have one environment"
        for name, known in stage["outputs"].items():
            assert digest(finished / name) == known


def test_no_home_folder_and_no_host_name_is_stored(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(Path, "home", lambda: Path("/home/someone"))
    with RunFolder(tmp_path, {"model": "/home/someone/models/x"}) as folder:
        folder.settings = {"pairs": ["/home/someone", "/home/someoneelse/x"], "seed": 0}
        folder.build("stage", {"file": "/home/someone/a"}, ["out"], lambda _: (tmp_path / "out").write_text("x"))  # type: ignore[arg-type, return-value]
    stored = read_json(tmp_path / "reproduce.json")
    assert stored["identity"] == {"model": "~/models/x"} and stored["stages"]["stage"]["inputs"] == {"file": "~/a"}
    assert stored["settings"]["pairs"] == ["~", "/home/someoneelse/x"]
    assert not {"node", "host", "user"} & stored["environment"].keys()


def test_a_stage_of_another_environment_keeps_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def make(name: str) -> Callable[[object], None]:
        return lambda _: (tmp_path / name).write_text("x") and None

    with RunFolder(tmp_path, {}) as folder:
        folder.build("first", {}, ["a"], make("a"))
        newer = {**environment.described(), "python": "9.9"}
        monkeypatch.setattr(environment, "described", lambda: newer)
        folder.build("second", {}, ["b"], make("b"))
    stored = read_json(tmp_path / "reproduce.json")
    assert stored["environment"]["python"] == "9.9" and "environment" not in stored["stages"]["second"]
    assert environment.differences(stored["stages"]["first"]["environment"], newer) == [
        f"python {stored['stages']['first']['environment']['python']} and 9.9"
    ]


# ---------------------------------------------------------------- verify


def test_a_sound_run_passes_every_check(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {file: file.stat().st_mtime_ns for file in finished.rglob("*") if file.name != ".lock"}
    assert run("verify", finished) == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(line.startswith("ok ") for line in lines) and len(lines) > 2 * len(STAGES) - 4
    assert {file: file.stat().st_mtime_ns for file in finished.rglob("*") if file.name != ".lock"} == before
    assert run("verify", finished / "direction.safetensors") == run("verify", finished / "pos") == 0
    capsys.readouterr()
    assert run("verify", finished, "--json") == 0
    assert all(check["passed"] for check in json.loads(capsys.readouterr().out))


def test_an_export_reloads(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("export", finished, "--out", tmp_path / "adapter") == 0
    capsys.readouterr()
    assert run("verify", tmp_path / "adapter") == 0
    assert "PEFT loads it to the same model" in capsys.readouterr().out


def test_whole_models_are_checked_too(
    finished: Path, tmp_path: Path, tiny_folders: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    for kind, name in (("merged", "merged"), ("gguf", "model.gguf")):
        assert run("export", finished, "--format", kind, "--out", tmp_path / name) == 0
        assert run("verify", tmp_path / name) == 0
    capsys.readouterr()
    broken = tmp_path / "merged" / "model.safetensors"
    broken.write_bytes(broken.read_bytes()[:-50])
    assert run("verify", tmp_path / "merged") == 2
    assert "model.safetensors" in one_line(capsys)


def cut_scores(run: Path) -> None:
    file = run / "scores.parquet"
    file.write_bytes(file.read_bytes()[:-9])


def drop_adapter(run: Path) -> None:
    (run / "pos" / "adapter_model.safetensors").unlink()


def other_settings(run: Path) -> None:
    edit_json(run / "config.json", lambda stored: stored["settings"].update(alphas=[-2.0, 0.0, 2.0]))


def other_inputs(run: Path) -> None:
    edit_json(run / "stages" / "eval.json", lambda stored: stored["inputs"].update(engine=1))


def no_evaluation(run: Path) -> None:
    for name in ("stages/eval.json", "scores.parquet", "summary.json", "report.html"):
        (run / name).unlink()


def no_eval_record(run: Path) -> None:
    (run / "stages" / "eval.json").unlink()


def no_replies(run: Path) -> None:
    (run / "stages" / "replies.json").unlink()


def no_summary(run: Path) -> None:
    (run / "summary.json").unlink()


def no_record(run: Path) -> None:
    shutil.rmtree(run / "stages")


def broken_record(run: Path) -> None:
    (run / "stages" / "eval.json").write_text("[]")


def accept(run: Path, stage: str, output: str) -> None:
    """Record an output as it is now, as if the stage had written it."""
    edit_json(run / "stages" / f"{stage}.json", lambda stored: stored["outputs"].update({output: digest(run / output)}))


def infinite_score(run: Path) -> None:
    file = run / "scores.parquet"
    table = pl.read_parquet(file)
    table.with_columns(value=pl.when(pl.arange(pl.len()) == 3).then(float("nan")).otherwise("value")).write_parquet(
        file
    )
    accept(run, "eval", file.name)


def empty_direction(run: Path) -> None:
    file = run / "direction.safetensors"
    (Direction.load(file) * 0.0).save(file)
    for stage, record in stage_records(run).items():
        if "direction" in record["inputs"]:
            edit_json(run / "stages" / f"{stage}.json", lambda stored: stored["inputs"].update(direction=digest(file)))
    accept(run, "diff", file.name)


def other_direction(run: Path) -> None:
    file = run / "direction.safetensors"
    (Direction.load(file) * 1.5).save(file)
    for stage, record in stage_records(run).items():
        if "direction" in record["inputs"]:
            edit_json(run / "stages" / f"{stage}.json", lambda stored: stored["inputs"].update(direction=digest(file)))
    accept(run, "diff", file.name)


@pytest.mark.parametrize(
    ("harm", "step", "detail"),
    [
        (cut_scores, "files of eval", "scores.parquet is not what the stage wrote"),
        (drop_adapter, "files of train-pos", "pos is not what the stage wrote"),
        (other_settings, "inputs of eval", "eval is out of date: alphas"),
        (other_inputs, "inputs of eval", "eval is out of date: engine changed"),
        (no_record, "stages", "has no finished stage"),
        (no_evaluation, "after base", "summary.json is missing. Continue with: ws report"),
        (no_eval_record, "after base", "eval is not finished. Continue with: ws report"),
        (no_replies, "after base", "replies is not finished. Continue with: ws report"),
        (no_summary, "after base", "summary.json is missing. Continue with: ws report"),
        (broken_record, "after read", "eval.json is not the record of a stage"),
        (infinite_score, "scores.parquet", "1 of "),
        (empty_direction, "direction", "it changes nothing"),
        (other_direction, "direction", "it differs from pos - neg"),
    ],
)
def test_damage_is_found_and_named(
    copied: Path, capsys: pytest.CaptureFixture[str], harm: Callable[[Path], None], step: str, detail: str
) -> None:
    harm(copied)
    found = failure(copied)
    assert found.name == step and detail in found.detail
    if harm is broken_record:
        assert f"Delete it, then: ws report {copied}" in found.detail
    if harm is cut_scores:
        assert run("verify", copied) == 2
        assert "scores.parquet is not what the stage wrote. Build it again with: ws report" in one_line(capsys)


def test_a_run_that_is_older_than_the_personas_stage_is_sound(copied: Path) -> None:
    (copied / "stages" / "personas.json").unlink()
    (copied / "personas.json").unlink()
    assert all(check.passed for check in verify.verify(copied))


def test_a_base_that_changed_is_found(finished: Path, tmp_path: Path, tiny_folders: dict[str, Path]) -> None:
    other = tmp_path / "other"
    tiny.make("qwen3", other, seed=5, layers=4)
    found = failure(finished / "direction.safetensors", str(other))
    assert "belongs to the base model" in found.detail


def test_a_moved_run_is_told_from_a_broken_one(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "a" / "b" / "c" / "elsewhere")
    with pytest.raises(UserError) as caught:
        settings_of(tmp_path / "a" / "b" / "c" / "elsewhere")
    assert_one_line(caught.value, "elsewhere was moved", "tiny-qwen3/sycophancy/lora/seed0")


def test_an_adapter_that_changes_nothing_is_found(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished / "pos", tmp_path / "zero")
    weights = tmp_path / "zero" / "adapter_model.safetensors"
    save_file({name: torch.zeros_like(tensor) for name, tensor in load_file(weights).items()}, weights)
    assert "it changes nothing" in failure(tmp_path / "zero").detail


@pytest.mark.parametrize(
    ("target", "told"),
    [
        ("nowhere", "there is no "),
        ("empty", "empty is not a run, adapter or model folder"),
        ("page.html", "page.html is not a direction file"),
    ],
)
def test_what_is_no_result_is_one_line(
    target: str, told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "page.html").write_text("<!doctype html>")
    assert run("verify", tmp_path / target) == 2
    assert told in one_line(capsys)


# ---------------------------------------------------------------- show


@pytest.mark.parametrize(
    ("name", "content", "told", "remedy"),
    [
        ("samples.parquet", None, "samples.parquet is missing", "Make it again with: ws report"),
        ("samples.parquet", "junk", "samples.parquet is damaged", "Make it again with: ws report"),
        ("subspace_summary.csv", "", "subspace_summary.csv is damaged", "Make it again with: ws report"),
        ("pos/train_log.csv", "a,b\n1,2\n", "train_log.csv is damaged", "Make it again with: ws report"),
        ("config.json", "[]", "config.json is not a JSON object", "Repeat the ws replicate command"),
        ("config.json", "{", "config.json is not valid JSON", "Repeat the ws replicate command"),
        ("summary.json", "{", "summary.json is not valid JSON", "Write it again with: ws report"),
    ],
)
def test_showing_a_damaged_run_is_one_line(
    copied: Path, capsys: pytest.CaptureFixture[str], name: str, content: str | None, told: str, remedy: str
) -> None:
    (copied / name).unlink()
    if content is not None:
        (copied / name).write_text(content)
    assert run("show", copied) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("ws: ") and told in line]
    assert len(error) == 1 and remedy in error[0]
    if name == "summary.json":
        assert run("show", copied, "--json") == 2
        assert told in one_line(capsys)


def test_a_damaged_config_is_written_again_by_the_command_that_made_the_run(
    copied: Path, tiny_folders: dict[str, Path], qwen: ChatModel
) -> None:
    before = stage_records(copied)
    (copied / "config.json").write_text("[]")
    with pytest.raises(UserError, match="Repeat the ws replicate command"):
        settings_of(copied)
    with Replication(Settings(model=str(tiny_folders["qwen3"]), out=copied.parents[3], **SMALL), qwen) as again:
        again.report()
    assert stage_records(copied) == before and settings_of(copied).alphas == (-1.0, 0.0, 1.0)


# ---------------------------------------------------------------- reproduce


def test_a_rerun_has_the_same_bytes_and_a_changed_run_says_where_it_parts(
    copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("reproduce", copied) == 0
    text = capsys.readouterr().out
    assert f"all {len(STAGES) + 1} stages are bit-identical" in text and "environment" not in text
    again = Path(f"{copied.parents[3]}-reproduced") / copied.relative_to(copied.parents[3])
    for name in ("pairs.parquet", "direction.safetensors", "scores.parquet", "pos", "neg", "replies.parquet"):
        assert digest(copied / name) == digest(again / name)
    assert run("reproduce", copied) == 2
    assert "holds a finished run" in one_line(capsys)
    # the same comparison where the first run was trained otherwise and recorded on another machine
    shutil.rmtree(again.parents[3])
    edit_json(copied / "stages" / "train-neg.json", lambda stored: stored["environment"].update(processor="other"))
    with (copied / "neg" / "train_log.csv").open("a") as log:
        log.write("x")
    assert run("reproduce", copied, "--json") == 2
    captured = capsys.readouterr()
    assert "the runs first differ at train-neg: neg/train_log.csv. Compare the environments" in captured.err
    found = json.loads(captured.out)
    assert [stage["stage"] for stage in found["stages"] if stage["outputs"]] == ["train-neg"]
    assert found["environment"] == [f"processor other and {environment.described()['processor']}"]


def test_a_run_that_is_not_finished_is_not_reproduced(copied: Path, tmp_path: Path) -> None:
    (copied / "summary.json").unlink()
    with pytest.raises(UserError, match=r"is not finished\. Continue it with: ws report"):
        reproduce.reproduce(copied, tmp_path / "again")
    assert not (tmp_path / "again").exists()
    with pytest.raises(UserError, match="is not a run folder"):
        reproduce.reproduce(tmp_path, tmp_path / "again")


def test_changed_inputs_are_named(finished: Path, tiny_folders: dict[str, Path], tmp_path: Path) -> None:
    settings = replace(settings_of(finished), out=tmp_path)
    with Replication(replace(settings, sampling={"max_new_tokens": 3})) as other:
        other.data()
        first, second = stage_records(finished)["data"], stage_records(other.folder.path)["data"]
        found = reproduce.compared("data", finished, other.folder.path, first, second)
    assert found.inputs == ("sampling",) and found.outputs == ("pairs.parquet",) and not found.is_identical


# ---------------------------------------------------------------- the list of promises


def test_every_test_on_the_list_of_promises_exists() -> None:
    tests = Path(__file__).parent
    rows = [row for row in (tests.parent / "docs" / "reliability.md").read_text().splitlines() if row.startswith("| ")]
    named = [re.findall(r"`(test_\w+\.py)::(test_\w+)`", row) for row in rows if "| test |" not in row]
    assert len(named) > 25 and all(named), "every promise has a test"
    for file, name in {pair for pairs in named for pair in pairs}:
        assert f"def {name}(" in (tests / file).read_text(encoding="utf-8"), f"{file}::{name}"
