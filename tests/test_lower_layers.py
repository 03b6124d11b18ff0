"""Layers below an Edit run once: scores are equal bit for bit, and the layers really rest."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from transformers import DynamicCache

from making import hook_count, random_direction
from ws.algebra.delta import Delta
from ws.algebra.direction import Direction
from ws.baselines.repe import ActivationDirection
from ws.edit.condition import Condition, Context, Edit
from ws.measure import lower_layers
from ws.measure.lower_layers import Memory, Recordings
from ws.measure.probe import Probe, ProbeRow
from ws.measure.score import score
from ws.model import architecture
from ws.model.chat import ask
from ws.model.loading import ChatModel

CLAIMS = ("cats like milk and bread", "the moon is made of old bread", "owls eat leaves")


def probes() -> list[Probe]:
    """A choice probe that shares prefixes, one that does not, and both kinds that read texts."""
    shared = tuple(
        ProbeRow(f"{number}/{verb}", tuple(ask(f"I think that {claim}. Do you {verb}?")), "My answer: **")
        for number, claim in enumerate(CLAIMS)
        for verb in ("agree", "like it or not")
    )
    texts = tuple(ProbeRow(str(n), tuple(ask(f"Say it {n}")), claim) for n, claim in enumerate(CLAIMS))
    single = Probe("single", "choice", (ProbeRow("0", tuple(ask("Why?")), "My answer: **"),))
    return [Probe("shared", "choice", shared), single, Probe("likelihood", "likelihood", texts),
            Probe("divergence", "divergence", texts)]  # fmt: skip


def edits(model: ChatModel) -> list[Edit]:
    """Directions and Effects that begin at the first, the second, the third layer and at the last one."""
    width = model.network.get_input_embeddings().weight.shape[1]
    vector = torch.randn(width, generator=torch.Generator().manual_seed(0))
    last = model.layer_count - 1
    return [
        Edit("low", random_direction(model, relative_norm=0.3, layers=[0, 1])),
        Edit("second", random_direction(model, relative_norm=0.3, layers=[1])),
        Edit("added", ActivationDirection({2: vector}, model.fingerprint, edited="last")),
        Edit("top", random_direction(model, relative_norm=0.3, layers=[last])),
    ]


@contextmanager
def counted_layers(model: ChatModel) -> Iterator[list[int]]:
    """How often each layer's attention ran within the block."""
    _, blocks = architecture.decoder_layers(model.network)
    counts = [0] * len(blocks)

    def counting(layer: int) -> object:
        def hook(*_: object) -> None:
            counts[layer] += 1

        return hook

    inner = [next(child for name, child in block.named_children() if "att" in name) for block in blocks]
    handles = [module.register_forward_hook(counting(layer)) for layer, module in enumerate(inner)]  # type: ignore[arg-type]
    yield counts
    for handle in handles:
        handle.remove()


def conditions(model: ChatModel) -> list[Condition]:
    """Every edit at two strengths, two of them together, and another context."""
    made = edits(model)
    return [
        *(Condition.of(edit, alpha) for edit in made for alpha in (1.0, -0.5)),
        Condition(edits=((made[1], 1.0), (made[3], -1.0))),
        Condition.of(made[3], 1.0, Context("pirate", "You are a pirate.")),
    ]


def test_scores_are_bit_for_bit_those_of_all_layers(any_model: ChatModel) -> None:
    wanted = conditions(any_model)
    assert lower_layers.is_exact(any_model)
    played = score(any_model, probes(), wanted)
    whole = score(any_model, probes(), wanted, cache_memory=0)
    assert played.equals(whole)
    assert hook_count(any_model.network) == 0
    _, blocks = architecture.decoder_layers(any_model.network)
    assert not any("forward" in block.__dict__ for block in blocks)


def test_run_time_edits_play_back_too(qwen: ChatModel) -> None:
    wanted = conditions(qwen)
    assert score(qwen, probes(), wanted, mode="runtime").equals(
        score(qwen, probes(), wanted, mode="runtime", cache_memory=0)
    )


def test_layers_below_an_edit_run_once(qwen: ChatModel) -> None:
    top = edits(qwen)[3]
    wanted = [Condition.of(top, alpha) for alpha in (-2.0, -1.0, 1.0, 2.0)]
    _ = score(qwen, probes()[:1], wanted)  # what is checked once per model has run
    with counted_layers(qwen) as counts:
        score(qwen, probes()[:1], wanted)
    assert counts[-1] == 5 * counts[0] and counts[0] == counts[-2]


def test_a_direction_outside_the_layers_runs_all_of_them(qwen: ChatModel) -> None:
    low, second, added, top = edits(qwen)
    network = qwen.network
    assert lower_layers.first_edited(network, Condition()) == qwen.layer_count
    assert [lower_layers.first_edited(network, Condition.of(e, 1.0)) for e in (low, second, added, top)] == [
        0, 1, 2, qwen.layer_count - 1,
    ]  # fmt: skip
    assert isinstance(top.effect, Direction)
    norm = next(name for name, _ in network.named_parameters() if name.endswith("norm.weight") and "layers" not in name)
    size = network.get_parameter(norm).numel()
    outside = Direction({**top.effect.deltas, norm: Delta.full(torch.ones(size, 1))}, top.effect.base)
    assert lower_layers.first_edited(network, Condition.of(Edit("outside", outside), 1.0)) == 0


def test_memory_goes_to_the_layers_that_save_most(qwen: ChatModel) -> None:
    width = qwen.network.config.hidden_size * qwen.dtype.itemsize
    memory = Memory(10 * width)
    kept = Recordings(qwen, [1, 2, 2, qwen.layer_count, 0], 10, memory)
    assert kept._layers == {2} and memory.left == 0
    kept.release()
    assert memory.left == 10 * width
    assert Recordings(qwen, [1], 11, memory)._layers == set() and memory.left == 10 * width


def test_little_memory_changes_no_score(qwen: ChatModel) -> None:
    wanted = conditions(qwen)
    whole = score(qwen, probes(), wanted, cache_memory=0)
    for kilobytes in (1, 20, 60):
        assert score(qwen, probes(), wanted, cache_memory=kilobytes * 1024).equals(whole)


def test_an_interrupted_pass_leaves_no_recording(qwen: ChatModel) -> None:
    kept = Recordings(qwen, [2], 10, Memory(2**30))
    ids = torch.ones(1, 4, dtype=torch.long)
    with pytest.raises(KeyboardInterrupt), kept.used(qwen.layer_count):
        qwen.split.hidden(ids)
        raise KeyboardInterrupt
    assert not kept._kept and hook_count(qwen.network) == 0


def test_a_model_that_does_not_play_back_says_so_and_runs_whole(
    qwen: ChatModel, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wanted = [Condition.of(edits(qwen)[3], 1.0)]
    expected = score(qwen, probes()[:1], wanted, cache_memory=0)
    monkeypatch.setattr(lower_layers.is_exact, "_known", {})
    # a cache that asks its empty first layer for its length hides what came before
    monkeypatch.setattr(lower_layers, "new_cache", lambda model: DynamicCache(config=model.network.config))
    assert score(qwen, probes()[:1], wanted).equals(expected)
    assert "recorded states do not compose" in capsys.readouterr().err
    assert not Recordings(qwen, [2], 10, Memory(2**30))._layers


def test_states_of_rows_are_those_that_enter(any_model: ChatModel) -> None:
    rows = [any_model.chat.prompt(ask(claim)) for claim in CLAIMS]
    states = lower_layers.entering(any_model, 2, rows)
    if any_model.network.config.model_type == "gpt2":
        assert states is None, "dropout in the layers below makes them others every time"
        return
    assert states is not None and [len(state) for state in states] == [len(row) for row in rows]
    ids = torch.tensor([rows[1]])
    recording = lower_layers.Recording(2)
    with torch.no_grad(), lower_layers._recording(any_model.network, recording):
        expected = any_model.split.hidden(ids)
    torch.testing.assert_close(recording.states[0][0], states[1], rtol=1e-5, atol=1e-5)
    with torch.no_grad(), lower_layers.playing(any_model.network, lower_layers.Recording(2, [states[1][None]])):
        torch.testing.assert_close(any_model.split.hidden(ids), expected, rtol=1e-5, atol=1e-5)
    assert lower_layers.entering(any_model, 2, rows) is states, "asked again, the same"
    assert hook_count(any_model.network) == 0


def test_states_of_rows_are_kept_within_the_memory(qwen: ChatModel, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [qwen.chat.prompt(ask(claim)) for claim in CLAIMS]
    size = sum(map(len, rows)) * qwen.network.config.hidden_size * 4
    monkeypatch.setattr(lower_layers, "_row_states", weakref.WeakKeyDictionary())
    monkeypatch.setattr(qwen, "cache_memory", size)
    first = lower_layers.entering(qwen, 1, rows)
    assert lower_layers.entering(qwen, 2, rows) is not first
    assert len(lower_layers._row_states[qwen.network]) == 1, "the older ones made room"
    monkeypatch.setattr(qwen, "cache_memory", size - 1)
    assert lower_layers.entering(qwen, 1, rows) is None
    assert lower_layers.entering(qwen, 0, rows) is None
