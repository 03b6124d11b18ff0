"""The pages of a comparison: its headline, Markdown and HTML, `comparison.json` and `.csv`.

Everything is made from `Findings`; this module adds only the wording.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ws.base.records import plain
from ws.base.store import atomic_file, write_json, write_text
from ws.comparing import caveats, pareto
from ws.comparing.findings import (
    KINDS,
    METHODS,
    NOT_SEPARABLE,
    PROBES,
    SIGNS,
    Entry,
    Findings,
    Side,
    Strengths,
    control_bands,
    control_means,
    mostly_yes_bias,
    shown,
)
from ws.comparing.tables import answers_table, controls_table, costs_table, effects_table, parts_table
from ws.eval import instrument
from ws.eval.ability import Ability
from ws.report import document
from ws.report.document import Block, Bullets, Figure, Heading, Paragraph


def headline(found: Findings) -> str:
    """How far the best method of each kind moves the behaviour, with the interval over training seeds first.

    An effect that is not separable from random directions gets this verdict instead; mostly Yes-bias is added to it.
    """
    by_name = {entry.name: entry for entry in found.own_strength}
    parts = []
    for kind, label in KINDS.items():
        if kind in found.best:
            entry = by_name[found.best[kind]]
            parts.append(f"{label} ({entry.name}) " + ", ".join(f"{_moved(entry.sides[s])} at {s}" for s in SIGNS))
        elif any(entry.kind == kind for entry in found.own_strength):
            parts.append(f"{label}: no method keeps its answer mass at both signs")
    chosen = "the best of each kind was chosen on the dev split and is measured on the test split"
    by_replies = found.ability is not None and found.ability.instrument == "replies"
    measured = f"{found.behaviour} ({instrument.REPLY_LEVEL})" if by_replies else found.behaviour
    return f"{measured}, change against the base in nats: {'; '.join(parts)}; {chosen}"


def _moved(side: Side) -> str:
    own, verdict = side.own, side.verdict("own")
    if verdict == NOT_SEPARABLE:
        return verdict
    intervals = [f"over {len(own.seeds)} training seeds [{own.over_seeds.limits}]"] if own.over_seeds else []
    intervals += [f"over rows [{own.limits}]"] if own.low is not None else []
    notes = [*([f"95 % {', '.join(intervals)}"] if intervals else []), *([verdict] if verdict else [])]
    return f"{own.mean:+.2f}" + (f" ({'; '.join(notes)})" if notes else "")


def yes_bias_sentence(entries: Sequence[Entry], behaviour: str, dilemma_noun: str = "dilemmas") -> str | None:
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
    own = found.own_strength
    return {
        "headline": headline(found), **plain(found),
        "controls": plain(control_means(own)), "base_facts": found.base.facts,
        "bands": plain({"own_strength": control_bands(own), "equal_kl": control_bands(found.equal_kl)}),
        "yes_bias": [line.name for line in mostly_yes_bias(own, "dilemmas")],
        "own_yes_bias": [line.name for line in mostly_yes_bias(own, "own")],
    }  # fmt: skip


def write(folder: Path, found: Findings) -> None:
    """Write `comparison.json`, `.csv`, `.md`, `.html` and `pareto.png`."""
    write_json(folder / "comparison.json", as_json(found))
    _write_csv(folder / "comparison.csv", found)
    pareto.draw(found.own_strength, found.equal_kl, found.base.facts, found.behaviour, folder / "pareto.png")
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
    own, equal, base, behaviour = found.own_strength, found.equal_kl, found.base, found.behaviour
    bias = yes_bias_sentence(own, behaviour, found.dilemma_noun)
    source = "" if found.dilemmas == "own" else f"{found.dilemma_noun.capitalize()}: {found.dilemmas}."
    tuned, readout = caveats.tuning([(found.model, behaviour)]), caveats.readout([found.model])
    return [
        Paragraph(sentence(found), strong=True),
        *([Paragraph(_instrument(found.ability), note=True)] if found.ability else []),
        *([Bullets([bias], warning=True)] if bias else []),
        Heading("Adapters"),
        effects_table(own, ("weights", "variants"), base, behaviour, _joined("At alpha +1 and -1.", source, tuned)),
        Heading("Baselines and weight steering"),
        effects_table(
            own, METHODS, base, behaviour,
            _joined(
                "Every method at its own strength: directions at alpha +1 and -1, activation steering at the strength "
                "that was chosen on the dev split. Prompts have no strength.", source, tuned, readout,
            ),
        ),
        Heading("Side effects"),
        costs_table(own, base, "Every method at its own strength."),
        Heading("At equal divergence"),
        effects_table(
            equal, METHODS, base, behaviour, _joined(_equal_caption(found.calibration), source, tuned, readout)
        ),
        Heading("Side effects at equal divergence"),
        costs_table(equal, base, "A star marks a sign at which a search for the strength missed the budget."),
        Heading("Effect against facts lost"),
        Figure(folder / "pareto.png", "effect on the behaviour against facts lost", pareto.CAPTION),
        Heading("Controls"),
        controls_table(own, behaviour, found.dilemma_noun),
        Heading("Parts of the mean changes"),
        *(table for probe in PROBES if (table := parts_table(own, probe, behaviour, found.dilemma_noun)) is not None),
        Heading(f"{found.dilemma_noun.removesuffix('s').capitalize()} answers that flip"),
        answers_table(own),
        Paragraph(
            "Intervals in brackets are 95 % intervals over rows, drawn by whole clusters. They do not say how another "
            "training would come out. For that, read the column seeds: it has the value of every training seed and a "
            "95 % t interval over them. An effect counts as separable from random directions only if both intervals "
            "are outside their band. The tables have many lines, so a few intervals miss the true value by chance: do "
            "not rely on a single line close to the border of the band.",
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


def _equal_caption(found: Strengths) -> str:
    source = f"the KL of {found.anchor}" if found.anchor else "as given"
    return (
        f"Every direction at the strength with the same KL to the base: {found.target:.2f} nats per token ({source}), "
        "the 95th percentile along its own replies to neutral requests. The strength is searched for every training "
        "seed and sign; alpha and p95 KL are means over seeds. A star marks a sign at which a search missed the "
        "budget. Prompts have no strength; they are shown with their own KL. Random directions have the norm of "
        f"{found.reference} and are shown at its strength, not at equal KL."
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
    with atomic_file(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as handle:
        writer = csv.writer(handle)
        writer.writerow(["strength", "method", "kind", "sign", "alpha", *effects, "reached_p95", "converged", *costs])
        for strength, entries in (("own", found.own_strength), ("equal_kl", found.equal_kl)):
            for entry, sign, side in shown(entries):
                values = [value for effect in map(side.effect, PROBES)
                          for value in (effect.mean, effect.low, effect.high, effect.p)]  # fmt: skip
                reached = (side.spent.p95, side.spent.converged) if side.spent else (None, None)
                writer.writerow([
                    strength, entry.name, entry.kind, sign, side.alpha, *values, *reached,
                    *(getattr(side, name) for name in costs),
                ])  # fmt: skip
