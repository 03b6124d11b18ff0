"""Activation steering inside the top write directions of a layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch

from making import assert_one_line
from ws.adapters.diff import Geometry
from ws.algebra.direction import Direction
from ws.base.errors import UserError
from ws.base.store import RunFolder
from ws.baselines import repe, svd_steering
from ws.baselines.repe import ActivationDirection, RepeSettings
from ws.comparing import dev_split, methods
from ws.comparing.dev_split import EVALUATIONS, STRENGTHS
from ws.eval import sycophancy
from ws.fitting import train_settings
from ws.fitting.behaviour import load
from ws.fitting.stages import FittedRun
from ws.model import architecture
from ws.model.loading import ChatModel


def writes(model: ChatModel, layer: int) -> torch.Tensor:
    """[W_o | W_down] as out x in, side by side."""
    found = []
    for site in architecture.sites(model.network, [layer], ["o", "down"]):
        weight = model.network.get_parameter(site.parameter).data.double()
        found.append(weight.T if site.transposed else weight)
    return torch.cat(found, dim=1)


def test_the_basis_is_that_of_a_dense_singular_value_decomposition(any_model: ChatModel) -> None:
    left = torch.linalg.svd(writes(any_model, 1))[0]
    for rank, basis in svd_steering.top_writes(any_model, 1).items():
        assert torch.allclose(basis.mT @ basis, torch.eye(rank, dtype=torch.float64), atol=1e-10)
        assert torch.allclose(basis @ basis.mT, left[:, :rank] @ left[:, :rank].mT, atol=1e-6)


def test_the_vector_is_the_projection_of_the_persona_difference_at_the_wanted_norm(qwen: ChatModel) -> None:
    whole = repe.fit(qwen, load("sycophancy"), RepeSettings(slice=(0.0, 1.0)))
    basis = svd_steering.top_writes(qwen, 2)[8]
    found = svd_steering.in_top_writes(whole, 2, basis, 5.0)
    (vector,) = found.vectors.values()
    wanted = basis @ basis.mT @ whole.vectors[2].double()
    assert torch.allclose(vector.double() / 5.0, wanted / wanted.norm(), atol=1e-6)
    assert found.first_layer == 2 and found.unit == "residual" and found.provenance["rank"] == 8


def test_a_difference_outside_of_the_basis_is_an_error(qwen: ChatModel) -> None:
    basis = svd_steering.top_writes(qwen, 0)[4]
    outside = torch.randn(64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    outside -= basis @ (basis.mT @ outside)
    lost = ActivationDirection({0: outside}, qwen.fingerprint)
    with pytest.raises(UserError) as caught:
        svd_steering.in_top_writes(lost, 0, basis, 1.0)
    assert_one_line(caught.value, "layer 0", "4 write directions")


@pytest.mark.parametrize("layers", [1, 2, 6, 30, 80])
def test_layers_and_ranks_stay_within_the_budget_of_choices(layers: int) -> None:
    tried = svd_steering.layers_to_try(layers)
    assert tried == sorted(set(tried)) and tried[0] == 0 and tried[-1] == layers - 1
    candidates = len(tried) * len(svd_steering.RANKS)
    assert candidates + len(STRENGTHS["residual"]) <= EVALUATIONS, "all at one strength, then one at all strengths"


def test_it_is_one_of_the_kinds_of_activation_steering() -> None:
    assert methods.SVD in methods.ACTIVATIONS


def test_layer_and_rank_are_chosen_on_dev_rows_and_seeds_are_replicates(
    qwen: ChatModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: dict[tuple[int, int], ActivationDirection] = {}

    def choose(_model: Any, _own: Any, _name: str, fitted: Any, *_: Any) -> dev_split.Chosen[Any]:
        tried.update(fitted)
        return dev_split.Chosen((1, 4), 0.2, "")

    monkeypatch.setattr(dev_split, "best_strength", choose)
    subject = load("sycophancy")
    empty = Direction({}, qwen.fingerprint)
    training = train_settings.resolve(qwen, "lora", {}, subject.name)
    run = FittedRun(tmp_path, subject, empty, Geometry.of(empty, empty), pl.DataFrame(), {}, training, {})
    own = sycophancy.headline_probe(subject, 8)
    sources = methods.Sources(qwen, qwen, {("lora", 0, 0): run}, own, RunFolder(tmp_path / "compare", {}), draws=2)
    method = methods._in_top_writes(sources, [0, 1])
    assert set(tried) == {(layer, rank) for layer in range(4) for rank in svd_steering.RANKS}
    assert [edit.seed for edit in method.edits] == [0, 1] and method.note == "layer 1, rank 4, strength 0.2"
    first, second = (edit.effect.vectors[1] for edit in method.edits)  # type: ignore[union-attr]
    assert first.norm() == pytest.approx(float(0.2 * tried[1, 4].vectors[1].norm()), rel=1e-5)
    assert not torch.equal(first, second), "each seed reads its own half of the prompts"
    assert method.control is not None and len(method.control.edits) == 2
