"""Everything that a finished run tells, read from the files of its folder. Pages and the terminal show parts of it.

Nothing heavy is imported, so a terminal shows a run at once. Runs of earlier versions lack some files; what they hold
is then None or empty.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from ws.base import console
from ws.base.errors import UserError
from ws.base.files import read_json
from ws.base.poles import POLES, Pole
from ws.base.store import read_config, read_table
from ws.report.findings import Summary, read_summary

FLIPS_FILE = "flips.parquet"
LOG_FILE, RESULT_FILE = "train_log.csv", "train_result.json"
OF_FAMILIES = ("family", "runs", "delta", "delta_minus", "dd_delta", "facts_1", "kl_1", "norm", "trainable")
OF_METHODS = ("strength", "method", "kind", "sign", "alpha", "own", "dd", "reached_p95", "pmass", "facts", "nll_delta")
"""Columns that the report shows of the tables of a sweep and of a comparison; tables of earlier versions lack some."""


@dataclass(frozen=True)
class Training:
    """The training of one side: its result as stored, and its log with one line per step."""

    result: Mapping[str, Any]
    log: pl.DataFrame

    @classmethod
    def read(cls, folder: Path) -> Training:
        """Read the folder of an adapter in a run folder."""
        again = f"Make it again with: {console.command('report', folder.parent)}"
        log = read_table(folder / LOG_FILE, folder.parent, infer_schema=False)
        numbers = pl.col("loss", "eval_loss", "lr", "grad_norm").cast(pl.Float64)
        try:
            log = log.with_columns(pl.col("step").cast(pl.Int64), numbers)
        except pl.exceptions.PolarsError as error:
            raise UserError(f"{folder / LOG_FILE} is damaged", again) from error
        return cls(read_json(folder / RESULT_FILE, again), log)

    def curve(self, column: str) -> list[tuple[int, float]]:
        """Step and value of a column of the log, where it was measured."""
        return list(self.log.select("step", column).drop_nulls().iter_rows())


@dataclass(frozen=True)
class Story:
    """A finished run.

    samples: prompt, alpha, response. alignment: energies of the direction by kind of module. matrices: the norm of
    every changed matrix with its layer and kind. flips: rows that change side (`report.flips`). families, methods: the
    tables of a sweep and of a comparison of the same behaviour beside the run.
    """

    folder: Path
    summary: Summary
    config: Mapping[str, Any]
    samples: pl.DataFrame | None
    alignment: pl.DataFrame | None
    matrices: pl.DataFrame | None
    flips: pl.DataFrame | None
    training: Mapping[Pole, Training]
    families: pl.DataFrame | None
    methods: pl.DataFrame | None

    @classmethod
    def read(cls, folder: Path) -> Story:
        """Read a run folder that has a summary."""
        behaviour_folder = folder.resolve().parents[1]
        return cls(
            folder=folder,
            summary=read_summary(folder),
            config=read_config(folder),
            samples=_table(folder, "samples.parquet"),
            alignment=_table(folder, "subspace_summary.csv"),
            matrices=_table(folder, "subspace_per_layer.csv"),
            flips=_table(folder, FLIPS_FILE),
            training={
                pole: Training.read(folder / pole)
                for pole in POLES
                if all((folder / pole / name).is_file() for name in (LOG_FILE, RESULT_FILE))
            },
            families=_csv(behaviour_folder / "sweep_summary.csv", OF_FAMILIES),
            methods=_csv(behaviour_folder / "compare" / "comparison.csv", OF_METHODS),
        )

    @property
    def title(self) -> str:
        """Behaviour and model."""
        return f"{self.summary.behaviour} in {self.summary.model}"

    @property
    def norms_by_layer(self) -> dict[int, float]:
        """Layer -> Frobenius norm of the direction there; empty if it is not known.

        Runs of earlier versions stored only the norms of matrices, so biases and stacked experts are missing there.
        """
        if stored := self.config.get("direction", {}).get("norms_by_layer"):
            return {int(layer): norm for layer, norm in stored.items()}
        if self.matrices is None or self.matrices["layer"].null_count() == len(self.matrices):
            return {}
        squared = self.matrices.drop_nulls("layer").group_by("layer").agg((pl.col("norm") ** 2).sum().sqrt())
        return dict(squared.sort("layer").iter_rows())


def _table(run: Path, name: str) -> pl.DataFrame | None:
    return read_table(run / name, run, infer_schema_length=None) if (run / name).is_file() else None


def _csv(path: Path, columns: Sequence[str]) -> pl.DataFrame | None:
    """A table beside the run with at least these columns; None without the file or one of them.

    A run is shown even if a table of its neighbours is damaged.
    """
    if not path.is_file():
        return None
    try:
        found = pl.read_csv(path, infer_schema_length=None)
    except (OSError, pl.exceptions.PolarsError):
        console.warn(f"{path} is damaged and is left out; the command that wrote it makes it again")
        return None
    return found if set(columns) <= set(found.columns) else None
