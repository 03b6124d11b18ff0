"""Activations at the answer anchor: the place, the batch, the difference, and the prompts that they come from."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

from making import hook_count, random_direction, weights_digest
from ws.base.errors import UserError
from ws.baselines.repe import ActivationDirection
from ws.edit.condition import Condition, Context, Edit
from ws.edit.steering import steer
from ws.eval import sycophancy
from ws.fitting import behaviour
from ws.measure.plan import Plan, PreparedProbe
from ws.measure.probe import Probe, is_dev
from ws.measure.score import score
from ws.model.loading import ChatModel
from ws.subspace import capture, prompts
from ws.subspace.capture import Captured

PERSONA = Context("persona", "You are a candid assistant.")


@pytest.fixture(scope="module")
def probe() -> Probe:
    whole = prompts.of(behaviour.load("sycophancy")).fit
    return Probe(whole.name, "choice", whole.rows[:7], whole.answers)


def one_by_one(model: ChatModel, probe: Probe, system: str = "") -> Captured:
    """The slow twin: every row alone through the library, read from its hidden states at the last token."""
    network = copy.deepcopy(model.network)  # the library leaves hooks where it has recorded hidden states
    before, after = [], []
    for row in probe.rows:
        turns = [{"role": "system", "content": system}] if system else []
        ids = torch.tensor([model.chat.prompt([*turns, *row.messages], row.continuation)])
        with torch.no_grad():
            states = network(input_ids=ids, output_hidden_states=True, use_cache=False).hidden_states
        before.append(torch.stack([state[0, -1] for state in states[:-1]]))
        after.append(torch.stack([state[0, -1] for state in states[1:]]))
    return Captured(torch.stack(before, dim=1), torch.stack(after, dim=1), None, (), ())


def test_states_are_those_of_the_library_row_by_row_at_the_last_token(any_model: ChatModel, probe: Probe) -> None:
    found, slow = capture.at_anchor(any_model, probe), one_by_one(any_model, probe)
    assert found.before.shape == found.after.shape == (4, 7, 64)
    torch.testing.assert_close(found.before, slow.before, rtol=1e-4, atol=1e-5)
    # the library's last hidden state is behind the final norm
    torch.testing.assert_close(found.after[:-1], slow.after[:-1], rtol=1e-4, atol=1e-5)
    final = any_model.split.decoder.ln_f if "gpt2" in any_model.name else any_model.split.decoder.norm
    torch.testing.assert_close(final(found.after[-1]), slow.after[-1], rtol=1e-4, atol=1e-5)


def test_what_enters_a_layer_is_what_left_the_one_below(qwen: ChatModel, probe: Probe) -> None:
    found = capture.at_anchor(qwen, probe)
    assert torch.equal(found.before[1:], found.after[:-1])
    assert torch.equal(found.block, found.after.double() - found.before.double())


def test_the_captured_position_is_the_one_that_a_probe_scores(qwen: ChatModel, probe: Probe) -> None:
    plan = Plan.of(qwen, [Condition()], mode="auto", token_budget=None, cache_memory=0, per_pass=None)
    prepared = PreparedProbe.of(qwen, probe, Condition().context, (), plan)
    anchor = prepared.tokens[0][prepared.starts[0] :]
    assert qwen.chat.tokenizer.decode(anchor) in probe.rows[0].continuation  # the last token of the anchor
    states = qwen.split.decoder.norm(capture.at_anchor(qwen, probe).after[-1])
    log_p = qwen.split.logits(states).log_softmax(dim=-1)
    first, second = (
        torch.stack([log_p[:, ids[0]] for ids in qwen.chat.answers(word)]).logsumexp(0) for word in probe.answers
    )
    scores = score(qwen, [probe], [Condition()]).filter(metric="logratio")
    scored = dict(zip(scores["row"], scores["value"], strict=True))
    assert [scored[row.row] for row in probe.rows] == pytest.approx((first - second).tolist(), abs=1e-4)


@pytest.mark.parametrize("budget", [1, 100, 100_000])
def test_the_batch_does_not_matter(qwen: ChatModel, probe: Probe, budget: int) -> None:
    whole = capture.at_anchor(qwen, probe)
    other = capture.at_anchor(qwen, probe, token_budget=budget)
    torch.testing.assert_close(other.after, whole.after, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(other.mlp_inputs, whole.mlp_inputs, rtol=1e-4, atol=1e-5)


def test_personas_and_edits_are_those_of_the_condition(qwen: ChatModel, probe: Probe) -> None:
    spoken = capture.at_anchor(qwen, probe, Condition(PERSONA))
    torch.testing.assert_close(spoken.before, one_by_one(qwen, probe, PERSONA.system).before, rtol=1e-4, atol=1e-5)
    direction = random_direction(qwen, relative_norm=0.3)
    edited = capture.at_anchor(qwen, probe, Condition.of(Edit("dW", direction), 1.0))
    with steer(qwen, direction):
        slow = one_by_one(qwen, probe)
    torch.testing.assert_close(edited.after[:-1], slow.after[:-1], rtol=1e-4, atol=1e-5)


def test_capturing_leaves_no_trace(qwen: ChatModel, probe: Probe) -> None:
    before, hooks = weights_digest(qwen.network), hook_count(qwen.network)
    capture.at_anchor(qwen, probe, Condition.of(Edit("dW", random_direction(qwen)), 1.0))
    capture.all_tokens(qwen, probe)
    assert (weights_digest(qwen.network), hook_count(qwen.network)) == (before, hooks)


def test_a_vector_that_is_added_at_one_layer_is_the_difference_of_that_layer_alone(
    qwen: ChatModel, probe: Probe
) -> None:
    vector = torch.randn(64, generator=torch.Generator().manual_seed(0))
    edit = Edit("vector", ActivationDirection({2: vector}, qwen.fingerprint, "last"))
    plus, minus = (capture.at_anchor(qwen, probe, Condition.of(edit, alpha)) for alpha in (1.0, -1.0))
    block, cumulative = capture.block_difference(plus, minus), capture.cumulative_difference(plus, minus)
    # a hook on a layer's output changes what leaves it: twice the vector between +1 and -1
    torch.testing.assert_close(cumulative[2], 2 * vector.double().expand(7, -1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(block[2], cumulative[2])
    assert not block[:2].any() and not cumulative[:2].any()
    torch.testing.assert_close(block[3], cumulative[3] - cumulative[2])


def test_at_the_first_edited_layer_the_cumulative_difference_is_the_block_difference(
    qwen: ChatModel, probe: Probe
) -> None:
    edit = Edit("dW", random_direction(qwen, layers=[1, 2], relative_norm=0.2))
    plus, minus = (capture.at_anchor(qwen, probe, Condition.of(edit, alpha)) for alpha in (1.0, -1.0))
    block, cumulative = capture.block_difference(plus, minus), capture.cumulative_difference(plus, minus)
    assert torch.equal(block[1], cumulative[1]) and not cumulative[0].any()
    assert (block[2] - cumulative[2]).norm() > 0.1 * cumulative[2].norm()


def test_all_tokens_end_in_the_anchor_and_attention_sums_to_one(any_model: ChatModel, probe: Probe) -> None:
    found, at_anchor = capture.all_tokens(any_model, probe), capture.at_anchor(any_model, probe)
    for row, (states, attention, ids) in enumerate(zip(found.states, found.attention, found.ids, strict=True)):
        torch.testing.assert_close(states[:, -1], at_anchor.after[:, row], rtol=1e-4, atol=1e-5)
        assert attention.shape == (4, len(ids)) and states.shape == (4, len(ids), 64)
        torch.testing.assert_close(attention.sum(dim=1), torch.ones(4), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("first", "second", "shared"), [
    ([1, 2, 3], [9, 2, 3], 2), ([2, 3], [1, 2, 3], 2), ([1], [2], 0), ([1, 2], [1, 2], 2),
])  # fmt: skip
def test_prompts_under_different_personas_share_their_ending(first: list[int], second: list[int], shared: int) -> None:
    assert capture.shared_ending(first, second) == shared


# -------------------------------------------------------------------- prompts


@pytest.mark.parametrize("name", behaviour.names())
def test_prompts_are_disjoint_from_training_and_results_and_clusters_from_each_other(name: str) -> None:
    subject = behaviour.load(name)
    found = prompts.of(subject)
    asked = [row.messages[-1]["content"] for half in (found.fit, found.evaluation) for row in half.rows]
    reported = {row.messages[-1]["content"] for row in sycophancy.probe(subject).rows}
    assert not set(asked) & {*reported, *(prompt.text for prompt in subject.train)}
    fit, evaluation = (set(prompts.clusters(half)) for half in (found.fit, found.evaluation))
    assert not fit & evaluation and abs(len(fit) - len(evaluation)) <= 1
    assert all(row.continuation == subject.probe.anchor for row in (*found.fit.rows, *found.evaluation.rows))
    assert f"{len(found.fit.rows)} prompts" in found.counts and "[dev]" in found.counts


def test_without_dev_rows_the_dev_clusters_of_the_probe_are_taken() -> None:
    subject = behaviour.load("sycophancy")
    bare = replace(subject, probe=replace(subject.probe, dev=()))
    found = prompts.of(bare)
    assert all(is_dev(name) for half in (found.fit, found.evaluation) for name in prompts.clusters(half))
    few = replace(bare, probe=replace(bare.probe, items=bare.probe.items[:3]))
    with pytest.raises(UserError, match=r"dev clusters.*\[dev\]"):
        prompts.of(few)


def test_a_dev_row_that_is_trained_on_is_refused() -> None:
    subject = behaviour.load("sycophancy")
    shared = replace(subject.train[0], text=subject.probe.dev[0].question)
    with pytest.raises(UserError, match="training prompt"):
        prompts.of(replace(subject, train=(shared,)))
