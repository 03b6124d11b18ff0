"""Activation steering by the gradient: the vectors that raise the behaviour's log-ratio fastest, to first order.

    g_l = mean over rows of  label * d logratio / d v_l   at v = 0,      v_l added to the output of layer l everywhere
    vector_l = g_l / |g_l| * (mean norm of the residual stream at layer l)

A vector added at all positions moves the log-ratio by the sum of what it does at each, so `g_l` is the sum, over all
positions of the text that is read (the replies of a contrast included), of the gradients to the residual stream after
layer l. All `g_l` are taken with no vector on any layer: the direction on one layer alone is `on_layers([l])`.

This is the vector-Jacobian product of the readout. It uses the labels of the rows it reads, as no other activation
baseline does, so give it dev rows only.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from ws.base import console
from ws.base.errors import UserError
from ws.baselines import repe
from ws.baselines.gradient import MICRO_TOKENS, mean_loss
from ws.baselines.repe import ActivationDirection
from ws.edit.steering import steer
from ws.fitting.behaviour import Behaviour
from ws.measure.choice import Choices, answers_of
from ws.measure.probe import Probe
from ws.model import architecture, forward
from ws.model.chat import SupervisedTokens
from ws.model.loading import ChatModel
from ws.model.restore import restored


def fit(
    model: ChatModel, probe: Probe, behaviour: Behaviour, *, layers: Collection[int], micro_tokens: int = MICRO_TOKENS
) -> ActivationDirection:
    """The direction from whole rows of a choice or contrast probe, on these layers, in units of the residual norm.

    Log-ratios are the engine's `logratio` without edits and without a system prompt; each counts with its row's label.
    behaviour: its training prompts and personas give the norms (`repe.residual_norms`). provenance `slopes`: layer ->
    mean of label * d logratio / d alpha at alpha = 0, in nats, if that layer alone is steered. Raises for probes of
    other kinds, for layers that do not exist, and if a gradient is zero or not finite.
    """
    if probe.kind not in _GRADIENTS:
        raise UserError(
            f"probe {probe.name!r} of kind {probe.kind} has no log-ratio without writing", "Use a choice or a contrast."
        )
    width = int(architecture.text_config(model.network).hidden_size)
    vectors = {layer: torch.zeros(width, device=model.device, requires_grad=True) for layer in sorted(layers)}
    with restored(model.network):
        model.network.eval()
        norms = repe.residual_norms(model, behaviour, layers)
        with steer(model, ActivationDirection(vectors, model.fingerprint)):
            found = _GRADIENTS[probe.kind](model, probe, list(vectors.values()), micro_tokens)
    scaled, slopes = {}, {}
    for layer, total in zip(vectors, found, strict=True):
        size = float(total.norm()) / len(probe.rows)
        if not 0 < size < float("inf"):
            raise UserError(
                f"the gradient of probe {probe.name!r} at layer {layer} has norm {size}", "Try --dtype float32."
            )
        scaled[layer] = (total / total.norm() * norms[layer]).cpu()
        slopes[layer] = size * norms[layer]
    provenance = {
        "method": "Jacobian", "behaviour": behaviour.name, "probe": probe.name, "rows": len(probe.rows),
        "layers": list(scaled), "unit": "residual", "slopes": slopes,
    }  # fmt: skip
    return ActivationDirection(scaled, model.fingerprint, provenance=provenance, unit="residual")


def _of_contrasts(model: ChatModel, probe: Probe, vectors: list[Tensor], micro_tokens: int) -> list[Tensor]:
    """Gradient of the summed label * logratio. A log-ratio is a difference of summed losses of whole replies."""
    texts: dict[int, list[SupervisedTokens]] = {1: [], -1: []}
    for row in probe.rows:
        for sign, reply in zip((row.label, -row.label), row.replies or (), strict=True):
            texts[sign].append(model.chat.supervised(row.messages, reply, closed=probe.closed))
    total = [torch.zeros_like(vector) for vector in vectors]
    for sign, rows in console.track(texts.items(), "differentiating replies", len(texts)):
        tokens = sum(len(ids) - start for ids, start in rows)
        for summed, gradient in zip(total, mean_loss(model, rows, vectors, micro_tokens)[1], strict=True):
            summed.sub_(gradient, alpha=sign * tokens)
    return total


def _of_choices(model: ChatModel, probe: Probe, vectors: list[Tensor], micro_tokens: int) -> list[Tensor]:
    """Gradient of the summed label * logratio. An answer's probability is the sum over its token sequences."""
    rows = [model.chat.prompt(row.messages, row.continuation) for row in probe.rows]
    batches = forward.plan_batches([len(row) for row in rows], micro_tokens)
    choices = Choices(rows, batches, answers_of(model, probe.answers), micro_tokens)
    total = [torch.zeros_like(vector) for vector in vectors]
    with forward.exact_for(choices.answer_tokens(model)), torch.enable_grad():
        for batch in console.track(batches, "differentiating answers", len(batches)):
            after = {
                begun: _next_log_probabilities(model, [[*rows[index], *begun] for index in batch])
                for begun in [(), *choices.beginnings]
            }
            first, second = (_log_probability(after, group) for group in choices.answers)
            labels = torch.tensor([probe.rows[index].label for index in batch], device=model.device)
            found = torch.autograd.grad((labels * (first - second)).sum(), vectors)
            for summed, gradient in zip(total, found, strict=True):
                summed.add_(gradient)
    return total


def _next_log_probabilities(model: ChatModel, rows: Sequence[Sequence[int]]) -> Float[Tensor, "rows vocabulary"]:
    ids = forward.pad_right(rows, model.device)
    last = torch.tensor([len(row) - 1 for row in rows], device=model.device)
    return model.split.logits_at(ids, torch.arange(len(rows), device=model.device), last).log_softmax(dim=-1)


def _log_probability(
    after: Mapping[tuple[int, ...], Float[Tensor, "rows vocabulary"]], sequences: Sequence[Sequence[int]]
) -> Float[Tensor, " rows"]:
    """Log of the summed probability of the sequences; `after` holds the log-probabilities after each beginning."""
    return torch.stack([
        torch.stack([after[tuple(sequence[:end])][:, token] for end, token in enumerate(sequence)]).sum(dim=0)
        for sequence in sequences
    ]).logsumexp(dim=0)  # fmt: skip


_GRADIENTS: Mapping[str, Callable[[ChatModel, Probe, list[Tensor], int], list[Tensor]]] = {
    "choice": _of_choices,
    "contrast": _of_contrasts,
}
