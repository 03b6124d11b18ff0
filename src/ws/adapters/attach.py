"""Put a new trainable adapter of a family on a slice of layers, and check that it is on exactly these layers.

PEFT does the forward pass and the files. This module adds what PEFT lacks: IA3 respects the layer slice; PiSSA leaves
the base weights unchanged; DoRA's magnitudes start from fp32 norms, also on a half-precision base; and a check that
exactly the modules of the slice are adapted.

PiSSA (Meng et al., 2404.02948) is LoRA that starts from the principal factors of W, plus a frozen term `- s B0 A0`. Its
folder is saved as the equivalent plain LoRA of twice the rank, which any reader understands. The form that PEFT stores
would contain a part of the base.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ws.adapters.folder import PREFIX, sort_config
from ws.adapters.low_rank import principal_factors, shifted_low_rank
from ws.base import console
from ws.base.errors import UnsupportedFeatureError, UserError
from ws.model import architecture
from ws.model.architecture import Site

FAMILIES = ("lora", "rslora", "dora", "pissa", "delora", "oft", "boft", "ia3")
_LORA_KINDS = ("lora", "rslora", "dora", "pissa")
_BLOCKED_ON_CONV1D = ("delora", "oft", "boft")
_IA3_ROLES = ("k", "v", "down")
_ADAPTER = "default"
_REFUSALS_OF_PEFT = (ValueError, TypeError, RuntimeError, AttributeError, KeyError)


@dataclass(frozen=True)
class AdapterSettings:
    """What to attach: family, size, layer slice as fractions, and roles (None: all that the family adapts).

    `rank` and `lora_alpha` are for the low-rank families (DeLoRA has no alpha; `delora_lambda` bounds its norm),
    `block_size` is for OFT and BOFT. `ia3_all_layers` puts IA3 on every layer, as PEFT does.
    """

    family: str = "lora"
    rank: int = 32
    lora_alpha: float = 64.0
    delora_lambda: float = 15.0
    block_size: int = 8
    layers: tuple[float, float] = architecture.DEFAULT_SLICE
    roles: tuple[str, ...] | None = None
    ia3_all_layers: bool = False


def require_family(name: str) -> None:
    """Raise for an unknown family."""
    if name not in FAMILIES:
        raise UserError(f"unknown adapter family {name!r}", f"Families: {', '.join(FAMILIES)}.")


class Attached:
    """A network with a new adapter: its parameters, and methods to save it and to remove it.

    `trainable`: the adapter's parameters. `layers`: the adapted linear maps by their names in the network.
    """

    def __init__(self, wrapped: Any, take_off: Callable[[], None]) -> None:
        from peft.tuners.tuners_utils import BaseTunerLayer  # noqa: PLC0415 - heavy import, late

        self.wrapped = wrapped
        self._take_off = take_off
        self._shifts: dict[str, _Shift] = {}
        self.layers: dict[str, Any] = {
            name.removeprefix(PREFIX): module
            for name, module in wrapped.named_modules()
            if isinstance(module, BaseTunerLayer)
        }

    @property
    def trainable(self) -> list[nn.Parameter]:
        """The adapter's parameters."""
        return [one for layer in self.layers.values() for one in layer.parameters() if one.requires_grad]

    @property
    def first_layer(self) -> int:
        """The first decoder layer that carries the adapter."""
        prefix, _ = architecture.decoder_layers(self.wrapped.base_model.model)
        return min(int(place.removeprefix(f"{prefix}.").split(".", 1)[0]) for place in self.layers)

    def save(self, folder: Path) -> None:
        """Write a PEFT adapter folder. PEFT alone loads it to the same model."""
        with console.library_noise_muted():
            if self._shifts:
                self._save_as_lora(folder)
            else:
                self.wrapped.save_pretrained(folder)
        sort_config(folder)
        (folder / "README.md").unlink(missing_ok=True)

    def detach(self) -> None:
        """Remove the adapter: the network gets its original modules back."""
        for shift in self._shifts.values():
            shift.handle.remove()
        self._take_off()

    def _save_as_lora(self, folder: Path) -> None:
        from peft import get_peft_model_state_dict  # noqa: PLC0415 - heavy import, late
        from safetensors.torch import save_file  # noqa: PLC0415

        config = self.wrapped.peft_config[_ADAPTER]
        scale = config.lora_alpha / config.r
        tensors: dict[str, Tensor] = {}
        state = get_peft_model_state_dict(self.wrapped)
        for name, shift in self._shifts.items():
            down, up = (state[f"{PREFIX}{name}.lora_{side}.weight"].detach().float() for side in "AB")
            both = shifted_low_rank(up.double() * scale, down, shift.up, shift.down)
            tensors[f"{PREFIX}{name}.lora_A.weight"] = both.right
            tensors[f"{PREFIX}{name}.lora_B.weight"] = (both.left / scale).contiguous()
        plain = type(config)(**{
            **config.to_dict(), "r": 2 * config.r, "lora_alpha": 2 * config.lora_alpha, "init_lora_weights": True,
        })  # fmt: skip
        plain.inference_mode = True
        folder.mkdir(parents=True, exist_ok=True)
        plain.save_pretrained(folder)
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def attach(network: Any, settings: AdapterSettings, name: str) -> Attached:
    """Put a new trainable adapter on the slice; `name` is recorded as the base model.

    All other parameters are frozen. After an error the network has no adapter.
    """
    import peft  # noqa: PLC0415 - heavy import, late

    prefix, layers, chosen = _chosen(network, settings)
    if settings.roles is None and (missed := architecture.linear_maps_without_role(network, layers)):
        console.warn(f"{name}: these maps have no known role and are not adapted: {', '.join(missed)}")
    config = _configuration(settings, chosen, prefix, layers)
    take_off = _taking_off(network)
    attached = None
    try:
        with console.library_noise_muted():
            wrapped = peft.get_peft_model(network, config)
        wrapped.peft_config[_ADAPTER].base_model_name_or_path = name
        attached = Attached(wrapped, take_off)
        _require_exactly(wrapped, chosen, _way_out(network, settings.family))
        for site in chosen:
            if settings.family == "pissa":
                attached._shifts[site.module] = _start_from_principal(wrapped, site)
            if settings.family == "dora":
                _exact_magnitude(wrapped, site)
    except BaseException as error:
        (attached.detach if attached else take_off)()
        if isinstance(error, _REFUSALS_OF_PEFT) and attached is None:
            reason = str(error).strip().splitlines()[0].rstrip(".")
            raise UnsupportedFeatureError(
                f"PEFT cannot put {settings.family} on {type(network).__name__} ({reason})",
                _way_out(network, settings.family),
            ) from error
        raise
    return attached


def require_sites(network: Any, settings: AdapterSettings) -> None:
    """Raise for settings that choose no layer or no matrix of this network, before anything long is run."""
    _chosen(network, settings)


def _chosen(network: Any, settings: AdapterSettings) -> tuple[str, range, list[Site]]:
    """The place of the decoder layers, the chosen ones, and their sites."""
    require_family(settings.family)
    _require_positive(settings)
    prefix, blocks = architecture.decoder_layers(network)
    everywhere = settings.family == "ia3" and settings.ia3_all_layers
    layers = range(len(blocks)) if everywhere else architecture.layer_slice(len(blocks), *settings.layers)
    roles = settings.roles
    if roles is None and settings.family == "ia3":  # only roles that the architecture has: fused experts have no down
        present = {role for site in architecture.sites(network, layers) for role in site.roles}
        roles = tuple(role for role in _IA3_ROLES if role in present)
    chosen = architecture.sites(network, layers, roles)
    _require_adaptable(settings, chosen)
    return prefix, layers, chosen


def _taking_off(network: nn.Module) -> Callable[[], None]:
    """A function that restores the network's modules and trainable flags. PEFT does not undo a failed change."""
    children = [(module, dict(module._modules)) for module in network.modules()]
    trained = [(parameter, parameter.requires_grad) for parameter in network.parameters()]

    def take_off() -> None:
        for module, own in children:
            module._modules.clear()
            module._modules.update(own)
        for parameter, before in trained:
            parameter.requires_grad_(before)
        network.__dict__.pop("peft_config", None)

    return take_off


def _way_out(network: nn.Module, family: str) -> str:
    """A remedy that works. In mixtures of experts PEFT moves only LoRA from feed-forward maps to the experts."""
    if family in _LORA_KINDS and any(name.endswith("experts") for name, _ in network.named_modules()):
        return (
            "In this model PEFT moves it from feed-forward maps to the fused experts. Give --roles q k v o, "
            "or use delora, oft, boft or ia3."
        )
    return "Give other --roles, or use another family."


def _require_positive(settings: AdapterSettings) -> None:
    for option in ("rank", "block_size"):
        if getattr(settings, option) < 1:
            raise UserError(f"{option} is {getattr(settings, option)}; it must be at least 1", "Give a larger number.")
    if settings.delora_lambda <= 0:
        raise UserError(f"delora_lambda is {settings.delora_lambda}; it must be positive", "Give a larger number.")


def _require_adaptable(settings: AdapterSettings, chosen: Sequence[Site]) -> None:
    family = settings.family
    for site in chosen:
        inputs = site.shape[0] if site.transposed else site.shape[1]
        if family in ("oft", "boft") and inputs % settings.block_size:
            raise UserError(
                f"{site.module} has {inputs} inputs, which is not a multiple of the block size {settings.block_size}",
                f"Set --block-size to a divisor of {inputs}.",
            )
        if site.transposed and family in _BLOCKED_ON_CONV1D:
            raise UnsupportedFeatureError(
                f"{family} cannot be put on {site.module}, whose weight is stored transposed (PEFT has no such layer)",
                "Use lora, rslora, dora, pissa or ia3.",
            )
        if family == "ia3" and (odd := set(site.roles) - set(_IA3_ROLES)) and set(site.roles) & {"k", "v"}:
            raise UnsupportedFeatureError(
                f"ia3 on {site.module} would also scale its {' and '.join(sorted(odd))}, which are stored with k and v",
                "Use another family for this architecture, or --roles down.",
            )


def _configuration(settings: AdapterSettings, chosen: Sequence[Site], prefix: str, layers: range) -> Any:
    """The PEFT configuration of a family for the chosen sites."""
    import peft  # noqa: PLC0415

    endings = sorted({site.module.removeprefix(f"{prefix}.{site.layer}.") for site in chosen})
    slice_of = {"layers_to_transform": list(layers), "layers_pattern": prefix.rsplit(".", 1)[-1]}
    common = {"task_type": "CAUSAL_LM", "target_modules": endings, **slice_of}
    transposed = any(site.transposed for site in chosen)
    low_rank = {"r": settings.rank, "lora_alpha": settings.lora_alpha, "lora_dropout": 0.0, "bias": "none",
                "fan_in_fan_out": transposed}  # fmt: skip
    make: dict[str, Callable[[], Any]] = {
        "lora": lambda: peft.LoraConfig(**common, **low_rank),
        "rslora": lambda: peft.LoraConfig(**common, **low_rank, use_rslora=True),
        "dora": lambda: peft.LoraConfig(**common, **low_rank, use_dora=True),
        "pissa": lambda: peft.LoraConfig(**common, **low_rank),
        "delora": lambda: peft.DeloraConfig(**common, r=settings.rank, delora_lambda=settings.delora_lambda),
        "oft": lambda: peft.OFTConfig(**common, r=0, oft_block_size=settings.block_size),
        "boft": lambda: peft.BOFTConfig(**common, boft_block_size=settings.block_size, boft_n_butterfly_factor=1),
        # PEFT has no layer slice for IA3, so the modules get their full names
        "ia3": lambda: peft.IA3Config(
            task_type="CAUSAL_LM",
            target_modules=[site.module for site in chosen],
            feedforward_modules=[site.module for site in chosen if "down" in site.roles],
            fan_in_fan_out=transposed,
        ),
    }
    try:
        return make[settings.family]()
    except (ValueError, TypeError) as error:
        raise UserError(
            f"PEFT rejects the settings of {settings.family} ({error})", "Change the adapter settings."
        ) from error


def _require_exactly(wrapped: Any, chosen: Sequence[Site], remedy: str) -> None:
    """Raise unless exactly the modules of the slice carry the adapter."""
    from peft.tuners.tuners_utils import BaseTunerLayer  # noqa: PLC0415

    adapted = {
        module.removeprefix(PREFIX) for module, inner in wrapped.named_modules() if isinstance(inner, BaseTunerLayer)
    }
    odd = sorted(adapted ^ {site.module for site in chosen})
    if odd:
        raise UnsupportedFeatureError(
            f"PEFT does not adapt exactly the modules of the slice ({len(adapted)} instead of {len(chosen)}, "
            f"a difference is {odd[0]})",
            remedy,
        )


# -------------------------------------------------------------------- starts of single families


@dataclass(frozen=True)
class _Shift:
    """The frozen term `- s B0 A0` of a PiSSA module: `up` is s B0, `down` is A0, fp32."""

    up: Tensor
    down: Tensor
    handle: Any


def _start_from_principal(wrapped: Any, site: Site) -> _Shift:
    """Set B and A to the principal factors of the weight, and subtract these in a hook: W itself does not change."""
    layer = wrapped.get_submodule(PREFIX + site.module)
    stored = layer.get_base_layer().weight.data
    weight = stored.T if site.transposed else stored
    scale = layer.scaling[_ADAPTER]
    rank = layer.r[_ADAPTER]
    if rank > min(weight.shape):
        raise UserError(
            f"rank {rank} is too large for PiSSA on {site.module} of shape {tuple(weight.shape)}",
            f"Give --rank {min(weight.shape)} or less.",
        )
    up, down = principal_factors(weight, rank, scale)
    with torch.no_grad():
        layer.lora_A[_ADAPTER].weight.copy_(down)
        layer.lora_B[_ADAPTER].weight.copy_(up / scale)

    def subtract(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        frozen = (inputs[0].to(down.dtype) @ down.T) @ up.T
        return output - frozen.to(output.dtype)

    return _Shift(up, down, layer.register_forward_hook(subtract))


def _exact_magnitude(wrapped: Any, site: Site) -> None:
    """Set DoRA's magnitudes to fp32 row norms of the base weight. PEFT computes them in the dtype of the base."""
    layer = wrapped.get_submodule(PREFIX + site.module)
    stored = layer.get_base_layer().weight.data.to(torch.float32)
    norms = (stored.T if site.transposed else stored).norm(dim=1)
    magnitude = layer.lora_magnitude_vector[_ADAPTER]
    magnitude.weight = nn.Parameter(norms.to(magnitude.weight.device))
