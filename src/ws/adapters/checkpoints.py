"""Full checkpoints, tensor by tensor: the difference of two, and safetensors files written one tensor at a time.

Only one parameter is in memory at a time, so the largest tensor bounds the memory. A difference of checkpoints is
dense. If the two differ by low-rank adapters only, use `ws diff` on the adapter folders: the result is ten times
smaller and exact, while checkpoints in bf16 have rounding errors.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ws.algebra.direction import FORMAT, HEADER_KEY, as_matrix
from ws.base import console
from ws.base.errors import UserError
from ws.base.files import atomic_file, canonical_json
from ws.model.weight_files import DTYPES, Checkpoint, Stored

_CODES = {dtype: code for code, dtype in DTYPES.items()}


def difference(
    base: str | Path, pos: str | Path, neg: str | Path, out: Path, provenance: Mapping[str, Any] | None = None
) -> list[str]:
    """Write `theta_pos - theta_neg` of two checkpoint folders as a direction of `base`; return the names that differ.

    Subtracts in fp32, tensor by tensor. Parameters that do not differ are left out.
    """
    own, positive, negative = (Checkpoint(Path(folder)) for folder in (base, pos, neg))
    shapes = own.parameters()
    for side in (positive, negative):
        _require_same_parameters(own, shapes, side)
    changed = []
    with console.progress("comparing", total=len(shapes)) as bar:
        for name in shapes:
            if not torch.equal(positive.tensor(name).float(), negative.tensor(name).float()):
                changed.append(name)
            bar.advance()
    if not changed:
        raise UserError(
            f"{pos} and {neg} hold the same weights, so their difference is zero", "Give two different checkpoints."
        )
    if torch.float32 not in [side.dtype(changed[0]) for side in (positive, negative)]:
        console.warn("both checkpoints are in half precision: the difference contains their rounding errors")
    header = {
        "format": FORMAT,
        "base": own.fingerprint(),
        "layers": _layers(changed),
        "provenance": {"checkpoints": {"pos": str(pos), "neg": str(neg)}, **(provenance or {})},
    }

    def part(key: str) -> Tensor:
        name, _, kind = key.rpartition("::")
        rows = shapes[name] if len(shapes[name]) > 1 else (*shapes[name], 1)
        if kind == "left":
            return torch.zeros(*rows[:-1], 0)
        if kind == "right":
            return torch.zeros(*rows[:-2], 0, rows[-1])
        return as_matrix(positive.tensor(name).float() - negative.tensor(name).float())

    keys = {}
    for name in changed:
        rows = shapes[name] if len(shapes[name]) > 1 else (*shapes[name], 1)
        keys[f"{name}::left"] = Stored("", (*rows[:-1], 0), torch.float32)
        keys[f"{name}::right"] = Stored("", (*rows[:-2], 0, rows[-1]), torch.float32)
        keys[f"{name}::dense"] = Stored("", rows, torch.float32)
    write_streamed(out, keys, part, {HEADER_KEY: canonical_json(header)}, "writing the direction")
    return changed


def _require_same_parameters(base: Checkpoint, shapes: Mapping[str, tuple[int, ...]], side: Checkpoint) -> None:
    found = side.parameters()
    for name in [*shapes, *found]:
        if found.get(name) != shapes.get(name):
            has, wanted = (f"has shape {s[name]}" if name in s else "is absent" for s in (found, shapes))
            raise UserError(
                f"{side.folder}: {name} {has}, but in the base {base.folder} it {wanted}",
                "Give a base and two sides of the same architecture, with the head tied in all three or in none.",
            )


def _layers(names: Sequence[str]) -> dict[str, int]:
    found = {}
    for name in names:
        numbers = [piece for piece in name.split(".") if piece.isdigit()]
        if numbers:
            found[name] = int(numbers[0])
    return found


def write_streamed(
    path: Path,
    entries: Mapping[str, Stored],
    produce: Callable[[str], Tensor],
    metadata: Mapping[str, str],
    description: str,
) -> None:
    """Write a safetensors file atomically. `produce` makes its tensors one after the other.

    The layout is 8 bytes of header length, the header as JSON, then the tensors in header order.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    position = 0
    for name, entry in entries.items():
        size = math.prod(entry.shape) * entry.dtype.itemsize
        header[name] = {"dtype": _CODES[entry.dtype], "shape": list(entry.shape),
                        "data_offsets": [position, position + size]}  # fmt: skip
        position += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with atomic_file(path) as temporary, temporary.open("wb") as handle:
        handle.write(struct.pack("<Q", len(text)) + text)
        with console.progress(description, total=len(entries)) as bar:
            for name, entry in entries.items():
                tensor = produce(name).to(entry.dtype).contiguous()
                if tuple(tensor.shape) != entry.shape:
                    raise ValueError(f"{name} has shape {tuple(tensor.shape)}, but the header has {entry.shape}")
                if tensor.numel():
                    handle.write(tensor.reshape(-1).view(torch.uint8).numpy().data)
                bar.advance()
