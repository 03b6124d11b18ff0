"""LoRA, rsLoRA, DoRA and PiSSA folders as exact deltas.

    LoRA    (Hu et al., 2106.09685)          dW = s B A,    s = lora_alpha / r
    rsLoRA  (Kalajdzievski, 2312.03732)      the same with s = lora_alpha / sqrt(r)
    DoRA    (Liu et al., 2402.09353)         dW = diag(g - 1) W + diag(g) s B A,    g = m / |W + s B A| by row
    PiSSA   (Meng et al., 2404.02948)        dW = s (B A - B0 A0),    s B0 A0 = best rank-r approximation of W

`rank_pattern` and `alpha_pattern` are applied per module. A trained bias of B (`lora_bias`) is an update of the bias of
the module.

Numeric traps. `g - 1` is small and is formed in fp64 from a row norm in fp64. In PiSSA `B A` and `B0 A0` are as large
as W and nearly equal: the difference is stored as `[B - B0, B0] [A; A - A0]`. A PiSSA folder does not hold B0 and A0.
For `pissa` they are the truncated SVD of W; for its randomised variants they are lost, so these are refused.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ws.adapters.folder import AdaptedModule, AdapterFolder, adapted_modules
from ws.algebra.delta import Delta

_A, _B, _B_BIAS, _MAGNITUDE = "lora_A.weight", "lora_B.weight", "lora_B.bias", "lora_magnitude_vector"
_ENDINGS = (_A, _B, _B_BIAS, _MAGNITUDE, f"{_MAGNITUDE}.weight")
_HARMLESS = frozenset({
    "r", "lora_alpha", "rank_pattern", "alpha_pattern", "lora_dropout", "use_rslora", "use_dora", "lora_bias",
    "init_lora_weights", "eva_config", "megatron_config", "megatron_core", "qalora_group_size", "ensure_weight_tying",
})  # fmt: skip
_INITS_THAT_KEEP_THE_BASE = (True, False, "gaussian", "orthogonal", "eva")


def deltas(folder: AdapterFolder, network: nn.Module) -> dict[str, Delta]:
    """The updates of a folder of type LORA."""
    folder.refuse_options(_HARMLESS)
    init = folder.config.get("init_lora_weights", True)
    if init not in (*_INITS_THAT_KEEP_THE_BASE, "pissa"):
        folder.unsupported(
            f"LORA with init_lora_weights = {init!r} (it changes the base by factors that are not saved)"
        )
    result: dict[str, Delta] = {}
    for adapted in adapted_modules(folder, network, _ENDINGS):
        result |= _module_deltas(adapted, init)
    return result


def _module_deltas(adapted: AdaptedModule, init: bool | str) -> dict[str, Delta]:
    config = adapted.folder.config
    names = [_A, _B]
    if config.get("lora_bias"):
        names.append(_B_BIAS)
    if config.get("use_dora"):
        names.append(_MAGNITUDE if _MAGNITUDE in adapted.tensors else f"{_MAGNITUDE}.weight")
    down, up, *rest = adapted.take(*names)
    if down.ndim != 2 or up.ndim != 2 or up.shape[1] != down.shape[0]:
        shapes = f"{tuple(down.shape)} and {tuple(up.shape)}"
        adapted.folder.fail(f"the factors of {adapted.name} do not match ({shapes})")
    scale = _scale(adapted, down)
    scaled = (up.double() * scale).float()
    if config.get("use_dora"):
        delta = dora_delta(adapted.weight, up, down, scale, rest[-1])
    elif init == "pissa":
        delta = shifted_low_rank(scaled, down, *_principal(adapted, scale, down))
    else:
        delta = Delta.low_rank(scaled, down)
    result = {adapted.parameter: adapted.as_stored(delta)}
    if config.get("lora_bias"):
        if adapted.bias is None:
            adapted.folder.unsupported(f"a trained bias of {adapted.name}, which has no bias in the base model,")
        result[f"{adapted.name}.bias"] = Delta.full((rest[0].double() * scale).float()[:, None])
    return result


def _scale(adapted: AdaptedModule, down: Tensor) -> float:
    """`alpha / r`, or `alpha / sqrt(r)` for rank-stabilised LoRA."""
    folder = adapted.folder
    rank = folder.number("r", adapted.name, "rank_pattern")
    alpha = folder.number("lora_alpha", adapted.name, "alpha_pattern")
    if rank != down.shape[0]:
        folder.fail(f"{adapted.name} has rank {rank} in the configuration, but its factors have rank {down.shape[0]}")
    return alpha / rank**0.5 if folder.config.get("use_rslora") else alpha / rank


def dora_delta(weight: Tensor, up: Tensor, down: Tensor, scale: float, magnitude: Tensor) -> Delta:
    """`diag(g - 1) W + diag(g) s B A` of one module; `weight` is out x in, `magnitude` (out,)."""
    product = (up.double() * scale) @ down.double()
    norms = (weight.double() + product).norm(dim=1)
    gain = magnitude.double().flatten() / norms
    thin = Delta.low_rank(gain[:, None] * up.double() * scale, down)
    return thin + Delta.scaling(tuple(weight.shape), row=gain - 1)


def shifted_low_rank(up: Tensor, down: Tensor, first_up: Tensor, first_down: Tensor) -> Delta:
    """`up down - first_up first_down` without cancellation: `[up - up0, up0] [down; down - down0]`."""
    up_gap = (up.double() - first_up.double()).float()
    down_gap = (down.double() - first_down.double()).float()
    return Delta.low_rank(torch.cat([up_gap, first_up.float()], dim=1), torch.cat([down.float(), down_gap], dim=0))


def principal_factors(weight: Tensor, rank: int, scale: float) -> tuple[Tensor, Tensor]:
    """`s B0` and `A0` with `s B0 A0` the best rank-r approximation of the weight (out x in), fp32.

    B0 and A0 each get the square root of the singular values divided by the scale.
    """
    left, values, right = torch.linalg.svd(weight.to(torch.float32), full_matrices=False)
    root = (values[:rank] / scale).sqrt()
    return left[:, :rank] * (root * scale), root[:, None] * right[:rank]


def _principal(adapted: AdaptedModule, scale: float, down: Tensor) -> tuple[Tensor, Tensor]:
    """The initial factors of a PiSSA module, each component with the sign that training started with."""
    first_up, first_down = principal_factors(adapted.weight, down.shape[0], scale)
    sign = torch.where((down * first_down).sum(dim=1) < 0, -1.0, 1.0)
    return first_up * sign, first_down * sign[:, None]
