"""How well one set of numbers ranks another: AUROC with DeLong's interval, and Spearman's correlation."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from scipy import stats as scipy_stats

from ws.base.stats import Interval


def auroc(values: np.ndarray, labels: np.ndarray, *, confidence: float = 0.95) -> Interval:
    """Area under the ROC curve with DeLong's interval; ties count half.

    `values` (n,) are scores and `labels` (n,) are +1 or -1, of which there must be both. Each row is its own cluster.
    """
    above, below = _placements(values, labels)
    return _delong(float(above.mean()), above, below, confidence)


def auroc_change(before: np.ndarray, after: np.ndarray, labels: np.ndarray, *, confidence: float = 0.95) -> Interval:
    """AUROC of `after` minus that of `before` on the same rows, with DeLong's interval for paired scores."""
    (above, below), (above_before, below_before) = _placements(after, labels), _placements(before, labels)
    return _delong(float(above.mean() - above_before.mean()), above - above_before, below - below_before, confidence)


def _placements(values: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each positive row the share of negative rows below it; for each negative row that of positive rows above."""
    values, labels = np.asarray(values, dtype=np.float64), np.asarray(labels)
    positive, negative = values[labels > 0], values[labels < 0]
    if not positive.size or not negative.size:
        raise ValueError("an AUROC needs rows with both labels")
    ranks = scipy_stats.rankdata(values)
    above = (ranks[labels > 0] - scipy_stats.rankdata(positive)) / negative.size
    below = 1 - (ranks[labels < 0] - scipy_stats.rankdata(negative)) / positive.size
    return above, below


def _delong(value: float, above: np.ndarray, below: np.ndarray, confidence: float) -> Interval:
    count = above.size + below.size
    if min(above.size, below.size) < 2:
        return Interval(value, float("nan"), float("nan"), count, count, "one row of a label")
    error = np.sqrt(above.var(ddof=1) / above.size + below.var(ddof=1) / below.size)
    margin = float(scipy_stats.norm.ppf(0.5 + confidence / 2) * error)
    return Interval(value, value - margin, value + margin, count, count, "DeLong")


def spearman(x: Sequence[float] | np.ndarray, y: Sequence[float] | np.ndarray, *, confidence: float = 0.95) -> Interval:
    """Spearman's rank correlation of n pairs, with an interval by Fisher's z.

    Standard error of z: sqrt((1 + rho^2 / 2) / (n - 3)) (Bonett and Wright, Psychometrika 65, 2000). NaN limits with
    fewer than four pairs, or if the ranks agree or disagree completely. NaN if a side is constant.
    """
    ranks = [scipy_stats.rankdata(side) for side in (x, y)]
    count = len(ranks[0])
    if count != len(ranks[1]):
        raise ValueError(f"{count} values but {len(ranks[1])} partners")
    if any(np.ptp(side) == 0 for side in ranks):
        return Interval(float("nan"), float("nan"), float("nan"), count, count, "a side is constant")
    rho = float(np.corrcoef(*ranks)[0, 1])
    if count < 4 or 1 - abs(rho) < 1e-12:
        return Interval(rho, float("nan"), float("nan"), count, count, "no interval")
    margin = float(scipy_stats.norm.ppf(0.5 + confidence / 2)) * math.sqrt((1 + rho**2 / 2) / (count - 3))
    low, high = (math.tanh(math.atanh(rho) + sign * margin) for sign in (-1, 1))
    return Interval(rho, low, high, count, count, "Fisher z of ranks")
