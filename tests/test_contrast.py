"""Which of two replies is likelier: against whole rows by hand, however rows are batched, shared and edited."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import polars as pl
import pytest
import torch

from making import assert_one_line, gaussian, hook_count, random_direction
from ws.base.errors import UserError
from ws.baselines.repe import ActivationDirection
from ws.edit.condition import Condition, Context, Edit
from ws.edit.steering import under
from ws.measure import shared_prefix
from ws.measure.probe import Kind, Probe, ProbeRow
from ws.measure.score import SCHEMA, score
from ws.model import forward
from ws.model.chat import ask
from ws.model.loading import ChatModel

CLAIMS = ("cats like milk", "the moon is made of old bread", "owls eat leaves")
REPLIES = (
    ("Yes, I agree.", "No, I disagree completely."),
    ("You are right about this.", "You are wrong about this."),
)


def contrast(claims: tuple[str, ...] = CLAIMS, *, closed: bool = True) -> Probe:
    """Two wordings of opposite replies to each claim; the first pair has replies of unequal length."""
    rows = [
        ProbeRow(f"{number}/{wording}", tuple(ask(f"I think that {claim}.")), "", replies=pair)
        for number, claim in enumerate(claims)
        for wording, pair in enumerate(REPLIES)
    ]
    return Probe("replies", "contrast", tuple(rows), closed=closed)


def by_hand(
    model: ChatModel, condition: Condition, probe: Probe, *, from_reply: bool = False
) -> dict[str, dict[str, float]]:
    """Both metrics of every row, from whole unpadded rows in fp64. from_reply: effects act at scored positions only."""
    found = {}
    system = [{"role": "system", "content": condition.context.system}] if condition.context.system else []
    for row in probe.rows:
        assert row.replies is not None
        total, mean = [], []
        for reply in row.replies:
            ids, start = model.chat.supervised([*system, *row.messages], reply, closed=probe.closed)  # type: ignore[list-item]
            where: AbstractContextManager[Any] = nullcontext()
            if from_reply:
                where = forward.scoring_from(torch.tensor([start - 1]))
            with torch.no_grad(), under(model, condition), where:
                logp = model.network(input_ids=torch.tensor([ids]), use_cache=False).logits[0].double().log_softmax(-1)
            said = [float(logp[position - 1, ids[position]]) for position in range(start, len(ids))]
            total.append(sum(said))
            mean.append(sum(said) / len(said))
        found[row.row] = {"logratio": total[0] - total[1], "logratio_per_token": mean[0] - mean[1]}
    return found


def measured(table: pl.DataFrame, condition: Condition) -> dict[str, dict[str, float]]:
    key = condition.key()
    rows = table.filter(pl.col("edit") == key["edit"], pl.col("alpha") == key["alpha"],
                        pl.col("context") == key["context"])  # fmt: skip
    found: dict[str, dict[str, float]] = {}
    for row, metric, value in rows.select("row", "metric", "value").iter_rows():
        found.setdefault(row, {})[metric] = value
    return found


def assert_equal(found: dict[str, dict[str, float]], wanted: dict[str, dict[str, float]]) -> None:
    assert found.keys() == wanted.keys()
    for row, metrics in wanted.items():
        assert found[row] == pytest.approx(metrics, abs=1e-4)


def in_layer_2(model: ChatModel, edited: str) -> ActivationDirection:
    width = model.network.get_input_embeddings().weight.shape[1]
    return ActivationDirection({2: gaussian(width, seed=0)}, model.fingerprint, edited)  # type: ignore[arg-type]


def distance(one: dict[str, dict[str, float]], other: dict[str, dict[str, float]]) -> float:
    return max(abs(one[row]["logratio"] - other[row]["logratio"]) for row in one)


def test_the_log_ratio_is_that_of_whole_replies_with_their_end_of_turn(any_model: ChatModel) -> None:
    edit = Edit("d", random_direction(any_model, relative_norm=0.3))
    conditions = [Condition(), Condition.of(edit, 1.0), Condition.of(edit, -1.0), Condition(Context("pirate", "Arr!"))]
    table = score(any_model, [contrast()], conditions)
    assert table.schema == SCHEMA and set(table["metric"]) == {"logratio", "logratio_per_token"}
    wanted = [by_hand(any_model, condition, contrast()) for condition in conditions]
    for condition, values in zip(conditions, wanted, strict=True):
        assert_equal(measured(table, condition), values)
    assert all(distance(wanted[0], other) > 0.05 for other in wanted[1:]), "the conditions differ"


def test_per_token_is_not_the_total_by_one_length(qwen: ChatModel) -> None:
    found = measured(score(qwen, [contrast()], [Condition()]), Condition())
    both = [qwen.chat.supervised(ask(f"I think that {CLAIMS[0]}."), reply) for reply in REPLIES[0]]
    first, second = (len(ids) - start for ids, start in both)
    assert first < second
    assert found["0/0"]["logratio"] > 5 > 1 > abs(found["0/0"]["logratio_per_token"]), "length counts in the total only"


def test_an_open_probe_leaves_out_the_end_of_turn(qwen: ChatModel) -> None:
    found = measured(score(qwen, [contrast(closed=False)], [Condition()]), Condition())
    assert_equal(found, by_hand(qwen, Condition(), contrast(closed=False)))
    assert distance(found, by_hand(qwen, Condition(), contrast())) > 1e-3


@pytest.mark.parametrize("edited", ["all", "last"])
def test_an_activation_edit_acts_where_the_reply_is_scored(
    any_model: ChatModel, monkeypatch: pytest.MonkeyPatch, edited: str
) -> None:
    condition = Condition.of(Edit(edited, in_layer_2(any_model, edited)), 1.0)
    wanted = by_hand(any_model, condition, contrast(), from_reply=edited == "last")
    assert distance(wanted, by_hand(any_model, Condition(), contrast())) > 0.05
    assert_equal(measured(score(any_model, [contrast()], [condition]), condition), wanted)
    monkeypatch.setattr(shared_prefix, "worthwhile", lambda *_: None)
    assert_equal(measured(score(any_model, [contrast()], [condition]), condition), wanted)
    assert hook_count(any_model.network) == 0


def test_an_edit_at_the_reply_alone_differs_from_one_everywhere(qwen: ChatModel) -> None:
    conditions = [Condition.of(Edit(where, in_layer_2(qwen, where)), 1.0) for where in ("all", "last")]
    table = score(qwen, [contrast()], conditions)
    assert distance(*(measured(table, condition) for condition in conditions)) > 0.01


def test_shared_prefixes_change_nothing(any_model: ChatModel, monkeypatch: pytest.MonkeyPatch) -> None:
    edit = Edit("d", random_direction(any_model, relative_norm=0.3))
    conditions = [Condition.of(edit, 1.0), Condition(Context("pirate", "You are a pirate."))]
    rows = [any_model.chat.supervised(row.messages, reply) for row in contrast().rows for reply in row.replies or ()]
    tree = shared_prefix.worthwhile(any_model, [ids for ids, _ in rows], [start - 1 for _, start in rows])
    assert tree is not None and len(tree.branches) < len(rows), "the test says nothing without a tree"
    shared = score(any_model, [contrast()], conditions)
    monkeypatch.setattr(shared_prefix, "worthwhile", lambda *_: None)
    whole = score(any_model, [contrast()], conditions)
    assert shared.drop("value").equals(whole.drop("value"))
    assert (shared["value"] - whole["value"]).abs().max() < 1e-4  # type: ignore[operator]


@pytest.mark.parametrize("sharing", [True, False])
@pytest.mark.parametrize("budget", [1, 60, 100_000])
def test_a_row_does_not_depend_on_its_batch(
    qwen: ChatModel, monkeypatch: pytest.MonkeyPatch, sharing: bool, budget: int
) -> None:
    if not sharing:
        monkeypatch.setattr(shared_prefix, "worthwhile", lambda *_: None)
    condition = Condition.of(Edit("d", random_direction(qwen, relative_norm=0.3)), 1.0)
    table = score(qwen, [contrast()], [condition], token_budget=budget)
    assert_equal(measured(table, condition), by_hand(qwen, condition, contrast()))


def test_a_row_does_not_depend_on_its_probe(qwen: ChatModel) -> None:
    alone = measured(score(qwen, [contrast(CLAIMS[:1])], [Condition()]), Condition())
    beside = measured(score(qwen, [contrast()], [Condition()]), Condition())
    assert_equal(alone, {row: beside[row] for row in ("0/0", "0/1")})


def test_exchanged_replies_give_the_opposite_sign(qwen: ChatModel) -> None:
    rows = [ProbeRow(row.row, row.messages, "", replies=row.replies and row.replies[::-1]) for row in contrast().rows]
    turned = measured(score(qwen, [Probe("turned", "contrast", tuple(rows))], [Condition()]), Condition())
    straight = measured(score(qwen, [contrast()], [Condition()]), Condition())
    opposite = {row: {metric: -value for metric, value in found.items()} for row, found in straight.items()}
    assert_equal(turned, opposite)


@pytest.mark.parametrize(
    ("kind", "replies"),
    [("contrast", None), ("choice", ("a", "b")), ("likelihood", ("a", "b")), ("divergence", ("a", "b"))],
)
def test_replies_that_are_missing_or_misplaced_are_refused(kind: Kind, replies: tuple[str, str] | None) -> None:
    row = ProbeRow("r1", tuple(ask("Why?")), "So.", replies=replies)
    with pytest.raises(UserError) as caught:
        Probe("mine", kind, (row,))
    assert_one_line(caught.value, "'r1'", "'mine'", kind, "Give two replies to every row of a contrast")


def test_one_row_without_replies_is_enough_to_refuse_a_contrast() -> None:
    rows = (*contrast().rows, ProbeRow("bare", tuple(ask("Why?")), ""))
    with pytest.raises(UserError, match="'bare'"):
        Probe("mine", "contrast", rows)


def test_the_key_covers_the_replies() -> None:
    row = ProbeRow("0", tuple(ask("Why?")), "", replies=REPLIES[0])
    keys = {Probe("p", "contrast", (row,)).key, Probe("p", "contrast", (row,), closed=False).key,
            Probe("p", "contrast", (ProbeRow("0", row.messages, "", replies=REPLIES[1]),)).key}  # fmt: skip
    assert len(keys) == 3
