"""Delta: exact arithmetic on factored updates, against a dense fp64 oracle."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from making import dense, gaussian, in_fp64, relative_error, term_scale, thin
from ws.algebra.delta import Delta
from ws.base.errors import UserError

ROUNDING = 1e-6
"""Largest error in units of the stored terms: a few roundings of fp32."""

PROPERTY = settings(deadline=None, max_examples=40, derandomize=True)
SHAPES = st.tuples(st.integers(1, 9), st.integers(1, 9))
SCALES = st.sampled_from([1e-4, 1.0, 1e3])


@st.composite
def deltas(draw: st.DrawFn, shape: tuple[int, int]) -> Delta:
    """Thin, dense, both, or nothing, at any scale."""
    rank, seed = draw(st.integers(0, 5)), draw(st.integers(0, 2**20))
    delta = thin(*shape, rank=rank, seed=seed, scale=draw(SCALES)) if rank else Delta.zero(shape)
    return delta + dense(*shape, seed=seed + 7, scale=draw(SCALES)) if draw(st.booleans()) else delta


@st.composite
def equal_shapes(draw: st.DrawFn, count: int) -> list[Delta]:
    """Some deltas of one common shape."""
    shape = draw(SHAPES)
    return [draw(deltas(shape)) for _ in range(count)]


def assert_means(delta: Delta, reference: Tensor, scale: float) -> None:
    """`delta` is `reference` up to fp32 rounding of terms of size `scale`."""
    assert tuple(delta.shape) == tuple(reference.shape)
    assert float((delta.materialise().double() - reference).norm()) <= ROUNDING * scale
    assert float((in_fp64(delta) - reference).norm()) <= ROUNDING * scale


KINDS: dict[str, Callable[[int], Delta]] = {
    "thin": lambda seed: thin(6, 9, rank=3, seed=seed),
    "other rank": lambda seed: thin(6, 9, rank=5, seed=seed),
    "dense": lambda seed: dense(6, 9, seed=seed),
    "thin and dense": lambda seed: thin(6, 9, rank=2, seed=seed) + dense(6, 9, seed=seed + 50),
    "rank 0": lambda seed: Delta.zero((6, 9)),
}


# -------------------------------------------------------------------- against the oracle


@pytest.mark.parametrize("second", KINDS)
@pytest.mark.parametrize("first", KINDS)
def test_sum_and_difference_are_those_of_the_dense_matrices(first: str, second: str) -> None:
    a, b = KINDS[first](1), KINDS[second](2)
    scale = term_scale(a) + term_scale(b)
    assert_means(a + b, in_fp64(a) + in_fp64(b), scale)
    assert_means(a - b, in_fp64(a) - in_fp64(b), scale)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("factor", [0.0, 1.0, -1.0, 3, 0.125, -1e4])
def test_multiples_are_those_of_the_dense_matrix(kind: str, factor: float) -> None:
    a = KINDS[kind](3)
    scale = abs(factor) * term_scale(a)
    assert_means(a * factor, factor * in_fp64(a), scale)
    assert_means(factor * a, factor * in_fp64(a), scale)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("divisor", [3.0, -7, 1e-3])
def test_quotients_are_those_of_the_dense_matrix(kind: str, divisor: float) -> None:
    a = KINDS[kind](4)
    assert_means(a / divisor, in_fp64(a) / divisor, term_scale(a) / abs(divisor))


@pytest.mark.parametrize("kind", KINDS)
def test_negation_flips_every_sign_exactly(kind: str) -> None:
    a = KINDS[kind](5)
    assert torch.equal((-a).materialise(), -a.materialise())


@pytest.mark.parametrize("kind", KINDS)
def test_transpose_is_that_of_the_dense_matrix_and_undoes_itself(kind: str) -> None:
    a = KINDS[kind](6)
    assert a.T.shape == (9, 6)
    assert torch.equal(in_fp64(a.T), in_fp64(a).T)
    assert torch.equal(in_fp64(a.T.T), in_fp64(a))


@pytest.mark.parametrize("kind", KINDS)
def test_properties_describe_what_is_stored(kind: str) -> None:
    a = KINDS[kind](7)
    rank = {"thin": 3, "other rank": 5, "dense": 0, "thin and dense": 2, "rank 0": 0}[kind]
    has_dense = "dense" in kind
    assert (a.shape, a.rank) == ((6, 9), rank)
    assert a.stored_numbers == rank * (6 + 9) + 54 * has_dense
    assert (a.dense is not None) == has_dense
    assert {part.dtype for part in (a.left, a.right, a.materialise())} == {torch.float32}


def test_half_precision_factors_are_kept_as_fp32() -> None:
    left, right = gaussian(4, 2, seed=1).bfloat16(), gaussian(2, 3, seed=2).bfloat16()
    delta = Delta.low_rank(left, right)
    assert torch.equal(delta.left, left.float()) and torch.equal(delta.right, right.float())
    assert torch.equal(Delta.full(left).materialise(), left.float())


@pytest.mark.parametrize("part", ["left", "right", "dense"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_number_that_is_not_finite_is_found_in_every_part(part: str, bad: float) -> None:
    delta = thin(3, 4, rank=2, seed=1) + dense(3, 4, seed=2)
    assert delta.is_finite()
    getattr(delta, part)[0, 1] = bad
    assert not delta.is_finite()


# -------------------------------------------------------------------- apply


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("alpha", [1.0, 0.0, -2.5, 3])
def test_apply_with_one_strength(kind: str, alpha: float) -> None:
    delta, inputs = KINDS[kind](8), gaussian(2, 5, 9, seed=3)
    expected = alpha * inputs.double() @ in_fp64(delta).T
    assert float((delta.apply(inputs, alpha).double() - expected).norm()) <= 1e-6 * (
        abs(alpha) * term_scale(delta) * float(inputs.norm())
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("leading", [(3,), (3, 5), ()], ids=["per row", "per token", "no dimension"])
def test_apply_with_a_tensor_of_strengths(kind: str, leading: tuple[int, ...]) -> None:
    delta, inputs = KINDS[kind](9), gaussian(3, 5, 9, seed=4)
    alpha = gaussian(*leading, seed=5) if leading else torch.tensor(0.7)
    expected = alpha.double().reshape(*leading, *(1,) * (3 - len(leading))) * (inputs.double() @ in_fp64(delta).T)
    applied = delta.apply(inputs, alpha)
    assert applied.shape == (3, 5, 6)
    assert float((applied.double() - expected).norm()) <= 1e-6 * term_scale(delta) * float(inputs.norm()) * float(
        alpha.abs().max()
    )


def test_apply_of_a_single_vector() -> None:
    delta, vector = thin(6, 9, rank=3, seed=1), gaussian(9, seed=2)
    assert relative_error(delta.apply(vector, 2.0), 2.0 * (in_fp64(delta) @ vector.double())) < ROUNDING


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs_are_multiplied_in_fp32(dtype: torch.dtype) -> None:
    delta, inputs = thin(6, 9, rank=3, seed=1) + dense(6, 9, seed=2), gaussian(4, 9, seed=3).to(dtype)
    applied = delta.apply(inputs)
    assert applied.dtype == torch.float32
    assert relative_error(applied, inputs.double() @ in_fp64(delta).T) < ROUNDING


@pytest.mark.parametrize("shape", [(4,), (1,), (3, 4), (5, 3)])
def test_strengths_that_do_not_match_the_batch_are_an_error(shape: tuple[int, ...]) -> None:
    with pytest.raises(UserError, match="alpha of shape"):
        thin(6, 9, rank=3, seed=1).apply(torch.ones(3, 5, 9), torch.ones(shape))


# -------------------------------------------------------------------- properties


@PROPERTY
@given(equal_shapes(2))
def test_difference_is_antisymmetric(pair: list[Delta]) -> None:
    a, b = pair
    scale = term_scale(a) + term_scale(b)
    assert float((in_fp64(a - b) + in_fp64(b - a)).norm()) <= ROUNDING * scale


@PROPERTY
@given(equal_shapes(1))
def test_a_minus_itself_is_exactly_zero(single: list[Delta]) -> None:
    (a,) = single
    nothing = a - a
    assert torch.count_nonzero(nothing.materialise()) == 0
    assert torch.count_nonzero(nothing.apply(torch.ones(2, a.shape[1]))) == 0


@PROPERTY
@given(equal_shapes(2), st.integers(0, 2**20))
def test_a_plus_b_minus_b_is_a(pair: list[Delta], seed: int) -> None:
    a, b = pair
    assert_means(a + b - b, in_fp64(a), term_scale(a) + 2 * term_scale(b))


@PROPERTY
@given(equal_shapes(3))
def test_sums_are_associative_and_commutative(three: list[Delta]) -> None:
    a, b, c = three
    scale = sum(map(term_scale, three))
    assert_means((a + b) + c, in_fp64(a + (b + c)), scale)
    assert_means(a + b, in_fp64(b + a), scale)


@PROPERTY
@given(equal_shapes(2), st.floats(-8, 8), st.floats(-8, 8))
def test_multiplication_is_linear(pair: list[Delta], x: float, y: float) -> None:
    a, b = pair
    scale = (abs(x) + abs(y)) * term_scale(a) + abs(x) * term_scale(b)
    assert_means((x + y) * a, in_fp64(x * a) + in_fp64(y * a), scale)
    assert_means(x * (a + b), in_fp64(x * a) + in_fp64(x * b), scale)


@PROPERTY
@given(equal_shapes(1), st.floats(-8, 8), st.floats(-8, 8))
def test_apply_is_linear_in_alpha(single: list[Delta], x: float, y: float) -> None:
    (a,) = single
    inputs = gaussian(3, a.shape[1], seed=1)
    total = a.apply(inputs, x) + a.apply(inputs, y)
    scale = (abs(x) + abs(y)) * term_scale(a) * float(inputs.norm())
    assert float((a.apply(inputs, x + y) - total).norm()) <= ROUNDING * scale


# -------------------------------------------------------------------- cancellation


@pytest.mark.parametrize("side", ["left", "right", "both"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_small_difference_of_large_products_keeps_its_digits(side: str, seed: int) -> None:
    rows, columns, rank, share = 48, 64, 8, 1e-3
    a = thin(rows, columns, rank=rank, seed=seed)
    left = a.left + share * gaussian(rows, rank, seed=seed + 1) * (side != "right")
    right = a.right + share * gaussian(rank, columns, seed=seed + 2) * (side != "left")
    b = Delta.low_rank(left, right)
    oracle = in_fp64(a) - in_fp64(b)
    assert 5e-4 < float(oracle.norm() / in_fp64(a).norm()) < 3e-3

    exact = relative_error((a - b).materialise(), oracle)
    assert exact < ROUNDING

    # the two obvious ways, which are why the class exists
    of_products = relative_error(a.materialise() - b.materialise(), oracle)
    assert of_products > 10 * exact
    weight = gaussian(rows, columns, seed=seed + 3) * (100 * float(in_fp64(a).norm()) / math.sqrt(rows * columns))
    base = weight.bfloat16()
    merged = [(base.float() + delta.materialise()).bfloat16().double() for delta in (a, b)]
    assert relative_error(merged[0] - merged[1], oracle) > 0.1


OPPOSED: dict[str, Callable[[Delta, Delta], Delta]] = {
    "p - n": lambda p, n: p - n,
    "p + -n": lambda p, n: p + -n,
    "-n + p": lambda p, n: -n + p,
    "p + n * -1": lambda p, n: p + n * -1,
    "p + n / -1": lambda p, n: p + n / -1,
    "-(n - p)": lambda p, n: -(n - p),
    "-(-p + n)": lambda p, n: -(-p + n),
    "transposed": lambda p, n: (p.T + (-n).T).T,
    "balanced otherwise": lambda p, n: p + Delta.low_rank(-4 * n.left, n.right / 4),
    "in two halves": lambda p, n: 0.5 * p + -0.5 * n + 0.5 * p - 0.5 * n,
    "of unequal ranks": lambda p, n: p + (Delta.low_rank(gaussian(48, 1, seed=9) * 0, gaussian(1, 64, seed=8)) - n),
}
"""The same difference, written in many ways without rounding on the way."""


@pytest.mark.parametrize("share", [1e-2, 1e-3, 1e-5])
@pytest.mark.parametrize("way", OPPOSED)
def test_however_a_difference_is_written_it_keeps_its_digits(way: str, share: float) -> None:
    p = thin(48, 64, rank=8, seed=1)
    n = Delta.low_rank(p.left + gaussian(48, 8, seed=2, scale=share), p.right + gaussian(8, 64, seed=3, scale=share))
    found, oracle = OPPOSED[way](p, n), in_fp64(p) - in_fp64(n)
    inputs = gaussian(5, 64, seed=4)
    assert relative_error(found.materialise(), oracle) < ROUNDING
    assert relative_error(found.apply(inputs), inputs.double() @ oracle.T) < ROUNDING


@PROPERTY
@given(equal_shapes(2))
def test_adding_the_negative_stores_the_numbers_of_the_difference(pair: list[Delta]) -> None:
    a, b = pair
    for one, other in ((a - b, a + -b), (a + b, a - -b)):
        assert torch.equal(one.left, other.left) and torch.equal(one.right, other.right)
        assert torch.equal(one.materialise(), other.materialise())


def test_merging_in_bf16_and_subtracting_loses_even_an_opposite_pair() -> None:
    # design.md: tau at .3 % of W leaves a cosine of about .89 in bf16
    tau = thin(96, 96, rank=8, seed=1)
    weight = gaussian(96, 96, seed=2)
    tau = tau * (0.003 * float(weight.norm()) / float(in_fp64(tau).norm()))
    other = thin(96, 96, rank=8, seed=3)
    other = other * (0.003 * float(weight.norm()) / float(in_fp64(other).norm()))
    base, oracle = weight.bfloat16(), in_fp64(tau) - in_fp64(other)
    merged = [(base.float() + delta.materialise()).bfloat16().double() for delta in (tau, other)]
    assert relative_error((tau - other).materialise(), oracle) < ROUNDING
    assert relative_error(merged[0] - merged[1], oracle) > 0.1


def test_difference_of_unrelated_products_is_no_worse_than_its_terms() -> None:
    # equal ranks, but nothing shared: the rewritten form would add terms that cancel
    a, b = thin(30, 40, rank=6, seed=1), thin(30, 40, rank=6, seed=2, scale=1e-4)
    for first, second in ((a, b), (b, a)):
        difference = first - second
        assert term_scale(difference) <= 1.001 * (term_scale(a) + term_scale(b))
        assert relative_error(difference.materialise(), in_fp64(first) - in_fp64(second)) < ROUNDING


# -------------------------------------------------------------------- errors


@pytest.mark.parametrize("operate", [lambda a, b: a + b, lambda a, b: a - b], ids=["+", "-"])
@pytest.mark.parametrize("other", [(9, 6), (6, 8), (5, 9)])
def test_deltas_of_different_shapes_cannot_be_combined(
    operate: Callable[[Delta, Delta], Delta], other: tuple[int, int]
) -> None:
    with pytest.raises(UserError, match="different parameters"):
        operate(thin(6, 9, rank=2, seed=1), thin(*other, rank=2, seed=2))


@pytest.mark.parametrize(
    ("left", "right"), [((6, 2), (3, 9)), ((6,), (1, 9)), ((6, 1), (9,)), ((2, 6, 2), (2, 9))], ids=str
)
def test_factors_that_do_not_fit_are_an_error(left: tuple[int, ...], right: tuple[int, ...]) -> None:
    # without the run-time shape checks of the tests, which would speak first
    low_rank = inspect.unwrap(Delta.low_rank.__func__)  # type: ignore[attr-defined]
    with pytest.raises(UserError, match="low-rank delta needs factors"):
        low_rank(Delta, torch.ones(left), torch.ones(right))
