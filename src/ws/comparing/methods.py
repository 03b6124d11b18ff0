"""The lines of a comparison: weight directions, activation steering, prompts and controls, each as Edits or Contexts.

Choices (layer and strength of activation steering, the best of several prompts) are made on the dev split. Methods that
need further training (shuffled personas, biases alone) are stages of the comparison's folder.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ws.adapters import diff
from ws.algebra.direction import Direction
from ws.base.poles import POLES
from ws.base.store import RunFolder, Shards, digest
from ws.baselines import bias_only, controls, gradient, prompts, repe, synthetic
from ws.baselines.bias_only import OutputShift
from ws.baselines.peer_vectors import PeerFile
from ws.baselines.repe import ActivationDirection, RepeSettings
from ws.comparing import dev_split
from ws.comparing.dev_split import Option
from ws.edit.condition import Condition, Context, Edit
from ws.fitting import train
from ws.fitting.behaviour import Behaviour
from ws.fitting.stages import FittedRun
from ws.measure.probe import Probe
from ws.model import architecture
from ws.model.loading import ChatModel


@dataclass(frozen=True)
class Method:
    """One line of a table: an Edit per replicate, or a Context per side. `kind` groups lines."""

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


@dataclass(frozen=True)
class Sources:
    """The inputs of the methods: the runs by (family, training seed), the reference first.

    own: the probe that measures the behaviour (`eval.instrument`), for choices on dev rows. folder: keeps what is
    trained only for the comparison. siblings: folders that may already have it.
    """

    model: ChatModel
    runs: Mapping[tuple[str, int], FittedRun]
    own: Probe
    data_seed: int
    folder: RunFolder
    siblings: Sequence[Path] = ()

    @property
    def first(self) -> tuple[str, int]:
        """Family and seed of the reference. Controls have the norm of its direction."""
        return next(iter(self.runs))

    @property
    def reference(self) -> FittedRun:
        """The run of the first family and seed."""
        return self.runs[self.first]

    @property
    def behaviour(self) -> Behaviour:
        """The behaviour of all runs."""
        return self.reference.behaviour


# -------------------------------------------------------------------- weights


def weight_directions(sources: Sources) -> list[Method]:
    """The direction of every family with all training seeds, and variants of the reference.

    Variants are a separate kind: tau_pos and tau_neg are baselines without a contrast, and all have one seed.
    """
    found = []
    for family in dict.fromkeys(family for family, _ in sources.runs):
        edits = tuple(
            Edit(f"dW:{family}", run.direction, seed, sources.data_seed)
            for (own, seed), run in sources.runs.items()
            if own == family
        )
        found.append(Method(f"dW:{family}", "weights", edits))
    family, seed = sources.first
    pos, neg = (diff.task_vector(sources.model, sources.reference.folder / pole) for pole in POLES)
    parts = diff.variants(pos, neg)
    for name, note in (
        ("tau_pos", "the positive adapter alone"),
        ("tau_neg", "the negative adapter alone, sign flipped"),
        ("bisector", "difference of the unit task vectors"),
    ):
        label = f"{name} ({family})"
        edit = Edit(label, parts[name], seed, sources.data_seed)
        found.append(Method(label, "variants", (edit,), note=f"{note}; seed {seed}"))
    return found


# -------------------------------------------------------------------- activations and prompts


def activation_directions(sources: Sources, variants: Sequence[str]) -> list[Method]:
    """Named variants of activation steering. The strength, and the layer if it is free, is chosen on the dev split."""
    model, behaviour, run = sources.model, sources.behaviour, sources.reference
    options = {name: repe.candidates(name, model.layer_count, run.training.adapter.layers) for name in variants}
    every = list(dict.fromkeys(option for some in options.values() for option in some))
    pairs = run.pairs.gather_every(max(1, len(run.pairs) // _RESPONSES))
    fitted = repe.fit_all(model, behaviour, every, pairs.select("prompt", "response_pos", "response_neg").rows())
    found = []
    for name, some in options.items():
        label = some[0].name if name not in repe.ONE_LAYER else f"RepE {_ONE_LAYER[name]}, best single layer"
        found.append(_at_best_strength(sources, label, {one: fitted[one] for one in some}, _said_of_variant))
    return found


def peer_vectors(sources: Sources, read: Mapping[PeerFile, ActivationDirection]) -> list[Method]:
    """Vectors that other libraries trained, on all their layers or on the steered ones, whichever dev rows prefer.

    Vectors of norm 1 are tried in residual norms, with one coefficient for all layers as in their library: how much a
    vector of norm 1 does depends on the model.
    """
    steered = architecture.layer_slice(sources.model.layer_count, *sources.reference.training.adapter.layers)
    found = []
    for file, direction in read.items():
        candidates = [one for one in (direction, direction.on_layers(steered)) if one.vectors]
        fitted = {tuple(sorted(one.vectors)): _in_useful_unit(sources, one) for one in candidates}
        found.append(_at_best_strength(sources, file.label, fitted, _said_of_file))
    return found


def _in_useful_unit(sources: Sources, direction: ActivationDirection) -> ActivationDirection:
    """Vectors of norm 1 times the mean residual norm of their layers; others as they are."""
    if direction.unit != "one":
        return direction
    norm = repe.residual_norm(sources.model, sources.behaviour, direction.vectors)
    return replace(direction.times(norm), unit="residual")


def _at_best_strength(
    sources: Sources,
    label: str,
    fitted: Mapping[Option, ActivationDirection],
    said: Callable[[Option, ActivationDirection], str],
) -> Method:
    """The candidate and strength that the dev split chooses; `said` is what the note says about them."""
    chosen = dev_split.best_strength(sources.model, sources.own, label, fitted)
    direction = fitted[chosen.option].times(chosen.strength)
    note = ", ".join(part for part in (said(chosen.option, direction), chosen.remark) if part)
    return Method(label, "activations", (Edit(label, direction),), note=note)


def _said_of_variant(option: RepeSettings, direction: ActivationDirection) -> str:
    layer = "" if option.layer is None else f"layer {option.layer}, "
    return f"{layer}strength {direction.provenance['strength']:g}"


def _said_of_file(layers: tuple[int, ...], direction: ActivationDirection) -> str:
    where = f"layer {layers[0]}" if len(layers) == 1 else f"{len(layers)} layers, {layers[0]} to {layers[-1]}"
    made = direction.provenance
    return f"file {made['digest']}, {where}, coefficient {made['strength']:.3g}"


_ONE_LAYER = {"single-layer": "mean", "original": "original"}
"""Variants that choose a layer -> their names in tables."""
_RESPONSES = 200
"""About this many pairs are read under every persona, for means over responses."""
_STEP_ROWS = 200
"""About this many responses of each side, spread over all topics, give the one gradient step."""


def system_prompts(sources: Sources) -> list[Method]:
    """The first personas, the best of all personas on the dev split, and the engineered prompts by kind."""
    pool = prompts.all_personas(sources.behaviour)
    best = dev_split.best_prompts(sources.model, sources.own, pool)
    simple = {p.side: p for p in prompts.simple(sources.behaviour)}
    found = [
        _prompt_method("prompt: simple", simple),
        _prompt_method(f"prompt: best of {len(pool) // 2}", best),
    ]
    by_kind: dict[str, dict[int, prompts.Prompt]] = {}
    for prompt in prompts.engineered(sources.behaviour.name):
        by_kind.setdefault(prompt.kind, {})[prompt.side] = prompt
    return [*found, *(_prompt_method(f"prompt: {kind}", sides) for kind, sides in by_kind.items())]


def _prompt_method(name: str, sides: Mapping[int, prompts.Prompt]) -> Method:
    contexts = {side: Context(f"{name} {'+' if side > 0 else '-'}", prompt.text) for side, prompt in sides.items()}
    return Method(name, "prompts", contexts=contexts)


# -------------------------------------------------------------------- controls


def control_directions(sources: Sources, *, random_seeds: int, permutations: int, shuffles: int) -> list[Method]:
    """Random, permuted and shuffled directions, synthetic constructions, one gradient step, biases alone."""
    model, run = sources.model, sources.reference
    reference, slice_ = run.direction, run.training.adapter.layers
    found = [Method(
        controls.RANDOM, "controls", tuple(controls.random_edits(reference, random_seeds)),
        note=f"norm and rank of dW:{sources.first[0]}",
    )]  # fmt: skip
    if permuted := controls.permuted_edits(reference, permutations):
        found.append(Method(controls.PERMUTED, "controls", tuple(permuted)))
    if shuffles:
        found.append(Method(controls.SHUFFLED, "controls", tuple(
            Edit(controls.SHUFFLED, _shuffled(sources, seed), seed) for seed in range(shuffles)
        ), note="trained like the rest, raw norm"))  # fmt: skip
    activation = repe.fit(model, sources.behaviour, RepeSettings(slice=slice_))
    for source in synthetic.INPUTS:
        built = synthetic.residual_writes(model, activation, source, norm=reference.norm())
        label = f"synthetic, {source} input"
        found.append(Method(label, "controls", (Edit(label, built),), note="untrained, norm of the reference"))
    every = [train.examples(model, run.pairs, pole, run.training, sources.data_seed).train for pole in POLES]
    sides = [rows[:: max(1, len(rows) // _STEP_ROWS)] for rows in every]  # rows are in the order of topics
    step = gradient.one_step(model, sides[0], sides[1], norm=reference.norm(), layers=slice_)
    found.append(Method("one gradient step", "controls", (Edit("one gradient step", step),), note="same norm"))
    edit = Edit("biases alone", _biases(sources))
    found.append(Method("biases alone", "controls", (edit,), note="MLP biases, trained like the rest"))
    return found


def _biases(sources: Sources) -> OutputShift:
    """The contrast fitted in MLP biases alone, kept in the comparison's folder."""
    run, folder = sources.reference, sources.folder
    file = folder / "biases.safetensors"
    seeds = {"seed": sources.first[1], "data_seed": sources.data_seed}
    inputs = {"pairs": digest(run.folder / "pairs.parquet"), "training": run.training, **seeds}

    def make(_: Shards) -> None:
        bias_only.fit(sources.model, run.pairs, run.training, **seeds).save(file)

    folder.build("biases", inputs, [file.name], make, sources.siblings)
    return OutputShift.load(file)


def _shuffled(sources: Sources, seed: int) -> Direction:
    """A direction from personas that were shuffled between the sides, trained like the reference."""
    run, folder = sources.reference, sources.folder
    place = folder / f"shuffled{seed}"
    file = place / "direction.safetensors"
    inputs = {"pairs": digest(run.folder / "pairs.parquet"), "training": run.training, "seed": seed,
              "data_seed": sources.data_seed}  # fmt: skip

    def make(_: Shards) -> None:
        pairs = controls.shuffled_pairs(run.pairs, seed)
        for pole in POLES:
            train.fit(sources.model, pairs, pole, run.training, seed=seed, data_seed=sources.data_seed,
                      folder=place / pole)  # fmt: skip
        diff.direction(sources.model, place / "pos", place / "neg", {"control": controls.SHUFFLED})[0].save(file)

    folder.build(f"shuffled{seed}", inputs, [f"shuffled{seed}/direction.safetensors"], make, sources.siblings)
    return Direction.load(file).bind(sources.model)
