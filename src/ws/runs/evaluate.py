"""Measure existing runs further: score one more probe, or a task of lm-evaluation-harness, on their directions.

A probe made from a public data set (`DATA`) has measures of its own; they are printed, and stored in
`measures-<probe>.json` with the source of the data and the number of rows that were kept.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from ws.algebra.direction import Direction
from ws.base.errors import UserError
from ws.base.files import digest, read_json, write_json, write_table
from ws.base.records import plain
from ws.base.store import Shards
from ws.edit.condition import Condition, Edit
from ws.eval import (
    custom,
    dilemmas,
    feedback,
    harness,
    instrument,
    scenarios,
    side_effects,
    sycophancy,
    true_false,
    truthfulqa,
)
from ws.eval.data_set import DataSet
from ws.fitting.run_settings import arithmetic, command, scored_with, shared_base
from ws.measure.probe import Kind, Probe
from ws.measure.score import score
from ws.report import data_sets
from ws.report.summary import Scores, alpha_key, signed_mean
from ws.runs.replicate import Replication

SHIPPED = ("sycophancy", "dilemmas", "feedback", "side-effects")
"""Names of the shipped probes; `sycophancy` means the probe of the run's behaviour, with its replies if the unedited
model cannot answer the choices."""
DATA: Mapping[str, Callable[[str, int | None], DataSet]] = {
    truthfulqa.NAME: truthfulqa.load,
    true_false.NAME: true_false.load,
    scenarios.NAME: scenarios.load,
}
"""Probes made from public data sets: how each reads its source."""
NAMES = (*SHIPPED, *DATA)
WITHOUT_CHOICES = ("side-effects", truthfulqa.NAME, scenarios.NAME)


@dataclass(frozen=True)
class Ask:
    """The probe to score on a run: by name, or the user's JSONL file.

    `think` is the maximum length in tokens of a thought before each choice; `source` says where the dilemmas come from,
    `data` where a public data set does; `answers` are the two words for a user's file.
    """

    probe: str
    source: str = "own"
    rows: int | None = None
    think: int = 0
    answers: tuple[str, str] = ("Yes", "No")
    data: str | None = None

    def __post_init__(self) -> None:
        if self.probe not in NAMES and not self.probe.endswith(".jsonl"):
            raise UserError(f"there is no probe {self.probe!r}", f"Choose {', '.join(NAMES)}, or give a .jsonl file.")
        if self.think and self.probe in WITHOUT_CHOICES:
            raise UserError(
                f"--think works with choices only, and {self.probe} has no choice probes",
                "Leave out --think, or choose another probe.",
            )
        if self.probe in DATA and not self.data:
            raise UserError(f"{self.probe} needs a data set", "Give a file, a folder or a hub id with --data.")
        if self.probe not in DATA and self.data:
            raise UserError(
                f"--data works with {', '.join(DATA)} only",
                "Use --dilemmas for dilemmas, or leave out --data.",
            )

    @property
    def name(self) -> str:
        """The name of the probe in the names of files."""
        return (self.probe if self.probe in NAMES else Path(self.probe).stem) + ("-guided" if self.think else "")

    def load(self, run: Replication) -> Asked:
        """The probes themselves, with what is known of their source."""
        data: DataSet | None = None
        origin: dict[str, Any] | None = None
        match self.probe:
            case "sycophancy":
                found = [sycophancy.probe(run.behaviour, self.rows)]
                told = instrument.replies(run.behaviour, self.rows)
                if told is not None and not self.think and run.ability.instrument == "replies":
                    found.append(told)
            case "dilemmas":
                loaded = dilemmas.load(self.source, self.rows)
                found, origin = [loaded.probe()], loaded.record()
            case "feedback":
                found = [feedback.probe(self.rows)]
            case "side-effects":
                found = side_effects.probes(run.model, self.rows)
            case name if name in DATA and self.data:
                data = DATA[name](self.data, self.rows)
                found = [data.probe]
            case file:
                found = [custom.read(Path(file), answers=self.answers, limit=self.rows)]
        return Asked([probe.guided(self.think) for probe in found] if self.think else found, data, origin)


@dataclass(frozen=True)
class Asked:
    """Probes, the public data set that they are made from, and the origin of dilemmas."""

    probes: list[Probe]
    data: DataSet | None
    origin: dict[str, Any] | None


def existing_run(run: Replication, ask: Ask, alphas: Sequence[float]) -> pl.DataFrame:
    """Score probes under the run's direction, write all rows, and return a table of means with intervals.

    Also writes `measures-<probe>.json` for a public data set and for dilemmas.
    """
    edit, asked, strengths = direction_of(run), ask.load(run), sorted({0.0, *alphas})
    probes = asked.probes
    path = run.folder / f"scores-{ask.name}.parquet"
    inputs = {
        "direction": digest(run.folder / "direction.safetensors"),
        "probes": [probe.key for probe in probes],
        "alphas": strengths,
        **scored_with(run.model),
    }

    def make(shards: Shards) -> None:
        conditions = [Condition.of(edit, alpha) for alpha in strengths]
        base = shared_base(run.model, run.settings.out)
        write_table(path, score(run.model, probes, conditions, shards=shards, base_shards=base))

    run.folder.build(f"eval-{ask.name}", inputs, [path.name], make)
    table = pl.read_parquet(path)
    record = run.folder / f"measures-{ask.name}.json"
    if asked.data is not None:
        found = data_sets.measurements(table, run.edit_name, asked.data)
        write_json(record, data_sets.record(asked.data, found))
        return data_sets.as_table(found)
    means = pl.concat(
        [_means(table, run.edit_name, one.name, metric) for one in probes for metric in METRICS[one.kind]]
    )
    if asked.origin is not None:
        write_json(record, plain({"probe": ask.name, "data": asked.origin, "means": means.to_dicts()}))
    return means


def direction_of(run: Replication) -> Edit:
    """The run's direction as an Edit."""
    path = run.folder / "direction.safetensors"
    if not path.is_file():
        remedy = f"Make it with: {command(run.settings, 'diff')}"
        raise UserError(f"the run in {run.folder.path} has no direction yet", remedy)
    return Edit(run.edit_name, Direction.load(path), run.settings.seed, run.settings.data_seed)


def harness_task(
    run: Replication, task: str, alphas: Sequence[float], limit: int | None, task_folder: Path | None
) -> pl.DataFrame:
    """Run a task of lm-evaluation-harness (`lm-eval:NAME`) at every strength and write `lm-eval-<NAME>.json`."""
    name = task_name(task)
    edit, strengths = direction_of(run), sorted({0.0, *alphas})
    path = run.folder / f"lm-eval-{name}.json"
    inputs = {
        "direction": digest(run.folder / "direction.safetensors"),
        "harness": harness.version(),
        "task_folder": None if task_folder is None else digest(task_folder),
        "limit": limit,
        "alphas": strengths,
        "rendering": run.model.chat.rendering_key,
        **arithmetic(run.model),
    }

    def make(shards: Shards) -> None:
        files = {alpha: shards.path(f"{alpha_key(alpha)}.json") for alpha in strengths}
        missing = [alpha for alpha, file in files.items() if not file.is_file()]
        conditions = [Condition.of(edit, alpha) for alpha in missing]
        measured = harness.evaluate(run.model, name, conditions, limit=limit, task_folder=task_folder)
        for alpha, records in zip(missing, measured, strict=True):
            write_json(files[alpha], [{key: record[key] for key in _COLUMNS} for record in records])
        write_json(path, [record for file in files.values() for record in read_json(file)])

    run.folder.build(f"lm-eval-{name}", inputs, [path.name], make)
    return pl.DataFrame(read_json(path), schema_overrides={"stderr": pl.Float64}).sort("task", "metric", "alpha")


def task_name(task: str) -> str:
    """The name in `lm-eval:NAME`; it becomes part of a file name, so it must not be a path."""
    if not task.startswith(harness.PREFIX):
        raise UserError(f"--task {task} does not start with {harness.PREFIX}", f"Write --task {harness.PREFIX}NAME.")
    name = task.removeprefix(harness.PREFIX)
    if not name or Path(name).name != name:
        raise UserError(f"{name!r} is not the name of a task", f"Write --task {harness.PREFIX}NAME.")
    return name


_COLUMNS = ("task", "metric", "alpha", "value", "stderr")
"""Columns that are kept from a record of the harness."""


METRICS: dict[Kind, tuple[str, ...]] = {
    "choice": ("logratio", "pmass"),
    "guided": ("logratio", "pmass", "forced"),
    "likelihood": ("nll",),
    "contrast": ("logratio",),
    "divergence": ("kl",),
    "reply": ("distinct3", "tokens", "finished", "json"),
}
"""Metrics that are shown, by kind of probe."""


def _means(table: pl.DataFrame, edit: str, probe: str, metric: str) -> pl.DataFrame:
    """Mean of a metric by group and strength; log-ratios are multiplied by their label first."""
    scores = Scores(table)
    lines = []
    for alpha in scores.alphas(edit):
        rows = scores.rows(probe, metric, edit, alpha)
        if metric != "logratio":
            rows = rows.with_columns(pl.lit(1, dtype=pl.Int8).alias("label"))
        for group in rows["group"].unique(maintain_order=True):
            part = signed_mean(rows.filter(pl.col("group") == group))
            lines.append({"probe": probe, "metric": metric, "group": group, "alpha": alpha, **part._asdict()})
    return pl.DataFrame(lines, schema=MEANS)


MEANS: dict[str, Any] = {
    "probe": pl.String, "metric": pl.String, "group": pl.String, "alpha": pl.Float64, "mean": pl.Float64,
    "low": pl.Float64, "high": pl.Float64, "n": pl.Int64, "clusters": pl.Int64, "method": pl.String,
}  # fmt: skip
"""Columns of the table of means."""
