"""Find the strength at which an Edit costs a given KL, so that methods can be compared at equal cost.

The steered model writes greedily. Its KL to the base is measured at every position (`divergence`). The search sets the
95th percentile over all prompts and positions; mean and maximum are reported too. Each sign has its own strength.

KL grows with alpha^2 near zero and saturates later, so the search uses log-log coordinates. It doubles the strength
until the budget is bracketed, then takes Illinois steps. Only strengths with coherent text count: a strength with
incoherent text is an upper end of the bracket, whatever its KL. If the search does not reach its tolerance, it returns
the closest coherent strength that it tried, with `converged` false.

A prompt has a fixed KL and no strength, so Edits are calibrated to a prompt's KL, never the reverse.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np

from ws import world
from ws.algebra.direction import Direction
from ws.base import stats
from ws.base.errors import UserError
from ws.edit.condition import Effect
from ws.measure.divergence import TOKENS, Divergence, divergences, greedy, mean_distinct
from ws.model.chat import ask
from ws.model.loading import ChatModel

VERSION = 2
"""Raise it when a change to the search gives a different strength for the same curve."""
TOLERANCE, RELATIVE_TOLERANCE = 0.05, 0.1
"""How close to the budget the statistic must come: in nats, and as a share of the budget. The smaller one applies.

With 0.05 nats alone, any small strength, even 0, would meet a budget of 0.04.
"""
MAX_STEPS = 12
SMALLEST_DISTINCT = 0.5
"""Text is incoherent if its share of distinct trigrams is below this fraction of the base's."""
RESAMPLES, CONFIDENCE = 1_000, 0.95
_FIRST = (0.25, 0.5, 1.0, 2.0, 4.0)
_SMALLEST, _LARGEST = 1e-6, 1e4
_EDGE = 1.02
"""The edge of coherent text is located to within this ratio of strengths."""


@dataclass(frozen=True)
class Calibration:
    """The strength of one sign for a budget; `history` holds every strength that was tried, in order.

    `converged`: the KL `reached` is within `tolerance` nats of the budget, and the text is coherent.
    `alpha_low`, `alpha_high`: bootstrap limits of the strength over prompts (`interval`); None if the search did not
    converge.
    """

    alpha: float
    target: float
    tolerance: float
    reached: Divergence
    converged: bool
    history: tuple[Divergence, ...]
    alpha_low: float | None = None
    alpha_high: float | None = None

    def as_record(self, *, with_history: bool = False) -> dict[str, Any]:
        """The result as plain data, optionally with the history."""
        history = [{"alpha": seen.alpha, **seen.as_record()} for seen in self.history]
        return {
            "alpha": self.alpha, "alpha_low": self.alpha_low, "alpha_high": self.alpha_high,
            **self.reached.as_record(), "target": self.target, "tolerance": self.tolerance,
            "converged": self.converged, **({"history": history} if with_history else {}),
        }  # fmt: skip


def neutral_prompts(count: int | None = None) -> list[str]:
    """The first `count` held-out neutral requests, or all if None; asking for more than there are is an error."""
    held_out = [entry.user for entry in world.talk() if entry.held_out]
    if count is not None and not 0 < count <= len(held_out):
        raise UserError(f"{count} neutral prompts were requested", f"Give a number from 1 to {len(held_out)}.")
    return held_out[:count]


def require_budget(target: float, option: str = "--target") -> None:
    """Raise unless the KL budget (nats per token) is positive and finite; `option` is the one that gives it."""
    if not 0 < target < math.inf:
        raise UserError(
            f"the KL budget is {target:g} nats; it must be positive and finite", f"Give, say, {option} 0.5."
        )


def to_budget(
    model: ChatModel,
    edit: Direction | Effect,
    target: float,
    prompts: Sequence[str],
    *,
    sign: int = 1,
    tokens: int = TOKENS,
    tolerance: float | None = None,
) -> Calibration:
    """The positive (or negative) strength at which the 95th percentile of KL is within `tolerance` of `target` nats.

    If `tolerance` is None, it is the smaller of `TOLERANCE` nats and `RELATIVE_TOLERANCE` of the budget. The result is
    the coherent strength nearest to the budget; if no strength is coherent, it is the most coherent one.
    """
    return to_budgets(model, edit, (target,), prompts, sign=sign, tokens=tokens, tolerance=tolerance)[0]


def to_budgets(
    model: ChatModel,
    edit: Direction | Effect,
    targets: Sequence[float],
    prompts: Sequence[str],
    *,
    sign: int = 1,
    tokens: int = TOKENS,
    tolerance: float | None = None,
) -> list[Calibration]:
    """`to_budget` for several budgets, in their order; every search starts from the strengths that were tried before.

    So the strengths may differ from those of searches alone, within the tolerance.
    """
    for target in targets:
        require_budget(target)
    plain = greedy(model, [model.chat.prompt(ask(prompt)) for prompt in prompts], tokens)
    floor = SMALLEST_DISTINCT * mean_distinct(plain)
    history: list[Divergence] = []
    found = []
    for target in targets:
        within = min(TOLERANCE, RELATIVE_TOLERANCE * target) if tolerance is None else tolerance
        search = _Search(
            lambda magnitudes: divergences(model, edit, [sign * m for m in magnitudes], prompts, tokens=tokens),
            target, within, floor, history,
        )  # fmt: skip
        search.run()
        found.append(_result(search, len(prompts)))
    return found


def _result(search: _Search, prompts: int) -> Calibration:
    target = search.target
    best = max(search.history, key=lambda seen: (seen.distinct, -abs(seen.p95 - target)))
    if coherent := search.coherent:
        best = min(coherent, key=lambda seen: abs(seen.p95 - target))
    converged = best in coherent and abs(best.p95 - target) <= search.tolerance
    found = Calibration(best.alpha, target, search.tolerance, best, converged, tuple(search.history))
    if not converged or prompts < 2:
        return found
    low, high = interval(coherent, target)
    return replace(found, alpha_low=low, alpha_high=high)


# -------------------------------------------------------------------- the search


class _Search:
    """The search for one budget, over magnitudes of the strength.

    `history` holds what was tried, in order; the search begins with what it is given and adds to it.
    """

    def __init__(
        self, measure: Callable[[Sequence[float]], list[Divergence]], target: float, tolerance: float,
        smallest_distinct: float, history: list[Divergence],
    ) -> None:  # fmt: skip
        self._measure_at, self.target, self.tolerance = measure, target, tolerance
        self.smallest_distinct = smallest_distinct
        self.history = history

    @property
    def coherent(self) -> list[Divergence]:
        """The strengths tried that left the text coherent."""
        return [seen for seen in self.history if self._is_coherent(seen)]

    def run(self) -> None:
        """Bracket the budget, then narrow the bracket."""
        if (bracket := self._bracket()) is not None:
            self._narrow(*bracket)

    def _measure(self, magnitudes: Sequence[float]) -> list[Divergence]:
        found = self._measure_at(magnitudes)
        self.history.extend(found)
        return found

    def _is_coherent(self, seen: Divergence) -> bool:
        return seen.distinct >= self.smallest_distinct

    def _is_below(self, seen: Divergence) -> bool:
        """Whether the strength must grow: the text is coherent and the KL is below the budget."""
        return self._is_coherent(seen) and seen.p95 < self.target

    def _bracket(self) -> tuple[Divergence, Divergence] | None:
        """Two neighbouring strengths with the budget between them.

        None if no strength reaches the budget, or if rounding alone exceeds it at the smallest strength.
        """
        more: Sequence[float] = () if self.history else _FIRST
        while True:
            if more:
                self._measure(more)
            ordered = sorted(self.history, key=lambda seen: abs(seen.alpha))
            first, last = abs(ordered[0].alpha), abs(ordered[-1].alpha)
            if not self._is_below(ordered[0]):
                if first < _SMALLEST:
                    return None
                more = [first / factor for factor in (16.0, 8.0, 4.0, 2.0)]
                continue
            for low, high in pairwise(ordered):
                if self._is_below(low) and not self._is_below(high):
                    return low, high
            if last > _LARGEST:
                return None
            more = [last * factor for factor in (2.0, 4.0)]

    def _narrow(self, low: Divergence, high: Divergence) -> None:
        """Illinois method in log-log coordinates: regula falsi that halves the value at an end that is kept twice.

        An incoherent upper end has no value. The bracket is then bisected, down to the edge of coherent text.
        """

        def height(found: Divergence) -> float | None:
            return math.log(max(found.p95, 1e-12) / self.target) if self._is_coherent(found) else None

        a, b = math.log(abs(low.alpha)), math.log(abs(high.alpha))
        fa, fb, side = height(low), height(high), 0
        assert fa is not None  # the lower end is coherent
        for _ in range(MAX_STEPS):
            if any(abs(seen.p95 - self.target) <= self.tolerance for seen in self.coherent):
                return
            if fb is None and b - a < math.log(_EDGE):
                return
            middle = (a + b) / 2 if fb is None or fb == fa else (a * fb - b * fa) / (fb - fa)
            (found,) = self._measure([math.exp(middle)])
            value = height(found)
            if value is not None and value < 0:
                a, fa = middle, value
                fb = fb / 2 if side == -1 and fb is not None else fb
                side = -1
            else:
                b, fb = middle, value
                fa = fa / 2 if side == 1 else fa
                side = 1


# -------------------------------------------------------------------- uncertainty


def interval(
    measured: Sequence[Divergence], target: float, *, resamples: int = RESAMPLES, seed: int = 0
) -> tuple[float, float]:
    """Limits, lower first, of the strength that reaches the budget: a percentile bootstrap over prompts.

    Whole prompts are drawn with replacement, the same ones at every strength. For each draw, the 95th percentile of KL
    at the measured strengths is interpolated in log-log coordinates to the strength where it crosses `target`. This
    needs no further model calls. A crossing outside the measured strengths counts as the nearest measured strength.

    A percentile bootstrap of n prompts is too narrow by about the ratio of t to z and by sqrt((n - 1) / n), so it
    is widened accordingly (Hesterberg, What Teachers Should Know about the Bootstrap, 2015, 3.3). In
    simulations with 16 prompts a nominal 95 % covers 92-94 %. If a few prompts make up the whole tail, it covers
    85-90 %, and the true strength is then smaller than `low`.
    """
    ordered = sorted(measured, key=lambda seen: abs(seen.alpha))
    count = len(ordered[0].by_prompt)
    draws = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=resamples)
    heights = np.stack([
        stats.percentiles(
            np.concatenate([np.asarray(one, dtype=np.float64) for one in seen.by_prompt]),
            np.repeat(np.arange(count), [len(one) for one in seen.by_prompt]), draws,
        )
        for seen in ordered
    ])  # fmt: skip
    heights = np.log(np.maximum(heights, 1e-12) / target)
    places = np.log([abs(seen.alpha) for seen in ordered])
    crossings = np.exp([_crossing(places, column) for column in heights.T])
    beyond = stats.widened_tail(count, CONFIDENCE)
    limits = np.quantile(crossings, [beyond, 1 - beyond])
    low, high = sorted(math.copysign(1.0, ordered[-1].alpha) * limits)
    return float(low), float(high)


def _crossing(places: np.ndarray, heights: np.ndarray) -> float:
    """The place where a line through the points first rises through zero; an end if it never does."""
    above = np.flatnonzero(heights >= 0)
    if not len(above):
        return float(places[-1])
    at = int(above[0])
    if at == 0:
        return float(places[0])
    (a, b), (fa, fb) = places[at - 1 : at + 1], heights[at - 1 : at + 1]
    return float(a - fa * (b - a) / (fb - fa))
