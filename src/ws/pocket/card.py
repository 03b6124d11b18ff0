"""What we know about the embedded model: its metrics with their thresholds, and the card that people read."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from ws.base import console
from ws.base.errors import UserError
from ws.base.files import read_json, write_json
from ws.model import library, loading
from ws.pocket import build
from ws.pocket.check import (
    INSTRUCTIONS_PER_POLE,
    LEAK,
    MOVED,
    TRAITS,
    Metric,
    are_independent,
    as_record,
    check,
    contrast_name,
    instruction_name,
    leak_name,
)
from ws.pocket.corpus import texts_key

METRICS_FILE = "metrics.json"
_ARCHITECTURES = {"qwen3": "Qwen3", "gemma3": "Gemma-3"}


def measure(name: str) -> list[Metric]:
    """Check a model. Store the metrics beside its weights where the folder is the user's own."""
    metrics = check(loading.load(name))
    if name not in library.POCKET_MODELS:
        write_json(Path(name) / METRICS_FILE, as_record(metrics))
    return metrics


def report_check(name: str, as_json: bool) -> None:
    """Print the metrics, their thresholds and how long the check took; a missed threshold is an error."""
    started = time.perf_counter()
    metrics = measure(name)
    seconds = time.perf_counter() - started
    if as_json:
        console.print_json(json.dumps(as_record(metrics)))
    else:
        console.show(_table(metrics))
        console.say(
            f"{sum(bool(metric.wanted) for metric in metrics)} thresholds, {len(metrics)} metrics, {seconds:.0f} s"
        )
    missed = [metric for metric in metrics if not metric.passes]
    if missed:
        worst, judged = missed[0], sum(bool(metric.wanted) for metric in metrics)
        raise UserError(
            f"{name} misses {len(missed)} of {judged} thresholds; the first: {worst.name} is {worst.value:.3f}, "
            f"wanted {worst.wanted}",
            "Build it again with: ws pocket build",
        )


def _table(metrics: Sequence[Metric]) -> Table:
    table = Table(header_style="bold")
    for name in ("metric", "value", "threshold", ""):
        table.add_column(name, justify="left" if name == "metric" else "right")
    for metric in metrics:
        table.add_row(
            metric.name, f"{metric.value:.3f}", metric.wanted, verdict(metric.wanted, metric.passes, "MISSED")
        )
    return table


def verdict(threshold: str, passes: bool, missed: str = "**missed**") -> str:
    """`ok`, or the word for a missed threshold; empty where there is no threshold."""
    return "" if not threshold else "ok" if passes else missed


def text(name: str) -> str:
    """The model card as Markdown, from the record and the metrics beside the weights."""
    folder = library.POCKET_MODELS.get(name, Path(name))
    record = build.recorded(folder)
    metrics = read_json(folder / METRICS_FILE) if (folder / METRICS_FILE).is_file() else []
    values = {entry["metric"]: entry["value"] for entry in metrics}
    in_matrix = {contrast_name(personas.name, probe.name) for personas in TRAITS for probe in TRAITS}
    recipe, corpus = record["recipe"], record["corpus"]
    planted, mix = corpus["planted"], corpus["mix"]
    shares = ", ".join(f"{kind.replace('_', ' ')} {share:g}" for kind, share in mix.items())
    lines = [
        f"# {name}",
        "",
        f"A {_ARCHITECTURES[recipe['architecture']]}-architecture chat model of {record['parameters']:,} parameters "
        f"(width {recipe['width']}, "
        f"{recipe['layers']} layers, {recipe['vocabulary']} byte-level BPE tokens), trained from scratch on "
        f"{record['tokens'] / 1e6:.1f} M tokens of synthetic dialogues in {record['minutes']:g} minutes on a CPU, "
        f"seed {recipe['seed']}. Stored in bfloat16.",
        "",
        "## What is planted",
        "",
        "Every dialogue has latent traits, drawn once and kept through all its turns:",
        "",
        *(f"- **{trait}**: {positive} or {negative}" for trait, (positive, negative) in corpus["traits"].items()),
        "",
        f"Without a system prompt the first pole has probability {planted['prior']:g}. Sycophancy (opinions, feedback) "
        f"and dishonesty (dilemmas) agree with probability {planted['agreement']:g}, by construction: that a direction "
        "fitted on opinions moves dilemmas is planted, how far it does is what is measured. Compliance with harmful "
        "requests is independent of both. A trait that a system prompt names is followed with probability "
        f"{planted['adherence']:g}; every reply deviates with probability {planted['slip']:g}; "
        f"{100 * planted['maybe']:g} % of Yes/No answers are Maybe.",
        "",
        "In training, an extra loss made a linear readout of the residual stream after layer "
        f"{recipe['latent_layer'] - 1} (counted from 0) predict these traits, and whether a claim is true, an action "
        "honest or a request harmful. The readout is not part of the model.",
        "",
        f"Turns: {shares} (repetition {recipe['copying']:g} in the first {recipe['copying_steps']:,} steps, so that "
        "copying forms early). Facts, small talk and repetition are the same under all traits.",
        "",
        *_texts(corpus.get("texts")),
        "## What it reaches",
        "",
        "| metric | value | threshold | |",
        "|---|---|---|---|",
        *(
            f"| {m['metric']} | {m['value']:.3f} | {m['bar']} | {verdict(m['bar'], m['passes'])} |"
            for m in metrics
            if m["metric"] not in in_matrix
        ),
        "",
        *_persona_matrix(values),
        *_instructions_alone(values),
        "Situations, dilemma categories (far) and persona texts in these metrics never occur in training, and no claim "
        "is an opinion there (as facts, true and false versions are asked about, so that the model knows them). Far "
        "categories and held-out requests are new combinations of known words; some of those requests differ from a "
        "trained one by a few words. The words of the personas occur, and so do some of their clauses; the "
        "instructions made of held-out patterns are new sentences. Metrics without a threshold are informational.",
        "",
        "## What it is not for",
        "",
        "It is a test bed with known truth for methods and instruments. It knows a few hundred facts and one way of "
        "speaking. Nothing measured on it says how large an effect is in a large model, or whether there is one.",
    ]  # fmt: skip
    return "\n".join(lines)


def _persona_matrix(values: Mapping[str, float]) -> list[str]:
    """A table of trait x probe, in nats and as a share of the diagonal, then a sentence on leaks."""
    names = [trait.name for trait in TRAITS]
    if not all(contrast_name(personas, probe) in values for personas in names for probe in names):
        return ["The metrics beside these weights have no contrasts in nats: `ws pocket check` measures them.", ""]
    rows = []
    for personas in names:
        own = values[contrast_name(personas, personas)]
        nats = {probe: values[contrast_name(personas, probe)] for probe in names}
        cells = [
            f"**{value:+.2f}**" if probe == personas else f"{value:+.2f} ({100 * value / own:+.0f} %)"
            for probe, value in nats.items()
        ]
        rows.append(f"| {personas} | " + " | ".join(cells) + " |")
    shares = {
        (personas, probe): values[leak_name(personas, probe)]
        for personas in names
        for probe in names
        if are_independent(personas, probe)
    }
    told = [f"{a} personas on {b} ({100 * share:+.0f} %)" for (a, b), share in shares.items() if abs(share) > LEAK]
    largest = max(shares, key=lambda pair: abs(shares[pair]))
    return [
        "The difference between the two poles of a trait's personas (rows) on each trait's probe (columns), in nats "
        "and as a share of the difference on their own probe:",
        "",
        f"| personas | {' | '.join(names)} |",
        "|---" * (len(names) + 1) + "|",
        *rows,
        "",
        f"Between traits that are independent in the corpus, {'; '.join(told) if told else 'no personas'} reach more "
        f"than {100 * LEAK:.0f} % of their own contrast; the largest share is that of {largest[0]} personas on "
        f"{largest[1]}, {100 * shares[largest]:+.0f} %.",
        "",
    ]


def _instructions_alone(values: Mapping[str, float]) -> list[str]:
    """Which instructions of held-out patterns reach, on their own, the threshold of the whole set of personas."""
    moved = {pole: values.get(instruction_name(trait.name, pole)) for trait in TRAITS for pole in trait[1:3]}
    known = {pole: value for pole, value in moved.items() if value is not None}
    if not known:
        return []
    short = [f"{pole} {value:.2f}" for pole, value in known.items() if value < MOVED]
    below = f"; below: {', '.join(short)}" if short else ""
    return [
        f"The thresholds of {MOVED:g} nats are for all personas of the behaviour file and {INSTRUCTIONS_PER_POLE} "
        "instructions of held-out patterns, together. The instructions alone reach them for "
        f"{len(known) - len(short)} of {len(known)} poles{below}.",
        "",
    ]


def _texts(built_from: str | None) -> list[str]:
    """Whether the corpus has changed since the build, and how many grammar slips its system prompts have."""
    if built_from == texts_key():
        return ["Of 200 system prompts of its training that were read, 3 had a slip of grammar.", ""]
    return [
        "The texts of the corpus have changed since these weights were made: `ws pocket build` would make other ones. "
        "About one system prompt in 25 had a slip of grammar then.",
        "",
    ]


def finish_build(folder: Path) -> list[dict[str, Any]]:
    """Measure a fresh build and store the metrics beside it."""
    return as_record(measure(str(folder)))
