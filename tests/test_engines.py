"""Engines and stores without a cluster: order of tasks, failures, copies that were cut short."""

from __future__ import annotations

import errno
import json
import shlex
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ws.base import extras
from ws.base.errors import UserError
from ws.base.files import write_text
from ws.base.store import RunFolder
from ws.commands.cli import _main
from ws.engines import Local, Task
from ws.engines.ray_cluster import RayCluster
from ws.engines.store_mirror import StoreMirror
from ws.fitting.run_settings import Settings
from ws.runs import cells
from ws.runs.cells import Cell, Outcome, Workplace


def add(shared: int | None, number: int, *before: int | None) -> int:
    if number < 0:
        raise UserError("negative")
    return (shared or 0) + number + sum(one or 0 for one in before)


def test_the_local_engine_hands_on_values_and_goes_on_after_a_failure() -> None:
    made = []

    def ten() -> int:
        made.append(10)
        return 10

    tasks = [Task("a", add, (1,), "ten"), Task("b", add, (-1,), "ten", ("a",)), Task("c", add, (2,), "ten", ("a", "b"))]
    done = {one.task.name: one for one in Local().run(tasks, {"ten": ten})}
    assert (done["a"].value, done["c"].value) == (11, 10 + 2 + 11 + 0)
    assert done["b"].error == "negative" and made == [10]


def test_an_exception_that_is_no_user_error_ends_a_local_run() -> None:
    tasks = [Task("a", add, ("text",))]
    with pytest.raises(TypeError):
        list(Local().run(tasks, {}))


# -------------------------------------------------------------------- the list of tasks


def sweep_tasks(tmp_path: Path, lr: str | float) -> list[Task]:
    settings = Settings(out=tmp_path, train={"lr": lr})
    wanted = [Cell(family, seed, data) for data in (0, 1) for family in ("lora", "oft") for seed in (0, 1)]
    return cells.tasks_of(settings, wanted, Workplace())[0]


def test_runs_wait_for_their_responses_and_for_the_rate_of_their_family(tmp_path: Path) -> None:
    tasks = {task.name: task for task in sweep_tasks(tmp_path, "auto")}
    assert len(tasks) == 8 + 2
    first, second = tasks["lora, seed 0, data seed 0"], tasks["lora, seed 1, data seed 1"]
    assert first.after == ("responses, data seed 0",)
    assert second.after == ("responses, data seed 1", first.name)
    names = list(tasks)
    assert all(names.index(earlier) < names.index(name) for name in names for earlier in tasks[name].after)
    fixed = {task.name: task for task in sweep_tasks(tmp_path, 1e-3)}
    assert fixed[second.name].after == ("responses, data seed 1",)


def test_a_run_takes_the_rate_of_the_first_of_its_family(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[Settings] = []

    def stop(settings: Settings, _: object) -> Any:
        asked.append(settings)
        raise UserError("enough")

    monkeypatch.setattr(cells, "Replication", stop)
    settings = Settings(out=tmp_path, train={"lr": "auto"})
    for first, rate in ((Outcome(Cell("lora", 0, 0), {"lr": 0.02}), 0.02), (None, "auto")):
        with pytest.raises(UserError, match="enough"):
            cells.measured(None, replace(settings, seed=1), Workplace(), tmp_path, None, first)
        assert asked[-1].train["lr"] == rate


def test_different_environments_are_told(tmp_path: Path) -> None:
    one = {"packages": {"torch": "2.9"}, "processor": "A"}
    other = {"packages": {"torch": "2.10"}, "processor": "A"}
    runs = [Outcome(Cell("lora", seed, 0), {}, environment=env) for seed, env in enumerate((one, one, other))]
    assert cells.mixed(runs[:2]) == ()
    assert cells.mixed(runs) == ("torch 2.9 and 2.10: lora, seed 2, data seed 0",)


# -------------------------------------------------------------------- stores


def stage(folder: Path, text: str) -> bool:
    """Build a stage whose only output holds `text`; whether it was built."""
    with RunFolder(folder, {"name": "run"}) as run:
        return run.build("one", {"text": text}, ["out.txt"], lambda _: write_text(folder / "out.txt", text)).built


def mirrors(tmp_path: Path) -> tuple[StoreMirror, StoreMirror]:
    url = f"file://{tmp_path / 'store'}"
    return StoreMirror(url, tmp_path / "here"), StoreMirror(url, tmp_path / "there")


def test_a_run_folder_goes_to_the_store_and_comes_back_finished(tmp_path: Path) -> None:
    here, there = mirrors(tmp_path)
    folder, other = here.root / "m/run", there.root / "m/run"
    with here.working_in(folder):
        assert stage(folder, "x")
        (folder / ".out.txt.1-ab.tmp").write_text("half")
    there.pull(other)
    assert not stage(other, "x"), "nothing is built again"
    assert not list((tmp_path / "store").rglob("*.tmp")) and not list((tmp_path / "store").rglob(".lock"))
    assert stage(other, "y")
    there.push(other)
    here.pull(folder)
    assert (folder / "out.txt").read_text() == "y" and not stage(folder, "y")


def test_a_copy_that_was_cut_short_is_built_again(tmp_path: Path) -> None:
    here, there = mirrors(tmp_path)
    folder, other = here.root / "run", there.root / "run"
    stage(folder, "x")
    here.push(folder)
    stored = tmp_path / "store/run"
    manifest = json.loads((stored / "manifest.json").read_text())
    del manifest["out.txt"]  # the copy ended after the record, against its order
    (stored / "manifest.json").write_text(json.dumps(manifest))
    there.pull(other)
    assert not (other / "out.txt").exists() and stage(other, "x")


def test_what_a_folder_no_longer_has_leaves_the_store_and_files_of_others_stay(tmp_path: Path) -> None:
    here, there = mirrors(tmp_path)
    folder, other = here.root / "base", there.root / "base"
    for mirror, names in ((here, "ab"), (there, "c")):
        for name in names:
            write_text(mirror.root / "base" / name, name)
        mirror.push(mirror.root / "base")
    (folder / "b").unlink()
    here.push(folder)
    assert {file.name for file in (tmp_path / "store/base").iterdir()} == {"a", "c", "manifest.json"}
    there.pull(other)
    assert (other / "a").is_file() and not (other / "b").exists()


def test_newer_work_of_this_machine_is_not_replaced(tmp_path: Path) -> None:
    here, there = mirrors(tmp_path)
    folder, other = here.root / "run", there.root / "run"
    stage(folder, "x")
    here.push(folder)
    stage(folder, "longer")  # without the store
    here.pull(folder)
    assert (folder / "out.txt").read_text() == "longer" and not stage(folder, "longer")
    here.push(folder)
    there.pull(other)
    assert not stage(other, "longer")


def test_work_that_both_had_is_brought_up_to_date(tmp_path: Path) -> None:
    here, there = mirrors(tmp_path)
    folder, other = here.root / "run", there.root / "run"
    stage(folder, "x")
    stage(other, "x")  # made on both machines, before there was a store
    here.push(folder)
    there.pull(other)
    stage(folder, "newer")
    here.push(folder)
    there.pull(other)
    assert (other / "out.txt").read_text() == "newer"


@pytest.mark.parametrize("content", [b"", b"[]", b"\xff", b'{"../../escape": "x", "/abs": "y", "gone": "z"}'])
def test_a_damaged_manifest_is_one_of_an_empty_folder(tmp_path: Path, content: bytes) -> None:
    here, there = mirrors(tmp_path)
    stage(here.root / "run", "x")
    here.push(here.root / "run")
    (tmp_path / "store/run/manifest.json").write_bytes(content)
    there.pull(there.root / "run")
    assert not list(tmp_path.glob("escape")) and stage(there.root / "run", "x")
    here.push(here.root / "run")
    manifest = json.loads((tmp_path / "store/run/manifest.json").read_text())
    assert {"out.txt", "stages/one.json", "identity.json"} <= set(manifest)


def test_a_store_inside_the_runs_is_refused(tmp_path: Path) -> None:
    for url in (tmp_path / "out", tmp_path / "out/store"):
        with pytest.raises(UserError, match="lies in --out"):
            StoreMirror(str(url), tmp_path / "out").require_usable()
    StoreMirror(str(tmp_path / "store"), tmp_path / "out").require_usable()
    assert not list((tmp_path / "store").iterdir())


def test_a_run_that_did_not_arrive_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="did not arrive"):
        Workplace("ray", store=f"file://{tmp_path}/store").fetch(tmp_path / "out/run", tmp_path / "out", "summary.json")


def test_a_folder_on_a_file_system_without_locks_can_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", refuse)
    assert stage(tmp_path / "run", "x")


def test_a_value_that_is_given_twice_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, told in ((["sweep", "--seeds", "0", "0"], "--seeds names 0 twice"),
                        (["sweep", "--families", "oft", "oft"], "--families names oft twice"),
                        (["compare", "--data-seeds", "1", "1"], "--data-seeds names 1 twice"),
                        (["compare", "--models", "pocket", "pocket"], "would be compared twice")):  # fmt: skip
        assert _main([*words, "--out", str(tmp_path)]) == 2
        assert told in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_fits_of_several_comparisons_have_different_names(tmp_path: Path) -> None:
    wanted = [Settings(model=model, behaviour=name, out=tmp_path) for model in ("pocket", "pocket-gemma")
              for name in ("sycophancy", "honesty")]  # fmt: skip
    names = [task.name for one in wanted for task in cells.fits_of(one, [Cell("lora", 0, 0)], Workplace())]
    assert len(names) == len(set(names)) == 8


def test_a_store_that_fails_in_the_middle_is_told_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here, _ = mirrors(tmp_path)

    def refuse(*_: object) -> None:
        raise OSError("quota exceeded\nmore")

    monkeypatch.setattr(here._remote[0], "put_file", refuse)
    stage(here.root / "run", "x")
    with pytest.raises(UserError, match=r"cannot write to file://.*quota exceeded\)"):
        here.push(here.root / "run")


@pytest.mark.parametrize(("options", "told"), [
    (["--store", "nothing://x/y"], "nothing"),
    (["--store", "file:///proc/none"], "cannot write to file:///proc/none"),
    (["--address", "auto"], "--engine ray"),
    (["--gpus-per-run", "1"], "--engine ray"),
    (["--engine", "ray", "--cpus-per-run", "0"], "a run cannot use 0 CPUs"),
    (["--engine", "ray", "--gpus-per-run", "1.5"], "a run cannot use 1.5 GPUs"),
    (["--cpus-per-run", "nan"], "a run cannot use nan CPUs"),
    (["--engine", "ray", "--retries", "-1"], "--retries is -1"),
])  # fmt: skip
def test_a_wrong_workplace_is_told_before_anything_runs(
    options: list[str], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _main(["sweep", "--families", "lora", "--out", str(tmp_path), *options]) == 2
    error = capsys.readouterr().err
    assert told in error and error.count("\n") == 1
    assert not list(tmp_path.rglob("pairs.parquet"))


def test_without_the_library_the_remedy_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    with pytest.raises(UserError, match=r"Ray is not installed.*\[ray\]"):
        list(RayCluster().run([], {}))


def test_paths_of_the_user_are_absolute_on_a_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("sycophancy", "own", "pocket"):  # a name of the package is never a path
        (tmp_path / name).mkdir()
    (tmp_path / "mine.toml").write_text("")
    given = Settings(behaviour="mine.toml", out=Path("out"))
    there = Workplace(engine="ray").settings(given)
    assert (there.behaviour, there.out) == (str(tmp_path / "mine.toml"), tmp_path / "out")
    assert Workplace(engine="ray").settings(Settings(out=tmp_path)) == Settings(out=tmp_path, device="cpu")
    assert Workplace().settings(given) == given


def test_another_process_is_waited_for_on_a_cluster_only(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(cells, "POLL", 0.01)
    first = RunFolder(tmp_path, {})
    tries: list[Callable[[], None]] = [lambda: None, first.close]

    def opened() -> RunFolder:
        if tries:
            tries.pop(0)()
        return RunFolder(tmp_path, {})

    with pytest.raises(UserError, match="another ws process"):
        Workplace().patiently(lambda: RunFolder(tmp_path, {}))
    Workplace(engine="ray").patiently(opened).close()
    assert not tries


def test_a_missing_library_comes_with_a_line_that_installs_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = str(extras.missing("Ray", "ray"))
    assert said.startswith("Ray is not installed. Run: ")
    line = shlex.split(said.partition("Run: ")[2])
    assert line[:4] == [sys.executable, "-m", "pip", "install"]
    root = Path(__file__).parents[1]
    assert line[4:] == ["-c", f"{root}/constraints.txt", "-e", f"{root}[ray]"], "in a clone, with its pinned versions"
    monkeypatch.setattr(extras, "_CLONE", tmp_path)
    assert str(extras.missing("Ray", "ray")).endswith(" -m pip install 'weight-steering[ray]'")
