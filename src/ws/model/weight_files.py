"""Read the weights in a model folder by the rules of transformers: which files, tensors and parameters.

A folder may hold unused files: vendor copies, shards of an older save, an index next to a complete file. Stored tensors
may have other names than the parameters, several may be fused into one (the experts of a mixture), and some are ignored
(stored masks). `Checkpoint` follows the library's own rules, so that fingerprints, differences and exports use the same
tensors as the loaded model. Everything else is an error.

    files        model.safetensors; without it, the files that model.safetensors.index.json lists
    names        the library's renamings and conversions, by architecture
    left over    an error, except for tensors that the architecture is known to ignore
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ws.base.errors import UnsupportedFeatureError, UserError
from ws.base.files import read_json
from ws.model.fingerprint import fingerprint_of
from ws.model.library import without_weights

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
CONFIG, ADAPTER_CONFIG = "config.json", "adapter_config.json"
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


def names_in(folder: Path) -> list[str]:
    """Names of the weight files that the library reads from a model folder."""
    if not (folder / CONFIG).is_file():
        raise UserError(f"{folder} is not a model folder (no {CONFIG})", "Give a folder made by save_pretrained.")
    if (folder / ADAPTER_CONFIG).is_file():  # the library would load it together with the model
        raise UserError(
            f"{folder} holds both an adapter ({ADAPTER_CONFIG}) and a model", "Move one of them to another folder."
        )
    if (folder / WHOLE).is_file():
        return [WHOLE]
    if not (folder / INDEX).is_file():
        raise UserError(
            f"{folder} holds no safetensors weights (neither {WHOLE} nor {INDEX})",
            "Save the model there with save_pretrained (other formats are not read).",
        )
    try:
        listed = read_json(folder / INDEX)["weight_map"]
        files = sorted(set(listed.values()))
    except (UserError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{folder / INDEX} is damaged", "Copy or download the model again.") from error
    for name in files:
        if not isinstance(name, str) or Path(name).name != name:
            raise UserError(f"{folder / INDEX} lists {name!r}, which is not in its folder", "Use a trusted copy.")
        if not (folder / name).is_file():
            raise UserError(f"{folder} lacks {name}, which {INDEX} lists", "Copy or download the model again.")
    return files


def require_all_used(place: str | Path, unused: Iterable[str]) -> None:
    """Raise for stored tensors that the model of the configuration does not have."""
    if left := sorted(unused):
        raise UserError(
            f"{place}: {len(left)} stored tensors do not belong to the model that {CONFIG} describes, "
            f"for example {left[0]}",
            f"Correct {CONFIG} (number of layers, biases), or save the model without them.",
        )


def require_all_there(place: str | Path, missing: Iterable[str]) -> None:
    """Raise for tensors of the configured model that are not stored."""
    if absent := sorted(missing):
        raise UserError(
            f"{place}: the weights lack {len(absent)} tensors of the model that {CONFIG} describes, "
            f"for example {absent[0]}",
            f"Copy or download the model again, or correct {CONFIG}.",
        )


def require_shape(place: str | Path, parameter: str, stored: Sequence[int], described: Sequence[int]) -> None:
    """Raise for a parameter whose stored shape differs from that of the configured model."""
    if tuple(stored) != tuple(described):
        raise UserError(
            f"{place}: {parameter} is stored with shape {tuple(stored)}, but {CONFIG} describes {tuple(described)}",
            f"Correct {CONFIG}, or use the {CONFIG} that belongs to these weights.",
        )


class Stored(NamedTuple):
    """One stored tensor: its file, shape and dtype."""

    file: str
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class Origin:
    """The stored tensors from which tensors of the model are made: names by the pattern that they matched.

    `converter` is the library's and makes all `targets` at once. Without a converter there is one target, stored
    unchanged (under several names if a tied matrix is stored twice).
    """

    targets: tuple[str, ...]
    names: Mapping[str, Sequence[str]]
    converter: Any = None

    @property
    def stored(self) -> list[str]:
        """All stored names."""
        return [name for names in self.names.values() for name in names]


def require_floats(folder: Path, parameters: Iterable[str]) -> None:
    """Raise for a parameter that the files store as integers: the library would take them for weights."""
    stored = Checkpoint(folder)
    for name in parameters:
        if name in stored.entries and not stored.entries[name].dtype.is_floating_point:
            place = folder / stored.entries[name].file
            raise UserError(f"{place}: {name} is stored as integers", "Give unquantized weights.")


class Checkpoint:
    """The weights of a model folder by the names of its parameters, read one tensor at a time."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.entries = dict(sorted(self._scan()))

    def _scan(self) -> Iterator[tuple[str, Stored]]:
        for name in names_in(self.folder):
            with self._opened(name) as file:
                for key in file.keys():  # noqa: SIM118 - not a mapping
                    piece = file.get_slice(key)
                    code = piece.get_dtype()
                    if code not in DTYPES:
                        raise UserError(f"{self.folder / name}: {key} is stored as {code}", "Give unquantized weights.")
                    yield key, Stored(name, tuple(piece.get_shape()), DTYPES[code])

    @contextmanager
    def _opened(self, name: str) -> Iterator[Any]:
        try:
            with safe_open(self.folder / name, framework="pt") as file:
                yield file
        except (SafetensorError, OSError) as error:
            raise UserError(f"{self.folder / name} cannot be read ({error})", "Copy or download it again.") from error

    @cached_property
    def network(self) -> Any:
        """The model of the configuration without weights."""
        network = without_weights(str(self.folder))
        if getattr(network.config, "quantization_config", None):
            raise UnsupportedFeatureError(f"{self.folder} is quantized", "Give the folder of the unquantized model.")
        network.tie_weights()
        return network

    # ---------------------------------------------------------------- what is stored where

    @cached_property
    def origins(self) -> dict[str, Origin]:
        """The origin of every tensor of the model, tied ones under one name; raises if it is incomplete."""
        state = self.network.state_dict()
        made: dict[str, Origin] = {}
        unused = set()
        for origin in self._matched(state):
            for target in origin.targets:
                if target in state:
                    made[target] = origin
                else:
                    unused.add(target)
        tied = self._tied()
        for second, first in tied.items():
            if second in made and (first not in made or self._equal(made[second], made[first])):
                names = {**(made[first].names if first in made else {}), **made.pop(second).names}
                made[first] = Origin((first,), names)
        rest = SimpleNamespace(missing_keys=state.keys() - made.keys() - tied.keys(), unexpected_keys=unused)
        self.network._adjust_missing_and_unexpected_keys(
            rest
        )  # removes what the architecture is known to lack or ignore
        require_all_used(self.folder, rest.unexpected_keys)
        require_all_there(self.folder, rest.missing_keys)
        return made

    def _matched(self, state: Mapping[str, Any]) -> Iterator[Origin]:
        """The stored tensors, grouped by the tensors that the library makes of them."""
        from transformers.conversion_mapping import get_model_conversion_mapping  # noqa: PLC0415 - heavy import, late
        from transformers.core_model_loading import (  # noqa: PLC0415
            WeightConverter,
            WeightRenaming,
            dot_natural_key,
            rename_source_key,
        )

        rules = get_model_conversion_mapping(self.network)
        renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
        converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
        prefix = self.network.base_model_prefix
        grouped: dict[str, tuple[Any, dict[str, list[str]]]] = {}
        for name in sorted(self.entries, key=dot_natural_key):
            target, pattern = rename_source_key(name, renamings, converters, prefix, state)
            if target not in state and name in state:
                target, pattern = rename_source_key(name, [], [], prefix, state)
            converter = next((rule for rule in converters if pattern in rule.source_patterns), None)
            grouped.setdefault(target, (converter, {}))[1].setdefault(pattern or name, []).append(name)
        # the rules that were used are needed to convert names back
        self.network._weight_conversions = [rule for rule in rules if rule.was_used()]
        for target, (converter, names) in grouped.items():
            targets: tuple[str, ...] = (target,)
            if converter is not None:
                first, *others = converter.target_patterns
                targets = (target, *(target.replace(first, other) for other in others))
            yield Origin(targets, names, converter)

    def _tied(self) -> dict[str, str]:
        """Second name -> first name of the parameters that the configuration ties."""
        firsts = {id(parameter): name for name, parameter in self.network.named_parameters()}
        every = self.network.named_parameters(remove_duplicate=False)
        return {name: firsts[id(parameter)] for name, parameter in every if firsts[id(parameter)] != name}

    def _equal(self, one: Origin, other: Origin) -> bool:
        """Whether two stored tensors are equal; else the library does not tie them, whatever the configuration says."""
        return torch.equal(self.stored(one.stored[0]), self.stored(other.stored[0]))

    # ---------------------------------------------------------------- reading

    def parameters(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every parameter of the model; tied ones once."""
        found = {}
        for name, parameter in self.network.named_parameters(remove_duplicate=False):
            if name in self.origins:
                found[name] = tuple(parameter.shape)
                self._require_fit(name, found[name])
        return found

    def _require_fit(self, parameter: str, shape: tuple[int, ...]) -> None:
        origin = self.origins[parameter]
        stored = self.entries[origin.stored[0]]
        if not stored.dtype.is_floating_point:
            raise UserError(f"{self.folder / stored.file}: {parameter} is stored as {stored.dtype}",
                            "Give unquantized weights.")  # fmt: skip
        if origin.converter is None:
            require_shape(self.folder, parameter, stored.shape, shape)

    def dtype(self, parameter: str) -> torch.dtype:
        """The dtype in which a parameter is stored."""
        return self.entries[self.origins[parameter].stored[0]].dtype

    def stored(self, name: str) -> Tensor:
        """One stored tensor by its stored name, in its stored dtype."""
        with self._opened(self.entries[name].file) as file:
            found: Tensor = file.get_tensor(name)
        return found

    def tensor(self, parameter: str) -> Tensor:
        """One parameter in its stored dtype."""
        return self._make(self.origins[parameter])[parameter]

    def _make(self, origin: Origin) -> dict[str, Tensor]:
        if origin.converter is None:
            return {origin.targets[0]: self.stored(origin.stored[0])}
        converter = deepcopy(origin.converter)
        for pattern, names in origin.names.items():
            for name in names:
                converter.add_tensor(origin.targets[0], name, pattern, self.stored(name))
        try:
            made = converter.convert(origin.targets[0], model=self.network, config=self.network.config)
        except Exception as error:  # parts that do not match may raise anything
            raise UserError(
                f"{self.folder}: {origin.targets[0]} cannot be made from its {len(origin.stored)} stored parts",
                "Copy or download the model again.",
            ) from error
        found = {name: value[0] if isinstance(value, list) else value for name, value in made.items()}
        for name, value in found.items():
            require_shape(self.folder, name, value.shape, self.network.get_parameter_or_buffer(name).shape)
        return found

    def as_stored(self, parameter: str, value: Tensor) -> dict[str, Tensor]:
        """Convert a new value of a parameter to the tensors that the files hold for it."""
        from transformers.core_model_loading import revert_weight_conversion  # noqa: PLC0415 - heavy import, late

        origin = self.origins[parameter]
        if origin.converter is None:
            return dict.fromkeys(origin.stored, value)
        whole = {**(self._make(origin) if len(origin.targets) > 1 else {}), parameter: value}
        parts = revert_weight_conversion(self.network, whole)
        if sorted(parts) != sorted(origin.stored):
            raise UnsupportedFeatureError(
                f"{parameter} cannot be converted back to the form that {self.folder} stores",
                "Load the model, save it with save_pretrained, and export from that folder.",
            )
        return dict(parts)

    def fingerprint(self) -> str:
        """The fingerprint that the loaded model would have."""
        return fingerprint_of((name, self.tensor(name)) for name in self.parameters())
