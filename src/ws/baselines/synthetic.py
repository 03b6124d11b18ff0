"""Directions built only from the base model and the personas, without training.

    writes    dW = v / |v|  (outer)  g  *  size * |W|           on every residual writer (o, down) of the slice
    flipped   dW = -2 sum_{i < count} s_i u_i v_i'              on every site of the slice;  W = sum_i s_i u_i v_i'

v is what to write: the activation direction of the layer (`residual_writes`), or the readout of the persona's words by
the unembedding (`readout`). g is an input direction of norm 1: the first or the last right singular vector of W (what
the module listens to most, or least), or a random unit vector (the null of equal norm and output). `flipped` turns the
sign of what W does most, and knows nothing of the personas.

A direction depends only on the base weights, on the texts of the personas and, for `residual_writes`, on activations
under them. Only the size (`norm`) may come from a trained direction, so that both can be compared at equal size; the
provenance records it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from ws.algebra.delta import Delta
from ws.algebra.direction import Direction
from ws.base import keyed_random
from ws.base.errors import UserError
from ws.baselines.repe import ActivationDirection
from ws.fitting.behaviour import Behaviour
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
    made = {
        "synthetic": "residual writes", "input": source, "seed": seed, "made_from": ["base weights", "personas"],
        "activation": dict(activation.provenance),
    }  # fmt: skip
    return _writes(model, activation.vectors, source, made, size=size, norm=norm, seed=seed)


def readout(
    model: ChatModel,
    behaviour: Behaviour,
    *,
    layers: tuple[float, float] = architecture.DEFAULT_SLICE,
    size: float = SIZE,
    norm: float | None = None,
) -> Direction:
    """Rank-one writes of the persona's words from the first input direction: no activations, no training.

        v = mean of E[t] over tokens t of the positive personas - the same of the negative ones     E: unembedding rows

    Tokens count once, and tokens that both sides have are left out. So is the gain of the final norm. size, norm: as
    for `residual_writes`. A side without words of its own is a UserError.
    """
    positive, negative = (
        {token for text in texts for token in model.chat.tokenizer(text, add_special_tokens=False)["input_ids"]}
        for texts in (behaviour.personas.pos, behaviour.personas.neg)
    )
    own = [sorted(mine - other) for mine, other in ((positive, negative), (negative, positive))]
    if not all(own):
        raise UserError(
            f"a side of behaviour {behaviour.name!r} has no word that the other side lacks", "Change the personas."
        )
    rows = model.network.get_output_embeddings().weight.data
    above, below = (rows[tokens].double().mean(dim=0) for tokens in own)
    chosen = architecture.layer_slice(model.layer_count, *layers)
    made = {
        "synthetic": "readout", "input": "first", "made_from": ["base weights", "words of the personas"],
        "behaviour": behaviour.name, "tokens": [len(tokens) for tokens in own],
    }  # fmt: skip
    return _writes(model, dict.fromkeys(chosen, above - below), "first", made, size=size, norm=norm)


def flipped(
    model: ChatModel, layers: tuple[float, float] = architecture.DEFAULT_SLICE, count: int = 1, *,
    norm: float | None = None,
) -> Direction:  # fmt: skip
    """The `count` largest singular directions of every site with their signs turned; from the base weights alone.

    norm: Frobenius norm that the whole is scaled to. Without it, strength 1 turns the signs exactly.
    """
    if count < 1:
        raise UserError(f"{count} singular directions were requested", "Give 1 or more.")
    deltas, of_layer = {}, {}
    for site in architecture.sites(model.network, architecture.layer_slice(model.layer_count, *layers)):
        weight = model.network.get_parameter(site.parameter).data.double()
        top = _right_vectors(weight)[:count]
        deltas[site.parameter] = Delta.low_rank(-2 * weight @ top.T, top)
        of_layer[site.parameter] = site.layer
    direction = Direction(deltas, model.fingerprint, of_layer)
    factor = 1.0 if norm is None else norm / direction.norm()
    made = {"synthetic": "flipped", "count": count, "made_from": ["base weights"], "scaled_to_norm": norm}
    return replace(direction * factor, provenance=made)


def _writes(
    model: ChatModel,
    written: Mapping[int, Float[Tensor, " width"]],
    source: Input,
    made: Mapping[str, Any],
    *,
    size: float,
    norm: float | None,
    seed: int = 0,
) -> Direction:
    """`written` (layer -> what to write) from one input direction per residual writer; `made` is for the provenance."""
    deltas, of_layer = {}, {}
    for site in architecture.sites(model.network, sorted(written)):
        if not site.writes_residual:
            continue
        stored = model.network.get_parameter(site.parameter).data.double()
        weight = stored.T if site.transposed else stored
        vector = written[site.layer].to(weight)
        read = _input_direction(weight, source, f"{seed}|{site.parameter}")
        scale = size * float(weight.norm())
        delta = Delta.low_rank((scale * vector / vector.norm())[:, None], read[None, :])
        deltas[site.parameter] = delta.T if site.transposed else delta
        of_layer[site.parameter] = site.layer
    built = Direction(deltas, model.fingerprint, of_layer)
    factor = 1.0 if norm is None else norm / built.norm()
    provenance = {**made, "relative_size": size * factor, "scaled_to_norm": norm}
    return replace(built * factor, provenance=provenance)


def _input_direction(weight: Float[Tensor, "out in"], source: Input, key: str) -> Float[Tensor, " in"]:
    if source == "random":
        drawn = torch.randn(weight.shape[1], generator=keyed_random.generator(key)).to(weight)
        return drawn / drawn.norm()
    vector = _right_vectors(weight)[0 if source == "first" else -1]
    # a singular vector has no sign: without this rule, the algorithm would decide it
    return vector * vector[vector.abs().argmax()].sign()


def _right_vectors(weight: Float[Tensor, "out in"]) -> Float[Tensor, "r in"]:
    """Right singular vectors as rows, largest singular value first."""
    vectors: Tensor = torch.linalg.svd(weight, full_matrices=False).Vh
    return vectors
