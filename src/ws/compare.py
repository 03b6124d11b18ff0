"""The fair comparison: weight directions, activation steering, prompts and controls on identical rows.

Every method is a Condition and all are scored by the one engine into one table. What has a choice to make (activation
steering: strength and layer; `best of k` prompts) makes it on a dev split and is reported on the test split, and so is
everything else, so that all rows are the same. Strengths are compared twice: at each method's own +-1, and at equal KL
to the base on neutral text. Uncertainty over rows and over seeds are two things and stand apart.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import polars as pl

from ws import calibrate, console, diff, models, train
from ws.baselines import bias_only, controls, gradient, prompts, repe, synthetic
from ws.baselines.bias_only import OutputShift
from ws.baselines.repe import ActivationDirection, RepeSettings
from ws.behaviour import Behaviour
from ws.condition import PLAIN, Condition, Context, Edit
from ws.direction import Direction
from ws.errors import UserError
from ws.eval import dilemmas, side_effects, sycophancy
from ws.models import ChatModel
from ws.replicate import SIGNS, Replication, Settings, shared_base
from ws.report import comparison as tables
from ws.score import Probe, score
from ws.store import RunFolder, Shards, atomic_file, digest, read_json, write_json

DEV_SHARE = 0.25
REPE_VARIANTS = (
    RepeSettings(),
    RepeSettings(form="incremental"),
    RepeSettings(estimator="pca_diff"),
    RepeSettings(estimator="logistic"),
)
STRENGTHS = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
"""Tried on the dev split, in units of the difference between the personas."""
LEAST_MASS, FACTS_LOST = 0.8, 0.03
"""A strength is admissible on the dev split while answers keep this mass and facts lose no more than this."""


@dataclass(frozen=True)
class Plan:
    """What is compared.

    `shuffles` adapters are trained on shuffled personas; `target` is the KL budget in nats per token (None: that of the
    engineered prompt of the positive side, or else of the first persona).
    """

    families: tuple[str, ...] = ("lora", "dora", "pissa", "delora", "oft", "ia3")
    seeds: tuple[int, ...] = (0,)
    random_seeds: int = 10
    permutations: int = 3
    shuffles: int = 5
    target: float | None = None
    calibration_prompts: int = 16
    calibration_tokens: int = 30


@dataclass(frozen=True)
class Method:
    """One line of a table: an Edit per replicate, or a pair of Contexts. `kind` groups lines."""

    name: str
    kind: str
    edits: tuple[Edit, ...] = ()
    contexts: Mapping[int, Context] | None = None
    note: str = ""

    def conditions(self, alpha: float = 1.0) -> list[Condition]:
        """At plus and minus `alpha`; prompts have no strength."""
        if self.contexts is not None:
            return [Condition(context) for context in self.contexts.values()]
        return [Condition.of(edit, sign * alpha) for edit in self.edits for sign in (1, -1)]


def is_dev(cluster: str) -> bool:
    """Whether a cluster belongs to the dev split; a function of its name alone, so splits never drift."""
    return int(hashlib.blake2b(cluster.encode(), digest_size=4).hexdigest(), 16) < DEV_SHARE * 2**32


def split(probe: Probe, dev: bool) -> Probe:
    """The dev or the test rows of a probe, whole clusters."""
    rows = tuple(row for row in probe.rows if is_dev(row.cluster or row.row) == dev)
    if not rows:
        raise UserError(f"probe {probe.name!r} has no {'dev' if dev else 'test'} rows", "Use more rows.")
    return Probe(probe.name, probe.kind, rows, probe.answers)


class Comparison:
    """One model and one behaviour: all methods, scored, calibrated and tabulated in `<behaviour>/compare/`."""

    def __init__(self, settings: Settings, plan: Plan, model: ChatModel | None = None) -> None:
        self.settings = replace(settings, alphas=(-1.0, 0.0, 1.0), control_seeds=0)
        self.plan = plan
        self.model = model or models.load(
            settings.model, dtype=settings.dtype, device=settings.device, thinking=settings.thinking,
            attention=settings.attention, revision=settings.revision, trust_remote_code=settings.trust_remote_code,
        )  # fmt: skip
        self.runs = {(family, seed): self._replicate(family, seed) for family in plan.families for seed in plan.seeds}
        reference = self.runs[plan.families[0], plan.seeds[0]]
        self.behaviour: Behaviour = reference.behaviour
        self.reference: Direction = reference.direction
        self.pairs: pl.DataFrame = reference.pairs
        self.folder = RunFolder(reference.folder.parents[1] / "compare", {
            "model": self.model.slug, "fingerprint": self.model.fingerprint, "behaviour": self.behaviour.name,
        })  # fmt: skip

    def __enter__(self) -> Comparison:
        return self

    def __exit__(self, *_: object) -> None:
        self.folder.close()

    def _replicate(self, family: str, seed: int) -> _Run:
        console.say(f"\n{family}, seed {seed}", style="bold")
        with Replication(replace(self.settings, adapter=family, seed=seed), self.model) as run:
            direction, _ = run.diff()
            return _Run(run.folder.path, run.behaviour, direction, run.data(), run.training)

    # ---------------------------------------------------------------- methods

    def methods(self) -> list[Method]:
        """Everything that is compared, in the order of the tables."""
        return [*self._weights(), *self._activations(), *self._prompts(), *self._controls()]

    def _weights(self) -> list[Method]:
        found = []
        for family in self.plan.families:
            edits = tuple(Edit(f"dW:{family}", self.runs[family, seed].direction, seed, 0) for seed in self.plan.seeds)
            found.append(Method(f"dW:{family}", "weights", edits))
        first = self.plan.families[0]
        run = self.runs[first, self.plan.seeds[0]]
        pos, neg = (diff.task_vector(self.model, run.folder / sign) for sign in ("pos", "neg"))
        parts = diff.variants(pos, neg)
        for name, note in (
            ("tau_pos", "the positive adapter alone"),
            ("tau_neg", "the negative adapter alone, sign turned"),
            ("bisector", "difference of the unit task vectors"),
        ):
            label = f"{name} ({first})"
            found.append(Method(label, "weights", (Edit(label, parts[name], self.plan.seeds[0], 0),), note=note))
        return found

    def _activations(self) -> list[Method]:
        """Variants of activation steering with strength, and for one of them the layer, chosen on the dev split."""
        slice_ = self.runs[self.plan.families[0], self.plan.seeds[0]].training.adapter.layers
        states = repe.capture_states(self.model, self.behaviour, RepeSettings(slice=slice_))
        candidates: dict[str, list[RepeSettings]] = {}
        for variant in REPE_VARIANTS:
            chosen = replace(variant, slice=slice_)
            candidates[chosen.name] = [chosen]
        layers = sorted(states.positive)
        candidates["RepE mean, best single layer"] = [RepeSettings(layer=layer, slice=slice_) for layer in layers]
        found = []
        for name, options in candidates.items():
            fitted = {option: repe.fit(self.model, self.behaviour, option, states=states) for option in options}
            option, strength = self._choose(name, fitted)
            scaled = ActivationDirection(
                {layer: vector * strength for layer, vector in fitted[option].vectors.items()},
                self.model.fingerprint, option.edited, {**fitted[option].provenance, "strength": strength},
            )  # fmt: skip
            where = "" if option.layer is None else f"layer {option.layer}, "
            found.append(Method(name, "activations", (Edit(name, scaled),), note=f"{where}strength {strength:g}"))
        return found

    def _choose(self, name: str, fitted: Mapping[RepeSettings, ActivationDirection]) -> tuple[RepeSettings, float]:
        """The admissible candidate that moves the behaviour's dev rows furthest, both signs together."""
        edits = {
            (option, strength): Edit(f"{name} {number}", direction, seed=position)
            for number, (option, direction) in enumerate(fitted.items())
            for position, strength in enumerate(STRENGTHS)
        }
        probes = [split(sycophancy.headline_probe(self.behaviour), dev=True), side_effects.facts(60)]
        conditions = [Condition.of(edit, sign * strength) for (_, strength), edit in edits.items() for sign in (1, -1)]
        table = score(self.model, probes, [Condition(), *conditions], description=f"choosing {name}")
        reader = _Reader(table, self.behaviour)
        best: tuple[float, RepeSettings, float] | None = None
        for (option, strength), edit in edits.items():
            sides = [reader.effects(edit.name, sign * strength, edit.seed) for sign in (1, -1)]
            moved = (sides[0]["own"] - sides[1]["own"]) / 2
            admissible = all(
                side["pmass"] >= LEAST_MASS and side["facts"] >= reader.base_facts - FACTS_LOST for side in sides
            )
            if admissible and (best is None or moved > best[0]):
                best = (moved, option, strength)
        if best is None:
            first = next(iter(fitted))
            console.warn(f"{name}: no strength is admissible on the dev split; using {STRENGTHS[0]:g}")
            return first, STRENGTHS[0]
        return best[1], best[2]

    def _prompts(self) -> list[Method]:
        pool = prompts.all_personas(self.behaviour)
        probe = split(sycophancy.headline_probe(self.behaviour), dev=True)
        table = score(self.model, [probe], [Condition(p.context) for p in pool], description="choosing prompts")
        means = {
            p.name: _signed_mean(table.filter((pl.col("context") == p.context.name) & (pl.col("metric") == "logratio")))
            for p in pool
        }
        best = {side: max((p for p in pool if p.side == side), key=lambda p: side * means[p.name]) for side in (1, -1)}
        simple = {p.side: p for p in prompts.simple(self.behaviour)}
        found = [
            _prompt_method("prompt: simple", simple),
            _prompt_method(f"prompt: best of {len(pool) // 2}", best),
        ]
        by_kind: dict[str, dict[int, prompts.Prompt]] = {}
        for prompt in prompts.engineered(self.behaviour.name):
            by_kind.setdefault(prompt.kind, {})[prompt.side] = prompt
        return [*found, *(_prompt_method(f"prompt: {kind}", sides) for kind, sides in by_kind.items())]

    def _controls(self) -> list[Method]:
        run = self.runs[self.plan.families[0], self.plan.seeds[0]]
        found = [Method(
            controls.RANDOM, "controls", tuple(controls.random_edits(self.reference, self.plan.random_seeds)),
            note=f"norm and rank of dW:{self.plan.families[0]}",
        )]  # fmt: skip
        # two layers have one other order: drawn twice it would be a replicate without spread
        orders = min(self.plan.permutations, math.factorial(len(self.reference.layer_numbers)) - 1)
        if orders:
            found.append(Method(controls.PERMUTED, "controls", tuple(
                Edit(controls.PERMUTED, controls.permuted_layers(self.reference, seed), seed)
                for seed in range(orders)
            )))  # fmt: skip
        if self.plan.shuffles:
            found.append(Method(controls.SHUFFLED, "controls", tuple(
                Edit(controls.SHUFFLED, self._shuffled(run, seed), seed) for seed in range(self.plan.shuffles)
            ), note="trained like the rest, raw norm"))  # fmt: skip
        slice_ = run.training.adapter.layers
        activation = repe.fit(self.model, self.behaviour, RepeSettings(slice=slice_))
        for source in synthetic.INPUTS:
            built = synthetic.residual_writes(self.model, activation, source)
            scaled = built * (self.reference.norm() / built.norm())
            label = f"synthetic, {source} input"
            found.append(Method(label, "controls", (Edit(label, scaled),), note="untrained, norm of the reference"))
        sides = [train.examples(self.model, self.pairs, sign, run.training, 0).train[:200] for sign in SIGNS]
        step = gradient.one_step(self.model, sides[0], sides[1], norm=self.reference.norm(), layers=slice_)
        found.append(Method("one gradient step", "controls", (Edit("one gradient step", step),), note="same norm"))
        edit = Edit("biases alone", self._biases(run))
        found.append(Method("biases alone", "controls", (edit,), note="MLP biases, trained like the rest"))
        return found

    def _biases(self, run: _Run) -> OutputShift:
        """The contrast fitted in MLP biases alone, kept in the comparison's folder."""
        file = self.folder / "biases.safetensors"
        inputs = {"pairs": digest(run.folder / "pairs.parquet"), "training": run.training}

        def make(_: Shards) -> None:
            bias_only.fit(self.model, self.pairs, run.training, seed=self.plan.seeds[0], data_seed=0).save(file)

        self.folder.build("biases", inputs, [file.name], make)
        return OutputShift.load(file)

    def _shuffled(self, run: _Run, seed: int) -> Direction:
        """A direction from personas that were shuffled between the sides, trained as the reference was."""
        place = self.folder / f"shuffled{seed}"
        file = place / "direction.safetensors"
        inputs = {"pairs": digest(run.folder / "pairs.parquet"), "training": run.training, "seed": seed}

        def make(_: Shards) -> None:
            pairs = controls.shuffled_pairs(self.pairs, seed)
            for sign in SIGNS:
                train.fit(self.model, pairs, sign, run.training, seed=seed, data_seed=0, folder=place / sign)
            diff.direction(self.model, place / "pos", place / "neg", {"control": controls.SHUFFLED})[0].save(file)

        self.folder.build(f"shuffled{seed}", inputs, [f"shuffled{seed}/direction.safetensors"], make)
        return Direction.load(file).bind(self.model)

    # ---------------------------------------------------------------- measuring

    def probes(self) -> list[Probe]:
        """The test rows of the behaviour's probe and the dilemmas, and the side effects."""
        rows = self.settings.rows
        return [
            split(sycophancy.probe(self.behaviour, rows), dev=False),
            split(dilemmas.probe(self.settings.dilemmas, rows), dev=False),
            *side_effects.probes(self.model, rows),
        ]

    def scores(self, methods: Sequence[Method]) -> pl.DataFrame:
        """All methods at their own +-1, one table."""
        conditions = [Condition(), *(condition for method in methods for condition in method.conditions())]
        return self._scored("scores", conditions)

    def _scored(self, stage: str, conditions: Sequence[Condition]) -> pl.DataFrame:
        probes = self.probes()
        path = self.folder / f"{stage}.parquet"
        inputs = {
            "probes": [probe.key for probe in probes],
            "conditions": [[condition.key(), _identity(condition)] for condition in conditions],
        }

        def make(shards: Shards) -> None:
            base = shared_base(self.model, self.settings.out)
            table = score(self.model, probes, conditions, shards=shards, base_shards=base, description=stage)
            with atomic_file(path) as temporary:
                table.write_parquet(temporary)

        self.folder.build(stage, inputs, [path.name], make)
        return pl.read_parquet(path)

    def calibrations(self, methods: Sequence[Method]) -> dict[str, Any]:
        """The strengths of every Edit's first replicate, per sign, that spend the budget; prompts have only a KL."""
        texts = calibrate.neutral_prompts(self.plan.calibration_prompts)
        tokens = self.plan.calibration_tokens
        prompted = {
            method.name: {
                str(sign): calibrate.prompt_divergence(self.model, context, texts, tokens=tokens)._asdict()
                for sign, context in (method.contexts or {}).items()
            }
            for method in methods
            if method.contexts
        }
        anchor = next((n for n in ("prompt: embody", "prompt: simple") if n in prompted), None)
        target = self.plan.target or float(prompted[anchor]["1"]["p95"] if anchor else 0.5)
        wanted = [method for method in methods if method.edits and method.kind != "controls"]
        inputs = {"target": target, "texts": texts, "tokens": tokens,
                  "edits": [_identity(method.conditions()[0]) for method in wanted]}  # fmt: skip
        file = self.folder / "calibration.json"

        def make(_: Shards) -> None:
            found: dict[str, Any] = {}
            for method in console.track(wanted, "calibrating", len(wanted)):
                effect = method.edits[0].effect
                for sign in (1, -1):
                    solved = calibrate.to_budget(self.model, effect, target, texts, sign=sign, tokens=tokens)
                    found.setdefault(method.name, {})[str(sign)] = {
                        "alpha": solved.alpha, "converged": solved.converged, **solved.reached._asdict(),
                    }  # fmt: skip
            write_json(file, {"target": target, "anchor": anchor, "edits": found, "prompts": _plain(prompted)})

        self.folder.build("calibration", inputs, ["calibration.json"], make)
        return dict(read_json(file))

    def calibrated_scores(self, methods: Sequence[Method], calibration: Mapping[str, Any]) -> pl.DataFrame:
        """Every calibrated Edit at its two strengths, all replicates, on the same rows."""
        conditions = [Condition()]
        for method in methods:
            for sign in ("1", "-1"):
                solved = calibration["edits"].get(method.name, {}).get(sign)
                if solved:
                    conditions += [Condition.of(edit, solved["alpha"]) for edit in method.edits]
        return self._scored("scores_equal_kl", conditions)


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
    with Comparison(settings, plan, model) as comparison:
        methods = comparison.methods()
        scores = comparison.scores(methods)
        calibration = comparison.calibrations(methods)
        equal = comparison.calibrated_scores(methods, calibration)
        behaviour = comparison.behaviour
        own_reader = tables.Comparison(scores, behaviour.name, behaviour.probe.headline)
        equal_reader = tables.Comparison(equal, behaviour.name, behaviour.probe.headline)
        own = tables.measure(own_reader, [_line(method, 1.0, -1.0) for method in methods])
        calibrated = tables.measure(equal_reader, [
            _line(method, found["1"]["alpha"], found["-1"]["alpha"],
                  found["1"]["converged"] and found["-1"]["converged"])
            for method in methods
            if (found := calibration["edits"].get(method.name))
        ])  # fmt: skip
        title = f"{behaviour.name} in {comparison.model.name}: methods compared"
        sentence = tables.write(
            comparison.folder.path, title, own, calibrated, calibration, behaviour.name, own_reader.base_facts()
        )
        summary = dict(read_json(comparison.folder / "comparison.json"))
        return Result(comparison.model.slug, behaviour.name, sentence, comparison.folder.path, summary)


def together(results: Sequence[Result], out: Path) -> Path:
    """One table over several comparisons, `comparisons.html` (and `.md`) in `out`; a rerun replaces it."""
    path = out / "comparisons.html"
    tables.write_across(path, [tables.Compared(r.model, r.behaviour, r.summary) for r in results])
    return path


def _line(method: Method, plus: float, minus: float, converged: bool = True) -> tables.Line:
    """Where a method's rows stand in a scores table."""
    if method.contexts is not None:
        at = {"+" if side > 0 else "-": (context.name, "none", 0.0) for side, context in method.contexts.items()}
    else:
        edit = method.edits[0].name
        at = {"+": (PLAIN.name, edit, plus), "-": (PLAIN.name, edit, minus)}
    return tables.Line(method.name, method.kind, at, method.note, converged)


@dataclass(frozen=True)
class _Run:
    """What is used of a finished replication."""

    folder: Path
    behaviour: Behaviour
    direction: Direction
    pairs: pl.DataFrame
    training: train.TrainSettings


def _prompt_method(name: str, sides: Mapping[int, prompts.Prompt]) -> Method:
    contexts = {side: Context(f"{name} {'+' if side > 0 else '-'}", prompt.text) for side, prompt in sides.items()}
    return Method(name, "prompts", contexts=contexts)


def _identity(condition: Condition) -> list[Any]:
    """What the Edits of a Condition are made of, for stage keys."""
    found: list[Any] = [condition.context.system]
    for edit, alpha in condition.active:
        effect = edit.effect
        if isinstance(effect, Direction):
            found.append([alpha, {name: round(value, 9) for name, value in effect.norms().items()}])
        elif isinstance(effect, OutputShift):
            found.append([alpha, {name: round(float(v.norm()), 9) for name, v in effect.vectors.items()}])
        elif isinstance(effect, ActivationDirection):
            found.append([alpha, {layer: round(float(v.norm()), 9) for layer, v in effect.vectors.items()}])
    return found


def _plain(divergences: Mapping[str, Any]) -> dict[str, Any]:
    """Divergences as JSON: a prompt has no strength."""
    return {name: {sign: {k: v for k, v in values.items() if k != "alpha"} for sign, values in sides.items()}
            for name, sides in divergences.items()}  # fmt: skip


class _Reader:
    """Mean effects of an Edit on a small table, against its base."""

    def __init__(self, table: pl.DataFrame, behaviour: Behaviour) -> None:
        self.table, self.behaviour = table, behaviour
        base = table.filter((pl.col("edit") == "none") & (pl.col("context") == PLAIN.name))
        self.base_own = _signed_mean(_metric(base, behaviour.name, "logratio"))
        self.base_facts = _accuracy(_metric(base, side_effects.FACTS, "logratio"))

    def effects(self, edit: str, alpha: float, seed: int | None) -> dict[str, float]:
        """Change of the behaviour, answer mass and fact accuracy."""
        mine = self.table.filter((pl.col("edit") == edit) & (pl.col("alpha") == alpha) & (pl.col("seed") == seed))
        return {
            "own": _signed_mean(_metric(mine, self.behaviour.name, "logratio")) - self.base_own,
            "pmass": float(_metric(mine, self.behaviour.name, "pmass")["value"].mean() or 0.0),  # type: ignore[arg-type]
            "facts": _accuracy(_metric(mine, side_effects.FACTS, "logratio")),
        }


def _metric(table: pl.DataFrame, probe: str, metric: str) -> pl.DataFrame:
    return table.filter((pl.col("probe") == probe) & (pl.col("metric") == metric))


def _signed_mean(rows: pl.DataFrame) -> float:
    return float((rows["value"] * rows["label"]).mean() or 0.0)  # type: ignore[arg-type]


def _accuracy(rows: pl.DataFrame) -> float:
    return float((rows["value"] * rows["label"] > 0).mean() or 0.0)  # type: ignore[arg-type]
