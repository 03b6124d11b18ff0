"""Directions built only from the base model and the personas, without training.

    dW' = v_l / |v_l|  (outer)  g / |g|  *  size * |W|          on every residual writer (o, down) of the slice

v_l is the activation direction of the layer (what to write), g an input direction: the first or the last right singular
vector of W (what the module listens to most, or least), or a random unit vector (the null of equal norm and output).
The direction depends only on the base weights and on activations under the personas. Only the size (`norm`) may come
from a trained direction, so that both can be compared at equal size; the provenance records it.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ws.algebra.delta import Delta
from ws.algebra.direction import Direction
from ws.base import keyed_random
from ws.base.errors import UserError
from ws.baselines.repe import ActivationDirection
from ws.model import architecture
from ws.model.loading import ChatModel

Input = Literal["first", "last", "random"]
INPUTS: tuple[Input, ...] = ("first", "last", "random")
SIZE = 1e-3
"""Norm of the update relative to the weight, as in the replicated work."""


def residual_writes(
    model: ChatModel,
    activation: ActivationDirection,
    source: Input,
    *,
    size: float = SIZE,
    norm: float | None = None,
    seed: int = 0,
) -> Direction:
    """Rank-one writes of an activation direction from one input direction per residual writer.

    size: norm of every update relative to its weight; norm: Frobenius norm that the whole is scaled to afterwards.
    """
    if activation.base != model.fingerprint:
        raise UserError("the activation direction belongs to another model", "Fit it on this model.")
    layers = sorted(activation.vectors)
    deltas, of_layer = {}, {}
    for site in architecture.sites(model.network, layers):
        if not site.writes_residual:
            continue
        stored = model.network.get_parameter(site.parameter).data.float()
        weight = stored.T if site.transposed else stored
        written = activation.vectors[site.layer].double()
        read = _input_direction(weight, source, f"{seed}|{site.parameter}")
        scale = size * float(weight.double().norm())
        delta = Delta.low_rank((scale * written / written.norm())[:, None], read[None, :])
        deltas[site.parameter] = delta.T if site.transposed else delta
        of_layer[site.parameter] = site.layer
    built = Direction(deltas, model.fingerprint, of_layer)
    factor = 1.0 if norm is None else norm / built.norm()
    provenance = {
        "synthetic": "residual writes", "input": source, "seed": seed, "made_from": ["base weights", "personas"],
        "activation": dict(activation.provenance), "relative_size": size * factor, "scaled_to_norm": norm,
    }  # fmt: skip
    return Direction((built * factor).deltas, model.fingerprint, of_layer, provenance)


def _input_direction(weight: Tensor, source: Input, key: str) -> Tensor:
    if source == "random":
        drawn = torch.randn(weight.shape[1], generator=keyed_random.generator(key)).double()
        return drawn / drawn.norm()
    vectors = torch.linalg.svd(weight.double(), full_matrices=False).Vh
    return vectors[0] if source == "first" else vectors[-1]
