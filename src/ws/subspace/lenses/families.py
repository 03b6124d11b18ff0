"""Parts that belong to an adapter family, the whole direction itself, and norms against directions."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial

import torch

from ws.algebra import parts
from ws.algebra.delta import Delta
from ws.algebra.direction import Direction
from ws.subspace.lenses.registry import Material, lens, require
from ws.subspace.variants import Part, Pieces, only, without

DRAWS = 10
"""Random directions as large as the whole one."""

Halves = tuple[Direction, Direction]
Divide = Callable[[str, Delta], parts.Split]


@lens("whole", "How much does the whole direction do, its residual writes, and random directions of its size?")
def whole(material: Material) -> Iterator[Part]:
    """Everything else is read against these; the command always measures them."""
    subject = material.subject

    def writes() -> Pieces:
        require(bool(subject.writes.deltas), "the direction has no residual writes")
        return Pieces(subject.writes, subject.reads)

    yield Part("direction", lambda: Pieces(subject.direction), ("full", "random"), draws=DRAWS)
    yield Part("residual writes", writes, ("keep", "drop", "random"), draws=DRAWS)


@lens("norm", "Is it the direction of every matrix, or how the norm is spread over the matrices?")
def norm(material: Material) -> Iterator[Part]:
    """Direction only: every delta is scaled to one common norm, the root mean square over deltas. Its random twins have
    neither the directions nor the norms. The norms without the directions are the random twins of the whole."""

    def equal_norms() -> Pieces:
        direction = material.direction
        norms = direction.norms()
        common = math.sqrt(sum(value**2 for value in norms.values()) / len(norms))
        scaled = {name: delta * (common / norms[name]) for name, delta in direction.deltas.items() if norms[name] > 0}
        return Pieces(replace(direction, deltas=scaled))

    yield Part("direction only", equal_norms, ("keep", "random"), draws=DRAWS)


@lens("native", "In which part of what the adapter family trains?")
def native(material: Material) -> Iterator[Part]:
    """DoRA: direction, magnitude. DeLoRA: normalised update, bound. OFT, BOFT: rotation, the rest. IA3: gates of
    attention, of the MLP. LoRA, rsLoRA, PiSSA: change of A, change of B."""
    divide, names = _NATIVE.get(material.family, (None, ("native parts", "")))

    def of(first: bool) -> Pieces:
        require(divide is not None, f"no decomposition is known for {material.family}")
        assert divide is not None
        pieces = divide(material)
        return Pieces(*(pieces if first else pieces[::-1]))

    yield Part(names[0], partial(of, True))
    if names[1]:
        yield Part(names[1], partial(of, False))


def _contrast(material: Material, divide: Divide) -> Halves:
    """Both task vectors divided alike, and subtracted: pieces and rests of the direction."""
    halves = []
    for side in material.sides():
        found = {name: divide(name, delta) for name, delta in side.deltas.items()}
        halves.append([replace(side, deltas={n: pair[number] for n, pair in found.items()}) for number in (0, 1)])
    (pos, pos_rest), (neg, neg_rest) = halves
    return pos - neg, pos_rest - neg_rest


def _dora(material: Material) -> Halves:
    """`W' = diag(m) V / |V|`. Direction: m stays the row norms of W. Magnitude: what m adds to that.

    From the update tau alone: m is the row norm of W + tau, so with f = |W| / |W + tau| by row the direction is
    `diag(f) (W + tau) - W = diag(f - 1) W + diag(f) tau`.
    """

    def divide(name: str, tau: Delta) -> parts.Split:
        base = material.weight(name)
        side = tau.T if material.sites[name].transposed else tau
        gain = base.norm(dim=1) / (base + side.materialise(base.float()).double()).norm(dim=1)
        direction = Delta.scaling(side.shape, row=gain - 1) + parts.scale_rows(side, gain)
        magnitude = Delta.scaling(side.shape, row=1 - gain) + parts.scale_rows(side, 1 - gain)
        split = parts.Split(direction, magnitude)
        return parts.Split(split.piece.T, split.rest.T) if material.sites[name].transposed else split

    return _contrast(material, divide)


def _delora(material: Material) -> Halves:
    """The update is lambda times a normalised matrix. Normalised update: lambda as at the start of training."""
    trained = []
    for folder in material.folders():
        ratios = {}
        for name, value in folder.tensors.items():
            if name.endswith(".delora_lambda"):
                module = name.removesuffix(".delora_lambda")
                ratios[f"{module}.weight"] = folder.number("delora_lambda", module, "lambda_pattern") / float(value)
        trained.append(ratios)
    sides = [
        [
            replace(side, deltas={name: delta * share(ratios[name]) for name, delta in side.deltas.items()})
            for share in (lambda ratio: ratio, lambda ratio: 1 - ratio)
        ]
        for side, ratios in zip(material.sides(), trained, strict=True)
    ]
    (pos, pos_rest), (neg, neg_rest) = sides
    return pos - neg, pos_rest - neg_rest


def _rotated(material: Material) -> Halves:
    """`W R'`: R is a rotation only nearly (OFT), or is scaled as well (BOFT). Rotation: the nearest one to R."""

    def divide(_name: str, tau: Delta) -> parts.Split:
        found = [term.mix for term in tau.base_terms if term.is_block_diagonal]
        require(len(found) == 1, "the rotation of this adapter has more than one factor")
        (gap,) = found
        assert gap is not None
        identity = torch.eye(gap.shape[-1], dtype=torch.float64, device=gap.device)
        left, _, right = torch.linalg.svd(identity + gap.double())
        rotation = Delta.scaling(tau.shape, mix=left @ right - identity)
        return parts.Split(rotation, tau - rotation)

    return _contrast(material, divide)


def _gates(material: Material) -> Halves:
    """Gates of keys and values, and all others."""
    attention = material.with_roles("q", "k", "v", "o")
    attention |= {name for name in material.direction.deltas if f"{name.rsplit('.', 1)[0]}.weight" in attention}
    return only(material.direction, attention), without(material.direction, attention)


def _factors(material: Material) -> Halves:
    """`B+ A+ - B- A- = (B+ + B-) / 2 (A+ - A-) + (B+ - B-) (A+ + A-) / 2`: the first term changes A, the second B.

    Both adapters start from the same A and B, so each term is what training made of that factor.
    """
    pos, neg = material.sides()
    change_of_a, change_of_b = {}, {}
    for name in sorted({*pos.deltas, *neg.deltas}):
        require(name in pos.deltas and name in neg.deltas, "one side lacks a matrix that the other changes")
        (up, down), (other_up, other_down) = (_up_down(side.deltas[name], material.family) for side in (pos, neg))
        require(up.shape == other_up.shape, "the two adapters differ in rank")
        change_of_a[name] = Delta.low_rank((up + other_up) / 2, down - other_down)
        change_of_b[name] = Delta.low_rank(up - other_up, (down + other_down) / 2)
    return replace(pos, deltas=change_of_a), replace(pos, deltas=change_of_b)


def _up_down(tau: Delta, family: str) -> tuple[torch.Tensor, torch.Tensor]:
    """B and A of an adapter, fp64; PiSSA stores `[B - B0, B0] [A; A - A0]`."""
    require(tau.is_thin, "the update is not a product of two factors")
    up, down = tau.left.double(), tau.right.double()
    if family != "pissa":
        return up, down
    rank = tau.rank // 2
    return up[:, :rank] + up[:, rank:], down[:rank]


_NATIVE: Mapping[str, tuple[Callable[[Material], Halves], tuple[str, str]]] = {
    "dora": (_dora, ("direction", "magnitude")),
    "delora": (_delora, ("normalised update", "bound (lambda)")),
    "oft": (_rotated, ("rotation", "beyond rotation")),
    "boft": (_rotated, ("rotation", "scale")),
    "ia3": (_gates, ("attention gates", "MLP gates")),
    **dict.fromkeys(("lora", "rslora", "pissa"), (_factors, ("change of A", "change of B"))),
}
"""By family: how the direction is divided, and the names of its two parts."""
