"""Second moments of trace 1: what a subspace is scored on, whatever it is made of.

    activations   S = mean_i x_i x_i' / |x_i|^2                x_i: change of the residual stream at prompt i
    writes        S = N dW dW' N / tr                          dW of o or down, N: the norm behind, if there is one
    reads         S = sum N dW' dW N / tr                      dW of q, k, v, gate, up, N: the norm in front

The energy of a subspace with orthonormal basis B is tr(B' S B), for activations the mean of |B' x_i|^2 / |x_i|^2, for
writes |B' N dW|^2 / |N dW|^2. The largest energy that any k directions can have is the sum of the k largest
eigenvalues: the oracle. The mean over uniformly random subspaces is k / d: the null. Moments come from the factors of
dW, so a low-rank dW is never formed. Everything is fp64.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from ws.algebra import spectrum
from ws.algebra.delta import Delta
from ws.algebra.direction import Direction
from ws.model.architecture import Site
from ws.subspace.spans import Span, unit_rows
from ws.subspace.weights import READERS, ResidualWeights, Unavailable, part_of

Moment = Float[Tensor, "d d"]
Axis = Literal["block", "cumulative", "o", "down", "written", "read"]
"""What a subspace is scored on. block, cumulative: EVAL activations; o, down: one writer; written: both, each scaled to
trace 1 first, because else the larger one decides; read: all readers."""


def of_rows(rows: Float[Tensor, "n d"]) -> Moment:
    """The mean outer product of the rows scaled to norm 1; rows of zeros are left out."""
    kept = rows[rows.norm(dim=1) > 0]
    if not len(kept):
        raise Unavailable("the direction changes nothing here")
    units = unit_rows(kept)
    return units.T @ units / len(units)


def written(view: ResidualWeights, direction: Direction, layer: int, *roles: str) -> Moment:
    """The mean of the moments of what the direction's deltas of these writers write, each of trace 1."""
    found = []
    for site in _touched(view, direction, layer, roles):
        gram = _gram(*_as_used(direction, site), output_side=True)
        norm = view.norms(layer)[1][part_of(site.roles[0])]
        found.append(_scaled(norm.behind(norm.behind(gram).mT)))
    return _mean(found, f"the direction does not change {' or '.join(roles)} of layer {layer}")


def read(view: ResidualWeights, direction: Direction, layer: int) -> Moment:
    """The moment of what the direction's deltas of all readers of a layer read, of trace 1 together."""
    found = []
    for site in _touched(view, direction, layer, READERS):
        gram = _gram(*_as_used(direction, site), output_side=False)
        norm = view.norms(layer)[0][part_of(site.roles[0])]
        found.append(norm.before(norm.before(gram).mT))
    return _scaled(_mean(found, f"the direction changes nothing that reads in layer {layer}"))


def energy(basis: Span, moment: Moment) -> float:
    """`tr(B' S B)`: the share of the moment inside the subspace, between 0 and 1."""
    own = basis.double()
    return float((own * (moment @ own)).sum())


def spectrum_of(moment: Moment) -> Float[Tensor, " d"]:
    """Eigenvalues in descending order; the sum of the first k is the oracle's energy at rank k."""
    return torch.linalg.eigvalsh(moment).flip(0).clamp(min=0)


def without(moment_rows: Float[Tensor, "n d"], removed: Span) -> Moment:
    """The moment of rows after a subspace has been projected out of them."""
    return of_rows(moment_rows - (moment_rows @ removed.double()) @ removed.double().T)


def _touched(view: ResidualWeights, direction: Direction, layer: int, roles: Sequence[str]) -> list[Site]:
    return [site for site in view.sites[layer] if set(site.roles) & set(roles) and site.parameter in direction.deltas]


def _as_used(direction: Direction, site: Site) -> tuple[Delta, Tensor | None]:
    """The delta of a site as (out, in), with the base weight if it needs one."""
    delta, weight = direction.deltas[site.parameter].to("cpu"), direction.weights.get(site.parameter)
    weight = None if weight is None else weight.detach().cpu()
    return (delta.T, None if weight is None else weight.T) if site.transposed else (delta, weight)


def _gram(delta: Delta, weight: Tensor | None, *, output_side: bool) -> Moment:
    """`dW dW'` (output side) or `dW' dW`, from the factors if dW is their product alone."""
    if delta.is_thin:
        outer, inner = (delta.left, delta.right.mT) if output_side else (delta.right.mT, delta.left)
        outer, inner = outer.double(), inner.double()
        return outer @ (inner.mT @ inner) @ outer.mT
    dense = spectrum.dense(delta, weight)
    return dense @ dense.mT if output_side else dense.mT @ dense


def _scaled(gram: Moment) -> Moment:
    trace = float(gram.trace())
    if trace <= 0:
        raise Unavailable("the direction is zero here")
    return (gram + gram.mT) / (2 * trace)


def _mean(found: Sequence[Moment], otherwise: str) -> Moment:
    if not found:
        raise Unavailable(otherwise)
    return torch.stack(list(found)).mean(dim=0)
