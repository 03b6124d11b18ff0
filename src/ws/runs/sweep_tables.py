"""The tables of a sweep: results of every run, means over seeds by adapter family, and how stable their order is.

`sweep.json` is the plain form of `SweepTables` (`base.records`). The CSV files, `sweep.md` and the terminal show parts.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.table import Table

from ws.base import console, stats
from ws.base.files import atomic_file, write_json, write_text
from ws.base.records import FLAT, plain
from ws.report.document import markdown_table

MEASURES = (
    "delta", "delta_minus", "yes_no", "min_pmass", "dilemmas_-1", "dilemmas_0", "dilemmas_1", "dd_delta", "pmass_1",
    "facts_1", "kl_1", "nll_1", "norm", "cos_anti", "asymmetry", "drift_ratio", "cos_dw_m", "lr", "trainable",
    "seconds",
)  # fmt: skip
"""Columns of a run that have a mean over seeds.

`delta` and `delta_minus`: change at +1 and -1 by the instrument of the headline. `yes_no`: change at +1 of the plain
Yes/No question, the column of the replicated work; `min_pmass` is the least probability on its two answers.
"""
INSTRUMENTS = {
    "choice": "log p(Yes) - log p(No), balanced over both polarities and both orders of the answers",
    "replies": "log p(reply) - log p(opposite reply), nats per reply",
}
"""What `delta` measures, by the instrument of the runs."""


@dataclass(frozen=True)
class OverSeeds:
    """A mean over runs with its 95 % t interval over seeds; a single run has no interval."""

    mean: float
    low: float | None = None
    high: float | None = None

    @classmethod
    def of(cls, values: Sequence[float]) -> OverSeeds:
        """Mean and interval of one value per run."""
        interval = stats.over_seeds(values)
        return cls(interval.mean, interval.low, interval.high) if len(values) > 1 else cls(interval.mean)


@dataclass(frozen=True)
class Family:
    """One line of the table: an adapter family, how many runs it has, and their means by measure."""

    family: str
    runs: int
    measures: Mapping[str, OverSeeds] = field(metadata=FLAT)


@dataclass(frozen=True)
class RankStability:
    """How stable the order of the families is between seeds.

    ranks: the rank of every family (1 = largest) by replicate. mean_rho: the mean Spearman rho over all pairs of
    replicates; None with fewer than two replicates or three families.
    """

    ranks: Mapping[str, Mapping[str, float]]
    mean_rho: float | None


@dataclass(frozen=True)
class Failure:
    """A cell that did not finish, and the error that ended it."""

    cell: str
    error: str


@dataclass(frozen=True)
class SweepTables:
    """Everything that a sweep shows. `per_run` has one mapping of columns per finished cell."""

    per_run: tuple[Mapping[str, Any], ...]
    by_family: tuple[Family, ...]
    rank_stability: RankStability
    failed: tuple[Failure, ...] = ()
    mixed: tuple[str, ...] = ()
    """What differs between the environments of the runs; empty if all are alike."""

    @property
    def instrument(self) -> str:
        """What the columns of changes measure; the unedited model decides it, so all runs of a sweep agree."""
        return INSTRUMENTS[self.per_run[0]["instrument"]]

    @property
    def dilemma_noun(self) -> str:
        """What the dilemmas of the runs are called; all runs of a sweep have the same."""
        return str(self.per_run[0].get("dilemmas", "dilemmas"))


def of(rows: Sequence[Mapping[str, Any]], failed: Sequence[Failure] = ()) -> SweepTables:
    """The tables of finished cells, one mapping of columns each."""
    return SweepTables(tuple(rows), tuple(by_family(rows)), rank_stability(rows), tuple(failed))


def by_family(rows: Sequence[Mapping[str, Any]]) -> list[Family]:
    """Means over the runs of every family."""
    found = []
    for family in dict.fromkeys(row["family"] for row in rows):
        of_family = [row for row in rows if row["family"] == family]
        means = {name: OverSeeds.of([float(row[name]) for row in of_family]) for name in MEASURES}
        found.append(Family(family, len(of_family), means))
    return found


def rank_stability(rows: Sequence[Mapping[str, Any]], measure: str = "delta") -> RankStability:
    """How stable the order of the families is by a measure; replicates without all families are left out."""
    from scipy.stats import rankdata, spearmanr  # noqa: PLC0415 - slow import

    families = list(dict.fromkeys(row["family"] for row in rows))
    replicates: dict[tuple[int, int], dict[str, float]] = {}
    for row in rows:
        replicates.setdefault((row["seed"], row["data_seed"]), {})[row["family"]] = row[measure]
    whole = {key: values for key, values in replicates.items() if values.keys() == set(families)}
    ranks = {
        f"seed {seed}, data seed {data}": dict(
            zip(families, map(float, rankdata([-values[family] for family in families])), strict=True)
        )
        for (seed, data), values in whole.items()
    }
    keys = list(whole)
    rhos = [
        float(spearmanr([whole[a][f] for f in families], [whole[b][f] for f in families]).statistic)
        for number, a in enumerate(keys)
        for b in keys[number + 1 :]
        if len(families) > 2
    ]
    return RankStability(ranks, sum(rhos) / len(rhos) if rhos else None)


# -------------------------------------------------------------------- showing


@dataclass(frozen=True)
class Column:
    """A printed column: measure, heading, number format, and whether it has an interval and is in the brief table."""

    measure: str
    heading: str
    form: str
    has_interval: bool = False
    is_brief: bool = False
    """Whether the terminal table, which is narrower, has this column."""

    def cell(self, line: Family) -> str:
        """A family's mean, with its interval over seeds if the column shows it."""
        value = line.measures[self.measure]
        limits = f" [{value.low:+.2f}, {value.high:+.2f}]" if self.has_interval and value.low is not None else ""
        return format(value.mean, self.form) + limits


COLUMNS = (
    Column("delta_minus", "-1 minus 0", "+.2f", has_interval=True, is_brief=True),
    Column("delta", "+1 minus 0", "+.2f", has_interval=True, is_brief=True),
    Column("yes_no", "Yes/No, +1 minus 0", "+.2f", has_interval=True),
    Column("min_pmass", "min pmass", ".3f", is_brief=True),
    Column("dilemmas_-1", "dilemmas -1", "+.2f"), Column("dilemmas_0", "0", "+.2f"), Column("dilemmas_1", "+1", "+.2f"),
    Column("dd_delta", "dd_delta", "+.2f", has_interval=True, is_brief=True),
    Column("pmass_1", "pmass @ +1", ".3f"), Column("facts_1", "facts @ +1", ".3f", is_brief=True),
    Column("kl_1", "KL @ +1", ".3f"), Column("nll_1", "NLL @ +1", "+.3f"),
    Column("norm", "norm of dW", ".3g", is_brief=True),
    Column("cos_anti", "cos_anti", "+.2f"), Column("drift_ratio", "drift", ".2f"),
    Column("lr", "rate", "g"), Column("trainable", "trainable", ",.0f"),
    Column("seconds", "seconds", ".0f", is_brief=True),
)  # fmt: skip
"""The columns of the Markdown table."""


def cells_of(line: Family, columns: Sequence[Column] = COLUMNS) -> list[str]:
    """One family's line as text."""
    return [line.family, str(line.runs), *(column.cell(line) for column in columns)]


def show(tables: SweepTables) -> None:
    """Print the table of families with the brief columns."""
    columns = [column for column in COLUMNS if column.is_brief]
    about = "" if tables.dilemma_noun == "dilemmas" else f"; dd_delta on {tables.dilemma_noun}"
    table = Table(title=f"adapter families: {tables.instrument}{about}", title_justify="left", header_style="bold")
    for heading in ("adapter", "runs", *(column.heading for column in columns)):
        table.add_column(heading, justify="left" if heading == "adapter" else "right")
    for line in tables.by_family:
        table.add_row(*cells_of(line, columns))
    console.show(table)


def markdown(tables: SweepTables) -> str:
    """The table of families, its caption, the stability of their order, and the cells that failed."""
    headings = [column.heading.replace("dilemmas", tables.dilemma_noun) for column in COLUMNS]
    rho = tables.rank_stability.mean_rho
    parts = [
        markdown_table(["adapter", "runs", *headings], [cells_of(line) for line in tables.by_family]),
        f"Changes: {tables.instrument}. Yes/No: the plain question, as in the replicated work; min pmass: its least "
        "probability on the two answers. Log-ratios are in nats. Brackets: 95 % t interval over seeds (a single run "
        "has no interval). NLL: change on neutral text. Seconds: both adapters and the evaluation.",
        *([] if rho is None else [f"Order of the families between seeds: mean Spearman rho {rho:.2f}."]),
        *(["\n".join(f"- different environment ({one})" for one in tables.mixed)] if tables.mixed else []),
        *(["\n".join(f"- failed: {one.cell}: {one.error}" for one in tables.failed)] if tables.failed else []),
    ]
    return "\n\n".join(parts)


FILES = ("sweep.json", "sweep.md", "sweep_per_run.csv", "sweep_summary.csv")


def write(folder: Path, tables: SweepTables) -> None:
    """Write the `FILES`."""
    whole, readable, per_run, summary = (folder / name for name in FILES)
    write_json(whole, plain(tables))
    write_text(readable, f"# Adapter families\n\n{markdown(tables)}\n")
    _write_csv(per_run, tables.per_run)
    _write_csv(summary, [_flat(line) for line in tables.by_family])


def _flat(line: Family) -> dict[str, Any]:
    """A family's line as columns `delta`, `delta_low`, `delta_high` and so on."""
    found: dict[str, Any] = {"family": line.family, "runs": line.runs}
    for name, value in line.measures.items():
        found |= {name: value.mean, f"{name}_low": value.low, f"{name}_high": value.high}
    return found


def _write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    with atomic_file(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as handle:
        writer = csv.DictWriter(handle, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
