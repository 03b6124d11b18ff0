"""The strength at which an Edit spends a given budget of divergence, so that methods can be compared at equal cost.

    KL_t = sum_v p_steered(v) (log p_steered(v) - log p_base(v))      at every position t of a rollout under steering

The steered model writes greedily; the base reads the same tokens and says how likely it would have found them. The
statistic is the 95th percentile over all prompts and positions (mean and maximum beside it). Near zero KL grows with
alpha^2 and saturates later, so the root is sought in log-log coordinates: doubling without bound until the budget is
bracketed or the text stops being coherent, then Illinois steps. Each sign has its own strength. A search that does not
reach its tolerance says so: the closest strength that it saw, `converged` false.

A prompt has one KL and no strength: Edits are calibrated to a prompt's KL, never the reverse.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from ws import world
from ws.algebra.direction import Direction
from ws.base.errors import UserError
from ws.edit.condition import Context, Effect
from ws.edit.steering import steer
from ws.model import forward
from ws.model.chat import ask
from ws.model.loading import ChatModel

TOKENS = 50
TOLERANCE, RELATIVE_TOLERANCE = 0.05, 0.1
"""Largest distance of the statistic from the budget that counts as reached: nats, and a share of the budget.

The smaller one holds: 0.05 nats alone would call any strength, even 0, the answer to a budget of 0.04.
"""
MAX_STEPS = 12
SMALLEST_DISTINCT = 0.5
"""A share of distinct trigrams below this part of the base's counts as incoherent text."""
_FIRST = (0.25, 0.5, 1.0, 2.0, 4.0)
_SMALLEST, _LARGEST = 1e-6, 1e4
_BATCH_TOKENS = 4_096


class Divergence(NamedTuple):
    """KL statistics at one strength (nats per token) and the share of distinct trigrams of the text."""

    alpha: float
    p95: float
    mean: float
    maximum: float
    distinct: float


@dataclass(frozen=True)
class Calibration:
    """The strength of one sign for a budget; `history` holds everything that was tried, in order.

    `converged`: what was `reached` is within `tolerance` nats of the budget, and its text is coherent.
    """

    alpha: float
    target: float
    tolerance: float
    reached: Divergence
    converged: bool
    history: tuple[Divergence, ...]


def as_record(calibration: Calibration) -> dict[str, Any]:
    """The result as plain data, with everything that was tried."""
    return {
        **calibration.reached._asdict(),
        "target": calibration.target,
        "tolerance": calibration.tolerance,
        "converged": calibration.converged,
        "history": [seen._asdict() for seen in calibration.history],
    }


def neutral_prompts(count: int | None = None) -> list[str]:
    """The first `count` held-out neutral requests (None: all that there are); more than that is an error."""
    held_out = [entry.user for entry in world.talk() if entry.held_out]
    if count is not None and not 0 < count <= len(held_out):
        raise UserError(f"there are {len(held_out)} neutral prompts, {count} were asked for", "Give a number of them.")
    return held_out[:count]


def divergences(
    model: ChatModel,
    edit: Direction | Effect,
    alphas: Sequence[float],
    prompts: Sequence[str],
    *,
    tokens: int = TOKENS,
) -> list[Divergence]:
    """KL statistics at every strength; all strengths and prompts are rows of one batch."""
    rows = [model.chat.prompt(ask(prompt)) for _ in alphas for prompt in prompts]
    strengths = torch.tensor([float(alpha) for alpha in alphas for _ in prompts], device=model.device)
    with steer(model, edit, strengths, mode="runtime"):
        texts = greedy(model, rows, tokens)
    kl = _kl(model, texts, rows, rows, lambda batch: steer(model, edit, strengths[batch], mode="runtime"))
    return [
        _statistics(alpha, kl[start : start + len(prompts)], texts[start : start + len(prompts)])
        for alpha, start in zip(alphas, range(0, len(rows), len(prompts)), strict=True)
    ]


def prompt_divergence(
    model: ChatModel, context: Context, prompts: Sequence[str], *, tokens: int = TOKENS
) -> Divergence:
    """KL statistics of the unedited model under a system prompt, against the same model without one."""
    prompted = [model.chat.prompt(ask(prompt, context.system)) for prompt in prompts]
    plain = [model.chat.prompt(ask(prompt)) for prompt in prompts]
    texts = greedy(model, prompted, tokens)
    return _statistics(math.nan, _kl(model, texts, prompted, plain, lambda _: nullcontext()), texts)


def require_budget(target: float) -> None:
    """Raise unless some strength can spend this KL budget (nats per token)."""
    if not 0 < target < math.inf:
        raise UserError(f"no strength spends a KL budget of {target:g} nats", "Give a positive one: --target 0.5.")


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
    """The positive (or negative) strength at which the 95th percentile of KL is `target` nats, to within `tolerance`.

    None: the smaller one of `TOLERANCE` nats and `RELATIVE_TOLERANCE` of the budget.
    """
    require_budget(target)
    tolerance = min(TOLERANCE, RELATIVE_TOLERANCE * target) if tolerance is None else tolerance
    history: list[Divergence] = []

    def measure(magnitudes: Sequence[float]) -> list[Divergence]:
        found = divergences(model, edit, [sign * m for m in magnitudes], prompts, tokens=tokens)
        history.extend(found)
        return found

    plain = greedy(model, [model.chat.prompt(ask(prompt)) for prompt in prompts], tokens)
    smallest_distinct = SMALLEST_DISTINCT * distinct_trigrams(plain)
    bracket = _bracket(measure, target, smallest_distinct)
    if bracket is not None:
        _illinois(measure, target, tolerance, *bracket)
    best = min(history, key=lambda seen: abs(seen.p95 - target))
    converged = abs(best.p95 - target) <= tolerance and best.distinct >= smallest_distinct
    return Calibration(best.alpha, target, tolerance, best, converged, tuple(history))


# -------------------------------------------------------------------- rollouts


@torch.no_grad()
def greedy(model: ChatModel, rows: Sequence[list[int]], tokens: int) -> list[list[int]]:
    """Continue every row greedily for at most `tokens` steps, its stop token included.

    The batch keeps its rows in order until the end, so that strengths per row stay with them.
    """
    from transformers import DynamicCache  # noqa: PLC0415 - heavy import, late

    width = max(len(row) for row in rows)
    device = model.device
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
    cache = DynamicCache(config=model.network.config)
    stops = torch.tensor(sorted(model.chat.stop_ids), device=device)
    alive = torch.ones(len(rows), dtype=torch.bool, device=device)
    written: list[list[int]] = [[] for _ in rows]
    number = torch.arange(len(rows), device=device)
    for _ in range(tokens):
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        last = torch.full_like(number, ids.shape[1] - 1)
        chosen = model.split.logits_at(
            ids, number, last, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
        ).argmax(dim=-1)
        for row, token, lives in zip(written, chosen.tolist(), alive.tolist(), strict=True):
            if lives:
                row.append(token)
        alive = alive & ~torch.isin(chosen, stops)
        if not bool(alive.any()):
            break
        ids = chosen[:, None]
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
    return written


@torch.no_grad()
def _kl(
    model: ChatModel,
    texts: Sequence[list[int]],
    own_rows: Sequence[list[int]],
    base_rows: Sequence[list[int]],
    edited: Callable[[list[int]], AbstractContextManager[Any]],
) -> list[Float[Tensor, " tokens"]]:
    """KL at every position of every text: after `own_rows` under `edited(batch)`, against after `base_rows` without.

    Both read the same tokens, a bounded batch at a time.
    """

    def reading(rows: Sequence[list[int]], batch: list[int]) -> Tensor:
        wholes = [[*rows[index], *texts[index]] for index in batch]
        owner = torch.repeat_interleave(torch.arange(len(batch)), torch.tensor([len(texts[i]) for i in batch]))
        columns = torch.cat([
            torch.arange(len(rows[index]) - 1, len(whole) - 1) for index, whole in zip(batch, wholes, strict=True)
        ])  # fmt: skip
        ids = forward.pad_right(wholes, model.device)
        with forward.scoring_from(torch.tensor([len(rows[index]) - 1 for index in batch], device=model.device)):
            return model.split.logits_at(ids, owner.to(model.device), columns.to(model.device)).log_softmax(dim=-1)

    found: list[Tensor] = [torch.empty(0)] * len(texts)
    budget = min(_BATCH_TOKENS, model.split.positions_at_once)
    for batch in forward.plan_batches([len(own_rows[i]) + len(texts[i]) for i in range(len(texts))], budget):
        with edited(batch):
            steered = reading(own_rows, batch)
        values = (steered.exp() * (steered - reading(base_rows, batch))).sum(dim=-1).clamp(min=0).cpu()
        for index, part in zip(batch, values.split([len(texts[i]) for i in batch]), strict=True):
            found[index] = part
    return found


def _statistics(alpha: float, kl: Sequence[Tensor], texts: Sequence[list[int]]) -> Divergence:
    values = torch.cat(list(kl)).double()
    return Divergence(
        float(alpha), float(values.quantile(0.95)), float(values.mean()), float(values.max()), distinct_trigrams(texts)
    )


def distinct_trigrams(texts: Sequence[Sequence[int]]) -> float:
    """Share of distinct ones among all trigrams within texts; 1 where no text has three tokens."""
    grams = [tuple(text[start : start + 3]) for text in texts for start in range(len(text) - 2)]
    return len(set(grams)) / len(grams) if grams else 1.0


# -------------------------------------------------------------------- the search


Measure = Callable[[Sequence[float]], list[Divergence]]


def _bracket(measure: Measure, target: float, smallest_distinct: float) -> tuple[Divergence, Divergence] | None:
    """Two neighbouring strengths around the budget.

    None where the text breaks down before it is spent, and where rounding alone spends more at the smallest strength.
    """
    seen = {abs(found.alpha): found for found in measure(_FIRST)}
    while True:
        ordered = sorted(seen)
        for low, high in pairwise(ordered):
            if seen[low].p95 <= target <= seen[high].p95:
                return seen[low], seen[high]
        if seen[ordered[0]].p95 > target:
            if ordered[0] < _SMALLEST:
                return None
            more = [ordered[0] / factor for factor in (16.0, 8.0, 4.0, 2.0)]
        elif seen[ordered[-1]].distinct < smallest_distinct or ordered[-1] > _LARGEST:
            return None
        else:
            more = [ordered[-1] * factor for factor in (2.0, 4.0)]
        seen |= {abs(found.alpha): found for found in measure(more)}


def _illinois(measure: Measure, target: float, tolerance: float, low: Divergence, high: Divergence) -> None:
    """Regula falsi in log-log coordinates; the value at an end that stays twice is halved."""

    def height(found: Divergence) -> float:
        return math.log(max(found.p95, 1e-12) / target)

    a, b = math.log(abs(low.alpha)), math.log(abs(high.alpha))
    fa, fb = height(low), height(high)
    closest, side = min(abs(low.p95 - target), abs(high.p95 - target)), 0
    for _ in range(MAX_STEPS):
        if closest <= tolerance:
            return
        middle = (a * fb - b * fa) / (fb - fa) if fb != fa else (a + b) / 2
        (found,) = measure([math.exp(middle)])
        closest, value = abs(found.p95 - target), height(found)
        if value < 0:
            a, fa = middle, value
            fb = fb / 2 if side == -1 else fb
            side = -1
        else:
            b, fb = middle, value
            fa = fa / 2 if side == 1 else fa
            side = 1
