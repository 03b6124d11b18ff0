"""Planted truth: a known rank-k write in known matrices of a model that answers, under noise. Do the tools find it?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import polars as pl
import pytest
import torch
from torch import Tensor

from cutting import made, material, of_lens
from planting import plant
from ws.algebra.direction import Direction
from ws.edit.condition import BASE, Condition, Edit
from ws.eval import instrument
from ws.fitting import behaviour
from ws.measure.probe import Probe, split
from ws.measure.score import score
from ws.model import loading
from ws.model.loading import ChatModel
from ws.subspace import prompts
from ws.subspace.lenses import Material
from ws.subspace.lenses.bases import on_bases
from ws.subspace.variants import only

PLACES = ((3, "o"), (4, "down"))
CASES = [(1, 0.3), (4, 0.0), (4, 0.3), (4, 1.0), (8, 0.3)]
"""Rank of what is planted, and norm of the noise relative to it."""
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def pocket() -> ChatModel:
    return loading.load("pocket")


def effect_on(model: ChatModel, probe: Probe) -> Callable[[Sequence[Direction]], list[float]]:
    """Half the difference of the log-ratio between alpha +1 and -1, mean over the rows of a probe."""

    def effects(directions: Sequence[Direction]) -> list[float]:
        edits = [Edit("d", direction, seed=number) for number, direction in enumerate(directions)]
        table = score(model, [probe], [Condition.of(edit, alpha) for edit in edits for alpha in (1.0, -1.0)])
        rows = table.filter((pl.col("metric") == "logratio") & (pl.col("edit") != BASE))
        means = dict(rows.group_by("seed").agg((pl.col("value") * pl.col("alpha")).mean()).iter_rows())
        return [means[number] for number in range(len(directions))]

    return effects


@dataclass
class Planted:
    source: Material
    bases: dict[str, Tensor]
    effects: Callable[[Sequence[Direction]], list[float]]

    def retained(self, *directions: Direction) -> list[float]:
        full, *rest = self.effects([self.source.direction, *directions])
        assert full > 0.5, "what is planted moves the answer"
        return [one / full for one in rest]

    @property
    def by_layer(self) -> dict[int, Tensor]:
        return {self.source.sites[name].layer: basis for name, basis in self.bases.items()}


@pytest.fixture(scope="module", params=CASES, ids=lambda case: f"rank {case[0]}, noise {case[1]:g}")
def planted(request: pytest.FixtureRequest, pocket: ChatModel) -> Planted:
    rank, noise = request.param
    subject = behaviour.load("sycophancy")
    asked = instrument.headline_probe("choice", subject, 60)
    fit = prompts.of(subject).fit
    direction, bases = plant(pocket, fit, PLACES, rank=rank, size=0.1, noise=noise)
    source = replace(material(pocket, direction), prompts=lambda: fit,
                     dev_effect=effect_on(pocket, split(asked, dev=True)))  # fmt: skip
    test = split(asked, dev=False)
    return Planted(source, bases, effect_on(pocket, replace(test, rows=test.rows[:24])))


def test_keeping_the_planted_subspace_keeps_the_effect_and_dropping_it_removes_it(planted: Planted) -> None:
    pieces = on_bases(planted.source, planted.by_layer)
    assert pieces.rest is not None
    kept, rest = planted.retained(pieces.keep, pieces.rest)
    assert kept > 0.9 and abs(rest) < 0.1


def test_random_subspaces_keep_about_their_share_of_the_effect(planted: Planted) -> None:
    rank = next(iter(planted.bases.values())).shape[1]
    width, draws = 128, 12
    pieces = made("projection", planted.source)[f"K = {rank}"]
    assert pieces.twin is not None
    found = torch.tensor(planted.retained(*(pieces.twin(seed) for seed in range(draws))))
    assert abs(float(found.mean()) - rank / width) < 3 * float(found.std()) / draws**0.5 and float(found.max()) < 0.25


def test_the_activation_subspace_finds_what_is_planted(planted: Planted) -> None:
    rank = next(iter(planted.bases.values())).shape[1]
    by_operation = {one.operation: one.direction for one in of_lens("projection", planted.source, f"K = {rank}")}
    keep, complement = by_operation["keep"], by_operation["complement"]
    assert keep is not None and complement is not None
    kept, rest = planted.retained(keep, complement)
    assert kept > 0.9 and abs(rest) < 0.1


def test_the_smallest_set_holds_only_planted_matrices(planted: Planted) -> None:
    (pieces,) = made("smallest", planted.source).values()
    assert set(pieces.keep.deltas) <= set(planted.bases), "the noise is in every other matrix of these layers"
    (kept,) = planted.retained(pieces.keep)
    assert kept > 0.9


def test_layers_and_modules_that_hold_nothing_planted_keep_nothing(planted: Planted) -> None:
    if len(planted.source.direction.deltas) == len(planted.bases):
        pytest.skip("without noise there is nothing else")
    silent = frozenset(planted.source.direction.deltas) - frozenset(planted.bases)
    planted_only, others = (only(planted.source.direction, frozenset(names)) for names in (planted.bases, silent))
    kept, rest = planted.retained(planted_only, others)
    assert kept > 0.9 and abs(rest) < 0.1
    reads = made("modules", planted.source)["reads"]
    (kept,) = planted.retained(reads.keep)
    assert abs(kept) < 0.1
