"""The last feed-forward runs where something is read and nowhere else; what is read does not change."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from making import relative_error
from ws.measure import last_layer
from ws.model import architecture, forward, loading
from ws.model.loading import ChatModel
from ws.pocket import tiny

IDS = torch.arange(40).view(4, 10) * 17 % 900
COLUMNS = torch.tensor([9, 3, 6, 0])


def down(model: ChatModel) -> nn.Module:
    """The map of the last feed-forward that writes into the residual stream."""
    last = model.layer_count - 1
    (site,) = [one for one in architecture.sites(model.network, [last]) if "down" in one.roles]
    return model.network.get_submodule(site.module)


@contextmanager
def positions(model: ChatModel) -> Iterator[list[int]]:
    """How many positions go through the last feed-forward, call by call."""
    counts: list[int] = []

    def count(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        counts.append(inputs[0][..., 0].numel())

    handle = down(model).register_forward_pre_hook(count)
    try:
        yield counts
    finally:
        handle.remove()


@torch.no_grad()
def logits(model: ChatModel) -> Tensor:
    with forward.scoring_at(COLUMNS):
        return model.split.logits_at(IDS, torch.arange(4), COLUMNS)


def test_scored_positions_alone_go_through_and_logits_stay(any_model: ChatModel) -> None:
    whole = logits(any_model)
    last_layer.is_exact(any_model)
    with positions(any_model) as counts, last_layer.only_scored(any_model):
        found = logits(any_model)
    assert counts == [4]
    assert relative_error(found, whole) < 1e-5


def test_where_nothing_is_scored_it_does_not_run(qwen: ChatModel) -> None:
    last_layer.is_exact(qwen)
    with positions(qwen) as counts, last_layer.only_scored(qwen), torch.no_grad():
        with forward.scoring_at(torch.full((4,), -1)):
            qwen.split.hidden(IDS)
        assert counts == []
        qwen.split.hidden(IDS)  # nobody says what is read: all of it
    assert counts == [40]


def test_the_module_is_put_back_after_an_exception(qwen: ChatModel) -> None:
    with pytest.raises(ZeroDivisionError), last_layer.only_scored(qwen):
        raise ZeroDivisionError
    with positions(qwen) as counts:
        logits(qwen)
    assert counts == [40]


def test_a_feed_forward_that_mixes_positions_runs_whole(qwen: ChatModel, capsys: pytest.CaptureFixture[str]) -> None:
    model = loading.load(qwen.name)  # a fresh one, not tried out yet
    block = architecture.decoder_layers(model.network)[1][-1]
    whole = block.mlp.forward
    block.mlp.forward = lambda hidden: whole(hidden) + hidden.mean(dim=1, keepdim=True)
    expected = logits(model)
    assert not last_layer.is_exact(model)
    assert "the last feed-forward does not run alone" in capsys.readouterr().err
    with last_layer.only_scored(model):
        assert torch.equal(logits(model), expected)


def test_mixtures_of_experts_run_whole(tmp_path: Path) -> None:
    tiny.make("qwen3-moe", tmp_path / "moe", layers=2)
    model = loading.load(str(tmp_path / "moe"))
    expected = logits(model)
    with last_layer.only_scored(model):
        assert torch.equal(logits(model), expected)
