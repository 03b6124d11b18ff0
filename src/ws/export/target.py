"""Where an export goes: it replaces an older export as a whole, and nothing else."""

from __future__ import annotations

from pathlib import Path

from ws.base.errors import UserError

RECORD_FILE = "weight_steering_export.json"
"""In every exported folder: what it was made from."""


def require_free(folder: Path) -> None:
    """Raise for a place that holds anything but an older export: writing there would delete it."""
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir()) and not (folder / RECORD_FILE).is_file()):
        raise UserError(f"{folder} exists and is no export of this program", "Give another place with --out.")
