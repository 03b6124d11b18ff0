"""Effects at equal KL with the uncertainty of the strength that reaches it.

A strength is calibrated on a few prompts. Another draw of prompts gives another strength, so another effect. The limits
of the strength (`calibrate.interval`) are carried through the measured effects of the method: these are joined by
straight lines over alpha, from 0 at alpha 0, and the last line is extended. Of several replicates, the limits relative
to their strengths are averaged over those whose search met the budget. The result is added to the interval over
rows as independent errors are:

    low = mean - sqrt((mean - low_rows)^2 + (mean - low_strength)^2),   high likewise

Without this, an interval says how sure the effect is at the strength that was found, not at the budget. In simulations
with 16 prompts and 60 clusters of rows (`test_strength_limits.py`), a nominal 95 % covers the effect at the true
strength in 95-97 % of trials; the interval over rows alone covers it in 78-83 %.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from ws.comparing.findings import PROBES, SIDES, Effect, Entry, Measured, Probe, Search, Strengths
from ws.comparing.numbers import against
from ws.report.findings import Estimate

Curve = Sequence[tuple[float, float]]
"""Strengths and the mean effects measured there."""


def widened(effect: Effect, curve: Curve, low: float, high: float) -> Effect:
    """The effect with limits that also hold strengths from `low` to `high`; the same effect if it has no limits."""
    if effect.low is None or effect.high is None:
        return effect
    ends = [_at(curve, alpha) for alpha in (low, high)]
    below, above = (max(0.0, sign * (end - effect.mean)) for sign, end in ((-1, min(ends)), (1, max(ends))))
    rows = Estimate(effect.mean, effect.low, effect.high, effect.n)
    return replace(
        effect, rows_alone=rows, low=effect.mean - math.hypot(effect.mean - effect.low, below),
        high=effect.mean + math.hypot(effect.high - effect.mean, above),
    )  # fmt: skip


def _at(curve: Curve, alpha: float) -> float:
    """The effect at a strength of the curve's sign, by lines through 0 and the measured points."""
    points = sorted((abs(strength), moved) for strength, moved in curve)
    x, y = (np.array([0.0, *column]) for column in zip(*points, strict=True))
    place = abs(alpha)
    if place <= x[-1] or x[-1] == x[-2]:
        return float(np.interp(place, x, y))
    return float(y[-1] + (place - x[-1]) * (y[-1] - y[-2]) / (x[-1] - x[-2]))


def at_budgets(equal: Mapping[str, Measured], strengths: Strengths) -> dict[str, Measured]:
    """The tables at equal KL, with widened limits and verdicts that follow from them."""
    return {
        budget: replace(measured, entries=tuple(
            _entry(entry, equal, strengths.edits[budget].get(entry.name, {})) for entry in measured.entries
        ))
        for budget, measured in equal.items()
    }  # fmt: skip


def _entry(entry: Entry, equal: Mapping[str, Measured], searches: Mapping[str, Sequence[Search]]) -> Entry:
    sides = {}
    for sign, side in entry.sides.items():
        found = searches.get(SIDES[sign], ())
        known = [(one.alpha_low / one.alpha, one.alpha_high / one.alpha) for one in found
                 if one.alpha_low is not None and one.alpha_high is not None]  # fmt: skip
        if not known:  # a prompt has no strength, and a search that missed has no limits
            sides[sign] = side
            continue
        low, high = (side.alpha * float(np.mean(column)) for column in zip(*known, strict=True))
        own, moral = (_effect(entry.name, sign, probe, equal, low, high, side.effect(probe)) for probe in PROBES)
        sides[sign] = replace(side, own=own, dilemmas=moral)
    return replace(entry, sides=sides)


def _effect(
    name: str, sign: str, probe: Probe, equal: Mapping[str, Measured], low: float, high: float, effect: Effect
) -> Effect:
    entries = [entry for measured in equal.values() if (entry := measured.entry(name)) is not None]
    curve = [(entry.sides[sign].alpha, entry.sides[sign].effect(probe).mean) for entry in entries]
    return against(effect.band, widened(effect, curve, low, high))
