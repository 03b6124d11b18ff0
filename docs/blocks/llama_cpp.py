"""The block on exported GGUF files in llama.cpp, from the records that `benchmarks/in_llama_cpp.py` stores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from blocks.table import table

HEAD = ["model", "base file", "scale", "positions", "effect", "KL", "largest gap", "same choice", "lead"]


def llama_cpp(stored: Sequence[Mapping[str, Any]]) -> str:
    """One line per model, base file and strength, and how the strengths compare with strength 0."""
    if not stored:
        return "Not measured yet."
    lines = [
        [
            row["model"], row["base"], f"{row['scale']:g}", str(row["positions"]), f"{row['effect']:.3f}",
            f"{row['kl']:.1g}", f"{row['gap']:.1g}", f"{100 * row['same']:.0f} %", f"{row['lead']:.2f}",
        ]
        for row in stored
    ]  # fmt: skip
    notes = []
    for model, base in dict.fromkeys((row["model"], row["base"]) for row in stored):
        rows = [row for row in stored if (row["model"], row["base"]) == (model, base)]
        plain = next(row for row in rows if row["scale"] == 0)
        edited = [row for row in rows if row["scale"] != 0]
        largest, most = max(row["gap"] for row in edited), max(row["kl"] for row in edited)
        notes.append(
            f"- {model}, {base}: largest gap {largest:.1g} with the LoRA and {plain['gap']:.1g} without; KL at most "
            f"{most:.1g} and {plain['kl']:.1g}."
        )
    split = min(row["same_tokens"] for row in stored)
    tokens = f"Both programs split {100 * split:.0f} % of the everyday questions into the same tokens."
    return "\n".join([table(HEAD, lines), "", *notes, "", tokens])
