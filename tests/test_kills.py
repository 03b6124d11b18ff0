"""Commands that are killed outright, at random moments and at every stage boundary: a rerun ends with the same scores.

Every command is a process of its own that gets SIGKILL; nothing in the program knows of the test.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import polars as pl
import pytest

import killing
from ws.base.files import digest, read_json
from ws.base.store import stage_records
from ws.pocket import tiny

pytestmark = pytest.mark.slow

FIT = ("--topics", 2, "--personas", 1, "--samples", 2, "--rank", 2, "--max-new-tokens", 4)
QUICK = (*FIT, "--rows", 2, "--control-seeds", 1, "--shown", 1, "--judged", 1, "--alphas", -1, 0, 1)
COMMANDS = {
    "replicate": ("replicate", *QUICK),
    "sweep": ("sweep", "--families", "lora", "ia3", *QUICK),
    "eval": ("eval", "dilemmas", "--rows", 8, "--alphas", -3, -2, 2, 3),
    "compare": ("compare", *FIT, "--topics", 4, "--rows", 4, "--families", "lora", "--activations", "--steps",
                "--draws", 2, "--shuffles", 0, "--budgets", 0.005),
}  # fmt: skip
KILLS = {"replicate": 7, "sweep": 5, "eval": 5, "compare": 3}
"""How often each command is killed at a random moment."""


@dataclass(frozen=True)
class Undisturbed:
    """The commands without any kill, each run when it is first asked for: the model, the out folders, the seconds."""

    root: Path
    model: Path
    seconds: dict[str, float] = field(default_factory=dict)

    def out(self, name: str) -> Path:
        """The out folder of a command that ran to its end."""
        place = self.root / name
        if name not in self.seconds:
            if name == "eval":
                shutil.copytree(self.out("replicate"), place)
            self.seconds[name] = killing.timed(self.words(name, place), self.root / f"{name}.log")
        return place

    def words(self, name: str, out: Path) -> list[object]:
        return [*COMMANDS[name], "--model", self.model, "--out", out]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    root = tmp_path_factory.mktemp("kills")
    tiny.make("qwen3", root / "model", layers=2)
    assert killing.finished(["--version"], root / "log") == 0  # the server starts with the first command
    return Undisturbed(root, root / "model")


def begun(name: str, whole: Undisturbed, place: Path) -> Path:
    """An out folder in which the command has not run; `eval` needs a finished run there."""
    if name == "eval":
        shutil.copytree(whole.out("replicate"), place)
    return place


def tables(out: Path) -> dict[str, Path]:
    """Every stored result of a command, by its place; not the pieces that stages keep while they run."""
    files = [file for pattern in ("scores*.parquet", "pairs.parquet", "direction.safetensors", "*.npz")
             for file in out.rglob(pattern) if ".partial" not in file.parts]  # fmt: skip
    return {str(file.relative_to(out)): file for file in files}


def assert_same(out: Path, reference: Path) -> None:
    """All results are those of the undisturbed command, and nothing of the kills is left."""
    found, wanted = tables(out), tables(reference)
    assert found.keys() == wanted.keys() and any("scores" in name for name in wanted)
    for name, file in wanted.items():
        if file.suffix == ".parquet":
            assert pl.read_parquet(found[name]).equals(pl.read_parquet(file)), name
        assert digest(found[name]) == digest(file), name
    assert not [file for file in out.rglob("*") if ".partial" in file.parts and file.is_file()]
    assert not [file for file in out.rglob("*.tmp") if "base" not in file.parts], "pieces of the base have no lock"
    for file in out.rglob("reproduce.json"):
        recorded = {stage: record["outputs"] for stage, record in stage_records(file.parent).items()}
        assert {stage: part["outputs"] for stage, part in read_json(file)["stages"].items()} == recorded


@pytest.mark.parametrize("name", COMMANDS)
def test_kills_at_random_moments_change_nothing(name: str, whole: Undisturbed, tmp_path: Path) -> None:
    rng, kills, reference = random.Random(f"kills/{name}"), 0, whole.out(name)
    places: Iterator[Path] = (tmp_path / f"out{number}" for number in range(100))
    out = begun(name, whole, next(places))
    while kills < KILLS[name]:
        moment = rng.uniform(0.05, 0.6) * whole.seconds[name]
        if killing.killed_when(whole.words(name, out), tmp_path / "log", lambda now: now > moment):  # noqa: B023
            kills += 1
        else:  # it came to its end before: the next kills hit a new run
            assert_same(out, reference)
            out = begun(name, whole, next(places))
    assert killing.finished(whole.words(name, out), tmp_path / "log") == 0, (tmp_path / "log").read_text()
    assert_same(out, reference)


@pytest.mark.parametrize("name", ["replicate", "compare"])
def test_a_kill_at_every_stage_boundary_changes_nothing(name: str, whole: Undisturbed, tmp_path: Path) -> None:
    out, seen, kills, reference = tmp_path / "out", set[Path](), 0, whole.out(name)

    def is_at_a_boundary(_: float) -> bool:
        new = set(out.rglob("stages/*.json")) - seen
        seen.update(new)
        return bool(new)

    while killing.killed_when(whole.words(name, out), tmp_path / "log", is_at_a_boundary):
        kills += 1
    stages = {file.relative_to(reference) for file in reference.rglob("stages/*.json")}
    assert {file.relative_to(out) for file in seen} == stages
    assert kills >= len(stages) - 3, "two stages may end between two looks, and the last may be the end"
    assert_same(out, reference)


# ---------------------------------------------------------------- other ends


def error_of(log: Path) -> str:
    """The error line of the only command that wrote into the log."""
    lines = log.read_text().splitlines()
    errors = [line for line in lines if line.startswith("ws: ")]
    assert len(errors) == 1 and not any("Traceback" in line for line in lines), "\n".join(lines)
    return errors[0]


@pytest.mark.parametrize("moment", ["personas.json", "direction.safetensors"])
def test_ctrl_c_stops_and_says_how_to_continue(moment: str, whole: Undisturbed, tmp_path: Path) -> None:
    words, log = whole.words("replicate", tmp_path / "out"), tmp_path / "log"
    process = killing.start(words, log)
    killing.wait_for(moment, tmp_path / "out", process)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGINT)
    assert killing.ended(process, log) == 130
    assert error_of(log) == "ws: interrupted; run the same command again to continue"
    assert killing.finished(words, tmp_path / "again") == 0
    assert_same(tmp_path / "out", whole.out("replicate"))


def test_two_runs_in_one_folder_do_not_meet(whole: Undisturbed, tmp_path: Path) -> None:
    words = whole.words("replicate", tmp_path / "out")
    first = killing.start(words, tmp_path / "first")
    killing.wait_for("identity.json", tmp_path / "out", first)
    assert killing.finished(words, tmp_path / "second") == 2
    assert "another ws process is using" in error_of(tmp_path / "second")
    assert killing.ended(first, tmp_path / "first") == 0
    assert_same(tmp_path / "out", whole.out("replicate"))


@pytest.mark.parametrize("limit", [2_000, 60_000])
def test_a_file_that_cannot_grow_is_one_line_and_a_rerun_continues(
    limit: int, whole: Undisturbed, tmp_path: Path
) -> None:
    words, log = whole.words("replicate", tmp_path / "out"), tmp_path / "log"
    assert killing.ended(killing.start(words, log, largest_file=limit), log) == 2
    assert "File too large. Free space or choose another --out; run again to continue" in error_of(log)
    assert not list((tmp_path / "out").rglob("*.tmp"))
    assert killing.finished(words, tmp_path / "again") == 0
    assert_same(tmp_path / "out", whole.out("replicate"))


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, of 200 KiB; skipped where tests may not mount one."""
    place = tmp_path / "disk"
    place.mkdir()
    options = ["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(place)]
    if shutil.which("mount") is None or subprocess.run(options, capture_output=True, check=False).returncode:
        pytest.skip("mounting a file system is not permitted here")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def remount(place: Path, option: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{option}", str(place)], check=True)


def test_a_full_disk_is_one_line_and_a_rerun_with_space_continues(
    disk: Path, whole: Undisturbed, tmp_path: Path
) -> None:
    words, log = whole.words("replicate", disk / "out"), tmp_path / "log"
    assert killing.finished(words, log) == 2
    assert "No space left on device. Free space or choose another --out" in error_of(log)
    remount(disk, "size=50m")
    assert killing.finished(words, tmp_path / "again") == 0
    assert "done before" in (tmp_path / "again").read_text()
    assert_same(disk / "out", whole.out("replicate"))


def test_a_full_disk_during_a_conversion_asks_for_another_folder(
    disk: Path, whole: Undisturbed, tmp_path: Path
) -> None:
    gguf = tmp_path / "model.gguf"
    assert killing.finished(["export", whole.model, "--format", "gguf", "--out", gguf], tmp_path / "export") == 0
    assert killing.finished(["convert", gguf, disk / "folder"], tmp_path / "log") == 2
    assert "No space left on device. Free space or choose another folder;" in error_of(tmp_path / "log")
    assert not list(disk.iterdir())


def test_a_read_only_folder_is_one_line(disk: Path, whole: Undisturbed, tmp_path: Path) -> None:
    remount(disk, "size=50m")
    assert killing.finished(whole.words("replicate", disk / "old"), tmp_path / "old") == 0
    remount(disk, "ro")
    for number, out in enumerate(("new", "old")):
        log = tmp_path / str(number)
        assert killing.finished(whole.words("replicate", disk / out), log) == 2
        assert "Read-only file system. Choose another folder with --out" in error_of(log)
    remount(disk, "rw")


def test_no_clock_decides_what_is_done(whole: Undisturbed, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(whole.out("replicate"), out)
    for number, file in enumerate(sorted(out.rglob("*"))):
        os.utime(file, (0, number % 2 * 4e9))  # 1970 and 2096, in turn
    assert killing.finished(whole.words("replicate", out), tmp_path / "log") == 0
    log = (tmp_path / "log").read_text()
    assert log.count("(done before)") == len(list(whole.out("replicate").rglob("stages/*.json")))
    assert_same(out, whole.out("replicate"))
