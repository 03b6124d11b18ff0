"""A Direction added to a copy of its base, file by file: `W + alpha dW` in fp32, rounded once to the stored dtype.

The copy has the shards, names and dtypes of the base folder, its tokenizer and configuration, and nothing else: only
weights that the library reads, and only other files that belong to a model. One parameter is in memory at a time. The
written weights are read back as the library reads them, and compared.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ws.adapters.checkpoints import write_streamed
from ws.algebra.direction import Direction
from ws.base.errors import BaseMismatchError, UserError
from ws.base.files import atomic_folder, write_json
from ws.edit.steering import edited
from ws.export.target import CARD_FILE, RECORD_FILE, require_free, write_record
from ws.model import architecture
from ws.model.fingerprint import fingerprint_of
from ws.model.weight_files import INDEX, WHOLE, Checkpoint

_BESIDE_WEIGHTS = frozenset({".json", ".txt", ".model", ".jinja", ".py", ".tiktoken", ".md", ""})
"""Endings of files that belong to a model and hold no weights: configuration, tokenizer, templates, licence."""
_NOT_OF_THE_COPY = frozenset({RECORD_FILE, CARD_FILE})
_TEMPLATES = "additional_chat_templates"


def write_merged(edits: Mapping[Direction, float], base: Path, folder: Path) -> dict[str, Any]:
    """Write the checkpoint of `base` with all `edits` (direction -> alpha) added, and return its record.

    `fingerprint` in the record is the fingerprint of the written model.
    """
    if folder.resolve() == base.resolve():
        raise UserError(f"{folder} is the base itself", "Give another folder; the base is never overwritten.")
    require_free(folder)
    source = Checkpoint(base)
    record = {"format": "merged", **checked_edits(source, edits)}
    parameters = source.parameters()
    merged = _Merged(source, edits)
    with atomic_folder(folder) as temporary:
        _copy_beside_weights(base, temporary)
        for file in merged.files:
            names = [name for name in merged.parameter_of if source.entries[name].file == file]
            entries = {name: source.entries[name] for name in names}
            write_streamed(temporary / file, entries, merged.stored, {"format": "pt"}, f"merging {file}")
        if merged.files != [WHOLE]:
            written = {name: source.entries[name] for name in merged.parameter_of}
            size = sum(math.prod(entry.shape) * entry.dtype.itemsize for entry in written.values())
            files = {name: entry.file for name, entry in written.items()}
            write_json(temporary / INDEX, {"metadata": {"total_size": size}, "weight_map": files})
        copy = Checkpoint(temporary)
        record["fingerprint"] = fingerprint_of((name, merged.checked(name, copy)) for name in parameters)
        write_record(temporary, record)
    return record


def checked_edits(source: Checkpoint, edits: Mapping[Direction, float]) -> dict[str, Any]:
    """The record of the base and of all edits; raises if an edit was made on another base or has no parameter here."""
    own = source.fingerprint()
    for direction in edits:
        if direction.base != own:
            raise BaseMismatchError(
                f"the direction was made on the base model {direction.base}, but {source.folder} is {own}",
                "Give the folder of the direction's base model.",
            )
    touched = {name for direction in edits for name in direction.deltas}
    if absent := sorted(touched - source.parameters().keys()):
        raise architecture.no_own_parameter(source.network, absent[0])
    return {
        "base": own,
        "edits": [{"alpha": alpha, "provenance": dict(direction.provenance)} for direction, alpha in edits.items()],
        "changed": sorted(touched),
    }


def merged_parameter(source: Checkpoint, edits: Mapping[Direction, float], parameter: str) -> Tensor:
    """A parameter with all edits added, fp32."""
    base = source.tensor(parameter)
    return edited(base, _terms(edits, parameter), base)


def _terms(edits: Mapping[Direction, float], parameter: str) -> list[tuple[Any, float]]:
    return [(d.deltas[parameter], alpha) for d, alpha in edits.items() if parameter in d.deltas]


class _Merged:
    """The tensors of the copy, by stored name; the tensors of one parameter are adjacent, so it is made once."""

    def __init__(self, source: Checkpoint, edits: Mapping[Direction, float]) -> None:
        self._source, self._edits = source, edits
        self.parameter_of = {stored: target for target, origin in source.origins.items() for stored in origin.stored}
        self._at_hand: tuple[str, dict[str, Tensor]] = ("", {})

    @property
    def files(self) -> list[str]:
        return sorted({self._source.entries[stored].file for stored in self.parameter_of})

    def stored(self, name: str) -> Tensor:
        """A tensor of the copy; without a change by any direction, it equals the base bit for bit."""
        parameter = self.parameter_of[name]
        if not self._changes(parameter):
            return self._source.stored(name)
        if self._at_hand[0] != parameter:
            self._at_hand = ("", {})
            self._at_hand = (parameter, self._source.as_stored(parameter, self._value(parameter)))
        return self._at_hand[1][name]

    def checked(self, parameter: str, copy: Checkpoint) -> Tensor:
        """A parameter of the copy as read back; raises if it differs from the intended value."""
        found = copy.tensor(parameter)
        wanted = self._value(parameter) if self._changes(parameter) else self._source.tensor(parameter)
        if not torch.equal(found, wanted.to(found.dtype)):
            raise UserError(f"{copy.folder}: {parameter} is not what was written", "Check the disk and export again.")
        return found

    def _changes(self, parameter: str) -> bool:
        return any(parameter in direction.deltas for direction in self._edits)

    def _value(self, parameter: str) -> Tensor:
        return merged_parameter(self._source, self._edits, parameter)


def _copy_beside_weights(base: Path, folder: Path) -> None:
    for file in sorted([*base.iterdir(), *(base / _TEMPLATES).glob("*.jinja")]):
        listed = file.name.endswith(".index.json") or file.name in _NOT_OF_THE_COPY
        if file.is_file() and file.suffix in _BESIDE_WEIGHTS and not listed:
            target = folder / file.relative_to(base)
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(file, target)
