"""The place of an export: it replaces an older export as a whole, but nothing else."""

from __future__ import annotations

from pathlib import Path

from ws.base.errors import UserError

RECORD_FILE = "weight_steering_export.json"
"""The record of the export, in every exported folder."""


def require_free(folder: Path) -> None:
    """Raise if the place holds anything except an older export: writing there would delete it."""
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir()) and not (folder / RECORD_FILE).is_file()):
        raise UserError(f"{folder} exists and is not an export of this program", "Give another place with --out.")
