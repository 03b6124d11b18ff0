"""Norms, inner products and spectra of deltas, against torch on the dense fp64 matrix."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import combinations_with_replacement

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from making import dense, gaussian, in_fp64, thin
from ws.algebra import spectrum
from ws.algebra.delta import Delta

TOLERANCE = 1e-6
PROPERTY = settings(deadline=None, max_examples=40, derandomize=True)
SHAPES = {"tall": (40, 12), "wide": (12, 40), "square": (24, 24), "row": (1, 20), "column": (20, 1)}
KINDS: dict[str, Callable[[tuple[int, int], int], Delta]] = {
    "thin": lambda shape, seed: thin(*shape, rank=3, seed=seed),
    "more terms than the rank": lambda shape, seed: thin(*shape, rank=50, seed=seed),
    "dense": lambda shape, seed: dense(*shape, seed=seed),
    "thin and dense": lambda shape, seed: thin(*shape, rank=2, seed=seed) + dense(*shape, seed=seed + 50),
    "rank 0": lambda shape, seed: Delta.zero(shape),
}


def frobenius(delta: Delta) -> float:
    return float(in_fp64(delta).norm())


# -------------------------------------------------------------------- against the oracle


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("first", "second"), list(combinations_with_replacement(KINDS, 2)))
def test_inner_product_is_that_of_the_dense_matrices(first: str, second: str, shape: str) -> None:
    a, b = KINDS[first](SHAPES[shape], 1), KINDS[second](SHAPES[shape], 2)
    b = b + 0.3 * a  # not merely noise around zero
    expected = float((in_fp64(a) * in_fp64(b)).sum())
    for value in (spectrum.inner_product(a, b), spectrum.inner_product(b, a)):
        assert value == pytest.approx(expected, rel=1e-9, abs=1e-12 * frobenius(a) * frobenius(b))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_norm_is_that_of_the_dense_matrix(kind: str, shape: str) -> None:
    delta = KINDS[kind](SHAPES[shape], 3)
    assert spectrum.norm(delta) == pytest.approx(frobenius(delta), rel=TOLERANCE)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "rank 0"])
def test_cosine_is_that_of_the_dense_matrices(kind: str) -> None:
    a, b = KINDS[kind]((12, 40), 6), KINDS[kind]((12, 40), 7)
    b = b - 0.5 * a
    expected = torch.nn.functional.cosine_similarity(in_fp64(a).flatten(), in_fp64(b).flatten(), dim=0)
    value = spectrum.cosine(spectrum.inner_product(a, b), spectrum.norm(a), spectrum.norm(b))
    assert value == pytest.approx(float(expected), abs=TOLERANCE)
    with_itself = spectrum.cosine(spectrum.inner_product(a, -a), spectrum.norm(a), spectrum.norm(-a))
    assert with_itself == pytest.approx(-1.0, abs=TOLERANCE)


@pytest.mark.parametrize(("first", "second"), [(0.0, 1.0), (1.0, 0.0), (0.0, 0.0)])
def test_cosine_with_nothing_is_nan(first: float, second: float) -> None:
    assert math.isnan(spectrum.cosine(0.0, first, second))


# -------------------------------------------------------------------- effective rank


# -------------------------------------------------------------------- identities


@PROPERTY
@given(
    st.sampled_from(list(KINDS)),
    st.sampled_from(list(KINDS)),
    st.sampled_from(list(SHAPES)),
    st.integers(0, 2**20),
    st.sampled_from([1e-3, 1.0, 1e3]),
)
def test_law_of_cosines(first: str, second: str, shape: str, seed: int, scale: float) -> None:
    a, b = KINDS[first](SHAPES[shape], seed), KINDS[second](SHAPES[shape], seed + 1) * scale
    a2, b2 = spectrum.norm(a) ** 2, spectrum.norm(b) ** 2
    expected = a2 - 2 * spectrum.inner_product(a, b) + b2
    assert spectrum.norm(a - b) ** 2 == pytest.approx(expected, rel=1e-5, abs=TOLERANCE * (a2 + b2))


@PROPERTY
@given(st.sampled_from(list(KINDS)), st.sampled_from(list(SHAPES)), st.integers(0, 2**20))
def test_inner_product_with_itself_is_the_squared_norm(kind: str, shape: str, seed: int) -> None:
    a = KINDS[kind](SHAPES[shape], seed)
    assert spectrum.inner_product(a, a) == pytest.approx(spectrum.norm(a) ** 2, rel=TOLERANCE)


@pytest.mark.parametrize("kind", KINDS)
def test_transposing_changes_no_norm(kind: str) -> None:
    a = KINDS[kind]((12, 40), 9)
    assert spectrum.norm(a.T) == pytest.approx(spectrum.norm(a), rel=TOLERANCE)


# -------------------------------------------------------------------- cancellation


def test_norm_of_a_small_difference_keeps_its_digits() -> None:
    a = thin(48, 64, rank=8, seed=1)
    b = Delta.low_rank(a.left + 1e-3 * gaussian(48, 8, seed=2), a.right + 1e-3 * gaussian(8, 64, seed=3))
    expected = float((in_fp64(a) - in_fp64(b)).norm())
    assert expected < 3e-3 * frobenius(a)
    assert spectrum.norm(a - b) == pytest.approx(expected, rel=TOLERANCE)


def test_norm_of_terms_that_cancel_is_accurate_to_fp64() -> None:
    # a sum, unlike a difference, keeps its large terms: only the decomposition in fp64 saves the digits
    a = thin(48, 64, rank=8, seed=1)
    b = Delta.low_rank(-(a.left + 1e-6 * gaussian(48, 8, seed=2)), a.right)
    assert frobenius(a + b) < 1e-5 * frobenius(a)
    assert spectrum.norm(a + b) == pytest.approx(frobenius(a + b), rel=1e-8)


def test_norm_of_a_thin_part_that_cancels_a_dense_part_is_accurate() -> None:
    a = thin(48, 64, rank=8, seed=1)
    rest = a + Delta.full((-(1 - 1e-5) * in_fp64(a)).float())
    assert frobenius(rest) < 2e-5 * frobenius(a)
    assert spectrum.norm(rest) == pytest.approx(frobenius(rest), rel=TOLERANCE)
