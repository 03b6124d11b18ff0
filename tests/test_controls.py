"""Controls: random directions with the shapes and spectra of a direction, and directions that nobody trained."""

from __future__ import annotations

import copy
import itertools
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import families
from making import dense, gaussian, in_fp64, random_direction, thin
from ws.adapters import diff
from ws.algebra import spectrum
from ws.algebra.delta import Delta
from ws.algebra.direction import Direction
from ws.algebra.random_like import spectrum_like
from ws.base.errors import UserError
from ws.baselines import repe, synthetic
from ws.baselines.controls import (
    RANDOM,
    control_strengths,
    permuted_edits,
    permuted_layers,
    possible_orders,
    random_edits,
)
from ws.baselines.repe import RepeSettings
from ws.fitting import behaviour
from ws.model import architecture
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
    control = spectrum_like(direction, 3)
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
    control = spectrum_like(direction, 0).deltas["x.weight"]
    assert numerical_rank(control) == numerical_rank(delta) == rank
    assert spectrum.norm(control) == pytest.approx(spectrum.norm(delta), rel=TOLERANCE)


def test_the_rank_counts_a_dense_part_beside_a_thin_one() -> None:
    delta = thin(6, 9, rank=2, seed=1) + dense(6, 9, seed=2)
    control = spectrum_like(Direction({"x.weight": delta}, "base"), 0).deltas["x.weight"]
    assert numerical_rank(control) == numerical_rank(delta)


@pytest.mark.parametrize(
    "delta",
    [
        thin(40, 50, rank=8, seed=1) * 3.0,
        Delta.low_rank(gaussian(40, 8, seed=2) * torch.logspace(0, -4, 8), gaussian(8, 50, seed=3)),
        dense(40, 50, seed=4),
        thin(40, 50, rank=2, seed=5) + dense(40, 50, seed=6, scale=0.01),
        Delta.low_rank(
            gaussian(3, 40, 8, seed=7) * torch.tensor([1.0, 20.0, 0.0])[:, None, None], gaussian(3, 8, 50, seed=8)
        ),
        Delta.full(gaussian(3, 20, 30, seed=9)),
    ],
    ids=["thin", "steep", "dense", "thin and dense", "experts", "dense experts"],
)
def test_singular_values_are_those_of_the_delta_and_its_bases_are_not(delta: Delta) -> None:
    control = spectrum_like(Direction({"x.weight": delta}, "base"), 0).deltas["x.weight"]
    (left, values, right), found = torch.linalg.svd(in_fp64(delta), full_matrices=False), in_fp64(control)
    torch.testing.assert_close(torch.linalg.svdvals(found), values, rtol=1e-6, atol=1e-6 * float(values.max()))
    kept = (left.mT @ found @ right.mT).diagonal(dim1=-2, dim2=-1)
    assert float(kept.norm()) < 0.5 * float(values.norm())
    if found.ndim == 3:
        assert abs(float((found[0] * found[1]).sum())) < 0.2 * float(found[0].norm() * found[1].norm())


@pytest.mark.parametrize(("rank", "is_thin"), [(2, True), (40, False)])
def test_a_dense_delta_of_low_rank_gets_a_thin_control(rank: int, is_thin: bool) -> None:
    delta = Delta.full(thin(40, 50, rank=rank, seed=1).materialise())
    control = spectrum_like(Direction({"x.weight": delta}, "base"), 0).deltas["x.weight"]
    assert control.is_thin is is_thin and (control.rank == 2) is is_thin


def test_the_bases_are_uniform() -> None:
    # without a rule for the signs of QR, the first entry of every basis is negative, and so this one positive
    direction = Direction({"x.weight": thin(4, 3, rank=1, seed=1)}, "base")
    drawn = torch.stack([spectrum_like(direction, seed).materialise("x.weight") for seed in range(600)]).double()
    size = direction.norm() / 12**0.5  # root mean square of an entry: 4 x 3 entries share the squared norm
    assert float(drawn.mean(dim=0).abs().max()) < 4.5 * size / 600**0.5
    torch.testing.assert_close(drawn.square().mean(dim=0).sqrt(), torch.full((4, 3), size).double(), rtol=0.15, atol=0)


@pytest.mark.parametrize("family", ["ia3", "dora", "oft"])
def test_updates_that_depend_on_the_weights_have_controls_once_they_are_bound(
    qwen: ChatModel, tmp_path: Path, family: str
) -> None:
    families.make(copy.deepcopy(qwen.network), family, tmp_path / family, seed=0, size=0.2)
    direction = diff.task_vector(qwen, tmp_path / family)
    control = spectrum_like(direction, 0)
    assert not control.needs_weights and control.norms() == pytest.approx(direction.norms(), rel=1e-5)
    with pytest.raises(UserError, match="bind"):
        spectrum_like(replace(direction, weights={}), 0)


def test_nothing_stays_nothing() -> None:
    direction = Direction({"x.weight": Delta.zero((4, 5)), "y.weight": 0.0 * thin(4, 5, rank=2, seed=1)}, "base")
    control = spectrum_like(direction, 0)
    assert control.norm() == 0.0 and all(delta.is_finite() for delta in control.deltas.values())


def test_a_control_is_a_function_of_its_seed(qwen: ChatModel) -> None:
    direction = random_direction(qwen)
    torch.manual_seed(1)
    first = spectrum_like(direction, 7)
    torch.manual_seed(2)
    assert same(first, spectrum_like(direction, 7))
    seeds = [spectrum_like(direction, seed) for seed in range(4)]
    assert not any(same(a, b) for i, a in enumerate(seeds) for b in seeds[:i])


def test_drawing_a_control_leaves_the_global_random_numbers_alone(qwen: ChatModel) -> None:
    direction = random_direction(qwen)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    spectrum_like(direction, 0)
    assert torch.equal(torch.rand(3), expected)


def test_the_numbers_depend_on_names_and_spectra_and_not_on_the_direction(qwen: ChatModel) -> None:
    one = random_direction(qwen, seed=1)
    other = -3.0 * spectrum_like(one, 5)  # the same spectra but for a factor, and other bases
    for name, control in spectrum_like(one, 0).deltas.items():
        twin = spectrum_like(other, 0).deltas[name]
        assert torch.allclose(twin.materialise(), 3.0 * control.materialise(), rtol=1e-4, atol=1e-6)
    only = one.keep(layers=[2])  # a part of the direction gets the same part of the control
    assert same(spectrum_like(only, 0), spectrum_like(one, 0).keep(layers=[2]))


def test_parameters_of_one_shape_get_numbers_of_their_own() -> None:
    delta = thin(20, 30, rank=4, seed=1)
    control = spectrum_like(Direction({"x.weight": delta, "y.weight": delta}, "base"), 0)
    x, y = (control.deltas[name] for name in ("x.weight", "y.weight"))
    assert abs(spectrum.inner_product(x, y)) < 0.2 * spectrum.norm(x) * spectrum.norm(y)


def test_controls_are_nearly_orthogonal_to_the_direction_and_to_each_other(any_model: ChatModel) -> None:
    direction = random_direction(any_model)
    controls = [spectrum_like(direction, seed) for seed in range(6)]
    cosines = [direction.cosine(control) for control in controls]
    cosines += [a.cosine(b) for i, a in enumerate(controls) for b in controls[:i]]
    assert max(map(abs, cosines)) < 0.05
    assert abs(sum(cosines) / len(cosines)) < 0.01


def test_edits_carry_name_and_seed(qwen: ChatModel) -> None:
    direction = random_direction(qwen)
    edits = random_edits(direction, 3)
    assert [(edit.name, edit.seed) for edit in edits] == [(RANDOM, 0), (RANDOM, 1), (RANDOM, 2)]
    for seed, edit in enumerate(edits):
        assert isinstance(edit.effect, Direction) and same(edit.effect, spectrum_like(direction, seed))
        made = {"control": RANDOM, "matched": "spectrum", "seed": seed, "like": dict(direction.provenance)}
        assert edit.effect.provenance == made


@pytest.mark.parametrize(
    ("alphas", "strengths"),
    [
        ((-2.0, -1.0, 0.0, 1.0, 2.0), (1.0,)),
        ((-1, 0, 1), (1.0,)),
        ((-3.0, 3.0), (3.0,)),
        ((3.0, -3.0, 2.0, -0.5, 0.0), (3.0,)),
        ((-2.0, -1.0, 0.0, 2.0, 4.0), (1.0, 4.0)),
        ((0.25, 0.5), (0.5,)),
        ((-0.5, 0.0), (0.5,)),
        ((0.0,), ()),
        ((), ()),
    ],
)
def test_random_directions_stand_at_one_sign_of_the_strengths_that_are_asked_for(
    alphas: tuple[float, ...], strengths: tuple[float, ...]
) -> None:
    assert control_strengths(alphas) == strengths


# -------------------------------------------------------------------- layers in another order


def on_layers(count: int) -> Direction:
    names = [f"model.layers.{layer}.x.weight" for layer in range(count)]
    deltas = {name: thin(3, 4, rank=1, seed=layer) for layer, name in enumerate(names)}
    return Direction(deltas, "base", {name: layer for layer, name in enumerate(names)})


@pytest.mark.parametrize("layers", range(7))
def test_the_possible_orders_are_those_that_counting_finds(layers: int) -> None:
    orders = itertools.permutations(range(layers))
    counted = sum(all(place != index for index, place in enumerate(order)) for order in orders)
    assert possible_orders(on_layers(layers)) == counted


@pytest.mark.parametrize(("layers", "asked", "found"), [(2, 20, 1), (4, 20, 9), (5, 20, 20), (200, 3, 3), (1, 20, 0)])
def test_as_many_orders_are_drawn_as_are_asked_for_and_possible(layers: int, asked: int, found: int) -> None:
    edits = permuted_edits(on_layers(layers), asked)
    assert len(edits) == found == min(asked, possible_orders(on_layers(layers)))
    assert len({edit.effect.content_key for edit in edits}) == found


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


def test_the_readout_writes_what_only_one_sides_words_read(any_model: ChatModel) -> None:
    found = behaviour.load("sycophancy")
    built = synthetic.readout(any_model, found)
    encode = any_model.chat.tokenizer.encode
    positive, negative = (
        {token for text in texts for token in encode(text, add_special_tokens=False)}
        for texts in (found.personas.pos, found.personas.neg)
    )
    rows = any_model.network.get_output_embeddings().weight.detach().double()
    wanted = rows[sorted(positive - negative)].mean(0) - rows[sorted(negative - positive)].mean(0)
    sites = {site.parameter: site for site in architecture.sites(any_model.network, built.layer_numbers)}
    assert set(built.deltas) == {name for name, site in sites.items() if site.writes_residual}
    for name, stored in built.deltas.items():
        delta = stored.T if sites[name].transposed else stored
        weight = any_model.network.get_parameter(name).detach().double()
        weight = weight.T if sites[name].transposed else weight
        assert spectrum.norm(delta) == pytest.approx(synthetic.SIZE * float(weight.norm()), rel=1e-5)
        assert float(torch.cosine_similarity(delta.left[:, 0].double(), wanted, dim=0)) == pytest.approx(1.0, abs=1e-6)
        heard = weight @ delta.right[0].double()  # the first input direction is the one that is heard loudest
        assert float(heard.norm()) == pytest.approx(float(torch.linalg.matrix_norm(weight, 2)), rel=1e-5)


def test_exchanged_personas_turn_the_readout_round(qwen: ChatModel) -> None:
    found = behaviour.load("honesty")
    turned = replace(found, personas=behaviour.Personas(found.personas.neg, found.personas.pos))
    assert synthetic.readout(qwen, found, norm=2.0).norm() == pytest.approx(2.0, rel=TOLERANCE)
    assert same(synthetic.readout(qwen, turned), -synthetic.readout(qwen, found))
    with pytest.raises(UserError, match="has no word"):
        synthetic.readout(qwen, replace(found, personas=behaviour.Personas(("Be kind.",), ("Be kind.",))))


def test_flipping_turns_the_signs_of_the_largest_singular_directions(any_model: ChatModel) -> None:
    flipped = synthetic.flipped(any_model, (0.25, 0.75), 2)
    sites = architecture.sites(any_model.network, flipped.layer_numbers)
    assert list(flipped.deltas) == [site.parameter for site in sites]
    for name, delta in flipped.deltas.items():
        weight = any_model.network.get_parameter(name).detach().double()
        left, values, right = torch.linalg.svd(weight, full_matrices=False)
        values[:2] *= -1
        torch.testing.assert_close(weight + in_fp64(delta), left * values @ right, rtol=0, atol=1e-5)
        assert delta.rank == 2
    scaled = synthetic.flipped(any_model, (0.25, 0.75), 2, norm=0.5)
    assert scaled.norm() == pytest.approx(0.5, rel=TOLERANCE) and scaled.cosine(flipped) == pytest.approx(1.0)
    assert scaled.provenance["made_from"] == ["base weights"]
    with pytest.raises(UserError, match="0 singular directions"):
        synthetic.flipped(any_model, count=0)


def test_no_synthetic_direction_depends_on_the_signs_of_a_decomposition(
    qwen: ChatModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def built() -> list[Direction]:
        return [synthetic.readout(qwen, behaviour.load("honesty")), synthetic.flipped(qwen, count=2)]

    svd, before = torch.linalg.svd, built()

    def turned(matrix: torch.Tensor, full_matrices: bool) -> SimpleNamespace:
        left, values, right = svd(matrix, full_matrices=full_matrices)
        return SimpleNamespace(U=-left, S=values, Vh=-right)

    monkeypatch.setattr(torch.linalg, "svd", turned)
    assert all(same(one, other) for one, other in zip(before, built(), strict=True))


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
