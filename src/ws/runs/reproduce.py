"""Run a finished run again in a new folder, with the settings that it stored, and compare both stage by stage.

On one machine a rerun is bit-identical: every random number belongs to a row, and no file holds a time. On another
machine, rounding differs; the comparison then says where it first shows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ws.base import console, environment
from ws.base.errors import UserError
from ws.base.files import digest, read_json
from ws.base.store import stage_records
from ws.fitting.run_settings import settings_of
from ws.report.findings import SUMMARY_FILE
from ws.runs.replicate import Replication

WITHOUT_MEANING = ("seconds",)
"""Entries of a summary that no rerun repeats."""


@dataclass(frozen=True)
class Comparison:
    """A stage of both runs: inputs with different values, and output files with different bytes."""

    stage: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]

    @property
    def is_identical(self) -> bool:
        """Whether every output has the same bytes."""
        return not self.outputs


@dataclass(frozen=True)
class Reproduction:
    """Both runs compared: the stages in the order in which they were built; what differs between the environments.

    not_repeated: stages of the first run that a replication does not have, such as further measurements.
    """

    folder: Path
    stages: tuple[Comparison, ...]
    environment: tuple[str, ...]
    not_repeated: tuple[str, ...]

    @property
    def first_difference(self) -> Comparison | None:
        """The first stage whose outputs differ; None if all are bit-identical."""
        return next((stage for stage in self.stages if not stage.is_identical), None)


def reproduce(run: Path, out: Path | None = None, **loading_options: Any) -> Reproduction:
    """Run again in `out` (by default a folder `<out>-reproduced` beside the one of the run), and compare.

    An interrupted rerun continues. A finished one is refused: what it would be compared with is no new run.
    """
    settings = settings_of(run, **loading_options)
    if not (run / SUMMARY_FILE).is_file():
        remedy = f"Continue it with: {console.command('report', run)}"
        raise UserError(f"the run in {run} is not finished", remedy)
    place = out or settings.out.with_name(f"{settings.out.name}-reproduced")
    if place.resolve() == settings.out.resolve():
        raise UserError(f"{place} is the folder of the run itself", "Choose another folder with --out.")
    with Replication(replace(settings, out=place)) as again:
        if (again.folder / SUMMARY_FILE).is_file():
            raise UserError(f"{again.folder.path} holds a finished run", "Delete it or choose another --out.")
        again.report()
        folder, order = again.folder.path, tuple(again.seconds)
    first, second = stage_records(run), stage_records(folder)
    stages = [compared(stage, run, folder, first.get(stage, {}), second[stage]) for stage in order]
    return Reproduction(
        folder, (*stages, _summaries(run, folder)), tuple(_environments(first, second)),
        tuple(stage for stage in first if stage not in second),
    )  # fmt: skip


def compared(stage: str, run: Path, folder: Path, first: Mapping[str, Any], second: Mapping[str, Any]) -> Comparison:
    """One stage of two runs by their records and files; `first` is empty if the first run does not have it."""
    one, other = first.get("inputs", {}), second["inputs"]
    inputs = tuple(name for name in dict.fromkeys((*one, *other)) if one.get(name) != other.get(name))
    outputs = tuple(name for output in second["outputs"] for name in _different(run, folder, output))
    return Comparison(stage, inputs, outputs)


def _different(run: Path, folder: Path, output: str) -> Iterator[str]:
    """The files of an output, itself or inside of it, that do not have the same bytes in both runs."""
    names = {
        str(file.relative_to(place))
        for place in (run, folder)
        for file in ((place / output).rglob("*") if (place / output).is_dir() else [place / output])
        if not file.is_dir()
    }
    for name in sorted(names):
        one, other = run / name, folder / name
        if not (one.is_file() and other.is_file() and digest(one) == digest(other)):
            yield name


def _summaries(run: Path, folder: Path) -> Comparison:
    one, other = (
        {name: value for name, value in read_json(place / SUMMARY_FILE).items() if name not in WITHOUT_MEANING}
        for place in (run, folder)
    )
    names = tuple(name for name in dict.fromkeys((*one, *other)) if one.get(name) != other.get(name))
    return Comparison("summary", (), tuple(f"{SUMMARY_FILE}: {name}" for name in names))


def _environments(first: Mapping[str, Any], second: Mapping[str, Any]) -> Iterator[str]:
    """Differences between the environments of the same stages; nothing is known of runs of earlier versions."""
    seen = set()
    for stage in second:
        one, other = first.get(stage, {}).get("environment"), second[stage].get("environment")
        for difference in environment.differences(one, other) if one and other else ():
            if difference not in seen:
                seen.add(difference)
                yield difference
