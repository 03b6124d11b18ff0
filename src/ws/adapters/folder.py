"""Read a PEFT folder: its configuration, its tensors, and the module that each tensor belongs to.

Every error names the folder and the module. Tensors are converted to fp32; PEFT's name prefixes are removed.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple, NoReturn

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ws.algebra.delta import Delta, all_finite
from ws.algebra.direction import as_matrix
from ws.base.errors import UnsupportedFeatureError, UserError
from ws.base.files import read_json
from ws.model import architecture

_CONFIG = "adapter_config.json"
_WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
MERGE_EXPERTS = (
    "Merge each side into the base with PEFT (merge_and_unload, save_pretrained) and give the two checkpoints."
)
_EXPERT = re.compile(r"(.*\.experts)\.\d+\..*")


class AdapterFolder(NamedTuple):
    """The configuration and the tensors of a PEFT folder (fp32, module names without PEFT's prefix)."""

    path: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]

    def unsupported(self, problem: str, remedy: str = "Train the adapter without it.") -> NoReturn:
        """Refuse a feature without an exact form."""
        raise UnsupportedFeatureError(f"{self.path}: {problem} has no exact form here", remedy)

    def fail(self, problem: str, remedy: str = "Save the adapter again.") -> NoReturn:
        """Refuse a folder that is damaged or belongs to a different model."""
        raise UserError(f"{self.path}: {problem}", remedy)

    def number(self, option: str, module: str = "", patterns: str = "") -> float:
        """A number of the configuration; `patterns` names the option that overrides it for some modules."""
        value = self.config.get(option)
        if patterns:
            value = _by_pattern(self.config.get(patterns), module, value)
        if not isinstance(value, int | float) or isinstance(value, bool):
            where = f" for {module}" if module else ""
            raise UserError(f"{self.path / _CONFIG}: {option} is {value!r}{where}", "It must be a number.")
        return value

    def refuse_options(self, harmless: Collection[str]) -> None:
        """Refuse every option that is switched on, unless it is known to have no effect on the update."""
        for option, value in self.config.items():
            if option in _NEVER_MATTERS or option in harmless or not value or value == "none":
                continue
            remedy = {"remedy": MERGE_EXPERTS} if option == "target_parameters" else {}
            self.unsupported(f"{self.config.get('peft_type')} with {option} = {json.dumps(value)}", **remedy)


_NEVER_MATTERS = frozenset({
    "task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save", "fan_in_fan_out",
    "runtime_config", "task_adapter_names",
})  # fmt: skip
"""Options that name the adapted modules, which the tensors also show, or that matter in training only."""


def is_adapter_folder(path: Path) -> bool:
    """Whether the folder has a PEFT adapter configuration."""
    return (path / _CONFIG).is_file()


def read(path: str | Path) -> AdapterFolder:
    """Read configuration and tensors; damaged or incomplete folders are errors."""
    path = Path(path)
    if not path.is_dir():
        raise UserError(f"there is no adapter folder {path}", "Give a folder saved by PEFT.")
    if not is_adapter_folder(path):
        raise UserError(f"{path} has no {_CONFIG}", "Give a folder saved by PEFT.")
    if not (path / _WEIGHTS).is_file():
        raise UserError(f"{path} has no {_WEIGHTS}", "Save the adapter as safetensors (pickle files are not read).")
    config = read_json(path / _CONFIG)
    if not isinstance(config, dict):
        raise UserError(f"{path / _CONFIG} is not a JSON object", "Give a folder saved by PEFT.")
    _require_kinds(path, config)
    try:
        raw = load_file(path / _WEIGHTS)
    except SafetensorError as error:
        raise UserError(f"{path / _WEIGHTS} cannot be read ({error})", "Save the adapter again.") from error
    tensors = {name.removeprefix(PREFIX): tensor.to(torch.float32) for name, tensor in raw.items()}
    for name, tensor in tensors.items():
        if not all_finite(tensor):
            raise UserError(f"{path / _WEIGHTS}: {name} holds NaN or infinite values", "Train the adapter again.")
    return AdapterFolder(path, config, tensors)


def _require_kinds(path: Path, config: Mapping[str, Any]) -> None:
    """Raise for an option that is not of the kind that PEFT writes, and for a name that is no regular expression."""

    def is_list_of(kind: type, value: Any) -> bool:
        return isinstance(value, list) and all(type(one) is kind for one in value)

    for option in ("peft_type", "base_model_name_or_path", "revision"):
        if not isinstance(config.get(option), str | None):
            raise UserError(f"{path / _CONFIG}: {option} is {config[option]!r}", "It must be a text.")
    for option in (*_SETS, "layers_pattern"):
        value = config.get(option)
        if not (value is None or isinstance(value, str) or is_list_of(str, value)):
            raise UserError(f"{path / _CONFIG}: {option} is {value!r}", "It must be a text or a list of texts.")
    layers = config.get("layers_to_transform")
    if not (layers is None or type(layers) is int or is_list_of(int, layers)):
        raise UserError(f"{path / _CONFIG}: layers_to_transform is {layers!r}", "It must be a list of whole numbers.")
    for option in ("rank_pattern", "alpha_pattern", "lambda_pattern"):
        if not isinstance(config.get(option), dict | None):
            raise UserError(f"{path / _CONFIG}: {option} is {config[option]!r}", "It must hold numbers by name.")
    patterns = [
        name for option in ("rank_pattern", "alpha_pattern", "lambda_pattern") for name in config.get(option) or ()
    ]
    whole = [value for option in _SETS if isinstance(value := config.get(option), str)]
    for pattern in (*patterns, *whole):
        try:
            re.compile(pattern)
        except (re.error, RecursionError, OverflowError) as error:
            raise UserError(
                f"{path / _CONFIG}: {pattern!r} is not a regular expression ({error})", "Save the adapter again."
            ) from error


def sort_config(folder: Path) -> None:
    """Sort the sets in an adapter's configuration, which PEFT writes in random order: equal runs give equal bytes."""
    path = folder / _CONFIG
    config = json.loads(path.read_text(encoding="utf-8"))
    for option in _SETS:
        if isinstance(config.get(option), list):
            config[option] = sorted(config[option])
    path.write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")


_SETS = ("target_modules", "exclude_modules", "feedforward_modules", "modules_to_save", "target_parameters")
"""Options that PEFT keeps as sets."""


def _by_pattern(patterns: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """The value of the first pattern that matches the module's name or its end, as in PEFT."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


# -------------------------------------------------------------------- where tensors belong


@dataclass(frozen=True)
class AdaptedModule:
    """One adapted linear map: the adapter's tensors by name, and the module of the base model."""

    folder: AdapterFolder
    name: str
    tensors: Mapping[str, Tensor]
    module: nn.Module

    @property
    def parameter(self) -> str:
        """Full name of the weight."""
        return f"{self.name}.weight"

    @property
    def transposed(self) -> bool:
        """Whether the weight is stored as in x out (Conv1D)."""
        return architecture.is_conv1d(self.module)

    @property
    def weight(self) -> Tensor:
        """The base weight as out x in, in its own dtype."""
        stored: Tensor = self.module.weight.data  # type: ignore[assignment]
        return stored.T if self.transposed else stored

    @property
    def bias(self) -> Tensor | None:
        """The base bias, if there is one."""
        stored = getattr(self.module, "bias", None)
        return None if stored is None else stored.data

    def take(self, *names: str) -> list[Tensor]:
        """The tensors with these names; missing or additional tensors are errors."""
        for name in names:
            if name not in self.tensors:
                present = ", ".join(sorted(self.tensors))
                self.folder.fail(f"{self.name} has {present} but no {name}")
        if odd := sorted(self.tensors.keys() - set(names)):
            self.folder.unsupported(f"tensor {self.name}.{odd[0]}")
        return [self.tensors[name] for name in names]

    def as_stored(self, delta: Delta) -> Delta:
        """Convert a delta of the out x in map to one of the stored parameter; checks its shape."""
        if delta.shape != tuple(self.weight.shape):
            self.folder.fail(
                f"the update of {self.name} has shape {delta.shape}, but its weight has {tuple(self.weight.shape)}",
                "Give the base model that the adapter was trained on.",
            )
        return delta.T if self.transposed else delta


def adapted_modules(folder: AdapterFolder, network: nn.Module, endings: Collection[str]) -> list[AdaptedModule]:
    """The adapter's tensors by module; `endings` are the names that the family gives to its tensors.

    Tensors of `modules_to_save` are left out: `saved_modules` makes dense updates of them. Copies of base weights,
    which PEFT saves with an adapter of the embeddings or the head, are left out too.
    """
    modules = dict(network.named_modules())
    saved = set(_saved_parameters(folder, network))
    base = dict(network.named_parameters(remove_duplicate=False))
    uses = Counter(map(id, base.values()))
    ordered = sorted(endings, key=len, reverse=True)
    grouped: dict[str, dict[str, Tensor]] = {}
    for name, tensor in folder.tensors.items():
        if name in saved or _is_copy(tensor, base.get(name.replace(".base_layer.", "."))):
            continue
        ending = next((e for e in ordered if name.endswith(f".{e}")), None)
        if ending is None:
            folder.unsupported(f"tensor {name}")
        grouped.setdefault(name[: -len(ending) - 1], {})[ending] = tensor
    found = []
    for name in sorted(grouped):
        module = modules.get(name)
        if module is None and (fused := _EXPERT.fullmatch(name)) and fused[1] in modules:
            folder.unsupported(f"an adapter on the single expert {name}, which the model keeps fused in {fused[1]},",
                               MERGE_EXPERTS)  # fmt: skip
        if module is None or not architecture.is_linear_map(module):
            folder.fail(
                f"it adapts {name}, which the model does not have", "Give the base model that it was trained on."
            )
        if not _is_named(folder.config, name):
            folder.fail(
                f"it holds tensors of {name}, which {_CONFIG} leaves out, so PEFT would not load them",
                "Correct its target_modules, exclude_modules and layers_to_transform, or save the adapter again.",
            )
        if uses[id(module.weight)] > 1:
            other = architecture.tied_to(network, f"{name}.weight")
            folder.unsupported(f"an adapter on {name}, whose weight the model ties to {other},")
        found.append(AdaptedModule(folder, name, grouped[name], module))
    if not found and not saved:
        folder.fail("it holds no adapter tensors")
    return found


def _is_named(config: Mapping[str, Any], module: str) -> bool:
    """Whether PEFT would put the adapter on this module; without `target_modules` PEFT has defaults of its own."""
    from peft.tuners.tuners_utils import check_target_module_exists  # noqa: PLC0415 - heavy import, late

    options = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "target_parameters")
    named = SimpleNamespace(**{option: config.get(option) for option in options})
    if not named.target_modules or named.target_modules == "all-linear":
        named.target_modules = [module]
    return bool(check_target_module_exists(named, module))


def _is_copy(tensor: Tensor, base: Tensor | None) -> bool:
    """Whether a tensor is an unchanged base weight (compared in the dtype of the loaded base)."""
    return base is not None and base.shape == tensor.shape and torch.equal(tensor.to(base), base.data)


def saved_modules(folder: AdapterFolder, network: nn.Module) -> dict[str, Delta]:
    """Dense updates of modules that were trained in full and saved with the adapter (`modules_to_save`)."""
    parameters = dict(network.named_parameters(remove_duplicate=False))
    result = {}
    for name, parameter_name in _saved_parameters(folder, network).items():
        tensor, base = folder.tensors[name], parameters[parameter_name]
        if tensor.shape != base.shape:
            folder.fail(f"the saved {parameter_name} has shape {tuple(tensor.shape)}, the model's {tuple(base.shape)}",
                        "Give the base model that it was trained on.")  # fmt: skip
        if torch.equal(tensor, base.data.to(tensor.dtype)):
            continue  # saved with the rest, but not changed
        shared = [other for other, p in network.named_parameters(remove_duplicate=False) if p is base]
        if len(shared) > 1:
            folder.unsupported(f"a fully trained {parameter_name} that the model ties to {shared[-1]}")
        difference = (tensor.double() - base.data.double()).float()
        result[parameter_name] = Delta.full(as_matrix(difference))
    return result


def _saved_parameters(folder: AdapterFolder, network: nn.Module) -> dict[str, str]:
    """Name in the folder -> name in the model, for the tensors of `modules_to_save`."""
    wanted = folder.config.get("modules_to_save") or ()
    names = {name for name, _ in network.named_parameters(remove_duplicate=False)}
    found = {}
    for name in folder.tensors:
        plain = name.replace(".modules_to_save.default.", ".").replace(".modules_to_save.", ".")
        if wanted and plain in names:  # PEFT matches the ends of module names; only the tensors show which modules
            found[name] = plain
    return found
