"""Intervals for effects measured on rows, clusters and seeds.

Rows of one cluster (the two actions of a dilemma, the wordings of one claim) are not independent, so the interval is
taken over clusters: a percentile bootstrap that draws whole clusters. Below 50 clusters that bootstrap is too narrow,
so it is a t interval with the cluster-robust standard error

    se^2 = C / (C - 1) * sum_c (sum_{i in c} (x_i - mean))^2 / n^2 ,   C - 1 degrees of freedom.

Uncertainty over seeds is a separate question and is kept apart: `over_seeds` and `prediction_band`. What a number of
seeds and rows can show is in `power`.

`wilson` is for shares. `bootstrap` is for skewed values (KL, NLL) and for a percentile, which has no t interval.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Sequence
from functools import lru_cache
from typing import Literal, NamedTuple

import numpy as np
from scipy import stats as scipy_stats

BOOTSTRAP_FROM_CLUSTERS = 50
Statistic = Literal["mean", "p95"]
"""The mean, or the 95th percentile."""
_AT_ONCE = 4_000_000


class Interval(NamedTuple):
    """A mean (or share, percentile, AUROC) with its confidence limits; `n` rows in `clusters` clusters.

    `method` names how it was computed.
    """

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
    """The mean over rows, with an interval over clusters.

    `values` (n,) must be finite; `clusters` (n,) names the cluster of each row. One cluster gives NaN limits.
    """
    values, codes = _coded(values, clusters)
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
    means = _means(values, codes, _draws(count, resamples, seed))
    low, high = np.quantile(means, [0.5 - confidence / 2, 0.5 + confidence / 2])
    return Interval(mean, float(low), float(high), values.size, count, "cluster bootstrap")


def bootstrap(
    values: Sequence[float] | np.ndarray,
    clusters: Sequence[Hashable] | np.ndarray,
    statistic: Statistic = "mean",
    *,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """The mean or the 95th percentile over rows, with a percentile bootstrap interval over clusters.

    `values` (n,) must be finite; `clusters` (n,) names the cluster of each row, such as the text of each token. One
    cluster gives NaN limits. A plain bootstrap of C clusters is too narrow by about the ratio of t to z and by
    sqrt((C - 1) / C), so it is widened by these (Hesterberg, What Teachers Should Know about the Bootstrap, 2015, 3.3).

    In simulations with normal, gamma and log-normal values, a nominal 95 % covers 91-96 % from 40 clusters. With 20
    clusters it covers 89-95 % for the mean and 88-93 % for the percentile. The truth that it misses is mostly above
    `high`, because few texts seldom show the tail.
    """
    values, codes = _coded(values, clusters)
    count = int(codes.max()) + 1
    of_draws = _means if statistic == "mean" else percentiles
    estimate = float(of_draws(values, codes, np.ones((1, count), dtype=np.int64))[0])
    if count < 2:
        return Interval(estimate, float("nan"), float("nan"), values.size, count, "one cluster")
    found = of_draws(values, codes, _draws(count, resamples, seed))
    beyond = widened_tail(count, confidence)
    low, high = np.quantile(found, [beyond, 1 - beyond])
    return Interval(estimate, float(low), float(high), values.size, count, f"cluster bootstrap of {statistic}")


def ratios(
    numerators: np.ndarray,
    denominator: np.ndarray,
    clusters: Sequence[Hashable] | np.ndarray,
    *,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> list[Interval]:
    """Mean of each row of `numerators` (m, n) over the mean of `denominator` (n,), on the same n rows.

    A paired percentile bootstrap: whole clusters are drawn for both means together, and the limits are widened as by
    `bootstrap`. The denominator must be clearly different from 0, or the limits mean nothing. One cluster gives NaN.
    """
    denominator, codes = _coded(denominator, clusters)
    size, count = denominator.size, int(codes.max()) + 1
    above = np.stack([np.bincount(codes, weights=one, minlength=count) for one in numerators])
    below = np.bincount(codes, weights=denominator)
    means = above.sum(axis=1) / below.sum()
    if count < 2:
        return [Interval(float(one), float("nan"), float("nan"), size, count, "one cluster") for one in means]
    drawn = _draws(count, resamples, seed)
    found = (drawn @ above.T) / (drawn @ below)[:, None]
    tail = widened_tail(count, confidence)
    low, high = np.quantile(found, [tail, 1 - tail], axis=0)
    return [
        Interval(float(mean), float(bottom), float(top), size, count, "paired cluster bootstrap")
        for mean, bottom, top in zip(means, low, high, strict=True)
    ]


def wilson(successes: int, n: int, *, confidence: float = 0.95) -> Interval:
    """A share of n independent trials with Wilson's score interval; unlike `p +- z se` it also holds near 0 and 1.

    (p + z^2 / 2n +- z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n)          (Wilson, 1927)
    """
    if not 0 <= successes <= n or n < 1:
        raise ValueError(f"{successes} successes of {n} trials are no share")
    z, share = float(scipy_stats.norm.ppf(0.5 + confidence / 2)), successes / n
    shrink = 1 + z**2 / n
    centre = (share + z**2 / (2 * n)) / shrink
    margin = z * math.sqrt(share * (1 - share) / n + (z / (2 * n)) ** 2) / shrink
    low, high = centre - margin if successes else 0.0, centre + margin if successes < n else 1.0  # exact at the ends
    return Interval(share, low, high, n, n, "Wilson")


def over_seeds(values: Sequence[float] | np.ndarray, *, confidence: float = 0.95) -> Interval:
    """Mean over seeds with a t interval; one seed gives NaN limits."""
    values = np.asarray(values, dtype=np.float64)
    if values.size < 2:
        return Interval(float(values.mean()), float("nan"), float("nan"), values.size, values.size, "one seed")
    margin = float(scipy_stats.t.ppf(0.5 + confidence / 2, values.size - 1) * scipy_stats.sem(values))
    mean = float(values.mean())
    return Interval(mean, mean - margin, mean + margin, values.size, values.size, "t over seeds")


def prediction_band(values: Sequence[float] | np.ndarray, *, confidence: float = 0.95) -> Interval:
    """The range in which one more control seed would fall: `mean +- t * sd * sqrt(1 + 1/n)`."""
    values = np.asarray(values, dtype=np.float64)
    mean = float(values.mean())
    if values.size < 2:
        return Interval(mean, float("nan"), float("nan"), values.size, values.size, "one seed")
    spread = float(values.std(ddof=1) * np.sqrt(1 + 1 / values.size))
    margin = float(scipy_stats.t.ppf(0.5 + confidence / 2, values.size - 1)) * spread
    return Interval(mean, mean - margin, mean + margin, values.size, values.size, "prediction over seeds")


def _coded(
    values: Sequence[float] | np.ndarray, clusters: Sequence[Hashable] | np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Values in fp64 and the number of the cluster of each."""
    values = np.asarray(values, dtype=np.float64)
    if values.size == 0:
        raise ValueError("an interval needs at least one row")
    if values.size != len(clusters):
        raise ValueError(f"{values.size} values but {len(clusters)} cluster names")
    numbers = {name: number for number, name in enumerate(in_order(set(clusters)))}
    return values, np.array([numbers[name] for name in clusters])


def widened_tail(count: int, confidence: float) -> float:
    """The share that is left out on each side, so that a percentile bootstrap of few clusters is not too narrow."""
    return float(
        scipy_stats.norm.sf(math.sqrt(count / (count - 1)) * scipy_stats.t.ppf(0.5 + confidence / 2, count - 1))
    )


@lru_cache(maxsize=4)
def _draws(count: int, resamples: int, seed: int) -> np.ndarray:
    """(resamples, count): how often each cluster is drawn."""
    return np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=resamples)


def _means(values: np.ndarray, codes: np.ndarray, draws: np.ndarray) -> np.ndarray:
    """The mean over the rows of the drawn clusters, per draw."""
    sizes, sums = np.bincount(codes).astype(np.float64), np.bincount(codes, weights=values)
    return np.asarray((draws @ sums) / (draws @ sizes))


def percentiles(values: np.ndarray, codes: np.ndarray, draws: np.ndarray, share: float = 0.95) -> np.ndarray:
    """The percentile over the rows of the drawn clusters, per draw, interpolated linearly as by `np.quantile`.

    codes (n,): the number of the cluster of each value; draws (resamples, clusters): how often each cluster is drawn.
    """
    order = np.argsort(values, kind="stable")
    values, codes = values[order], codes[order]

    def found() -> Iterator[np.ndarray]:
        step = max(1, _AT_ONCE // values.size)
        for start in range(0, len(draws), step):  # in parts, because all draws of all rows may not fit into memory
            counted = draws[start : start + step, codes].cumsum(axis=1)
            place = share * (counted[:, -1] - 1)
            below = np.floor(place)
            low, high = (values[(counted <= rank[:, None]).sum(axis=1)] for rank in (below, np.ceil(place)))
            yield low + (place - below) * (high - low)

    return np.concatenate(list(found()))


def in_order(names: set[Hashable]) -> list[Hashable]:
    """Cluster names in sorted order, so that the bootstrap does not depend on the order of rows."""
    try:
        return sorted(names)  # type: ignore[type-var]
    except TypeError:
        return sorted(names, key=lambda name: (type(name).__name__, repr(name)))
