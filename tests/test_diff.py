"""Two adapters of one base to a Direction, and the geometry of the two, against dense fp64 formulas."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from making import in_fp64, merged_by_peft, relative_error, save_lora, thin
from ws.adapters import diff
from ws.adapters.diff import Geometry
from ws.algebra.direction import Direction
from ws.base.errors import UserError
from ws.edit.steering import steer
from ws.model import loading
from ws.model.loading import ChatModel

TOLERANCE = 1e-6


@pytest.fixture(scope="module")
def pair(tiny_folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two adapters of the Qwen3 model that share their modules."""
    root = tmp_path_factory.mktemp("pair")
    return save_lora(tiny_folders["qwen3"], root / "pos", seed=1), save_lora(
        tiny_folders["qwen3"], root / "neg", seed=2
    )


def as_vector(matrices: dict[str, Tensor]) -> Tensor:
    return torch.cat([matrices[name].flatten() for name in sorted(matrices)])


def vector(direction: Direction) -> Tensor:
    return as_vector({name: in_fp64(delta) for name, delta in direction.deltas.items()})


def dense_geometry(p: Tensor, n: Tensor) -> dict[str, float]:
    """The definitions, word for word, on dense vectors."""
    dw, m = p - n, (p + n) / 2
    return {
        "norm_pos": float(p.norm()),
        "norm_neg": float(n.norm()),
        "norm_dw": float(dw.norm()),
        "norm_m": float(m.norm()),
        "cos_anti": -float(p @ n / (p.norm() * n.norm())),
        "asymmetry": float(p.norm() / n.norm()),
        "drift_ratio": float(m.norm() / (dw.norm() / 2)),
        "cos_dw_m": abs(float(dw @ m / (dw.norm() * m.norm()))),
    }


# -------------------------------------------------------------------- geometry


@pytest.mark.parametrize("mixture", [0.0, 1.0, -1.0, 30.0, -0.3], ids=lambda m: f"{m:g} shared")
@pytest.mark.parametrize("scale", [0.3, 1.0, 3.0])
def test_geometry_is_that_of_the_dense_vectors(mixture: float, scale: float) -> None:
    shapes = {"a.weight": (12, 8), "b.weight": (6, 20)}

    def random(seed: int) -> Direction:
        deltas = {name: thin(*shape, rank=3, seed=seed + i) for i, (name, shape) in enumerate(shapes.items())}
        return Direction(deltas, "base")

    shared = random(0)
    pos, neg = random(10) * scale + mixture * shared, random(20) + abs(mixture) * shared
    expected = dense_geometry(vector(pos), vector(neg))
    assert Geometry.of(pos, neg).__dict__ == pytest.approx(expected, rel=TOLERANCE, abs=TOLERANCE)


def test_geometry_of_exact_opposites_has_no_drift() -> None:
    tau = Direction({"a.weight": thin(12, 8, rank=3, seed=1)}, "base")
    geometry = Geometry.of(tau, -tau)
    assert geometry.cos_anti == pytest.approx(1.0) and geometry.asymmetry == pytest.approx(1.0)
    assert geometry.norm_dw == pytest.approx(2 * tau.norm())
    assert geometry.norm_m < 1e-6 * tau.norm() and geometry.drift_ratio < 1e-6


def test_geometry_of_equal_sides_has_only_drift() -> None:
    tau = Direction({"a.weight": thin(12, 8, rank=3, seed=1)}, "base")
    geometry = Geometry.of(tau, tau)
    assert geometry.cos_anti == pytest.approx(-1.0) and geometry.norm_m == pytest.approx(tau.norm())
    assert geometry.norm_dw < 1e-6 * tau.norm()


def test_geometry_with_an_untrained_side_has_numbers_everywhere() -> None:
    tau = Direction({"a.weight": thin(12, 8, rank=3, seed=1)}, "base")
    for pos, neg in ((tau, 0 * tau), (0 * tau, tau), (0 * tau, 0 * tau)):
        assert all(math.isfinite(value) for value in Geometry.of(pos, neg).__dict__.values())


# -------------------------------------------------------------------- folders to directions


def test_a_direction_is_the_dense_difference_of_two_merges(qwen: ChatModel, pair: tuple[Path, Path]) -> None:
    found, geometry = diff.direction(qwen, *pair)
    merged = [merged_by_peft(Path(qwen.name), folder) for folder in pair]
    weights = {name: p.detach().double() for name, p in qwen.network.named_parameters()}
    for name, delta in found.deltas.items():
        difference = merged[0][name] - merged[1][name]
        assert float((in_fp64(delta) - difference).norm()) <= 2 * TOLERANCE * float(weights[name].norm())
        assert relative_error(in_fp64(delta), difference) < 1e-4
    touched = sorted(found.deltas)
    expected = dense_geometry(*(as_vector({name: side[name] for name in touched}) for side in merged))
    assert geometry.__dict__ == pytest.approx(expected, rel=1e-4, abs=1e-4)
    assert all(
        torch.count_nonzero(change) == 0 for side in merged for name, change in side.items() if name not in touched
    )


def test_a_direction_is_the_exact_difference_of_the_task_vectors(qwen: ChatModel, pair: tuple[Path, Path]) -> None:
    found, geometry = diff.direction(qwen, *pair)
    pos, neg = (diff.task_vector(qwen, folder) for folder in pair)
    assert relative_error(vector(found), vector(pos) - vector(neg)) < TOLERANCE
    assert geometry.norm_dw == pytest.approx(found.norm(), rel=TOLERANCE)
    assert geometry == Geometry.of(pos, neg)


def test_swapping_the_sides_flips_the_sign(qwen: ChatModel, pair: tuple[Path, Path]) -> None:
    forward, backward = diff.direction(qwen, *pair)[0], diff.direction(qwen, *reversed(pair))[0]
    assert relative_error(vector(forward), -vector(backward)) < TOLERANCE


def test_adding_the_direction_to_the_negative_side_gives_the_positive_one(
    qwen: ChatModel, pair: tuple[Path, Path]
) -> None:
    found, (pos, neg) = diff.direction(qwen, *pair)[0], (diff.task_vector(qwen, folder) for folder in pair)
    parameters = dict(qwen.network.named_parameters())
    with steer(qwen, pos, mode="baked"):
        expected = {name: parameters[name].detach().clone() for name in found.deltas}
    with steer(qwen, {neg: 1.0, found: 1.0}, mode="baked"):
        for name, weight in expected.items():
            assert relative_error(parameters[name].detach(), weight) < TOLERANCE


def test_layers_base_and_provenance_are_recorded(qwen: ChatModel, pair: tuple[Path, Path]) -> None:
    found, geometry = diff.direction(qwen, *pair, {"behaviour": "sycophancy", "tool": "mine"})
    assert found.base == qwen.fingerprint and found.layer_numbers == [1, 2]
    assert found.layers == {name: int(name.split(".")[2]) for name in found.deltas}
    assert found.provenance["base"] == qwen.describe()
    assert found.provenance["geometry"] == geometry.__dict__
    assert found.provenance["adapter"]["lora_alpha"] == 6
    assert found.provenance["one_sided_parameters"] == []
    assert (found.provenance["behaviour"], found.provenance["tool"]) == ("sycophancy", "mine")


def test_the_recorded_provenance_survives_the_file(qwen: ChatModel, pair: tuple[Path, Path], tmp_path: Path) -> None:
    found, _ = diff.direction(qwen, *pair)
    found.save(tmp_path / "d.safetensors")
    assert Direction.load(tmp_path / "d.safetensors").provenance == found.provenance


def test_gpt2_directions_are_stored_as_its_weights_are(tiny_folders: dict[str, Path], tmp_path: Path) -> None:
    options = {"target_modules": ["c_attn", "c_fc"], "layers_pattern": "h", "fan_in_fan_out": True}
    base = tiny_folders["gpt2"]
    folders = [save_lora(base, tmp_path / str(seed), seed=seed, **options) for seed in (1, 2)]
    model = loading.load(str(base))
    found, _ = diff.direction(model, *folders)
    merged = [merged_by_peft(base, folder) for folder in folders]
    assert found.deltas["transformer.h.1.attn.c_attn.weight"].shape == (64, 192)
    assert found.layers["transformer.h.2.mlp.c_fc.weight"] == 2 and len(found.deltas) == 4
    for name, delta in found.deltas.items():
        assert relative_error(in_fp64(delta), merged[0][name] - merged[1][name]) < 1e-4


# -------------------------------------------------------------------- what is said aloud


def test_healthy_pairs_cause_no_warning(
    qwen: ChatModel, pair: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    diff.direction(qwen, *pair)
    assert capsys.readouterr().err == ""


def test_parameters_of_one_side_only_are_counted_as_zero_and_reported(
    qwen: ChatModel, pair: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    partial = save_lora(Path(qwen.name), tmp_path, seed=3, target_modules=["q_proj", "o_proj", "v_proj"])
    found, geometry = diff.direction(qwen, pair[0], partial)
    one_sided = sorted(
        f"model.layers.{layer}.{module}.weight"
        for layer in (1, 2)
        for module in ("mlp.up_proj", "mlp.down_proj", "self_attn.v_proj")
    )
    assert found.provenance["one_sided_parameters"] == one_sided
    warning = capsys.readouterr().err
    assert "6 parameters are changed by one side only" in warning and one_sided[0] in warning
    pos, neg = (diff.task_vector(qwen, folder) for folder in (pair[0], partial))
    up, v = one_sided[1], "model.layers.1.self_attn.v_proj.weight"
    assert relative_error(in_fp64(found.deltas[up]), in_fp64(pos.deltas[up])) < TOLERANCE
    assert relative_error(in_fp64(found.deltas[v]), -in_fp64(neg.deltas[v])) < TOLERANCE
    assert geometry.norm_dw == pytest.approx(found.norm(), rel=TOLERANCE)


@pytest.mark.parametrize(("scale", "warns"), [(2e-4, True), (0.0, True), (0.05, False)])
def test_a_pair_that_learned_hardly_anything_is_reported(
    qwen: ChatModel, tmp_path: Path, capsys: pytest.CaptureFixture[str], scale: float, warns: bool
) -> None:
    folders = [save_lora(Path(qwen.name), tmp_path / str(seed), seed=seed, scale=scale) for seed in (1, 2)]
    capsys.readouterr()
    found, geometry = diff.direction(qwen, *folders)
    weights = dict(qwen.network.named_parameters())
    weight_norm = math.sqrt(sum(float(weights[name].double().square().sum()) for name in found.deltas))
    assert (geometry.norm_dw < 1e-4 * weight_norm) == warns
    assert ("hardly anything was learned" in capsys.readouterr().err) == warns


def test_two_equal_adapters_learned_nothing_apart(
    qwen: ChatModel, pair: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    found, _ = diff.direction(qwen, pair[0], pair[0])
    assert found.norm() == 0.0
    assert "hardly anything was learned" in capsys.readouterr().err


def test_a_missing_side_is_one_line_that_names_it(qwen: ChatModel, pair: tuple[Path, Path], tmp_path: Path) -> None:
    for sides in ((pair[0], tmp_path / "gone"), (tmp_path / "gone", pair[1])):
        with pytest.raises(UserError, match="gone"):
            diff.direction(qwen, *sides)


# -------------------------------------------------------------------- variants and numerics


def test_variants_are_what_they_are_called(qwen: ChatModel, pair: tuple[Path, Path]) -> None:
    pos, neg = (diff.task_vector(qwen, folder) for folder in pair)
    p, n = vector(pos), vector(neg)
    found = {name: vector(direction) for name, direction in diff.variants(pos, neg).items()}
    assert relative_error(found["dw"], p - n) < TOLERANCE
    assert relative_error(found["tau_pos"], p) < TOLERANCE and relative_error(found["tau_neg"], -n) < TOLERANCE
    bisector = p / p.norm() - n / n.norm()
    assert relative_error(found["bisector"], bisector * ((p - n).norm() / bisector.norm())) < 1e-5


@pytest.mark.parametrize("size", [1e-1, 1e-5])
def test_numerics_tell_what_a_bf16_merge_would_have_lost(qwen: ChatModel, tmp_path: Path, size: float) -> None:
    folders = [save_lora(Path(qwen.name), tmp_path / str(seed), seed=seed, scale=size**0.5) for seed in (1, 2)]
    pos, neg = (diff.task_vector(qwen, folder) for folder in folders)
    rows = diff.bf16_loss(qwen, pos, neg)
    assert [row["parameter"] for row in rows] == sorted(pos.deltas)
    for row in rows:
        name = row["parameter"]
        weight = qwen.network.get_parameter(name).data
        merged = [(weight.bfloat16().float() + tau.materialise(name)).bfloat16().double() for tau in (pos, neg)]
        rough, exact = (
            merged[0] - merged[1],
            vector((pos - neg).keep(modules=[name.rsplit(".", 1)[0]])).reshape(weight.shape),
        )
        assert row["cosine"] == pytest.approx(float((rough * exact).sum() / (rough.norm() * exact.norm())), abs=1e-9)
        assert row["norm_ratio"] == pytest.approx(float(rough.norm() / exact.norm()))
        assert row["layer"] in (1, 2)
    least = min(row["cosine"] for row in rows)
    assert least > 0.999 if size == 1e-1 else least < 0.97, "small updates drown in the rounding"


@pytest.mark.parametrize("case", ["nothing", "one of each", "an empty folder"])
def test_two_of_one_kind_are_needed(qwen: ChatModel, pair: tuple[Path, Path], tmp_path: Path, case: str) -> None:
    sides = {
        "nothing": (tmp_path / "nowhere", pair[1]),
        "one of each": (pair[0], Path(qwen.name)),
        "an empty folder": (tmp_path, tmp_path),
    }[case]
    with pytest.raises(UserError):
        diff.are_adapters(*sides)
    assert diff.are_adapters(*pair) and not diff.are_adapters(Path(qwen.name), Path(qwen.name))


def test_norms_by_layer_add_up(qwen: ChatModel, pair: tuple[Path, Path]) -> None:
    direction, _ = diff.direction(qwen, *pair)
    norms = direction.norms_by_layer()
    assert list(norms) == [1, 2]
    assert sum(value**2 for value in norms.values()) == pytest.approx(direction.norm() ** 2)
    assert norms[1] == pytest.approx(direction.keep(layers=[1]).norm())
