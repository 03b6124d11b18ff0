"""The fair comparison: weight directions, activation steering, prompts and controls on identical rows.

Every method (`methods`) is a Condition, and one engine scores all of them into one table: at each method's own +-1, and
at equal KL to the base on neutral text. All choices are made on the dev split, including the choice of the method that
the headline shows. All results are on the test split, so that all methods have the same rows. Uncertainty over rows and
uncertainty over seeds are reported separately.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import polars as pl

from ws import adapters
from ws.base import console
from ws.base.errors import UserError
from ws.base.records import plain, restore
from ws.base.store import RunFolder, Shards, content_key, read_json, write_json, write_table
from ws.baselines import peer_vectors, repe
from ws.baselines.controls import RANDOM
from ws.comparing import methods, numbers, page
from ws.comparing.dev_split import split
from ws.comparing.findings import CONTROLS, KINDS, SIDES, Findings, Reached, Search, Spent, Strengths
from ws.comparing.methods import Method, Sources
from ws.comparing.numbers import Line, LineScores, Place
from ws.edit.condition import PLAIN, Condition
from ws.eval import dilemmas, instrument, side_effects, sycophancy
from ws.eval.ability import Ability
from ws.fitting.run_settings import Settings, limit_of, recommended, scored_with, shared_base
from ws.fitting.stages import FittedRun
from ws.measure import calibrate
from ws.measure.divergence import Divergence, prompt_divergence
from ws.measure.probe import Probe
from ws.measure.score import score
from ws.model.loading import ChatModel
from ws.runs.replicate import Replication

SMALLEST_BAND = 2
"""Least number of random directions for a prediction band."""


@dataclass(frozen=True)
class Plan:
    """The settings of a comparison.

    activations: names of variants of activation steering. peers: vectors of other libraries, as LIBRARY:FILE.
    shuffles: number of adapters trained on shuffled personas.
    target: KL budget in nats per token (None: the KL of the engineered prompt of the positive side, or without one the
    KL of the first persona).
    """

    families: tuple[str, ...] = ("lora", "dora", "pissa", "delora", "oft", "ia3")
    seeds: tuple[int, ...] = (0,)
    activations: tuple[str, ...] = ("mean", "incremental", "pca-diff", "logistic", "single-layer")
    peers: tuple[str, ...] = ()
    random_seeds: int = 10
    permutations: int = 3
    shuffles: int = 5
    target: float | None = None
    calibration_prompts: int = 16
    calibration_tokens: int = 30

    def __post_init__(self) -> None:
        if not (self.families and self.seeds):
            raise UserError("the comparison has no family or no seed", "Give --families and --seeds one value or more.")
        if self.random_seeds < SMALLEST_BAND:
            raise UserError(
                f"{self.random_seeds} random directions are too few for a control band",
                f"Give --random-seeds {SMALLEST_BAND} or more; 10 is the default.",
            )
        if self.target is not None:
            calibrate.require_budget(self.target)
        for family in self.families:
            adapters.require_family(family)
        for name in self.activations:
            if name not in repe.VARIANTS:
                known = ", ".join(repe.VARIANTS)
                raise UserError(f"there is no activation steering {name!r}", f"Choose from: {known}.")
        peer_vectors.parse_all(self.peers)


class ComparisonRun:
    """One model and one behaviour: all methods, calibrated and scored, in `<behaviour>/compare/`.

    With dilemmas from another source, the folder is `compare-<source>-<digest>/`.
    """

    def __init__(self, settings: Settings, plan: Plan, model: ChatModel | None = None) -> None:
        self.settings = replace(settings, alphas=(-1.0, 0.0, 1.0), control_seeds=0)
        self.plan = plan
        everything = dilemmas.load(settings.dilemmas)  # a wrong source fails before hours of fits
        self.settings, self.model = recommended(self.settings, model or settings.load())
        self.settings = replace(self.settings, alphas=(-1.0, 0.0, 1.0), control_seeds=0)
        self.dilemmas = everything.first(limit_of(self.settings, self.model, "dilemmas"))
        self.ability: Ability | None = None
        self.peers = {file: file.read(self.model) for file in peer_vectors.parse_all(plan.peers)}
        runs = {(family, seed): run for family in plan.families for seed, run in self._replicate(family).items()}
        reference = next(iter(runs.values()))
        self.behaviour = reference.behaviour
        place = reference.folder.parents[1]
        self.folder = RunFolder(place / _folder_name(settings.dilemmas), {
            "model": self.model.slug, "fingerprint": self.model.fingerprint, "behaviour": self.behaviour.name,
        })  # fmt: skip
        assert self.ability is not None  # every run knows it
        own = instrument.headline_probe(self.ability.instrument, self.behaviour, self._limit(self.ability.instrument))
        self.sources: Sources = Sources(
            self.model, runs, own, settings.data_seed, self.folder, sorted(place.glob("compare*"))
        )
        self.has_measured: bool = False

    def __enter__(self) -> ComparisonRun:
        return self

    def __exit__(self, *_: object) -> None:
        self.folder.close()

    def _replicate(self, family: str) -> dict[int, FittedRun]:
        """The runs of a family by seed; missing runs are fitted."""
        console.say(f"\n{family}, seeds {' '.join(map(str, self.plan.seeds))}", style="bold")
        found = {}
        for seed in self.plan.seeds:
            with Replication(replace(self.settings, adapter=family, seed=seed), self.model) as run:
                found[seed] = run.fitted
                self.ability = self.ability or run.ability
        return found

    def _limit(self, probe: str) -> int | None:
        return limit_of(self.settings, self.model, probe)

    def methods(self) -> list[Method]:
        """All methods, in the order of the tables."""
        plan = self.plan
        return [
            *methods.weight_directions(self.sources),
            *methods.activation_directions(self.sources, plan.activations),
            *methods.peer_vectors(self.sources, self.peers),
            *methods.system_prompts(self.sources),
            *methods.control_directions(
                self.sources, random_seeds=plan.random_seeds, permutations=plan.permutations, shuffles=plan.shuffles
            ),
        ]

    # ---------------------------------------------------------------- measuring

    def probes(self) -> list[Probe]:
        """The test rows of the behaviour's probe and the dilemmas, and the side effects."""
        by_choice = self.sources.own.kind == "choice"
        own = sycophancy.probe(self.behaviour, self._limit("choice")) if by_choice else self.sources.own
        return [
            split(own, dev=False),
            split(self.dilemmas.probe(), dev=False),
            # the strengths of activation steering were chosen on the other facts
            *(split(probe, dev=False) if probe.name == side_effects.FACTS else probe
              for probe in side_effects.probes(self.model, self._limit("side_effects"))),
        ]  # fmt: skip

    def dev_scores(self, compared: Sequence[Method]) -> pl.DataFrame:
        """Scores on the dev rows of the behaviour's probe, for the methods that a headline may show."""
        wanted = [method for method in compared if method.kind in KINDS]
        conditions = [Condition(), *(condition for method in wanted for condition in method.conditions())]
        return self._scored("scores_dev", [split(self.sources.own, dev=True)], conditions)

    def scores(self, compared: Sequence[Method], calibration: Strengths) -> pl.DataFrame:
        """All methods at their own +-1 and at their calibrated strengths, all replicates, one table."""
        conditions = [Condition(), *(condition for method in compared for condition in method.conditions())]
        for method in compared:
            at = calibrated_places(method, calibration)
            conditions += [Condition.of(edit, place.alpha_of(edit.seed)) for place in at.values()
                           for edit in method.edits]  # fmt: skip
        return self._scored("scores", self.probes(), conditions)

    def _scored(self, stage: str, probes: Sequence[Probe], conditions: Sequence[Condition]) -> pl.DataFrame:
        path = self.folder / f"{stage}.parquet"
        inputs = {
            "probes": [probe.key for probe in probes],
            "conditions": [[condition.key(), condition.content_key] for condition in conditions],
            **scored_with(self.model),
        }

        def make(shards: Shards) -> None:
            base = shared_base(self.model, self.settings.out)
            table = score(self.model, probes, conditions, shards=shards, base_shards=base, description="scoring")
            write_table(path, table)

        self.has_measured |= self.folder.build(stage, inputs, [path.name], make).built
        return pl.read_parquet(path)

    def strengths(self, compared: Sequence[Method]) -> Strengths:
        """The strength that reaches the KL budget, for every Edit, sign and replicate; prompts have only a KL."""
        texts = calibrate.neutral_prompts(self.plan.calibration_prompts)
        tokens = self.plan.calibration_tokens
        prompted = {
            method.name: {
                str(side): _reached(prompt_divergence(self.model, context, texts, tokens=tokens))
                for side, context in method.contexts.items()
            }
            for method in compared
            if method.contexts
        }
        anchor = next((n for n in ("prompt: embody", "prompt: simple") if n in prompted), None)
        if self.plan.target is not None:
            anchor = None
        target = self.plan.target or (prompted[anchor]["1"].p95 if anchor else 0.5)
        edits = [(method.name, edit) for method in compared if method.kind != CONTROLS for edit in method.edits]
        inputs = {"version": calibrate.VERSION, "target": target, "texts": texts, "tokens": tokens,
                  "prompts": plain(prompted), **scored_with(self.model),
                  "edits": [[name, Condition.of(edit, 1.0).content_key] for name, edit in edits]}  # fmt: skip
        file = self.folder / "calibration.json"

        def make(_: Shards) -> None:
            found: dict[str, dict[str, tuple[Search, ...]]] = {}
            for name, edit in console.track(edits, "calibrating", len(edits)):
                sides = found.setdefault(name, dict.fromkeys(SIDES.values(), ()))
                for side in SIDES.values():
                    solved = calibrate.to_budget(self.model, edit.effect, target, texts, sign=int(side), tokens=tokens)
                    at_own = next((_reached(seen) for seen in solved.history if abs(seen.alpha) == 1), None)
                    sides[side] += (Search(
                        **vars(_reached(solved.reached)), seed=edit.seed, alpha=solved.alpha,
                        converged=solved.converged, tolerance=solved.tolerance, alpha_low=solved.alpha_low,
                        alpha_high=solved.alpha_high, at_own_strength=at_own,
                    ),)  # fmt: skip
            family, seed = self.sources.first
            write_json(file, plain(Strengths(target, anchor, f"dW:{family}, seed {seed}", found, prompted)))

        self.has_measured |= self.folder.build("calibration", inputs, ["calibration.json"], make).built
        return restore(Strengths, read_json(file))


# -------------------------------------------------------------------- a whole comparison


@dataclass(frozen=True)
class Result:
    """A finished comparison: its findings, and the folder with its tables."""

    found: Findings
    folder: Path


def run(settings: Settings, plan: Plan, model: ChatModel | None = None) -> Result:
    """Run a comparison and write its tables."""
    started, seconds = time.perf_counter(), dict[str, float]()
    with _timed(seconds, "fits"):
        opened = ComparisonRun(settings, plan, model)
    with opened as comparison:
        behaviour, file = comparison.behaviour, comparison.folder / "comparison.json"
        with _timed(seconds, "methods"):
            compared = comparison.methods()
        with _timed(seconds, "calibration"):
            strengths = comparison.strengths(compared)
        with _timed(seconds, "scores"):
            dev, test = comparison.dev_scores(compared), comparison.scores(compared, strengths)
        with _timed(seconds, "tables"):
            dev_scores, scores = (
                LineScores(one, comparison.sources.own.name, behaviour.probe.headline) for one in (dev, test)
            )
            lines = [line_at_own_strength(method, strengths) for method in compared]
            at_equal_kl = [line for method in compared if (line := line_at_equal_kl(method, strengths)) is not None]
            found = Findings(
                comparison.model.slug, behaviour.name, numbers.best_of_kinds(dev_scores, lines), scores.base(),
                numbers.measure(scores, lines), numbers.measure(scores, at_equal_kl), strengths, settings.dilemmas, {},
                comparison.dilemmas.noun, comparison.ability,
            )  # fmt: skip
        seconds["total"] = time.perf_counter() - started
        if not comparison.has_measured and file.is_file():  # keep the seconds of the call that measured
            seconds = read_json(file).get("seconds", seconds)
        found = replace(found, seconds={phase: round(value, 3) for phase, value in seconds.items()})
        page.write(comparison.folder.path, found)
        return Result(found, comparison.folder.path)


@contextmanager
def _timed(seconds: dict[str, float], phase: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    seconds[phase] = time.perf_counter() - started


# -------------------------------------------------------------------- methods as lines of a table


def line_at_own_strength(method: Method, strengths: Strengths) -> Line:
    """A method at its own strength: the place of its rows in the scores table, and its KL if known."""
    if method.contexts is not None:
        at = {"+" if side > 0 else "-": Place(context.name, "none", 0.0) for side, context in method.contexts.items()}
        known = strengths.prompts.get(method.name, {})
        spent = {sign: _mean_spent([known[SIDES[sign]]]) for sign in at if SIDES[sign] in known}
        return Line(method.name, method.kind, at, method.note, spent)
    at = {sign: Place(PLAIN.name, method.edits[0].name, float(side)) for sign, side in SIDES.items()}
    spent = {}
    for sign, side in SIDES.items():
        searches = strengths.edits.get(method.name, {}).get(side, ())
        seen = [one.at_own_strength for one in searches if one.at_own_strength is not None]
        if searches and len(seen) == len(searches):
            spent[sign] = _mean_spent(seen)
    return Line(method.name, method.kind, at, method.note, spent)


def line_at_equal_kl(method: Method, strengths: Strengths) -> Line | None:
    """The same at equal KL: calibrated Edits, unchanged prompts, and random directions for the band."""
    if method.contexts is not None:
        return line_at_own_strength(method, strengths)
    at = calibrated_places(method, strengths)
    if not at:
        return None
    searches = strengths.edits.get(method.name, {})
    spent = {
        sign: _mean_spent(searches[side], all(one.converged for one in searches[side]))
        for sign, side in SIDES.items()
        if side in searches
    }
    return Line(method.name, method.kind, at, method.note, spent)


def calibrated_places(method: Method, strengths: Strengths) -> dict[str, Place]:
    """Per sign, the calibrated strength of every replicate; empty for a method without calibration.

    Random directions have the norm of the reference and get its strength; they give the band of this table.
    """
    if not method.edits:
        return {}
    name, searches = method.edits[0].name, strengths.edits.get(method.name, {})
    if method.name == RANDOM:
        reference = next(iter(strengths.edits.values()))
        return {sign: Place(PLAIN.name, name, reference[side][0].alpha) for sign, side in SIDES.items()}
    return {
        sign: Place(PLAIN.name, name, {one.seed: one.alpha for one in searches[side]})
        for sign, side in SIDES.items()
        if side in searches
    }


def _mean_spent(seen: Sequence[Reached], converged: bool | None = None) -> Spent:
    p95, mean, maximum = (
        sum(column) / len(seen) for column in zip(*((one.p95, one.mean, one.maximum) for one in seen), strict=True)
    )
    return Spent(p95, mean, maximum, converged)


def _reached(seen: Divergence) -> Reached:
    """A Divergence without its strength: a prompt has none."""
    return Reached(**seen.as_record())


def _folder_name(source: str) -> str:
    """`compare`, or `compare-<source>-<digest>` if the dilemmas are not the project's own."""
    if source == "own":
        return "compare"
    readable = re.sub(r"[^\w.-]+", "-", Path(source.partition("@")[0]).stem).strip("-")
    return f"compare-{readable}-{content_key(source)[:6]}"
