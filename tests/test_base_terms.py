"""Deltas that are functions of the base weight, stacks of experts, projections and truncation: dense fp64 oracles."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from making import dense, gaussian, relative_error, thin
from ws.algebra import spectrum
from ws.algebra.delta import BaseTerm, Delta
from ws.base.errors import UnsupportedFeatureError, UserError

OUT, IN, SIZE = 12, 8, 4
WEIGHT = gaussian(OUT, IN, seed=99)
PROPERTY = settings(deadline=None, max_examples=40, derandomize=True)


def row(seed: int) -> Delta:
    return Delta.scaling((OUT, IN), row=gaussian(OUT, seed=seed))


def column(seed: int) -> Delta:
    return Delta.scaling((OUT, IN), mix=gaussian(IN, seed=seed))


def blocks(seed: int) -> Delta:
    return Delta.scaling((OUT, IN), mix=gaussian(IN // SIZE, SIZE, SIZE, seed=seed))


def both(seed: int) -> Delta:
    return Delta.scaling((OUT, IN), row=gaussian(OUT, seed=seed), mix=gaussian(IN // SIZE, SIZE, SIZE, seed=seed + 5))


KINDS: dict[str, Callable[[int], Delta]] = {
    "row": row,
    "column": column,
    "blocks": blocks,
    "row and blocks": both,
    "row and thin": lambda seed: row(seed) + thin(OUT, IN, rank=2, seed=seed),
    "everything": lambda seed: row(seed) + column(seed) + both(seed) + thin(OUT, IN, rank=2, seed=seed)
    + dense(OUT, IN, seed=seed),
}  # fmt: skip


def oracle(delta: Delta) -> Tensor:
    """The definition, term by term, with full matrices in fp64."""
    total = delta.left.double() @ delta.right.double()
    total = total if delta.dense is None else total + delta.dense.double()
    for term in delta.base_terms:
        left = torch.eye(OUT, dtype=torch.float64) if term.row is None else torch.diag(term.row.double())
        if term.mix is None:
            mix = torch.eye(IN, dtype=torch.float64)
        else:
            wide = term.mix.double()
            mix = torch.block_diag(*wide) if wide.ndim == 3 else torch.diag(wide)
        total = total + left @ WEIGHT.double() @ mix
    return total


@pytest.mark.parametrize("kind", KINDS)
def test_materialise_apply_and_products_are_the_definition(kind: str) -> None:
    delta = KINDS[kind](1)
    wanted = oracle(delta)
    assert delta.needs_weight
    assert relative_error(delta.materialise(WEIGHT), wanted) < 1e-6
    inputs = gaussian(5, 3, IN, seed=3)
    assert relative_error(delta.apply(inputs, -0.5, WEIGHT), -0.5 * inputs.double() @ wanted.T) < 1e-6
    alphas = torch.tensor([1.0, 0.0, -2.0, 0.5, 3.0])
    by_row = delta.apply(inputs, alphas, WEIGHT)
    assert relative_error(by_row, alphas.double()[:, None, None] * (inputs.double() @ wanted.T)) < 1e-6
    left, right = gaussian(OUT, 3, seed=4).double(), gaussian(IN, 2, seed=5).double()
    assert relative_error(delta.left_product(left, WEIGHT), left.T @ wanted) < 1e-12
    assert relative_error(delta.right_product(right, WEIGHT), wanted @ right) < 1e-12


@pytest.mark.parametrize("first", KINDS)
@pytest.mark.parametrize("second", [*KINDS, "thin", "dense"])
def test_inner_products_and_norms_are_those_of_the_dense_matrices(first: str, second: str) -> None:
    a = KINDS[first](1)
    plain = {"thin": thin(OUT, IN, rank=3, seed=2), "dense": dense(OUT, IN, seed=2)}
    b = plain[second] if second in plain else KINDS[second](2)
    wanted = float((oracle(a) * oracle(b)).sum())
    for value in (spectrum.inner_product(a, b, WEIGHT), spectrum.inner_product(b, a, WEIGHT)):
        assert value == pytest.approx(wanted, rel=1e-9, abs=1e-9)
    assert spectrum.norm(a, WEIGHT) == pytest.approx(float(oracle(a).norm()))
    assert spectrum.norm(a, WEIGHT) ** 2 == pytest.approx(spectrum.inner_product(a, a, WEIGHT))


@PROPERTY
@given(st.sampled_from(sorted(KINDS)), st.sampled_from(sorted(KINDS)), st.integers(0, 100))
def test_the_algebra_is_that_of_the_dense_matrices(first: str, second: str, seed: int) -> None:
    a, b = KINDS[first](seed), KINDS[second](seed + 200)
    scale = float(oracle(a).norm() + oracle(b).norm())
    for delta, wanted in (
        (a + b, oracle(a) + oracle(b)),
        (a - b, oracle(a) - oracle(b)),
        (b - a, oracle(b) - oracle(a)),
        (-a, -oracle(a)),
        (0.3 * a, 0.3 * oracle(a)),
        (a / 4, oracle(a) / 4),
        (a - a, torch.zeros(OUT, IN, dtype=torch.float64)),
    ):
        assert float((spectrum.dense(delta, WEIGHT) - wanted).norm()) < 1e-6 * scale


def test_sums_of_one_kind_stay_one_term() -> None:
    for make in (row, column, blocks):
        total = make(1) + make(2) - make(3)
        assert len(total.base_terms) == 1 and total.stored_numbers == make(1).stored_numbers
    assert len((row(1) + column(1) + row(2) + both(1) + both(2)).base_terms) == 4


@pytest.mark.parametrize("kind", KINDS)
def test_a_small_difference_of_large_terms_keeps_its_digits_either_way(kind: str) -> None:
    p, change = KINDS[kind](1), KINDS[kind](2)
    moved = [
        BaseTerm(*(None if a is None or b is None else a + 1e-4 * b for a, b in ((t.row, u.row), (t.mix, u.mix))))
        for t, u in zip(p.base_terms, change.base_terms, strict=True)
    ]
    n = Delta(p.left + 1e-4 * change.left, p.right, p.dense, tuple(moved))
    wanted = oracle(p) - oracle(n)
    assert float(wanted.norm()) < 1e-3 * float(oracle(p).norm())
    for found in (p - n, p + -n, -n + p, -(n + -p)):
        assert relative_error(found.materialise(WEIGHT), wanted) < 1e-6


def test_adding_never_densifies() -> None:
    total = KINDS["row and thin"](1) + both(2) - thin(OUT, IN, rank=1, seed=3)
    assert total.dense is None and total.rank == 3


def test_piled_up_rank_is_compressed_without_loss() -> None:
    pieces = [thin(OUT, IN, rank=3, seed=seed) for seed in range(8)]
    total, wanted = pieces[0], oracle(pieces[0])
    for piece in pieces[1:]:
        total, wanted = total + piece, wanted + oracle(piece)
        assert total.rank <= min(OUT, IN)
    assert relative_error(spectrum.dense(total), wanted) < 1e-6
    assert relative_error(spectrum.dense(total.T), wanted.T) < 1e-6


@pytest.mark.parametrize("kind", ["row", "column", "row and thin"])
def test_the_transposed_delta_is_that_of_the_transposed_weight(kind: str) -> None:
    delta = KINDS[kind](1)
    turned = delta.T
    assert turned.shape == (IN, OUT)
    assert relative_error(spectrum.dense(turned, WEIGHT.T), oracle(delta).T) < 1e-12


def test_blocks_have_no_transposed_form() -> None:
    with pytest.raises(UnsupportedFeatureError, match="transposed"):
        _ = blocks(1).T


@pytest.mark.parametrize("kind", [*KINDS, "thin"])
@pytest.mark.parametrize("rank", [1, 3, 8, 20])
def test_truncation_is_the_best_approximation_and_tells_what_it_keeps(kind: str, rank: int) -> None:
    delta = thin(OUT, IN, rank=5, seed=1) if kind == "thin" else KINDS[kind](1)
    wanted = oracle(delta)
    u, s, v = torch.linalg.svd(wanted, full_matrices=False)
    best = u[:, :rank] @ torch.diag(s[:rank]) @ v[:rank]
    cut, energy = spectrum.truncate(delta, rank, WEIGHT)
    assert cut.is_thin and cut.rank <= rank
    assert float((spectrum.dense(cut) - best).norm()) < 1e-6 * float(wanted.norm())
    assert energy == pytest.approx(float(s[:rank].square().sum() / s.square().sum()))


def test_truncation_of_nothing_is_nothing() -> None:
    assert spectrum.truncate(Delta.zero((3, 4)), 2).energy == 1.0
    with pytest.raises(UserError, match="the rank is 0"):
        spectrum.truncate(row(1), 0, WEIGHT)


# -------------------------------------------------------------------- what is refused


@pytest.mark.parametrize("use", ["materialise", "apply", "norm", "product"])
def test_without_the_weight_it_says_to_bind(use: str) -> None:
    delta = row(1)
    calls: dict[str, Callable[[], object]] = {
        "materialise": delta.materialise,
        "apply": lambda: delta.apply(torch.ones(1, IN)),
        "norm": lambda: spectrum.norm(delta),
        "product": lambda: delta.left_product(torch.ones(OUT, 1)),
    }
    with pytest.raises(UserError, match="Bind the direction"):
        calls[use]()


def test_a_weight_of_another_shape_is_refused() -> None:
    with pytest.raises(UserError, match="does not fit"):
        row(1).materialise(torch.ones(OUT, IN + 1))


@pytest.mark.parametrize(
    "parts",
    [
        {"row": torch.ones(OUT + 1)},
        {"mix": torch.ones(IN - 1)},
        {"mix": torch.ones(3, SIZE, SIZE)},
        {"mix": torch.ones(2, 2)},
        {},
    ],
)
def test_factors_that_do_not_fit_are_refused(parts: dict[str, Tensor]) -> None:
    with pytest.raises(UserError):
        term = BaseTerm(parts.get("row"), parts.get("mix"))
        term.require_shape((OUT, IN))


# -------------------------------------------------------------------- experts


def test_stacks_of_experts_carry_a_leading_axis() -> None:
    a = Delta.low_rank(gaussian(3, OUT, 2, seed=1), gaussian(3, 2, IN, seed=2))
    b = Delta.full(gaussian(3, OUT, IN, seed=3))
    wide = [d.left.double() @ d.right.double() + (0 if d.dense is None else d.dense.double()) for d in (a, b)]
    total = 2 * a - b / 2
    assert total.shape == (3, OUT, IN)
    assert relative_error(total.materialise(), 2 * wide[0] - wide[1] / 2) < 1e-6
    assert spectrum.norm(total) == pytest.approx(float((2 * wide[0] - wide[1] / 2).norm()))
    assert spectrum.inner_product(a, b) == pytest.approx(float((wide[0] * wide[1]).sum()))
    assert spectrum.norm(a) == pytest.approx(float(wide[0].norm()))
    assert float(spectrum.dense(a - a).norm()) == 0
    piled = a
    for _ in range(6):
        piled = piled + a
    assert piled.rank <= min(OUT, IN) and relative_error(piled.materialise(), 7 * wide[0]) < 1e-6
