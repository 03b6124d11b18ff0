"""Effects at equal KL: their limits hold the uncertainty of the strength, and cover as often as they say."""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np
import pytest

from test_calibrate import along
from ws.base import stats
from ws.comparing.findings import Effect
from ws.comparing.strength_limits import widened
from ws.measure.calibrate import interval
from ws.report.findings import Estimate


def _effect(mean: float, low: float | None, high: float | None) -> Effect:
    return Effect(mean, low, high, 50, p=0.0, seeds=(mean,), over_seeds=None)


CURVE = ((0.5, 1.0), (1.0, 1.5), (2.0, 2.0))


@pytest.mark.parametrize(
    ("low", "high", "below", "above"),
    [
        (1.0, 1.0, 0.0, 0.0),
        (0.75, 1.5, 0.25, 0.25),
        (0.25, 1.0, 1.0, 0.0),  # the line to 0 at alpha 0
        (1.0, 3.0, 0.0, 1.0),  # the last line is extended
        (-0.75, -1.5, 0.25, 0.25),  # a negative side; the limits are in either order
    ],
)
def test_limits_of_the_strength_follow_the_measured_effects(
    low: float, high: float, below: float, above: float
) -> None:
    sign = math.copysign(1, low)
    found = widened(_effect(1.5, 1.2, 1.9), [(sign * alpha, moved) for alpha, moved in CURVE], low, high)
    assert found.low == pytest.approx(1.5 - math.hypot(0.3, below))
    assert found.high == pytest.approx(1.5 + math.hypot(0.4, above))
    assert found.rows_alone == Estimate(1.5, 1.2, 1.9, 50) and found.over == "rows and calibration"


def test_an_effect_that_falls_with_strength_is_widened_below() -> None:
    found = widened(_effect(-1.5, -1.6, -1.4), [(alpha, -moved) for alpha, moved in CURVE], 1.0, 2.0)
    assert found.low == pytest.approx(-1.5 - math.hypot(0.1, 0.5)) and found.high == pytest.approx(-1.4)


def test_an_effect_without_limits_stays_without() -> None:
    bare = _effect(1.0, None, None)
    assert widened(bare, CURVE, 0.5, 2.0) == bare


@pytest.mark.parametrize("between", [0.3, 0.6])
def test_intervals_cover_the_effect_at_the_true_strength(between: float) -> None:
    """KL and rows are drawn afresh: 16 prompts of 30 positions, log-normal KL; 60 clusters, effect 1 (sd .7)."""
    percentile = math.exp(NormalDist().inv_cdf(0.95) * math.hypot(between, 1.5))
    truth, random, trials = math.sqrt(0.5 / percentile), np.random.default_rng(1), 300
    held = {"rows": 0, "whole": 0, "given the strength": 0}
    for number in range(trials):
        base = np.exp(random.normal(0, between, (16, 1)) + random.normal(0, 1.5, (16, 30)))
        reached = math.sqrt(0.5 / np.quantile(base, 0.95))  # where the search ends: KL grows with alpha squared
        limits = interval(along(base.tolist(), [reached * one for one in (0.25, 0.5, 1.0, 2.0, 4.0)]), 0.5,
                          resamples=300, seed=number)  # fmt: skip
        rows = stats.over_clusters(reached * random.normal(1, 0.7, 60), range(60), resamples=500, seed=number)
        effect = _effect(rows.mean, rows.low, rows.high)
        whole = widened(effect, [(reached, effect.mean)], *limits)
        assert whole.low is not None and whole.high is not None
        held["rows"] += rows.low <= truth <= rows.high
        held["whole"] += whole.low <= truth <= whole.high
        held["given the strength"] += rows.low <= reached <= rows.high
    shares = {name: count / trials for name, count in held.items()}
    assert 0.92 <= shares["given the strength"] <= 0.98, shares
    assert 0.92 <= shares["whole"] <= 0.98, shares
    assert shares["rows"] < 0.92, shares
