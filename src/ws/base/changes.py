"""Questions about a change of answers that its mean cannot answer.

`sign_flip_p`: is it chance? `surgical_informedness`: which answers change? `decompose`: is it truth, Yes-bias, or only
confidence? `dose_response`: is the effect linear in the strength?
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np

from ws.base.stats import in_order


def sign_flip_p(
    values: Sequence[float] | np.ndarray,
    clusters: Sequence[Hashable] | np.ndarray,
    *,
    resamples: int = 10_000,
    seed: int = 0,
) -> float:
    """Two-sided p-value of "no effect", from flipping the signs of whole clusters.

    Up to 12 clusters: all 2^C sign patterns. More: random patterns, plus the observed one.
    """
    values = np.asarray(values, dtype=np.float64)
    numbers = {name: number for number, name in enumerate(in_order(set(clusters)))}
    sums = np.bincount([numbers[name] for name in clusters], weights=values)
    observed = abs(sums.sum())
    count = len(sums)
    if count <= 12:
        patterns = 1 - 2 * ((np.arange(2**count)[:, None] >> np.arange(count)) & 1)
        return float(np.mean(np.abs(patterns @ sums) >= observed * (1 - 1e-12)))
    generator, reached = np.random.default_rng(seed), 0
    for start in range(0, resamples, 1000):  # in parts, because all patterns at once may not fit into memory
        signs = generator.integers(0, 2, size=(min(1000, resamples - start), count)) * 2 - 1
        reached += int(np.sum(np.abs(signs @ sums) >= observed * (1 - 1e-12)))
    return (1 + reached) / (1 + resamples)


class Informedness(NamedTuple):
    """Surgical Informedness of an intervention at +1 and -1, and its parts.

    At +1: fixed is the share of the base's wrong answers that become right, broken of its right ones that become wrong.
    At -1: flipped is the share of its right answers that become wrong, countered of its wrong ones that become right.
    Scores are in points: 100 is perfect, 0 is no effect. `balanced` is the change of
    P(Yes | Yes is right) - P(Yes | No is right), which a bias towards Yes does not change.
    """

    score: float
    forward: float
    reverse: float
    fixed: float
    broken: float
    flipped: float
    countered: float
    rows_right: int
    rows_wrong: int
    balanced: float


def surgical_informedness(
    base: np.ndarray,
    plus: np.ndarray,
    minus: np.ndarray | None,
    labels: np.ndarray,
    *,
    k: float = 2.0,
    mass: tuple[float, float] = (1.0, 1.0),
) -> Informedness:
    """SI of rows in the same order. `base`, `plus`, `minus`: log-ratios towards Yes; `labels`: +1 if Yes is right.

    forward = fixed - k broken, reverse = flipped - k countered, score = their mean times the squared smaller answer
    mass times 100 (as the replicated work defines it). k = 2 counts damage twice, which favours having no effect if
    most rows are right: also report k = 1 and `balanced`. Without `minus`, `score` and the reverse half are NaN.
    """
    before, after = base * labels, plus * labels
    correct, wrong = before > 0, before < 0
    fixed, broken = _share(after > 0, wrong), _share(after < 0, correct)
    forward = fixed - k * broken
    flipped = countered = reverse = float("nan")
    if minus is not None:
        below = minus * labels
        flipped, countered = _share(below < 0, correct), _share(below > 0, wrong)
        reverse = flipped - k * countered
    halves = [half for half in (forward, reverse) if not np.isnan(half)]
    scale = min(mass) ** 2 * 100 if minus is not None else mass[0] ** 2 * 100
    score = float(np.mean(halves)) * scale if halves and minus is not None else float("nan")
    yes = labels > 0
    gap = [_share(answers > 0, yes) - _share(answers > 0, ~yes) for answers in (base, plus)]
    return Informedness(
        score, forward * 100, reverse * 100, fixed, broken, flipped, countered, int(correct.sum()), int(wrong.sum()),
        (gap[1] - gap[0]) * 100,
    )  # fmt: skip


def _share(event: np.ndarray, among: np.ndarray) -> float:
    return float(event[among].mean()) if among.any() else float("nan")


class Decomposition(NamedTuple):
    """The parts of a mean change of log-ratios, in nats.

    truth: mean change towards the right answer; bias: mean change towards Yes; scale: slope of the new log-ratios on
    the old ones at equal label (1: confidence is unchanged); beyond_scale: change towards the right answer that this
    scaling does not explain.
    """

    truth: float
    bias: float
    scale: float
    beyond_scale: float


def decompose(base: np.ndarray, edited: np.ndarray, labels: np.ndarray) -> Decomposition:
    """Split a change into truth, Yes-bias and confidence scaling. Rows are in the same order.

    A gain in confidence multiplies every log-ratio, which looks like a gain in truth if the base is mostly right; a
    gain in truth then looks like a gain in confidence. So the slope comes from one regression on the old log-ratios,
    the label and a constant. It is NaN if label and constant explain the old log-ratios completely.
    """
    change = edited - base
    others = np.column_stack([np.ones_like(base), labels])
    own = base - others @ np.linalg.lstsq(others, base, rcond=None)[0]  # residual of the base log-ratios
    spread = float(own @ own)
    slope = float(own @ edited / spread) if spread > 1e-9 * float(base @ base) else float("nan")
    explained = (slope - 1) * base if np.isfinite(slope) else np.zeros_like(base)
    truth = float((change * labels).mean())
    return Decomposition(truth, float(change.mean()), slope, float(((change - explained) * labels).mean()))


class DoseResponse(NamedTuple):
    """slope: change per unit of strength (through the origin); r2: share of the sum of squared changes that it
    explains; monotone: whether the change only rises, or only falls, with strength."""

    slope: float
    r2: float
    monotone: bool


def dose_response(alphas: Sequence[float], changes: Sequence[float]) -> DoseResponse:
    """Linearity and monotonicity of mean changes over strengths. The point (0, 0) is added."""
    x, y = (np.asarray(values, dtype=np.float64) for values in ([*alphas, 0.0], [*changes, 0.0]))
    slope = float(x @ y / (x @ x)) if x.any() else float("nan")
    total = float(y @ y)
    r2 = 1 - float(((y - slope * x) ** 2).sum()) / total if total > 0 else float("nan")
    ordered = y[np.argsort(x, kind="stable")]
    steps = np.diff(ordered)  # the slope is no test: it is 0 for a change that is even in alpha
    return DoseResponse(slope, r2, bool((steps >= 0).all() or (steps <= 0).all()))
