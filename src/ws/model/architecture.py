"""Find the linear maps of a decoder and their roles.

Architectures name their projections differently; the rest of the package uses roles: `q k v o gate up down`. A `Site`
is one stored matrix inside one decoder layer with the roles that it holds (a fused matrix holds several). A role or a
layer that does not exist is an error. With a fixed list of names, an adapter would silently miss 5 of 7 maps of Phi-3.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from ws.base.errors import UnsupportedFeatureError, UserError

ROLES = ("q", "k", "v", "o", "gate", "up", "down")
RESIDUAL_WRITERS = frozenset({"o", "down"})
DEFAULT_SLICE = (0.3, 0.8)
"""The slice of layers that is adapted by default, as fractions of the depth."""

# endings of module names inside a decoder layer -> roles held, in stored order
_ROLES_BY_ENDING: dict[str, tuple[str, ...]] = {
    "q_proj": ("q",),
    "k_proj": ("k",),
    "v_proj": ("v",),
    "o_proj": ("o",),
    "gate_proj": ("gate",),
    "up_proj": ("up",),
    "down_proj": ("down",),
    "qkv_proj": ("q", "k", "v"),  # Phi-3
    "gate_up_proj": ("gate", "up"),  # Phi-3
    "attn.c_attn": ("q", "k", "v"),  # GPT-2
    "attn.c_proj": ("o",),
    "mlp.c_fc": ("up",),
    "mlp.c_proj": ("down",),
    "attention.query_key_value": ("q", "k", "v"),  # GPT-NeoX, interleaved by head
    "attention.dense": ("o",),
    "mlp.dense_h_to_4h": ("up",),
    "mlp.dense_4h_to_h": ("down",),
}


@dataclass(frozen=True)
class Site:
    """One stored matrix of a decoder layer.

    `module` and `parameter` are full names; `transposed` marks weights stored as in x out (Conv1D).
    """

    module: str
    parameter: str
    layer: int
    roles: tuple[str, ...]
    shape: tuple[int, int]
    transposed: bool

    @property
    def writes_residual(self) -> bool:
        """Whether the output is added directly to the residual stream."""
        return bool(RESIDUAL_WRITERS.intersection(self.roles))

    @property
    def kind(self) -> str:
        """The module's own name inside its layer, e.g. `o_proj`."""
        return self.module.rsplit(".", 1)[-1]


def text_config(network: nn.Module) -> Any:
    """The configuration of the language part (multimodal models nest it)."""
    config: Any = network.config
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def decoder_layers(network: nn.Module) -> tuple[str, nn.ModuleList]:
    """Full name and list of the decoder layers."""
    expected = int(text_config(network).num_hidden_layers)
    found = [
        (name, module)
        for name, module in network.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == expected and _holds_linear_maps(module)
    ]
    language = [pair for pair in found if "vision" not in pair[0] and "audio" not in pair[0]]
    outermost = [pair for pair in language if not any(pair[0].startswith(other + ".") for other, _ in language)]
    if len(outermost) != 1:
        raise UnsupportedFeatureError(
            f"{type(network).__name__}: cannot find its {expected} decoder layers "
            f"(candidates: {[name for name, _ in outermost] or 'none'})",
            "Only decoder-only causal language models are supported.",
        )
    return outermost[0]


def layer_slice(layers: int, low: float = DEFAULT_SLICE[0], high: float = DEFAULT_SLICE[1]) -> range:
    """`range(round(low * n), round(high * n))`; 8..21 for 28 layers at the default 30-80 %."""
    is_slice = 0 <= low < high <= 1  # NaN is none, and cannot be rounded
    chosen = range(round(low * layers), round(high * layers)) if is_slice else range(0)
    if not chosen:
        raise UserError(
            f"the slice {low:g}-{high:g} selects no layer of {layers}",
            "Give two fractions 0 <= low < high <= 1 that are further apart.",
        )
    return chosen


def sites(network: nn.Module, layers: Iterable[int] | None = None, roles: Sequence[str] | None = None) -> list[Site]:
    """All sites of the chosen layers that hold one of `roles` (default: every known role), in layer order."""
    prefix, blocks = decoder_layers(network)
    chosen = list(range(len(blocks)) if layers is None else layers)
    if not chosen:
        raise UserError("no layer is chosen", f"The model has layers 0 to {len(blocks) - 1}.")
    found: list[Site] = []
    for layer in chosen:
        if not 0 <= layer < len(blocks):
            raise UserError(f"layer {layer} does not exist; the model has layers 0 to {len(blocks) - 1}")
        for inner, module in blocks[layer].named_modules():
            held = _roles_of(inner)
            weight = getattr(module, "weight", None)
            if held and weight is not None and weight.ndim == 2:
                name = f"{prefix}.{layer}.{inner}"
                found.append(Site(name, f"{name}.weight", layer, held, tuple(weight.shape), is_conv1d(module)))
    for role in roles or ():
        if role not in ROLES:
            raise UserError(f"unknown role {role!r}", f"Roles are {' '.join(ROLES)}.")
        if not any(role in site.roles for site in found):
            raise UnsupportedFeatureError(f"{type(network).__name__} has no module in the role {role!r}")
    wanted = [site for site in found if roles is None or set(roles) & set(site.roles)]
    if not wanted:
        linear = sorted({name.rsplit(".", 1)[-1] for name, m in blocks[0].named_modules() if isinstance(m, nn.Linear)})
        raise UnsupportedFeatureError(
            f"{type(network).__name__} has no module in a known role (its linear maps: {', '.join(linear) or 'none'})"
        )
    return wanted


def linear_maps_without_role(network: nn.Module, layers: Iterable[int]) -> list[str]:
    """Names of linear maps and stacked expert weights in `layers` without a role, so that callers can report them."""
    _, blocks = decoder_layers(network)
    missed = set()
    for layer in layers:
        for inner, module in blocks[layer].named_modules():
            own = dict(module.named_parameters(recurse=False))
            matrices = [name for name, parameter in own.items() if parameter.ndim >= 2]
            if matrices and not _roles_of(inner):
                missed.add(inner)
    return sorted(missed)


def tied_to(network: nn.Module, parameter: str) -> str:
    """Another name of the same parameter (a head tied to the embeddings), or ""."""
    named = dict(network.named_parameters(remove_duplicate=False))
    own = named.get(parameter)
    return next((name for name, other in named.items() if other is own and name != parameter), "")


def no_own_parameter(network: nn.Module, parameter: str) -> UserError:
    """The error for a direction that changes a parameter that `network.named_parameters()` does not list.

    A tied head cannot be updated alone, because the embeddings use the same matrix.
    """
    if other := tied_to(network, parameter):
        return UnsupportedFeatureError(
            f"the direction changes {parameter}, which the model ties to {other}",
            "Make the direction from adapters that do not change the tied matrix.",
        )
    return UserError(f"the direction changes {parameter}, which the model does not have", "Load its base model.")


def is_conv1d(module: nn.Module) -> bool:
    """Whether this is GPT-2's linear map, whose weight is stored as in x out."""
    from transformers.pytorch_utils import Conv1D  # noqa: PLC0415 - heavy import, late

    return isinstance(module, Conv1D)


def is_linear_map(module: nn.Module) -> bool:
    """Whether a run-time side path can be put on this module."""
    return isinstance(module, nn.Linear) or is_conv1d(module)


def _roles_of(inner: str) -> tuple[str, ...]:
    for ending, roles in _ROLES_BY_ENDING.items():
        if inner == ending or inner.endswith("." + ending):
            return roles
    return ()


def _holds_linear_maps(blocks: nn.ModuleList) -> bool:
    return any(is_linear_map(module) for module in blocks.modules())
