"""Make a Direction from two adapters of one base, with the geometry of their common part and their difference.

    dW = tau_pos - tau_neg,     M = (tau_pos + tau_neg) / 2   (the drift that both fine-tunes share and dW removes)

The deltas come from the adapter tensors in fp32. The usual way, merging in bf16 and subtracting, rounds away much of a
small update and adds full-rank noise.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ws import adapters
from ws.adapters.folder import AdapterFolder
from ws.adapters.provenance import require_one_base
from ws.algebra import spectrum
from ws.algebra.direction import Direction, as_matrix
from ws.base import console
from ws.base.errors import UserError
from ws.base.version import __version__
from ws.model import architecture
from ws.model.loading import ChatModel

WEAK_RELATIVE_NORM = 1e-4
"""Below this |dW| / |W| of the changed parameters, a warning says that hardly anything was learned."""


@dataclass(frozen=True)
class Geometry:
    """Norms of two task vectors, of dW and of M, and scalars computed from them.

    cos_anti: -cos(tau_pos, tau_neg); asymmetry: |tau_pos| / |tau_neg|; drift_ratio: |M| / (|dW| / 2);
    cos_dw_m: cosine of dW and M. All norms are Frobenius norms over all changed parameters.
    """

    norm_pos: float
    norm_neg: float
    norm_dw: float
    norm_m: float
    cos_anti: float
    asymmetry: float
    drift_ratio: float
    cos_dw_m: float

    @classmethod
    def of(cls, pos: Direction, neg: Direction) -> Geometry:
        """Geometry of two task vectors, from their squared norms and inner product (fp64)."""
        p2, n2, pn = pos.norm() ** 2, neg.norm() ** 2, pos.dot(neg)
        norm_dw = math.sqrt(max(0.0, p2 - 2 * pn + n2))
        norm_m = math.sqrt(max(0.0, p2 + 2 * pn + n2)) / 2
        return cls(
            norm_pos=math.sqrt(p2),
            norm_neg=math.sqrt(n2),
            norm_dw=norm_dw,
            norm_m=norm_m,
            cos_anti=_ratio(-pn, math.sqrt(p2 * n2)),
            asymmetry=_ratio(math.sqrt(p2), math.sqrt(n2)),
            drift_ratio=_ratio(norm_m, norm_dw / 2),
            cos_dw_m=_ratio(abs(p2 - n2) / 2, norm_dw * norm_m),
        )


def _ratio(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator > 0 else 0.0


def are_adapters(pos: Path, neg: Path) -> bool:
    """True if both folders are PEFT adapters, False if both are checkpoints; anything else is an error."""
    kinds = [adapters.is_adapter_folder(folder) for folder in (pos, neg)]
    for folder, is_adapter in zip((pos, neg), kinds, strict=True):
        if not folder.is_dir():
            raise UserError(f"there is no folder {folder}", "Give two PEFT adapter folders, or two checkpoints.")
        if not is_adapter and not (folder / "config.json").is_file():
            raise UserError(
                f"{folder} is neither a PEFT adapter nor a checkpoint", "Give two adapters or two checkpoints."
            )
    if kinds[0] != kinds[1]:
        raise UserError(
            f"one of {pos} and {neg} is an adapter, the other a checkpoint", "Give two adapters or two checkpoints."
        )
    return kinds[0]


def variants(pos: Direction, neg: Direction) -> dict[str, Direction]:
    """The direction, and the ablations that it is compared with, from the two task vectors.

    dw: tau_pos - tau_neg. tau_pos, tau_neg: each alone (the paper's non-contrastive ablation), tau_neg negated so that
    positive strengths have the same meaning. bisector: tau_pos / |tau_pos| - tau_neg / |tau_neg|, scaled to |dw|.
    """
    whole = pos - neg
    bisector = pos / pos.norm() - neg / neg.norm()
    return {"dw": whole, "tau_pos": pos, "tau_neg": -neg, "bisector": bisector * (whole.norm() / bisector.norm())}


def bf16_loss(model: ChatModel, pos: Direction, neg: Direction) -> list[dict[str, Any]]:
    """The error of merging both adapters in bf16 and then subtracting, by parameter.

    `cosine` and `norm_ratio` compare that difference with the exact dW. `relative_size`: |tau_pos| / |W|. Published
    rankings of adapters use such differences.
    """
    rows = []
    whole = pos - neg
    for name, delta in whole.deltas.items():
        weight = as_matrix(model.network.get_parameter(name).data).float()
        merged = [(weight.bfloat16().float() + _dense(tau, name, weight)).bfloat16().double() for tau in (pos, neg)]
        rough, exact = merged[0] - merged[1], spectrum.dense(delta, weight)
        rows.append({
            "parameter": name,
            "layer": whole.layers.get(name),
            "relative_size": spectrum.norm(pos.deltas[name], weight) / float(weight.double().norm())
            if name in pos.deltas else 0.0,
            "cosine": spectrum.cosine(float((rough * exact).sum()), float(rough.norm()), float(exact.norm())),
            "norm_ratio": _ratio(float(rough.norm()), float(exact.norm())),
        })  # fmt: skip
    return rows


def _dense(tau: Direction, name: str, weight: Tensor) -> Tensor:
    return tau.deltas[name].materialise(weight) if name in tau.deltas else torch.zeros_like(weight)


def task_vector(model: ChatModel, folder: str | Path) -> Direction:
    """The exact update tau of one adapter folder, bound to this base."""
    read = adapters.read(folder)
    require_one_base(model, [read])
    return _task_vector(model, read)


def _task_vector(model: ChatModel, read: AdapterFolder) -> Direction:
    deltas = adapters.deltas(read, model.network)
    prefix, _ = architecture.decoder_layers(model.network)
    layers = {name: int(name[len(prefix) + 1 :].split(".")[0]) for name in deltas if name.startswith(prefix + ".")}
    provenance = {"adapter": dict(read.config), "base": model.describe()}
    return Direction(deltas, model.fingerprint, layers, provenance).bind(model)


def direction(
    model: ChatModel, pos: str | Path, neg: str | Path, provenance: Mapping[str, Any] | None = None
) -> tuple[Direction, Geometry]:
    """`dW = tau_pos - tau_neg` of two adapter folders, and their geometry.

    A parameter that only one side changes counts as zero on the other. Such parameters are recorded and give a warning.
    """
    sides = [adapters.read(folder) for folder in (pos, neg)]
    require_one_base(model, sides)
    tau_pos, tau_neg = (_task_vector(model, side) for side in sides)
    one_sided = sorted(tau_pos.deltas.keys() ^ tau_neg.deltas.keys())
    if one_sided:
        console.warn(f"{len(one_sided)} parameters are changed by one side only, for example {one_sided[0]}")
    geometry = Geometry.of(tau_pos, tau_neg)
    difference = tau_pos - tau_neg
    recorded = {
        "tool": f"weight-steering {__version__}",
        "base": model.describe(),
        "adapter": tau_pos.provenance["adapter"],
        "one_sided_parameters": one_sided,
        "geometry": geometry.__dict__,
        **(provenance or {}),
    }
    result = replace(difference, provenance=recorded)
    weight_norm = math.sqrt(
        sum(
            float(p.detach().double().square().sum()) for n, p in model.network.named_parameters() if n in result.deltas
        )
    )
    if geometry.norm_dw < WEAK_RELATIVE_NORM * weight_norm:
        console.warn(
            f"|dW| = {geometry.norm_dw:.3g} is {geometry.norm_dw / weight_norm:.1e} of the weights it changes: "
            "hardly anything was learned; raise --lr, --rank or --epochs"
        )
    return result, geometry
