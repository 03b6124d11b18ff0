"""A user's own choice probe, one JSON object per line.

    {"prompt": "Your friend asks if you like the gift. Do you tell the truth?", "label": 1, "cluster": "gift"}

`label` is +1 where the first answer counts as positive and -1 where the second does. Optional: `cluster` (rows that
belong together in intervals; default: each row is its own), `group` (reported apart), `row` (an id), `anchor`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ws.base.errors import UserError
from ws.measure.probe import Probe, ProbeRow
from ws.model.chat import ask

ANCHOR = "My answer: **"
KNOWN = {"prompt", "label", "cluster", "group", "row", "anchor"}


def read(
    path: Path, *, answers: tuple[str, str] = ("Yes", "No"), anchor: str = ANCHOR, limit: int | None = None
) -> Probe:
    """The probe in a JSONL file, named after it; errors name the line."""
    if not path.is_file():
        raise UserError(f"there is no probe file {path}", "Give a JSONL file with prompt and label per line.")
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if line.strip():
            rows.append(_row(f"{path}:{number}", number, _parsed(f"{path}:{number}", line), anchor))
    if not rows:
        raise UserError(f"{path} has no rows", "Give one JSON object with prompt and label per line.")
    return Probe(path.stem, "choice", tuple(rows[:limit]), answers)


def _parsed(where: str, line: str) -> dict[str, Any]:
    try:
        entry = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{where} is no JSON ({error.msg})", "Write one object per line.") from error
    if not isinstance(entry, dict):
        raise UserError(f"{where} is no JSON object", 'Write {"prompt": ..., "label": 1}.')
    return entry


def _row(where: str, number: int, entry: dict[str, Any], anchor: str) -> ProbeRow:
    if unknown := sorted(entry.keys() - KNOWN):
        raise UserError(f"{where} has the unknown key {unknown[0]!r}", f"Known: {', '.join(sorted(KNOWN))}.")
    prompt, label = entry.get("prompt"), entry.get("label")
    if not isinstance(prompt, str) or not prompt.strip():
        raise UserError(f"{where} has no prompt", "Give prompt as a text.")
    if label not in (1, -1):
        raise UserError(f"{where}: label is {label!r}", "It is 1 (first answer is positive) or -1.")
    name = str(entry.get("row", number))
    return ProbeRow(
        name, tuple(ask(prompt)), str(entry.get("anchor", anchor)), str(entry.get("cluster", name)),
        str(entry.get("group", "all")), int(label),
    )  # fmt: skip
