"""Activation steering inside what a layer writes most: the persona difference, projected on its top write directions.

    B = first k left singular vectors of [W_o | W_down] of layer l          vector_l = B B' v_l / |B B' v_l| * norm_l

v_l is the mean difference of the residual stream between the personas (`repe`), norm_l the mean norm of the stream at
that layer: a vector of norm 1 moves nothing. One layer at a time, at all positions, as the other activation baselines
of one layer are, so that only the projection is different from them. It is from the replicated work, which has no
numbers for it. The left singular vectors are the eigenvectors of `W_o W_o' + W_down W_down'`, in fp64.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from ws.base.errors import UserError
from ws.baselines.repe import ActivationDirection
from ws.model import architecture
from ws.model.loading import ChatModel

RANKS = (1, 4, 8, 16, 32)
MOST_LAYERS = 8
"""Evenly spaced layers that are tried, so that layers times ranks stay within the budget of choices."""


def layers_to_try(layer_count: int) -> list[int]:
    """At most `MOST_LAYERS` layers, evenly spaced from the first to the last."""
    count = min(MOST_LAYERS, layer_count)
    return sorted({round(place * (layer_count - 1) / max(count - 1, 1)) for place in range(count)})


def top_writes(model: ChatModel, layer: int, ranks: Sequence[int] = RANKS) -> dict[int, Float[Tensor, "width k"]]:
    """The first k left singular vectors of `[W_o | W_down]`, for every rank below the width."""
    gram = None
    for site in architecture.sites(model.network, [layer]):
        if site.writes_residual:
            stored = model.network.get_parameter(site.parameter).data.to("cpu", torch.float64)
            weight = stored.T if site.transposed else stored
            gram = weight @ weight.T if gram is None else gram + weight @ weight.T
    if gram is None:
        raise UserError(f"layer {layer} has no matrix that writes to the residual stream", "Leave this method out.")
    vectors = torch.linalg.eigh(gram)[1].flip(1)
    return {rank: vectors[:, :rank] for rank in ranks if rank < len(gram)}


def in_top_writes(
    direction: ActivationDirection, layer: int, basis: Float[Tensor, "width k"], norm: float
) -> ActivationDirection:
    """The vector of one layer, projected on a basis and scaled to a norm; a zero projection is an error."""
    vector = direction.vectors[layer]
    inside = basis @ (basis.mT @ vector.to("cpu", torch.float64))
    if not float(inside.norm()) > 1e-9 * float(vector.norm()):
        raise UserError(
            f"the persona difference at layer {layer} has no part in its first {basis.shape[1]} write directions",
            "Leave this method out.",
        )
    scaled = (inside * (norm / inside.norm())).float().to(vector.device)
    provenance = {"method": "RepE in the top writes", "layer": layer, "rank": basis.shape[1],
                  "of": dict(direction.provenance)}  # fmt: skip
    return ActivationDirection({layer: scaled}, direction.base, direction.edited, provenance, "residual")
