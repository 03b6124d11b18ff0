"""Commands that are killed outright, at random moments and at every stage boundary: a rerun ends with the same scores.

Every command is a process of its own that gets SIGKILL; nothing in the program knows of the test.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import polars as pl
import pytest

import killing
from ws.base.store import digest
from ws.pocket import tiny

pytestmark = pytest.mark.slow

FIT = ("--topics", 2, "--personas", 1, "--samples", 2, "--rank", 2, "--max-new-tokens", 4)
QUICK = (*FIT, "--rows", 2, "--control-seeds", 1, "--shown", 1, "--judged", 1, "--alphas", -1, 0, 1)
COMMANDS = {
    "replicate": ("replicate", *QUICK),
    "sweep": ("sweep", "--families", "lora", "ia3", *QUICK),
    "eval": ("eval", "dilemmas", "--rows", 8, "--alphas", -3, -2, 2, 3),
    "compare": ("compare", *FIT, "--rows", 4, "--families", "lora", "--activations", "mean", "--steps", 1,
                "--draws", 2, "--shuffles", 0, "--budgets", 0.5),
}  # fmt: skip
KILLS = {"replicate": 7, "sweep": 6, "eval": 4, "compare": 5}
"""How often each command is killed at a random moment."""


@dataclass(frozen=True)
class Undisturbed:
    """The commands without any kill: the model, the out folder of each, and the seconds that it took."""

    model: Path
    out: dict[str, Path]
    seconds: dict[str, float]

    def words(self, name: str, out: Path) -> list[object]:
        return [*COMMANDS[name], "--model", self.model, "--out", out]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    root = tmp_path_factory.mktemp("kills")
    tiny.make("qwen3", root / "model", layers=2)
    found = Undisturbed(root / "model", {name: root / name for name in COMMANDS}, {})
    assert killing.finished(["--version"], root / "log") == 0  # the server starts with the first command
    for name in COMMANDS:
        if name == "eval":
            shutil.copytree(found.out["replicate"], found.out["eval"])
        found.seconds[name] = killing.timed(found.words(name, found.out[name]), root / "log")
    return found


def begun(name: str, whole: Undisturbed, place: Path) -> Path:
    """An out folder in which the command has not run; `eval` needs a finished run there."""
    if name == "eval":
        shutil.copytree(whole.out["replicate"], place)
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


@pytest.mark.parametrize("name", COMMANDS)
def test_kills_at_random_moments_change_nothing(name: str, whole: Undisturbed, tmp_path: Path) -> None:
    rng, kills = random.Random(f"kills/{name}"), 0
    places: Iterator[Path] = (tmp_path / f"out{number}" for number in range(100))
    out = begun(name, whole, next(places))
    while kills < KILLS[name]:
        moment = rng.uniform(0.05, 0.8) * whole.seconds[name]
        if killing.killed_when(whole.words(name, out), tmp_path / "log", lambda now: now > moment):  # noqa: B023
            kills += 1
        else:  # it came to its end before: the next kills hit a new run
            assert_same(out, whole.out[name])
            out = begun(name, whole, next(places))
    assert killing.finished(whole.words(name, out), tmp_path / "log") == 0, (tmp_path / "log").read_text()
    assert_same(out, whole.out[name])


@pytest.mark.parametrize("name", ["replicate", "compare"])
def test_a_kill_at_every_stage_boundary_changes_nothing(name: str, whole: Undisturbed, tmp_path: Path) -> None:
    out, seen, kills = tmp_path / "out", set[Path](), 0

    def is_at_a_boundary(_: float) -> bool:
        new = set(out.rglob("stages/*.json")) - seen
        seen.update(new)
        return bool(new)

    while killing.killed_when(whole.words(name, out), tmp_path / "log", is_at_a_boundary):
        kills += 1
    stages = {file.relative_to(whole.out[name]) for file in whole.out[name].rglob("stages/*.json")}
    assert {file.relative_to(out) for file in seen} == stages
    assert kills >= len(stages) - 3, "two stages may end between two looks, and the last may be the end"
    assert_same(out, whole.out[name])
