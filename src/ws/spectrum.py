"""Norms, inner products and spectra of deltas, without forming the dense matrix where the form allows.

For thin factors `dW = B A`:  |dW|^2 = tr((B'B)(A A')),  <dW1, dW2> = sum((B1'B2) * (A1 A2')), and with thin QR
decompositions B = Q S, A' = P T the singular values of dW are those of the small matrix S T'.

Numeric trap: the factors of a difference hold large terms that cancel, so all Gram products are formed in fp64.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from ws.delta import Delta


def inner_product(first: Delta, second: Delta) -> float:
    """Frobenius inner product `<first, second>`, fp64."""
    first._require_same_shape(second)
    total = _thin_inner(first.left, first.right, second.left, second.right)
    if second.dense is not None:
        total += _thin_dense_inner(first.left, first.right, second.dense)
    if first.dense is not None:
        total += _thin_dense_inner(second.left, second.right, first.dense)
        if second.dense is not None:
            total += float((first.dense.double() * second.dense.double()).sum())
    return total


def norm(delta: Delta) -> float:
    """Frobenius norm, fp64; through QR of the factors, so that cancelling terms stay accurate."""
    if delta.dense is not None:
        return float(_dense(delta).norm())
    if delta.rank == 0:
        return 0.0
    return float(_core(delta).norm())


def singular_values(delta: Delta) -> Float[Tensor, " k"]:
    """Singular values in descending order, fp64; at most `rank` of them for a thin delta."""
    if delta.dense is not None:
        return torch.linalg.svdvals(_dense(delta))
    if delta.rank == 0:
        return torch.zeros(0, dtype=torch.float64)
    return torch.linalg.svdvals(_core(delta))


def effective_rank(values: Float[Tensor, " k"]) -> float:
    """Participation ratio `(sum s^2)^2 / sum s^4` of singular values: how many directions carry the energy."""
    energy = values.double().square()
    fourth = float(energy.square().sum())
    return float(energy.sum() ** 2) / fourth if fourth > 0 else 0.0


def cosine(inner: float, first_norm: float, second_norm: float) -> float:
    """Cosine from an inner product and two norms; NaN where a norm is zero."""
    return inner / (first_norm * second_norm) if first_norm > 0 and second_norm > 0 else math.nan


def _dense(delta: Delta) -> Float[Tensor, "out in"]:
    """The whole update in fp64, for deltas with a dense part (which may cancel the thin one)."""
    thin = delta.left.double() @ delta.right.double()
    return thin if delta.dense is None else thin + delta.dense.double()


def _core(delta: Delta) -> Float[Tensor, "m n"]:
    """The small matrix with the singular values of the thin product."""
    _, left_triangle = torch.linalg.qr(delta.left.double(), mode="r")
    _, right_triangle = torch.linalg.qr(delta.right.double().T, mode="r")
    return left_triangle @ right_triangle.T


def _thin_inner(
    left: Float[Tensor, "out k"],
    right: Float[Tensor, "k in"],
    other_left: Float[Tensor, "out j"],
    other_right: Float[Tensor, "j in"],
) -> float:
    return float(((left.double().T @ other_left.double()) * (right.double() @ other_right.double().T)).sum())


def _thin_dense_inner(
    left: Float[Tensor, "out k"], right: Float[Tensor, "k in"], dense: Float[Tensor, "out in"]
) -> float:
    return float(((left.double().T @ dense.double()) * right.double()).sum())
