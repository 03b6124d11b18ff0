"""From scores per layer to the tables that people read: means over layers per run, intervals over seeds, verdicts.

A run's number is the mean over the layers that its direction changes. The interval is a t interval over runs of one
family. `joint` is the geometric mean of the percentages on the block and the written axis, both averaged over layers
first; `gap_log2` is the logarithm of their quotient. `above_random` is the percentage of the way from random subspaces
of the same rank (0) to the oracle (100).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import polars as pl

from ws.base import stats
from ws.subspace.bases import BASES, Basis

HALF = 50.0
"""Percent of the oracle that separates inside from outside."""
ALIKE = 2.0
"""Standard deviations of random subspaces that a basis must be away from their mean."""
RANKED_ON: Mapping[str, str] = {
    "block": "what the direction changes in the residual stream, layer by layer (activations on EVAL prompts)",
    "written": "what dW writes into the residual stream (weights of o and down)",
    "read": "what dW reads from it (weights of q, k, v, gate, up)",
}
"""The axes on which bases are ranked, in words."""


def is_ranked(basis: Basis, metric: str) -> bool:
    """Whether a basis takes part in the ranking on an axis.

    Readers are not ranked on what is written, nor writers on what is read: a match would be accidental.
    """
    return (basis.axis, metric) not in {("reads", "written"), ("writes", "read")}


def summary(scores: pl.DataFrame) -> pl.DataFrame:
    """One row per family, basis and metric; `scores` has one per family, seed, layer, basis and metric."""
    per_run = (
        scores.group_by("family", "seed", "basis", "metric", maintain_order=True)
        .agg(
            pl.col("value", "null", "percent", "null_percent", "concentration", "rank").mean(),
            ((pl.col("value") - pl.col("null")).sum() / pl.col("null_sd").pow(2).sum().sqrt()).alias("z"),
            pl.len().alias("layers"),
        )
        .pipe(_with_joint)
    )
    rows = []
    for (family, name, metric), part in per_run.group_by("family", "basis", "metric", maintain_order=True):
        basis = BASES[str(name)]
        value, percent = (_over_runs(part[column].to_list()) for column in ("value", "percent"))
        row = {
            "family": family, "basis": name, "kind": basis.axis, "group": basis.family,
            "uses_trained_dW": basis.uses_trained_dW, "metric": metric, "runs": len(part),
            "layers": part["layers"].max(), "rank": part["rank"].mean(),
            **_limits("value", value), "null": part["null"].mean(), "concentration": part["concentration"].mean(),
            "z": part["z"].mean(), **_limits("percent", percent), "null_percent": part["null_percent"].mean(),
        }  # fmt: skip
        rows.append({**row, "above_random": _above_random(row), "verdict": verdict(row)})
    return pl.DataFrame(rows, infer_schema_length=None)


def verdict(row: Mapping[str, Any]) -> str:
    """What the numbers of one basis on one axis say.

    at random level   the interval over seeds of the percentage holds that of random subspaces, or |z| < 2: random
                      subspaces differ as much from each other
    below random      all of the interval is below random
    mostly inside     all of it is above half of the oracle (and above random)
    mostly outside    all of it is below half of the oracle, above random
    about half        else
    Empty where there is no percentage or no z. With one run the interval is its number alone.
    """
    percent, null = row["percent"], row["null_percent"]
    if percent is None or null is None or row["z"] is None:
        return ""
    low, high = row["percent_low"], row["percent_high"]
    if low is None or high is None:
        low = high = percent
    if low <= null <= high or abs(row["z"]) < ALIKE:
        return "at random level"
    if high < null:
        return "below random"
    return "mostly inside" if low > HALF else "mostly outside" if high < HALF else "about half"


def ranked(table: pl.DataFrame, family: str, metric: str) -> pl.DataFrame:
    """The bases of a family that are ranked on an axis, best first: by `above_random`, which is fair between ranks."""
    names = [name for name, basis in BASES.items() if is_ranked(basis, metric)]
    rows = table.filter(pl.col("family") == family, pl.col("metric") == metric, pl.col("basis").is_in(names))
    return rows.sort("above_random", descending=True)


def is_candidate(name: str) -> bool:
    """Whether a basis is built without any trained direction and is no null: the ones that the question is about."""
    basis = BASES[name]
    return not basis.uses_trained_dW and not basis.is_null


def candidates(table: pl.DataFrame, family: str, metric: str) -> pl.DataFrame:
    """The ranked bases that are candidates."""
    rows = ranked(table, family, metric)
    return rows.filter([is_candidate(name) for name in rows["basis"]])


def between_runs(overlaps: pl.DataFrame) -> pl.DataFrame:
    """Mean over layers of the overlaps of the oracles of every pair of runs."""
    return overlaps.group_by("axis", "first", "second", maintain_order=True).agg(
        pl.col("overlap", "first_cosine", "null").mean(), pl.len().alias("layers")
    )


def _above_random(row: Mapping[str, Any]) -> float | None:
    """Percent of the way from random subspaces (0) to the oracle (100)."""
    percent, null = row["percent"], row["null_percent"]
    return None if percent is None or null is None or null >= 100 else 100 * (percent - null) / (100 - null)


def _with_joint(per_run: pl.DataFrame) -> pl.DataFrame:
    on = ["family", "seed", "basis"]
    block, written = (per_run.filter(metric=metric) for metric in ("block", "written"))
    both = block.join(written, on=on, suffix="_w")
    joined = []
    for row in both.iter_rows(named=True):
        percents, nulls = ([max(row[name], 0.0), max(row[f"{name}_w"], 0.0)] for name in ("percent", "null_percent"))
        extra = {"percent": math.sqrt(math.prod(percents)), "null_percent": math.sqrt(math.prod(nulls))}
        gap = math.log2(percents[0] / percents[1]) if min(percents) > 0 else None
        shared = {name: row[name] for name in (*on, "rank", "layers")}
        joined += [{**shared, "metric": "joint", **extra}, {**shared, "metric": "gap_log2", "value": gap}]
    return pl.concat([per_run, pl.DataFrame(joined, schema_overrides=dict(per_run.schema))], how="diagonal")


def _over_runs(values: Sequence[float | None]) -> stats.Interval | None:
    known = [value for value in values if value is not None and math.isfinite(value)]
    return stats.over_seeds(known) if known else None


def _limits(name: str, interval: stats.Interval | None) -> dict[str, float | None]:
    if interval is None:
        return dict.fromkeys((name, f"{name}_low", f"{name}_high"))
    low, high = (None if math.isnan(limit) else limit for limit in (interval.low, interval.high))
    return {name: interval.mean, f"{name}_low": low, f"{name}_high": high}
