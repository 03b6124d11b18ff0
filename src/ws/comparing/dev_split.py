"""The dev split: methods choose their strength, layer and wording on dev rows; results are on the other rows (test).

A quarter of a probe's clusters is dev. The split depends only on a digest of the cluster names, so it never changes.
Every method has the same budget of dev evaluations, and the same rule says which strengths may be chosen at all.
"""

from __future__ import annotations

import math
import re
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import polars as pl

from ws.base import console
from ws.base.files import read_json, write_json
from ws.base.store import RunFolder, Shards
from ws.baselines.prompts import Prompt
from ws.baselines.repe import ActivationDirection, Unit
from ws.edit.condition import PLAIN, Condition, Edit
from ws.eval import side_effects
from ws.fitting.run_settings import scored_with
from ws.measure.probe import Probe, split
from ws.measure.score import score
from ws.model.loading import ChatModel
from ws.report.summary import FACTS_LOST, LOW_MASS, Scores, accuracy

SIGNS = (1, -1)
EVALUATIONS = 48
"""Candidates times strengths that one method may try, each at both signs."""
MOST_P95, MOST_RMS = 1.0, 1.0
"""KL to the base that a chosen strength may cost on neutral text, nats per token: 95th percentile over texts, and root
mean square. The mean alone misses a few broken texts."""
MOST_NLL = 0.5
"""Rise of the NLL of neutral text that a chosen strength may cost, nats per token."""
MASS_LOST = 0.1
"""Answer mass that a strength may cost on the facts, if the behaviour is measured by replies."""
NEUTRAL_TEXTS = 20
"""Neutral requests for choosing; no table shows them."""
STRENGTHS: Mapping[Unit, tuple[float, ...]] = {
    "difference": (0.05, 0.1, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0),
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


def best_strength(
    model: ChatModel,
    own: Probe,
    name: str,
    fitted: Mapping[Option, ActivationDirection],
    folder: RunFolder | None = None,
) -> Chosen[Option]:
    """The candidate and strength that move the behaviour furthest, both signs together.

    The strengths tried are those of each candidate's unit. If all strengths of all candidates are more than
    `EVALUATIONS`, every candidate is first tried at its middle strength, and those that move furthest for their KL get
    the rest.

    own: the probe that measures the behaviour. folder: keeps the choice and, until it is made, its scores. A strength
    is admissible (`_Dev.is_admissible`) or not at both signs together. If none is, the first candidate at its smallest
    strength is used, with a warning.
    """
    file = f"choice-{re.sub('[^a-z0-9]+', '-', name.lower())}.json"
    dev, options = _Dev(model, own, name, fitted), list(fitted)
    if folder is None:
        return _best(dev, fitted)
    inputs = {
        "candidates": [one.content_key for one in fitted.values()], "probes": [probe.key for probe in dev.probes],
        "strengths": STRENGTHS, "limits": [EVALUATIONS, MOST_P95, MOST_RMS, MOST_NLL, MASS_LOST, FACTS_LOST, LOW_MASS],
        **scored_with(model),
    }  # fmt: skip

    def make(shards: Shards) -> None:
        dev.shards = shards
        found = _best(dev, fitted)
        write_json(folder / file, {"candidate": options.index(found.option), "strength": found.strength,
                                   "remark": found.remark})  # fmt: skip

    folder.build(file.removesuffix(".json"), inputs, [file], make)
    known = read_json(folder / file)
    return Chosen(options[known["candidate"]], known["strength"], known["remark"])


def _best(dev: _Dev[Option], fitted: Mapping[Option, ActivationDirection]) -> Chosen[Option]:
    strengths = {option: STRENGTHS[one.unit] for option, one in fitted.items()}
    kept = list(fitted)
    most = max(len(some) for some in strengths.values())
    if len(kept) * most > EVALUATIONS:
        tried = {option: strengths[option][len(strengths[option]) // 2 - 1] for option in kept}
        dev.screen(tried.items())
        kept = sorted(kept, key=lambda option: -dev.moved_per_cost(option, tried[option]))
        kept = kept[: max(1, (EVALUATIONS - len(fitted)) // most)]
    dev.measure([(option, strength) for option in kept for strength in strengths[option]])
    allowed = [(option, s) for option in kept for s in strengths[option] if dev.is_admissible(option, s)]
    if not allowed:
        option = kept[0]
        smallest = strengths[option][0]
        console.warn(f"{dev.name}: on the dev split every strength costs too much; using {smallest:g}")
        return Chosen(option, smallest, "none admissible")
    option, strength = max(allowed, key=lambda one: dev.moved(*one))
    return Chosen(option, strength, "the largest tried" if strength == strengths[option][-1] else "")


class _Dev(Generic[Option]):
    """The candidates of one method on dev rows, at the strengths that were measured so far."""

    def __init__(self, model: ChatModel, own: Probe, name: str, fitted: Mapping[Option, ActivationDirection]) -> None:
        self.model, self.own, self.name = model, own, name
        self.edits = {option: Edit(f"{name} {number}", fitted[option]) for number, option in enumerate(fitted)}
        self.probes = [
            split(own, dev=True), split(side_effects.facts(), dev=True),
            *side_effects.neutral(NEUTRAL_TEXTS, held_out=False),
        ]  # fmt: skip
        self.shards: Shards | None = None
        self._first: pl.DataFrame | None = None
        self._screened: dict[tuple[Option, float], Scores] = {}
        self._tables: dict[tuple[Option, float], Scores] = {}

    def screen(self, tried: Iterable[tuple[Option, float]]) -> None:
        """Score candidates on the probes that `moved_per_cost` reads, at strengths of both signs; once, before all."""
        asked = list(tried)
        self._first = self._score(asked, [probe for probe in self.probes if probe.name in self._of_movement])
        self._screened = dict.fromkeys(asked, Scores(self._first))

    def measure(self, tried: Iterable[tuple[Option, float]]) -> None:
        """Score candidates on all probes at strengths of both signs; what was screened is not scored again."""
        asked = list(tried)
        if new := [one for one in asked if one not in self._screened]:
            self._tables |= dict.fromkeys(new, Scores(self._score(new, self.probes)))
        if known := [one for one in asked if one in self._screened]:
            rest = self._score(known, [probe for probe in self.probes if probe.name not in self._of_movement])
            assert self._first is not None
            self._tables |= dict.fromkeys(known, Scores(pl.concat([self._first, rest])))

    @property
    def _of_movement(self) -> tuple[str, str]:
        return (self.own.name, side_effects.NEUTRAL_KL)

    def _score(self, tried: Sequence[tuple[Option, float]], probes: Sequence[Probe]) -> pl.DataFrame:
        conditions = [Condition.of(self.edits[option], sign * s) for option, s in tried for sign in SIGNS]
        return score(self.model, probes, conditions, shards=self.shards, description=f"choosing {self.name}")

    def moved(self, option: Option, strength: float) -> float:
        """Mean change of the behaviour over both signs, nats."""
        found = 0.0
        for sign in SIGNS:
            rows = self._rows(option, sign * strength, self.own.name, "logratio")
            found += sign * _mean((rows["value"] - rows["base"]) * rows["label"]) / len(SIGNS)
        return found

    def moved_per_cost(self, option: Option, strength: float) -> float:
        """The movement over the root of the KL that it costs: both grow in proportion to a small strength."""
        kl = pl.concat([self._rows(option, sign * strength, side_effects.NEUTRAL_KL, "kl") for sign in SIGNS])
        return self.moved(option, strength) / math.sqrt(max(_mean(kl["value"]), 1e-12))

    def is_admissible(self, option: Option, strength: float) -> bool:
        """Whether both signs keep the answer mass and the facts (`FACTS_LOST`), and cost little KL and NLL.

        The mass is that of the own probe, at least `LOW_MASS`; replies have none, and then the facts must keep theirs
        up to `MASS_LOST`.
        """
        scores, facts = self._tables[option, strength], side_effects.FACTS
        base_facts = accuracy(scores.rows(facts, "logratio", "", 0.0))
        massed, floor = self.own.name, LOW_MASS
        if self.own.kind == "contrast":
            massed, floor = facts, _mean(scores.rows(facts, "pmass", "", 0.0)["value"]) - MASS_LOST
        for alpha in (sign * strength for sign in SIGNS):
            kl = self._rows(option, alpha, side_effects.NEUTRAL_KL, "kl")["value"]
            nll = self._rows(option, alpha, side_effects.NEUTRAL_NLL, "nll")
            p95 = kl.quantile(0.95, "linear")
            if (
                _mean(self._rows(option, alpha, massed, "pmass")["value"]) < floor
                or accuracy(self._rows(option, alpha, facts, "logratio")) < base_facts - FACTS_LOST
                or p95 is None or p95 > MOST_P95 or math.sqrt(_mean(kl**2)) > MOST_RMS
                or _mean(nll["value"] - nll["base"]) > MOST_NLL
            ):  # fmt: skip
                return False
        return True

    def _rows(self, option: Option, alpha: float, probe: str, metric: str) -> pl.DataFrame:
        key = (option, abs(alpha))
        return (self._tables.get(key) or self._screened[key]).rows(probe, metric, self.edits[option].name, alpha)


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
