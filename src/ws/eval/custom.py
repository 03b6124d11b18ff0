"""A user's own choice probe, one JSON object per line.

    {"prompt": "Your friend asks if you like the gift. Do you tell the truth?", "label": 1, "cluster": "gift"}

`label` is +1 if the first answer counts as positive and -1 if the second does. Optional: `cluster` (rows that
belong together in intervals; default: each row is its own), `group` (reported separately), `row` (an id), `anchor`.
"""

from __future__ import annotations

from pathlib import Path

from ws.base import user_files
from ws.base.errors import UserError
from ws.base.user_files import Line, given
from ws.measure.probe import Probe, ProbeRow
from ws.model.chat import ask

ANCHOR = "My answer: **"
KNOWN = {"prompt", "label", "cluster", "group", "row", "anchor"}


def read(
    path: Path, *, answers: tuple[str, str] = ("Yes", "No"), anchor: str = ANCHOR, limit: int | None = None
) -> Probe:
    """The probe in a JSONL file, named after it; errors name the line."""
    lines = user_files.json_lines(path, "probe file", "Give a JSONL file whose lines have prompt and label.")
    rows = [_row(line, anchor) for line in lines]
    if not rows:
        raise UserError(f"{path} has no rows", "Give one JSON object with prompt and label per line.")
    return Probe(path.stem, "choice", tuple(rows[:limit]), answers)


def _row(line: Line, anchor: str) -> ProbeRow:
    where, number, entry = line
    if unknown := sorted(entry.keys() - KNOWN):
        raise UserError(f"{where}: unknown key {unknown[0]!r}", f"Known: {', '.join(sorted(KNOWN))}.")
    prompt, label = entry.get("prompt"), entry.get("label")
    if not isinstance(prompt, str) or not prompt.strip():
        raise UserError(f"{where}: prompt is missing, empty or not a text", "Give prompt as a text.")
    if not user_files.is_sign(label):
        raise UserError(f"{where}: label is {label!r}", "Give 1 if the first answer is positive, else -1.")
    for key in sorted(entry.keys() - {"prompt", "label"}):
        if not isinstance(entry[key], str | int) or isinstance(entry[key], bool) or (key, entry[key]) == ("anchor", ""):
            raise UserError(f"{where}: {key} is {entry[key]!r}", "Give a text, or leave the key out.")
    name = str(given(entry, "row", number))
    return ProbeRow(
        name, tuple(ask(prompt)), str(given(entry, "anchor", anchor)), str(given(entry, "cluster", name)),
        str(given(entry, "group", "all")), int(entry["label"]),
    )  # fmt: skip
