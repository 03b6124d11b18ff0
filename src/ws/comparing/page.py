"""The pages of a comparison: its sentence, Markdown and HTML, `comparison.json` and `.csv`; one page over several.

Everything is made from the entries of `comparison.measure`; nothing is computed here but the wording.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ws.base.store import atomic_file, write_json, write_text
from ws.comparing import pareto
from ws.comparing.numbers import DECOMPOSED, METHODS, SIGNS, control_band, control_means, mostly_yes_bias
from ws.comparing.tables import (
    Entry,
    answers_table,
    controls_table,
    costs_table,
    effects_table,
    parts_table,
    verdict,
)
from ws.report import document
from ws.report.cells import limits, with_limits
from ws.report.document import Block, Bullets, Figure, Heading, Paragraph, Table

KINDS = {"weights": "weight directions", "activations": "activation steering", "prompts": "prompts"}
"""Kinds that the headline sets side by side."""


@dataclass(frozen=True)
class Findings:
    """A measured comparison: entries at own strength and at equal divergence, levels of the base, and what was chosen.

    `best` names per kind the method that the headline shows, chosen on the dev split; `dilemmas` is the source of the
    dilemmas; `seconds` are wall-clock seconds by phase, `total` among them.
    """

    behaviour: str
    own_strength: Sequence[Entry]
    equal_kl: Sequence[Entry]
    base: Mapping[str, Any]
    best: Mapping[str, str]
    calibration: Mapping[str, Any]
    dilemmas: str
    seconds: Mapping[str, float]


def headline(entries: Sequence[Entry], behaviour: str, best: Mapping[str, str]) -> str:
    """How far the chosen method of each kind moves the behaviour; `no effect` where controls reach as far.

    Where the change is mostly one towards Yes, that is said behind it: it is no change of the behaviour.
    """
    by_name = {entry["name"]: entry for entry in entries}
    parts = []
    for kind, label in KINDS.items():
        if kind in best:
            entry = by_name[best[kind]]
            moved = ", ".join(f"{_moved(entry[sign])} at {sign}" for sign in SIGNS)
            seeds = len(entry["+"]["own"]["seeds"])
            parts.append(f"{label} ({entry['name']}{f', {seeds} seeds' if seeds > 1 else ''}) {moved}")
        elif any(entry["kind"] == kind for entry in entries):
            parts.append(f"{label}: none keeps its answer mass at both signs")
    chosen = "the best of each kind was chosen on the dev split and is measured on the test split"
    return f"{behaviour}, change against the base in nats: {'; '.join(parts)}; {chosen}"


def _moved(side: Mapping[str, Any]) -> str:
    own = side["own"]
    return "no effect" if own["outside"] is False else with_limits(own) + verdict(side, "own")


def yes_bias_sentence(entries: Sequence[Entry], behaviour: str) -> str | None:
    """Which methods mostly make the model say Yes, a sentence per probe; None where none does."""
    sentences = []
    probes = {"own": (f"the {behaviour} probe", behaviour), "dilemmas": ("the dilemmas", "honesty")}
    for probe, (name, right) in probes.items():
        found = mostly_yes_bias(entries, probe)
        listed = "; ".join(f"{method} (Yes {p['bias']:+.2f}, {right} {p['truth']:+.2f})" for method, p in found)
        if found:
            sentences.append(
                f"Mostly Yes-bias on {name}, towards one answer rather than towards or away from {right}: {listed}."
            )
    return " ".join(sentences) or None


# -------------------------------------------------------------------- writing


def write(folder: Path, title: str, found: Findings) -> str:
    """Write `comparison.json`, `.csv`, `.md`, `.html` and `pareto.png`; returns the headline."""
    sentence = headline(found.own_strength, found.behaviour, found.best)
    write_json(folder / "comparison.json", _finite({
        "headline": sentence, "behaviour": found.behaviour, "best": dict(found.best), "base": dict(found.base),
        "own_strength": found.own_strength, "equal_kl": found.equal_kl, "calibration": dict(found.calibration),
        "controls": control_means(found.own_strength), "base_facts": found.base["facts"],
        "bands": {"own_strength": _bands(found.own_strength), "equal_kl": _bands(found.equal_kl)},
        "yes_bias": [name for name, _ in mostly_yes_bias(found.own_strength, "dilemmas")],
        "own_yes_bias": [name for name, _ in mostly_yes_bias(found.own_strength, "own")], "dilemmas": found.dilemmas,
        "seconds": dict(found.seconds),
    }))  # fmt: skip
    _write_csv(folder / "comparison.csv", found)
    pareto.draw(found.own_strength, found.equal_kl, found.base["facts"], found.behaviour, folder / "pareto.png")
    blocks = _blocks(found, folder, sentence)
    write_text(folder / "comparison.md", document.to_markdown(title, blocks))
    write_text(folder / "comparison.html", document.to_html(title, "identical test rows for all methods", blocks))
    return sentence


def _bands(entries: Sequence[Entry]) -> dict[str, Any]:
    return {sign: {probe: control_band(entries, sign, probe) for probe in ("own", "dilemmas")} for sign in SIGNS}


def _blocks(found: Findings, folder: Path, sentence: str) -> list[Block]:
    own, behaviour = found.own_strength, found.behaviour
    bias = yes_bias_sentence(own, behaviour)
    source = "" if found.dilemmas == "own" else f" Dilemmas: {found.dilemmas}."
    return [
        Paragraph(sentence[0].upper() + sentence[1:] + ".", strong=True),
        *([Bullets([bias], warning=True)] if bias else []),
        Heading("Adapters"),
        effects_table(own, ("weights", "variants"), found.base, behaviour, f"At alpha +1 and -1.{source}"),
        Heading("Baselines and weight steering"),
        effects_table(
            own, METHODS, found.base, behaviour,
            "At each method's own strength: alpha +1 and -1, activation steering at the strength chosen on the dev "
            f"split, prompts as they are.{source}",
        ),
        Heading("What it cost"),
        costs_table(own, found.base, "At own strength."),
        Heading("At equal divergence"),
        effects_table(found.equal_kl, METHODS, found.base, behaviour, _equal_caption(found.calibration)),
        Heading("What it cost at equal divergence"),
        costs_table(found.equal_kl, found.base, "A search that missed the budget is marked *."),
        Heading("What moved and what it cost"),
        Figure(folder / "pareto.png", "behaviour moved against facts kept", pareto.CAPTION),
        Heading("Controls"),
        controls_table(own, behaviour),
        Heading("What a mean hides"),
        *(table for probe in DECOMPOSED if (table := parts_table(own, probe, behaviour)) is not None),
        Heading("Answers that turn"),
        answers_table(own),
        Paragraph(
            "Brackets are 95 % intervals over clusters of rows. Uncertainty over training seeds is another question: "
            "seeds are listed one by one, with a 95 % t interval over them, which must clear the band of random "
            "directions too. With this many lines a few intervals miss their truth by chance: single lines near the "
            "border of the band prove nothing.",
            note=True,
        ),
        Paragraph(_time(found.seconds), note=True),
    ]  # fmt: skip


def _equal_caption(calibration: Mapping[str, Any]) -> str:
    source = f"what {calibration['anchor']} spends" if calibration.get("anchor") else "as given"
    reference = calibration.get("reference") or "the first direction"
    return (
        f"Strengths at which the 95th percentile of KL along a method's own replies to neutral requests is "
        f"{calibration['target']:.2f} nats per token ({source}). Every training seed and sign was searched by itself; "
        "alpha and the p95 KL that was reached are means over seeds, * marks a sign at which a search missed the "
        "budget. Prompts have no strength: they stand as they are, with the KL that they spend. Random directions "
        f"stand at the strength of {reference}, whose norm they have, and not at equal KL."
    )


def _time(seconds: Mapping[str, float]) -> str:
    parts = ", ".join(f"{name} {_span(value)}" for name, value in seconds.items() if name != "total")
    return f"Wall-clock time of the call that measured this: {_span(seconds['total'])} ({parts})."


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
            for entry in entries:
                for sign in SIGNS:
                    if sign in entry:
                        side, spent = entry[sign], entry[sign]["spent"] or {}
                        values = [side[probe][part] for probe in ("own", "dilemmas")
                                  for part in ("mean", "low", "high", "p")]  # fmt: skip
                        writer.writerow([
                            strength, entry["name"], entry["kind"], sign, side["alpha"], *values, spent.get("p95"),
                            spent.get("converged"), *(side[name] for name in costs),
                        ])  # fmt: skip


def _finite(value: Any) -> Any:
    """The same content with None for what is no number, which JSON cannot hold."""
    if isinstance(value, Mapping):
        return {name: _finite(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# -------------------------------------------------------------------- several comparisons


class Compared(NamedTuple):
    """A finished comparison: what was compared, and its summary."""

    model: str
    behaviour: str
    summary: Mapping[str, Any]


def write_across(path: Path, found: Sequence[Compared]) -> None:
    """Write one table over models and behaviours as `path` (HTML) and its Markdown twin: does it survive another one?

    Every weight direction, and the chosen activation and prompt of each comparison, at own strength.
    """
    rows = []
    for one in found:
        chosen = [one.summary["best"].get(kind) for kind in ("activations", "prompts")]
        for entry in one.summary["own_strength"]:
            if entry["kind"] not in ("weights", "variants") and entry["name"] not in chosen:
                continue
            cells = [one.model, one.behaviour, entry["name"]]
            for probe in ("own", "dilemmas"):
                for sign in ("-", "+"):
                    effect, spread = entry[sign][probe], entry[sign][probe]["over_seeds"]
                    over_seeds = f"; seeds {limits(spread)}" if spread else ""
                    cells.append(with_limits(effect) + verdict(entry[sign], probe) + over_seeds)
            rows.append([*cells, f"{100 * min(entry[s]['facts'] for s in SIGNS):.1f} %"])
    title = "The same comparison on other models and behaviours"
    blocks: list[Block] = [Table(
        ["model", "behaviour", "method", "own, -", "own, +", "dilemmas, -", "dilemmas, +", "least facts right"], rows,
        "Change against each model's own base, nats. Brackets: 95 % intervals over clusters of rows; seeds: 95 % t "
        "interval over training seeds. Dilemmas: towards the honest answer. Activation steering and prompts: the best "
        "on the dev split.",
    )]  # fmt: skip
    write_text(path, document.to_html(title, "own strength, identical test rows within a comparison", blocks))
    write_text(path.with_suffix(".md"), document.to_markdown(title, blocks))
