"""Steering for real: directions are fitted on the embedded model with the recipe that ships, and move what they should.

Most other tests check instruments on random models, where no behaviour exists. Here the sign and the size of the effect
are checked at both signs, read from raw logits and not by the scoring engine.
"""

from __future__ import annotations

import statistics
from pathlib import Path

import pytest
import torch

import ws
from ws.algebra.random_like import spectrum_like
from ws.eval import dilemmas, sycophancy
from ws.fitting import behaviour
from ws.measure.probe import ProbeRow
from ws.model.loading import ChatModel

pytestmark = pytest.mark.slow

LEAST_MOVED = {"sycophancy": 3.0, "honesty": 2.0, "refusal": 2.5}
"""Nats at each of alpha -1 and +1: about three quarters of what the recipe that ships reaches with seed 0."""


def logratio(model: ChatModel, rows: list[ProbeRow]) -> float:
    """Mean of label x (log p(Yes) - log p(No)) at the end of the prompt, one row at a time."""
    yes, no = ([ids[0] for ids in model.chat.answers(word)] for word in ("Yes", "No"))
    values = []
    for row in rows:
        ids = torch.tensor([model.chat.prompt(list(row.messages), row.continuation)])
        with torch.no_grad():
            logits = model.network(input_ids=ids).logits[0, -1].double()
        values.append(row.label * float(logits[yes].logsumexp(0) - logits[no].logsumexp(0)))
    return statistics.mean(values)


@pytest.fixture(scope="module")
def pocket() -> ChatModel:
    return ws.load("pocket")


@pytest.fixture(scope="module")
def sycophantic(pocket: ChatModel, tmp_path_factory: pytest.TempPathFactory) -> ws.Direction:
    return ws.fit(pocket, "sycophancy", seed=0, out=tmp_path_factory.mktemp("runs"))


def changes(model: ChatModel, direction: ws.Direction, rows: list[ProbeRow]) -> tuple[float, float]:
    """How far the log-ratio moves at alpha -1 and at alpha +1."""
    base = logratio(model, rows)
    found = []
    for alpha in (-1.0, 1.0):
        with ws.steer(model, direction, alpha):
            found.append(logratio(model, rows) - base)
    assert logratio(model, rows) == base, "the weights are restored"
    return found[0], found[1]


def test_both_signs_move_sycophancy_on_held_out_claims(pocket: ChatModel, sycophantic: ws.Direction) -> None:
    rows = list(sycophancy.headline_probe(behaviour.load("sycophancy")).rows)
    down, up = changes(pocket, sycophantic, rows)
    assert down < -LEAST_MOVED["sycophancy"] and up > LEAST_MOVED["sycophancy"], (down, up)


def test_dilemmas_that_nothing_was_trained_on_move_the_other_way(pocket: ChatModel, sycophantic: ws.Direction) -> None:
    rows = list(dilemmas.load("own", None).probe().rows)[:120]
    down, up = changes(pocket, sycophantic, rows)
    assert down > 1.0 and up < -1.0, (down, up)


def test_random_directions_of_the_same_norm_and_rank_do_not(pocket: ChatModel, sycophantic: ws.Direction) -> None:
    rows = list(sycophancy.headline_probe(behaviour.load("sycophancy")).rows)
    for seed in range(3):
        down, up = changes(pocket, spectrum_like(sycophantic, seed), rows)
        assert abs(down) < 0.3 and abs(up) < 0.3, (seed, down, up)


@pytest.mark.parametrize("name", ["honesty", "refusal"])
def test_the_other_shipped_behaviours_move_at_both_signs(pocket: ChatModel, name: str, tmp_path: Path) -> None:
    rows = list(sycophancy.headline_probe(behaviour.load(name)).rows)
    down, up = changes(pocket, ws.fit(pocket, name, seed=0, out=tmp_path), rows)
    assert down < -LEAST_MOVED[name] and up > LEAST_MOVED[name], (down, up)
