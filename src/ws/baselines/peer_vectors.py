"""Vectors that other libraries of activation steering trained, read as an `ActivationDirection`.

    library             file                                                layer number l
    repeng              `ControlVector.export_gguf`: tensors direction.l    added to the output of decoder layer l
    steering-vectors    `torch.save` of a `SteeringVector`                  added to the output of decoder layer l

Both count decoder layers from 0, and -1 is the last one. So layer l here is layer l there, and alpha is repeng's
`coeff` and steering-vectors' `multiplier`. Both add at every token, as is done here.

repeng trains layers 1 to n-1. It reads layer l at `hidden_states[l + 1]`, the output of the layer; for the last layer,
transformers has the final norm in it. Its options of application, `normalize` and `operator`, are not in the file; the
plain sum is its default. steering-vectors has no file form of its own. Its vectors may also belong inside a layer
(`layer_type`), which is refused.

Neither file names its base model: only the width, the number of layers and, for repeng, the model type are checked. A
pickle is read without running its code.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ws.base.errors import UnsupportedFeatureError, UserError
from ws.base.files import digest
from ws.baselines.repe import ActivationDirection, Unit
from ws.model import architecture
from ws.model.loading import ChatModel

REPENG, STEERING_VECTORS = "repeng", "steering-vectors"
LIBRARIES = (REPENG, STEERING_VECTORS)
DIGEST_SHOWN = 12
"""Characters of a file's digest in provenance and tables."""
_UNIT_TOLERANCE = 1e-2
"""How far the norms of vectors may be from 1 to be strengths in units of norm 1."""


class _Stored(NamedTuple):
    """The vectors of a file by its own layer numbers, and the model type that it names, if any."""

    vectors: Mapping[int, Tensor]
    model_type: str | None = None


@dataclass(frozen=True)
class PeerFile:
    """A file with the vectors of one library."""

    library: str
    path: Path

    @classmethod
    def parse(cls, text: str) -> PeerFile:
        """`repeng:FILE.gguf` or `steering-vectors:FILE`; the file must exist."""
        library, _, name = text.partition(":")
        if library not in LIBRARIES or not name:
            raise UserError(
                f"{text!r} names no vector of a known library", "Give repeng:FILE.gguf or steering-vectors:FILE."
            )
        path = Path(name).expanduser()
        if not path.is_file():
            raise UserError(f"there is no vector file {path}", f"Give the file that {library} wrote.")
        return cls(library, path)

    @property
    def label(self) -> str:
        """Its name in tables."""
        return f"{self.library} {self.path.name}"

    def read(self, model: ChatModel) -> ActivationDirection:
        """The vectors as an Effect on this model. Raises `UserError` if they do not fit it."""
        stored = _read_repeng(self.path) if self.library == REPENG else _read_steering_vectors(self.path)
        config = architecture.text_config(model.network)
        if stored.model_type not in (None, config.model_type, model.network.config.model_type):
            raise UserError(
                f"{self.path} was trained on a {stored.model_type} model, but {model.name} is a {config.model_type}",
                "Give a vector of this model.",
            )
        vectors = self._numbered(stored.vectors, model.layer_count)
        for layer, vector in vectors.items():
            if vector.shape != (config.hidden_size,):
                raise UserError(
                    f"{self.path} has a vector of shape {tuple(vector.shape)} for layer {layer}, but the hidden size "
                    f"of {model.name} is {config.hidden_size}",
                    "Give a vector of this model.",
                )
            if not vector.isfinite().all():
                raise UserError(f"{self.path}: the vector of layer {layer} is not finite", "Train it again.")
        provenance = {
            "method": self.label, "digest": digest(self.path)[:DIGEST_SHOWN], "layers": sorted(vectors),
        }  # fmt: skip
        return ActivationDirection(vectors, model.fingerprint, "all", provenance, _unit_of(vectors.values()))

    def _numbered(self, stored: Mapping[int, Tensor], layer_count: int) -> dict[int, Tensor]:
        """The vectors in fp32 by layer, counted from 0."""
        if not stored:
            raise UserError(f"{self.path} has no vectors", f"Give the file that {self.library} wrote.")
        found: dict[int, Tensor] = {}
        for number, vector in stored.items():
            layer = number if number >= 0 else layer_count + number
            if not 0 <= layer < layer_count:
                raise UserError(
                    f"{self.path} has a vector for layer {number}, but the model has layers 0 to {layer_count - 1}",
                    "Give a vector of this model.",
                )
            if layer in found:
                raise UserError(f"{self.path} has two vectors for layer {layer}", "Keep one of them.")
            found[layer] = vector.detach().to("cpu", torch.float32)
        return found


def parse_all(texts: Sequence[str]) -> list[PeerFile]:
    """The files of several texts; their labels must differ."""
    files = [PeerFile.parse(text) for text in texts]
    labels = [file.label for file in files]
    for label in labels:
        if labels.count(label) > 1:
            raise UserError(f"two vectors have the name {label!r}", "Rename one file, or give it once.")
    return files


def _unit_of(vectors: Iterable[Tensor]) -> Unit:
    """Unit vectors, as repeng trains them, need other strengths than differences of personas."""
    return "one" if all(abs(float(vector.norm()) - 1) < _UNIT_TOLERANCE for vector in vectors) else "difference"


# -------------------------------------------------------------------- repeng


def _read_repeng(path: Path) -> _Stored:
    import gguf  # noqa: PLC0415 - slow import, late

    try:
        reader = gguf.GGUFReader(path)
        architecture_field = reader.get_field("general.architecture")
        kind = architecture_field.contents() if architecture_field else None
        hint = reader.get_field("controlvector.model_hint")
        model_type = hint.contents() if hint else None
        tensors = {tensor.name: gguf.dequantize(tensor.data, tensor.tensor_type) for tensor in reader.tensors}
    except Exception as error:  # the library raises many types for a file that is damaged or of another kind
        raise UserError(f"{path} is not a readable GGUF file ({error})", _NO_REPENG) from error
    if kind != "controlvector":
        raise UserError(f"{path} is a GGUF file of kind {kind!r}, not a control vector", _NO_REPENG)
    vectors = {}
    for name, values in tensors.items():
        prefix, _, number = name.partition(".")
        if prefix == "direction":
            if not number.removeprefix("-").isdecimal():
                raise UserError(f"{path}: tensor {name!r} names no layer", _NO_REPENG)
            vectors[int(number)] = torch.tensor(values)
    return _Stored(vectors, model_type)


_NO_REPENG = "Give a file that repeng's ControlVector.export_gguf wrote."


# -------------------------------------------------------------------- steering-vectors


class _SteeringVector:
    """Stands for `steering_vectors.SteeringVector` while its pickle is read, so the library need not be installed."""

    layer_activations: Mapping[int, Tensor]
    layer_type: str


_PICKLED_NAME = "steering_vectors.steering_vector.SteeringVector"
_NO_STEERING_VECTOR = "Give a file that torch.save(steering_vector, FILE) wrote."


def _read_steering_vectors(path: Path) -> _Stored:
    try:
        with torch.serialization.safe_globals([(_SteeringVector, _PICKLED_NAME)]):
            found: Any = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, AttributeError) as error:
        first = str(error).partition("\n")[0].partition(". ")[0]
        raise UserError(f"{path} is not a readable steering vector ({first})", _NO_STEERING_VECTOR) from error
    fields = vars(found) if isinstance(found, _SteeringVector) else found
    vectors = fields.get("layer_activations") if isinstance(fields, Mapping) else None
    if not isinstance(vectors, Mapping) or not all(
        isinstance(layer, int) and isinstance(vector, Tensor) for layer, vector in vectors.items()
    ):
        raise UserError(f"{path} holds no steering vector", _NO_STEERING_VECTOR)
    if (kind := fields.get("layer_type", "decoder_block")) != "decoder_block":
        raise UnsupportedFeatureError(
            f"{path} has vectors for the layer type {kind!r}", "Train with layer_type='decoder_block'."
        )
    return _Stored(vectors)
