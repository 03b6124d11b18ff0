"""Blocks about where a direction lives: bases, and causal ablations."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from blocks.table import table
from ws.report.cells import with_limits

BOTH_RATIOS = (("keep", "raw"), ("random", "random of that size"), ("matched", "at the norm of the whole"),
               ("random matched", "random at that norm"), ("complement", "rest"))  # fmt: skip


def told(stored: Iterable[Mapping[str, Any]]) -> str:
    """The findings of every stored study, as the command prints them."""
    parts = []
    for one in stored:
        start = one.get("headline") or f"{one['behaviour']} in {one['model']}, {_seeds(one['seeds'])}:"
        parts += [start[0].upper() + start[1:], "\n".join(f"- {sentence}" for sentence in one["sentences"])]
    return "\n\n".join(parts) or "Not measured yet."


def short(stored: Iterable[Mapping[str, Any]]) -> str:
    """The headline of the first study, for the first page."""
    for one in stored:
        said = str(one["headline"])
        return f"{said[0].upper()}{said[1:]}"
    return "Not measured yet."


def claims(stored: Iterable[Mapping[str, Any]], model: str) -> str:
    """What became of the claim that no basis reaches more than 8 % of the oracle; empty if it was not measured."""
    return " ".join(sentence for one in stored if one["model"] == model for sentence in one["sentences"]
                    if "the replicated work found" in sentence)  # fmt: skip


def projections(stored: Iterable[Mapping[str, Any]]) -> str:
    """Shares of the effect that the projected residual writes keep, by K, on the behaviour's own probe."""
    rows = []
    for one in stored:
        kept = [line for line in one["summary"] if line["lens"] == "projection" and line["probe"] != "dilemmas"]
        for family in one["families"]:
            for part in dict.fromkeys(line["part"] for line in kept if line["family"] == family):
                by_operation = {line["operation"]: line for line in kept
                                if (line["family"], line["part"]) == (family, part)}  # fmt: skip
                rows.append([one["model"], family, part, *(_mean(by_operation.get(name)) for name, _ in BOTH_RATIOS)])
    if not rows:
        return "Not measured yet."
    note = (
        "Change of the behaviour's log-ratio in nats, half of the difference between +1 and -1, when the residual "
        "writes are projected on the first K principal directions of the change of activations."
    )
    return f"{table(['model', 'adapter', 'part', *(head for _, head in BOTH_RATIOS)], rows)}\n\n{note}"


def _mean(line: Mapping[str, Any] | None) -> str:
    return "-" if line is None or line["mean"] is None else with_limits(line)


def _seeds(seeds: Iterable[int]) -> str:
    counted = len(list(seeds))
    return "one training seed" if counted == 1 else f"{counted} training seeds"
