"""The place of an export: it replaces an older export as a whole, but nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ws.base.errors import UserError
from ws.base.files import read_json, write_json

RECORD_FILE = "weight_steering_export.json"
"""The record of the export, in every exported folder."""
CARD_FILE = "README.md"


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


def require_no_folder(file: Path) -> None:
    """Raise if the place of an export that is one file is a folder."""
    if file.is_dir():
        raise UserError(f"{file} is a folder, but this format is one file", f"Give --out {file / 'model.gguf'}")


def _files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir()}
