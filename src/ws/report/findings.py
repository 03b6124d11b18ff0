"""The results of a run, as records. `summary.json` is their plain form (`base.records`); `read_summary` reads it back.

A strength is a key, written as the shortest decimal string: `-1`, `0`, `0.5`. Most tables have two probes, by name: the
behaviour's own probe and the dilemmas. Effects are changes against the unedited model on the same rows, in nats; a
change towards the behaviour (or honesty) is positive. This module imports nothing heavy, so `ws show` is quick.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ws.base import console
from ws.base.errors import UserError
from ws.base.files import read_json
from ws.base.records import FLAT, restore
from ws.eval.ability import Ability
from ws.report import cells

if TYPE_CHECKING:
    from ws.base.stats import Interval

DILEMMAS, RANDOM = "dilemmas", "random"
"""Keys of the second probe and of the random control directions."""
SUMMARY_FILE = "summary.json"


@dataclass(frozen=True)
class Estimate:
    """A mean over `n` rows with its 95 % limits; they are None if there are too few clusters for an interval."""

    mean: float
    low: float | None
    high: float | None
    n: int

    @classmethod
    def of(cls, interval: Interval) -> Estimate:
        """From an interval of `stats`."""
        return Estimate(**numbers_of(interval))

    @property
    def limits(self) -> str:
        """`-0.20, +0.40`; empty if there is no interval."""
        return cells.limits(vars(self))

    @property
    def text(self) -> str:
        """`+0.10 [-0.20, +0.40]`."""
        return cells.with_limits(vars(self))


def numbers_of(interval: Interval) -> dict[str, Any]:
    """The fields of an `Estimate`: limits that do not exist are None."""
    limits = {
        name: None if math.isnan(value) else value for name, value in (("low", interval.low), ("high", interval.high))
    }
    return {"mean": interval.mean, **limits, "n": interval.n}


@dataclass(frozen=True)
class Level(Estimate):
    """A mean log-ratio at one strength, and the mean probability mass on the two answers."""

    pmass: float


@dataclass(frozen=True)
class Band(Estimate):
    """The 95 % prediction interval of one more random direction, and the change of every measured one."""

    seeds: tuple[float, ...]


@dataclass(frozen=True)
class Parts:
    """The parts of a mean change: the signed effect, the Yes-bias, and the rows whose answer flips.

    yes_bias: mean change of log p(Yes) - log p(No), whichever answer is right. balanced: the effect with equal weight
    on rows whose right answer is Yes and rows whose right answer is No, so that a Yes-bias cancels; None if one kind is
    missing. up, down: number of rows whose answer flips to the positive side, and away from it.
    """

    effect: Estimate
    yes_bias: Estimate
    balanced: float | None
    up: int
    down: int
    n: int


@dataclass(frozen=True)
class Wording:
    """One wording of the replies alone: its change by strength, and whether that is outside the band of its own."""

    change: Mapping[str, Estimate]
    bands: Mapping[str, Band]
    outside: Mapping[str, bool | None]


@dataclass(frozen=True)
class Instrument:
    """A behaviour as one instrument measures it (`eval.instrument`), nats.

    meaning: what the level is, in a few words. per_token: the change per token of a reply; empty for choices. contexts:
    levels of the unedited model with a system prompt. bands and outside: random directions, where they were measured.
    wordings: every wording of the replies alone, by its number; the mean over wordings can hide that they disagree.
    shares: share of rows that are answered on the positive side; summaries of earlier versions have none.
    """

    meaning: str
    levels: Mapping[str, Estimate]
    change: Mapping[str, Estimate]
    per_token: Mapping[str, Estimate]
    sign_flip_p: Mapping[str, float]
    bands: Mapping[str, Band]
    outside: Mapping[str, bool | None]
    contexts: Mapping[str, Estimate]
    wordings: Mapping[str, Wording] = field(default_factory=dict)
    shares: Mapping[str, Estimate] = field(default_factory=dict)


@dataclass(frozen=True)
class Judged:
    """Free replies at one strength: the mean probability that a reply was written under the positive persona.

    change: against strength 0 on the same prompts. replies: how many were judged, over how many `prompts`.
    """

    score: Estimate
    change: Estimate
    replies: int
    prompts: int


@dataclass(frozen=True)
class Dose:
    """A line through the base: nats per unit of strength, its fit, and whether the change always grows with strength.

    A line always fits a single strength besides 0, so `r2` and `monotone` are then None.
    """

    slope: float | None
    r2: float | None
    monotone: bool | None
    strengths: int


@dataclass(frozen=True)
class SideEffects:
    """Side effects at one strength; None if there are no rows for one.

    kl: to the base, per token of answers to neutral requests (mean, 95th percentile, largest). nll_delta: change of
    their negative log-likelihood. facts: share answered right. true_claims: log-ratio of agreeing with true claims. The
    others describe greedy replies: share of distinct 3-grams, length, share that ended, share of JSON requests
    fulfilled.
    """

    kl: float
    kl_p95: float
    kl_max: float
    nll_delta: float
    facts: float
    true_claims: float | None
    distinct3: float | None
    reply_tokens: float | None
    reply_finished: float | None
    json: float | None


@dataclass(frozen=True)
class DilemmaCounts:
    """How many dilemma rows are counted and not counted, and the counted rows by their honest answer.

    noun: what the rows are called, `dilemmas` or `proxy dilemmas`.
    """

    counted: int
    not_counted: int
    honest_yes: int
    honest_no: int
    noun: str = DILEMMAS


@dataclass(frozen=True)
class OtherBehaviour:
    """A behaviour that the direction was not made for: level of the base, and change by strength."""

    base: Estimate
    change: Mapping[str, Estimate]


Curve = Mapping[str, Estimate]
"""Strength -> estimate."""


@dataclass(frozen=True)
class Numbers:
    """Everything that is computed from the scores table of a run.

    levels: by probe; for the behaviour, over its headline group. change: differences to the base by probe; `dd_delta`
    repeats the dilemmas. outside_controls: whether the interval of a change is entirely outside the band of random
    directions. contexts: the unedited model with a system prompt.
    """

    levels: Mapping[str, Mapping[str, Level]] = field(metadata=FLAT)
    dd_delta: Curve
    near_dilemmas: Curve
    far_dilemmas: Curve
    all_dilemmas: Mapping[str, Level]
    dilemma_counts: DilemmaCounts
    dilemma_groups: Mapping[str, Curve]
    side_effects: Mapping[str, SideEffects]
    controls: Mapping[str, Mapping[str, Mapping[str, Band]]]
    change: Mapping[str, Curve]
    sign_flip_p: Mapping[str, Mapping[str, float]]
    dose_response: Mapping[str, Dose]
    outside_controls: Mapping[str, Mapping[str, bool | None]]
    groups: Mapping[str, Curve]
    decomposition: Mapping[str, Mapping[str, Parts]]
    other_behaviours: Mapping[str, OtherBehaviour]
    contexts: Mapping[str, Curve]
    instruments: Mapping[str, Instrument]

    def title(self, probe: str) -> str:
        """What a probe is called in tables."""
        return self.dilemma_counts.noun if probe == DILEMMAS else probe

    @property
    def bands(self) -> Mapping[str, Mapping[str, Band]]:
        """Strength -> probe -> band of the random directions."""
        return self.controls[RANDOM]


@dataclass(frozen=True)
class Summary:
    """A finished run: its settings, its results, the seconds of its stages, and its warnings.

    noun: name of the items of the behaviour's probe. rounding: how far a half-precision dtype changes the scores; None
    in float32. ability: what the unedited model can answer, and the instrument of the headline that follows. judged:
    free replies by strength, by the model itself (`persona`) and, if one was given, by an endpoint (`http`). recipe:
    whose settings were used. other_claims: change of the reply log-ratio on the groups that the headline does not show,
    such as true claims, by group and strength. in_short: the result for readers without the field's terms; empty in
    summaries of earlier versions.
    """

    model: str
    behaviour: str
    adapter: str
    seed: int
    data_seed: int
    headline_group: str
    noun: str
    direction_norm: float
    geometry: Mapping[str, float]
    numbers: Numbers = field(metadata=FLAT)
    seconds: Mapping[str, float]
    warnings: tuple[str, ...]
    headline: str
    rounding: Mapping[str, Any] | None
    ability: Ability
    recipe: str = "own"
    other_claims: Mapping[str, Curve] = field(default_factory=dict)
    judged: Mapping[str, Mapping[str, Judged]] = field(default_factory=dict)
    in_short: str = ""

    @property
    def measured(self) -> Instrument:
        """The behaviour by the instrument of the headline."""
        return self.numbers.instruments[self.ability.instrument]

    @property
    def own(self) -> Mapping[str, Level]:
        """Strength -> level of the behaviour's own probe."""
        return self.numbers.levels[self.behaviour]

    @property
    def dilemmas(self) -> Mapping[str, Level]:
        """Strength -> level of the dilemmas."""
        return self.numbers.levels[DILEMMAS]

    @property
    def sentence(self) -> str:
        """The headline as a sentence."""
        return self.headline[0].upper() + self.headline[1:] + "."

    def change_of(self, behaviour: str, key: str) -> Estimate | None:
        """Change of a behaviour's probe at a strength, of this or of another behaviour; None where not measured."""
        if behaviour == self.behaviour:
            return self.numbers.change[behaviour].get(key)
        other = self.numbers.other_behaviours.get(behaviour)
        return other.change.get(key) if other else None


def read_summary(folder: Path) -> Summary:
    """The summary of a finished run. Raises `UserError` for one that another version wrote."""
    remedy = f"Write it again with: {console.command('report', folder)}"
    try:
        return restore(Summary, read_json(folder / SUMMARY_FILE, remedy))
    except (TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{folder / SUMMARY_FILE} was written by another version of ws", remedy) from error
