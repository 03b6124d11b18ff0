"""How well a subspace holds what a direction does: energies, oracles, nulls, and what the unembedding makes of it.

Axes and moments: `moments`. For a basis B of effective rank r on a moment S of trace 1:

    energy          tr(B' S B)
    null            r / d                                  mean over uniformly random subspaces
    concentration   energy / null
    z               (energy - mean) / sd                   over RANDOM random subspaces of rank r, drawn once per layer
    percent         100 energy / (sum of the r largest eigenvalues of S)     of the oracle at equal effective rank
    joint           sqrt(percent_block * percent_written), of means over layers

Percent is not zero for a subspace without information: its null is 100 (r / d) / oracle.

`specific`: the block axis after the `CLEAN_REMOVED` leading clean components of the layer are projected out of states
and basis, null r' / (d - removed).

Readout metrics, for a change of state x = block difference (Wendler et al., 2402.10588; U: unembedding with the final
norm's gain, u: rows of norm 1):

    token energy E2(x)    v |u x|^2 / (|u u'|_F^2 |x|^2)    near 1 for an x that U reads like any other
    preserved_E           |u B B' x|^2 / |u x|^2
    cap_yn                |B' e|^2 / |e|^2,  e = U_yes - U_no            null r / d
    lens                  |e . B B' x|, nats (without the scale of the final norm)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ws.base import keyed_random
from ws.subspace import moments, spans
from ws.subspace.bases.registry import Built, Material
from ws.subspace.spans import Span
from ws.subspace.weights import Unavailable

RANDOM = 120
"""Random subspaces per rank and layer, for nulls and z."""
CLEAN_REMOVED = 8
AXES: tuple[moments.Axis, ...] = ("block", "cumulative", "written", "o", "down", "read")
READOUT = ("preserved_E", "cap_yn", "lens")
METRICS = (*AXES, "specific", "cos_dw", *READOUT)
"""Everything that a basis is scored on, in the order of the tables."""


@dataclass(frozen=True)
class Score:
    """One metric of one basis.

    null, sd: mean and standard deviation over random subspaces of the effective rank `rank`. oracle: the most that any
    subspace of this rank can have; None where there is no such bound.
    """

    metric: str
    rank: int
    value: float
    null: float
    sd: float
    oracle: float | None = None

    @property
    def z(self) -> float:
        """Distance from the mean of random subspaces, in their standard deviations."""
        return (self.value - self.null) / self.sd if self.sd > 0 else 0.0

    def as_record(self) -> dict[str, Any]:
        """Columns of the table per layer. Percentages are of the oracle."""
        percents = (None, None) if not self.oracle else (self.value / self.oracle, self.null / self.oracle)
        return {
            "metric": self.metric, "rank": self.rank, "value": self.value, "null": self.null, "null_sd": self.sd,
            "z": self.z, "concentration": self.value / self.null if self.null else None, "oracle": self.oracle,
            "percent": None if percents[0] is None else 100 * percents[0],
            "null_percent": None if percents[1] is None else 100 * percents[1],
        }  # fmt: skip


def scores(built: Built, material: Material, answers: tuple[list[int], list[int]]) -> list[Score]:
    """All metrics that this basis and run have at this layer; draws of a random basis are averaged.

    answers: the tokens of the two answers of the behaviour's probe.
    """
    drawn = [_of_span(span, material, answers) for span in built.spans]
    found = []
    for metric in METRICS:
        parts = [one[metric] for one in drawn if metric in one]
        if parts:
            mean = sum(part.value for part in parts) / len(parts)
            found.append(Score(metric, parts[0].rank, mean, parts[0].null, parts[0].sd, parts[0].oracle))
    return found


def _of_span(span: Span, material: Material, answers: tuple[list[int], list[int]]) -> dict[str, Score]:
    basis = span.double()
    found: dict[str, Score] = {
        axis: score for axis in AXES if (score := _on_axis(basis, material, axis)) is not None
    }  # fmt: skip
    if (score := _specific(basis, material)) is not None:
        found["specific"] = score
    try:
        found |= _on_readout(basis, material, answers)
        found["cos_dw"] = _cosine_with_dw(basis, material)
    except Unavailable:
        pass
    return found


# -------------------------------------------------------------------- energies


def _on_axis(basis: Span, material: Material, axis: moments.Axis) -> Score | None:
    key = (material.trained, "spectrum", axis, material.layer)
    try:
        moment = material.moment(axis)
    except Unavailable:
        return None
    spectrum = material.once(key, lambda: moments.spectrum_of(moment))
    rank = basis.shape[1]
    sd = material.once((*key, rank, "sd"), lambda: _spread(moment, _random(material, rank)))
    return Score(axis, rank, moments.energy(basis, moment), rank / material.width, sd, float(spectrum[:rank].sum()))


def _specific(basis: Span, material: Material) -> Score | None:
    """The block axis in the coordinates that are left without the leading clean components."""
    run, layer = material.trained, material.layer

    def make() -> tuple[Tensor, Tensor, Tensor]:
        removed = spans.pca(material.clean, CLEAN_REMOVED)
        rest = torch.linalg.qr(removed, mode="complete")[0][:, removed.shape[1] :]
        moment = moments.of_rows(material.steered("evaluation", "block") @ rest)
        return rest, moment, moments.spectrum_of(moment)

    try:
        rest, moment, spectrum = material.once((run, "specific", layer), make)
    except Unavailable:
        return None
    inside = spans.orthonormal(rest.T @ basis, least=spans.SMALL)  # of unit columns, so the limit is absolute
    rank, width = inside.shape[1], len(moment)
    if not rank:
        return None
    drawn = material.once(
        ("random, specific", layer, rank),
        lambda: _haar(width, rank, f"random|specific|{layer}|{rank}"),
    )
    sd = material.once((run, "specific", layer, rank, "sd"), lambda: _spread(moment, drawn))
    return Score("specific", rank, moments.energy(inside, moment), rank / width, sd, float(spectrum[:rank].sum()))


def _cosine_with_dw(basis: Span, material: Material) -> Score:
    """Mean cosine of the principal angles with the oracle of what dW writes; a diagnostic only."""
    rank = basis.shape[1]
    key = (material.trained, "oracle", material.layer, rank)
    own = material.once(key, lambda: spans.top_eigenvectors(material.moment("written"), rank))
    random = material.once((*key, "random"), lambda: torch.linalg.svdvals(_random(material, rank).mT @ own).mean(dim=1))
    value = float(spans.principal_cosines(basis, own).mean())
    return Score("cos_dw", rank, value, float(random.mean()), float(random.std()))


def _random(material: Material, rank: int) -> Float[Tensor, "draws d r"]:
    """`RANDOM` random subspaces of a rank, the same for all bases and runs of a layer."""
    key = ("random", material.layer, rank)
    return material.once(key, lambda: _haar(material.width, rank, f"random|{material.layer}|{rank}"))


def _haar(width: int, rank: int, key: str) -> Float[Tensor, "draws d r"]:
    generator = keyed_random.generator(key)
    return torch.linalg.qr(torch.randn(RANDOM, width, rank, generator=generator, dtype=torch.float64))[0]


def _spread(moment: moments.Moment, drawn: Float[Tensor, "draws d r"]) -> float:
    """The standard deviation over random subspaces; their mean is known exactly, r / d."""
    energies = (drawn * (moment @ drawn)).sum(dim=(1, 2))
    return float(energies.std())


# -------------------------------------------------------------------- readout


def token_energy(moment: moments.Moment, material: Material) -> float:
    """E2 of the rows of a moment: `v tr(G S) / |G|_F^2`, G = u'u of the row-normalised unembedding."""
    gram = material.view.unit_head_gram
    return float(material.view.vocabulary * (gram * moment).sum() / gram.square().sum())


def answer_direction(material: Material, answers: tuple[list[int], list[int]]) -> Float[Tensor, " width"]:
    """`U_yes - U_no`: mean over the tokens of each answer."""

    def make() -> Tensor:
        first, second = (material.view.head_rows(tokens).mean(dim=0) for tokens in answers)
        return first - second

    return material.background.once("answer direction", make)


def _on_readout(basis: Span, material: Material, answers: tuple[list[int], list[int]]) -> dict[str, Score]:
    moment, rank = material.moment("block"), basis.shape[1]
    rows, toward = material.steered("evaluation", "block"), answer_direction(material, answers)

    def measured(stack: Float[Tensor, "n d r"]) -> dict[str, Tensor]:
        answer = toward @ stack  # (n, r): e'B
        states = rows @ stack  # (n, prompts, r): x'B
        inner = stack.mT @ material.view.unit_head_gram @ stack
        return {
            "preserved_E": (inner * (stack.mT @ moment @ stack)).sum(dim=(1, 2))
            / (material.view.unit_head_gram * moment).sum(),
            "cap_yn": answer.square().sum(dim=1) / toward.square().sum(),
            "lens": (states * answer[:, None]).sum(dim=2).abs().mean(dim=1),
        }

    key = (material.trained, "readout", material.layer, rank)
    random = material.once(key, lambda: measured(_random(material, rank)))
    own = measured(basis[None])
    return {
        name: Score(name, rank, float(own[name]), float(random[name].mean()), float(random[name].std()))
        for name in READOUT
    }


# -------------------------------------------------------------------- subspaces among themselves


def subspace_overlap(first: Span, second: Span) -> float:
    """`|A'B|_F^2 / min(rank)`: the mean squared cosine of the principal angles; random: max(rank) / d on average."""
    return float(spans.principal_cosines(first, second).square().sum() / min(first.shape[1], second.shape[1]))


def between_runs(materials: Sequence[Material], axis: moments.Axis) -> list[dict[str, Any]]:
    """Overlaps of the oracles of one axis between all pairs of runs at one layer."""
    oracles = {}
    for one in materials:
        try:
            oracles[one.trained.name] = spans.top_eigenvectors(one.moment(axis), one.rank)
        except Unavailable:
            continue
    return [
        {
            "axis": axis, "layer": materials[0].layer, "first": first, "second": second,
            "overlap": subspace_overlap(a, b), "first_cosine": float(spans.principal_cosines(a, b)[0]),
            "null": max(a.shape[1], b.shape[1]) / len(a),
        }
        for first, a in oracles.items() for second, b in oracles.items()
    ]  # fmt: skip


def scope(material: Material) -> dict[str, Any]:
    """Do weights and activations point the same way at this layer, and how much of the effect is the layer's own?"""
    cumulative = float(material.steered("evaluation", "cumulative").norm(dim=1).mean())
    block = float(material.steered("evaluation", "block").norm(dim=1).mean())
    axes = {}
    for axis in ("written", "block", "cumulative"):
        try:
            axes[axis] = spans.top_eigenvectors(material.moment(axis), material.rank)
        except Unavailable:
            continue

    def pair(a: str, b: str) -> float | None:
        return subspace_overlap(axes[a], axes[b]) if a in axes and b in axes else None

    return {
        "family": material.trained.family, "seed": material.trained.seed, "layer": material.layer,
        "overlap_written_cumulative": pair("written", "cumulative"), "overlap_written_block": pair("written", "block"),
        "overlap_cumulative_block": pair("cumulative", "block"), "null": material.rank / material.width,
        "block_norm": block, "cumulative_norm": cumulative,
        "block_over_cumulative": block / cumulative if cumulative else None,
        "token_energy": token_energy(material.moment("block"), material) if "block" in axes else None,
    }  # fmt: skip
