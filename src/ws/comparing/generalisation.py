"""How far does each direction move what it was not trained for, and could one have known before training?

    effect[i, j] = (change of probe j at + minus change at -) / 2        dW_i at equal KL to the base, test rows

Three predictions of the effect of direction i on probe j are made without dW_i on probe j. All use dev rows:

    persona    the same difference under the two system prompts of behaviour i, mean over its persona pairs
    gradient   the derivative of probe j along one gradient step on the pairs of behaviour i, by a central difference
    cosine     cos(dW_i, dW_j); only if probe j belongs to a behaviour with a direction of its own

Agreement is Spearman's rank correlation over all pairs (i, j) in which j is not the behaviour of i. The ceiling is the
same correlation between single replicates: no prediction of one replicate can be expected to do better.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import polars as pl

from ws.algebra.direction import Direction
from ws.base import console, rankings, stats
from ws.base.errors import UserError
from ws.base.files import digest, read_json, write_json, write_table
from ws.base.poles import POLES
from ws.base.stats import Interval
from ws.base.store import RunFolder, Shards
from ws.baselines import gradient, prompts
from ws.edit.condition import BASE, PLAIN, Condition, Context, Edit
from ws.eval import dilemmas, feedback, instrument
from ws.eval.ability import Name
from ws.fitting import behaviour, train
from ws.fitting.behaviour import Behaviour
from ws.fitting.run_settings import Settings, limit_of, scored_with, shared_base
from ws.fitting.stages import FittedRun
from ws.measure import calibrate
from ws.measure.probe import Probe, split
from ws.measure.score import score
from ws.model.loading import ChatModel
from ws.report.findings import Estimate
from ws.report.summary import Scores
from ws.runs.replicate import Replication

PREDICTIONS = ("persona", "gradient", "cosine")
SIGNS = (1, -1)
STEP = 0.1
"""Strength of the gradient step at which its derivative is taken; the step at strength 1 has the norm of dW."""
GRADIENT_ROWS = 200
"""About this many responses of each side are read by the gradient step."""


@dataclass(frozen=True)
class Pair:
    """A direction and a probe: the effect of every replicate, and the predictions (None: there is none)."""

    direction: str
    probe: str
    replicates: tuple[float, ...]
    persona: float
    gradient: float
    cosine: float | None

    @property
    def is_own(self) -> bool:
        """Whether the direction was trained for this probe."""
        return self.direction == self.probe

    @property
    def effect(self) -> Estimate:
        """Mean over replicates with its t interval."""
        return Estimate.of(stats.over_seeds(self.replicates))


@dataclass(frozen=True)
class Agreement:
    """Rank correlation of a prediction with the effects, over `n` pairs; limits are None with fewer than four."""

    name: str
    n: int
    rho: float
    low: float | None
    high: float | None

    @classmethod
    def of(cls, name: str, found: Interval) -> Agreement:
        """From an interval of `rankings.spearman`."""
        low, high = (None if math.isnan(one) else one for one in (found.low, found.high))
        return cls(name, found.n, found.mean, low, high)


@dataclass(frozen=True)
class Generalisation:
    """All pairs of one model and adapter family. budget: KL that every direction costs, nats per token, p95.

    instruments: how each behaviour is measured. strengths: the mean calibrated alphas at + and - by behaviour.
    """

    model: str
    adapter: str
    budget: float
    replicates: int
    instruments: Mapping[str, Name]
    strengths: Mapping[str, tuple[float, float]]
    pairs: tuple[Pair, ...]

    @cached_property
    def others(self) -> tuple[Pair, ...]:
        """The pairs that count: the probe is not the direction's own."""
        return tuple(pair for pair in self.pairs if not pair.is_own)

    def agreements(self) -> list[Agreement]:
        """Every prediction on all pairs that it has, then all of them on the pairs that have a cosine, then the
        ceiling."""
        with_cosine = [pair for pair in self.others if pair.cosine is not None]
        found = [_agreement(name, name, self.others) for name in ("persona", "gradient")]
        found += [_agreement(f"{name}, behaviours only", name, with_cosine) for name in PREDICTIONS]
        return [*found, *self.ceiling()]

    def ceiling(self) -> list[Agreement]:
        """Mean rank correlation between two replicates, without limits; nothing with one replicate."""
        columns = np.array([pair.replicates for pair in self.others]).T
        found = [rankings.spearman(a, b).mean for a, b in itertools.combinations(columns, 2)]
        return [Agreement("another replicate", len(self.others), float(np.mean(found)), None, None)] if found else []


def _agreement(label: str, prediction: str, pairs: Sequence[Pair]) -> Agreement:
    predicted = [getattr(pair, prediction) for pair in pairs]
    return Agreement.of(label, rankings.spearman(predicted, [pair.effect.mean for pair in pairs]))


# -------------------------------------------------------------------- measuring


@dataclass(frozen=True)
class Trained:
    """A behaviour with the fitted runs of all replicates, the prompts of its personas, and its probe."""

    behaviour: Behaviour
    runs: Mapping[tuple[int, int], FittedRun]
    instrument: Name
    probe: Probe

    @property
    def name(self) -> str:
        """The name of the behaviour."""
        return self.behaviour.name

    @cached_property
    def edits(self) -> tuple[Edit, ...]:
        """The direction of every replicate."""
        return tuple(
            Edit(f"dW:{self.name}, seed {seed}, data seed {data_seed}", run.direction, seed, data_seed)
            for (seed, data_seed), run in self.runs.items()
        )

    @cached_property
    def personas(self) -> Mapping[int, tuple[Context, ...]]:
        """The system prompts of both sides."""
        pool = prompts.all_personas(self.behaviour)
        return {
            side: tuple(Context(f"{self.name}: {one.context.name}", one.text) for one in pool if one.side == side)
            for side in SIGNS
        }  # fmt: skip


class Study:
    """The trained behaviours of a model on each other's probes, kept in `out/<model>/generalisation/<adapter>/`."""

    def __init__(
        self, settings: Settings, names: Sequence[str], seeds: Sequence[int], data_seeds: Sequence[int], budget: float
    ) -> None:
        if len(set(names)) < 2:
            raise UserError("one behaviour has nothing to generalise to", "Give --behaviours two names or more.")
        calibrate.require_budget(budget, "--budget")
        self.settings, self.budget, self.model = settings, budget, settings.load()
        self.trained = [self._fitted(name, seeds, data_seeds) for name in dict.fromkeys(names)]
        first = next(iter(self.trained[0].runs.values()))
        self.folder = RunFolder(first.folder.parents[2] / "generalisation" / settings.adapter, {
            "model": self.model.slug, "fingerprint": self.model.fingerprint, "adapter": settings.adapter,
        })  # fmt: skip

    def __enter__(self) -> Study:
        return self

    def __exit__(self, *_: object) -> None:
        self.folder.close()

    def _fitted(self, name: str, seeds: Sequence[int], data_seeds: Sequence[int]) -> Trained:
        subject, found = behaviour.load(name), {}
        measured_by: Name | None = None
        for data_seed, seed in itertools.product(data_seeds, seeds):
            wanted = replace(self.settings, behaviour=name, seed=seed, data_seed=data_seed)
            console.say(f"\n{subject.name}, seed {seed}, data seed {data_seed}", style="bold")
            with Replication(wanted, self.model) as run:
                found[seed, data_seed] = run.fitted
                measured_by = measured_by or run.ability.instrument
        assert measured_by is not None  # there is at least one seed
        limit = limit_of(self.settings, self.model, measured_by)
        return Trained(subject, found, measured_by, instrument.headline_probe(measured_by, subject, limit))

    @cached_property
    def probes(self) -> Mapping[str, Probe]:
        """What is measured, by name: the probe of every behaviour, the dilemmas, feedback."""
        settings = self.settings
        told = dilemmas.load(settings.dilemmas, limit_of(settings, self.model, "dilemmas"))
        found = {one.name: one.probe for one in self.trained}
        others = {told.noun: told.probe(), feedback.NAME: feedback.probe(limit_of(settings, self.model, "others"))}
        return found | others

    def strengths(self) -> Mapping[str, Mapping[str, tuple[float, ...]]]:
        """The strength of every replicate at + and - that costs the budget, by behaviour and side."""
        texts = calibrate.neutral_prompts(16)
        wanted = [(one.name, edit, side) for one in self.trained for side in SIGNS for edit in one.edits]
        inputs = {
            "version": calibrate.VERSION, "budget": self.budget, "texts": texts, **scored_with(self.model),
            "edits": [Condition.of(edit, side).content_key for _, edit, side in wanted],
        }  # fmt: skip
        file = self.folder / "strengths.json"

        def make(shards: Shards) -> None:
            found: dict[str, dict[str, tuple[float, ...]]] = {}
            for name, edit, side in console.track(wanted, "calibrating", len(wanted)):
                part = shards.path(f"{Condition.of(edit, side).content_key}.json")
                if not part.is_file():
                    assert isinstance(edit.effect, Direction)
                    solved = calibrate.to_budget(self.model, edit.effect, self.budget, texts, sign=side, tokens=30)
                    write_json(part, solved.alpha)
                of_side = found.setdefault(name, {})
                of_side[str(side)] = (*of_side.get(str(side), ()), float(read_json(part)))
            write_json(file, found)

        self.folder.build("strengths", inputs, [file.name], make)
        stored: dict[str, dict[str, list[float]]] = read_json(file)
        return {name: {side: tuple(some) for side, some in sides.items()} for name, sides in stored.items()}

    def effects(self) -> pl.DataFrame:
        """Scores of the test rows under every direction at its strengths."""
        found = self.strengths()
        conditions = [
            Condition.of(edit, alpha)
            for one in self.trained for side in SIGNS
            for edit, alpha in zip(one.edits, found[one.name][str(side)], strict=True)
        ]  # fmt: skip
        inputs = {"conditions": [one.content_key for one in conditions]}
        return self._scored("effects", inputs, lambda: conditions, dev=False)

    def predictions(self) -> pl.DataFrame:
        """Scores of the dev rows under the personas and under a small gradient step of every behaviour."""
        sources = [next(iter(one.runs.values())) for one in self.trained]
        inputs = {
            "pairs": [digest(run.folder / "pairs.parquet") for run in sources],
            "training": [run.training.adapter.layers for run in sources],
            "norms": [run.direction.norm() for run in sources],
            "personas": [one.behaviour.personas for one in self.trained],
            "step": STEP, "rows": GRADIENT_ROWS,
        }  # fmt: skip

        def conditions() -> list[Condition]:
            steps = [_gradient_step(self.model, one) for one in self.trained]
            said = [Condition(context) for one in self.trained for some in one.personas.values() for context in some]
            return [*said, *(Condition.of(step, sign * STEP) for step in steps for sign in SIGNS)]

        return self._scored("predictions", inputs, conditions, dev=True)

    def _scored(
        self, stage: str, inputs: Mapping[str, Any], conditions: Callable[[], list[Condition]], *, dev: bool
    ) -> pl.DataFrame:
        probes = [split(probe, dev=dev) for probe in self.probes.values()]
        path = self.folder / f"{stage}.parquet"
        everything = {**inputs, "probes": [probe.key for probe in probes], **scored_with(self.model)}

        def make(shards: Shards) -> None:
            base = shared_base(self.model, self.settings.out)
            asked = [Condition(), *conditions()]
            write_table(path, score(self.model, probes, asked, shards=shards, base_shards=base, description=stage))

        self.folder.build(stage, everything, [path.name], make)
        return pl.read_parquet(path)

    def result(self) -> Generalisation:
        """Measure what is missing, and combine the effects with the predictions."""
        strengths = self.strengths()
        moved, predicted = Scores(self.effects()), Scores(self.predictions())
        cosines = _cosines(self.trained)
        pairs = tuple(
            Pair(
                one.name, name, _effects(moved, one, strengths[one.name], probe),
                _by_persona(predicted, one, probe), _by_gradient(predicted, one, probe),
                cosines.get((one.name, name)),
            )
            for one in self.trained for name, probe in self.probes.items()
        )  # fmt: skip
        return Generalisation(
            self.model.slug, self.settings.adapter, self.budget, len(self.trained[0].runs),
            {one.name: one.instrument for one in self.trained},
            {
                name: (float(np.mean(sides["1"])), float(np.mean(sides["-1"])))
                for name, sides in strengths.items()
            },
            pairs,
        )  # fmt: skip


def _gradient_step(model: ChatModel, one: Trained) -> Edit:
    """One gradient step on the pairs of the first replicate, with the norm of its direction."""
    (seed, data_seed), run = next(iter(one.runs.items()))
    sides = [train.examples(model, run.pairs, pole, run.training, data_seed).train for pole in POLES]
    pos, neg = (rows[:: max(1, len(rows) // GRADIENT_ROWS)] for rows in sides)
    step = gradient.steps(
        model, pos, neg, count=1, seed=seed, norm=run.direction.norm(), layers=run.training.adapter.layers
    )
    return Edit(_step_name(one), step)


def _step_name(one: Trained) -> str:
    return f"gradient step: {one.name}"


def _cosines(trained: Sequence[Trained]) -> dict[tuple[str, str], float]:
    """Mean cosine of the directions of two behaviours over all pairs of replicates."""
    return {
        (one.name, other.name): float(np.mean([
            a.direction.cosine(b.direction) for a in one.runs.values() for b in other.runs.values()
        ]))
        for one in trained for other in trained if one is not other
    }  # fmt: skip


# -------------------------------------------------------------------- from scores to effects


def _effects(scores: Scores, one: Trained, strengths: Mapping[str, Sequence[float]], probe: Probe) -> tuple[float, ...]:
    """Half the difference between the changes at + and at -, by replicate."""
    return tuple(
        (_change(scores, probe, edit.name, plus) - _change(scores, probe, edit.name, minus)) / 2
        for edit, plus, minus in zip(one.edits, strengths["1"], strengths["-1"], strict=True)
    )


def _by_persona(scores: Scores, one: Trained, probe: Probe) -> float:
    """Half the difference between the changes under the positive and the negative personas."""
    means = {
        side: np.mean([_change(scores, probe, BASE, 0.0, context.name) for context in some])
        for side, some in one.personas.items()
    }
    return float(means[1] - means[-1]) / 2


def _by_gradient(scores: Scores, one: Trained, probe: Probe) -> float:
    """Central difference at `STEP`, per unit of strength."""
    up, down = (_change(scores, probe, _step_name(one), sign * STEP) for sign in SIGNS)
    return (up - down) / (2 * STEP)


def _change(scores: Scores, probe: Probe, edit: str, alpha: float, context: str = PLAIN.name) -> float:
    """Mean signed change of a probe against the base, nats."""
    rows = dilemmas.counted(scores.rows(probe.name, "logratio", edit, alpha, context=context))
    return float(((rows["value"] - rows["base"]) * rows["label"]).mean())  # type: ignore[arg-type]
