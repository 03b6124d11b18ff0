"""Shared prefixes are computed once and change nothing: every row as if it had been alone."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from making import hook_count, random_direction
from ws.baselines.repe import ActivationDirection
from ws.edit.condition import Condition, Context, Edit
from ws.eval import dilemmas
from ws.measure import shared_prefix
from ws.measure.probe import Probe, ProbeRow
from ws.measure.score import score
from ws.measure.shared_prefix import Tree, plan
from ws.model.chat import ask
from ws.model.loading import ChatModel

ROWS = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=30), min_size=2, max_size=12)


@given(ROWS)
def test_a_tree_holds_every_row_once_and_whole(rows: list[list[int]]) -> None:
    tree = plan(rows)
    rebuilt = {
        index: [*tree.trunk, *branch.shared, *leaf]
        for branch in tree.branches
        for index, leaf in zip(branch.rows, branch.leaves, strict=True)
    }
    assert rebuilt == dict(enumerate(rows))
    assert sum(len(branch.rows) for branch in tree.branches) == len(rows)
    assert all(leaf for branch in tree.branches for leaf in branch.leaves)
    assert 0 <= tree.saving < 1 and tree.whole == sum(map(len, rows))


def test_neighbours_share_a_branch_where_it_is_worth_one() -> None:
    trunk, one, other = list(range(10)), list(range(20, 40)), list(range(50, 70))
    rows = [[*trunk, *other, 1], [*trunk, *one, 1, 2], [*trunk, *one, 3], [*trunk, *other, 2, 3]]
    tree = plan(rows)
    assert tree.trunk == tuple(trunk)
    assert {branch.rows: branch.shared for branch in tree.branches} == {(1, 2): tuple(one), (0, 3): tuple(other)}
    assert tree.tokens == 10 + 20 + 20 + 1 + 2 + 1 + 2
    short = plan([[*trunk, 20, 1], [*trunk, 20, 2]])
    assert [branch.shared for branch in short.branches] == [(), ()], "one token is not worth a level"


def whole_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_prefix, "worthwhile", lambda *_: None)


CLAIMS = ("cats like milk and bread and cold water", "the moon is made of old bread and milk", "owls eat leaves")


def pairs() -> Probe:
    """Claims with two questions each, the last with one; short enough for the window of the Gemma model."""
    rows = [
        ProbeRow(f"{number}/{verb}", tuple(ask(f"I think that {claim}. Do you {verb}?")), "My answer: **")
        for number, claim in enumerate(CLAIMS)
        for verb in ("agree", "like it or not")
    ]
    return Probe("pairs", "choice", tuple(rows[:-1]))


def test_the_dilemma_probe_saves_about_half_of_its_tokens(qwen: ChatModel) -> None:
    tokens = [qwen.chat.prompt(row.messages, row.continuation) for row in dilemmas.probe().rows]
    tree = shared_prefix.worthwhile(qwen, tokens)
    assert isinstance(tree, Tree) and tree.saving > 0.4


def test_scores_through_the_tree_are_those_of_whole_rows(any_model: ChatModel, monkeypatch: pytest.MonkeyPatch) -> None:
    direction = random_direction(any_model, relative_norm=0.3)
    width = any_model.network.get_input_embeddings().weight.shape[1]
    vectors = {2: torch.randn(width, generator=torch.Generator().manual_seed(0))}
    edits = [
        Edit("direction", direction),
        Edit("everywhere", ActivationDirection(vectors, any_model.fingerprint)),
        Edit("last", ActivationDirection(vectors, any_model.fingerprint, edited="last")),
    ]
    conditions = [
        *(Condition.of(edit, alpha) for edit in edits for alpha in (1.0, -1.0)),
        Condition(Context("pirate", "You are a pirate.")),
    ]
    tokens = [any_model.chat.prompt(row.messages, row.continuation) for row in pairs().rows]
    assert shared_prefix.worthwhile(any_model, tokens) is not None
    shared = score(any_model, [pairs()], conditions)
    whole_rows(monkeypatch)
    alone = score(any_model, [pairs()], conditions)
    assert shared.drop("value").equals(alone.drop("value"))
    assert (shared["value"] - alone["value"]).abs().max() < 2e-4  # type: ignore[operator]
    assert hook_count(any_model.network) == 0


def test_side_paths_act_on_the_shared_part_too(qwen: ChatModel, monkeypatch: pytest.MonkeyPatch) -> None:
    conditions = [Condition.of(Edit("d", random_direction(qwen, relative_norm=0.3)), 1.0)]
    baked = score(qwen, [pairs()], conditions, mode="baked")
    hooked = score(qwen, [pairs()], conditions, mode="runtime")
    whole_rows(monkeypatch)
    plain = score(qwen, [pairs()], conditions, mode="runtime")
    assert (hooked["value"] - plain["value"]).abs().max() < 2e-4  # type: ignore[operator]
    assert (hooked["value"] - baked["value"]).abs().max() < 2e-4  # type: ignore[operator]


@pytest.mark.parametrize("budget", [128, 512, 8192])
def test_blocks_of_any_size_give_the_same_rows(qwen: ChatModel, budget: int) -> None:
    base = score(qwen, [pairs()], [Condition()], token_budget=4096)
    other = score(qwen, [pairs()], [Condition()], token_budget=budget)
    assert (base["value"] - other["value"]).abs().max() < 2e-4  # type: ignore[operator]


def test_rows_without_much_in_common_are_scored_whole(qwen: ChatModel) -> None:
    rows = [qwen.chat.prompt(ask(f"{word} " * 30)) for word in ("cats", "moon", "bread", "owls")]
    assert shared_prefix.worthwhile(qwen, rows) is None
    assert shared_prefix.worthwhile(qwen, rows[:1]) is None


def test_rows_longer_than_a_sliding_window_are_scored_whole(
    any_model: ChatModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = [any_model.chat.prompt(row.messages, row.continuation) for row in pairs().rows]
    monkeypatch.setattr(any_model.network.config, "sliding_window", 20, raising=False)
    assert shared_prefix.worthwhile(any_model, tokens) is None


def test_a_model_that_cannot_share_says_so_and_scores_whole_rows(
    qwen: ChatModel, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = score(qwen, [pairs()], [Condition()])

    def broken(*_: object) -> object:
        raise TypeError("no cache of this kind")

    monkeypatch.setattr(shared_prefix, "last_logits", broken)
    monkeypatch.setattr(shared_prefix.is_exact, "_known", {})
    found = score(qwen, [pairs()], [Condition()])
    assert (found["value"] - expected["value"]).abs().max() < 2e-4  # type: ignore[operator]
    assert "shared prefixes do not compose" in capsys.readouterr().err


def test_a_wrong_tree_is_found_out(qwen: ChatModel, monkeypatch: pytest.MonkeyPatch) -> None:
    assert shared_prefix._matches_whole_rows(qwen)
    monkeypatch.setattr(shared_prefix, "_hide_padding", lambda trunk, width, lengths, leaf: torch.ones(
        len(lengths), trunk + width + leaf, dtype=torch.long))  # fmt: skip
    assert not shared_prefix._matches_whole_rows(qwen)


def test_a_single_row_of_a_probe_is_fine(qwen: ChatModel) -> None:
    probe = Probe("one", "choice", (ProbeRow("0", tuple(ask("Why?")), "My answer: **"),))
    assert len(score(qwen, [probe], [Condition()]).filter(metric="logratio")) == 1
