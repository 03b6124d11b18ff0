"""The block on the alignment of directions with the weights, from the rows that `ws subspace` writes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import polars as pl

from blocks.table import table
from ws.subspace.alignment import TOP_SHARE, WEAK_SHARE

PARTS = {"top": "top block of W", "bottom": "bottom block of W", "weak": "weak readout"}
"""Part of the weights -> its heading. Rows have `energy_<part>`, and `null_<part>`: the value without structure."""
Rows = Sequence[Mapping[str, Any]]


def alignment(stored: Mapping[str, Rows]) -> str:
    """Mean energies over layers by kind of module, and the expected values of random directions of equal norm."""
    if not stored:
        return "No alignment has been stored."
    lines: list[list[str]] = []
    ratios: dict[str, list[float]] = {part: [] for part in PARTS}
    for run, rows in stored.items():
        frame = pl.DataFrame(rows, infer_schema_length=None)
        means = [pl.mean(f"{kind}_{part}") for part in PARTS for kind in ("energy", "null")]
        kinds = frame.group_by("kind", maintain_order=True).agg(pl.len().alias("n"), *means)
        for part, row in ((part, row) for part in PARTS for row in kinds.to_dicts()):
            if row[f"energy_{part}"] is not None:
                ratios[part].append(row[f"energy_{part}"] / row[f"null_{part}"])
        lines += [[run, row["kind"], str(row["n"]), *(_cell(row, part) for part in PARTS)] for row in kinds.to_dicts()]
    note = (
        "Share of |dW|^2 in a part of the weights, mean over layers. In brackets: the share that a random direction "
        f"has on average, computed from the shapes. Top block: between the largest {100 * TOP_SHARE:g} % of the left "
        "and of the right singular directions of W. Bottom block: between the others. Weak readout: what dW writes "
        f"along the {100 * WEAK_SHARE:g} % of the residual stream that the unembedding reads least; only modules that "
        "write to the residual stream have one."
    )
    ranges = ", ".join(f"{PARTS[part]} {min(seen):.1f} to {max(seen):.1f}" for part, seen in ratios.items() if seen)
    note += f"\n\nShares over those of a random direction, smallest to largest line: {ranges}."
    return f"{table(['direction', 'module', 'matrices', *PARTS.values()], lines)}\n\n{note}"


def _cell(row: Mapping[str, Any], part: str) -> str:
    energy, null = row[f"energy_{part}"], row[f"null_{part}"]
    return "-" if energy is None else f"{100 * energy:.2f} % ({100 * null:.2f} %)"
