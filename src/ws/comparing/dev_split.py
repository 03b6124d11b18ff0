"""The dev split: baselines choose their strength, layer and wording on dev rows; results are on the other rows (test).

A quarter of a probe's clusters is dev. The split depends only on a digest of the cluster names, so it never changes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import polars as pl

from ws.base import console
from ws.base.errors import UserError
from ws.baselines.prompts import Prompt
from ws.baselines.repe import ActivationDirection, Unit
from ws.edit.condition import PLAIN, Condition, Edit
from ws.eval import side_effects
from ws.measure.probe import Probe
from ws.measure.score import score
from ws.model.loading import ChatModel
from ws.report.summary import FACTS_LOST, LOW_MASS, Scores, accuracy

DEV_SHARE = 0.25
MASS_LOST = 0.1
"""Answer mass that a strength may cost on the facts, if the behaviour is measured by replies."""
STRENGTHS: Mapping[Unit, tuple[float, ...]] = {
    "difference": (0.25, 0.5, 1.0, 2.0, 4.0, 8.0),
    "residual": (0.01, 0.03, 0.1, 0.2, 0.5, 1.0),
    "one": (0.5, 1.0, 2.0, 4.0, 8.0, 16.0),
}
"""Strengths for activation steering, by unit: difference between the personas, norm of the residual stream, or 1.

The replicated work tried 1, 2 and 4 for vectors of norm 1.
"""

Option = TypeVar("Option", bound=Hashable)
"""What a candidate of activation steering is known by: its settings, or its layers."""


@dataclass(frozen=True)
class Chosen(Generic[Option]):
    """A candidate at a strength; `remark` is a note on the choice for readers, or empty."""

    option: Option
    strength: float
    remark: str


def is_dev(cluster: str) -> bool:
    """Whether a cluster belongs to the dev split; a function of its name alone."""
    return int(hashlib.blake2b(cluster.encode(), digest_size=4).hexdigest(), 16) < DEV_SHARE * 2**32


def split(probe: Probe, dev: bool) -> Probe:
    """The dev or the test rows of a probe, whole clusters."""
    rows = tuple(row for row in probe.rows if is_dev(row.cluster or row.row) == dev)
    if not rows:
        raise UserError(f"probe {probe.name!r} has no {'dev' if dev else 'test'} rows", "Use more rows.")
    return Probe(probe.name, probe.kind, rows, probe.answers)


def best_strength(
    model: ChatModel, own: Probe, name: str, fitted: Mapping[Option, ActivationDirection]
) -> Chosen[Option]:
    """The candidate and strength that move the behaviour furthest, both signs together.

    The strengths tried are those of each candidate's unit.

    own: the probe that measures the behaviour. A strength is admissible if it keeps the answer mass and loses at most
    `FACTS_LOST` of the dev facts, at both signs. The mass is that of the own probe, at least `LOW_MASS`; replies have
    none, and then the facts must keep theirs up to `MASS_LOST`. If no strength is admissible, the first candidate at
    its smallest strength is used, with a warning.
    """
    edits = {option: Edit(f"{name} {number}", fitted[option]) for number, option in enumerate(fitted)}
    tried = [(option, strength) for option, one in fitted.items() for strength in STRENGTHS[one.unit]]
    conditions = [Condition.of(edits[option], sign * strength) for option, strength in tried for sign in (1, -1)]
    probes = [split(own, dev=True), split(side_effects.facts(), dev=True)]
    scores = Scores(score(model, probes, conditions, description=f"choosing {name}"))
    base_facts = accuracy(scores.rows(side_effects.FACTS, "logratio", "", 0.0))
    massed, floor = own.name, LOW_MASS
    if own.kind == "contrast":
        massed = side_effects.FACTS
        floor = _mean(scores.rows(massed, "pmass", "", 0.0)["value"]) - MASS_LOST
    best: tuple[float, Option, float] | None = None
    for option, strength in tried:
        moved, admissible = 0.0, True
        for sign in (1, -1):
            moves, mass, facts = (
                scores.rows(probe, metric, edits[option].name, sign * strength)
                for probe, metric in (
                    (own.name, "logratio"), (massed, "pmass"), (side_effects.FACTS, "logratio"),
                )
            )  # fmt: skip
            moved += sign * _mean((moves["value"] - moves["base"]) * moves["label"]) / 2
            admissible &= _mean(mass["value"]) >= floor and accuracy(facts) >= base_facts - FACTS_LOST
        if admissible and (best is None or moved > best[0]):
            best = (moved, option, strength)
    if best is None:
        option = next(iter(fitted))
        smallest = STRENGTHS[fitted[option].unit][0]
        console.warn(
            f"{name}: on the dev split every strength loses too much answer mass or too many facts; using {smallest:g}"
        )
        return Chosen(option, smallest, "none admissible")
    _, option, strength = best
    return Chosen(option, strength, "the largest tried" if strength == STRENGTHS[fitted[option].unit][-1] else "")


def best_prompts(model: ChatModel, own: Probe, pool: Sequence[Prompt]) -> dict[int, Prompt]:
    """Per side, the prompt that moves the behaviour furthest in the direction of the side."""
    probe = split(own, dev=True)
    table = score(model, [probe], [Condition(prompt.context) for prompt in pool], description="choosing prompts")
    rows = table.filter((pl.col("metric") == "logratio") & (pl.col("context") != PLAIN.name))
    means = {name: _mean(part["value"] * part["label"]) for (name,), part in rows.group_by("context")}
    return {
        side: max((p for p in pool if p.side == side), key=lambda p: side * means[p.context.name]) for side in (1, -1)
    }


def _mean(values: pl.Series) -> float:
    return float(values.mean())  # type: ignore[arg-type]
