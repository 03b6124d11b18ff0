"""The results of a comparison: an entry per method with its effects, their parts and their cost.

`Findings` is a finished comparison. `comparison.json` is its plain form (`base.records`), from which the same records
can be read back. A number that does not exist is None.

Two probes have effects: `own`, the probe of the behaviour, and `dilemmas`. Signs are `+` and `-`. Effects are changes
against the base in nats.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from ws.base import stats
from ws.base.records import FLAT
from ws.eval.ability import Ability
from ws.report.findings import Estimate
from ws.report.sentences import is_mostly_yes_bias

Probe = Literal["own", "dilemmas"]

SIGNS = ("+", "-")
SIDES = {"+": "1", "-": "-1"}
"""Sign of a table -> its key in the records of calibration."""
PROBES: tuple[Probe, ...] = ("own", "dilemmas")
KINDS = {
    "weights": "weight directions", "variants": "parts of a weight direction", "untrained": "untrained directions",
    "activations": "activation steering", "prompts": "prompts",
}  # fmt: skip
"""Kinds of method. `weights`: dW of every family. `variants`: tau_pos, tau_neg, bisector. `untrained`: gradient steps
and constructions without data."""
METHODS = tuple(KINDS)
CONTROLS = "controls"
NOT_SEPARABLE = "not separable from random"
OFF_TARGET_WEIGHT = 0.1
LEAST_SEEDS = 3
"""Replicates from which on a verdict also looks at their interval: with two it is so wide that nothing is outside."""


@dataclass(frozen=True)
class Effect(Estimate):
    """A mean change with its interval over rows (whole clusters) and, with several seeds, one over seeds.

    p: two-sided, by flipping signs of whole clusters. seeds: the mean of every replicate. band: where 95 % of the
    method's own random controls are expected; None without them. outside: whether the effect is outside that band; None
    without a verdict. rows_alone: the interval over rows, if low and high also hold the uncertainty of a calibrated
    strength (`strength_limits.widened`); else None.
    """

    p: float
    seeds: tuple[float, ...]
    over_seeds: Estimate | None
    band: Estimate | None = None
    outside: bool | None = None
    rows_alone: Estimate | None = None

    @property
    def over(self) -> str:
        """What `low` and `high` are an interval over."""
        return "rows" if self.rows_alone is None else "rows and calibration"

    @property
    def intervals(self) -> tuple[Estimate, ...]:
        """Those that must be outside the band: over rows, and over seeds if there are at least `LEAST_SEEDS`."""
        return (self, self.over_seeds) if self.over_seeds and len(self.seeds) >= LEAST_SEEDS else (self,)


@dataclass(frozen=True)
class Parts:
    """The parts of a mean change (`changes.decompose`), and how many answers flip.

    balanced: towards the right answer, with equal weight on rows whose right answer is Yes and No; None if one kind is
    missing. up, down: rows whose answer flips to the right answer, and away from it.
    """

    truth: float
    bias: float
    scale: float | None
    beyond_scale: float
    balanced: float | None
    yes_bias: Estimate
    up: int
    down: int
    n: int

    @property
    def is_mostly_yes_bias(self) -> bool:
        """Whether the change is mostly towards Yes, not towards or away from the right answers."""
        return is_mostly_yes_bias(vars(self.yes_bias), self.truth)


@dataclass(frozen=True)
class Turned:
    """Dilemma answers that flip at one sign, means over replicates; `half`: its part of Surgical Informedness."""

    to_honest: float | None
    to_dishonest: float | None
    balanced: float | None
    half: Mapping[str, float | None]


@dataclass(frozen=True)
class Informedness:
    """Surgical Informedness of both signs, and its halves at + and -, in points; means over replicates."""

    score: float | None
    forward: float | None
    reverse: float | None


@dataclass(frozen=True)
class Spent:
    """KL to the base along the method's own greedy replies to neutral requests, nats per token, mean over replicates.

    `converged` says whether every search for the strength reached its budget; None without a search.
    """

    p95: float
    mean: float
    maximum: float
    converged: bool | None = None

    @property
    def is_missed(self) -> bool:
        """Whether a search for this strength missed its budget."""
        return self.converged is False


@dataclass(frozen=True)
class Cost:
    """Least answer mass, and side effects; None if not measured.

    KL and NLL change: on given answers to neutral requests, nats per token; intervals by bootstrap over texts. facts:
    share of facts answered right, with a Wilson interval. facts_moved: mean absolute change of their log-ratio.
    true_claims: log-ratio of agreeing with true claims. The last four describe greedy replies.
    """

    pmass: float
    facts: Estimate
    facts_seeds: tuple[float, ...]
    facts_moved: float
    kl: Estimate | None
    kl_p95: Estimate | None
    kl_max: float | None
    nll_delta: Estimate | None
    true_claims: float | None
    distinct3: float | None
    reply_tokens: float | None
    reply_finished: float | None
    json: float | None


@dataclass(frozen=True)
class Levels(Cost):
    """The unedited model on the same rows; every change is measured from these levels."""

    own: Estimate
    dilemmas: Estimate
    nll: float | None


@dataclass(frozen=True)
class Side(Cost):
    """A method at one sign: its strength (mean over replicates), its effects with their parts, and its cost."""

    alpha: float
    spent: Spent | None
    own: Effect
    dilemmas: Effect
    own_decomposition: Parts | None
    """None if no item of the own probe was asked in both polarities."""
    decomposition: Parts
    turned: Turned

    def effect(self, probe: Probe) -> Effect:
        """The effect on a probe."""
        return self.own if probe == "own" else self.dilemmas

    @property
    def selectivity(self) -> float:
        """Change of the behaviour minus a tenth of the change elsewhere (the facts), both without their direction."""
        return abs(self.own.mean) - OFF_TARGET_WEIGHT * self.facts_moved

    def parts(self, probe: Probe) -> Parts | None:
        """The parts of that effect; None if not measured."""
        return self.own_decomposition if probe == "own" else self.decomposition

    def is_yes_biased(self, probe: Probe) -> bool:
        """Whether the effect is mostly a change towards Yes."""
        parts = self.parts(probe)
        return parts is not None and parts.is_mostly_yes_bias

    def verdict(self, probe: Probe) -> str:
        """A warning about the effect for the reader, or empty."""
        if self.effect(probe).outside is False:
            return NOT_SEPARABLE
        return "mostly Yes-bias" if self.is_yes_biased(probe) else ""


@dataclass(frozen=True)
class Entry:
    """One method's numbers by sign; `kind` groups methods."""

    name: str
    kind: str
    note: str
    sides: Mapping[str, Side] = field(metadata=FLAT)
    informedness: Mapping[str, Informedness] | None = None
    """By penalty (`k1`, `k2`); None if a sign is missing."""


@dataclass(frozen=True)
class Control:
    """Directions or prompts without information about the behaviour, by sign: their effects, one per draw.

    of: the method that they are like. alpha: mean strength of the draws. p95: their KL, if it was measured.
    """

    name: str
    of: str
    note: str
    effects: Mapping[str, Mapping[Probe, Effect]]
    alpha: Mapping[str, float]
    p95: Mapping[str, float] = field(default_factory=dict)

    def band(self, sign: str, probe: Probe) -> Estimate | None:
        """Where 95 % of further draws are expected; None with fewer than two."""
        seeds = self.effects[sign][probe].seeds if sign in self.effects else ()
        return Estimate.of(stats.prediction_band(seeds)) if len(seeds) > 1 else None

    def mean(self, sign: str, probe: Probe) -> Estimate | None:
        """The mean over draws with its 95 % t interval; None with fewer than two."""
        seeds = self.effects[sign][probe].seeds
        return Estimate.of(stats.over_seeds(seeds)) if len(seeds) > 1 else None


@dataclass(frozen=True)
class Measured:
    """The methods and the controls of one table."""

    entries: tuple[Entry, ...]
    controls: tuple[Control, ...] = ()

    def entry(self, name: str) -> Entry | None:
        """A method by name."""
        return next((one for one in self.entries if one.name == name), None)


# -------------------------------------------------------------------- strengths


@dataclass(frozen=True)
class Reached:
    """KL to the base along greedy replies, nats per token, and the share of distinct trigrams in them."""

    p95: float
    mean: float
    maximum: float
    distinct: float


@dataclass(frozen=True)
class Search(Reached):
    """The strength that a search found for one replicate, and the KL at this strength.

    alpha_low, alpha_high: limits of the strength; None if not measured. at_own_strength: the KL at +-1; None if the
    search did not measure there.
    """

    seed: int | None
    data_seed: int | None
    alpha: float
    converged: bool
    tolerance: float
    alpha_low: float | None = None
    alpha_high: float | None = None
    at_own_strength: Reached | None = None


@dataclass(frozen=True)
class Strengths:
    """The searches for every budget, by budget (`0.5`), method, and side (`1` and `-1`).

    prompts: only a KL, because prompts have no strength.
    """

    edits: Mapping[str, Mapping[str, Mapping[str, tuple[Search, ...]]]]
    prompts: Mapping[str, Mapping[str, Reached]]

    @property
    def budgets(self) -> tuple[str, ...]:
        """The budgets, smallest first: 95th percentile of KL, nats per token."""
        return tuple(self.edits)


# -------------------------------------------------------------------- a whole comparison


@dataclass(frozen=True)
class Findings:
    """A measured comparison.

    best: per kind the method that the headline shows, chosen on the dev split at equal KL. equal_kl: entries by budget.
    dilemmas: their source. seconds: wall-clock seconds by phase, including `total`. dilemma_noun: what the dilemmas are
    called. ability: what the unedited model can answer, and the instrument of the behaviour that follows. reference:
    the method whose parts and norms the others take.
    """

    model: str
    behaviour: str
    best: Mapping[str, str]
    base: Levels
    own_strength: Measured
    equal_kl: Mapping[str, Measured]
    calibration: Strengths
    dilemmas: str
    seconds: Mapping[str, float]
    dilemma_noun: str
    ability: Ability
    reference: str

    @property
    def headline_budget(self) -> str:
        """The budget that the headline speaks of: the one in the middle."""
        budgets = self.calibration.budgets
        return budgets[len(budgets) // 2]


class Shown(NamedTuple):
    """One line of a table: an entry at one sign."""

    entry: Entry
    sign: str
    side: Side

    @property
    def name(self) -> str:
        """Method and sign in words."""
        return f"{self.entry.name} at {self.sign}"


def shown(entries: Iterable[Entry], kinds: Collection[str] | None = None) -> Iterator[Shown]:
    """Every entry at every sign that it has, in the order of tables; `kinds` None takes all."""
    for entry in entries:
        if kinds is None or entry.kind in kinds:
            yield from (Shown(entry, sign, entry.sides[sign]) for sign in SIGNS if sign in entry.sides)


def mostly_yes_bias(entries: Iterable[Entry], probe: Probe) -> list[Shown]:
    """Methods, with their sign, whose change on a probe is mostly towards Yes."""
    return [line for line in shown(entries, METHODS) if line.side.is_yes_biased(probe)]
