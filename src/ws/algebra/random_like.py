"""Random directions that are like a given one, parameter by parameter, and random subspaces.

A random direction has, parameter by parameter, the shape and the singular values of the trained one, in random bases.
So norm, rank and effective rank are equal, and none of them can explain a difference. Equal rank alone is not enough:
the product of two Gaussian factors has a flat spectrum, while most of a trained update is in its first few singular
directions. In random bases the mean of |dW x|^2 is |dW|^2 |x|^2 / columns for any spectrum, so a matched control does
not disturb more on average (on pocket, mean KL 0.202 against 0.199 nats of a flat one, 24 draws each of a spectrum with
one dominant value). Only its draws differ more (standard deviation 0.046 against 0.036).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from ws.algebra import spectrum
from ws.algebra.delta import Delta
from ws.algebra.direction import Direction
from ws.base import keyed_random

VERSION = 2
"""Raise it when random directions are drawn in another way, so that scores of earlier ones are not reused."""
ROUNDING = 1e-6
"""A singular value below this share of the largest one is the rounding of fp32 numbers, and counts as zero."""


def spectrum_like(direction: Direction, seed: int) -> Direction:
    """A random direction with the singular values of every delta; a function of (names, shapes, singular values, seed).

        dW_random = U diag(s) V'        s: singular values of dW;  U (out x k), V (in x k): Haar, columns orthonormal

    Each expert of a stack has its own bases and its own values. `k` leaves out values that are only rounding. A thin
    delta stays thin; another one becomes thin if this needs no more numbers. Deltas that are functions of the base
    weights need a bound direction; an unbound one is a UserError.
    """
    return draws_like(direction)(seed)


def draws_like(direction: Direction) -> Callable[[int], Direction]:
    """`spectrum_like` as a function of the seed; the singular values are computed once."""
    spectra = _spectra(direction)
    return lambda seed: _drawn(direction, spectra, seed)


def subspace(width: int, count: int, key: str) -> Float[Tensor, "width count"]:
    """A Haar-distributed random subspace as orthonormal columns, fp64; a function of the key."""
    gaussian = torch.randn(width, count, generator=keyed_random.generator(key))
    return _orthonormal(gaussian.double())


def _spectra(direction: Direction) -> dict[str, Float[Tensor, "*experts k"]]:
    """Singular values of every delta in descending order, fp64, without those that are only rounding."""
    spectra = {}
    for name, delta in direction.deltas.items():
        factored = spectrum.truncate(delta, min(delta.shape[-2:]), direction.weights.get(name)).delta
        values = factored.left.double().square().sum(-2)  # each factor carries the square roots of the values
        counted = (values > ROUNDING * values[..., :1]).sum(-1)
        spectra[name] = values[..., : int(counted.max())]
    return spectra


def _drawn(direction: Direction, spectra: Mapping[str, Tensor], seed: int) -> Direction:
    deltas = {}
    for name, delta in direction.deltas.items():
        values, generator = spectra[name], keyed_random.generator(f"{seed}|{name}")
        *experts, rows, columns = delta.shape
        rank = values.shape[-1]
        left, right = (
            _orthonormal(torch.randn(*experts, size, rank, generator=generator).to(values)) for size in (rows, columns)
        )
        left = left * values[..., None, :]
        is_thin = delta.is_thin or rank * (rows + columns) <= rows * columns
        deltas[name] = Delta.low_rank(left, right.mT) if is_thin else Delta.full(left @ right.mT)
    provenance = {"control": "random", "matched": "spectrum", "seed": seed, "like": dict(direction.provenance)}
    return Direction(deltas, direction.base, direction.layers, provenance)


def _orthonormal(gaussian: Float[Tensor, "*experts n k"]) -> Float[Tensor, "*experts n k"]:
    """Haar-distributed orthonormal columns: the Q of a QR in which R has a positive diagonal.

    Without a rule for the signs, they would depend on the algorithm, and Q would not be uniform (Mezzadri,
    math-ph/0609050).
    """
    orthogonal, triangle = torch.linalg.qr(gaussian)
    return orthogonal * triangle.diagonal(dim1=-2, dim2=-1).sign()[..., None, :]
