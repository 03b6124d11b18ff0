"""In which subspace: projections of residual writes, and crops of singular directions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from ws.algebra import parts, random_like, spectrum
from ws.algebra.delta import Delta
from ws.algebra.direction import Direction
from ws.subspace.lenses.registry import Material, lens, require
from ws.subspace.variants import Operation, Part, Pieces, split_each

RANKS = (1, 2, 4, 8, 16, 32)
SHARED_RANKS = (8, 32, 64)
PROJECTED: tuple[Operation, ...] = ("keep", "matched", "complement", "drop", "random", "random matched")
Basis = Float[Tensor, "width k"]


@lens("projection", "Inside the principal directions of the change of activations that it causes?")
def projection(material: Material) -> Iterator[Part]:
    """Residual writes of layer l, projected on the first K right singular vectors of the block differences of layer l.

    The differences are uncentred, and every prompt's is scaled to norm 1 first (spec 8.2).
    """

    def basis(k: int, layer: int) -> Basis:
        rows = material.block_differences[layer]
        require(k <= min(rows.shape), f"{len(rows)} prompts give at most {min(rows.shape)} directions")
        rows = rows / rows.norm(dim=1, keepdim=True).clamp(min=torch.finfo(rows.dtype).tiny)
        return torch.linalg.svd(rows, full_matrices=False)[2][:k].mT

    for k in RANKS:
        yield _projected(material, f"K = {k}", k, partial(basis, k))


@lens("shared", "Inside a subspace that all other families share? The direction itself has no part in the basis.")
def shared(material: Material) -> Iterator[Part]:
    """First K left singular vectors, per layer, of the residual writes of all other families side by side.

    The writes of a family in a layer are scaled to norm 1 together, because the families differ in norm.
    """
    grams: dict[int, Tensor] = {}

    def basis(k: int, layer: int) -> Basis:
        require(bool(material.others), "it needs a second family: give two or more to --families")
        if layer not in grams:
            found = [_gram(material, other, layer) for other in material.others.values()]
            known = [one / one.trace() for one in found if one is not None and one.trace() > 0]
            require(bool(known), f"no other family writes in layer {layer}")
            grams[layer] = torch.stack(known).sum(0)
        width = len(grams[layer])
        require(k < width, f"the residual stream has only {width} dimensions")
        return torch.linalg.eigh(grams[layer])[1].flip(1)[:, :k]

    for k in SHARED_RANKS:
        yield _projected(material, f"K = {k}", k, partial(basis, k))


def _gram(material: Material, other: Direction, layer: int) -> Float[Tensor, "width width"] | None:
    """`sum dW dW'` over the residual writers of a layer, fp64."""
    total = None
    for name in material.with_roles("o", "down"):
        if material.sites[name].layer == layer and name in other.deltas:
            dense = spectrum.dense(other.deltas[name], other.weights.get(name)).cpu()
            dense = dense.T if material.sites[name].transposed else dense
            total = dense @ dense.T if total is None else total + dense @ dense.T
    return total


def on_bases(material: Material, bases: Mapping[int, Basis]) -> Pieces:
    """The residual writes projected on one basis per layer, and what they write outside of it."""

    def divide(parameter: str, delta: Delta) -> parts.Split:
        here = bases[material.sites[parameter].layer].to(delta.device)
        return material.oriented(parameter, delta, lambda one, weight: parts.project(one, here, weight))

    return Pieces(*split_each(material.subject.writes, material.subject.writers, divide))


def _projected(material: Material, name: str, k: int, basis: Callable[[int], Basis]) -> Part:
    """A projection of the residual writes on a basis per layer; twins are projections on random bases."""
    writes = material.subject.writes

    def make() -> Pieces:
        require(bool(writes.deltas), "the direction has no residual writes")
        found = {layer: basis(layer) for layer in writes.layer_numbers}

        def twin(seed: int) -> Direction:
            drawn = {layer: random_like.subspace(len(one), k, f"{seed}|layer {layer}") for layer, one in found.items()}
            return on_bases(material, drawn).keep

        return replace(on_bases(material, found), twin=twin)

    return Part(name, make, PROJECTED, "writes", k=k)


# -------------------------------------------------------------------- crops of singular directions

QUARTERS: Mapping[str, tuple[float, float]] = {
    "top 25 % of indices": (0.0, 0.25), "middle 50 % of indices": (0.25, 0.75), "bottom 25 % of indices": (0.75, 1.0),
}  # fmt: skip
ENERGIES: Mapping[str, float] = {"top 50 % of energy": 0.5, "top 90 % of energy": 0.9}


def _chosen(values: Tensor, crop: str) -> Tensor:
    """Mask of the singular values in a crop; at least one value is in each."""
    count = len(values)
    if crop in QUARTERS:
        start, stop = (round(share * count) for share in QUARTERS[crop])
        place = torch.arange(count)
        return (place >= min(start, count - 1)) & (place < max(stop, start + 1))
    energy = values.square().cumsum(0)
    return torch.arange(count) <= int((energy < ENERGIES[crop] * energy[-1]).sum())


@lens("own-svd", "In its own largest singular directions?")
def own_svd(material: Material) -> Iterator[Part]:
    """Crops of the singular directions of every delta. Indices count the effective rank: values above 1e-6 of the
    largest one. So the top quarter of a difference of two rank-16 adapters is 8 directions, not all of them."""

    def make(crop: str) -> Pieces:
        def divide(name: str, delta: Delta) -> parts.Split:
            found = spectrum.singular(delta, material.direction.weights.get(name))
            rank = int((found.values > random_like.ROUNDING * found.values[:1]).sum())
            inside = torch.zeros(len(found.values), dtype=torch.bool)
            if rank:
                inside[:rank] = _chosen(found.values[:rank], crop).to(inside.device)
            return parts.singular_directions(found, inside)

        return Pieces(*split_each(material.direction, frozenset(material.sites), divide))

    for crop in (*QUARTERS, *ENERGIES):
        yield Part(crop, partial(make, crop))


@lens("base-svd", "In the singular directions of the weights that it changes?")
def base_svd(material: Material) -> Iterator[Part]:
    """`U U' dW V V'` with the singular directions of W in a crop, by index or by the energy of W."""

    def make(crop: str) -> Pieces:
        def divide(name: str, delta: Delta) -> parts.Split:
            left, values, right = torch.linalg.svd(material.weight(name), full_matrices=False)
            inside = _chosen(values, crop)
            left, right = left[:, inside].to(delta.device), right[inside].mT.to(delta.device)
            return material.oriented(name, delta, lambda one, weight: parts.crop(one, left, right, weight))

        return Pieces(*split_each(material.direction, frozenset(material.sites), divide))

    for crop in (*QUARTERS, *ENERGIES):
        yield Part(crop, partial(make, crop))
