"""Direction: arithmetic, selection, geometry and files, against dense fp64 matrices."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from making import assert_one_line, dense, in_fp64, thin
from ws.algebra import direction as direction_module
from ws.algebra.delta import Delta
from ws.algebra.direction import Direction
from ws.base.errors import BaseMismatchError, UserError

SHAPES = {"self_attn.q_proj": (8, 6), "self_attn.o_proj": (6, 8), "mlp.down_proj": (6, 10)}
TOLERANCE = 1e-6


def name_of(layer: int, module: str) -> str:
    return f"model.layers.{layer}.{module}.weight"


def make(
    seed: int, layers: tuple[int, ...] = (1, 2, 3), modules: tuple[str, ...] = tuple(SHAPES), base: str = "base"
) -> Direction:
    """A random direction; `mlp.down_proj` has a dense part, and one parameter lies outside the layers."""
    deltas, of_layer = {}, {}
    for number, (layer, module) in enumerate((layer, module) for layer in layers for module in modules):
        delta = thin(*SHAPES[module], rank=2, seed=100 * seed + number)
        if module == "mlp.down_proj":
            delta = delta + dense(*SHAPES[module], seed=100 * seed + 50 + number)
        deltas[name_of(layer, module)] = delta
        of_layer[name_of(layer, module)] = layer
    deltas["lm_head.weight"] = thin(12, 6, rank=1, seed=100 * seed + 99)
    return Direction(deltas, base, of_layer, {"seed": seed, "text": 'π ≠ "3"', "nested": {"list": [1, None, 0.1]}})


def matrices(direction: Direction) -> dict[str, Tensor]:
    return {name: in_fp64(delta) for name, delta in direction.deltas.items()}


def assert_equals(direction: Direction, expected: dict[str, Tensor]) -> None:
    """Same parameters, and every delta is the expected matrix to fp32 rounding."""
    assert direction.deltas.keys() == expected.keys()
    for name, matrix in expected.items():
        scale = max(1.0, float(matrix.norm()))
        assert float((in_fp64(direction.deltas[name]) - matrix).norm()) <= TOLERANCE * scale, name


def whole_vector(direction: Direction, names: list[str]) -> Tensor:
    """All parameters as one fp64 vector; absent ones are zero."""
    shapes = {name: direction.deltas[name].shape for name in direction.deltas}
    assert shapes.keys() <= set(names)
    return torch.cat([in_fp64(direction.deltas[name]).flatten() for name in names if name in shapes])


# -------------------------------------------------------------------- arithmetic


def test_sum_and_difference_reach_over_the_union_of_the_parameters() -> None:
    a, b = make(1, layers=(1, 2)), make(2, layers=(2, 3), modules=("self_attn.q_proj", "mlp.down_proj"))
    mine, theirs = matrices(a), matrices(b)
    assert mine.keys() - theirs.keys() and theirs.keys() - mine.keys() and theirs.keys() & mine.keys()
    union = {name: torch.zeros_like(mine.get(name, theirs.get(name))) for name in {*mine, *theirs}}
    assert_equals(a + b, {name: mine.get(name, zero) + theirs.get(name, zero) for name, zero in union.items()})
    assert_equals(a - b, {name: mine.get(name, zero) - theirs.get(name, zero) for name, zero in union.items()})
    assert (a - b).layers == {**a.layers, **b.layers}
    assert (a + b).base == (a - b).base == "base"


def test_a_direction_minus_itself_is_exactly_zero() -> None:
    a = make(1)
    assert (a - a).norm() == 0.0
    assert (a - a).deltas.keys() == a.deltas.keys()


@pytest.mark.parametrize("factor", [0.0, 1.0, -2, 0.25])
def test_scaling_scales_every_parameter(factor: float) -> None:
    a = make(3)
    expected = {name: factor * matrix for name, matrix in matrices(a).items()}
    for scaled in (factor * a, a * factor):
        assert_equals(scaled, expected)
        assert scaled.layers == a.layers and scaled.base == a.base
        assert scaled.norm() == pytest.approx(abs(factor) * a.norm(), rel=TOLERANCE)


def test_division_and_negation_are_multiples() -> None:
    a = make(4)
    assert_equals(a / 4, {name: matrix / 4 for name, matrix in matrices(a).items()})
    assert_equals(-a, {name: -matrix for name, matrix in matrices(a).items()})


def test_the_mean_of_two_directions_is_their_half_sum() -> None:
    a, b = make(1), make(2)
    expected = {name: (matrix + matrices(b)[name]) / 2 for name, matrix in matrices(a).items()}
    assert_equals((a + b) / 2, expected)


@pytest.mark.parametrize(
    ("operate", "recorded"),
    [
        (lambda a, b: a + b, {"operation": "+"}),
        (lambda a, b: a - b, {"operation": "-"}),
        (lambda a, _: 3.0 * a, {"scaled": 3.0}),
        (lambda a, _: a / 3.0, {"divided": 3.0}),
        (lambda a, _: a.keep(layers=[1]), {"operation": "keep", "layers": [1], "modules": None}),
        (lambda a, _: a.drop(modules=["o_proj"]), {"operation": "drop", "layers": None, "modules": ["o_proj"]}),
    ],
)
def test_provenance_says_how_a_direction_was_made(
    operate: Callable[[Direction, Direction], Direction], recorded: dict[str, Any]
) -> None:
    a, b = make(1), make(2)
    provenance = operate(a, b).provenance
    assert recorded.items() <= provenance.items()
    sources = [provenance[key]["seed"] for key in ("of", "first", "second") if key in provenance]
    assert sources == ([1, 2] if "first" in provenance else [1])


@pytest.mark.parametrize("operate", [lambda a, b: a + b, lambda a, b: a - b], ids=["+", "-"])
def test_directions_of_different_bases_cannot_be_combined(
    operate: Callable[[Direction, Direction], Direction],
) -> None:
    with pytest.raises(BaseMismatchError) as caught:
        operate(make(1, base="0123abcd"), make(2, base="4567cdef"))
    assert_one_line(caught.value, "0123abcd", "4567cdef")


def test_parameters_of_different_shapes_cannot_be_combined() -> None:
    a = Direction({"x.weight": thin(4, 5, rank=1, seed=1)}, "base")
    b = Direction({"x.weight": thin(5, 4, rank=1, seed=2)}, "base")
    for operate in (Direction.__add__, Direction.__sub__):
        with pytest.raises(UserError, match="shapes"):
            operate(a, b)


# -------------------------------------------------------------------- selection


@pytest.mark.parametrize(
    "chosen",
    [
        {"layers": [2]},
        {"layers": range(1, 3)},
        {"layers": []},
        {"modules": ["q_proj"]},
        {"modules": ("self_attn.o_proj", "down_proj")},
        {"modules": []},
        {"layers": [1, 3], "modules": ["down_proj"]},
        {"layers": [77]},
        {"modules": ["lm_head"]},
        {},
    ],
    ids=lambda value: str(sorted(value)) if isinstance(value, set) else str(value),
)
def test_keep_and_drop_are_disjoint_and_complete(chosen: dict[str, Any]) -> None:
    a = make(5)
    kept, dropped = a.keep(**chosen), a.drop(**chosen)
    assert not kept.deltas.keys() & dropped.deltas.keys()
    assert kept.deltas.keys() | dropped.deltas.keys() == a.deltas.keys()
    for part in (kept, dropped):
        assert all(part.deltas[name] is a.deltas[name] for name in part.deltas)
        assert part.base == a.base
    assert kept.norm() ** 2 + dropped.norm() ** 2 == pytest.approx(a.norm() ** 2, rel=TOLERANCE)
    assert_equals(kept + dropped, matrices(a))


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [
        ({"layers": [2]}, {name_of(2, module) for module in SHAPES}),
        ({"modules": ["o_proj"]}, {name_of(layer, "self_attn.o_proj") for layer in (1, 2, 3)}),
        ({"modules": ["proj"]}, set()),  # an ending of the whole name, not of the text
        ({"modules": ["self_attn"]}, set()),
        ({"modules": ["lm_head"]}, {"lm_head.weight"}),
        ({"layers": [1, 2], "modules": ["mlp.down_proj"]}, {name_of(layer, "mlp.down_proj") for layer in (1, 2)}),
        ({"layers": [1], "modules": ["lm_head"]}, set()),
    ],
    ids=lambda value: str(sorted(value)) if isinstance(value, set) else str(value),
)
def test_keep_selects_by_layer_and_by_ending_of_the_module(chosen: dict[str, Any], expected: set[str]) -> None:
    assert make(6).keep(**chosen).deltas.keys() == expected


def test_the_layers_of_a_selection_are_those_that_it_touches() -> None:
    a = make(7)
    assert a.layer_numbers == [1, 2, 3]
    assert a.keep(layers=[3, 1]).layer_numbers == [1, 3]
    assert a.drop(layers=[1]).layer_numbers == [2, 3]
    assert a.keep(modules=["lm_head"]).layer_numbers == []


# -------------------------------------------------------------------- geometry


def test_norm_dot_and_cosine_are_those_of_the_dense_vectors() -> None:
    a = make(8)
    b = make(9) + 0.5 * a
    names = sorted(a.deltas)
    x, y = whole_vector(a, names), whole_vector(b, names)
    assert a.norm() == pytest.approx(float(x.norm()), rel=TOLERANCE)
    assert a.dot(b) == pytest.approx(float(x @ y), rel=TOLERANCE)
    assert b.dot(a) == pytest.approx(float(x @ y), rel=TOLERANCE)
    assert a.cosine(b) == pytest.approx(float(x @ y / (x.norm() * y.norm())), abs=TOLERANCE)
    assert a.cosine(-2 * a) == pytest.approx(-1.0, abs=TOLERANCE)


def test_what_only_one_side_touches_counts_as_zero_in_dot_and_cosine() -> None:
    a, b = make(8, layers=(1, 2)), make(9, layers=(2, 3))
    shared = sorted(a.deltas.keys() & b.deltas.keys())
    expected = sum(float((matrices(a)[name] * matrices(b)[name]).sum()) for name in shared)
    norms = [math.sqrt(sum(float(m.square().sum()) for m in matrices(d).values())) for d in (a, b)]
    assert a.dot(b) == pytest.approx(expected, rel=TOLERANCE)
    assert a.cosine(b) == pytest.approx(expected / (norms[0] * norms[1]), abs=TOLERANCE)
    assert a.keep(layers=[1]).dot(b) == 0.0


def test_norms_are_those_of_the_parameters() -> None:
    a = make(10)
    expected = {name: float(matrix.norm()) for name, matrix in matrices(a).items()}
    assert a.norms() == pytest.approx(expected, rel=TOLERANCE)


def test_the_empty_direction_has_norm_zero_and_no_cosine() -> None:
    empty = Direction({}, "base")
    assert (empty.norm(), empty.rank, empty.stored_bytes) == (0.0, 0, 0)
    assert math.isnan(empty.cosine(make(1)))
    assert_equals(empty + make(1), matrices(make(1)))


def test_rank_and_size_count_what_is_stored() -> None:
    a = Direction({"x.weight": thin(4, 5, rank=3, seed=1), "y.weight": dense(2, 7, seed=2)}, "base")
    assert a.rank == 3
    assert a.stored_bytes == 4 * (3 * (4 + 5) + 2 * 7)
    assert a.to("cpu").norms() == a.norms()


@pytest.mark.parametrize(
    ("layers", "span"), [((1, 2, 3), "layers 1-3"), ((1, 3), "layers 1, 3"), ((0, 1, 5), "layers 0-1, 5")]
)
def test_the_printed_form_names_layers_and_rank(layers: tuple[int, ...], span: str) -> None:
    assert span in repr(make(1, layers=layers)) and "rank <= 2" in repr(make(1))
    assert "layers none" in repr(Direction({}, "base"))


# -------------------------------------------------------------------- files


def test_what_is_loaded_is_exactly_what_was_saved(tmp_path: Path) -> None:
    a = make(11) - make(12)
    a.save(tmp_path / "deeper" / "direction.safetensors")
    b = Direction.load(tmp_path / "deeper" / "direction.safetensors")
    assert a.deltas.keys() == b.deltas.keys()
    for name, mine in a.deltas.items():
        theirs = b.deltas[name]
        assert torch.equal(mine.left, theirs.left) and torch.equal(mine.right, theirs.right)
        assert (mine.dense is None) == (theirs.dense is None)
        assert mine.dense is None or (theirs.dense is not None and torch.equal(mine.dense, theirs.dense))
    assert (a.base, a.layers, a.provenance) == (b.base, b.layers, b.provenance)
    assert [path.name for path in (tmp_path / "deeper").iterdir()] == ["direction.safetensors"]


def test_rank_zero_and_transposed_deltas_survive_the_file(tmp_path: Path) -> None:
    a = Direction({"x.weight": Delta.zero((4, 5)), "y.weight": thin(4, 5, rank=2, seed=1).T}, "base")
    a.save(tmp_path / "d.safetensors")
    b = Direction.load(tmp_path / "d.safetensors")
    assert b.deltas["x.weight"].shape == (4, 5) and b.deltas["x.weight"].rank == 0
    assert torch.equal(in_fp64(b.deltas["y.weight"]), in_fp64(a.deltas["y.weight"]))


def test_equal_directions_give_equal_bytes(tmp_path: Path) -> None:
    a = make(13)
    reordered = Direction(
        dict(reversed(a.deltas.items())),
        a.base,
        dict(reversed(a.layers.items())),
        dict(reversed(a.provenance.items())),
    )
    for number in range(6):
        a.save(tmp_path / f"{number}")
        reordered.save(tmp_path / f"reordered {number}")
    assert len({path.read_bytes() for path in tmp_path.iterdir()}) == 1


def test_equal_directions_give_files_of_equal_size_and_content(tmp_path: Path) -> None:
    a = make(13)
    a.save(tmp_path / "first")
    Direction.load(tmp_path / "first").save(tmp_path / "second")
    first, second = tmp_path / "first", tmp_path / "second"
    assert first.stat().st_size == second.stat().st_size
    tensors, again = load_file(first), load_file(second)
    assert tensors.keys() == again.keys() and all(torch.equal(tensors[name], again[name]) for name in tensors)


def test_saving_over_an_older_file_replaces_it(tmp_path: Path) -> None:
    path = tmp_path / "d.safetensors"
    make(1).save(path)
    make(2).save(path)
    assert Direction.load(path).provenance["seed"] == 2


def test_a_failed_save_leaves_the_older_file_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "d.safetensors"
    make(1).save(path)
    before = path.read_bytes()

    def half(_tensors: object, target: Path, **_: object) -> None:
        target.write_bytes(before[:100])
        raise OSError("no space left")

    monkeypatch.setattr(direction_module, "save_file", half)
    with pytest.raises(OSError, match="no space left"):
        make(2).save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def remade(change: Callable[[dict[str, Tensor], dict[str, Any]], object]) -> Callable[[Path], None]:
    """Change the tensors and the header of a direction file."""

    def damage(path: Path) -> None:
        header = {"format": direction_module.FORMAT, "base": "base", "layers": {"lm_head.weight": 1}, "provenance": {}}
        tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
        change(tensors, header)
        save_file(tensors, path, metadata={direction_module.HEADER_KEY: json.dumps(header)})

    return damage


def put(number: float, part: str) -> Callable[[dict[str, Tensor], dict[str, Any]], object]:
    """Put a number into one tensor."""
    return lambda tensors, _: next(t for name, t in tensors.items() if name.endswith(part)).view(-1)[:1].fill_(number)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "missing": Path.unlink,
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("not a direction at all\n" * 20),
    "cut in the header": lambda path: path.write_bytes(path.read_bytes()[:60]),
    "cut in the numbers": lambda path: path.write_bytes(path.read_bytes()[:-4]),
    "other tensors": lambda path: save_file({"x": torch.ones(2)}, path),
    "another format": remade(lambda _, header: header.update(format="weight-steering direction 99")),
    "NaN on the left": remade(put(math.nan, "::left")),
    "NaN on the right": remade(put(math.nan, "::right")),
    "infinity in a dense part": remade(put(math.inf, "::dense")),
}


def assert_refused(path: Path) -> None:
    with pytest.raises(UserError) as caught:
        Direction.load(path)
    assert_one_line(caught.value, str(path))


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_file_that_is_no_direction_is_one_line_that_names_it(damage: str, tmp_path: Path) -> None:
    path = tmp_path / "direction.safetensors"
    make(14).save(path)
    DAMAGES[damage](path)
    assert_refused(path)


HANDMADE = {
    "a factor is missing": remade(lambda tensors, _: tensors.pop("lm_head.weight::right")),
    "factors that do not fit": remade(lambda tensors, _: tensors.update({"lm_head.weight::left": torch.ones(12, 3)})),
    "no base": remade(lambda _, header: header.pop("base")),
    "no layers": remade(lambda _, header: header.pop("layers")),
    "layers that are no table": remade(lambda _, header: header.update(layers="{1:")),
    "a header that is no JSON": lambda path: save_file(
        load_file(path), path, metadata={direction_module.HEADER_KEY: "{1:"}
    ),
}


@pytest.mark.parametrize("damage", HANDMADE)
def test_a_file_with_the_right_mark_and_a_wrong_inside_is_refused(damage: str, tmp_path: Path) -> None:
    path = tmp_path / "direction.safetensors"
    make(14).save(path)
    HANDMADE[damage](path)
    assert_refused(path)


def test_the_remaking_of_files_itself_does_no_damage(tmp_path: Path) -> None:
    path = tmp_path / "direction.safetensors"
    make(14).save(path)
    remade(lambda *_: None)(path)
    assert_equals(Direction.load(path), matrices(make(14)))
