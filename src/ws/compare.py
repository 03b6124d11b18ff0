"""The fair comparison: weight directions, activation steering, prompts and controls on identical rows.

Every method is a Condition and all are scored by the one engine into one table. What has a choice to make (activation
steering: strength and layer; `best of k` prompts) makes it on a dev split and is reported on the test split, and so is
everything else, so that all rows are the same. Strengths are compared twice: at each method's own +-1, and at equal KL
to the base on neutral text. Uncertainty over rows and over seeds are two things and stand apart.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import polars as pl

from ws import adapters, calibrate, console, dev_split, diff, train
from ws.baselines import bias_only, controls, gradient, prompts, repe, synthetic
from ws.baselines.bias_only import OutputShift
from ws.baselines.repe import ActivationDirection, RepeSettings
from ws.behaviour import Behaviour
from ws.condition import PLAIN, Condition, Context, Edit
from ws.dev_split import split
from ws.direction import Direction
from ws.errors import UserError
from ws.eval import dilemmas, side_effects, sycophancy
from ws.models import ChatModel
from ws.probe import Probe
from ws.replicate import SIGNS, Replication, train_together
from ws.report import comparison as tables
from ws.run_settings import Settings, shared_base
from ws.score import score
from ws.store import RunFolder, Shards, atomic_file, digest, read_json, write_json

REPE_VARIANTS = (
    RepeSettings(),
    RepeSettings(form="incremental"),
    RepeSettings(estimator="pca_diff"),
    RepeSettings(estimator="logistic"),
)


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

    def __post_init__(self) -> None:
        if not (self.families and self.seeds):
            raise UserError("there is nothing to compare", "Give at least one of --families and --seeds.")
        for family in self.families:
            adapters.require_family(family)


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


class Comparison:
    """One model and one behaviour: all methods, scored, calibrated and tabulated in `<behaviour>/compare/`."""

    def __init__(self, settings: Settings, plan: Plan, model: ChatModel | None = None) -> None:
        self.settings = replace(settings, alphas=(-1.0, 0.0, 1.0), control_seeds=0)
        self.plan = plan
        self.model = model or settings.load()
        self.runs = {(family, seed): run for family in plan.families for seed, run in self._replicate(family).items()}
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

    def _replicate(self, family: str) -> dict[int, _Run]:
        """The runs of a family by seed; what is missing of them is fitted in one pass."""
        console.say(f"\n{family}, seeds {' '.join(map(str, self.plan.seeds))}", style="bold")
        found = {}
        with ExitStack() as stack:
            settings = (replace(self.settings, adapter=family, seed=seed) for seed in self.plan.seeds)
            runs = [stack.enter_context(Replication(one, self.model)) for one in settings]
            train_together(runs)
            for seed, run in zip(self.plan.seeds, runs, strict=True):
                direction, _ = run.diff()
                found[seed] = _Run(run.folder.path, run.behaviour, direction, run.data(), run.training)
        return found

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
            option, strength = dev_split.best_strength(self.model, self.behaviour, name, fitted)
            scaled = ActivationDirection(
                {layer: vector * strength for layer, vector in fitted[option].vectors.items()},
                self.model.fingerprint, option.edited, {**fitted[option].provenance, "strength": strength},
            )  # fmt: skip
            where = "" if option.layer is None else f"layer {option.layer}, "
            found.append(Method(name, "activations", (Edit(name, scaled),), note=f"{where}strength {strength:g}"))
        return found

    def _prompts(self) -> list[Method]:
        pool = prompts.all_personas(self.behaviour)
        best = dev_split.best_prompts(self.model, self.behaviour, pool)
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
        if permuted := controls.permuted_edits(self.reference, self.plan.permutations):
            found.append(Method(controls.PERMUTED, "controls", tuple(permuted)))
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
            sides = [train.Side(pairs, sign, seed, 0, place / sign) for sign in SIGNS]
            train.fit_together(self.model, sides, run.training)
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
