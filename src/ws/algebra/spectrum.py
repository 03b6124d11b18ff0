"""Norms, inner products, spectra and truncation of deltas. Low-rank deltas are never made dense.

For thin factors `dW = B A`:  |dW|^2 = tr((B'B)(A A')),  <dW1, dW2> = sum((B1'B2) * (A1 A2')), and with thin QR
decompositions B = Q S, A' = P T the singular values of dW are those of the small matrix S T'. Dense parts and functions
of the base weight are formed in fp64, one matrix at a time.

Numeric trap: the factors of a difference hold large terms that cancel, so all Gram products are in fp64.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from ws.algebra.delta import Delta
from ws.base.errors import UserError

Weight = Tensor | None
"""The base weight, for deltas that are functions of it."""


def inner_product(first: Delta, second: Delta, weight: Weight = None) -> float:
    """Frobenius inner product `<first, second>`, fp64. Both are updates of the same base weight."""
    first.require_same_shape(second)
    total = float(_thin_inner(first, second))
    rest, other_rest = _without_thin(first, weight), _without_thin(second, weight)
    if other_rest is not None:
        total += float(_thin_dense_inner(first, other_rest))
    if rest is not None:
        total += float(_thin_dense_inner(second, rest))
        if other_rest is not None:
            total += float((rest * other_rest).sum())
    return total


def norm(delta: Delta, weight: Weight = None) -> float:
    """Frobenius norm, fp64. It uses QR of the factors, so it is accurate if terms cancel."""
    if not delta.is_thin:
        return float(dense(delta, weight).norm())
    if delta.rank == 0:
        return 0.0
    return float(_core(delta).norm())


class Truncation(NamedTuple):
    """A delta of limited rank, and the share of the squared Frobenius norm that it keeps."""

    delta: Delta
    energy: float


def truncate(delta: Delta, rank: int, weight: Weight = None) -> Truncation:
    """The closest delta of at most `rank` (Eckart-Young); low-rank deltas use thin QR.

    Each factor carries the square roots of the singular values.
    """
    if rank < 1:
        raise UserError(f"the rank is {rank}; it must be at least 1", "Give a larger rank.")
    if delta.is_thin and delta.rank == 0:
        return Truncation(delta, 1.0)
    outer, values, inner = singular(delta, weight)
    total = float(values.square().sum())
    kept = values[..., :rank]
    root = kept.sqrt()
    result = Delta.low_rank(outer[..., :rank] * root[..., None, :], root[..., :, None] * inner[..., :rank, :])
    return Truncation(result, float(kept.square().sum()) / total if total > 0 else 1.0)


class Singular(NamedTuple):
    """`left diag(values) right`, fp64, values in descending order; `right` has the directions as rows."""

    left: Float[Tensor, "*experts out k"]
    values: Float[Tensor, "*experts k"]
    right: Float[Tensor, "*experts k in"]


def singular(delta: Delta, weight: Weight = None) -> Singular:
    """The singular value decomposition; low-rank deltas use thin QR and have as many values as stored terms."""
    if not delta.is_thin:
        return Singular(*torch.linalg.svd(dense(delta, weight), full_matrices=False))
    left, left_triangle = torch.linalg.qr(delta.left.double())
    right, right_triangle = torch.linalg.qr(delta.right.double().mT)
    inner_left, values, inner_right = torch.linalg.svd(left_triangle @ right_triangle.mT, full_matrices=False)
    return Singular(left @ inner_left, values, inner_right @ right.mT)


def cosine(inner: float, first_norm: float, second_norm: float) -> float:
    """Cosine from an inner product and two norms; NaN if a norm is zero."""
    return inner / (first_norm * second_norm) if first_norm > 0 and second_norm > 0 else math.nan


def dense(delta: Delta, weight: Weight = None) -> Float[Tensor, "*experts out in"]:
    """The whole update in fp64."""
    thin = delta.left.double() @ delta.right.double()
    rest = _without_thin(delta, weight)
    return thin if rest is None else thin + rest


def _without_thin(delta: Delta, weight: Weight) -> Float[Tensor, "*experts out in"] | None:
    """The dense part plus the functions of the base weight, in fp64; None if there is neither."""
    total = None if delta.dense is None else delta.dense.double()
    for term in delta.base_terms:
        part = term.of(delta.base_weight(weight).double())
        total = part if total is None else total + part
    return total


def _core(delta: Delta) -> Float[Tensor, "*experts m n"]:
    """A small matrix with the singular values of `left @ right`."""
    _, left_triangle = torch.linalg.qr(delta.left.double(), mode="r")
    _, right_triangle = torch.linalg.qr(delta.right.double().mT, mode="r")
    return left_triangle @ right_triangle.mT


def _thin_inner(first: Delta, second: Delta) -> Tensor:
    left = first.left.double().mT @ second.left.double()
    right = first.right.double() @ second.right.double().mT
    return (left * right).sum()


def _thin_dense_inner(thin: Delta, other: Float[Tensor, "*experts out in"]) -> Tensor:
    return ((thin.left.double().mT @ other) * thin.right.double()).sum()
