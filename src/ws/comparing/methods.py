"""The lines of a comparison: weight directions, activation steering, prompts and controls, each as Edits or Contexts.

Every method brings its own random controls: a weight direction those with its singular values, activation steering
those with its norms, a prompt neutral ones of its length. Choices (layer and strength of activation steering, the best
of several prompts) are made on the dev split. Methods that need further training (shuffled personas, biases alone,
trained vectors) are stages of the comparison's folder.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from ws.adapters import diff
from ws.algebra import random_like
from ws.algebra.direction import Direction
from ws.base.files import content_key, digest
from ws.base.poles import POLES
from ws.base.store import RunFolder, Shards
from ws.baselines import (
    bias_only,
    controls,
    gradient,
    jacobian,
    prompts,
    repe,
    svd_steering,
    synthetic,
    trained_vector,
)
from ws.baselines.bias_only import OutputShift
from ws.baselines.peer_vectors import PeerFile
from ws.baselines.repe import ActivationDirection, RepeSettings
from ws.comparing import dev_split
from ws.comparing.dev_split import Option
from ws.edit.condition import Context, Edit
from ws.fitting import train
from ws.fitting.behaviour import Behaviour
from ws.fitting.run_settings import arithmetic
from ws.fitting.stages import FittedRun
from ws.measure.probe import Probe, split
from ws.model import architecture
from ws.model.chat import SupervisedTokens
from ws.model.loading import ChatModel

Key = tuple[str, int, int]
"""Family, training seed and data seed of a run."""


@dataclass(frozen=True)
class Method:
    """One line of a table: an Edit per replicate, or a Context per side. `kind` groups lines.

    control: its random controls, as a Method of the kind `controls`; or None.
    """

    name: str
    kind: str
    edits: tuple[Edit, ...] = ()
    contexts: Mapping[int, Context] | None = None
    note: str = ""
    control: Control | None = None


@dataclass(frozen=True)
class Control:
    """Draws without information about the behaviour: Edits, or Contexts.

    has_sides: the draws at + and at - are different things (a permuted direction has signs). Random draws have none: a
    random direction turned round is another random direction, so one sign is measured and serves for both.
    """

    name: str
    edits: tuple[Edit, ...] = ()
    contexts: tuple[Context, ...] = ()
    note: str = ""
    has_sides: bool = False

    @property
    def sides(self) -> tuple[int, ...]:
        """The sides that are measured."""
        return (1, -1) if self.has_sides else (1,)


@dataclass(frozen=True)
class Sources:
    """The inputs of the methods: the runs by family and seeds, the reference first.

    own: the probe that measures the behaviour (`eval.instrument`), for choices on dev rows. fitting_model: the model in
    the dtype in which runs are fitted. folder: keeps what is trained only for the comparison. siblings: folders that
    may already have it. draws: how many random controls every method gets.
    """

    model: ChatModel
    fitting_model: ChatModel
    runs: Mapping[Key, FittedRun]
    own: Probe
    folder: RunFolder
    siblings: Sequence[Path] = ()
    draws: int = 10

    @property
    def first(self) -> Key:
        """The reference. Controls of untrained directions have the norm of its direction."""
        return next(iter(self.runs))

    @property
    def reference(self) -> FittedRun:
        """The run of the first family and seeds."""
        return self.runs[self.first]

    @property
    def behaviour(self) -> Behaviour:
        """The behaviour of all runs."""
        return self.reference.behaviour

    def of_family(self, family: str) -> dict[Key, FittedRun]:
        """The runs of a family, one per replicate."""
        return {key: run for key, run in self.runs.items() if key[0] == family}

    @cached_property
    def replicates(self) -> dict[Key, FittedRun]:
        """The runs of the reference's family."""
        return self.of_family(self.first[0])

    def kept(self, direction_of: Callable[[], Direction], name: str, inputs: Mapping[str, Any]) -> Direction:
        """A direction that takes long to make, kept until the comparison is finished (`forget`), bound to its base."""
        file = self.kept_directions.path(f"{name}-{content_key(inputs)}.safetensors")
        if not file.is_file():
            replace(direction_of(), base=self.model.fingerprint).save(file)
        return Direction.load(file).bind(self.model)

    @property
    def kept_directions(self) -> Shards:
        """Directions that are made again if the comparison is repeated."""
        return Shards(self.folder.path / ".partial" / "directions")

    def examples(self, run: FittedRun, data_seed: int) -> tuple[list[SupervisedTokens], list[SupervisedTokens]]:
        """The training rows of a run's two sides."""
        pos, neg = (train.examples(self.model, run.pairs, pole, run.training, data_seed).train for pole in POLES)
        return pos, neg


# -------------------------------------------------------------------- weights


def weight_directions(sources: Sources) -> list[Method]:
    """The direction of every family with all replicates."""
    found = []
    for family in dict.fromkeys(family for family, _, _ in sources.runs):
        edits = [Edit(f"dW:{family}", run.direction, *key[1:]) for key, run in sources.of_family(family).items()]
        found.append(_of_weights(sources, f"dW:{family}", "weights", edits))
    return found


def parts_of_directions(sources: Sources) -> list[Method]:
    """The adapters behind the reference family's directions, each alone, and their bisector."""
    family, found = sources.first[0], []
    parts: dict[str, list[Edit]] = {}
    for key, run in sources.replicates.items():
        pos, neg = (diff.task_vector(sources.model, run.folder / pole) for pole in POLES)
        for name, part in diff.variants(pos, neg).items():
            parts.setdefault(name, []).append(Edit(f"{name} ({family})", part, *key[1:]))
    for name, note in (
        ("tau_pos", "the positive adapter alone"),
        ("tau_neg", "the negative adapter alone, sign flipped"),
        ("bisector", "difference of the unit task vectors"),
    ):
        found.append(_of_weights(sources, f"{name} ({family})", "variants", parts[name], note))
    return found


def untrained_directions(sources: Sources, counts: Sequence[int]) -> list[Method]:
    """A few gradient steps on the same pairs, with all replicates; constructions without data; biases alone."""
    found, slice_ = [], sources.reference.training.adapter.layers
    for count in counts:
        name = "one gradient step" if count == 1 else f"{count} gradient steps"
        edits = []
        for (_, seed, data_seed), run in sources.replicates.items():
            pos, neg = (rows[:: max(1, len(rows) // (_STEP_ROWS * count))] for rows in sources.examples(run, data_seed))
            chosen: dict[str, Any] = {"count": count, "seed": seed, "norm": run.direction.norm(), "layers": slice_}
            make = partial(gradient.steps, sources.fitting_model, pos, neg, **chosen)  # in the dtype of the fits
            inputs = {**chosen, "rows": [pos, neg], **arithmetic(sources.fitting_model)}
            edits.append(Edit(name, sources.kept(make, "steps", inputs), seed, data_seed))
        found.append(_of_weights(sources, name, "untrained", edits, f"norm of dW:{sources.first[0]}"))
    model, norm = sources.model, sources.reference.direction.norm()
    activation = repe.fit(model, sources.behaviour, RepeSettings(slice=slice_))
    built = {
        f"synthetic, {source} input": synthetic.residual_writes(model, activation, source, norm=norm)
        for source in synthetic.INPUTS
    } | {
        "readout of the personas": synthetic.readout(model, sources.behaviour, layers=slice_, norm=norm),
        "top singular directions flipped": synthetic.flipped(model, slice_, norm=norm),
    }
    for name, direction in built.items():
        found.append(_of_weights(sources, name, "untrained", [Edit(name, direction)], "norm of the reference"))
    edit = Edit("biases alone", _biases(sources))
    return [*found, Method("biases alone", "untrained", (edit,), note="MLP biases, trained like the rest")]


def _of_weights(sources: Sources, name: str, kind: str, edits: Sequence[Edit], note: str = "") -> Method:
    """A method of weight directions, with random directions that have the singular values of its replicates in turn."""
    control = f"random like {name}"
    effects = [edit.effect for edit in edits if isinstance(edit.effect, Direction)]
    draws = tuple(
        Edit(control, random_like.spectrum_like(effects[number % len(effects)], _draw_seed(name, number)), number)
        for number in range(sources.draws if effects else 0)
    )
    return Method(name, kind, tuple(edits), note=note, control=Control(control, draws))


def _draw_seed(name: str, number: int) -> int:
    """The seed of a random draw: another one for every method and number, so that no two methods share their luck."""
    return int(hashlib.blake2b(f"{name}|{number}".encode(), digest_size=6).hexdigest(), 16)


# -------------------------------------------------------------------- activations and prompts


def activation_directions(sources: Sources, variants: Sequence[str]) -> list[Method]:
    """Named variants of activation steering on all layers of the model, with the training seeds as replicates.

    The layer, if it is free, and the strength are chosen on the dev split with a direction from all prompts. A
    replicate is estimated from a random half of the prompts (trained vectors: from the pairs of that seed).
    """
    model, behaviour, run = sources.model, sources.behaviour, sources.reference
    seeds = sorted({seed for _, seed, _ in sources.replicates})
    options = {name: repe.candidates(name, model.layer_count, (0.0, 1.0)) for name in variants if name in repe.VARIANTS}
    every = list(dict.fromkeys(option for some in options.values() for option in some))
    halves = [replace(option, seed=seed) for option in every for seed in seeds]
    pairs = run.pairs.gather_every(max(1, len(run.pairs) // _RESPONSES))
    responses = pairs.select("prompt", "response_pos", "response_neg").rows()
    fitted = repe.fit_all(model, behaviour, [*every, *halves], responses)
    found = []

    def replicates(option: RepeSettings) -> dict[int, ActivationDirection]:
        return {seed: fitted[replace(option, seed=seed)] for seed in seeds}

    for name, some in options.items():
        label = some[0].name if name not in repe.ONE_LAYER else f"RepE {_ONE_LAYER[name]}, best single layer"
        candidates = {one: fitted[one] for one in some}
        found.append(_at_best_strength(sources, label, candidates, _said_of_variant, replicates))
    layers = tuple(range(model.layer_count))
    if JACOBIAN in variants:
        whole = jacobian.fit(model, split(sources.own, dev=True), behaviour, layers=layers)
        found.append(_at_best_strength(sources, "Jacobian, best layers", _by_layers(whole), _said_of_layers, None))
    if TRAINED in variants:
        vectors = {
            seed: trained_vector.fit(
                sources.model, behaviour,
                *(rows[:: max(1, len(rows) // _VECTOR_ROWS)] for rows in sources.examples(one, data_seed)),
                layers=layers, seed=seed,
            )
            for (_, seed, data_seed), one in sources.replicates.items() if data_seed == sources.first[2]
        }  # fmt: skip
        found.append(_at_best_strength(
            sources, "trained vector, best layers", _by_layers(vectors[sources.first[1]]), _said_of_layers,
            lambda option: {seed: one.on_layers(option) for seed, one in vectors.items()},
        ))  # fmt: skip
    if SVD in variants:
        found.append(_in_top_writes(sources, seeds))
    return found


def _in_top_writes(sources: Sources, seeds: Sequence[int]) -> Method:
    """The mean difference of one layer, projected on the layer's top write directions; layer and rank from dev rows."""
    model, behaviour, setting = sources.model, sources.behaviour, RepeSettings(slice=(0.0, 1.0))
    fitted = repe.fit_all(model, behaviour, [setting, *(replace(setting, seed=seed) for seed in seeds)])
    layers = svd_steering.layers_to_try(model.layer_count)
    norms = repe.residual_norms(model, behaviour, layers)
    bases = {(layer, rank): basis for layer in layers for rank, basis in svd_steering.top_writes(model, layer).items()}

    def of(option: tuple[int, int], seed: int | None = None) -> ActivationDirection:
        whole = fitted[replace(setting, seed=seed)]
        return svd_steering.in_top_writes(whole, option[0], bases[option], norms[option[0]])

    return _at_best_strength(
        sources, "RepE in top writes, best layer and rank", {option: of(option) for option in bases},
        lambda option, one: f"layer {option[0]}, rank {option[1]}, strength {one.provenance['strength']:.3g}",
        lambda option: {seed: of(option, seed) for seed in seeds},
    )  # fmt: skip


def _by_layers(whole: ActivationDirection) -> dict[tuple[int, ...], ActivationDirection]:
    """The direction on all of its layers, and on each of them alone."""
    every = tuple(sorted(whole.vectors))
    return {every: whole, **{(layer,): whole.on_layers([layer]) for layer in every}}


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
        found.append(_at_best_strength(sources, file.label, fitted, _said_of_file, None))
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
    replicates: Callable[[Option], Mapping[int, ActivationDirection]] | None,
) -> Method:
    """The candidate and strength that the dev split chooses, with its replicates and its random controls.

    said: what the note says about them. replicates: the chosen candidate by seed; None if it has no seeds.
    """
    chosen = dev_split.best_strength(sources.model, sources.own, label, fitted, sources.folder)
    direction = fitted[chosen.option].times(chosen.strength)
    note = ", ".join(part for part in (said(chosen.option, direction), chosen.remark) if part)
    every = {None: direction} if replicates is None else {
        seed: one.times(chosen.strength) for seed, one in replicates(chosen.option).items()
    }  # fmt: skip
    edits = tuple(Edit(label, one, seed) for seed, one in every.items())
    control = f"random like {label}"
    draws = tuple(
        Edit(control, repe.random_like(direction, _draw_seed(label, draw)), draw) for draw in range(sources.draws)
    )
    return Method(label, "activations", edits, note=note, control=Control(control, draws))


def _said_of_variant(option: RepeSettings, direction: ActivationDirection) -> str:
    layer = "" if option.layer is None else f"layer {option.layer}, "
    return f"{layer}strength {direction.provenance['strength']:g}"


def _said_of_layers(layers: tuple[int, ...], direction: ActivationDirection) -> str:
    where = f"layer {layers[0]}" if len(layers) == 1 else f"{len(layers)} layers, {layers[0]} to {layers[-1]}"
    return f"{where}, strength {direction.provenance['strength']:.3g}"


def _said_of_file(layers: tuple[int, ...], direction: ActivationDirection) -> str:
    said = _said_of_layers(layers, direction).replace("strength", "coefficient")
    return f"file {direction.provenance['digest']}, {said}"


JACOBIAN, TRAINED, SVD = "jacobian", "trained", "svd"
"""Activation steering by the gradient of the log-ratio, by vectors trained on the pairs, and inside top writes."""
ACTIVATIONS = (*repe.VARIANTS, JACOBIAN, TRAINED, SVD)
_ONE_LAYER = {"single-layer": "mean", "original": "original", "paper": "mean from response"}
"""Variants that choose a layer -> their names in tables."""
_RESPONSES = 200
"""About this many pairs are read under every persona, for means over responses."""
_VECTOR_ROWS = 320
"""About this many responses of each side, spread over all topics, train a vector."""
_EXAMPLES = 3
"""Pairs of message and response that a prompt of examples shows."""
_STEP_ROWS = 200
"""About this many responses of each side, spread over all topics, are read by a gradient step."""


def system_prompts(sources: Sources) -> list[Method]:
    """The first personas, the best of all personas on the dev split, the engineered prompts by kind, and examples from
    the reference's pairs."""
    pool = prompts.all_personas(sources.behaviour)
    best = dev_split.best_prompts(sources.model, sources.own, pool)
    simple = {p.side: p for p in prompts.simple(sources.behaviour)}
    sides: dict[str, Mapping[int, prompts.Prompt]] = {
        "prompt: simple": simple, f"prompt: best of {len(pool) // 2}": best,
    }  # fmt: skip
    by_kind: dict[str, dict[int, prompts.Prompt]] = {}
    for prompt in prompts.engineered(sources.behaviour.name):
        by_kind.setdefault(f"prompt: {prompt.kind}", {})[prompt.side] = prompt
    shown = {
        side: prompts.demonstrations(sources.reference.pairs, side, _EXAMPLES, sources.first[1]) for side in (1, -1)
    }
    return [_prompt_method(sources, name, one)
            for name, one in (sides | by_kind | {f"prompt: {_EXAMPLES} examples": shown}).items()]  # fmt: skip


def _prompt_method(sources: Sources, name: str, sides: Mapping[int, prompts.Prompt]) -> Method:
    contexts = {side: Context(f"{name} {'+' if side > 0 else '-'}", prompt.text) for side, prompt in sides.items()}
    words = round(sum(len(prompt.text.split()) for prompt in sides.values()) / len(sides))
    neutral = tuple(prompt.context for prompt in prompts.neutral(sources.draws, words))
    return Method(name, "prompts", contexts=contexts, control=Control(f"neutral prompts of {words} words", (), neutral))


# -------------------------------------------------------------------- further controls


def further_controls(sources: Sources, *, permutations: int, shuffles: int) -> list[Control]:
    """Controls of every family's first direction: its layers in other orders, and directions from shuffled personas."""
    found = []
    for family in dict.fromkeys(family for family, _, _ in sources.runs):
        run = next(iter(sources.of_family(family).values()))
        if permuted := controls.permuted_edits(run.direction, permutations):
            possible, name = controls.possible_orders(run.direction), f"{controls.PERMUTED} ({family})"
            note = f"{len(permuted)} of {possible} orders of {len(run.direction.layer_numbers)} layers"
            edits = tuple(replace(edit, name=name) for edit in permuted)
            found.append(Control(name, edits, note=note, has_sides=True))
        if shuffles:
            name = f"{controls.SHUFFLED} ({family})"
            edits = tuple(Edit(name, _shuffled(sources, family, seed), seed) for seed in range(shuffles))
            found.append(Control(name, edits, note="trained like the rest", has_sides=True))
    return found


def _biases(sources: Sources) -> OutputShift:
    """The contrast fitted in MLP biases alone, kept in the comparison's folder."""
    run, folder = sources.reference, sources.folder
    file = folder / "biases.safetensors"
    seeds = {"seed": sources.first[1], "data_seed": sources.first[2]}
    inputs = {"pairs": digest(run.folder / "pairs.parquet"), "training": run.training, **seeds,
              **arithmetic(sources.fitting_model)}  # fmt: skip

    def make(_: Shards) -> None:
        bias_only.fit(sources.fitting_model, run.pairs, run.training, **seeds).save(file)

    folder.build("biases", inputs, [file.name], make, sources.siblings)
    return OutputShift.load(file)


def _shuffled(sources: Sources, family: str, seed: int) -> Direction:
    """A direction from personas that were shuffled between the sides, trained like the first one of the family."""
    ((_, _, data_seed), run), *_ = sources.of_family(family).items()
    folder, name = sources.folder, f"shuffled-{family}-{seed}"
    file = folder / name / "direction.safetensors"
    inputs = {"pairs": digest(run.folder / "pairs.parquet"), "training": run.training, "seed": seed,
              "data_seed": data_seed, **arithmetic(sources.fitting_model)}  # fmt: skip

    def make(_: Shards) -> None:
        pairs = controls.shuffled_pairs(run.pairs, seed)
        for pole in POLES:
            train.fit(sources.fitting_model, pairs, pole, run.training, seed=seed, data_seed=data_seed,
                      folder=file.parent / pole)  # fmt: skip
        pos, neg = (diff.task_vector(sources.model, file.parent / pole) for pole in POLES)
        replace(pos - neg, provenance={"control": controls.SHUFFLED}).save(file)

    folder.build(name, inputs, [f"{name}/direction.safetensors"], make, sources.siblings)
    return Direction.load(file).bind(sources.model)
