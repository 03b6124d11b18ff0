"""Lenses: parts of real directions of all families, their random twins, and what each lens takes out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cutting import made, material, of_lens
from families import FAMILIES, make
from making import random_direction, relative_error
from ws.adapters import diff
from ws.algebra import spectrum
from ws.algebra.direction import Direction
from ws.base.errors import UserError
from ws.model.loading import ChatModel
from ws.subspace.lenses import LENSES, Material, registry
from ws.subspace.variants import Part, Pieces, Unavailable, mismatch, require_sum, variants


@pytest.fixture(scope="module", params=FAMILIES)
def trained(request: pytest.FixtureRequest, qwen: ChatModel, tmp_path_factory: pytest.TempPathFactory) -> Material:
    """A direction of each family in turn on the tiny Qwen3, with a second family beside it."""
    folder = tmp_path_factory.mktemp(request.param)
    pos, neg = folder / "pos", folder / "neg"
    for seed, side in enumerate((pos, neg)):
        make(qwen.network, request.param, side, seed=seed, size=0.05, drift=0.05)
    direction, _ = diff.direction(qwen, pos, neg)
    return material(qwen, direction, request.param, pos, neg, {"other": random_direction(qwen, seed=9)})


@pytest.fixture
def planted(qwen: ChatModel) -> Material:
    """A random direction on layers 1 and 2 of the tiny Qwen3."""
    return material(qwen, random_direction(qwen), others={"other": random_direction(qwen, seed=9)})


def dense(direction: Direction, name: str) -> torch.Tensor:
    return spectrum.dense(direction.deltas[name], direction.weights.get(name))


def test_keep_plus_drop_is_the_whole_direction(trained: Material) -> None:
    pairs = 0
    for lens in LENSES:
        for part in LENSES[lens].parts(trained):
            try:
                pieces = part.make()
            except Unavailable as reason:
                assert str(reason), f"{lens}, {part.name} does not say why it is missing"
                continue
            if pieces.rest is None:
                continue
            whole, _ = trained.subject.of(part.whole)
            gap = 0.0
            for name in whole.deltas:
                present = [dense(one, name) for one in (pieces.keep, pieces.rest) if name in one.deltas]
                gap += float((sum(present) - dense(whole, name)).square().sum())
            assert gap**0.5 <= 1e-6 * whole.norm(), f"{lens}, {part.name}"
            pairs += 1
    assert pairs >= (20 if trained.family == "ia3" else 30)


def test_every_family_has_native_parts_and_its_number_of_variants_is_known(trained: Material) -> None:
    names = {part.name for part in LENSES["native"].parts(trained)}
    available = set(made("native", trained))
    missing = {"bound (lambda)", "beyond rotation"}  # lambda may not move; a rotation may be exact
    assert len(names) == 2 and names - available <= missing
    for lens in LENSES.values():
        for part in lens.parts(trained):
            found = list(variants(lens.name, part, trained.subject, 2))
            assert len(found) == part.count(2) or all(one.direction is None for one in found)
            assert all((one.direction is None) == bool(one.reason) for one in found)


def test_random_twins_have_the_norm_of_the_part_in_every_parameter(trained: Material) -> None:
    for lens in ("projection", "modules", "layers"):
        for part in LENSES[lens].parts(trained):
            found = list(variants(lens, part, trained.subject, 2))
            if found[0].direction is None:
                continue
            (keep,) = [one.direction for one in found if one.operation == "keep"]
            twins = [one.direction for one in found if one.operation == "random"]
            assert keep is not None and len(twins) == 2
            for twin in twins:
                assert twin is not None
                for name, norm in keep.norms().items():
                    assert twin.norms()[name] == pytest.approx(norm, rel=1e-5, abs=1e-9)
                assert abs(twin.cosine(keep)) < 0.9, "a twin is another direction"


def test_the_matched_part_has_the_norm_of_its_whole_and_only_one_factor(planted: Material) -> None:
    for lens, part, norm in (("projection", "K = 4", planted.subject.writes_norm), ("layers", "layer 1", None)):
        keep, matched = (next(one for one in of_lens(lens, planted, part) if one.operation == operation)
                         for operation in ("keep", "matched"))  # fmt: skip
        assert keep.direction is not None and matched.direction is not None and keep.frobenius is not None
        assert matched.direction.norm() == pytest.approx(norm or planted.subject.norm, rel=1e-6)
        assert matched.direction.cosine(keep.direction) == pytest.approx(1.0)
        assert keep.energy == pytest.approx(keep.frobenius**2)


def test_projections_drop_the_reading_side_only_in_the_complement(planted: Material) -> None:
    by_operation = {one.operation: one.direction for one in of_lens("projection", planted, "K = 2")}
    complement, drop = by_operation["complement"], by_operation["drop"]
    assert complement is not None and drop is not None
    assert set(complement.deltas) == set(planted.subject.writers)
    assert set(drop.deltas) == set(planted.direction.deltas)


def test_heads_are_the_slices_of_the_projections_by_head(planted: Material) -> None:
    config = planted.model.network.config
    size, groups = config.head_dim, config.num_key_value_heads
    per_group = config.num_attention_heads // groups
    found = made("heads", planted)
    assert set(found) == {f"layer {layer}, head {group}" for layer in (1, 2) for group in range(groups)}
    for group in range(groups):
        pieces = found[f"layer 1, head {group}"]
        for name, site in planted.sites.items():
            if site.layer != 1 or not {"q", "k", "v", "o"} & set(site.roles):
                continue
            whole = dense(planted.direction, name)
            wanted = torch.zeros_like(whole)
            for head in range(group * per_group, (group + 1) * per_group):  # query heads of this key-value head
                rows = slice(head * size, (head + 1) * size)
                if site.roles == ("q",):
                    wanted[rows] = whole[rows]
                if site.roles == ("o",):
                    wanted[:, rows] = whole[:, rows]
            if site.roles in (("k",), ("v",)):
                rows = slice(group * size, (group + 1) * size)
                wanted[rows] = whole[rows]
            assert relative_error(dense(pieces.keep, name), wanted) < 1e-6, name


def test_all_heads_of_a_layer_are_its_attention(planted: Material) -> None:
    found = made("heads", planted)
    energy = sum(pieces.keep.norm() ** 2 for pieces in found.values())
    attention = planted.direction.keep(modules=["q_proj", "k_proj", "v_proj", "o_proj"])
    assert energy == pytest.approx(attention.norm() ** 2)


def test_crops_of_own_directions_count_the_effective_rank(planted: Material) -> None:
    found = made("own-svd", planted)
    name = next(iter(planted.direction.deltas))
    rank = planted.direction.deltas[name].rank
    assert rank == 4
    kept = {crop: int(torch.linalg.matrix_rank(dense(pieces.keep, name), rtol=1e-5)) for crop, pieces in found.items()}
    assert kept["top 25 % of indices"] == kept["bottom 25 % of indices"] == 1 and kept["middle 50 % of indices"] == 2
    energy = (found["top 90 % of energy"].keep.norms()[name] / planted.direction.norms()[name]) ** 2
    assert 0.9 <= energy <= 1.0


def test_the_shared_subspace_is_made_without_the_direction_itself(planted: Material, qwen: ChatModel) -> None:
    copied = material(qwen, planted.direction, others={"twin": planted.direction})
    found = made("shared", copied)["K = 32"]  # of a direction of rank 4 per matrix: everything is inside
    assert found.keep.norm() == pytest.approx(copied.subject.writes_norm, rel=1e-5)
    alone = list(LENSES["shared"].parts(material(qwen, planted.direction)))
    with pytest.raises(Unavailable, match="second family"):
        alone[0].make()


def test_families_of_different_norm_have_an_equal_say_in_the_shared_subspace(qwen: ChatModel) -> None:
    first, second = random_direction(qwen, seed=1), random_direction(qwen, seed=2)
    subject = random_direction(qwen, seed=3)
    plain = material(qwen, subject, others={"a": first, "b": second})
    loud = material(qwen, subject, others={"a": first, "b": 100.0 * second})
    for name in plain.subject.writers:
        one, other = (made("shared", source)["K = 8"].keep for source in (plain, loud))
        assert relative_error(dense(one, name), dense(other, name)) < 1e-4


def test_direction_only_has_one_norm_and_the_same_total(planted: Material) -> None:
    keep = made("norm", planted)["direction only"].keep
    assert keep.norm() == pytest.approx(planted.subject.norm)
    assert len({round(norm, 4) for norm in keep.norms().values()}) == 1
    for name in keep.deltas:
        module = [name.removesuffix(".weight")]
        assert keep.keep(modules=module).cosine(planted.direction.keep(modules=module)) == pytest.approx(1)


def test_the_smallest_set_is_the_shortest_that_keeps_enough(planted: Material) -> None:
    """The effect of this material is the sum of the norms, so the largest matrices are the smallest set."""
    (pieces,) = made("smallest", planted).values()
    norms = sorted(planted.direction.norms().values(), reverse=True)
    total, needed = 0.0, 0
    while total < 0.9 * sum(norms):
        total, needed = total + norms[needed], needed + 1
    assert len(pieces.keep.deltas) == needed < len(norms)
    assert f"{needed} of {len(norms)} matrices" in pieces.keep.provenance["remark"]


def test_pieces_that_do_not_add_up_are_refused(planted: Material) -> None:
    pieces = made("projection", planted)["K = 4"]
    assert pieces.rest is not None
    require_sum(pieces.keep, pieces.rest, planted.subject.writes, "fine")
    wrong = pieces.rest * 1.001
    assert mismatch(pieces.keep, wrong, planted.subject.writes) == pytest.approx(1e-3, rel=0.3)
    with pytest.raises(RuntimeError, match="miss the whole"):
        require_sum(pieces.keep, wrong, planted.subject.writes, "wrong")


def test_a_lens_is_one_function_with_a_decorator(planted: Material) -> None:
    @registry.lens("first layer", "What does layer 1 do?")
    def first_layer(source: Material):  # type: ignore[no-untyped-def]
        yield Part("1", lambda: Pieces(source.direction.keep(layers=[1]), source.direction.drop(layers=[1])))

    try:
        found = of_lens("first layer", planted, "1", controls=2)
        assert [one.operation for one in found] == ["keep", "drop", "matched", "random", "random"]
        with pytest.raises(ValueError, match="two lenses"):
            registry.lens("first layer", "again")(first_layer)
    finally:
        del LENSES["first layer"]


def test_unknown_lenses_are_named_and_the_whole_is_always_measured() -> None:
    assert [one.name for one in registry.chosen(["heads"])] == ["whole", "heads"]
    assert {one.name for one in registry.chosen(["all"])} == set(LENSES)
    with pytest.raises(UserError, match="no lens 'layer'"):
        registry.chosen(["layer"])


def test_gpt2_keeps_its_transposed_weights_the_right_way_round(tiny_folders: dict[str, Path]) -> None:
    from ws.model import loading  # noqa: PLC0415

    model = loading.load(str(tiny_folders["gpt2"]))
    source = material(model, random_direction(model))
    width = model.network.config.n_embd
    for pieces in made("projection", source).values():
        assert pieces.rest is not None
        assert mismatch(pieces.keep, pieces.rest, source.subject.writes) < 1e-6
        for name in source.subject.writers:
            assert dense(pieces.keep, name).shape[1] == width, "Conv1D stores in x out, and outputs are projected"
            assert torch.linalg.matrix_rank(dense(pieces.keep, name), rtol=1e-5) <= 4
    with pytest.raises(Unavailable, match="one matrix"):
        next(iter(LENSES["heads"].parts(source))).make()
