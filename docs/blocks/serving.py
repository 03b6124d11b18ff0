"""The block on the throughput of servers, from the records that `benchmarks/serving.py` stores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from blocks.table import table

WAYS = {"mixed": "64 at once, 8 strengths", "base": "64 at once, no strengths", "alone": "one at a time, 8 strengths"}


def serving(stored: Sequence[Mapping[str, Any]], waits: Sequence[Mapping[str, Any]] = ()) -> str:
    """Tokens per second of every server and way, the ratios that matter, and the waits for a first token."""
    if not stored:
        return "Not measured yet."
    lines, notes = [], []
    for model in dict.fromkeys(row["model"] for row in stored):
        speeds = {(row["server"], row["way"]): row for row in stored if row["model"] == model}
        servers = list(dict.fromkeys(server for server, _ in speeds))
        for way, told in WAYS.items():
            rows = [speeds[server, way] for server in servers]
            lines.append(
                [model, told, *(f"{r['tokens_per_second']:.0f} ({r['least']:.0f}-{r['most']:.0f})" for r in rows)]
            )
        per_second = {key: row["tokens_per_second"] for key, row in speeds.items()}
        mixed, alone = per_second["ws", "mixed"], per_second["ws", "alone"]
        notes.append(
            f"- {model}: mixed strengths run at {mixed / per_second['ws', 'base']:.2f} of the speed without strengths, "
            f"{mixed / alone:.1f} times as fast as one at a time, and {mixed / per_second['llama.cpp', 'mixed']:.1f} "
            "times as fast as llama.cpp's server on the same requests. One at a time, llama.cpp is "
            f"{per_second['llama.cpp', 'alone'] / alone:.1f} times as fast."
        )
    notes += [
        f"- {one['model']}: both answers to a new question, base and steered, begin after {one['median']:.2f} s "
        f"(median of {one['questions']}; most {one['most']:.2f} s)."
        for one in waits
    ]
    threads, tokens = stored[0]["threads"], stored[0]["tokens"] // stored[0]["requests"]
    head = ["model", "tokens per second", "ws serve", "llama.cpp"]
    note = (
        f"Medians of rounds in turn, with their range; {tokens} tokens per answer, fp32, {threads} thread per server, "
        "on a machine that did other work too: only ratios mean something."
    )
    return "\n".join([table(head, lines), "", *notes, "", note])
