"""Trained vectors: against Adam by hand on rows read alone, and that each sign lowers the loss of its own side."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from making import hook_count, weights_digest
from test_gradient import loss_by_hand
from test_train import SMALL, pairs
from ws.base.errors import UserError
from ws.base.poles import POLES
from ws.baselines import gradient, repe, trained_vector
from ws.baselines.repe import ActivationDirection
from ws.edit.steering import steer
from ws.fitting import behaviour, train
from ws.model import architecture, loading
from ws.model.chat import SupervisedTokens
from ws.model.loading import ChatModel

SYCOPHANCY = behaviour.load("sycophancy")
LAYERS = (1, 2)
Rows = list[SupervisedTokens]


def sides(model: ChatModel) -> tuple[Rows, Rows]:
    whole = replace(SMALL, validation=0.0)
    positive, negative = (train.examples(model, pairs(), pole, whole, 0).train for pole in POLES)
    return positive, negative[:20]


def by_hand(model: ChatModel, lr: float, epochs: int, per_epoch: int, seed: int) -> dict[int, Tensor]:
    """Adam written out, with a hook of its own, row by row."""
    _, blocks = architecture.decoder_layers(model.network)
    norms = repe.residual_norms(model, SYCOPHANCY, LAYERS)
    vectors = {layer: torch.zeros(64, requires_grad=True) for layer in LAYERS}
    first, second = ({layer: torch.zeros(64) for layer in LAYERS} for _ in range(2))
    steps = epochs * per_epoch
    for step in range(steps):
        epoch, part = divmod(step, per_epoch)
        total = torch.zeros(())
        for sign, rows in zip((1.0, -1.0), sides(model), strict=True):
            dealt = gradient.deal(rows, per_epoch, f"trained vector|{seed}|{epoch}")[part]

            def adding(layer: int, sign: float = sign) -> object:
                def hook(_module: object, _inputs: object, output: Tensor | tuple[Tensor, ...]) -> object:
                    if isinstance(output, tuple):
                        return (output[0] + sign * vectors[layer], *output[1:])
                    return output + sign * vectors[layer]

                return hook

            handles = [blocks[layer].register_forward_hook(adding(layer)) for layer in LAYERS]  # type: ignore[arg-type]
            total = total + loss_by_hand(model.network, dealt)
            for handle in handles:
                handle.remove()
        found = torch.autograd.grad(total, list(vectors.values()))
        for (layer, vector), one in zip(vectors.items(), found, strict=True):
            first[layer] = 0.9 * first[layer] + 0.1 * one
            second[layer] = 0.999 * second[layer] + 0.001 * one**2
            mean, square = first[layer] / (1 - 0.9 ** (step + 1)), second[layer] / (1 - 0.999 ** (step + 1))
            rate = lr * norms[layer] / math.sqrt(64) * (1 - step / steps)
            vector.data -= rate * mean / (square.sqrt() + 1e-8)
    return {layer: vector.detach() for layer, vector in vectors.items()}


@pytest.mark.parametrize("kind", ["qwen3", "gpt2"])
def test_vectors_are_those_of_adam_by_hand(tiny_folders: dict[str, Path], kind: str) -> None:
    model = loading.load(str(tiny_folders[kind]))
    found = trained_vector.fit(model, SYCOPHANCY, *sides(model), layers=LAYERS, seed=3, lr=0.1, epochs=2, batch_size=10)
    expected = by_hand(model, 0.1, 2, 2, seed=3)
    assert list(found.vectors) == list(LAYERS)
    for layer, vector in expected.items():
        assert float((found.vectors[layer] - vector).norm()) < 1e-2 * float(vector.norm())


def test_the_first_step_moves_every_vector_by_the_rate_in_residual_norms(qwen: ChatModel) -> None:
    found = trained_vector.fit(qwen, SYCOPHANCY, *sides(qwen), layers=LAYERS, lr=0.02, epochs=1, batch_size=100)
    norms = repe.residual_norms(qwen, SYCOPHANCY, LAYERS)
    for layer, vector in found.vectors.items():
        assert float(vector.norm()) == pytest.approx(0.02 * norms[layer], rel=1e-2)


def test_each_sign_lowers_the_loss_of_its_own_side(any_model: ChatModel) -> None:
    before, (positive, negative) = weights_digest(any_model.network), sides(any_model)
    found = trained_vector.fit(any_model, SYCOPHANCY, positive, negative, layers=LAYERS, lr=0.05, epochs=8)
    assert found.unit == "difference" and found.edited == "all"

    def losses(alpha: float) -> tuple[float, ...]:
        with torch.no_grad(), steer(any_model, found, alpha):
            return tuple(float(loss_by_hand(any_model.network, rows)) for rows in (positive, negative))

    up, none, down = losses(1.0), losses(0.0), losses(-1.0)
    assert up[0] < none[0] and down[1] < none[1]
    assert up[0] - up[1] < none[0] - none[1] < down[0] - down[1], "the signs are apart, not only better at the format"
    made = found.provenance
    assert made["first_loss"] == pytest.approx(sum(none), abs=0.1) and made["last_loss"] < made["first_loss"] - 0.1
    assert made["last_loss"] == pytest.approx(up[0] + down[1], abs=0.1)
    assert weights_digest(any_model.network) == before and hook_count(any_model.network) == 0


def cosine(one: ActivationDirection, other: ActivationDirection, layers: Sequence[int] = LAYERS) -> float:
    flat = [torch.cat([found.vectors[layer] for layer in layers]) for found in (one, other)]
    return float(torch.cosine_similarity(*flat, dim=0))


def test_seeds_change_a_fit_and_batches_do_not(qwen: ChatModel) -> None:
    first, again, single, other = (
        trained_vector.fit(
            qwen, SYCOPHANCY, *sides(qwen), layers=LAYERS, seed=seed, epochs=2, batch_size=8, micro_tokens=tokens
        )
        for seed, tokens in ((0, 4_096), (0, 4_096), (0, 1), (1, 4_096))
    )
    assert first.content_key == again.content_key
    assert cosine(first, single) > 0.999 > cosine(first, other)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_trains_the_same_vectors(
    qwen: ChatModel, tiny_folders: dict[str, Path], dtype: loading.Dtype
) -> None:
    half = loading.load(str(tiny_folders["qwen3"]), dtype=dtype)
    exact, found = (
        trained_vector.fit(model, SYCOPHANCY, *sides(qwen), layers=LAYERS, lr=0.05, epochs=4) for model in (qwen, half)
    )
    assert found.vectors[1].dtype == torch.float32 and cosine(exact, found) > 0.95
    assert found.provenance["last_loss"] == pytest.approx(exact.provenance["last_loss"], rel=0.02)


def test_a_rate_that_blows_up_is_an_error(qwen: ChatModel) -> None:
    with pytest.raises(UserError, match="not finite"):
        trained_vector.fit(qwen, SYCOPHANCY, *sides(qwen), layers=LAYERS, lr=math.inf, epochs=4)
