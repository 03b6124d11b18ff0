"""The catalogue of bases on the runs of one model and behaviour: capture, score layer by layer, tables, page.

Activations are captured once per model and once per run. Every layer is a piece that is kept, so a rerun continues and
a finished one is quick. Files, one level above the folders of the families: `bases_per_layer.parquet` (every score),
`bases_summary.csv` (means over layers, intervals over seeds, verdicts), `bases_between_runs.csv` (overlaps of the runs'
own subspaces), `bases_scope.csv`, `bases_unavailable.csv` and the page `subspace.html`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import polars as pl

from ws import adapters
from ws.algebra.direction import Direction
from ws.base import console
from ws.base.errors import UnsupportedFeatureError, UserError
from ws.base.files import atomic_file, content_key, digest, write_table
from ws.base.poles import POLES
from ws.base.store import Shards
from ws.baselines import gradient
from ws.edit.condition import Condition, Context, Edit
from ws.fitting import behaviour, train
from ws.fitting.behaviour import Behaviour
from ws.fitting.run_settings import Settings, command, restore_settings, run_path, scored_with, stored_in
from ws.measure.choice import answers_of
from ws.model.loading import ChatModel
from ws.report import subspaces as page
from ws.runs.evaluate import direction_of
from ws.runs.replicate import Replication
from ws.subspace import capture, overlap, prompts, ranking
from ws.subspace.bases import Background, Basis, Built, Material, Run, build, named
from ws.subspace.capture import Captured
from ws.subspace.prompts import Prompts
from ws.subspace.weights import ResidualWeights

VERSION = 1
"""Raise it when bases or metrics change, so that pieces of an earlier version are not reused."""
GRADIENT_ROWS = 128
"""Training rows per side for the gradient at the base."""
COMPARED: tuple[Any, ...] = ("written", "block")
"""Axes on which the runs' own subspaces are compared with each other."""


@dataclass(frozen=True)
class Asked:
    """Which bases, of which runs, at which rank."""

    bases: tuple[str, ...] = ("all",)
    families: tuple[str, ...] = ("lora",)
    seeds: tuple[int, ...] = (0,)
    rank: int = 8


@dataclass(frozen=True, eq=False)
class Existing:
    """A run that was made before: its settings and its direction, bound to the model."""

    family: str
    seed: int
    settings: Settings
    folder: Path
    direction: Direction


def run(settings: Settings, asked: Asked) -> page.Content:
    """Score the bases on the runs and write tables and page; returns what the page is made of."""
    bases = named(asked.bases)
    subject = behaviour.load(settings.behaviour)
    places = _places(settings, subject, asked)
    model = settings.load()
    if not 0 < asked.rank <= model.network.get_input_embeddings().weight.shape[1] // 4:
        raise UserError(f"--rank is {asked.rank}", "Give a rank from 1 to a quarter of the model's width.")
    found = _opened(settings, places, model)
    halves = prompts.of(subject)
    console.say(f"prompts     {halves.counts}")
    place = next(iter(places.values())).parents[1]
    key = content_key(
        VERSION, model.fingerprint, scored_with(model), [halves.fit.key, halves.evaluation.key], subject.personas,
        [[one.family, one.seed, digest(one.folder / "direction.safetensors")] for one in found],
        [basis.name for basis in bases], asked.rank,
    )  # fmt: skip
    shards = Shards(place / ".bases" / key)
    layers = sorted({layer for one in found for layer in one.direction.layer_numbers})
    if not all(shards.has(f"{layer}-scores.parquet") for layer in layers):
        _score(model, subject, halves, found, bases, asked.rank, layers, shards)
    tables = {
        name: pl.concat(
            [pl.read_parquet(shards.path(f"{layer}-{name}.parquet")) for layer in layers], how="vertical_relaxed"
        )
        for name in _PIECES
    }
    content = page.Content(
        model=model.name, behaviour=subject.name, width=int(model.network.get_input_embeddings().weight.shape[1]),
        rank=asked.rank, layers=tuple(layers), prompts=halves.counts, summary=ranking.summary(tables["scores"]),
        between=ranking.between_runs(tables["between"]), scope=tables["scope"],
        unavailable=tables["unavailable"].unique(maintain_order=True), folder=place,
    )  # fmt: skip
    write_table(place / "bases_per_layer.parquet", tables["scores"])
    for name, table in {
        "summary": content.summary, "between_runs": content.between, "scope": content.scope,
        "unavailable": content.unavailable,
    }.items():  # fmt: skip
        with atomic_file(place / f"bases_{name}.csv") as temporary:
            table.write_csv(temporary)
    page.write(content)
    return content


_PIECES = ("scores", "between", "scope", "unavailable")

# -------------------------------------------------------------------- the runs


def _places(settings: Settings, subject: Behaviour, asked: Asked) -> dict[tuple[str, int], Path]:
    """The folders of the runs; an error that says how to make the missing ones."""
    if not (asked.families and asked.seeds):
        raise UserError("no run is named", "Give each of --families and --seeds a value.")
    places = {}
    for family in dict.fromkeys(asked.families):
        adapters.require_family(family)
        for seed in dict.fromkeys(asked.seeds):
            places[family, seed] = run_path(replace(settings, adapter=family, seed=seed), subject)
    missing = [key for key, place in places.items() if not (place / "direction.safetensors").is_file()]
    if missing:
        families, seeds = (list(dict.fromkeys(names)) for names in zip(*missing, strict=True))
        plain = replace(settings, adapter="lora", seed=0)
        made = (
            command(replace(settings, adapter=missing[0][0], seed=missing[0][1]), "replicate") if len(missing) == 1
            else command(plain, "sweep", "--families", *families, "--seeds", *seeds)
        )  # fmt: skip
        raise UserError(f"there is no direction in {places[missing[0]]}", f"Make it with: {made}")
    return places


def _opened(settings: Settings, places: Mapping[tuple[str, int], Path], model: ChatModel) -> list[Existing]:
    """The runs with their directions; each must belong to this model."""
    found: list[Existing] = []
    for (family, seed), folder in places.items():
        given = replace(settings, adapter=family, seed=seed)
        wanted = restore_settings(stored_in(folder), given, folder / "config.json")
        with Replication(wanted, model) as opened:
            direction = direction_of(opened).effect
            assert isinstance(direction, Direction)
            found.append(Existing(family, seed, wanted, folder, direction.bind(model)))
    return found


def _gradient(model: ChatModel, one: Existing) -> Direction:
    """The contrast of the persona losses' gradients at the base, on training rows of a run, over its layers."""
    with Replication(one.settings, model) as opened:
        chosen = opened.training
    pairs = pl.read_parquet(one.folder / "pairs.parquet")
    sides = [train.examples(model, pairs, pole, chosen, one.settings.data_seed).train for pole in POLES]
    pos, neg = (rows[:: max(1, len(rows) // GRADIENT_ROWS)] for rows in sides)
    return gradient.steps(model, pos, neg, count=1, norm=1.0, layers=chosen.adapter.layers)


# -------------------------------------------------------------------- captures and scores


def _score(
    model: ChatModel, subject: Behaviour, halves: Prompts, found: Sequence[Existing], bases: Sequence[Basis], rank: int,
    layers: Sequence[int], shards: Shards,
) -> None:  # fmt: skip
    background = _background(model, subject, halves, _gradient(model, found[0]))
    runs = [_captured(model, halves, one) for one in console.track(found, "capturing runs", len(found))]
    answers = answers_of(model, subject.probe.answers)
    first, second = ([sequence[0] for sequence in group] for group in answers)
    for layer in console.track(layers, "scoring layers", len(layers)):
        if shards.has(f"{layer}-scores.parquet"):
            continue
        tables = _layer(background, runs, bases, rank, layer, (first, second))
        for name in reversed(_PIECES):  # scores last: their file says that the layer is done
            write_table(shards.path(f"{layer}-{name}.parquet"), tables[name])


def _background(model: ChatModel, subject: Behaviour, halves: Prompts, tangent: Direction) -> Background:
    contexts = [
        (Context(f"persona {number} +", pos), Context(f"persona {number} -", neg))
        for number, (pos, neg) in enumerate(zip(subject.personas.pos, subject.personas.neg, strict=True))
    ]
    pairs = []
    for pair in console.track(contexts, "capturing personas", len(contexts)):
        pos, neg = (capture.at_anchor(model, halves.fit, Condition(context)) for context in pair)
        pairs.append((pos, neg))
    try:
        pos_tokens, neg_tokens = (capture.all_tokens(model, halves.fit, Condition(one)) for one in contexts[0])
        tokens: Any = (pos_tokens, neg_tokens)
    except UnsupportedFeatureError as error:
        tokens = str(error)
    first_token = model.chat.prompt(halves.fit.rows[0].messages)[0]
    return Background(ResidualWeights(model), capture.at_anchor(model, halves.fit), pairs, tokens, tangent, first_token)


def _captured(model: ChatModel, halves: Prompts, one: Existing) -> Run:
    edit = Edit(f"dW:{one.family}", one.direction, one.seed)

    def both(half: Any) -> tuple[Captured, Captured]:
        plus, minus = (capture.at_anchor(model, half, Condition.of(edit, alpha)) for alpha in (1.0, -1.0))
        return plus, minus

    return Run(one.family, one.seed, one.direction, both(halves.fit), both(halves.evaluation))


def _layer(
    background: Background, runs: Sequence[Run], bases: Sequence[Basis], rank: int, layer: int,
    answers: tuple[list[int], list[int]],
) -> dict[str, pl.DataFrame]:  # fmt: skip
    """All tables of one layer. Bases that do not depend on a run are made once."""
    bare = Material(background, layer, rank)
    shared = {one.name: build(one, bare) for one in bases if "directions" not in one.needs}
    touching = [one for one in runs if layer in one.direction.layer_numbers]
    materials = [
        replace(bare, run=one, siblings={other.family: other.direction for other in runs if other.seed == one.seed})
        for one in touching
    ]
    scores: list[dict[str, Any]] = []
    unavailable: list[dict[str, Any]] = []
    for material in materials:
        own = material.trained
        for built in _each(bases, shared, material):
            if built.reason:
                unavailable.append({"basis": built.basis.name, "family": own.family, "reason": built.reason})
                continue
            key = {"family": own.family, "seed": own.seed, "layer": layer, "basis": built.basis.name}
            scores += [{**key, **score.as_record()} for score in overlap.scores(built, material, answers)]
    between = [row for axis in COMPARED for row in overlap.between_runs(materials, axis)]
    return {
        "scores": pl.DataFrame(scores, schema=_SCORES), "between": pl.DataFrame(between, schema=_BETWEEN),
        "scope": pl.DataFrame([overlap.scope(one) for one in materials], infer_schema_length=None),
        "unavailable": pl.DataFrame(unavailable, schema=dict.fromkeys(("basis", "family", "reason"), pl.String)),
    }  # fmt: skip


def _each(bases: Sequence[Basis], shared: Mapping[str, Built], material: Material) -> Iterator[Built]:
    for one in bases:
        yield shared.get(one.name) or build(one, material)


_SCORES: dict[str, Any] = {
    "family": pl.String, "seed": pl.Int64, "layer": pl.Int64, "basis": pl.String, "metric": pl.String,
    "rank": pl.Int64, "value": pl.Float64, "null": pl.Float64, "null_sd": pl.Float64, "z": pl.Float64,
    "concentration": pl.Float64, "oracle": pl.Float64, "percent": pl.Float64, "null_percent": pl.Float64,
}  # fmt: skip
"""Columns of `bases_per_layer.parquet`: one metric of one basis, for one run at one layer."""
_BETWEEN: dict[str, Any] = {
    "axis": pl.String, "layer": pl.Int64, "first": pl.String, "second": pl.String, "overlap": pl.Float64,
    "first_cosine": pl.Float64, "null": pl.Float64,
}  # fmt: skip
