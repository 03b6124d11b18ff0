"""Trained-looking adapters of every family on small models, and what each of them means in fp64, from the formulas."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from making import generator
from ws import adapters
from ws.adapters import AdapterSettings
from ws.adapters.attach import Attached
from ws.base.errors import UnsupportedFeatureError
from ws.model import architecture

FAMILIES = adapters.FAMILIES
RANK, LORA_ALPHA, BLOCK, LAMBDA = 4, 6.0, 4, 0.5


@dataclass(frozen=True)
class Made:
    """A saved adapter and the update of every parameter that it means, fp64, in the stored orientation."""

    folder: Path
    meaning: dict[str, Tensor]


def settings(family: str, **changes: Any) -> AdapterSettings:
    values: dict[str, Any] = {"rank": RANK, "lora_alpha": LORA_ALPHA, "block_size": BLOCK, "delora_lambda": LAMBDA}
    return AdapterSettings(family=family, **{**values, **changes})


def make(network: nn.Module, family: str, folder: Path, *, seed: int, size: float, drift: float = 0.0) -> Made:
    """Attach, move the adapter's parameters by Gaussian numbers of about `size`, record the meaning, save, detach.

    `drift` adds a movement of that size that is the same for every seed.
    """
    torch.manual_seed(0)
    bound = 10 * (size + drift) or LAMBDA  # DeLoRA's updates have the size of their bound, however B moves
    attached = adapters.attach(network, settings(family, delora_lambda=bound), "the-base")
    try:
        own, shared = generator(seed), generator(77)
        for name, parameter in attached.wrapped.named_parameters():
            if parameter.requires_grad:
                noise = size * torch.randn(parameter.shape, generator=own)
                noise += drift * torch.randn(parameter.shape, generator=shared)
                parameter.data.add_(noise * _unit(family, name, parameter))
        meaning = _meaning(attached, network, family)
        attached.save(folder)
    finally:
        attached.detach()
    return Made(folder, meaning)


def _unit(family: str, name: str, parameter: Tensor) -> float | Tensor:
    """How far a parameter moves per unit, so that the update is about `size` times the weight in every family."""
    if "magnitude" in name:
        return parameter.data.abs()
    if "lora_A" in name:
        return 0.0 if family == "pissa" else 0.3
    if "lambda" in name:
        return parameter.data.abs()
    return 1.0


def _meaning(attached: Attached, network: nn.Module, family: str) -> dict[str, Tensor]:
    """The formulas, written out densely in fp64 on the adapter's parameters in memory."""
    found: dict[str, Tensor] = {}
    plain = dict(network.named_modules())
    for site in _adapted_sites(attached):
        layer = attached.wrapped.get_submodule("base_model.model." + site)
        base = layer.get_base_layer()
        transposed = architecture.is_conv1d(base)
        stored = base.weight.data.double()
        weight = stored.T if transposed else stored
        shift = attached._shifts.get(site)
        change, gain = _dense_change(layer, weight, family, shift)
        found[f"{site}.weight"] = change.T if transposed else change
        if gain is not None and base.bias is not None:
            found[f"{site}.bias"] = (gain - 1) * base.bias.data.double()
    assert found and plain
    return found


def _adapted_sites(attached: Attached) -> list[str]:
    from peft.tuners.tuners_utils import BaseTunerLayer  # noqa: PLC0415

    return [
        name.removeprefix("base_model.model.")
        for name, module in attached.wrapped.named_modules()
        if isinstance(module, BaseTunerLayer)
    ]


def _dense_change(layer: Any, weight: Tensor, family: str, shift: Any) -> tuple[Tensor, Tensor | None]:
    key = "default"
    if family in ("lora", "rslora", "dora", "pissa"):
        down, up = layer.lora_A[key].weight.data.double(), layer.lora_B[key].weight.data.double()
        scale = LORA_ALPHA / (RANK**0.5 if family == "rslora" else RANK)
        product = scale * up @ down
        if family == "dora":
            moved = weight + product
            magnitude = layer.lora_magnitude_vector[key].weight.data.double()
            return magnitude[:, None] * moved / moved.norm(dim=1, keepdim=True) - weight, None
        if family == "pissa":
            return product - shift.up.double() @ shift.down.double(), None
        return product, None
    if family == "delora":
        down, up = layer.delora_A[key].data.double(), layer.delora_B[key].data.double()
        inner = layer.delora_lambda[key].data.double() / RANK / (down.norm(dim=1) * up.norm(dim=0))
        return up @ torch.diag(inner) @ down @ torch.diag(layer.delora_w_norm[key].double()), None
    if family == "oft":
        numbers = layer.oft_R[key].weight.data.double()
        rows, columns = torch.triu_indices(BLOCK, BLOCK, 1)
        skew = torch.zeros(len(numbers), BLOCK, BLOCK, dtype=torch.float64)
        skew[:, rows, columns] = numbers
        skew = skew - skew.mT
        eye = torch.eye(BLOCK, dtype=torch.float64)
        rotation = torch.block_diag(*(eye + 2 * q + 2 * q @ q + 2 * q @ q @ q + q @ q @ q @ q for q in skew))
        return weight @ rotation.T - weight, None
    if family == "boft":
        blocks = layer.boft_R[key].data.double()[0]
        eye = torch.eye(BLOCK, dtype=torch.float64)
        skew = (blocks - blocks.mT) / 2
        rotation = torch.block_diag(*((eye - q) @ torch.linalg.inv(eye + q) for q in skew))
        return layer.boft_s[key].data.double() * (weight @ rotation.T) - weight, None
    vector = layer.ia3_l[key].data.double()
    return weight * vector - weight, vector.flatten() if vector.shape[0] > 1 else None


def supported(network: nn.Module, family: str) -> str:
    """Why a family cannot be put on a network; empty where it can."""
    try:
        adapters.attach(network, settings(family), "the-base").detach()
    except UnsupportedFeatureError as error:
        return str(error)
    return ""


def support_matrix(networks: dict[str, nn.Module]) -> str:
    """The table of docs/support.md: what the tests verify for each architecture and family, with reasons for gaps."""
    reasons: dict[str, int] = {}
    lines = ["| architecture | " + " | ".join(FAMILIES) + " |", "|" + "---|" * (len(FAMILIES) + 1)]
    for name, network in networks.items():
        cells = []
        for family in FAMILIES:
            reason = supported(network, family)
            if not reason:
                cells.append("exact")
                continue
            general = re.sub(r" on [\w.]+,? ", " on a module ", reason)
            number = reasons.setdefault(general, len(reasons) + 1)
            cells.append(f"no [{number}]")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    notes = [f"[{number}] {reason}" for reason, number in reasons.items()]
    return "\n".join([*lines, "", *notes])
