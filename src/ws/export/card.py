"""The model card that goes with an exported Direction: its effects, its cost and its origin."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ws.algebra.direction import Direction
from ws.base import console
from ws.base.files import write_text
from ws.export.target import CARD_MARK
from ws.report.cells import signed
from ws.report.findings import Summary

_LOADING = {
    "peft": (
        "```python\nfrom peft import PeftModel\nfrom transformers import AutoModelForCausalLM\n\n"
        'model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("{base}"), "{place}")\n```'
    ),
    "merged": (
        "```python\nfrom transformers import AutoModelForCausalLM\n\n"
        'model = AutoModelForCausalLM.from_pretrained("{place}")\n```'
    ),
    "gguf-lora": "```\nllama-cli -m {file} --lora {place}\n```\nAnother strength: `--lora-scaled {place}:0.5`.",
    "gguf": "```\nllama-cli -m {place}\n```",
}


def write_card(
    path: Path,
    direction: Direction,
    record: Mapping[str, Any],
    *,
    base: str,
    place: str,
    base_file: Path | None = None,
    summary: Summary | None = None,
) -> None:
    """Write a Markdown card.

    base_file: the GGUF file of the base, if it is one. summary: the summary of the direction's run, if there is one.
    """
    write_text(path, card(direction, record, base=base, place=place, base_file=base_file, summary=summary))


def card(
    direction: Direction,
    record: Mapping[str, Any],
    *,
    base: str,
    place: str,
    base_file: Path | None = None,
    summary: Summary | None = None,
) -> str:
    """The card as Markdown."""
    source = dict(direction.provenance)
    behaviour = source.get("behaviour", {})
    name = behaviour.get("name", "a direction")
    folder = base if base_file is None else "BASE_FOLDER"
    lines = [
        "---",
        f"base_model: {base}",
        CARD_MARK,
        "---",
        "",
        f"# {name} at alpha {record['alpha']:+g}",
        "",
        f"A weight direction `dW = theta_pos - theta_neg` of `{base}`, exported as {record['format']}. "
        + (f"Positive strength: the model {behaviour['positive_means']}." if "positive_means" in behaviour else ""),
        "",
        _exactness(record),
        "",
        "## Load it",
        "",
        *_of_gguf(record["format"], base, base_file),
        _LOADING[record["format"]].format(base=folder, place=place, file=base_file.name if base_file else "base.gguf"),
        "",
        *(_evidence(summary) if summary else ["This direction has no evaluation.", ""]),
        "## Origin",
        "",
        f"- base fingerprint `{direction.base}`, layers {direction.layer_numbers}",
        *_provenance(source),
        "",
        "Method: Fierro and Roger, Steering Language Models with Weight Arithmetic, arXiv 2511.05408.",
    ]
    return "\n".join(lines) + "\n"


def _of_gguf(kind: str, base: str, base_file: Path | None) -> list[str]:
    """How a base that is a GGUF file becomes the folder that PEFT needs."""
    if base_file is None or kind != "peft":
        return []
    return [f"The base is a GGUF file. Make a folder of it first: `{console.command('convert', base, 'BASE_FOLDER')}`",
            ""]  # fmt: skip


def _exactness(record: Mapping[str, Any]) -> str:
    if record.get("exact", True):
        text = "The export is exact up to rounding."
    else:
        text = (
            f"The update is not low-rank: it was cut to rank {record.get('rank', 'as given')} and keeps "
            f"{100 * record['energy_kept']:.2f} % of its squared norm."
        )
    if "logit_error" in record:
        error = record["logit_error"]
        text += (
            f" Measured against the exact direction on {error['positions']} token positions: largest logit "
            f"difference {error['max']:.2g}, KL {error['kl']:.2g} nats."
        )
    return text


def _evidence(summary: Summary) -> list[str]:
    costs = summary.numbers.side_effects
    rows = [
        f"| {signed(key)} | {level.text} | {summary.dilemmas[key].text} "
        f"| {100 * costs[key].facts:.1f} % | {costs[key].kl:.3f} |"
        for key, level in summary.own.items()
    ]
    return [
        "## What it does",
        "",
        f"Held-out probes, log-ratios in nats with 95 % intervals (n = {summary.own['0'].n} and "
        f"{summary.dilemmas['0'].n} rows, training seed {summary.seed}).",
        "",
        f"| alpha | {summary.behaviour} | {summary.numbers.dilemma_counts.noun}, honest side | facts right | KL |",
        "|---|---|---|---|---|",
        *rows,
        "",
        *(f"- {warning}" for warning in summary.warnings),
        *([""] if summary.warnings else []),
    ]


def _provenance(source: Mapping[str, Any]) -> list[str]:
    base = source.get("base", {})
    training = source.get("training", {})
    adapter = training.get("adapter", {})
    known = {
        "base model": base.get("name"),
        "revision": base.get("revision"),
        "family": adapter.get("family"),
        "rank": adapter.get("rank"),
        "learning rate": training.get("lr"),
        "training seed": source.get("seed"),
        "data seed": source.get("data_seed"),
        "data": source.get("data"),
        "made with": source.get("tool"),
    }
    return [f"- {label}: {value}" for label, value in known.items() if value is not None]
