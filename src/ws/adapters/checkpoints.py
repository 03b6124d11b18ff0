"""Full checkpoints, tensor by tensor: the difference of two, and a copy with directions baked in.

Nothing here holds more than one parameter at a time, so memory is bounded by the largest tensor, whatever the size of
the model. A difference of checkpoints is dense; where only low-rank adapters differ, `ws diff` on the adapter folders
is smaller by an order of magnitude and exact, while a checkpoint in bf16 has already lost what rounding took.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ws.algebra.direction import FORMAT, HEADER_KEY, as_matrix
from ws.base import console
from ws.base.errors import UserError
from ws.base.store import atomic_file, canonical_json
from ws.model import loading

_INDEX = "model.safetensors.index.json"
_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}


class Entry(NamedTuple):
    """One stored tensor: its file, shape and dtype."""

    file: str
    shape: tuple[int, ...]
    dtype: torch.dtype


class Checkpoint:
    """The safetensors files of a model folder, read one tensor at a time."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.entries = dict(sorted(self._scan()))

    def _scan(self) -> Iterator[tuple[str, Entry]]:
        files = sorted(path.name for path in self.folder.glob("*.safetensors"))
        if not (self.folder / "config.json").is_file() or not files:
            raise UserError(f"{self.folder} is no model folder with safetensors weights",
                            "Give a folder made by save_pretrained.")  # fmt: skip
        index = self.folder / _INDEX
        if index.is_file():
            listed = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            files = sorted(set(listed.values()))
        for name in files:
            with self._opened(name) as file:
                for key in file.keys():  # noqa: SIM118 - not a mapping
                    piece = file.get_slice(key)
                    code = piece.get_dtype()
                    if code not in _DTYPES:
                        raise UserError(f"{self.folder / name}: {key} is stored as {code}", "Only floats are read.")
                    yield key, Entry(name, tuple(piece.get_shape()), _DTYPES[code])

    @contextmanager
    def _opened(self, name: str) -> Iterator[Any]:
        try:
            with safe_open(self.folder / name, framework="pt") as file:
                yield file
        except (SafetensorError, OSError) as error:
            raise UserError(f"{self.folder / name} cannot be read ({error})", "Save the model again.") from error

    @property
    def files(self) -> list[str]:
        """Names of the weight files."""
        return sorted({entry.file for entry in self.entries.values()})

    def tensor(self, name: str) -> Tensor:
        """One tensor in its stored dtype."""
        with self._opened(self.entries[name].file) as file:
            found: Tensor = file.get_tensor(name)
        return found

    def parameters(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every parameter of the model, as its class names them; tied ones once."""
        network = loading.without_weights(str(self.folder))
        network.tie_weights()
        shapes = {name: tuple(parameter.shape) for name, parameter in network.named_parameters()}
        if absent := sorted(shapes.keys() - self.entries.keys()):
            raise UserError(
                f"{self.folder} stores its weights under other names than the model has (for example no {absent[0]})",
                "Load the model and save it again with save_pretrained; fused experts are not read here.",
            )
        return shapes

    def fingerprint(self) -> str:
        """The fingerprint that the loaded model would have."""
        return loading.fingerprint_of((name, self.tensor(name)) for name in self.parameters())


def difference(
    base: str | Path, pos: str | Path, neg: str | Path, out: Path, provenance: Mapping[str, Any] | None = None
) -> list[str]:
    """Write `theta_pos - theta_neg` of two checkpoint folders as a direction file of `base`; the names that differ.

    Subtracted in fp32 tensor by tensor; a parameter that does not differ is left out.
    """
    own, positive, negative = (Checkpoint(Path(folder)) for folder in (base, pos, neg))
    shapes = own.parameters()
    for side in (positive, negative):
        for name, shape in side.parameters().items():
            if shapes.get(name) != shape:
                raise UserError(
                    f"{side.folder}: {name} has shape {shape}, the base has {shapes.get(name)}",
                    "Both checkpoints must be of the base's architecture.",
                )
    changed = []
    with console.progress("comparing", total=len(shapes)) as bar:
        for name in shapes:
            if not torch.equal(positive.tensor(name).float(), negative.tensor(name).float()):
                changed.append(name)
            bar.advance()
    if not changed:
        raise UserError(f"{pos} and {neg} hold the same weights", "There is no direction between them.")
    coarse = [entry.dtype for entry in (positive.entries[changed[0]], negative.entries[changed[0]])]
    if torch.float32 not in coarse:
        console.warn("both checkpoints are in half precision: what their rounding lost is not in the difference")
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
        keys[f"{name}::left"] = Entry("", (*rows[:-1], 0), torch.float32)
        keys[f"{name}::right"] = Entry("", (*rows[:-2], 0, rows[-1]), torch.float32)
        keys[f"{name}::dense"] = Entry("", rows, torch.float32)
    write_streamed(out, keys, part, {HEADER_KEY: canonical_json(header)}, "writing the direction")
    return changed


def _layers(names: Sequence[str]) -> dict[str, int]:
    found = {}
    for name in names:
        numbers = [piece for piece in name.split(".") if piece.isdigit()]
        if numbers:
            found[name] = int(numbers[0])
    return found


def write_streamed(
    path: Path,
    entries: Mapping[str, Entry],
    produce: Callable[[str], Tensor],
    metadata: Mapping[str, str],
    description: str,
) -> None:
    """A safetensors file whose tensors are made one after the other; atomic.

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
                    raise ValueError(f"{name} has shape {tuple(tensor.shape)}, announced was {entry.shape}")
                if tensor.numel():
                    handle.write(tensor.reshape(-1).view(torch.uint8).numpy().data)
                bar.advance()
