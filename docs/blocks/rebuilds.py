"""The block of embedded models that were built again with another seed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from blocks.table import table
from ws.model import library
from ws.pocket import build, card


def rebuilds(kept: Sequence[dict[str, Any]]) -> str:
    """Builds with other seeds: a sentence each, then their metrics and those of the shipped weights."""
    if not kept:
        return "No rebuild has been made."
    return "\n\n".join([*(f"- {rebuild_told(one)}" for one in kept), *(rebuild_table(one) for one in kept)])


def rebuild_told(kept: dict[str, Any]) -> str:
    """How many thresholds a rebuild passes and misses, and what differs from the shipped weights except the seed."""
    recipe, (name, folder) = kept["recipe"], shipped_of(kept)
    shipped = build.recorded(folder)
    judged = [entry for entry in kept["metrics"] if entry["bar"]]
    missed = [
        f"{entry['metric']} ({entry['value']:.3f}, threshold {entry['bar']})" for entry in judged if not entry["passes"]
    ]
    other = other_than_shipped(kept)
    texts = kept.get("texts")
    if texts is not None and texts != shipped["corpus"].get("texts"):
        other.append("texts")
    made = (f"a recipe that differs in {', '.join(other)}" if other else "the recipe of the shipped weights") + (
        " (whether the texts were the same is not recorded)" if texts is None else ""
    )
    misses = f"; missed: {'; '.join(missed)}" if missed else ""
    return (
        f"{name} ({recipe['architecture']}), seed {recipe['seed']}, {made}, {kept['minutes']:g} minutes: "
        f"{len(judged) - len(missed)} of {len(judged)} thresholds passed{misses}."
    )


def other_than_shipped(kept: dict[str, Any]) -> list[str]:
    """The parts of a rebuild's recipe, except the seed, that differ from the shipped weights."""
    recipe, shipped = kept["recipe"], build.recorded(shipped_of(kept)[1])["recipe"]
    return sorted(key for key in recipe if key != "seed" and recipe[key] != shipped.get(key))


def rebuild_table(kept: dict[str, Any]) -> str:
    """All metrics of a rebuild and of the shipped weights; a dash if one has not been measured."""
    name, folder = shipped_of(kept)
    shipped, again = (
        {entry["metric"]: entry for entry in metrics}
        for metrics in (json.loads((folder / card.METRICS_FILE).read_text()), kept["metrics"])
    )
    rows = []
    for metric in dict.fromkeys([*shipped, *again]):
        values = ["-" if metric not in found else f"{found[metric]['value']:.3f}" for found in (shipped, again)]
        entry = again.get(metric, {"bar": "", "passes": True})
        rows.append([metric, *values, entry["bar"], card.verdict(entry["bar"], entry["passes"])])
    other = other_than_shipped(kept)
    again_is = f"seed {kept['recipe']['seed']}" + (f", other {', '.join(other)}" if other else "")
    return table(["metric", f"{name}, shipped", again_is, "threshold", ""], rows)


def shipped_of(kept: dict[str, Any]) -> tuple[str, Path]:
    """Name and folder of the shipped model with the architecture of a rebuild."""
    return next(item for item in library.POCKET_MODELS.items() if item[1].name == kept["recipe"]["architecture"])
