"""Several Conditions share a pass: one block of rows each, and the scores of one by one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import polars as pl
import pytest
import torch
from torch import Tensor

from making import hook_count, random_direction, weights_digest
from test_lower_layers import edits, probes
from ws.algebra.delta import Delta
from ws.algebra.direction import Direction
from ws.base.errors import BaseMismatchError, UnsupportedFeatureError
from ws.base.store import Shards
from ws.baselines.repe import ActivationDirection
from ws.edit.condition import Condition, Edit
from ws.edit.steering import Mode, can_share_a_pass, steer, under, under_each
from ws.measure import choice, shared_prefix
from ws.measure.score import score
from ws.model import loading
from ws.model.loading import ChatModel

MODES: tuple[Mode, ...] = ("runtime", "baked")
ALPHAS = (-2.0, -0.7, 0.3, 1.0, 2.0)


def wanted(model: ChatModel) -> list[Condition]:
    """Two directions at five strengths between an activation edit and two edits together."""
    low, second, added, top = edits(model)
    return [
        Condition.of(added, 1.0),
        *(Condition.of(low, alpha) for alpha in ALPHAS),
        *(Condition.of(top, alpha) for alpha in ALPHAS),
        Condition(edits=((second, 1.0), (top, -1.0))),
    ]


def difference(one: pl.DataFrame, other: pl.DataFrame) -> float:
    """Largest difference of two scores tables, whose lines must be the same ones in the same order."""
    columns = [name for name in one.columns if name != "value"]
    assert one.select(columns).equals(other.select(columns))
    return float((one["value"] - other["value"]).abs().max())  # type: ignore[arg-type]


@pytest.mark.parametrize("per_pass", [2, 3, 20])
def test_scores_are_those_of_one_by_one(any_model: ChatModel, per_pass: int) -> None:
    before = weights_digest(any_model.network), hook_count(any_model.network)
    alone = score(any_model, probes(), wanted(any_model), mode="runtime", per_pass=1)
    shared = score(any_model, probes(), wanted(any_model), mode="runtime", per_pass=per_pass)
    assert difference(alone, shared) < 1e-4
    assert (weights_digest(any_model.network), hook_count(any_model.network)) == before


def test_passes_are_really_shared(qwen: ChatModel, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    whole = choice.read_copies
    monkeypatch.setattr(choice, "read_copies", lambda m, c, copies: seen.append(copies) or whole(m, c, copies))
    score(qwen, probes()[:1], wanted(qwen), mode="runtime", per_pass=4)
    # ten Conditions that can share, in passes of nearly equal size
    assert seen == [4, 3, 3]


def test_nothing_is_shared_where_weights_are_baked(qwen: ChatModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "read_copies", lambda *_: pytest.fail("weights cannot hold several strengths"))
    score(qwen, probes()[:1], wanted(qwen))
    score(qwen, probes()[:1], wanted(qwen), mode="baked")


def test_half_precision_shares_by_itself_and_stays_within_its_own_error(qwen: ChatModel) -> None:
    half, full = (loading.load(qwen.name, dtype=dtype) for dtype in ("bfloat16", "float32"))
    direction = random_direction(qwen, relative_norm=0.3, layers=[1, 2])
    tables = {}
    for name, model, per_pass in (("shared", half, None), ("alone", half, 1), ("exact", full, 1)):
        own = Direction(direction.deltas, model.fingerprint, direction.layers)
        made = [Condition.of(Edit("d", own), alpha) for alpha in ALPHAS]
        tables[name] = score(model, probes()[:1], made, per_pass=per_pass, token_budget=1_024).filter(metric="logratio")
    assert not tables["shared"].equals(tables["alone"]), "nothing was shared"
    alone = difference(tables["alone"], tables["exact"])
    assert difference(tables["shared"], tables["exact"]) < 2 * alone + 1e-3


def test_pieces_on_disk_are_not_read_again(qwen: ChatModel, tmp_path: Path) -> None:
    shards = Shards(tmp_path)
    first = score(qwen, probes(), wanted(qwen)[:4], mode="runtime", per_pass=2, shards=shards)
    # divergences are apart: they run the base again, for its states
    kept = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir() if not path.name.startswith("diver")}
    again = score(qwen, probes(), wanted(qwen), mode="runtime", per_pass=2, shards=shards)
    assert again.head(len(first)).equals(first)
    assert all((tmp_path / name).stat().st_mtime_ns == time for name, time in kept.items())


def test_every_block_has_its_own_edit(any_model: ChatModel) -> None:
    network = any_model.network
    low, top = edits(any_model)[0], edits(any_model)[3]
    conditions = [Condition.of(low, 1.0), Condition.of(top, -0.5), Condition.of(low, 0.25)]
    if not all(can_share_a_pass(any_model, one) for one in conditions):
        assert network.config.model_type == "gpt2", "only transposed maps keep Conditions apart"
        return
    ids = torch.arange(20).view(2, 10) * 7 % network.get_input_embeddings().weight.shape[0]
    with torch.no_grad():
        with under_each(any_model, conditions):
            blocks = network(input_ids=ids.repeat(3, 1), use_cache=False).logits.chunk(3)
        for block, (edit, alpha) in zip(blocks, (one.active[0] for one in conditions), strict=True):
            with steer(any_model, edit.effect, alpha, mode="baked"):
                alone = network(input_ids=ids, use_cache=False).logits
            torch.testing.assert_close(block, alone, rtol=1e-4, atol=1e-4 * float(alone.abs().max()))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_delta_of_rank_zero_is_no_change_beside_one_that_is(qwen: ChatModel, dtype: str) -> None:
    model = qwen if dtype == "float32" else loading.load(qwen.name, dtype="bfloat16")
    low = edits(model)[0].effect
    assert isinstance(low, Direction)
    empty = {name: Delta.zero(delta.shape) for name, delta in low.deltas.items()}
    partly = Direction({**low.deltas, next(iter(empty)): Delta.zero(low.deltas[next(iter(empty))].shape)}, low.base)
    ids = torch.arange(20).view(2, 10) * 7 % 1000
    with torch.no_grad():
        base = model.network(input_ids=ids, use_cache=False).logits
        conditions = [
            Condition.of(Edit(str(n), one), 1.0) for n, one in enumerate((Direction(empty, low.base), partly))
        ]
        assert all(can_share_a_pass(model, one) for one in conditions)
        with under_each(model, conditions):
            blocks = model.network(input_ids=ids.repeat(2, 1), use_cache=False).logits.chunk(2)
        for condition, block in zip(conditions, blocks, strict=True):
            with under(model, condition, mode="runtime"):
                alone = model.network(input_ids=ids, use_cache=False).logits
            torch.testing.assert_close(block, alone, rtol=1e-4, atol=1e-4 if dtype == "float32" else 0.1)
    assert torch.allclose(blocks[0], base, atol=1e-4 if dtype == "float32" else 0.1)
    assert float((blocks[1] - base).norm() / base.norm()) > 0.05


def test_outputs_of_any_strides_are_edited(qwen: ChatModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """An in-place sum into a reshaped view of such an output went into a copy, and the edit did nothing."""
    low, top = edits(qwen)[0], edits(qwen)[3]
    conditions = [Condition.of(low, 1.0), Condition.of(top, -0.5)]
    ids = torch.arange(20).view(2, 10) * 7 % 1000
    for name in {name for edit in (low, top) for name in edit.effect.deltas}:  # type: ignore[union-attr]
        module = qwen.network.get_submodule(name.removesuffix(".weight"))
        monkeypatch.setattr(module, "forward", _of_other_strides(module.forward))
    with torch.no_grad():
        with under_each(qwen, conditions):
            blocks = qwen.network(input_ids=ids.repeat(2, 1), use_cache=False).logits.chunk(2)
        base = qwen.network(input_ids=ids, use_cache=False).logits
        for block, condition in zip(blocks, conditions, strict=True):
            for mode in MODES:
                with under(qwen, condition, mode=mode):
                    alone = qwen.network(input_ids=ids, use_cache=False).logits
                torch.testing.assert_close(block, alone, rtol=1e-4, atol=1e-4 * float(alone.abs().max()))
            assert float((block - base).norm() / base.norm()) > 0.01


def _of_other_strides(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The same outputs, stored with rows and tokens exchanged."""
    return lambda *args: forward(*args).transpose(0, 1).contiguous().transpose(0, 1)


def test_rows_that_do_not_divide_into_conditions_are_refused(qwen: ChatModel) -> None:
    low = edits(qwen)[0]
    with (
        pytest.raises(UnsupportedFeatureError, match="2 rows, which 3 conditions"),
        under_each(qwen, [Condition.of(low, alpha) for alpha in (1.0, 0.5, -1.0)]),
    ):
        qwen.network(input_ids=torch.ones(2, 4, dtype=torch.long), use_cache=False)


def test_conditions_of_another_base_share_passes_where_that_is_allowed(
    qwen: ChatModel, capsys: pytest.CaptureFixture[str]
) -> None:
    low = edits(qwen)[0]
    assert isinstance(low.effect, Direction)
    made_elsewhere = replace(low, effect=Direction(low.effect.deltas, "e" * 24, low.effect.layers))
    allowed = replace(made_elsewhere, base_mismatch="allow")
    strengths = (1.0, 0.5, -1.0)
    tables = [
        score(qwen, probes()[:1], [Condition.of(edit, alpha) for alpha in strengths], mode="runtime", per_pass=3)
        for edit in (low, allowed)
    ]
    assert tables[0].equals(tables[1])
    assert capsys.readouterr().err.count("on the base model") == 1
    with pytest.raises(BaseMismatchError):
        score(qwen, probes()[:1], [Condition.of(made_elsewhere, 1.0)])


def test_what_has_no_thin_side_path_runs_alone(qwen: ChatModel) -> None:
    low, _, added, top = edits(qwen)
    assert isinstance(added.effect, ActivationDirection) and isinstance(low.effect, Direction)
    name = next(iter(low.effect.deltas))
    dense = Direction({name: Delta.full(torch.ones(low.effect.deltas[name].shape))}, low.effect.base)
    assert can_share_a_pass(qwen, Condition.of(low, 1.0))
    assert not can_share_a_pass(qwen, Condition.of(added, 1.0))
    assert not can_share_a_pass(qwen, Condition())
    assert not can_share_a_pass(qwen, Condition(edits=((low, 1.0), (top, 1.0))))
    assert not can_share_a_pass(qwen, Condition.of(Edit("dense", dense), 1.0))


def test_a_direction_of_another_base_is_refused(qwen: ChatModel) -> None:
    low = edits(qwen)[0].effect
    assert isinstance(low, Direction)
    stranger = Edit("other", Direction(low.deltas, "another base", low.layers))
    with pytest.raises(BaseMismatchError), under_each(qwen, [Condition.of(stranger, 1.0)] * 2):
        pass
    assert hook_count(qwen.network) == 0


def test_copies_need_a_tree_and_single_tokens(qwen: ChatModel) -> None:
    rows = [[1, 2, 3, 4], [1, 2, 3, 5]]
    single, several = ([[5]], [[6]]), ([[5, 6]], [[7]])
    with pytest.raises(ValueError, match="tree"):
        choice.read_copies(qwen, choice.Choices(rows, [[0, 1]], single, 64), 2)
    with pytest.raises(ValueError, match="single-token answers"):
        choice.read_copies(qwen, choice.Choices(rows, [[0, 1]], several, 64, shared_prefix.plan(rows)), 2)
