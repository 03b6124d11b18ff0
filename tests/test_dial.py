"""A Dial gives every row what `steer` gives it alone: any mix of directions, any kind of update."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from making import hook_count, logits, prompts, random_direction, weights_digest
from ws.algebra.delta import Delta
from ws.algebra.direction import Direction
from ws.base.errors import BaseMismatchError, UnsupportedFeatureError
from ws.edit.dial import Dial
from ws.edit.steering import steer
from ws.model import loading
from ws.model.loading import ChatModel


def small(model: ChatModel, seed: int) -> Direction:
    return random_direction(model, seed=seed, relative_norm=0.3)


def of_all_kinds(model: ChatModel) -> Direction:
    """Thin, dense, scaled by rows, and rotated updates of the same base."""
    thin = small(model, 7)
    deltas = dict(thin.deltas)
    for number, name in enumerate(sorted(deltas)):
        rows, columns = deltas[name].shape
        own = torch.Generator().manual_seed(number)
        if number % 4 == 1:
            deltas[name] = Delta.full(0.02 * torch.randn(rows, columns, generator=own))
        elif number % 4 == 2:
            deltas[name] = Delta.scaling((rows, columns), row=0.2 * torch.randn(rows, generator=own))
        elif number % 4 == 3:
            blocks = 0.1 * torch.randn(columns // 4, 4, 4, generator=own)
            deltas[name] = deltas[name] + Delta.scaling((rows, columns), mix=blocks)
    return Direction(deltas, thin.base, thin.layers)


def alone(model: ChatModel, row: Tensor, strengths: dict[Direction, float]) -> Tensor:
    with steer(model, strengths, mode="baked"):
        return logits(model.network, row[None])[0]


def assert_rows_are_those_of_steer(model: ChatModel, directions: list[Direction], strengths: Tensor) -> None:
    ids = prompts(model, rows=len(strengths))
    dial = Dial(model, directions)
    dial.turn(strengths)
    together = logits(model.network, ids)
    dial.remove()
    for row, found, of_row in zip(ids, together, strengths.tolist(), strict=True):
        wanted = alone(model, row, dict(zip(directions, of_row, strict=True)))
        assert (found - wanted).abs().max() <= 1e-4 * wanted.abs().max()


def test_rows_of_any_mix_are_those_of_steer_alone(any_model: ChatModel) -> None:
    directions = [small(any_model, 1), small(any_model, 2)]
    strengths = torch.tensor([[1.0, 0.0], [-0.5, 0.3], [0.0, 0.0], [0.0, -2.0]])
    assert_rows_are_those_of_steer(any_model, directions, strengths)


def test_updates_without_thin_factors_are_those_of_steer_alone(qwen: ChatModel) -> None:
    directions = [of_all_kinds(qwen), small(qwen, 2)]
    assert_rows_are_those_of_steer(qwen, directions, torch.tensor([[1.0, 0.0], [-1.0, 1.0], [0.0, 1.0], [0.0, 0.0]]))


def test_biases_turn_too(tiny_folders: dict[str, Path]) -> None:
    model = loading.load(str(tiny_folders["gpt2"]))
    shifts = {
        name: Delta.full(torch.randn(len(parameter), 1, generator=torch.Generator().manual_seed(number)))
        for number, (name, parameter) in enumerate(model.network.named_parameters())
        if name.endswith("proj.bias")
    }
    assert shifts
    direction = Direction(shifts, model.fingerprint)
    assert_rows_are_those_of_steer(model, [direction], torch.tensor([[0.5], [0.0], [-1.0]]))


def test_at_zero_the_model_is_the_base_bit_for_bit_and_removal_leaves_nothing(qwen: ChatModel) -> None:
    ids, before, hooks = prompts(qwen), weights_digest(qwen.network), hook_count(qwen.network)
    base = logits(qwen.network, ids)
    dial = Dial(qwen, [small(qwen, 1)])
    for nothing in (None, torch.zeros(len(ids), 1)):
        dial.turn(nothing)
        assert torch.equal(logits(qwen.network, ids), base)
    dial.turn(torch.ones(len(ids), 1))
    assert not torch.equal(logits(qwen.network, ids), base)
    dial.remove()
    assert torch.equal(logits(qwen.network, ids), base)
    assert weights_digest(qwen.network) == before and hook_count(qwen.network) == hooks


def test_another_base_and_updates_outside_linear_maps_are_refused(qwen: ChatModel) -> None:
    with pytest.raises(BaseMismatchError):
        Dial(qwen, [Direction(small(qwen, 1).deltas, "0" * 24)])
    norm = next(name for name, _ in qwen.network.named_parameters() if "norm" in name)
    size = len(qwen.network.get_parameter(norm))
    with pytest.raises(UnsupportedFeatureError, match=norm):
        Dial(qwen, [Direction({norm: Delta.full(torch.ones(size, 1))}, qwen.fingerprint)])
