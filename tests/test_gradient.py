"""Gradient steps as a direction: against steps by hand on a copy of the network, and that the model is left alone."""

from __future__ import annotations

import copy
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from making import generator, hook_count, weights_digest
from ws.base.errors import UserError
from ws.baselines import gradient
from ws.model import architecture, loading
from ws.model.chat import SupervisedTokens
from ws.model.loading import ChatModel


def sides(count: int = 7) -> tuple[list[SupervisedTokens], list[SupervisedTokens]]:
    """Rows of unequal lengths for both poles; the negative side has one row more."""
    fresh = generator(0)
    rows = [
        SupervisedTokens(torch.randint(5, 900, (8 + 3 * (n % 4),), generator=fresh).tolist(), 3 + n % 3)
        for n in range(2 * count + 1)
    ]
    return rows[:count], rows[count:]


def loss_by_hand(network: Any, rows: list[SupervisedTokens]) -> Tensor:
    """Mean loss per response token, row by row, without padding."""
    total, count = torch.zeros(()), 0
    for ids, start in rows:
        logp = network(input_ids=torch.tensor([ids]), use_cache=False).logits[0].log_softmax(dim=-1)
        total = total - sum(logp[at - 1, ids[at]] for at in range(start, len(ids)))
        count += len(ids) - start
    return total / count


def by_hand(model: ChatModel, count: int, norm: float, seed: int) -> dict[str, Tensor]:
    """The same direction from two copies of the network whose weights are moved."""
    names = [s.parameter for s in architecture.sites(model.network, architecture.layer_slice(model.layer_count))]
    networks = [copy.deepcopy(model.network).requires_grad_(True) for _ in range(2)]
    dealt = [gradient.deal(rows, count, f"gradient steps|{seed}") for rows in sides()]
    for step in range(count):
        found = [
            torch.autograd.grad(loss_by_hand(network, parts[step]), [network.get_parameter(name) for name in names])
            for network, parts in zip(networks, dealt, strict=True)
        ]
        squares = [sum(float(one.double().square().sum()) for one in of_pole) for of_pole in found]
        rate = norm / count / math.sqrt(sum(squares) / 2)
        for network, of_pole in zip(networks, found, strict=True):
            for name, one in zip(names, of_pole, strict=True):
                network.get_parameter(name).data -= rate * one
    contrast = {name: networks[0].get_parameter(name).data - networks[1].get_parameter(name).data for name in names}
    size = math.sqrt(sum(float(one.double().square().sum()) for one in contrast.values()))
    return {name: one * norm / size for name, one in contrast.items()}


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("kind", ["qwen3", "gpt2"])
def test_steps_are_those_taken_by_hand(tiny_folders: dict[str, Path], kind: str, count: int) -> None:
    """At a norm that bends the path: the last gradients are taken far from the base weights."""
    model = loading.load(str(tiny_folders[kind]))
    norm = 8.0
    found = gradient.steps(model, *sides(), count=count, norm=norm, seed=4)
    expected = by_hand(model, count, norm, seed=4)
    assert found.deltas.keys() == expected.keys() and found.norm() == pytest.approx(norm, rel=1e-5)
    for name, delta in found.deltas.items():
        assert float((delta.materialise() - expected[name]).norm()) < 2e-3 * float(expected[name].norm()), name
    if count > 1:
        straight = gradient.steps(model, *sides(), count=1, norm=norm, seed=4)
        assert found.cosine(straight) < 0.95, "more steps must not be one longer step"


def test_one_step_reads_all_rows_whatever_the_seed(qwen: ChatModel) -> None:
    one, other = (gradient.steps(qwen, *sides(), count=1, norm=2.0, seed=seed) for seed in (0, 1))
    for name, delta in one.deltas.items():
        assert torch.equal(delta.materialise(), other.deltas[name].materialise())


def test_batches_change_steps_by_rounding_only_and_seeds_by_more(qwen: ChatModel) -> None:
    first, again, other = (
        gradient.steps(qwen, *sides(), count=4, norm=2.0, seed=seed, micro_tokens=tokens)
        for seed, tokens in ((0, 4_096), (0, 1), (1, 4_096))
    )
    assert (first - again).norm() < 1e-4 and (first - other).norm() > 1e-2


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_steps_smaller_than_the_rounding_of_the_weights_add_up(
    qwen: ChatModel, tiny_folders: dict[str, Path], dtype: loading.Dtype
) -> None:
    half = loading.load(str(tiny_folders["qwen3"]), dtype=dtype)
    before = weights_digest(half.network)
    exact, found = (gradient.steps(model, *sides(), count=7, norm=0.05) for model in (qwen, half))
    flat = [torch.cat([delta.materialise().flatten() for delta in one.deltas.values()]) for one in (exact, found)]
    assert float(torch.cosine_similarity(*flat, dim=0)) > 0.995 and weights_digest(half.network) == before


def test_weights_are_put_back_if_a_later_step_fails(qwen: ChatModel, monkeypatch: pytest.MonkeyPatch) -> None:
    before, calls, take = weights_digest(qwen.network), [], gradient.mean_loss

    def failing(*given: Any) -> Any:
        calls.append(weights_digest(qwen.network))
        if len(calls) == 4:
            raise KeyboardInterrupt
        return take(*given)

    monkeypatch.setattr(gradient, "mean_loss", failing)
    with pytest.raises(KeyboardInterrupt):
        gradient.steps(qwen, *sides(), count=3, norm=2.0)
    assert len(set(calls)) == 3, "both poles begin at the base, and are apart at the second step"
    assert weights_digest(qwen.network) == before and hook_count(qwen.network) == 0
    assert not any(parameter.requires_grad for parameter in qwen.network.parameters())


def test_rows_are_dealt_out_once_and_evenly() -> None:
    rows = [str(n) for n in range(23)]
    dealt = gradient.deal(rows, 4, "a")
    assert sorted(len(part) for part in dealt) == [5, 6, 6, 6]
    assert sorted(row for part in dealt for row in part) == sorted(rows)
    assert all(int(one) < int(other) for part in dealt for one, other in pairwise(part))
    assert dealt == gradient.deal(rows, 4, "a") != gradient.deal(rows, 4, "b")
    assert gradient.deal(rows, 1, "a") == [rows]


def test_what_cannot_be_stepped_is_an_error(qwen: ChatModel) -> None:
    positive, negative = sides(3)
    for count in (0, 4):
        with pytest.raises(UserError, match=f"3 rows of one side cannot be dealt out to {count} steps"):
            gradient.steps(qwen, positive, negative, count=count, norm=1.0)
    with pytest.raises(UserError, match="same gradient"):
        gradient.steps(qwen, positive, positive, count=2, norm=1.0)
