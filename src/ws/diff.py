"""Two adapters of one base to a Direction, with the geometry of what they share and where they part.

    dW = tau_pos - tau_neg,     M = (tau_pos + tau_neg) / 2   (the drift that both fine-tunes share and dW removes)

The deltas come from the adapter tensors in fp32. Merging in bf16 and subtracting, as is usual, rounds away much of a
small update and adds full-rank noise.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ws import __version__, adapters, architecture, console
from ws.direction import Direction
from ws.models import ChatModel

WEAK_RELATIVE_NORM = 1e-4
"""|dW| / |W| of the touched parameters below which the direction is reported as doing nothing."""


@dataclass(frozen=True)
class Geometry:
    """Three scalars of the two task vectors, and what follows from them.

    cos_anti: -cos(tau_pos, tau_neg); asymmetry: |tau_pos| / |tau_neg|; drift_ratio: |M| / (|dW| / 2);
    cos_dw_m: cosine of dW and M. All norms are Frobenius over every touched parameter.
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
        """Geometry of two task vectors, from `p2`, `n2` and `pn` (fp64)."""
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


def task_vector(model: ChatModel, folder: str | Path) -> Direction:
    """The exact update tau of one adapter folder, bound to this base."""
    read = adapters.read(folder)
    deltas = adapters.deltas(read, model.network)
    prefix, _ = architecture.decoder_layers(model.network)
    layers = {name: int(name[len(prefix) + 1 :].split(".")[0]) for name in deltas if name.startswith(prefix + ".")}
    provenance = {"adapter": dict(read.config), "base": model.describe()}
    return Direction(deltas, model.fingerprint, layers, provenance)


def direction(
    model: ChatModel, pos: str | Path, neg: str | Path, provenance: Mapping[str, Any] | None = None
) -> tuple[Direction, Geometry]:
    """`dW = tau_pos - tau_neg` of two adapter folders, and their geometry.

    Parameters that only one side touches count as zero on the other; how many do is recorded, and said when it is odd.
    """
    tau_pos, tau_neg = task_vector(model, pos), task_vector(model, neg)
    one_sided = sorted(tau_pos.deltas.keys() ^ tau_neg.deltas.keys())
    if one_sided:
        console.warn(f"{len(one_sided)} parameters are touched by one side only, for example {one_sided[0]}")
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
    result = Direction(difference.deltas, difference.base, difference.layers, recorded)
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


if __name__ == "__main__":
    from ws.cli import main_as

    main_as("diff")
