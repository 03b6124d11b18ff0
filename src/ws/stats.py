"""Intervals for effects measured on rows, clusters and seeds.

Rows of one cluster (the two actions of a dilemma, the wordings of one claim) are not independent, so row
uncertainty is taken over clusters: a percentile bootstrap that draws whole clusters, or, below 50 clusters, where
that bootstrap is too narrow, a t interval with the cluster-robust standard error

    se^2 = C / (C - 1) * sum_c (sum_{i in c} (x_i - mean))^2 / n^2 ,   C - 1 degrees of freedom.

Uncertainty over seeds is another question and is never mixed in: `over_seeds` and `prediction_band`.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats as scipy_stats

BOOTSTRAP_FROM_CLUSTERS = 50


class Interval(NamedTuple):
    """A mean with its confidence limits; `n` rows in `clusters` clusters; `method` names how it was computed."""

    mean: float
    low: float
    high: float
    n: int
    clusters: int
    method: str


def over_clusters(
    values: Sequence[float] | np.ndarray,
    clusters: Sequence[Hashable] | np.ndarray,
    *,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """Mean over rows with an interval over clusters.

    `values` (n,) must be finite; `clusters` (n,) names the cluster of each row. One cluster gives NaN limits.
    """
    values = np.asarray(values, dtype=np.float64)
    if values.size == 0:
        raise ValueError("an interval needs at least one row")
    if values.size != len(clusters):
        raise ValueError(f"{values.size} values but {len(clusters)} cluster names")
    numbers = {name: number for number, name in enumerate(_in_order(set(clusters)))}
    codes = np.array([numbers[name] for name in clusters])
    sizes = np.bincount(codes).astype(np.float64)
    sums = np.bincount(codes, weights=values)
    count = len(sizes)
    mean = float(values.mean())
    if count < 2:
        return Interval(mean, float("nan"), float("nan"), values.size, count, "one cluster")
    if count < BOOTSTRAP_FROM_CLUSTERS:
        error = np.sqrt(count / (count - 1) * np.sum((sums - mean * sizes) ** 2)) / values.size
        margin = float(scipy_stats.t.ppf(0.5 + confidence / 2, count - 1) * error)
        return Interval(mean, mean - margin, mean + margin, values.size, count, "cluster t")
    generator = np.random.default_rng(seed)
    draws = generator.multinomial(count, np.full(count, 1 / count), size=resamples)
    means = (draws @ sums) / (draws @ sizes)
    low, high = np.quantile(means, [0.5 - confidence / 2, 0.5 + confidence / 2])
    return Interval(mean, float(low), float(high), values.size, count, "cluster bootstrap")


def over_seeds(values: Sequence[float] | np.ndarray, *, confidence: float = 0.95) -> Interval:
    """Mean over seeds with a t interval; one seed gives NaN limits."""
    values = np.asarray(values, dtype=np.float64)
    if values.size < 2:
        return Interval(float(values.mean()), float("nan"), float("nan"), values.size, values.size, "one seed")
    margin = float(scipy_stats.t.ppf(0.5 + confidence / 2, values.size - 1) * scipy_stats.sem(values))
    mean = float(values.mean())
    return Interval(mean, mean - margin, mean + margin, values.size, values.size, "t over seeds")


def prediction_band(values: Sequence[float] | np.ndarray, *, confidence: float = 0.95) -> Interval:
    """Where one more control seed would fall: `mean +- t * sd * sqrt(1 + 1/n)`."""
    values = np.asarray(values, dtype=np.float64)
    mean = float(values.mean())
    if values.size < 2:
        return Interval(mean, float("nan"), float("nan"), values.size, values.size, "one seed")
    spread = float(values.std(ddof=1) * np.sqrt(1 + 1 / values.size))
    margin = float(scipy_stats.t.ppf(0.5 + confidence / 2, values.size - 1)) * spread
    return Interval(mean, mean - margin, mean + margin, values.size, values.size, "prediction over seeds")


def _in_order(names: set[Hashable]) -> list[Hashable]:
    """Cluster names in an order of their own, so that the bootstrap does not depend on the order of rows."""
    try:
        return sorted(names)  # type: ignore[type-var]
    except TypeError:
        return sorted(names, key=lambda name: (type(name).__name__, repr(name)))
