"""The pages of a comparison: its headline, Markdown and HTML, `comparison.json` and `.csv`.

Everything is made from `Findings`; this module adds only the wording.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ws.base import power
from ws.base.files import atomic_file, write_json, write_text
from ws.base.records import plain
from ws.comparing import caveats, pareto
from ws.comparing.findings import KINDS, METHODS, PROBES, SIGNS, Entry, Findings, Side, mostly_yes_bias, shown
from ws.comparing.tables import (
    answers_table,
    contrast_table,
    controls_table,
    costs_table,
    effects_table,
    parts_table,
)
from ws.eval import instrument
from ws.eval.ability import Ability
from ws.measure import calibrate
from ws.report import document
from ws.report.document import Block, Bullets, Figure, Heading, Paragraph
from ws.report.findings import Estimate


def headline(found: Findings) -> str:
    """How far the best method of each kind moves the behaviour at equal KL, and which one moves furthest.

    Intervals over seeds come first. An effect that is not separable from the method's random controls says so.
    """
    measured = found.equal_kl[found.headline_budget]
    parts = []
    for kind, label in KINDS.items():
        entry = measured.entry(found.best.get(kind, ""))
        if entry is not None:
            parts.append(f"{label} ({entry.name}) " + ", ".join(f"{_moved(entry.sides[s])} at {s}" for s in SIGNS))
        elif any(one.kind == kind for one in measured.entries):
            parts.append(f"{label}: no method keeps its answer mass at both signs")
    by_replies = found.ability.instrument == "replies"
    name = f"{found.behaviour} ({instrument.REPLY_LEVEL})" if by_replies else found.behaviour
    won = "; ".join(f"at {sign} {one.name} moves furthest" for sign in SIGNS if (one := winner(found, sign)))
    return (
        f"{name}, change against the base in nats at equal KL ({found.headline_budget} nats per token, 95th "
        f"percentile; prompts at their own): {'; '.join(parts)}. {won[:1].upper()}{won[1:]}. The best of each kind was "
        "chosen on the dev split and is measured on the test split"
    )


def winner(found: Findings, sign: str, budget: str | None = None) -> Entry | None:
    """The entry that moves the behaviour furthest in its direction, among the best of each kind on the dev split.

    A prompt whose own KL is above the budget is not among them.
    """
    budget = budget or found.headline_budget
    measured = found.equal_kl[budget]
    chosen = [
        entry for name in found.best.values()
        if (entry := measured.entry(name)) and sign in entry.sides
        and not (entry.kind == "prompts" and (spent := entry.sides[sign].spent)
                 and spent.p95 > float(budget) * (1 + calibrate.RELATIVE_TOLERANCE))
    ]  # fmt: skip
    turn = 1 if sign == "+" else -1
    return max(chosen, key=lambda entry: turn * entry.sides[sign].own.mean, default=None)


def _moved(side: Side) -> str:
    own, verdict = side.own, side.verdict("own")
    intervals = [f"over {len(own.seeds)} seeds [{own.over_seeds.limits}]"] if own.over_seeds else []
    intervals += [f"over {own.over} [{own.limits}]"] if own.low is not None else []
    notes = [*([f"95 % {', '.join(intervals)}"] if intervals else []), *([verdict] if verdict else [])]
    return f"{own.mean:+.2f}" + (f" ({'; '.join(notes)})" if notes else "")


_NO_GAP = 1e-3
"""A difference below this share of the spread over seeds: no number of seeds that one would run separates it."""


def power_sentence(found: Findings) -> str | None:
    """How many seeds would separate the two methods that move furthest; None without replicates of both."""
    said = []
    for sign in SIGNS:
        turn = 1 if sign == "+" else -1
        measured = found.equal_kl[found.headline_budget]
        sides = [(name, entry.sides[sign].own) for name in found.best.values()
                 if (entry := measured.entry(name)) and sign in entry.sides]  # fmt: skip
        ranked = sorted(sides, key=lambda one: -turn * one[1].mean)[:2]
        if len(ranked) < 2 or any(len(own.seeds) < 2 for _, own in ranked):
            continue
        (first, a), (second, b) = ranked
        spread = math.sqrt((np.var(a.seeds, ddof=1) + np.var(b.seeds, ddof=1)) / 2)
        gap = abs(a.mean - b.mean)
        needed = "no number of" if gap < _NO_GAP * spread else str(power.seeds_needed(gap, spread))
        said.append(f"at {sign}, {first} and {second} differ by {gap:.2f}: {needed} seeds each would tell them apart")
    if not said:
        return None
    return f"Power (t test, 80 %): {'; '.join(said)}; measured with {len(a.seeds)} and {len(b.seeds)}."


def null_sentence(found: Findings) -> str:
    """How many means over controls at the budget of the headline have an interval without 0, and how many would by
    chance alone. Prompts are left out: a neutral prompt changes what the model says."""
    prompts = {entry.name for entry in found.own_strength.entries if entry.kind == "prompts"}
    means: dict[tuple[object, ...], Estimate] = {}
    for control in found.equal_kl[found.headline_budget].controls:
        for sign, by_probe in control.effects.items():
            for probe, effect in by_probe.items():
                mean = control.mean(sign, probe)
                if control.of not in prompts and mean is not None:
                    means[control.name, probe, effect.seeds] = mean  # draws without sides are in the table twice
    away = sum(mean.low is not None and mean.high is not None and not mean.low <= 0 <= mean.high
               for mean in means.values())  # fmt: skip
    return (
        f"Controls should move nothing on average. At {found.headline_budget} nats, {away} of {len(means)} means over "
        f"the draws of a control have a 95 % interval without 0; by chance alone about {0.05 * len(means):.0f} would."
    )


def yes_bias_sentence(entries: Sequence[Entry], behaviour: str, dilemma_noun: str) -> str | None:
    """The methods with mostly Yes-bias, a sentence per probe; None if there are none."""
    sentences = []
    names = {"own": (f"the {behaviour} probe", behaviour), "dilemmas": (f"the {dilemma_noun}", "honesty")}
    for probe in PROBES:
        name, right = names[probe]
        parts = [(line.name, line.side.parts(probe)) for line in mostly_yes_bias(entries, probe)]
        listed = "; ".join(f"{method} (Yes {p.bias:+.2f}, {right} {p.truth:+.2f})" for method, p in parts if p)
        if listed:
            sentences.append(
                f"Mostly Yes-bias on {name}: these methods move the answers towards Yes, or towards No, more than "
                f"towards or away from {right}: {listed}."
            )
    return " ".join(sentences) or None


# -------------------------------------------------------------------- writing


def as_json(found: Findings) -> dict[str, Any]:
    """The content of `comparison.json`: the findings, and derived values for readers without this code."""
    own = found.own_strength.entries
    return {
        "headline": headline(found), **plain(found), "base_facts": found.base.facts.mean,
        "winners": {budget: {sign: one.name for sign in SIGNS if (one := winner(found, sign, budget))}
                    for budget in found.equal_kl},
        "yes_bias": [line.name for line in mostly_yes_bias(own, "dilemmas")],
        "own_yes_bias": [line.name for line in mostly_yes_bias(own, "own")],
    }  # fmt: skip


def write(folder: Path, found: Findings) -> None:
    """Write `comparison.json`, `.csv`, `.md`, `.html` and `pareto.png`."""
    write_json(folder / "comparison.json", as_json(found))
    _write_csv(folder / "comparison.csv", found)
    pareto.draw(found, folder / "pareto.png")
    title, blocks = _title(found), _blocks(found, folder)
    write_text(folder / "comparison.md", document.to_markdown(title, blocks))
    write_text(folder / "comparison.html", document.to_html(title, "identical test rows for all methods", blocks))


def markdown(found: Findings) -> str:
    """The page as Markdown; its figure is `pareto.png` in the same folder."""
    return document.to_markdown(_title(found), _blocks(found, Path()))


def _title(found: Findings) -> str:
    return f"{found.behaviour} in {found.model}: methods compared"


def sentence(found: Findings) -> str:
    """The headline with a capital and a full stop."""
    text = headline(found)
    return text[0].upper() + text[1:] + "."


def _blocks(found: Findings, folder: Path) -> list[Block]:
    own, base, behaviour, noun = found.own_strength, found.base, found.behaviour, found.dilemma_noun
    bias = yes_bias_sentence(own.entries, behaviour, noun)
    power = power_sentence(found)
    source = "" if found.dilemmas == "own" else f"{noun.capitalize()}: {found.dilemmas}."
    cautions = (source, caveats.tuning([(found.model, behaviour)]), caveats.readout([found.model]))
    return [
        Paragraph(sentence(found), strong=True),
        Paragraph(_instrument(found.ability), note=True),
        *([Paragraph(power)] if power else []),
        *([Bullets([bias], warning=True)] if bias else []),
        Heading("Is the contrast needed?"),
        contrast_table(found),
        *(block for budget, measured in found.equal_kl.items() for block in (
            Heading(f"At equal KL, {budget} nats"),
            effects_table(measured, METHODS, base, behaviour, noun, _joined(_equal_caption(budget), *cautions)),
        )),
        Heading("At each method's own strength"),
        effects_table(own, METHODS, base, behaviour, noun, _joined(
            "Directions at alpha +1 and -1, activation steering at the strength that was chosen on the dev split. "
            "Prompts have no strength.", *cautions,
        )),
        Heading("Behaviour against capability"),
        Figure(folder / "pareto.png", "effect on the behaviour against the NLL of neutral text", pareto.CAPTION),
        Heading("Side effects at own strength"),
        costs_table(own, base, "Every method at its own strength."),
        Heading(f"Side effects at equal KL, {found.headline_budget} nats"),
        costs_table(found.equal_kl[found.headline_budget], base, "A star marks a search that missed the budget."),
        Heading("Controls at own strength"),
        controls_table(own, behaviour, noun),
        Heading(f"Controls at equal KL, {found.headline_budget} nats"),
        Paragraph(null_sentence(found)),
        controls_table(found.equal_kl[found.headline_budget], behaviour, noun),
        Heading("Parts of the mean changes"),
        *(table for probe in PROBES if (table := parts_table(own.entries, probe, behaviour, noun)) is not None),
        Heading(f"{noun.removesuffix('s').capitalize()} answers that flip"),
        answers_table(own.entries),
        Paragraph(
            "The tables have many lines, so a few intervals miss the true value by chance: do not rely on a single "
            "line close to the border of its band. Runs that share a training seed or a data seed are not quite "
            "independent, so intervals over seeds are rather too narrow if there are few of either.",
            note=True,
        ),
        Paragraph(_time(found.seconds), note=True),
    ]  # fmt: skip


def _instrument(ability: Ability) -> str:
    measured = {"choice": "the log-ratio of the two answers", "replies": "the log-ratio of two opposite replies"}
    return (
        f"The behaviour is measured by {measured[ability.instrument]}: {ability.reason}. This was decided on the "
        "unedited model, before any method was scored."
    )


def _joined(*sentences: str) -> str:
    return " ".join(text for text in sentences if text)


def _equal_caption(budget: str) -> str:
    return (
        f"Every direction, and every random control, at the strength with the same KL to the base: {budget} nats per "
        "token, the 95th percentile along its own replies to neutral requests. The strength is searched for every "
        "replicate and sign; alpha and p95 KL are means over replicates. A star marks a sign at which a search missed "
        "the budget. Prompts have no strength; they are shown with their own KL."
    )


def _time(seconds: Mapping[str, float]) -> str:
    parts = ", ".join(f"{name} {_span(value)}" for name, value in seconds.items() if name != "total")
    return f"Wall-clock time of the measurement: {_span(seconds['total'])} ({parts})."


def _span(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"


def _write_csv(path: Path, found: Findings) -> None:
    costs = ("pmass", "facts", "kl", "kl_p95", "kl_max", "nll_delta", "true_claims", "distinct3", "reply_tokens",
             "json")  # fmt: skip
    effects = [f"{probe}{part}" for probe in ("own", "dd") for part in ("", "_low", "_high", "_p")]
    tables = {"own": found.own_strength, **found.equal_kl}
    with atomic_file(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as handle:
        writer = csv.writer(handle)
        writer.writerow(["strength", "method", "kind", "sign", "alpha", *effects, "reached_p95", "converged", *costs])
        for strength, measured in tables.items():
            for entry, sign, side in shown(measured.entries):
                values = [value for effect in map(side.effect, PROBES)
                          for value in (effect.mean, effect.low, effect.high, effect.p)]  # fmt: skip
                reached = (side.spent.p95, side.spent.converged) if side.spent else (None, None)
                writer.writerow([
                    strength, entry.name, entry.kind, sign, side.alpha, *values, *reached,
                    *(value.mean if isinstance(value := getattr(side, name), Estimate) else value for name in costs),
                ])  # fmt: skip
