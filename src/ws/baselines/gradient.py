"""One gradient step as a direction: the gradient of the contrast at the base weights, without optimisation.

    dW_g = -(grad L_pos - grad L_neg)  at theta_base,      L: mean loss per response token, persona removed

It is the limit of both fine-tunes for a vanishing learning rate. Its norm has no meaning and is scaled to a given one.
"""

from __future__ import annotations

import torch
from torch import nn

from ws.algebra.delta import Delta
from ws.algebra.direction import Direction
from ws.base.errors import UserError
from ws.model import architecture, forward
from ws.model.chat import SupervisedTokens
from ws.model.loading import ChatModel
from ws.model.restore import restored


def one_step(
    model: ChatModel,
    positive: list[SupervisedTokens],
    negative: list[SupervisedTokens],
    *,
    norm: float,
    layers: tuple[float, float] = architecture.DEFAULT_SLICE,
    micro_tokens: int = 4_096,
) -> Direction:
    """The negative gradient of the contrast loss on the sites of the slice, scaled to Frobenius norm `norm`."""
    chosen = architecture.sites(model.network, architecture.layer_slice(model.layer_count, *layers))
    names = {site.parameter: site.layer for site in chosen}
    gradients = [_gradient(model, list(names), rows, micro_tokens) for rows in (positive, negative)]
    deltas = {name: Delta.full(gradients[1][name] - gradients[0][name]) for name in names}
    direction = Direction(deltas, model.fingerprint, names, {"baseline": "one gradient step"})
    size = direction.norm()
    if size == 0:
        raise UserError("both sides of the pairs have the same gradient", "Check that their responses differ.")
    scaled = direction * (norm / size)
    return Direction(scaled.deltas, model.fingerprint, names, {"baseline": "one gradient step", "norm": norm})


def _gradient(
    model: ChatModel, names: list[str], rows: list[SupervisedTokens], micro_tokens: int
) -> dict[str, torch.Tensor]:
    """Gradient of the mean loss per response token; the model is unchanged afterwards."""
    parameters = {name: model.network.get_parameter(name) for name in names}
    count = sum(len(ids) - prompt for ids, prompt in rows)
    total = {name: torch.zeros_like(parameter, dtype=torch.float32) for name, parameter in parameters.items()}
    # in fp16 the gradient of a mean underflows, so the division is done afterwards
    divisor, rest = (1, count) if model.dtype == torch.float16 else (count, 1)
    with restored(model.network), torch.enable_grad():
        model.network.eval()
        for parameter in parameters.values():
            parameter.requires_grad_(True)
        for batch in forward.plan_batches([len(ids) for ids, _ in rows], micro_tokens):
            part = [rows[index] for index in batch]
            ids = forward.pad_right([tokens for tokens, _ in part], model.device)
            owner = torch.cat([torch.full((len(t) - p,), i) for i, (t, p) in enumerate(part)]).to(model.device)
            columns = torch.cat([torch.arange(p - 1, len(t) - 1) for t, p in part]).to(model.device)
            logits = model.split.logits_at(ids, owner, columns)
            loss = nn.functional.cross_entropy(logits, ids[owner, columns + 1], reduction="sum") / divisor
            found = torch.autograd.grad(loss, list(parameters.values()))
            for name, gradient in zip(parameters, found, strict=True):
                total[name] += gradient.float() / rest
    if not all(bool(gradient.isfinite().all()) for gradient in total.values()):
        dtype = str(model.dtype).removeprefix("torch.")
        raise UserError(f"the gradient of {model.name} in {dtype} is not finite", "Try --dtype float32.")
    return total
