"""The forward pass in two parts, batches and padding."""

from __future__ import annotations

import copy
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from making import logits, prompts, random_direction, relative_error
from ws.edit.condition import Condition, Edit
from ws.edit.steering import steer
from ws.measure.probe import Probe, ProbeRow
from ws.measure.score import score
from ws.model import forward, loading
from ws.model.chat import ask
from ws.model.forward import SplitForward, pad_right, plan_batches
from ws.model.loading import ChatModel

AGREE = 1e-5
PROPERTY = settings(deadline=None, max_examples=100, derandomize=True)
LENGTHS = st.lists(st.integers(1, 60), max_size=40)


# -------------------------------------------------------------------- split and whole


def test_head_of_trunk_is_the_whole_model(any_model: ChatModel) -> None:
    assert any_model.split.is_split
    ids = prompts(any_model, rows=3, tokens=12)
    with torch.no_grad():
        hidden = any_model.split.hidden(ids)
        parts = any_model.split.logits(hidden.flatten(0, 1))
    assert hidden.shape[:2] == (3, 12)
    assert relative_error(parts, logits(any_model.network, ids).flatten(0, 1)) < AGREE


@pytest.mark.parametrize("mode", ["runtime", "baked"])
def test_the_split_holds_under_steering(any_model: ChatModel, mode: str) -> None:
    ids = prompts(any_model, rows=2)
    base = logits(any_model.network, ids).flatten(0, 1)
    with steer(any_model, random_direction(any_model), 1.0, mode=mode), torch.no_grad():  # type: ignore[arg-type]
        parts = any_model.split.logits(any_model.split.hidden(ids).flatten(0, 1))
        whole = logits(any_model.network, ids).flatten(0, 1)
    assert relative_error(parts, whole) < AGREE < 1e-2 < relative_error(whole, base)


@pytest.mark.parametrize("columns", [[0, 0, 0], [11, 11, 11], [3, 7, 0]])
def test_logits_at_picks_single_positions(any_model: ChatModel, columns: list[int]) -> None:
    ids = prompts(any_model, rows=3, tokens=12)
    rows, at = torch.tensor([2, 0, 1]), torch.tensor(columns)
    with torch.no_grad():
        found = any_model.split.logits_at(ids, rows, at)
    assert found.dtype == torch.float32 and found.is_contiguous()
    assert relative_error(found, logits(any_model.network, ids)[rows, at]) < AGREE


def test_several_positions_of_one_row(any_model: ChatModel) -> None:
    ids = prompts(any_model, rows=1, tokens=12)
    rows, at = torch.zeros(5, dtype=torch.long), torch.tensor([0, 4, 4, 8, 11])
    with torch.no_grad():
        found = any_model.split.logits_at(ids, rows, at)
    assert torch.equal(found[1], found[2])
    assert relative_error(found, logits(any_model.network, ids)[0, at]) < AGREE


def test_logits_are_fp32_on_a_bf16_model(any_model: ChatModel) -> None:
    half = loading.load(any_model.name, dtype="bfloat16")
    ids, rows, at = prompts(any_model, rows=2), torch.tensor([0, 1]), torch.tensor([8, 3])
    with torch.no_grad():
        found = half.split.logits_at(ids, rows, at)
    assert half.split.is_split and found.dtype == torch.float32
    assert relative_error(found, logits(half.network, ids)[rows, at]) < 1e-2


def test_answers_are_read_in_fp32_on_a_bf16_model(any_model: ChatModel) -> None:
    """The head of a large model gives logits near 20, which bf16 rounds to eighths."""
    half = loading.load(any_model.name, dtype="bfloat16")
    ids, rows, at, tokens = prompts(any_model, rows=2), torch.tensor([0, 1]), torch.tensor([8, 3]), torch.tensor([5, 9])
    head = half.split.head
    with torch.no_grad():
        states = half.split.hidden(ids)[rows, at]
        bias = 0.0 if head.bias is None else head.bias[tokens].double()
        exact = states.double() @ head.weight[tokens].double().T + bias
        rounded = half.split.logits_at(ids, rows, at)
        with forward.exact_for(tokens):
            found = half.split.logits_at(ids, rows, at)
            handle = head.register_forward_hook(lambda _m, _i, output: output + 1)
            hooked = half.split.logits_at(ids, rows, at)
            handle.remove()
    assert relative_error(found[:, tokens], exact) < 1e-6 < 1e-4 < relative_error(rounded[:, tokens], exact)
    others = [token for token in range(found.shape[1]) if token not in tokens.tolist()]
    assert torch.equal(found[:, others], rounded[:, others])
    assert relative_error(hooked[:, tokens], exact + 1) < 2e-2, "what hangs on the head is part of it"
    assert torch.equal(half.split.logits_at(ids, rows, at).detach(), rounded)


def test_a_probe_is_read_with_its_answers_in_fp32(qwen: ChatModel) -> None:
    half = loading.load(qwen.name, dtype="bfloat16")
    row = half.chat.prompt(ask("Is rain good?"), "My answer: **")
    probe = Probe("one", "choice", (ProbeRow("rain", tuple(ask("Is rain good?")), "My answer: **"),))
    (value,) = score(half, [probe], [Condition()]).filter(metric="logratio")["value"]
    ids = [[token for (token,) in half.chat.answers(word)] for word in probe.answers]
    with torch.no_grad():
        state = half.split.hidden(torch.tensor([row]))[0, -1].double()
    weight = half.split.head.weight.double()
    first, second = ((state @ weight[group].T).logsumexp(dim=0) for group in ids)
    assert value == pytest.approx(float(first - second), abs=1e-5)


def test_a_model_with_capped_logits_is_never_split(
    tiny_folders: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    model = loading.load(str(tiny_folders["gemma3"]))
    ids, rows, at = prompts(model, rows=2), torch.tensor([0, 1]), torch.tensor([8, 3])
    uncapped = logits(model.network, ids)
    model.network.config.final_logit_softcapping = 0.05
    capped = logits(model.network, ids)
    assert relative_error(capped, uncapped) > 1e-2  # the model does heed the setting
    split = SplitForward(model.network)
    assert not split.is_split
    assert "Gemma3ForCausalLM" in capsys.readouterr().err
    with torch.no_grad():
        assert torch.equal(split.logits_at(ids, rows, at), capped[rows, at])


def test_a_model_with_scaled_logits_is_never_split(qwen: ChatModel, capsys: pytest.CaptureFixture[str]) -> None:
    network = copy.deepcopy(qwen.network)
    network.model.norm.register_forward_hook(lambda _module, _inputs, output: output)
    assert SplitForward(network).is_split
    real = network.forward

    def scaled(*args: object, **kwargs: object) -> object:
        output = real(*args, **kwargs)
        output.logits = output.logits * 1.01
        return output

    network.forward = scaled
    assert not SplitForward(network).is_split
    assert capsys.readouterr().err.startswith("warning: ")


# -------------------------------------------------------------------- padding


def test_a_row_gives_the_same_logits_alone_and_in_a_padded_batch(any_model: ChatModel) -> None:
    rows = [prompts(any_model, rows=1, tokens=length, seed=length)[0].tolist() for length in (17, 3, 90, 1, 16)]
    batch = pad_right(rows, torch.device("cpu"))
    with torch.no_grad():
        together = any_model.split.hidden(batch)
        for index, row in enumerate(rows):
            alone = logits(any_model.network, torch.tensor([row]))[0]
            found = any_model.split.logits(together[index, : len(row)])
            assert relative_error(found, alone) < AGREE


def test_what_is_behind_a_row_does_not_reach_it(any_model: ChatModel) -> None:
    ids = prompts(any_model, rows=1, tokens=12)
    other = ids.clone()
    other[0, 7:] = (other[0, 7:] + 1) % 100
    found = [logits(any_model.network, tokens)[0] for tokens in (ids, other)]
    assert relative_error(found[0][:7], found[1][:7]) < AGREE
    assert relative_error(found[0][7:], found[1][7:]) > 1e-2


def test_padding_keeps_the_tokens_and_fills_with_zeros() -> None:
    padded = pad_right([[5, 6, 7], [8], [9, 1]], torch.device("cpu"))
    assert padded.tolist() == [[5, 6, 7], [8, 0, 0], [9, 1, 0]]
    assert padded.dtype == torch.int64


# -------------------------------------------------------------------- batches


@PROPERTY
@given(LENGTHS, st.integers(1, 200))
def test_batches_cover_every_row_once(lengths: list[int], budget: int) -> None:
    batches = plan_batches(lengths, budget)
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    assert all(batches)


@PROPERTY
@given(LENGTHS, st.integers(1, 200))
def test_batches_stay_within_the_budget_unless_one_row_alone_is_longer(lengths: list[int], budget: int) -> None:
    for batch in plan_batches(lengths, budget):
        assert len(batch) == 1 or len(batch) * max(lengths[index] for index in batch) <= budget


@PROPERTY
@given(LENGTHS, st.integers(1, 200))
def test_the_longest_rows_come_first(lengths: list[int], budget: int) -> None:
    ordered = [lengths[index] for batch in plan_batches(lengths, budget) for index in batch]
    assert ordered == sorted(lengths, reverse=True)


@PROPERTY
@given(LENGTHS, st.integers(1, 200))
def test_no_batch_could_have_taken_the_next_row(lengths: list[int], budget: int) -> None:
    for batch, following in pairwise(plan_batches(lengths, budget)):
        assert (len(batch) + 1) * lengths[batch[0]] > budget
        assert following


def test_equal_lengths_keep_their_order() -> None:
    assert plan_batches([4, 4, 4, 4, 4], 8) == [[0, 1], [2, 3], [4]]
    assert plan_batches([], 8) == []
    assert plan_batches([9, 2, 3], 6) == [[0], [2, 1]]


@pytest.mark.parametrize("block", [1, 5, 1000])
def test_losses_by_blocks_are_those_of_all_logits_with_their_gradients(
    any_model: ChatModel, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    split = any_model.split
    vocabulary, width = split.head.weight.shape
    monkeypatch.setattr(forward, "LOGIT_BYTES", 4 * vocabulary * block)
    maker = torch.Generator().manual_seed(0)
    targets = torch.randint(vocabulary, (13,), generator=maker)
    weights = torch.rand(13, generator=maker)
    states = torch.randn(13, width, generator=maker)
    results = []
    for ours in (True, False):
        leaf = states.clone().requires_grad_()
        if ours:
            losses = split.losses(leaf * 1.5, targets)
        else:
            losses = torch.nn.functional.cross_entropy(split.logits(leaf * 1.5), targets, reduction="none")
        (losses * weights).sum().backward()
        results.append((losses.detach(), leaf.grad))
    torch.testing.assert_close(results[0][0], results[1][0])
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-4, atol=1e-6)
    with torch.no_grad():
        torch.testing.assert_close(split.losses(states * 1.5, targets), results[0][0])


def test_texts_are_scored_alike_in_blocks_of_positions(qwen: ChatModel, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = tuple(ProbeRow(text, tuple(ask(text)), "Boil some water and wait.", text) for text in ("Tea?", "And then?"))
    probes = [Probe("nll", "likelihood", rows), Probe("kl", "divergence", rows)]
    condition = Condition.of(Edit("d", random_direction(qwen, relative_norm=0.2)), 1.0)
    whole = score(qwen, probes, [condition])
    monkeypatch.setattr(forward, "LOGIT_BYTES", 4 * qwen.network.get_input_embeddings().weight.shape[0] * 3)
    assert qwen.split.positions_at_once == 3
    found = score(qwen, probes, [condition])
    assert found.drop("value").equals(whole.drop("value"))
    assert found["value"].to_list() == pytest.approx(whole["value"].to_list(), abs=1e-6)
