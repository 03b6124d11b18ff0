"""Parts of a delta: a piece and the rest of it, which add up to the whole.

    projection     B B' dW                 and  (I - B B') dW                    B: (out, k), orthonormal columns
    crop           U U' dW V V'            and  dW - U U' dW V V'                U: (out, k), V: (in, m), orthonormal
    scaled rows    diag(f) dW              scaled columns  dW diag(f)            f of 0 and 1 selects rows or columns

Every part is a Delta of the same form, also for deltas that are functions of the base weight, so nothing dense is
formed. Products are in fp64 and are rounded to fp32 once. The rest of a thin delta is made from its own factors and not
by subtraction, so that small pieces do not leave rounding errors of the whole.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from ws.algebra import spectrum
from ws.algebra.delta import BaseTerm, Delta


class Split(NamedTuple):
    """A piece of a delta and the rest of it."""

    piece: Delta
    rest: Delta


def project(delta: Delta, basis: Float[Tensor, "out k"], weight: Tensor | None = None) -> Split:
    """The part of a delta that writes into the span of `basis`, and the part that writes outside of it."""
    basis = basis.double()
    inside = delta.left_product(basis, weight)
    if not delta.is_thin:
        return Split(Delta.low_rank(basis, inside), delta + Delta.low_rank(-basis, inside))
    left = delta.left.double()
    return Split(Delta.low_rank(basis, inside), Delta.low_rank(left - basis @ (basis.mT @ left), delta.right))


def crop(
    delta: Delta, left: Float[Tensor, "out k"], right: Float[Tensor, "in m"], weight: Tensor | None = None
) -> Split:
    """The part of a delta that maps the span of `right` into the span of `left`, and everything else."""
    left, right = left.double(), right.double()
    core = left.mT @ delta.right_product(right, weight)
    outer, inner = (left, core @ right.mT) if left.shape[1] <= right.shape[1] else (left @ core, right.mT)
    return Split(Delta.low_rank(outer, inner), delta + Delta.low_rank(-outer, inner))


def singular_directions(found: spectrum.Singular, chosen: Tensor) -> Split:
    """The chosen singular directions of a delta (a mask), and the others."""

    def of(mask: Tensor) -> Delta:
        root = found.values[mask].sqrt()
        return Delta.low_rank(found.left[:, mask] * root, root[:, None] * found.right[mask])

    return Split(of(chosen), of(~chosen))


def scale_rows(delta: Delta, factors: Float[Tensor, " out"]) -> Delta:
    """`diag(factors) dW`."""
    factors = factors.to(delta.left)
    terms = tuple(BaseTerm(factors if term.row is None else term.row * factors, term.mix) for term in delta.base_terms)
    dense = None if delta.dense is None else delta.dense * factors[:, None]
    return Delta(delta.left * factors[:, None], delta.right, dense, terms)


def scale_columns(delta: Delta, factors: Float[Tensor, " in"]) -> Delta:
    """`dW diag(factors)`."""
    factors = factors.to(delta.right)
    terms = tuple(BaseTerm(term.row, _scaled_mix(term, factors)) for term in delta.base_terms)
    dense = None if delta.dense is None else delta.dense * factors
    return Delta(delta.left, delta.right * factors, dense, terms)


def _scaled_mix(term: BaseTerm, factors: Tensor) -> Tensor:
    if term.mix is None:
        return factors
    return term.mix * (factors.reshape(term.mix.shape[0], 1, -1) if term.is_block_diagonal else factors)


def mismatch(pieces: list[Delta], whole: Delta, weight: Tensor | None, probes: Float[Tensor, "in n"]) -> float:
    """`|(sum of pieces - dW) x|^2` summed over the probes: n times the squared Frobenius error, in expectation.

    probes: Gaussian inputs, fp64. No matrix is formed, so it is affordable for every pair at run time.
    """
    gap = -whole.right_product(probes, weight)
    for piece in pieces:
        gap = gap + piece.right_product(probes, weight)
    return float(torch.sum(gap**2))
