"""Adapter families: a name to a PEFT configuration, and a PEFT folder to exact deltas.

Training with PEFT is fine; the algebra is ours. A folder is read from its tensors in fp32 and turned into the delta
that its forward pass means:

    LoRA (Hu et al., 2106.09685)      dW = s B A,   s = lora_alpha / r;  rank_pattern and alpha_pattern per module

Whatever the configuration asks for and no exact form here covers is an error that names the feature. A folder that
adapts another set of modules than its tensors say is an error too.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ws import architecture, console
from ws.delta import Delta
from ws.errors import UnsupportedFeatureError, UserError
from ws.store import read_json

FAMILIES = ("lora",)

_CONFIG = "adapter_config.json"
_WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."


@dataclass(frozen=True)
class AdapterSettings:
    """What to attach: family, rank, lora_alpha, the layer slice as fractions, and the roles (None: all known)."""

    family: str = "lora"
    rank: int = 32
    lora_alpha: float = 64.0
    layers: tuple[float, float] = architecture.DEFAULT_SLICE
    roles: tuple[str, ...] | None = None


def require_family(name: str) -> None:
    """Raise for a family that does not exist here."""
    if name not in FAMILIES:
        raise UserError(f"unknown adapter family {name!r}", f"Families: {', '.join(FAMILIES)}.")


def attach(network: Any, settings: AdapterSettings, name: str) -> Any:
    """Put a fresh trainable adapter on the slice; returns the PEFT model that wraps `network`.

    `name` is recorded as the base model. Exactly the sites of the slice are adapted, which is checked.
    """
    import peft  # noqa: PLC0415 - heavy import, late

    require_family(settings.family)
    if settings.rank < 1:
        raise UserError(f"rank {settings.rank} is not a rank", "Give a whole number from 1.")
    prefix, blocks = architecture.decoder_layers(network)
    layers = architecture.layer_slice(len(blocks), *settings.layers)
    chosen = architecture.sites(network, layers, settings.roles)
    if settings.roles is None and (missed := architecture.linear_maps_without_role(network, layers)):
        console.warn(f"{name}: not adapted, because their role is unknown: {', '.join(missed)}")
    config = peft.LoraConfig(
        r=settings.rank,
        lora_alpha=settings.lora_alpha,
        lora_dropout=0.0,
        bias="none",
        task_type="CAUSAL_LM",
        target_modules=sorted({_inner_name(site.module, prefix, site.layer) for site in chosen}),
        layers_to_transform=list(layers),
        layers_pattern=prefix.rsplit(".", 1)[-1],
        fan_in_fan_out=any(site.transposed for site in chosen),
    )
    with console.library_noise_muted():
        wrapped = peft.get_peft_model(network, config)
    wrapped.peft_config["default"].base_model_name_or_path = name
    adapted = {
        module.removeprefix(_PREFIX)
        for module, inner in wrapped.named_modules()
        if hasattr(inner, "lora_A") and len(inner.lora_A)
    }
    expected = {site.module for site in chosen}
    if adapted != expected:
        wrapped.unload()
        odd = sorted(adapted ^ expected)
        raise UnsupportedFeatureError(
            f"PEFT adapts another set of modules than the slice holds ({len(adapted)} instead of {len(expected)}, "
            f"for example {odd[0]})"
        )
    return wrapped


def _inner_name(module: str, prefix: str, layer: int) -> str:
    """`model.layers.8.self_attn.q_proj` -> `self_attn.q_proj`."""
    return module.removeprefix(f"{prefix}.{layer}.")


# -------------------------------------------------------------------- reading folders


class AdapterFolder(NamedTuple):
    """A PEFT folder as read: its configuration and its tensors (fp32, module names without PEFT's prefix)."""

    path: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]


def is_adapter_folder(path: Path) -> bool:
    """Whether the folder claims to be a PEFT adapter."""
    return (path / _CONFIG).is_file()


def read(path: str | Path) -> AdapterFolder:
    """Read configuration and tensors; damaged or incomplete folders are errors."""
    path = Path(path)
    if not path.is_dir():
        raise UserError(f"there is no adapter folder {path}", "Give a folder saved by PEFT.")
    if not is_adapter_folder(path):
        raise UserError(f"{path} holds no {_CONFIG}", "Give a folder saved by PEFT.")
    if not (path / _WEIGHTS).is_file():
        raise UserError(f"{path} holds no {_WEIGHTS}", "Save the adapter as safetensors (pickles are not read).")
    config = read_json(path / _CONFIG)
    if not isinstance(config, dict):
        raise UserError(f"{path / _CONFIG} is not a configuration", "Give a folder saved by PEFT.")
    try:
        raw = load_file(path / _WEIGHTS)
    except SafetensorError as error:
        raise UserError(f"{path / _WEIGHTS} cannot be read ({error})", "Save the adapter again.") from error
    tensors = {name.removeprefix(_PREFIX): tensor.to(torch.float32) for name, tensor in raw.items()}
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise UserError(f"{path / _WEIGHTS}: {name} holds NaN or infinite values", "Train the adapter again.")
    return AdapterFolder(path, config, tensors)


def deltas(folder: AdapterFolder, network: nn.Module) -> dict[str, Delta]:
    """The exact update that the adapter means for this network: {full parameter name: Delta}."""
    kind = folder.config.get("peft_type")
    if kind != "LORA":
        raise UnsupportedFeatureError(
            f"{folder.path}: adapters of type {kind} have no exact form here yet", "Supported: LORA."
        )
    _require_plain_lora(folder)
    return _lora_deltas(folder, network)


_WITHOUT_EFFECT_ON_WEIGHTS = frozenset({
    "task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "r", "lora_alpha", "rank_pattern", "alpha_pattern", "target_modules", "exclude_modules", "layers_to_transform",
    "layers_pattern", "fan_in_fan_out", "lora_dropout", "megatron_config", "megatron_core", "runtime_config",
    "qalora_group_size", "use_rslora",
})  # fmt: skip
_INITS_THAT_KEEP_THE_BASE = (True, False, "gaussian", "orthogonal", "eva")


def _require_plain_lora(folder: AdapterFolder) -> None:
    """Refuse every option that changes what the tensors mean, by name."""
    for option, value in folder.config.items():
        if option in _WITHOUT_EFFECT_ON_WEIGHTS or not value or value == "none":
            continue
        if option == "init_lora_weights" and value in _INITS_THAT_KEEP_THE_BASE:
            continue
        if option == "eva_config":
            continue
        raise UnsupportedFeatureError(
            f"{folder.path}: LoRA with {option} = {json.dumps(value)} has no exact form here yet",
            "Train the adapter without it.",
        )


def _lora_deltas(folder: AdapterFolder, network: nn.Module) -> dict[str, Delta]:
    parameters = dict(network.named_parameters())
    modules = dict(network.named_modules())
    pairs: dict[str, dict[str, Tensor]] = {}
    for name, tensor in folder.tensors.items():
        match = re.fullmatch(r"(.+)\.lora_([AB])\.weight", name)
        if match is None:
            raise UnsupportedFeatureError(f"{folder.path}: tensor {name} has no exact form here yet")
        pairs.setdefault(match[1], {})[match[2]] = tensor
    result = {}
    for module, factors in sorted(pairs.items()):
        parameter = f"{module}.weight"
        if factors.keys() != {"A", "B"}:
            raise UserError(f"{folder.path}: {module} has lora_{min(factors)} without its partner", "Save it again.")
        if parameter not in parameters:
            raise UserError(
                f"{folder.path} adapts {module}, which the model does not have",
                "Give the base model it was made on.",
            )
        if factors["A"].ndim != 2 or factors["B"].ndim != 2 or factors["B"].shape[1] != factors["A"].shape[0]:
            shapes = " and ".join(str(tuple(factors[side].shape)) for side in "AB")
            raise UserError(f"{folder.path}: the factors of {module} do not fit ({shapes})", "Save the adapter again.")
        delta = Delta.low_rank(factors["B"].double() * _scale(folder, module, factors["A"]), factors["A"])
        if architecture.is_conv1d(modules[module]):
            delta = delta.T
        if delta.shape != tuple(parameters[parameter].shape):
            raise UserError(
                f"{folder.path}: the update of {module} has shape {delta.shape}, its weight has "
                f"{tuple(parameters[parameter].shape)}",
                "Give the base model it was made on.",
            )
        result[parameter] = delta
    if not result:
        raise UserError(f"{folder.path} holds no adapter tensors", "Save it again.")
    return result


def _scale(folder: AdapterFolder, module: str, factor_a: Tensor) -> float:
    """`alpha / r`, or `alpha / sqrt(r)` for rank-stabilised LoRA, with the patterns that PEFT matches by ending."""
    config = folder.config
    rank = _by_pattern(config.get("rank_pattern"), module, config.get("r"))
    alpha = _by_pattern(config.get("alpha_pattern"), module, config.get("lora_alpha"))
    for option, value in (("r", rank), ("lora_alpha", alpha)):
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise UserError(f"{folder.path / _CONFIG}: {option} is {value!r} for {module}", "It must be a number.")
    if rank != factor_a.shape[0]:
        raise UserError(
            f"{folder.path}: rank {rank} is configured for {module}, but its factors have rank {factor_a.shape[0]}",
            "Save the adapter again.",
        )
    return alpha / rank**0.5 if config.get("use_rslora") else alpha / rank


def _by_pattern(patterns: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """The value of the first pattern that matches the module's name or its ending, as PEFT does it."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default
