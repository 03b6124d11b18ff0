"""A Direction baked into a copy of its base, file by file: `W + alpha dW` in fp32, rounded once to the stored dtype.

The copy has the shards, names and dtypes of the base folder, its tokenizer and configuration. One parameter is in
memory at a time.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ws.adapters.checkpoints import Checkpoint, write_streamed
from ws.algebra.direction import Direction
from ws.base.errors import BaseMismatchError, UserError
from ws.base.store import atomic_folder, write_json
from ws.edit.steering import edited

RECORD_FILE = "weight_steering_export.json"


def write_merged(edits: Mapping[Direction, float], base: Path, folder: Path) -> dict[str, Any]:
    """Write the checkpoint of `base` with all `edits` (direction -> alpha) baked in, and return its record."""
    if folder.resolve() == base.resolve():
        raise UserError(f"{folder} is the base itself", "Give another folder; the base is never overwritten.")
    source = Checkpoint(base)
    own = source.fingerprint()
    for direction in edits:
        if direction.base != own:
            raise BaseMismatchError(
                f"the direction belongs to another base model ({direction.base}) than {base} ({own})",
                "Give the folder of its own base.",
            )
    touched = {name for direction in edits for name in direction.deltas}
    if absent := sorted(touched - source.entries.keys()):
        raise UserError(f"{base} has no tensor {absent[0]}", "Give the folder of the direction's base.")

    def produce(name: str) -> torch.Tensor:
        stored = source.tensor(name)
        terms = [(direction.deltas[name], alpha) for direction, alpha in edits.items() if name in direction.deltas]
        return edited(stored, terms, stored) if terms else stored

    record = {
        "format": "merged",
        "base": own,
        "edits": [{"alpha": alpha, "provenance": dict(direction.provenance)} for direction, alpha in edits.items()],
        "changed": sorted(touched),
    }
    with atomic_folder(folder) as temporary:
        for file in sorted(base.iterdir()):
            if file.is_file() and file.suffix != ".safetensors" and not file.name.endswith((".bin", ".pt")):
                shutil.copyfile(file, temporary / file.name)
        for file_name in source.files:
            entries = {name: entry for name, entry in source.entries.items() if entry.file == file_name}
            write_streamed(temporary / file_name, entries, produce, {"format": "pt"}, f"merging {file_name}")
        write_json(temporary / RECORD_FILE, record)
    return record
