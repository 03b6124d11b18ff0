"""Blocks about where a direction lives: bases, and causal ablations."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from blocks.table import table
from ws.report.cells import with_limits
from ws.subspace import ranking

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
    """What the first study found about activations, in plain words for the first page."""
    for one in stored:
        told = []
        for family in dict.fromkeys(row["family"] for row in one["summary"]):
            rows = [row for row in one["summary"] if (row["family"], row["metric"]) == (family, "block")
                    and ranking.is_candidate(row["basis"])]  # fmt: skip
            best = max(rows, key=lambda row: row["percent"] - row["null_percent"])
            told.append(f"{best['percent']:.0f} % ({family}; random subspaces: {best['null_percent']:.1f} %)")
        return (
            f"Does a small subspace hold what a {one['behaviour']} direction changes in the residual stream of "
            f"{one['model']}? Of {len(rows)} subspaces that need no trained direction, the best holds "
            f"{' and '.join(told)} of what the best possible {one['rank']} dimensions hold."
        )
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


PLACES = ("early", "middle", "late", "attention", "mlp")
"""Parts of the lenses `layers` and `modules` that are shown: thirds of the touched layers, and kinds of modules."""


def places(stored: Iterable[Mapping[str, Any]]) -> str:
    """Shares of the effect that thirds of the layers, attention and MLP keep, on the behaviour's own probe."""
    rows = []
    for one in stored:
        own = [line for line in one["summary"] if line["part"] in PLACES and line["probe"] != "dilemmas"]
        for family in one["families"]:
            for part in PLACES:
                by_operation = {line["operation"]: line for line in own
                                if (line["family"], line["part"]) == (family, part)}  # fmt: skip
                if "keep" in by_operation and by_operation["keep"]["unavailable"] is None:
                    kept = by_operation["keep"]
                    rows.append([
                        one["model"], family, part, str(kept["seeds"]), f"{kept['energy']:.0%}",
                        *(_share(by_operation.get(name), "retained") for name in ("keep", "random", "matched", "drop")),
                    ])  # fmt: skip
    head = ["model", "adapter", "part", "seeds", "share of the squared norm", "part alone", "random of that size",
            "part at the norm of the whole", "the rest"]  # fmt: skip
    note = "Shares of the effect of the whole direction on the behaviour's own probe, 95 % t intervals over seeds."
    return f"{table(head, rows)}\n\n{note}"


def of_writes(stored: Iterable[Mapping[str, Any]], model: str) -> str:
    """The original's projection row: shares of the effect of the residual writes at the largest K; empty if unknown."""
    said = []
    for one in (one for one in stored if one["model"] == model):
        lines = [line for line in one["summary"] if line["lens"] == "projection" and line.get("of_writes") is not None]
        last = lines[-1]["part"] if lines else ""
        for family in one["families"]:
            for probe in dict.fromkeys(line["probe"] for line in lines):
                kept = {line["operation"]: _share(line, "of_writes") for line in lines
                        if (line["family"], line["part"], line["probe"]) == (family, last, probe)}  # fmt: skip
                shares = " / ".join(kept.get(name, "-") for name in ("keep", "matched", "complement"))
                said += [f"{family}, {probe}: {shares}"] if kept else []
    return "; ".join(said)


def _share(line: Mapping[str, Any] | None, name: str) -> str:
    if line is None or line[name] is None:
        return "-"
    low, high = line[f"{name}_low"], line[f"{name}_high"]
    return f"{line[name]:.2f}" + ("" if low is None else f" [{low:.2f}, {high:.2f}]")


def _mean(line: Mapping[str, Any] | None) -> str:
    return "-" if line is None or line["mean"] is None else with_limits(line)


def _seeds(seeds: Iterable[int]) -> str:
    counted = len(list(seeds))
    return "one training seed" if counted == 1 else f"{counted} training seeds"
