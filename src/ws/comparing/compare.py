"""The fair comparison: weight directions, activation steering, prompts and controls on identical rows.

Every method (`methods`) is a Condition and all are scored by the one engine into one table: at each method's own +-1,
and at equal KL to the base on neutral text. What has a choice to make makes it on the dev split, and so does the choice
of the method that the headline shows; everything is reported on the test split, so that all rows are the same.
Uncertainty over rows and over seeds are two things and stand apart.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import polars as pl

from ws import adapters
from ws.algebra.direction import Direction
from ws.base import console
from ws.base.errors import UserError
from ws.base.store import RunFolder, Shards, content_key, read_json, tensors_key, write_json, write_table
from ws.baselines import repe
from ws.baselines.bias_only import OutputShift
from ws.baselines.controls import RANDOM
from ws.baselines.repe import ActivationDirection
from ws.comparing import methods, numbers, page
from ws.comparing.dev_split import split
from ws.comparing.methods import FittedRun, Method, Sources
from ws.comparing.numbers import Line, Place, Spent
from ws.edit.condition import PLAIN, Condition
from ws.eval import dilemmas, side_effects, sycophancy
from ws.fitting.run_settings import Settings, shared_base
from ws.fitting.stages import train_together
from ws.measure import calibrate
from ws.measure.probe import Probe
from ws.measure.score import score
from ws.model.loading import ChatModel
from ws.runs.replicate import Replication

SIDES = {"+": "1", "-": "-1"}
"""Sign of a table -> its key in `calibration.json`."""
SMALLEST_BAND = 2
"""Random directions that a prediction band needs."""


@dataclass(frozen=True)
class Plan:
    """What is compared.

    `activations` are variants of activation steering by name; `shuffles` adapters are trained on shuffled personas;
    `target` is the KL budget in nats per token (None: that of the engineered prompt of the positive side, or else of
    the first persona).
    """

    families: tuple[str, ...] = ("lora", "dora", "pissa", "delora", "oft", "ia3")
    seeds: tuple[int, ...] = (0,)
    activations: tuple[str, ...] = ("mean", "incremental", "pca-diff", "logistic", "single-layer")
    random_seeds: int = 10
    permutations: int = 3
    shuffles: int = 5
    target: float | None = None
    calibration_prompts: int = 16
    calibration_tokens: int = 30

    def __post_init__(self) -> None:
        if not (self.families and self.seeds):
            raise UserError("there is nothing to compare", "Give at least one of --families and --seeds.")
        if self.random_seeds < SMALLEST_BAND:
            raise UserError(
                f"{self.random_seeds} random directions make no control band",
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


class Comparison:
    """One model and one behaviour: all methods, calibrated and scored, in `<behaviour>/compare/`.

    Dilemmas from another source have a folder of their own beside it, `compare-<source>-<digest>/`.
    """

    def __init__(self, settings: Settings, plan: Plan, model: ChatModel | None = None) -> None:
        self.settings = replace(settings, alphas=(-1.0, 0.0, 1.0), control_seeds=0)
        self.plan = plan
        self.dilemmas = dilemmas.load(settings.dilemmas, settings.rows)  # a wrong source is told before hours of fits
        self.model = model or settings.load()
        runs = {(family, seed): run for family in plan.families for seed, run in self._replicate(family).items()}
        reference = next(iter(runs.values()))
        self.behaviour = reference.behaviour
        place = reference.folder.parents[1]
        self.folder = RunFolder(place / _folder_name(settings.dilemmas), {
            "model": self.model.slug, "fingerprint": self.model.fingerprint, "behaviour": self.behaviour.name,
        })  # fmt: skip
        self.sources = Sources(self.model, runs, settings.data_seed, self.folder, sorted(place.glob("compare*")))
        self.has_measured = False

    def __enter__(self) -> Comparison:
        return self

    def __exit__(self, *_: object) -> None:
        self.folder.close()

    def _replicate(self, family: str) -> dict[int, FittedRun]:
        """The runs of a family by seed; what is missing of them is fitted in one pass."""
        console.say(f"\n{family}, seeds {' '.join(map(str, self.plan.seeds))}", style="bold")
        found = {}
        with ExitStack() as stack:
            settings = (replace(self.settings, adapter=family, seed=seed) for seed in self.plan.seeds)
            runs = [stack.enter_context(Replication(one, self.model)) for one in settings]
            train_together(runs)
            for seed, run in zip(self.plan.seeds, runs, strict=True):
                direction, _ = run.diff()
                found[seed] = FittedRun(run.folder.path, run.behaviour, direction, run.data(), run.training)
        return found

    def methods(self) -> list[Method]:
        """Everything that is compared, in the order of the tables."""
        plan = self.plan
        return [
            *methods.weight_directions(self.sources),
            *methods.activation_directions(self.sources, plan.activations),
            *methods.system_prompts(self.sources),
            *methods.control_directions(
                self.sources, random_seeds=plan.random_seeds, permutations=plan.permutations, shuffles=plan.shuffles
            ),
        ]

    # ---------------------------------------------------------------- measuring

    def probes(self) -> list[Probe]:
        """The test rows of the behaviour's probe and the dilemmas, and the side effects."""
        rows = self.settings.rows
        return [
            split(sycophancy.probe(self.behaviour, rows), dev=False),
            split(self.dilemmas.probe(), dev=False),
            # strengths of activation steering were chosen with the other facts
            *(split(probe, dev=False) if probe.name == side_effects.FACTS else probe
              for probe in side_effects.probes(self.model, rows)),
        ]  # fmt: skip

    def dev_scores(self, compared: Sequence[Method]) -> pl.DataFrame:
        """The methods that a headline may show, on the dev rows of the behaviour's probe."""
        wanted = [method for method in compared if method.kind in page.KINDS]
        conditions = [Condition(), *(condition for method in wanted for condition in method.conditions())]
        return self._scored("scores_dev", [split(sycophancy.headline_probe(self.behaviour), dev=True)], conditions)

    def scores(self, compared: Sequence[Method], calibration: Mapping[str, Any]) -> pl.DataFrame:
        """All methods at their own +-1 and at their calibrated strengths, all replicates, one table."""
        conditions = [Condition(), *(condition for method in compared for condition in method.conditions())]
        for method in compared:
            at = strengths(method, calibration)
            conditions += [Condition.of(edit, place.alpha_of(edit.seed)) for place in at.values()
                           for edit in method.edits]  # fmt: skip
        return self._scored("scores", self.probes(), conditions)

    def _scored(self, stage: str, probes: Sequence[Probe], conditions: Sequence[Condition]) -> pl.DataFrame:
        path = self.folder / f"{stage}.parquet"
        inputs = {
            "rendering": self.model.chat.rendering_key,
            "probes": [probe.key for probe in probes],
            "conditions": [[condition.key(), _identity(condition)] for condition in conditions],
        }

        def make(shards: Shards) -> None:
            base = shared_base(self.model, self.settings.out)
            table = score(self.model, probes, conditions, shards=shards, base_shards=base, description="scoring")
            write_table(path, table)

        self.has_measured |= self.folder.build(stage, inputs, [path.name], make).built
        return pl.read_parquet(path)

    def calibrations(self, compared: Sequence[Method]) -> dict[str, Any]:
        """The strengths of every Edit and sign, all replicates, that spend the budget; prompts have only a KL."""
        texts = calibrate.neutral_prompts(self.plan.calibration_prompts)
        tokens = self.plan.calibration_tokens
        prompted = {
            method.name: {
                str(sign): _plain(calibrate.prompt_divergence(self.model, context, texts, tokens=tokens))
                for sign, context in method.contexts.items()
            }
            for method in compared
            if method.contexts
        }
        anchor = next((n for n in ("prompt: embody", "prompt: simple") if n in prompted), None)
        if self.plan.target is not None:
            anchor = None
        target = self.plan.target or float(prompted[anchor]["1"]["p95"] if anchor else 0.5)
        wanted = [method for method in compared if method.edits and method.kind != "controls"]
        edits = [(method.name, edit) for method in wanted for edit in method.edits]
        inputs = {"target": target, "texts": texts, "tokens": tokens, "prompts": prompted,
                  "rendering": self.model.chat.rendering_key,
                  "edits": [_identity(Condition.of(edit, 1.0)) for _, edit in edits]}  # fmt: skip
        file = self.folder / "calibration.json"

        def make(_: Shards) -> None:
            found: dict[str, Any] = {}
            for name, edit in console.track(edits, "calibrating", len(edits)):
                for sign in (1, -1):
                    solved = calibrate.to_budget(self.model, edit.effect, target, texts, sign=sign, tokens=tokens)
                    at_own = next((_plain(seen) for seen in solved.history if abs(seen.alpha) == 1), None)
                    found.setdefault(name, {}).setdefault(str(sign), []).append({
                        "seed": edit.seed, "alpha": solved.alpha, "converged": solved.converged,
                        "tolerance": solved.tolerance, **_plain(solved.reached), "at_own_strength": at_own,
                    })  # fmt: skip
            family, seed = self.sources.first
            write_json(file, {"target": target, "anchor": anchor, "reference": f"dW:{family}, seed {seed}",
                              "edits": found, "prompts": prompted})  # fmt: skip

        self.has_measured |= self.folder.build("calibration", inputs, ["calibration.json"], make).built
        return dict(read_json(file))


# -------------------------------------------------------------------- a whole comparison


@dataclass(frozen=True)
class Result:
    """A finished comparison: its sentence, its folder, and everything its tables show."""

    model: str
    behaviour: str
    headline: str
    folder: Path
    summary: dict[str, Any]


def run(settings: Settings, plan: Plan, model: ChatModel | None = None) -> Result:
    """Run a comparison and write its tables."""
    started, seconds = time.perf_counter(), dict[str, float]()
    with _timed(seconds, "fits"):
        opened = Comparison(settings, plan, model)
    with opened as comparison:
        behaviour, place = comparison.behaviour, comparison.folder / "comparison.json"
        with _timed(seconds, "methods"):
            compared = comparison.methods()
        with _timed(seconds, "calibration"):
            calibration = comparison.calibrations(compared)
        with _timed(seconds, "scores"):
            dev, scores = comparison.dev_scores(compared), comparison.scores(compared, calibration)
        with _timed(seconds, "tables"):
            name, group = behaviour.name, behaviour.probe.headline
            reader = numbers.Comparison(scores, name, group)
            lines = [own_line(method, calibration) for method in compared]
            own = numbers.measure(reader, lines)
            equal = numbers.measure(reader, [
                line for method in compared if (line := equal_line(method, calibration)) is not None
            ])  # fmt: skip
            best = numbers.best_of_kinds(numbers.Comparison(dev, name, group), lines)
        seconds["total"] = time.perf_counter() - started
        if not comparison.has_measured and place.is_file():  # what it took is what it took when it was measured
            seconds = read_json(place).get("seconds", seconds)
        findings = page.Findings(
            name, own, equal, reader.base(), best, calibration, settings.dilemmas,
            {phase: round(value, 3) for phase, value in seconds.items()},
        )  # fmt: skip
        title = f"{name} in {comparison.model.name}: methods compared"
        sentence = page.write(comparison.folder.path, title, findings)
        return Result(comparison.model.slug, name, sentence, comparison.folder.path, dict(read_json(place)))


def together(results: Sequence[Result], out: Path) -> Path:
    """One table over several comparisons, `comparisons.html` (and `.md`) in `out`; a rerun replaces it."""
    path = out / "comparisons.html"
    page.write_across(path, [page.Compared(r.model, r.behaviour, r.summary) for r in results])
    return path


@contextmanager
def _timed(seconds: dict[str, float], phase: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    seconds[phase] = time.perf_counter() - started


# -------------------------------------------------------------------- methods as lines of a table


def own_line(method: Method, calibration: Mapping[str, Any]) -> Line:
    """Where a method's rows at its own strength stand in the scores table, and what KL it spends there if known."""
    if method.contexts is not None:
        at = {"+" if side > 0 else "-": Place(context.name, "none", 0.0) for side, context in method.contexts.items()}
        known = calibration["prompts"].get(method.name, {})
        spent = {sign: Spent(*_kl(known[SIDES[sign]])) for sign in at if SIDES[sign] in known}
        return Line(method.name, method.kind, at, method.note, spent)
    at = {sign: Place(PLAIN.name, method.edits[0].name, float(side)) for sign, side in SIDES.items()}
    spent = {}
    for sign, side in SIDES.items():
        seen = [one["at_own_strength"] for one in calibration["edits"].get(method.name, {}).get(side, [])]
        if seen and None not in seen:
            spent[sign] = _mean_spent(seen, None)
    return Line(method.name, method.kind, at, method.note, spent)


def equal_line(method: Method, calibration: Mapping[str, Any]) -> Line | None:
    """The same at equal divergence: calibrated Edits, prompts as they are, and random directions for the band."""
    if method.contexts is not None:
        return own_line(method, calibration)
    at = strengths(method, calibration)
    if not at:
        return None
    searches = calibration["edits"].get(method.name, {})
    spent = {
        sign: _mean_spent(searches[side], all(one["converged"] for one in searches[side]))
        for sign, side in SIDES.items()
        if side in searches
    }
    return Line(method.name, method.kind, at, method.note, spent)


def strengths(method: Method, calibration: Mapping[str, Any]) -> dict[str, Place]:
    """Per sign, the calibrated strength of every replicate; nothing for what is not calibrated.

    Random directions have the norm of the reference and stand at its strength: they are the band at this table.
    """
    if not method.edits:
        return {}
    name, searches = method.edits[0].name, calibration["edits"].get(method.name, {})
    if method.name == RANDOM:
        reference = next(iter(calibration["edits"].values()))
        return {sign: Place(PLAIN.name, name, reference[side][0]["alpha"]) for sign, side in SIDES.items()}
    return {
        sign: Place(PLAIN.name, name, {one["seed"]: one["alpha"] for one in searches[side]})
        for sign, side in SIDES.items()
        if side in searches
    }


def _mean_spent(seen: Sequence[Mapping[str, Any]], converged: bool | None) -> Spent:
    p95, mean, maximum = (sum(column) / len(seen) for column in zip(*(_kl(one) for one in seen), strict=True))
    return Spent(p95, mean, maximum, converged)


def _kl(known: Mapping[str, Any]) -> tuple[float, float, float]:
    return known["p95"], known["mean"], known["maximum"]


def _plain(divergence: calibrate.Divergence) -> dict[str, float]:
    """A Divergence as JSON, without its strength: a prompt has none."""
    return {name: value for name, value in divergence._asdict().items() if name != "alpha"}


def _folder_name(source: str) -> str:
    """`compare`, or `compare-<source>-<digest>` where the dilemmas are not the project's own."""
    if source == "own":
        return "compare"
    readable = re.sub(r"[^\w.-]+", "-", Path(source.partition("@")[0]).stem).strip("-")
    return f"compare-{readable}-{content_key(source)[:6]}"


def _identity(condition: Condition) -> list[Any]:
    """What the Edits of a Condition are made of, for stage keys."""
    found: list[Any] = [condition.context.system]
    for edit, alpha in condition.active:
        effect = edit.effect
        if isinstance(effect, Direction):
            found.append([alpha, effect.content])
        elif isinstance(effect, OutputShift | ActivationDirection):
            found.append([alpha, tensors_key({str(place): v for place, v in effect.vectors.items()})])
    return found
