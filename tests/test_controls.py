"""Controls: random directions with the shapes, norms and ranks of a direction, and directions that nobody trained."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import families
from making import dense, in_fp64, random_direction, thin
from ws.adapters import diff
from ws.algebra import spectrum
from ws.algebra.delta import Delta
from ws.algebra.direction import Direction
from ws.baselines import repe, synthetic
from ws.baselines.controls import RANDOM, control_strengths, permuted_layers, random_edits, random_like
from ws.baselines.repe import RepeSettings
from ws.fitting import behaviour
from ws.model.loading import ChatModel

TOLERANCE = 1e-6


def numerical_rank(delta: Delta) -> int:
    return int(torch.linalg.matrix_rank(in_fp64(delta), rtol=1e-6))


def stored(direction: Direction) -> dict[str, torch.Tensor]:
    return {name: delta.materialise() for name, delta in direction.deltas.items()}


def same(first: Direction, second: Direction) -> bool:
    a, b = stored(first), stored(second)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_parameters_shapes_norms_and_ranks_are_those_of_the_direction(any_model: ChatModel) -> None:
    direction = random_direction(any_model, rank=5) - random_direction(any_model, rank=5, seed=1)
    control = random_like(direction, 3)
    assert list(control.deltas) == list(direction.deltas)
    assert (control.base, control.layers) == (direction.base, direction.layers)
    assert control.norms() == pytest.approx(direction.norms(), rel=TOLERANCE)
    assert control.norm() == pytest.approx(direction.norm(), rel=TOLERANCE)
    for name, delta in direction.deltas.items():
        assert control.deltas[name].shape == delta.shape
        assert control.deltas[name].rank == delta.rank == numerical_rank(control.deltas[name]) == 10


@pytest.mark.parametrize(
    ("delta", "rank"),
    [
        (thin(6, 9, rank=2, seed=1), 2),
        (thin(6, 9, rank=20, seed=2), 6),
        (dense(6, 9, seed=3), 6),
        (dense(9, 6, seed=4), 6),
        (thin(1, 9, rank=3, seed=5), 1),
    ],
    ids=["thin", "more terms than the rank", "wide dense", "tall dense", "row"],
)
def test_the_rank_is_the_one_that_the_delta_has(delta: Delta, rank: int) -> None:
    direction = Direction({"x.weight": delta}, "base")
    control = random_like(direction, 0).deltas["x.weight"]
    assert numerical_rank(control) == numerical_rank(delta) == rank
    assert spectrum.norm(control) == pytest.approx(spectrum.norm(delta), rel=TOLERANCE)


def test_the_rank_counts_a_dense_part_beside_a_thin_one() -> None:
    delta = thin(6, 9, rank=2, seed=1) + dense(6, 9, seed=2)
    control = random_like(Direction({"x.weight": delta}, "base"), 0).deltas["x.weight"]
    assert numerical_rank(control) == numerical_rank(delta)


def test_nothing_stays_nothing() -> None:
    direction = Direction({"x.weight": Delta.zero((4, 5)), "y.weight": 0.0 * thin(4, 5, rank=2, seed=1)}, "base")
    control = random_like(direction, 0)
    assert control.norm() == 0.0 and all(delta.is_finite() for delta in control.deltas.values())


def test_a_control_is_a_function_of_its_seed(qwen: ChatModel) -> None:
    direction = random_direction(qwen)
    torch.manual_seed(1)
    first = random_like(direction, 7)
    torch.manual_seed(2)
    assert same(first, random_like(direction, 7))
    seeds = [random_like(direction, seed) for seed in range(4)]
    assert not any(same(a, b) for i, a in enumerate(seeds) for b in seeds[:i])


def test_drawing_a_control_leaves_the_global_random_numbers_alone(qwen: ChatModel) -> None:
    direction = random_direction(qwen)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    random_like(direction, 0)
    assert torch.equal(torch.rand(3), expected)


def test_the_numbers_depend_on_names_and_shapes_and_not_on_the_direction(qwen: ChatModel) -> None:
    one, other = random_direction(qwen, seed=1), random_direction(qwen, seed=2)
    for name, control in random_like(one, 0).deltas.items():
        twin = random_like(other, 0).deltas[name]
        ratio = spectrum.norm(other.deltas[name]) / spectrum.norm(one.deltas[name])
        assert torch.allclose(twin.materialise(), ratio * control.materialise(), rtol=1e-4, atol=1e-7)
    only = one.keep(layers=[2])  # a part of the direction gets the same part of the control
    assert same(random_like(only, 0), random_like(one, 0).keep(layers=[2]))


def test_parameters_of_one_shape_get_numbers_of_their_own() -> None:
    delta = thin(20, 30, rank=4, seed=1)
    control = random_like(Direction({"x.weight": delta, "y.weight": delta}, "base"), 0)
    x, y = (control.deltas[name] for name in ("x.weight", "y.weight"))
    assert abs(spectrum.inner_product(x, y)) < 0.2 * spectrum.norm(x) * spectrum.norm(y)


def test_controls_are_nearly_orthogonal_to_the_direction_and_to_each_other(any_model: ChatModel) -> None:
    direction = random_direction(any_model)
    controls = [random_like(direction, seed) for seed in range(6)]
    cosines = [direction.cosine(control) for control in controls]
    cosines += [a.cosine(b) for i, a in enumerate(controls) for b in controls[:i]]
    assert max(map(abs, cosines)) < 0.05
    assert abs(sum(cosines) / len(cosines)) < 0.01


def test_edits_carry_name_and_seed(qwen: ChatModel) -> None:
    direction = random_direction(qwen)
    edits = random_edits(direction, 3)
    assert [(edit.name, edit.seed) for edit in edits] == [(RANDOM, 0), (RANDOM, 1), (RANDOM, 2)]
    for seed, edit in enumerate(edits):
        assert isinstance(edit.effect, Direction) and same(edit.effect, random_like(direction, seed))
        assert edit.effect.provenance == {"control": RANDOM, "seed": seed, "like": dict(direction.provenance)}


@pytest.mark.parametrize(
    ("alphas", "strengths"),
    [
        ((-2.0, -1.0, 0.0, 1.0, 2.0), (-1.0, 1.0)),
        ((-1, 0, 1), (-1.0, 1.0)),
        ((-3.0, 3.0), (-3.0, 3.0)),
        ((3.0, -3.0, 2.0, -0.5, 0.0), (-3.0, 3.0)),
        ((-2.0, -1.0, 0.0, 2.0, 4.0), (-1.0, 4.0)),
        ((0.25, 0.5), (0.5,)),
        ((-0.5, 0.0), (-0.5,)),
        ((0.0,), ()),
        ((), ()),
    ],
)
def test_random_directions_stand_at_one_strength_of_each_sign_that_is_asked_for(
    alphas: tuple[float, ...], strengths: tuple[float, ...]
) -> None:
    assert control_strengths(alphas) == strengths


# -------------------------------------------------------------------- synthetic directions


@pytest.mark.parametrize("source", synthetic.INPUTS)
def test_synthetic_directions_say_what_they_are_made_of(qwen: ChatModel, source: synthetic.Input) -> None:
    activation = repe.fit(qwen, behaviour.load("sycophancy"), RepeSettings(personas=1))
    built = synthetic.residual_writes(qwen, activation, source)
    assert built.provenance["made_from"] == ["base weights", "personas"]
    assert built.provenance["activation"] == activation.provenance
    assert (built.provenance["relative_size"], built.provenance["scaled_to_norm"]) == (synthetic.SIZE, None)


def test_a_reference_decides_the_norm_of_a_synthetic_direction_and_nothing_else(qwen: ChatModel) -> None:
    activation = repe.fit(qwen, behaviour.load("sycophancy"), RepeSettings(personas=1))
    raw = synthetic.residual_writes(qwen, activation, "first")
    scaled = synthetic.residual_writes(qwen, activation, "first", norm=3.0)
    assert scaled.norm() == pytest.approx(3.0, rel=TOLERANCE) and scaled.cosine(raw) == pytest.approx(1.0, abs=1e-6)
    assert scaled.provenance["scaled_to_norm"] == 3.0
    assert scaled.provenance["relative_size"] == pytest.approx(synthetic.SIZE * 3.0 / raw.norm())


@pytest.mark.parametrize("family", ["ia3", "dora", "lora"])
def test_layers_change_places_with_their_norms_also_where_updates_depend_on_the_weights(
    qwen: ChatModel, tmp_path: Path, family: str
) -> None:
    folder = tmp_path / family
    families.make(copy.deepcopy(qwen.network), family, folder, seed=0, size=0.2)
    direction = diff.task_vector(qwen, folder)
    moved = permuted_layers(direction, 0)
    assert sorted(moved.norms().values()) == pytest.approx(sorted(direction.norms().values()), rel=1e-5)
    own, others = direction.norms_by_layer(), moved.norms_by_layer()
    assert own.keys() == others.keys() and own != pytest.approx(others, rel=1e-3)


def test_the_content_of_a_direction_is_its_numbers_and_their_signs(qwen: ChatModel) -> None:
    direction = random_direction(qwen, rank=2)
    assert direction.content_key == replace(direction, provenance={"other": 1}).content_key
    assert direction.norm() == (-direction).norm() and direction.content_key != (-direction).content_key
