"""Blocks of a comparison, of several comparisons, and of a sweep."""

from __future__ import annotations

from ws.comparing import page
from ws.comparing.across import Across
from ws.comparing.findings import Findings
from ws.report import document


def compared(found: Findings) -> str:
    """The replicates of a comparison and its headline."""
    return f"{replicates_told(found)}\n\n> {page.sentence(found)}"


def replicates_told(found: Findings) -> str:
    """Training seeds of the weight directions, and random directions."""
    seeds = {entry.name: len(entry.sides["+"].own.seeds) for entry in found.own_strength if "+" in entry.sides}
    trained = max(seeds[entry.name] for entry in found.own_strength if entry.kind == "weights")
    return f"On {found.model}, training seeds: {trained}, random directions: {seeds['random']}."


def across(found: Across) -> str:
    """The table over several comparisons."""
    return document.to_markdown("", [found.table]).split("\n", 2)[2].strip()
