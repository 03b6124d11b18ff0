"""Conditions and Effects are known by what they do: labels are exact, and nothing different is taken for the same."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from making import assert_one_line, random_direction
from ws.algebra.delta import Alpha, Delta
from ws.algebra.direction import Direction
from ws.base.errors import UserError
from ws.base.store import Shards
from ws.baselines.bias_only import OutputShift
from ws.baselines.repe import ActivationDirection
from ws.edit.condition import PLAIN, Condition, Context, Edit
from ws.measure.probe import Probe, ProbeRow
from ws.measure.score import score
from ws.model.chat import ask
from ws.model.loading import ChatModel

ONES = Delta.full(torch.ones(2, 2))


def direction(seed: int = 0, base: str = "base", name: str = "a.weight") -> Direction:
    return Direction({name: Delta.full(torch.full((2, 2), float(seed)))}, base)


def probe() -> Probe:
    return Probe("own", "choice", (ProbeRow("0", tuple(ask("Do cats like milk?")), "My answer: **"),))


# -------------------------------------------------------------------- labels

A, B = Edit("a", direction(1), seed=0), Edit("b", direction(2), seed=0)


@pytest.mark.parametrize(
    ("edits", "label", "alpha", "seed", "data_seed"),
    [
        (((A, 0.5),), "a", 0.5, 0, None),
        (((A, 0.1234567),), "a", 0.1234567, 0, None),
        (((Edit("a", direction(), 3, 4), -1),), "a", -1.0, 3, 4),
        (((A, 0.5), (B, 0.0)), "a", 0.5, 0, None),
        (((A, 0.5), (B, -1.0)), "0.5*a + -1*b", 1.0, 0, None),
        (((A, 0.1234567), (B, 1)), "0.1234567*a + 1*b", 1.0, 0, None),
        (((A, 0.1234568), (B, 1e-7)), "0.1234568*a + 1e-07*b", 1.0, 0, None),
        (((A, 0.1 + 0.2), (B, 3e20)), "0.30000000000000004*a + 3e+20*b", 1.0, 0, None),
        (((A, 1.0), (replace(B, seed=1), 1.0)), "1*a (seed 0) + 1*b (seed 1)", 1.0, None, None),
        (((A, 1.0), (replace(B, seed=None), 1.0)), "1*a (seed 0) + 1*b", 1.0, None, None),
        (
            ((replace(A, data_seed=0), 1.0), (replace(B, data_seed=2), 1.0)),
            "1*a (data seed 0) + 1*b (data seed 2)", 1.0, 0, None,
        ),
        (
            ((replace(A, data_seed=5), 1.0), (replace(A, seed=1, data_seed=6), 1.0)),
            "1*a (seed 0, data seed 5) + 1*a (seed 1, data seed 6)", 1.0, None, None,
        ),
    ],
    ids=str,
)  # fmt: skip
def test_a_label_holds_exact_strengths_and_the_seeds_that_differ(
    edits: Any, label: str, alpha: float, seed: int | None, data_seed: int | None
) -> None:
    assert Condition(PLAIN, edits).key() == {
        "context": "plain", "edit": label, "alpha": alpha, "seed": seed, "data_seed": data_seed,
    }  # fmt: skip


def test_conditions_that_differ_anywhere_have_keys_of_their_own() -> None:
    mixed = Condition(PLAIN, ((A, 0.1234567), (B, 1.0)))
    others = [
        Condition(Context("plain", "Be brief."), mixed.edits),
        Condition(Context("other"), mixed.edits),
        Condition(PLAIN, ((A, 0.1234568), (B, 1.0))),
        Condition(PLAIN, ((A, 0.1234567), (B, 1.0000000000000002))),
        Condition(PLAIN, ((A, 0.1234567), (replace(B, seed=1), 1.0))),
        Condition(PLAIN, ((A, 0.1234567), (replace(B, data_seed=1), 1.0))),
        Condition(PLAIN, ((A, 0.1234567), (replace(B, name="c"), 1.0))),
        Condition(PLAIN, ((A, 0.1234567), (replace(B, effect=direction(3)), 1.0))),
        Condition(PLAIN, ((A, 0.1234567), (replace(B, base_mismatch="allow"), 1.0))),
        Condition(PLAIN, ((A, 0.1234567),)),
        Condition(PLAIN, ((B, 1.0), (A, 0.1234567))),
    ]
    keys = [one.content_key for one in (mixed, *others)]
    assert len(set(keys)) == len(keys)
    assert Condition(PLAIN, ((Edit("a", direction(1), seed=0), 0.1234567), (B, 1), (A, 0.0))).content_key == keys[0]


def test_strengths_and_seeds_that_lie_close_are_all_scored(qwen: ChatModel) -> None:
    one, two = random_direction(qwen, seed=1), random_direction(qwen, seed=2)
    a, b = Edit("a", one, seed=0), Edit("b", two, seed=0)
    wanted = [
        Condition(PLAIN, ((a, 0.1234567), (b, 1.0))),
        Condition(PLAIN, ((a, 0.1234568), (b, 1.0))),
        Condition(PLAIN, ((a, 0.1234567), (replace(b, effect=random_direction(qwen, seed=3), seed=1), 1.0))),
        Condition(PLAIN, ((a, 0.1234567), (replace(b, effect=random_direction(qwen, seed=4), data_seed=1), 1.0))),
    ]
    table = score(qwen, [probe()], wanted).filter(metric="logratio")
    assert table["edit"].to_list() == ["none", *(one.key()["edit"] for one in wanted)]
    assert len(table.select("edit", "seed", "data_seed").unique()) == 5 and table["value"].n_unique() >= 4


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (direction(1), direction(2)),
        (direction(1), direction(1, name="b.weight")),
        (ActivationDirection({1: torch.ones(3)}, "base"), ActivationDirection({1: torch.ones(3)}, "base", "last")),
    ],
    ids=["other numbers", "other parameter", "other positions"],
)
def test_one_label_for_two_effects_is_an_error_also_within_a_mix(qwen: ChatModel, one: Any, other: Any) -> None:
    pairs = [Condition(PLAIN, ((A, 0.5), (Edit("x", effect), 1.0))) for effect in (one, other)]
    with pytest.raises(UserError, match="share the name"):
        score(qwen, [probe()], pairs)


def test_the_same_effect_made_twice_is_scored_once(qwen: ChatModel) -> None:
    twice = [Condition.of(Edit("d", random_direction(qwen, seed=1)), 1.0) for _ in range(2)]
    assert score(qwen, [probe()], twice)["edit"].unique(maintain_order=True).to_list() == ["none", "d"]


def test_pieces_on_disk_of_another_effect_of_that_name_are_not_taken(qwen: ChatModel, tmp_path: Path) -> None:
    first, second = (Condition.of(Edit("d", random_direction(qwen, seed=seed)), 1.0) for seed in (1, 2))
    _ = score(qwen, [probe()], [first], shards=Shards(tmp_path))
    assert score(qwen, [probe()], [second], shards=Shards(tmp_path)).equals(score(qwen, [probe()], [second]))


# -------------------------------------------------------------------- effects

VECTOR = torch.tensor([1.0, 2.0, 3.0])
OTHER = torch.tensor([1.0, 2.0, 3.5])

VARIED: dict[str, tuple[Callable[..., Any], dict[str, Any], list[dict[str, Any]]]] = {
    "weights": (
        Direction,
        {"deltas": {"a.weight": ONES}, "base": "x"},
        [{"base": "y"}, {"deltas": {"b.weight": ONES}}, {"deltas": {"a.weight": 2 * ONES}},
         {"deltas": {"a.weight": -ONES}}, {"deltas": {"a.weight": Delta.full(torch.ones(1, 4))}},
         {"deltas": {"a.weight": ONES, "b.weight": ONES}}],
    ),
    "activations": (
        ActivationDirection,
        {"vectors": {1: VECTOR}, "base": "x", "edited": "all"},
        [{"base": "y"}, {"edited": "last"}, {"vectors": {2: VECTOR}}, {"vectors": {1: OTHER}},
         {"vectors": {1: VECTOR, 2: VECTOR}}],
    ),
    "shift": (
        OutputShift,
        {"vectors": {"1": VECTOR}, "base": "x"},
        [{"base": "y"}, {"vectors": {"2": VECTOR}}, {"vectors": {"1": OTHER}}],
    ),
}  # fmt: skip


def test_the_key_of_an_effect_digests_everything_that_decides_what_it_does() -> None:
    keys = []
    for make, own, changes in VARIED.values():
        assert make(**own).content_key == make(**own).content_key
        keys += [make(**{**own, **change}).content_key for change in [{}, *changes]]
    assert len(set(keys)) == len(keys), "also between kinds of Effects"


def test_where_an_effect_comes_from_is_no_part_of_its_key() -> None:
    for make, own, _ in (VARIED["weights"], VARIED["activations"]):
        assert make(**own).content_key == make(**own, provenance={"made": "by hand"}).content_key


@dataclass(frozen=True)
class Nameless:
    """An effect that does not say what it is."""

    base: str

    def attach(self, network: nn.Module, alpha: Alpha) -> Callable[[], None]:
        """Nothing."""
        return lambda: None


def test_an_effect_without_a_key_is_refused() -> None:
    edit = inspect.unwrap(Edit.__init__)  # without the run-time checks of the tests, which would speak first
    with pytest.raises(UserError) as caught:
        edit(object.__new__(Edit), "mine", Nameless("base"))  # type: ignore[arg-type]
    assert_one_line(caught.value, "mine", "Nameless", "content_key")


@pytest.mark.parametrize("alpha", [float("nan"), float("inf")])
def test_a_strength_that_is_no_finite_number_is_refused(qwen: ChatModel, alpha: float) -> None:
    with pytest.raises(UserError, match="finite"):
        Condition.of(Edit("d", random_direction(qwen)), alpha)


def test_no_edit_takes_the_label_of_the_base(qwen: ChatModel) -> None:
    with pytest.raises(UserError, match="cannot be named 'none'"):
        Edit("none", random_direction(qwen))
