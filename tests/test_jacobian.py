"""Activation steering by the gradient: against finite differences of the log-ratios that the engine reports."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import polars as pl
import pytest
import torch

from making import gaussian, hook_count, weights_digest
from ws.base.errors import UserError
from ws.baselines import jacobian, repe
from ws.baselines.repe import ActivationDirection
from ws.edit.condition import Condition, Edit
from ws.fitting import behaviour
from ws.measure.choice import answers_of
from ws.measure.probe import Probe, ProbeRow
from ws.measure.score import score
from ws.model import loading
from ws.model.chat import ask
from ws.model.loading import ChatModel

SYCOPHANCY = behaviour.load("sycophancy")
LAYERS = (1, 2)
QUESTIONS = ("Do cats like milk?", "I think that the moon is made of old bread. Do you agree?", "Do owls eat leaves?")
REPLIES = ("Yes, I agree.", "No, I disagree completely.")


def choice(*answers: str) -> Probe:
    rows = [
        ProbeRow(str(number), tuple(ask(text)), "My answer: **", label=-1 if number == 1 else 1)
        for number, text in enumerate(QUESTIONS)
    ]
    return Probe("asked", "choice", tuple(rows), answers or ("Yes", "No"))  # type: ignore[arg-type]


def contrast(*, closed: bool = True) -> Probe:
    rows = [replace(row, continuation="", replies=REPLIES) for row in choice().rows]
    return Probe("replies", "contrast", tuple(rows), closed=closed)


PROBES = {
    "answers of one token": choice(), "answers of several tokens": choice("Certainly so", "Never ever"),
    "replies": contrast(), "open replies": contrast(closed=False),
}  # fmt: skip


def slope(model: ChatModel, probe: Probe, effect: ActivationDirection, step: float) -> float:
    """Central difference of the mean label * logratio that the engine reports."""
    conditions = [Condition.of(Edit("moved", effect), sign * step) for sign in (1, -1)]
    table = score(model, [probe], conditions).filter((pl.col("metric") == "logratio") & (pl.col("edit") == "moved"))
    moved = table["value"] * table["label"] * table["alpha"].sign()
    return float(moved.sum()) / len(probe.rows) / (2 * step)


@pytest.mark.parametrize("asked", PROBES)
def test_gradients_are_the_finite_differences_of_the_engine(any_model: ChatModel, asked: str) -> None:
    probe = PROBES[asked]
    before = weights_digest(any_model.network)
    found = jacobian.fit(any_model, probe, SYCOPHANCY, layers=LAYERS)
    slopes = found.provenance["slopes"]
    assert list(found.vectors) == list(LAYERS) and found.unit == "residual" and found.edited == "all"
    for layer in LAYERS:
        alone = found.on_layers([layer])
        assert slopes[layer] > 0
        assert slope(any_model, probe, alone, 0.01) == pytest.approx(slopes[layer], rel=0.02)
        size = float(found.vectors[layer].norm())
        other = gaussian(64, seed=layer)
        other = other / other.norm() * size + 0.3 * found.vectors[layer]  # with a slope of either sign, not near zero
        expected = slopes[layer] * float(other @ found.vectors[layer]) / size**2
        along = ActivationDirection({layer: other}, any_model.fingerprint)
        assert slope(any_model, probe, along, 0.01) == pytest.approx(expected, rel=0.03)
    assert slope(any_model, probe, found, 0.005) == pytest.approx(sum(slopes.values()), rel=0.03)
    assert weights_digest(any_model.network) == before and hook_count(any_model.network) == 0


def test_the_probes_have_answers_of_one_and_of_several_tokens(qwen: ChatModel) -> None:
    lengths = [
        {len(sequence) for group in answers_of(qwen, PROBES[asked].answers) for sequence in group}
        for asked in ("answers of one token", "answers of several tokens")
    ]
    assert lengths[0] == {1} and min(lengths[1]) > 1


def test_every_vector_has_the_norm_of_the_residual_stream_at_its_layer(qwen: ChatModel) -> None:
    found = jacobian.fit(qwen, choice(), SYCOPHANCY, layers=range(4))
    norms = repe.residual_norms(qwen, SYCOPHANCY, range(4))
    assert {layer: float(vector.norm()) for layer, vector in found.vectors.items()} == pytest.approx(norms, rel=1e-5)
    for layer in range(4):
        settings = repe.RepeSettings(unit="residual", layer=layer)
        assert float(repe.fit(qwen, SYCOPHANCY, settings).vectors[layer].norm()) == pytest.approx(
            norms[layer], rel=1e-5
        )
    assert repe.residual_norm(qwen, SYCOPHANCY, [1, 2]) == pytest.approx((norms[1] + norms[2]) / 2)
    one = jacobian.fit(qwen, choice(), SYCOPHANCY, layers=[2])
    assert torch.allclose(one.vectors[2], found.vectors[2], atol=1e-4), "a layer alone is the same as among others"


@pytest.mark.parametrize("probe", [choice(), contrast()], ids=lambda probe: probe.kind)
def test_labels_give_the_sign_and_batches_nothing(qwen: ChatModel, probe: Probe) -> None:
    turned = replace(probe, rows=tuple(replace(row, label=-row.label) for row in probe.rows))
    found, other, single = (
        jacobian.fit(qwen, one, SYCOPHANCY, layers=LAYERS, micro_tokens=tokens)
        for one, tokens in ((probe, 4_096), (turned, 4_096), (probe, 1))
    )
    for layer, vector in found.vectors.items():
        assert torch.allclose(other.vectors[layer], -vector, atol=1e-4)
        assert torch.allclose(single.vectors[layer], vector, atol=1e-3)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_gives_the_same_direction(
    qwen: ChatModel, tiny_folders: dict[str, Path], dtype: loading.Dtype
) -> None:
    half = loading.load(str(tiny_folders["qwen3"]), dtype=dtype)
    for probe in (choice(), contrast()):
        exact, found = (jacobian.fit(model, probe, SYCOPHANCY, layers=LAYERS) for model in (qwen, half))
        for layer in LAYERS:
            assert float(torch.cosine_similarity(exact.vectors[layer], found.vectors[layer], dim=0)) > 0.99


def test_what_has_no_gradient_is_an_error(qwen: ChatModel) -> None:
    written = Probe("written", "reply", (ProbeRow("a", tuple(ask("Hi.")), ""),), tokens=4)
    with pytest.raises(UserError, match="'written' of kind reply"):
        jacobian.fit(qwen, written, SYCOPHANCY, layers=LAYERS)
    with pytest.raises(UserError, match="layer 4 does not exist"):
        jacobian.fit(qwen, choice(), SYCOPHANCY, layers=[1, 4])
