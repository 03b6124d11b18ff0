"""The numbers of ablations, computed only from scores and from descriptions of the variants.

    change      mean of (log-ratio - base) * label over the test rows, nats, with an interval over clusters
    retained    change of the variant / change of the whole direction, on the same rows: a paired cluster bootstrap
    of_writes   the same against the residual writes, for parts of these

`alpha` is +1, -1, or null for both together: half of (change at +1) - (change at -1).

A ratio is suppressed, with the reason, where its denominator says nothing: its interval contains 0, or it lies inside
the prediction band of random directions of its size (spec 8.2 and 11.46: such ratios were published and mean nothing).

The null of a part that is kept are its random twins: as many dimensions, and per parameter the same norm; at the size
of the whole, twins of that size. The null of all other variants, which are about as large as the whole, are random
directions with the singular values of the whole (or of the residual writes, for what is a part of these).
Nulls are 95 % prediction bands over draws, in nats.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import polars as pl

from ws.base import stats
from ws.base.stats import Interval
from ws.edit.condition import BASE
from ws.eval import dilemmas
from ws.subspace.lenses.registry import WHOLE

DIRECTION, WRITES = "direction", "residual writes"
"""Parts of the lens `whole`: the whole direction, and its residual writes."""
ALPHAS = (1.0, -1.0, None)
"""The strengths of the tables; None: both together."""


@dataclass(frozen=True)
class Measured:
    """What one lens found on one run: descriptions of its variants, and scores of those that are available."""

    family: str
    seed: int
    lens: str
    variants: tuple[Mapping[str, Any], ...]
    scores: pl.DataFrame


Key = tuple[str, int | None]
"""Edit and draw."""


class Changes(NamedTuple):
    """Signed changes of one run on one probe, by variant and strength, over rows in one order."""

    values: Mapping[Key, Mapping[float | None, np.ndarray]]
    clusters: list[str]
    mass: Mapping[Key, Mapping[float | None, float]]


def changes(scores: pl.DataFrame, probe: str) -> Changes:
    """The changes against the base; raises if a variant was asked other rows."""
    part = dilemmas.counted(scores.filter(pl.col("probe") == probe))
    logratios = part.filter(pl.col("metric") == "logratio")
    base = logratios.filter(pl.col("edit") == BASE).unique("row", maintain_order=True)
    names, start, label = base["row"].to_list(), base["value"].to_numpy(), base["label"].to_numpy()
    values: dict[Key, dict[float | None, np.ndarray]] = {}
    for (edit, draw, alpha), rows in logratios.partition_by("edit", "seed", "alpha", as_dict=True).items():
        if edit == BASE:
            continue
        if rows["row"].to_list() != names:
            raise ValueError(f"{edit}: rows of {probe} differ from the rows of the base")
        values.setdefault((edit, draw), {})[alpha] = (rows["value"].to_numpy() - start) * label
    masses = part.filter((pl.col("metric") == "pmass") & (pl.col("edit") != BASE))
    mass: dict[Key, dict[float | None, float]] = {}
    for edit, draw, alpha, value in masses.group_by("edit", "seed", "alpha").agg(pl.mean("value")).iter_rows():
        mass.setdefault((edit, draw), {})[alpha] = value
    for by_alpha in values.values():
        by_alpha[None] = (by_alpha[1.0] - by_alpha[-1.0]) / 2
    for by_mass in mass.values():
        by_mass[None] = min(by_mass.values())
    return Changes(values, base["cluster"].to_list(), mass)


# -------------------------------------------------------------------- one row per variant, strength and probe

SCHEMA: dict[str, Any] = {
    "family": pl.String, "seed": pl.Int64, "lens": pl.String, "part": pl.String, "operation": pl.String,
    "draw": pl.Int64, "k": pl.Int64, "layer": pl.Int64, "module": pl.String, "probe": pl.String, "alpha": pl.Float64,
    "n": pl.Int64, "clusters": pl.Int64, "mean": pl.Float64, "low": pl.Float64, "high": pl.Float64,
    "null_mean": pl.Float64, "null_low": pl.Float64, "null_high": pl.Float64, "null_draws": pl.Int64,
    "retained": pl.Float64, "retained_low": pl.Float64, "retained_high": pl.Float64, "suppressed": pl.String,
    "of_writes": pl.Float64, "of_writes_low": pl.Float64, "of_writes_high": pl.Float64,
    "of_writes_suppressed": pl.String, "energy": pl.Float64, "energy_of_whole": pl.Float64, "null_energy": pl.Float64,
    "frobenius": pl.Float64, "parameters": pl.Int64, "pmass": pl.Float64, "unavailable": pl.String,
    "remark": pl.String,
}  # fmt: skip
"""Columns of `ablations.parquet`."""


def table(found: Sequence[Measured]) -> pl.DataFrame:
    """One row per variant, strength and probe of every run; variants that do not exist have one row with the reason."""
    runs: dict[tuple[str, int], list[Measured]] = {}
    for one in found:
        runs.setdefault((one.family, one.seed), []).append(one)
    rows = [row for some in runs.values() for row in _rows(some)]
    return pl.DataFrame(rows, schema=SCHEMA)


def _rows(run: Sequence[Measured]) -> Iterator[dict[str, Any]]:
    scores = pl.concat([one.scores for one in run])
    for probe in scores["probe"].unique(maintain_order=True):
        seen = changes(scores, probe)
        for alpha in ALPHAS:
            yield from _at_strength(run, probe, seen, alpha)


def _at_strength(run: Sequence[Measured], probe: str, seen: Changes, alpha: float | None) -> Iterator[dict[str, Any]]:
    variants = [one for measured in run for one in measured.variants]
    present = {(one["edit"], one["draw"]): one for one in variants if one["available"]}
    keys = list(present)
    intervals = {key: stats.over_clusters(seen.values[key][alpha], seen.clusters) for key in keys}
    bands, energies = _nulls(present, intervals)
    grown, _ = _nulls(present, intervals, "random matched")
    matrix = np.stack([seen.values[key][alpha] for key in keys])
    ratios: dict[str, dict[Key, Interval]] = {}
    reasons: dict[str, str] = {}
    for whole, operation in ((DIRECTION, "full"), (WRITES, "keep")):
        key = (f"{WHOLE}: {whole}: {operation}", None)
        reasons[whole] = _says_nothing(intervals.get(key), bands.get((WHOLE, whole)), whole)
        if not reasons[whole]:
            found = stats.ratios(matrix, seen.values[key][alpha], seen.clusters)
            ratios[whole] = dict(zip(keys, found, strict=True))
    for one in variants:
        lens, key = one["lens"], (one["edit"], one["draw"])
        row: dict[str, Any] = {
            "family": run[0].family, "seed": run[0].seed, "lens": lens, "probe": probe, "alpha": alpha,
            **{name: one[name] for name in ("part", "operation", "draw", "k", "layer", "module", "remark")},
        }  # fmt: skip
        if not one["available"]:
            yield row | {"unavailable": one["reason"]}
            continue
        null = {"keep": bands, "random": bands, "matched": grown, "random matched": grown}.get(
            one["operation"], {}).get((lens, one["part"]))  # fmt: skip
        alike = WRITES if one["whole"] == "writes" and one["operation"] in ("matched", "complement") else DIRECTION
        null = null or bands.get((WHOLE, alike))
        of_writes = one["whole"] == "writes" or (lens, one["part"]) == (WHOLE, WRITES)
        yield row | {
            "n": intervals[key].n, "clusters": intervals[key].clusters,
            **_limits("", intervals[key], "mean"), **_limits("null_", null, "null_mean"),
            "null_draws": None if null is None else null.n,
            **_limits("retained_", ratios.get(DIRECTION, {}).get(key), "retained"),
            "suppressed": reasons[DIRECTION] or None,
            **(_limits("of_writes_", ratios.get(WRITES, {}).get(key), "of_writes") if of_writes else {}),
            "of_writes_suppressed": (reasons[WRITES] or None) if of_writes else None,
            **{name: one[name] for name in ("energy", "energy_of_whole", "frobenius", "parameters")},
            "null_energy": energies.get((lens, one["part"])),
            "pmass": seen.mass.get(key, {}).get(alpha),
        }  # fmt: skip


def _nulls(
    present: Mapping[Key, Mapping[str, Any]], intervals: Mapping[Key, Interval], operation: str = "random"
) -> tuple[dict[tuple[str, str], Interval], dict[tuple[str, str], float]]:
    """By lens and part: the prediction band of its random twins, and their mean energy before norms are matched."""
    draws: dict[tuple[str, str], list[float]] = {}
    energies: dict[tuple[str, str], list[float]] = {}
    for key, one in present.items():
        if one["operation"] == operation:
            part = (one["lens"], one["part"])
            draws.setdefault(part, []).append(intervals[key].mean)
            energies.setdefault(part, []).append(one["energy"])
    return (
        {part: stats.prediction_band(values) for part, values in draws.items()},
        {part: float(np.mean(values)) for part, values in energies.items()},
    )


def _says_nothing(whole: Interval | None, band: Interval | None, name: str) -> str:
    """Why ratios to a whole would mean nothing; empty if they do mean something."""
    said = "whole direction" if name == DIRECTION else name
    if whole is None:
        return f"the {said} has no effect here"
    if not (whole.low > 0 or whole.high < 0):
        return f"the change of the {said} is within its noise"
    if band is not None and band.low <= whole.mean <= band.high:
        return f"the change of the {said} is within the band of random directions"
    return ""


def _limits(prefix: str, interval: Interval | None, mean: str) -> dict[str, float | None]:
    if interval is None:
        return {mean: None, f"{prefix}low": None, f"{prefix}high": None}
    return {
        name: None if math.isnan(value) else value
        for name, value in ((mean, interval.mean), (f"{prefix}low", interval.low), (f"{prefix}high", interval.high))
    }


# -------------------------------------------------------------------- over seeds

_LINE = ["family", "lens", "part", "operation", "k", "layer", "module", "probe", "alpha"]


def summary(rows: pl.DataFrame) -> pl.DataFrame:
    """One row per variant, strength and probe over all seeds; random twins are averaged over draws first.

    With several seeds, intervals are t intervals over seeds; with one they are the intervals over rows. A ratio is
    given only if no seed is suppressed. The null is the mean over seeds of each seed's band.
    """
    lines = []
    for key, part in rows.group_by(_LINE, maintain_order=True):
        line = dict(zip(_LINE, key, strict=True))
        known = part.filter(pl.col("unavailable").is_null())
        per_seed = known.partition_by("seed", maintain_order=True)
        for name, low, high in (
            ("mean", "low", "high"), ("retained", "retained_low", "retained_high"),
            ("of_writes", "of_writes_low", "of_writes_high"),
        ):  # fmt: skip
            line |= dict(zip((name, low, high), _over_seeds(per_seed, name, low, high), strict=True))
        first = known if len(known) else part
        line |= {
            "seeds": len(per_seed), "n": first["n"][0], "draws": len(known),
            **{name: _mean(known[name]) for name in ("null_mean", "null_low", "null_high", "energy", "energy_of_whole",
                                                     "null_energy", "frobenius", "pmass")},
            "suppressed": _first(known["suppressed"]), "of_writes_suppressed": _first(known["of_writes_suppressed"]),
            "unavailable": None if len(known) else _first(part["unavailable"]),
            "remark": "; ".join(dict.fromkeys(filter(None, part["remark"].to_list()))),
        }  # fmt: skip
        line["beyond_null"] = _is_beyond(line)
        lines.append(line)
    return pl.DataFrame(lines, infer_schema_length=None)


def _over_seeds(
    per_seed: Sequence[pl.DataFrame], name: str, low: str, high: str
) -> tuple[float | None, float | None, float | None]:
    means = [_mean(one[name]) if one[name].null_count() == 0 else None for one in per_seed]
    known = [value for value in means if value is not None]
    if not known or len(known) < len(means):
        return None, None, None
    if len(known) == 1:
        only = per_seed[0]
        return known[0], (only[low][0] if len(only) == 1 else None), (only[high][0] if len(only) == 1 else None)
    interval = stats.over_seeds(known)
    return interval.mean, interval.low, interval.high


def _is_beyond(line: Mapping[str, Any]) -> bool | None:
    """Whether the change is outside the band of its null; None without a band."""
    if line["mean"] is None or line["null_low"] is None:
        return None
    return bool(not line["null_low"] <= line["mean"] <= line["null_high"])


def _mean(values: pl.Series) -> float | None:
    found = values.mean()
    return None if found is None else float(found)  # type: ignore[arg-type]


def _first(values: pl.Series) -> str | None:
    known = values.drop_nulls()
    return known[0] if len(known) else None
