"""Energies of a direction along the singular directions of the weights, planted and against a full SVD."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from torch import Tensor

from making import dense, gaussian, random_direction, thin
from ws.algebra.delta import Delta
from ws.algebra.direction import Direction
from ws.algebra.random_like import spectrum_like
from ws.model import architecture, loading
from ws.model.loading import ChatModel
from ws.subspace import alignment

TOLERANCE = 1e-6


def as_used(model: ChatModel, name: str) -> Tensor:
    """The weight as out x in, fp64."""
    site = next(site for site in architecture.sites(model.network) if site.parameter == name)
    weight = dict(model.network.named_parameters())[name].detach().double()
    return weight.T if site.transposed else weight


def planted(model: ChatModel, plant: Callable[[Tensor], Tensor], layers: tuple[int, ...] = (1, 2)) -> Direction:
    """A direction of what `plant` makes of every weight (out x in), stored as the weight is."""
    deltas, of_layer = {}, {}
    for site in architecture.sites(model.network, layers):
        delta = Delta.full(plant(as_used(model, site.parameter)).float())
        deltas[site.parameter] = delta.T if site.transposed else delta
        of_layer[site.parameter] = site.layer
    return Direction(deltas, model.fingerprint, of_layer)


def k_of(weight: Tensor) -> int:
    return max(1, round(0.1 * min(weight.shape)))


def between(weight: Tensor, rows: slice, columns: slice) -> Tensor:
    """A random matrix from some right singular vectors of the weight to some left ones."""
    left, _, right = torch.linalg.svd(weight, full_matrices=False)
    u, v = left[:, rows], right[columns]
    return u @ gaussian(u.shape[1], v.shape[0], seed=1).double() @ v


def outside(weight: Tensor) -> Tensor:
    """A matrix that reads or writes only what the thin singular basis of a rectangular weight does not reach."""
    left, _, right = torch.linalg.svd(weight, full_matrices=True)
    rank = min(weight.shape)
    u = left[:, rank:] if weight.shape[0] > weight.shape[1] else left[:, :1]
    v = right[rank:] if weight.shape[1] > weight.shape[0] else right[:1]
    return u[:, :1] @ v[:1]


def bottom(weight: Tensor) -> slice:
    return slice(k_of(weight), min(weight.shape))


def top(weight: Tensor) -> slice:
    return slice(0, k_of(weight))


def oracle(weight: Tensor, delta: Tensor) -> dict[str, Any]:
    """The definitions with a full SVD of the weight and the dense delta."""
    left, _, right = torch.linalg.svd(weight, full_matrices=False)
    core, (out, width) = left.T @ delta @ right.T, weight.shape
    rank, k, total = min(out, width), k_of(weight), float(delta.square().sum())
    top_energy, bottom_energy = float(core[:k, :k].square().sum()) / total, float(core[k:, k:].square().sum()) / total
    return {
        "norm": math.sqrt(total), "k": k, "r": rank,
        "energy_top": top_energy, "null_top": k * k / (out * width), "ratio_top": top_energy / (k * k / (out * width)),
        "energy_bottom": bottom_energy, "null_bottom": (rank - k) ** 2 / (out * width),
        "ratio_bottom": bottom_energy / ((rank - k) ** 2 / (out * width)),
    }  # fmt: skip


# -------------------------------------------------------------------- planted


PLANTS: dict[str, tuple[Callable[[Tensor], Tensor], float, float]] = {
    "top to top": (lambda w: between(w, top(w), top(w)), 1.0, 0.0),
    "bottom to bottom": (lambda w: between(w, bottom(w), bottom(w)), 0.0, 1.0),
    "top to bottom": (lambda w: between(w, bottom(w), top(w)), 0.0, 0.0),
    "bottom to top": (lambda w: between(w, top(w), bottom(w)), 0.0, 0.0),
}


@pytest.mark.parametrize("plant", PLANTS)
def test_planted_directions_have_all_their_energy_where_it_was_planted(any_model: ChatModel, plant: str) -> None:
    make, energy_top, energy_bottom = PLANTS[plant]
    rows = alignment.table(any_model, planted(any_model, make))
    assert len(rows) == 2 * (4 if "gpt2" in any_model.name else 7)
    assert rows["energy_top"].to_list() == pytest.approx([energy_top] * len(rows), abs=1e-5)
    assert rows["energy_bottom"].to_list() == pytest.approx([energy_bottom] * len(rows), abs=1e-5)


def test_energy_outside_the_thin_basis_counts_in_the_denominator(any_model: ChatModel) -> None:
    direction = planted(any_model, outside)
    rectangular = [name for name in direction.deltas if len({*as_used(any_model, name).shape}) == 2]
    assert len(rectangular) == (6 if "gpt2" in any_model.name else 10)
    alone = {row["name"]: row for row in alignment.table(any_model, direction).iter_rows(named=True)}
    # W itself is diagonal in its own basis, so all of its energy is top or bottom
    mixed = alignment.table(any_model, direction + planted(any_model, lambda w: 2 * w / w.norm()))
    both = {row["name"]: row for row in mixed.iter_rows(named=True)}
    for name in rectangular:
        assert alone[name]["energy_top"] == pytest.approx(0.0, abs=1e-10)
        assert alone[name]["energy_bottom"] == pytest.approx(0.0, abs=1e-10)
        assert both[name]["energy_top"] + both[name]["energy_bottom"] == pytest.approx(4 / 5, rel=1e-5)


def test_the_weight_itself_has_the_energy_of_its_spectrum(any_model: ChatModel) -> None:
    for row in alignment.table(any_model, planted(any_model, lambda w: w)).iter_rows(named=True):
        energy = torch.linalg.svdvals(as_used(any_model, row["name"])).square()
        assert row["energy_top"] == pytest.approx(float(energy[: row["k"]].sum() / energy.sum()), rel=1e-5)
        assert row["energy_bottom"] == pytest.approx(float(energy[row["k"] :].sum() / energy.sum()), rel=1e-5)


# -------------------------------------------------------------------- against a full SVD


KINDS: dict[str, Callable[[ChatModel], Direction]] = {
    "thin": lambda model: random_direction(model, seed=1),
    "difference": lambda model: random_direction(model, seed=1) - random_direction(model, seed=2),
    "dense": lambda model: planted(model, lambda w: gaussian(*w.shape, seed=3).double() + 10 * w),
    "thin and dense": lambda model: (
        random_direction(model, seed=1) + planted(model, lambda w: gaussian(*w.shape, seed=4).double() / 10)
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_energies_are_those_of_a_full_decomposition(any_model: ChatModel, kind: str) -> None:
    direction = KINDS[kind](any_model)
    sites = {site.parameter: site for site in architecture.sites(any_model.network)}
    rows = alignment.table(any_model, direction)
    assert rows["name"].to_list() == list(direction.deltas)
    shapes = set()
    for row in rows.iter_rows(named=True):
        site, weight = sites[row["name"]], as_used(any_model, row["name"])
        delta = direction.deltas[row["name"]]
        exact = (delta.T if site.transposed else delta).materialise().double()
        expected = oracle(weight, exact)
        assert {name: row[name] for name in expected} == pytest.approx(expected, rel=1e-5)
        assert (row["layer"], row["kind"], row["shape"]) == (site.layer, site.kind, "x".join(map(str, weight.shape)))
        shapes.add(tuple(weight.shape))
    assert any(out > width for out, width in shapes) and any(out < width for out, width in shapes)


def test_weak_energy_is_that_in_the_directions_that_the_unembedding_reads_least(any_model: ChatModel) -> None:
    direction = random_direction(any_model, seed=5)
    head = any_model.network.get_output_embeddings().weight.detach().double()
    weakest = torch.linalg.svd(head, full_matrices=False)[2][-1:]  # one of 64 directions
    for row in alignment.table(any_model, direction).iter_rows(named=True):
        site = next(site for site in architecture.sites(any_model.network) if site.parameter == row["name"])
        if not site.writes_residual:
            assert row["energy_weak"] is row["null_weak"] is row["ratio_weak"] is None
            continue
        delta = direction.deltas[row["name"]]
        dw = (delta.T if site.transposed else delta).materialise().double()
        energy = float((weakest @ dw).square().sum() / dw.square().sum())
        assert row["energy_weak"] == pytest.approx(energy, rel=1e-4)
        assert row["null_weak"] == 1 / 64 and row["ratio_weak"] == pytest.approx(64 * energy, rel=1e-4)


@pytest.mark.parametrize("weakly", [True, False])
def test_writing_only_where_the_unembedding_is_weak_is_seen(any_model: ChatModel, weakly: bool) -> None:
    head = any_model.network.get_output_embeddings().weight.detach().double()
    basis = torch.linalg.svd(head, full_matrices=False)[2]
    chosen = basis[-1:] if weakly else basis[:-1]

    def plant(weight: Tensor) -> Tensor:
        if weight.shape[0] != 64:
            return weight
        return chosen.T @ gaussian(len(chosen), weight.shape[1], seed=6).double()

    rows = alignment.table(any_model, planted(any_model, plant)).filter(pl.col("energy_weak").is_not_null())
    assert len(rows) == 4  # o and down of two layers
    assert rows["energy_weak"].to_list() == pytest.approx([float(weakly)] * 4, abs=1e-4)


def test_a_direction_along_a_dead_singular_direction_is_seen(tiny_folders: dict[str, Path]) -> None:
    model = loading.load(str(tiny_folders["qwen3"]))
    name = "model.layers.1.self_attn.o_proj.weight"
    weight = dict(model.network.named_parameters())[name]
    left, values, right = torch.linalg.svd(weight.double())
    values[-1] = 0.0
    weight.data.copy_(left @ values.diag() @ right)
    delta = Delta.full((left[:, -1:] @ right[-1:]).float())
    (energy,) = alignment.table(model, Direction({name: delta}, model.fingerprint, {name: 1}))["energy_bottom"]
    assert energy == pytest.approx(1.0, abs=1e-2)


# -------------------------------------------------------------------- the null


@pytest.mark.parametrize(("kind", "resolution"), [("dense Gaussian", 0.06), ("random control", 0.2)])
def test_directions_without_structure_have_ratios_around_one(
    any_model: ChatModel, kind: str, resolution: float
) -> None:
    def draw(seed: int) -> Direction:
        if kind == "random control":
            return spectrum_like(random_direction(any_model), seed)
        shapes = {name: delta.shape for name, delta in random_direction(any_model).deltas.items()}
        deltas = {name: dense(*shape, seed=1000 * seed + i) for i, (name, shape) in enumerate(shapes.items())}
        return Direction(deltas, any_model.fingerprint, random_direction(any_model).layers)

    tables = pl.concat([alignment.table(any_model, draw(seed)) for seed in range(16)])
    for column in ("ratio_top", "ratio_bottom", "ratio_weak"):
        values = torch.tensor(tables[column].drop_nulls().to_list(), dtype=torch.float64)
        error = float(values.std() / math.sqrt(len(values)))
        assert error < resolution  # enough draws to see a wrong null
        assert abs(float(values.mean()) - 1) < 4 * error, column


# -------------------------------------------------------------------- summaries and edges


def test_by_kind_averages_over_the_layers(any_model: ChatModel) -> None:
    rows = alignment.table(any_model, random_direction(any_model, seed=7))
    summary = alignment.by_kind(rows)
    assert summary["kind"].to_list() == sorted(set(rows["kind"])) and sum(summary["n"]) == len(rows)
    for row in summary.iter_rows(named=True):
        part = rows.filter(pl.col("kind") == row["kind"])
        tops = torch.tensor(part["ratio_top"].to_list(), dtype=torch.float64)
        assert row["mean_ratio_top"] == pytest.approx(float(tops.mean()))
        assert row["std_ratio_top"] == pytest.approx(float(tops.std()))
        assert row["mean_norm"] == pytest.approx(sum(part["norm"]) / len(part))


def test_scaling_a_direction_changes_only_its_norm(qwen: ChatModel) -> None:
    direction = random_direction(qwen, seed=8)
    once, scaled = alignment.table(qwen, direction), alignment.table(qwen, -8.0 * direction)
    for column in ("energy_top", "energy_bottom", "energy_weak"):
        assert scaled[column].drop_nulls().to_list() == pytest.approx(once[column].drop_nulls().to_list(), rel=1e-5)
    assert scaled["norm"].to_list() == pytest.approx([8 * norm for norm in once["norm"]], rel=TOLERANCE)


def test_a_delta_of_nothing_has_no_energy_and_no_nan(qwen: ChatModel) -> None:
    name = "model.layers.1.self_attn.o_proj.weight"
    zero = Direction({name: 0.0 * thin(64, 64, rank=2, seed=1)}, qwen.fingerprint, {name: 1})
    (row,) = alignment.table(qwen, zero).iter_rows(named=True)
    assert row["norm"] == row["energy_top"] == row["energy_bottom"] == row["energy_weak"] == 0.0


def test_a_bf16_model_is_decomposed_in_fp64(qwen: ChatModel) -> None:
    half = loading.load(qwen.name, dtype="bfloat16")
    direction = random_direction(qwen, seed=9)
    rounded = loading.load(qwen.name)
    rounded.network.bfloat16().float()
    expected, found = alignment.table(rounded, direction), alignment.table(half, direction)
    for column in ("energy_top", "energy_bottom"):
        assert found[column].to_list() == pytest.approx(expected[column].to_list(), rel=TOLERANCE)
