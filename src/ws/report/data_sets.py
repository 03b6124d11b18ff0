"""What a public data set says about a run: every measure at every strength, with its change, as records and a table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import polars as pl

from ws.base.records import plain
from ws.eval.data_set import DataSet, Readings
from ws.report.findings import Estimate
from ws.report.summary import Scores


@dataclass(frozen=True)
class Measurement:
    """A measure over a group at one strength, and its change against the base (None at strength 0)."""

    measure: str
    group: str
    alpha: float
    level: Estimate
    change: Estimate | None


def measurements(table: pl.DataFrame, edit: str, data: DataSet) -> list[Measurement]:
    """All measures of a data set, from a scores table, ordered by group, measure and strength."""
    scores = Scores(table)
    at = {alpha: data.measure(_readings(scores, data, edit, alpha)) for alpha in scores.alphas(edit)}
    return [
        Measurement(
            measure, group, alpha, Estimate.of(found[group, measure].level()),
            Estimate.of(found[group, measure].change(base)) if alpha else None,
        )
        for (group, measure), base in at[0.0].items()
        for alpha, found in at.items()
    ]  # fmt: skip


def _readings(scores: Scores, data: DataSet, edit: str, alpha: float) -> Readings:
    metrics = ("nll", "tokens") if data.probe.kind == "likelihood" else ("logratio", "pmass")
    rows = {metric: scores.rows(data.probe.name, metric, edit, alpha) for metric in metrics}
    return {metric: dict(part.select("row", "value").iter_rows()) for metric, part in rows.items()}


def record(data: DataSet, found: Sequence[Measurement]) -> dict[str, Any]:
    """Source, counts, definitions and measurements as plain data."""
    return plain({
        "probe": data.probe.name, "data": asdict(data.origin), "meaning": data.meaning, "measurements": list(found)
    })  # fmt: skip


def as_table(found: Sequence[Measurement]) -> pl.DataFrame:
    """One line for each measurement."""
    lines = []
    for one in found:
        level = asdict(one.level)
        change = asdict(one.change) if one.change else {}
        lines.append({
            "measure": one.measure, "group": one.group, "alpha": one.alpha,
            "value": level["mean"], "low": level["low"], "high": level["high"],
            "change": change.get("mean"), "change_low": change.get("low"), "change_high": change.get("high"),
            "n": level["n"],
        })  # fmt: skip
    return pl.DataFrame(lines, schema=COLUMNS)


COLUMNS: dict[str, Any] = {
    "measure": pl.String, "group": pl.String, "alpha": pl.Float64, "value": pl.Float64, "low": pl.Float64,
    "high": pl.Float64, "change": pl.Float64, "change_low": pl.Float64, "change_high": pl.Float64, "n": pl.Int64,
}  # fmt: skip
"""Columns of the table: the value with its 95 % limits, and the change against the base with its limits."""


def brief(table: pl.DataFrame) -> pl.DataFrame:
    """The table with limits in brackets, narrow enough for a terminal; the group is left out if there is only one."""
    lines = [
        {
            "measure": line["measure"], "group": line["group"], "alpha": f"{line['alpha']:+g}",
            "value [95 %]": _in_brackets(line["value"], line["low"], line["high"], ".3f"),
            "change [95 %]": _in_brackets(line["change"], line["change_low"], line["change_high"], "+.3f"),
            "n": line["n"],
        }
        for line in table.to_dicts()
    ]  # fmt: skip
    found = pl.DataFrame(lines)
    return found if found["group"].n_unique() > 1 else found.drop("group")


def _in_brackets(value: float | None, low: float | None, high: float | None, form: str) -> str:
    if value is None:
        return "-"
    return f"{value:{form}}" + ("" if low is None else f" [{low:{form}}, {high:{form}}]")
