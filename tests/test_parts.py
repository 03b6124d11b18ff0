"""Parts of a delta: pieces that add up to it, against dense fp64 oracles."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from making import gaussian, relative_error, thin
from ws.algebra import parts, spectrum
from ws.algebra.delta import Delta
from ws.algebra.parts import Split
from ws.algebra.random_like import subspace

ROWS, COLUMNS, BLOCK = 12, 16, 4
WEIGHT = gaussian(ROWS, COLUMNS, seed=1)
ROW, MIX = gaussian(ROWS, seed=2), gaussian(COLUMNS, seed=3)
BLOCKS = gaussian(COLUMNS // BLOCK, BLOCK, BLOCK, seed=4)
SHAPE = (ROWS, COLUMNS)
DELTAS = {
    "low rank": thin(ROWS, COLUMNS, 5, seed=5),
    "dense": Delta.full(gaussian(ROWS, COLUMNS, seed=6)),
    "rows of W": Delta.scaling(SHAPE, row=ROW),
    "columns of W": Delta.scaling(SHAPE, mix=MIX),
    "rotated W": Delta.scaling(SHAPE, mix=BLOCKS),
    "scaled, rotated W and a low rank": Delta.scaling(SHAPE, row=ROW, mix=BLOCKS) + thin(ROWS, COLUMNS, 3, seed=7),
}
BASIS, OTHER = subspace(ROWS, 3, "left"), subspace(COLUMNS, 4, "right")


def dense(delta: Delta) -> torch.Tensor:
    return spectrum.dense(delta, WEIGHT)


def projected(delta: Delta) -> Split:
    return parts.project(delta, BASIS, WEIGHT)


def cropped(delta: Delta) -> Split:
    return parts.crop(delta, BASIS, OTHER, WEIGHT)


def first_directions(delta: Delta) -> Split:
    found = spectrum.singular(delta, WEIGHT)
    return parts.singular_directions(found, torch.arange(len(found.values)) < 2)


def some_rows(delta: Delta) -> Split:
    mask = (torch.arange(ROWS) < 5).float()
    return Split(parts.scale_rows(delta, mask), parts.scale_rows(delta, 1 - mask))


def some_columns(delta: Delta) -> Split:
    mask = (torch.arange(COLUMNS) < 6).float()
    return Split(parts.scale_columns(delta, mask), parts.scale_columns(delta, 1 - mask))


def top_two(whole: torch.Tensor) -> torch.Tensor:
    left, values, right = torch.linalg.svd(whole, full_matrices=False)
    return left[:, :2] * values[:2] @ right[:2]


ORACLES: dict[str, tuple[Callable[[Delta], Split], Callable[[torch.Tensor], torch.Tensor]]] = {
    "projection": (projected, lambda whole: BASIS @ BASIS.mT @ whole),
    "crop": (cropped, lambda whole: BASIS @ BASIS.mT @ whole @ OTHER @ OTHER.mT),
    "singular directions": (first_directions, top_two),
    "rows": (some_rows, lambda whole: whole * (torch.arange(ROWS) < 5)[:, None]),
    "columns": (some_columns, lambda whole: whole * (torch.arange(COLUMNS) < 6)),
}


@pytest.mark.parametrize("name", DELTAS)
@pytest.mark.parametrize("way", ORACLES)
def test_the_piece_is_that_of_the_dense_matrix_and_the_rest_completes_it(way: str, name: str) -> None:
    divide, oracle = ORACLES[way]
    whole, (piece, rest) = dense(DELTAS[name]), divide(DELTAS[name])
    assert relative_error(dense(piece), oracle(whole)) < 1e-6
    assert float((dense(piece) + dense(rest) - whole).norm() / whole.norm()) < 1e-6


@pytest.mark.parametrize("name", DELTAS)
def test_projecting_twice_changes_nothing_and_the_rest_has_no_projection(name: str) -> None:
    piece, rest = projected(DELTAS[name])
    size = float(dense(DELTAS[name]).norm())
    assert relative_error(dense(projected(piece).piece), dense(piece)) < 1e-6
    assert spectrum.norm(projected(rest).piece, WEIGHT) < 1e-6 * size


def test_a_projection_of_low_rank_stays_thin() -> None:
    piece, rest = projected(DELTAS["low rank"])
    assert piece.is_thin and rest.is_thin and (piece.rank, rest.rank) == (3, 5)
    piece, rest = projected(DELTAS["rotated W"])
    assert piece.is_thin and rest.dense is None and rest.needs_weight, "W is not multiplied out"


@pytest.mark.parametrize("name", DELTAS)
def test_the_mismatch_of_pieces_is_their_frobenius_error(name: str) -> None:
    delta, probes = DELTAS[name], torch.randn(COLUMNS, 4000, dtype=torch.float64, generator=torch.Generator())
    piece, rest = projected(delta)
    assert parts.mismatch([piece, rest], delta, WEIGHT, probes) < 1e-10 * parts.mismatch([], delta, WEIGHT, probes)
    missing = parts.mismatch([piece], delta, WEIGHT, probes) / probes.shape[1]
    assert missing == pytest.approx(spectrum.norm(rest, WEIGHT) ** 2, rel=0.1)


def test_a_random_subspace_is_orthonormal_and_has_its_share_of_any_matrix() -> None:
    whole = dense(DELTAS["low rank"])
    shares = []
    for number in range(200):
        basis = subspace(ROWS, 3, f"draw {number}")
        assert torch.allclose(basis.mT @ basis, torch.eye(3, dtype=torch.float64), atol=1e-12)
        shares.append(float((basis.mT @ whole).square().sum() / whole.square().sum()))
    found = torch.tensor(shares)
    assert abs(float(found.mean()) - 3 / ROWS) < 3 * float(found.std()) / len(shares) ** 0.5
