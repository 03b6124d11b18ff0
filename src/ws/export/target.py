"""The place of an export: it replaces an older export as a whole, but nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ws.base.errors import UserError
from ws.base.files import read_json, write_json

RECORD_FILE = "weight_steering_export.json"
"""The record of the export, in every exported folder."""
CARD_FILE = "README.md"
CARD_MARK = "tags: [weight-steering, contrastive]"
"""A line in the head of every card, by which an older one is known."""


def write_record(folder: Path, record: dict[str, Any]) -> None:
    """Store the record with the names of all files of the export, so that only they are replaced later."""
    record["files"] = sorted(_files(folder) | {RECORD_FILE, CARD_FILE})  # the card is written last
    write_json(folder / RECORD_FILE, record)


def require_free(folder: Path) -> None:
    """Raise if the place holds anything except an older export: writing there would delete it."""
    remedy = "Give another place with --out."
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir()) and not (folder / RECORD_FILE).is_file()):
        raise UserError(f"{folder} exists and is not an export of this program", remedy)
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    record = read_json(folder / RECORD_FILE, remedy)
    known = record.get("files") if isinstance(record, dict) else []  # exports of earlier versions do not name theirs
    if known is not None and (foreign := sorted(_files(folder) - {*known})):
        raise UserError(f"{folder} holds {foreign[0]}, which is not from the export there and would be lost", remedy)


def card_of(file: Path) -> Path:
    """The card of an export that is one file."""
    return file.with_suffix(".md")


def require_free_file(file: Path, *, with_card: bool = False) -> None:
    """Raise if an export that is one file would replace a folder, a file that is no GGUF, or a card of other origin."""
    if file.is_dir():
        raise UserError(f"{file} is a folder, but this format is one file", f"Give --out {file / 'model.gguf'}")
    if file.is_file() and file.stat().st_size and not _starts_with(file, b"GGUF"):
        raise UserError(f"{file} exists and is no GGUF file", "Give another place with --out.")
    card = card_of(file) if with_card else None
    if card and card.exists() and not (card.is_file() and CARD_MARK.encode() in card.read_bytes()[:400]):
        problem = f"{card} exists and is not the card of an export: the new card would replace it"
        raise UserError(problem, "Give another place with --out.")


def _starts_with(file: Path, mark: bytes) -> bool:
    with file.open("rb") as opened:
        return opened.read(len(mark)) == mark


def _files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir()}
