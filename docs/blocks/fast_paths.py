"""The block that says what every fast path gains, from the ratios that `benchmarks/fast_paths.py` stores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from blocks.table import table

WORTH = 1.2
"""A fast path that stays below this ratio for all work and sizes does not pay."""

REMOVED = frozenset({
    "thin side path in half precision", "lean norms", "norms in one compiled kernel",
    "last feed-forward where it is read",
})  # fmt: skip
"""Paths that did not pay. The code does not have them any more."""


def fast_paths(stored: Sequence[Mapping[str, Any]]) -> str:
    """One line per path: the ratio of CPU seconds without and with it, by size and work."""
    if not stored:
        return "Not measured yet."
    sizes = list(dict.fromkeys(row["size"] for row in stored))
    lines = []
    for path in dict.fromkeys(row["path"] for row in stored):
        rows = [row for row in stored if row["path"] == path]
        cells = [
            ", ".join(f"{row['work']} {row['ratio']:.2f}" for row in rows if row["size"] == size) or "-"
            for size in sizes
        ]
        best = max(row["ratio"] for row in rows)
        lines.append([f"{path} (removed)" if path in REMOVED else path, *cells, f"{best:.2f}"])
    lines.sort(key=lambda line: -float(line[-1]))
    kept = sum(float(line[-1]) >= WORTH for line in lines)
    note = f"{kept} of {len(lines)} paths reach {WORTH} for some work and size."
    return f"{table(['path', *sizes, 'best'], lines)}\n\n{note}"
