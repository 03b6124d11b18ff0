"""Does a direction align with the large or the small singular directions of the weights that it changes?

For every touched W = U S V' (out x in, rank r) and k = max(1, round(share r)), share 0.1 unless another is asked for:

    energy_top    = |U_k' dW V_k|^2 / |dW|^2                 null  k^2 / (out * in)
    energy_bottom = |U_{k:}' dW V_{k:r}|^2 / |dW|^2          null  (r - k)^2 / (out * in)
    energy_weak   = |Q' dW|^2 / |dW|^2                       null  k_Q / d          (residual writers only)

where Q are the k_Q = max(1, round(0.01 d)) directions of the residual stream that the unembedding reads least. A ratio
is an energy divided by its null; a direction without structure has 1. The denominators count all of dW, including its
part outside the thin basis of a rectangular W. The summary ends with a row for random directions with the singular
values of dW, if the caller gives some.

Singular vectors come from the eigenvectors of the smaller Gram matrix in fp64. Energies come from the factors of dW, so
dW is never formed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import polars as pl
import torch
from jaxtyping import Float
from torch import Tensor

from ws.algebra import spectrum
from ws.algebra.delta import Delta
from ws.algebra.direction import Direction
from ws.base import console
from ws.base.errors import UserError
from ws.model import architecture
from ws.model.loading import ChatModel

TOP_SHARE = 0.1
RANDOM = "random"
"""Kind of the row of random directions in a summary."""
WEAK_SHARE = 0.01


def table(model: ChatModel, direction: Direction, share: float = TOP_SHARE) -> pl.DataFrame:
    """One row per touched parameter: norm, energies, nulls and ratios."""
    if not 0 < share < 1:
        raise UserError(f"--k is {share:g}", "Give a share of the singular directions between 0 and 1.")
    layers = direction.layer_numbers
    sites = {site.parameter: site for site in architecture.sites(model.network, layers)} if layers else {}
    parameters = dict(model.network.named_parameters())
    weak = _weak_readout(model)
    rows: list[dict[str, Any]] = []
    for name, raw in console.track(direction.deltas.items(), "alignment", len(direction.deltas)):
        site = sites.get(name)
        if len(parameters[name].shape) != 2:
            continue  # a bias or a stack of experts has no singular directions
        turned = site is not None and site.transposed
        weight = parameters[name].detach().T if turned else parameters[name].detach()
        delta = (raw.T if turned else raw).to("cpu")
        writes = site is not None and site.writes_residual
        rows.append({
            "name": name,
            "layer": direction.layers.get(name),
            "kind": site.kind if site else name.rsplit(".", 2)[-2],
            "shape": "x".join(map(str, delta.shape)),
            **_energies(weight.to("cpu", torch.float64), delta, share),
            **_weak_energies(weight.to("cpu", torch.float64), delta, weak if writes else None),
        })  # fmt: skip
    return pl.DataFrame(rows, infer_schema_length=None)


def with_random(summary: pl.DataFrame, random: Sequence[pl.DataFrame]) -> pl.DataFrame:
    """The summary with one more row, `RANDOM`: the mean over all matrices of the tables of random directions."""
    if not random:
        return summary
    pooled = by_kind(pl.concat(random).with_columns(pl.lit(RANDOM).alias("kind")))
    return pl.concat([summary, pooled])


def by_kind(rows: pl.DataFrame) -> pl.DataFrame:
    """Means and standard deviations of the ratios by kind of module."""
    return (
        rows.group_by("kind", maintain_order=True)
        .agg(
            pl.col("ratio_top").mean().alias("mean_ratio_top"),
            pl.col("ratio_top").std().alias("std_ratio_top"),
            pl.col("ratio_bottom").mean().alias("mean_ratio_bottom"),
            pl.col("ratio_weak").mean().alias("mean_ratio_weak"),
            pl.col("ratio_weak").std().alias("std_ratio_weak"),
            pl.col("norm").mean().alias("mean_norm"),
            pl.len().alias("n"),
        )
        .sort("kind")
    )


def _energies(weight: Float[Tensor, "out in"], delta: Delta, share: float) -> dict[str, Any]:
    out, width = weight.shape
    rank = min(out, width)
    k = max(1, round(share * rank))
    norm = spectrum.norm(delta, weight)
    left, right = _singular_vectors(weight)
    core = left.T @ delta.right_product(right, weight)
    total = norm**2 or 1.0
    top = float(core[:k, :k].square().sum()) / total
    bottom = float(core[k:, k:].square().sum()) / total
    null_top, null_bottom = k * k / (out * width), (rank - k) ** 2 / (out * width)
    return {
        "norm": norm, "k": k, "r": rank,
        "energy_top": top, "null_top": null_top, "ratio_top": top / null_top,
        "energy_bottom": bottom, "null_bottom": null_bottom,
        "ratio_bottom": bottom / null_bottom if null_bottom else None,
    }  # fmt: skip


def _singular_vectors(
    weight: Float[Tensor, "out in"],
) -> tuple[Float[Tensor, "out r"], Float[Tensor, "in r"]]:
    """Left and right singular vectors in descending order of the singular values."""
    if weight.shape[0] > weight.shape[1]:
        right, left = _singular_vectors(weight.T)
        return left, right
    values, vectors = torch.linalg.eigh(weight @ weight.T)
    left = vectors.flip(1)
    scale = values.flip(0).clamp(min=1e-24).sqrt()
    # if W is rank-deficient, the quotient is rounding noise; QR keeps the good columns and completes the basis
    right, _ = torch.linalg.qr((weight.T @ left) / scale)
    return left, right


def _weak_readout(model: ChatModel) -> Float[Tensor, "d k"]:
    """The directions of the residual stream that the unembedding reads least."""
    head = model.network.get_output_embeddings().weight.detach().to("cpu", torch.float32)
    gram = (head.T @ head).double()
    _, vectors = torch.linalg.eigh(gram)
    return vectors[:, : max(1, round(WEAK_SHARE * len(gram)))]


def _weak_energies(
    weight: Float[Tensor, "out in"], delta: Delta, weak: Float[Tensor, "d k"] | None
) -> dict[str, float | None]:
    if weak is None:
        return {"energy_weak": None, "null_weak": None, "ratio_weak": None}
    inside = delta.left_product(weak, weight)
    energy = float(inside.square().sum()) / (spectrum.norm(delta, weight) ** 2 or 1.0)
    null = weak.shape[1] / weak.shape[0]
    return {"energy_weak": energy, "null_weak": null, "ratio_weak": energy / null}
