"""A few gradient steps as a direction: plain gradient descent on the contrast, without an optimiser and its state.

    tau_p <- tau_p - rate_t grad L_p(theta_base + tau_p; rows_t),   p = pos, neg;   t = 1 .. k
    rate_t = (norm / k) / sqrt((|grad L_pos|^2 + |grad L_neg|^2) / 2)
    dW = tau_pos - tau_neg, scaled to Frobenius norm `norm`

L: mean loss per response token, persona removed. Each step reads its own part of the rows. Both poles have one rate,
as they have in a fit, so a step moves a pole by norm / k in the root mean square over the two. With k = 1 dW is
`grad L_neg - grad L_pos` at the base weights: the limit of both fine-tunes for a vanishing learning rate. The norm of a
gradient has no meaning, so it is scaled to a given one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from ws.algebra.delta import Delta
from ws.algebra.direction import Direction
from ws.base import console, keyed_random
from ws.base.errors import UserError
from ws.edit.steering import steer
from ws.model import architecture, forward
from ws.model.chat import SupervisedTokens
from ws.model.loading import ChatModel
from ws.model.restore import restored

MICRO_TOKENS = 4_096
"""Padded tokens per forward and backward pass."""

Row = TypeVar("Row")


def steps(
    model: ChatModel,
    positive: Sequence[SupervisedTokens],
    negative: Sequence[SupervisedTokens],
    *,
    count: int,
    norm: float,
    seed: int = 0,
    layers: tuple[float, float] = architecture.DEFAULT_SLICE,
    micro_tokens: int = MICRO_TOKENS,
) -> Direction:
    """`count` steps of both poles on the sites of the slice (fractions of the depth), as a direction of norm `norm`.

    positive, negative: the rows of the poles; `seed` deals them out to the steps. Raises if a side has fewer rows than
    steps, if a gradient is not finite, or if both poles move alike. The model is unchanged afterwards. Everything is
    dense: about six copies of the touched weights in fp32 are in memory.
    """
    chosen = architecture.sites(model.network, architecture.layer_slice(model.layer_count, *layers))
    of_layer = {site.parameter: site.layer for site in chosen}
    weights = [model.network.get_parameter(name) for name in of_layer]
    moved = [[torch.zeros_like(one, dtype=torch.float32) for one in weights] for _ in (positive, negative)]

    def direction(parts: Sequence[Tensor]) -> Direction:
        deltas = {name: Delta.full(part) for name, part in zip(of_layer, parts, strict=True)}
        return Direction(deltas, model.fingerprint, of_layer)

    # one key for both sides: with equal rows they get the same prompts in a step, and what these share cancels
    dealt = [deal(rows, count, f"gradient steps|{seed}") for rows in (positive, negative)]
    with restored(model.network):
        model.network.eval()
        for weight in weights:
            weight.requires_grad_(True)
        for parts in console.track(zip(*dealt, strict=True), "gradient steps", count):
            gradients = []
            for pole, rows in zip(moved, parts, strict=True):
                with steer(model, direction(pole)):
                    gradients.append(mean_loss(model, rows, weights, micro_tokens)[1])
            sizes = [math.sqrt(sum(float(one.double().square().sum()) for one in found)) for found in gradients]
            rate = norm / count / (math.hypot(*sizes) / math.sqrt(2) or 1.0)
            for pole, found in zip(moved, gradients, strict=True):
                for part, gradient in zip(pole, found, strict=True):
                    part.sub_(gradient, alpha=rate)
    contrast = direction([pos - neg for pos, neg in zip(*moved, strict=True)])
    size = contrast.norm()
    if size == 0:
        raise UserError("both sides of the pairs have the same gradient", "Check that their responses differ.")
    provenance = {"baseline": "gradient steps", "steps": count, "seed": seed, "norm": norm}
    return Direction((contrast * (norm / size)).deltas, model.fingerprint, of_layer, provenance)


def deal(rows: Sequence[Row], parts: int, key: str) -> list[list[Row]]:
    """The rows in `parts` random parts of nearly equal size, each in the order of `rows`."""
    if not 0 < parts <= len(rows):
        raise UserError(f"{len(rows)} rows of one side cannot be dealt out to {parts} steps", "Use fewer steps.")
    order = torch.randperm(len(rows), generator=keyed_random.generator(key)).tolist()
    return [[rows[index] for index in sorted(order[start::parts])] for start in range(parts)]


def mean_loss(
    model: ChatModel, rows: Sequence[SupervisedTokens], wanted: Sequence[Tensor], micro_tokens: int = MICRO_TOKENS
) -> tuple[float, list[Tensor]]:
    """Mean loss per response token of the model as it is now, and its gradient to the tensors `wanted`, fp32.

    Raises if the loss or the gradient is not finite.
    """
    total, count = 0.0, sum(len(ids) - start for ids, start in rows)
    gradients = [torch.zeros_like(one, dtype=torch.float32) for one in wanted]
    for batch in forward.plan_batches([len(ids) for ids, _ in rows], micro_tokens):
        part = [rows[index] for index in batch]
        ids = forward.pad_right([tokens for tokens, _ in part], model.device)
        owner = torch.cat([torch.full((len(t) - p,), i) for i, (t, p) in enumerate(part)]).to(model.device)
        columns = torch.cat([torch.arange(p - 1, len(t) - 1) for t, p in part]).to(model.device)
        targets = ids[owner, columns + 1]
        with torch.enable_grad():
            if model.split.is_split:
                losses = model.split.losses(model.split.hidden(ids)[owner, columns], targets)
            else:
                logits = model.split.logits_at(ids, owner, columns)
                losses = nn.functional.cross_entropy(logits, targets, reduction="none")
            loss = losses.sum()  # in fp16 the gradient of a mean underflows, so the sum is divided afterwards
        for gradient, found in zip(gradients, torch.autograd.grad(loss, list(wanted)), strict=True):
            gradient.add_(found.float(), alpha=1 / count)
        total += float(loss.detach())
    if not (math.isfinite(total) and all(bool(one.isfinite().all()) for one in gradients)):
        dtype = str(model.dtype).removeprefix("torch.")
        raise UserError(
            f"the loss of {model.name} in {dtype}, or its gradient, is not finite",
            "Try --dtype float32 or a lower rate.",
        )
    return total / count, gradients
