"""Linear algebra of subspaces: d x k matrices with orthonormal columns, fp64, and how they are made and combined."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

SMALL = 1e-6
"""A singular value below this share of the largest one counts as zero."""
Span = Float[Tensor, "d _"]


def top_eigenvectors(gram: Float[Tensor, "d d"], k: int) -> Span:
    """The k leading eigenvectors of a positive semidefinite matrix, fewer if its rank is smaller."""
    values, vectors = torch.linalg.eigh(gram.double())
    wanted = min(k, int((values > SMALL**2 * values[-1].clamp(min=1e-300)).sum()))
    return vectors.flip(1)[:, :wanted]


def last_eigenvectors(gram: Float[Tensor, "d d"], k: int) -> Span:
    """The k eigenvectors of the smallest eigenvalues."""
    return torch.linalg.eigh(gram.double())[1][:, :k]


def left(matrix: Float[Tensor, "d n"], k: int) -> Span:
    """The k leading left singular vectors, from the smaller Gram matrix."""
    return right(matrix.mT, k)


def right(matrix: Float[Tensor, "n d"], k: int) -> Span:
    """The k leading right singular vectors, uncentred."""
    matrix = matrix.double()
    if len(matrix) >= matrix.shape[1]:
        return top_eigenvectors(matrix.mT @ matrix, k)
    _, values, vectors = torch.linalg.svd(matrix, full_matrices=False)
    wanted = min(k, int((values > SMALL * values[0].clamp(min=1e-300)).sum()))
    return vectors[:wanted].mT


def pca(rows: Float[Tensor, "n d"], k: int) -> Span:
    """The k leading principal components: right singular vectors of the centred rows."""
    rows = rows.double()
    return right(rows - rows.mean(dim=0), k)


def unit_rows(rows: Float[Tensor, "n d"], floor: float = 0.0) -> Float[Tensor, "n d"]:
    """Rows divided by their norm plus `floor` times the median norm; rows of zeros stay zeros."""
    norms = rows.double().norm(dim=1, keepdim=True)
    return rows.double() / (norms + floor * norms.median()).clamp(min=1e-300)


def orthonormal(columns: Float[Tensor, "d n"], least: float | None = None) -> Span:
    """An orthonormal basis of the span of the columns, by SVD.

    Directions whose singular value is not above `least` (default: `SMALL` times the largest) are dropped.
    """
    vectors, values, _ = torch.linalg.svd(columns.double(), full_matrices=False)
    if least is None:
        least = SMALL * float(values.amax()) if values.numel() else 0.0
    return vectors[:, values > least]


def project_away(basis: Span, from_: Span) -> Span:
    """`orth((I - F F') B)`; directions of B that lie in F are dropped."""
    return orthonormal(basis.double() - from_.double() @ (from_.double().mT @ basis.double()), least=SMALL)


def left_away(matrix: Float[Tensor, "d n"], from_: Span, k: int) -> Span:
    """The k leading left singular vectors of `(I - F F') M`."""
    return left(matrix - from_ @ (from_.mT @ matrix), k)


def union(*spans: Span) -> Span:
    """The sum of the subspaces."""
    return orthonormal(torch.cat([one.double() for one in spans], dim=1))


def bisector(first: Span, second: Span, k: int, least: float = 0.0) -> Span:
    """The k directions between the closest pairs of two subspaces: `A u_i + B v_i` with A'B = U S V'.

    Pairs whose cosine is below `least` are left out, so the result may be empty. It is not a set intersection.
    """
    u, cosines, v = torch.linalg.svd(first.double().mT @ second.double(), full_matrices=False)
    kept = int((cosines[:k] >= least).sum())
    middle = first.double() @ u[:, :kept] + second.double() @ v.mT[:, :kept]
    return torch.nn.functional.normalize(middle, dim=0)


def principal_cosines(first: Span, second: Span) -> Float[Tensor, " n"]:
    """Cosines of the principal angles, descending."""
    return torch.linalg.svdvals(first.double().mT @ second.double()).clamp(max=1.0)


def random(d: int, k: int, generator: torch.Generator) -> Span:
    """A uniformly distributed subspace."""
    return torch.linalg.qr(torch.randn(d, k, generator=generator, dtype=torch.float64))[0]
