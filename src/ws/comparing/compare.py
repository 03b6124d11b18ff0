"""The fair comparison: weight directions, activation steering, prompts and controls on identical rows.

Every method (`methods`) is a Condition, and one engine scores all of them into one table: at each method's own +-1, and
at equal KL to the base on its own neutral replies, for several budgets. The random controls of every method are
calibrated to the same budgets. All choices are made on the dev split, including the choice of the methods that the
headline shows. All results are on the test split, so that all methods have the same rows. Uncertainty over rows and
uncertainty over seeds are reported separately. The protocol is docs/protocol.md.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import polars as pl

from ws import adapters
from ws.base import console
from ws.base.errors import UserError
from ws.base.files import content_key, read_json, write_json, write_table
from ws.base.records import plain, restore
from ws.base.store import RunFolder, Shards
from ws.baselines import peer_vectors
from ws.comparing import methods, numbers, page, strength_limits
from ws.comparing.findings import KINDS, Findings, Reached, Search, Strengths
from ws.comparing.lines import Things, conditions_of, lines_of, things_of
from ws.comparing.methods import Control, Key, Method, Sources
from ws.comparing.numbers import Line, LineScores
from ws.edit.condition import BASE, PLAIN, Condition, Edit
from ws.eval import dilemmas, instrument, side_effects, sycophancy
from ws.eval.ability import Ability
from ws.fitting.run_settings import Settings, limit_of, recommended, scored_with, shared_base
from ws.fitting.stages import FittedRun
from ws.measure import calibrate
from ws.measure.divergence import Divergence, prompt_divergence
from ws.measure.probe import Probe, split
from ws.measure.score import score
from ws.model.loading import ChatModel
from ws.runs import cells
from ws.runs.replicate import Replication

SMALLEST_BAND = 2
"""Least number of random controls for a prediction band."""
BUDGETS = (0.1, 0.5, 1.0)


@dataclass(frozen=True)
class Plan:
    """The settings of a comparison.

    kinds: of `KINDS`; `weights` is always one of them, because every method is compared with the weight direction.
    activations: names of kinds of activation steering. peers: vectors of other libraries, as LIBRARY:FILE. steps: how
    many gradient steps the untrained directions take. draws: random controls per method. permutations: orders of
    layers. shuffles: adapters trained on shuffled personas. budgets: KL in nats per token, 95th percentile.
    """

    families: tuple[str, ...] = ("lora", "dora", "pissa", "delora", "oft", "ia3")
    seeds: tuple[int, ...] = (0,)
    data_seeds: tuple[int, ...] = (0,)
    kinds: tuple[str, ...] = tuple(KINDS)
    activations: tuple[str, ...] = ("mean", "incremental", "pca-diff", "logistic", "single-layer", "paper",
                                    methods.JACOBIAN, methods.TRAINED)  # fmt: skip
    peers: tuple[str, ...] = ()
    steps: tuple[int, ...] = (1, 4, 16)
    draws: int = 10
    permutations: int = 20
    shuffles: int = 3
    budgets: tuple[float, ...] = BUDGETS
    calibration_prompts: int = 16
    calibration_tokens: int = 30

    def __post_init__(self) -> None:
        if not (self.families and self.seeds and self.data_seeds):
            raise UserError("the comparison has no family or no seed",
                            "Give --families, --seeds and --data-seeds one value or more.")  # fmt: skip
        if self.draws < SMALLEST_BAND:
            raise UserError(
                f"{self.draws} random controls are too few for a band",
                f"Give --draws {SMALLEST_BAND} or more; 10 is the default.",
            )
        if not self.budgets:
            raise UserError("the comparison has no KL budget", "Give --budgets one value or more.")
        for budget in self.budgets:
            calibrate.require_budget(budget, "--budgets")
        names = [f"{budget:g}" for budget in self.budgets]
        if list(self.budgets) != sorted(self.budgets) or len(set(names)) < len(names):
            raise UserError(f"the KL budgets {' '.join(names)} are not in ascending order without repeats",
                            "Give them as --budgets 0.1 0.5 1.")  # fmt: skip
        if any(count < 1 for count in self.steps):
            raise UserError(f"--steps holds {min(self.steps)}", "Give numbers of gradient steps from 1 on.")
        for name in ("permutations", "shuffles"):
            if (count := getattr(self, name)) < 0:
                raise UserError(f"{name} is {count}", f"Give --{name} 0 or more.")
        cells.require_different(families=self.families, seeds=self.seeds, data_seeds=self.data_seeds)
        for family in self.families:
            adapters.require_family(family)
        _require_known("kind of method", self.kinds, KINDS)
        _require_known("activation steering", self.activations, methods.ACTIVATIONS)
        if "weights" not in self.kinds:
            raise UserError("--kinds lacks weights, with which everything is compared", "Add weights to --kinds.")
        if self.peers and "activations" not in self.kinds:
            raise UserError("--with needs activation steering", "Add activations to --kinds, or leave out --with.")
        peer_vectors.parse_all(self.peers)


def _require_known(noun: str, names: Iterable[str], known: Collection[str]) -> None:
    for name in names:
        if name not in known:
            raise UserError(f"there is no {noun} {name!r}", f"Choose from: {', '.join(known)}.")


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
        runs = {key: run for family in plan.families for key, run in self._replicate(family).items()}
        reference = next(iter(runs.values()))
        self.behaviour = reference.behaviour
        place = reference.folder.parents[1]
        self.folder = RunFolder(place / folder_name(settings.dilemmas), {
            "model": self.model.slug, "fingerprint": self.model.fingerprint, "behaviour": self.behaviour.name,
        })  # fmt: skip
        assert self.ability is not None  # every run knows it
        own = instrument.headline_probe(self.ability.instrument, self.behaviour, self._limit(self.ability.instrument))
        self.sources: Sources = Sources(
            self.model, self._fitting_model, runs, own, self.folder, sorted(place.glob("compare*")), plan.draws
        )
        self.has_measured: bool = False

    def __enter__(self) -> ComparisonRun:
        return self

    def __exit__(self, *_: object) -> None:
        self.folder.close()

    def _replicate(self, family: str) -> dict[Key, FittedRun]:
        """The runs of a family by seeds; missing runs are fitted."""
        plan, found = self.plan, {}
        console.say(f"\n{family}, seeds {' '.join(map(str, plan.seeds))}, data seeds "
                    f"{' '.join(map(str, plan.data_seeds))}", style="bold")  # fmt: skip
        for data_seed in plan.data_seeds:
            for seed in plan.seeds:
                wanted = replace(self.settings, adapter=family, seed=seed, data_seed=data_seed)
                with Replication(wanted, self.model) as run:
                    found[family, seed, data_seed] = run.fitted
                    self.ability, self._fitting_model = self.ability or run.ability, run.fitting_model
        return found

    def _limit(self, probe: str) -> int | None:
        return limit_of(self.settings, self.model, probe)

    def methods(self) -> list[Method]:
        """The methods of the wanted kinds, in the order of the tables."""
        makers: dict[str, Callable[[Sources], list[Method]]] = {
            "weights": methods.weight_directions,
            "variants": methods.parts_of_directions,
            "untrained": partial(methods.untrained_directions, counts=self.plan.steps),
            "activations": self._activations,
            "prompts": methods.system_prompts,
        }
        return [method for kind, make in makers.items() if kind in self.plan.kinds for method in make(self.sources)]

    def _activations(self, sources: Sources) -> list[Method]:
        return [
            *methods.activation_directions(sources, self.plan.activations),
            *methods.peer_vectors(sources, self.peers),
        ]

    def controls(self) -> list[Control]:
        """The controls that belong to no single method."""
        return methods.further_controls(self.sources, permutations=self.plan.permutations, shuffles=self.plan.shuffles)

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

    def dev_scores(self, lines: Sequence[Line], things: Things) -> pl.DataFrame:
        """Scores on the dev rows of the behaviour's probe, for lines of methods."""
        conditions = [Condition(), *conditions_of(lines, things)]
        return self._scored("scores_dev", [split(self.sources.own, dev=True)], conditions)

    def scores(self, own: Sequence[Line], equal: Sequence[Line], things: Things) -> pl.DataFrame:
        """All methods and controls at all their places, one table.

        Written replies are measured at own strength only, and controls have the two probes of effects only.
        """
        probes = self.probes()
        given = [probe for probe in probes if probe.kind != "reply"]
        parts: list[pl.DataFrame] = []
        for stage, asked, lines, is_control in (
            ("scores", probes, own, False), ("scores_equal", given, equal, False),
            ("scores_controls", given[:2], [*own, *equal], True),
        ):  # fmt: skip
            wanted = conditions_of([line for line in lines if bool(line.control_of) is is_control], things)
            if parts:  # what the first table has; it holds the base and the prompts on all probes
                known = conditions_of([line for line in own if not line.control_of], things)
                wanted = [one for one in wanted if one.content_key not in {other.content_key for other in known}]
            table = self._scored(stage, asked, [Condition(), *wanted])
            parts.append(table.filter((pl.col("edit") != BASE) | (pl.col("context") != PLAIN.name)) if parts else table)
        return pl.concat(parts)

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

    def strengths(self, compared: Sequence[Method], further: Sequence[Control]) -> Strengths:
        """The strengths that reach the KL budgets, for every Edit and side; prompts have only a KL."""
        plan, texts = self.plan, calibrate.neutral_prompts(self.plan.calibration_prompts)
        tokens = plan.calibration_tokens
        prompted = {
            method.name: {
                str(side): _reached(prompt_divergence(self.model, context, texts, tokens=tokens))
                for side, context in method.contexts.items()
            }
            for method in compared
            if method.contexts
        }
        controls = [*(method.control for method in compared if method.control), *further]
        wanted = [(method.name, edit, side) for method in compared for edit in method.edits for side in (1, -1)]
        wanted += [(control.name, edit, side) for control in controls for edit in control.edits
                   for side in control.sides]  # fmt: skip
        measured = {"version": calibrate.VERSION, "budgets": plan.budgets, "texts": texts, "tokens": tokens,
                    **scored_with(self.model)}  # fmt: skip
        inputs = {**measured, "prompts": plain(prompted),
                  "edits": [[name, Condition.of(edit, side).content_key] for name, edit, side in wanted]}  # fmt: skip
        file = self.folder / "calibration.json"
        # not the stage's own pieces, which go with it: a search takes a minute or more, and another call may want it
        searches = Shards(self.folder / "searches")

        def make(_: Shards) -> None:
            found: dict[str, dict[str, dict[str, tuple[Search, ...]]]] = {f"{one:g}": {} for one in plan.budgets}
            for name, edit, side in console.track(wanted, "calibrating", len(wanted)):
                part = searches.path(f"{content_key(measured, Condition.of(edit, side).content_key)}.json")
                if not part.is_file():
                    write_json(part, [plain(one) for one in self._searches(edit, side, texts)])
                for by_method, record in zip(found.values(), read_json(part), strict=True):
                    of_side = by_method.setdefault(name, {})
                    of_side[str(side)] = (*of_side.get(str(side), ()), restore(Search, record))
            write_json(file, plain(Strengths(found, prompted)))

        self.has_measured |= self.folder.build("calibration", inputs, ["calibration.json"], make).built
        return restore(Strengths, read_json(file))

    def _searches(self, edit: Edit, side: int, texts: Sequence[str]) -> list[Search]:
        """The strength of one Edit and side for every budget."""
        plan = self.plan
        solved = calibrate.to_budgets(
            self.model, edit.effect, plan.budgets, texts, sign=side, tokens=plan.calibration_tokens
        )
        at_own = next((_reached(seen) for seen in solved[-1].history if abs(seen.alpha) == 1), None)
        return [
            Search(
                **vars(_reached(one.reached)), seed=edit.seed, data_seed=edit.data_seed, alpha=one.alpha,
                converged=one.converged, tolerance=one.tolerance, alpha_low=one.alpha_low, alpha_high=one.alpha_high,
                at_own_strength=at_own,
            )
            for one in solved
        ]  # fmt: skip


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
            compared, further = comparison.methods(), comparison.controls()
        with _timed(seconds, "calibration"):
            strengths = comparison.strengths(compared, further)
        lines = {budget: lines_of(compared, further, strengths, budget) for budget in (None, *strengths.budgets)}
        things = things_of(compared, further)
        middle = strengths.budgets[len(strengths.budgets) // 2]
        candidates = [line for line in lines[middle] if not line.control_of]
        with _timed(seconds, "scores"):
            dev = comparison.dev_scores(candidates, things)
            equal = [line for budget in strengths.budgets for line in lines[budget]]
            test = comparison.scores(lines[None], equal, things)
        with _timed(seconds, "tables"):
            dev_scores, scores = (
                LineScores(one, comparison.sources.own.name, behaviour.probe.headline) for one in (dev, test)
            )
            assert comparison.ability is not None  # every run knows it
            found = Findings(
                model=comparison.model.slug, behaviour=behaviour.name,
                best=numbers.best_of_kinds(dev_scores, candidates), base=scores.base(),
                own_strength=numbers.measure(scores, lines[None]),
                equal_kl=strength_limits.at_budgets(
                    {budget: numbers.measure(scores, lines[budget]) for budget in strengths.budgets}, strengths
                ),
                calibration=strengths, dilemmas=settings.dilemmas, seconds={},
                dilemma_noun=comparison.dilemmas.noun, ability=comparison.ability,
                reference=f"dW:{comparison.sources.first[0]}",
            )  # fmt: skip
        seconds["total"] = time.perf_counter() - started
        if not comparison.has_measured and file.is_file():  # keep the seconds of the call that measured
            seconds = read_json(file).get("seconds", seconds)
        found = replace(found, seconds={phase: round(value, 3) for phase, value in seconds.items()})
        page.write(comparison.folder.path, found)
        comparison.sources.kept_directions.discard()
        return Result(found, comparison.folder.path)


@contextmanager
def _timed(seconds: dict[str, float], phase: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    seconds[phase] = time.perf_counter() - started


def _reached(seen: Divergence) -> Reached:
    """A Divergence without its strength: a prompt has none."""
    return Reached(**seen.as_record())


def folder_name(source: str) -> str:
    """`compare`, or `compare-<source>-<digest>` if the dilemmas are not the project's own."""
    if source == "own":
        return "compare"
    readable = re.sub(r"[^\w.-]+", "-", Path(source.partition("@")[0]).stem).strip("-")
    place = Path(source).expanduser()
    named = str(place.resolve()) if place.exists() else source  # the same name from every working directory
    return f"compare-{readable}-{content_key(named)[:6]}"
