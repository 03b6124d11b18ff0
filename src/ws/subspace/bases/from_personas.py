"""Bases from the states of the unedited model under the behaviour's personas, on the same FIT prompts.

Differences between the two sides are not centred: their mean is the contrast itself, and PCA of centred differences
removes it. Rows are scaled to norm 1 (plus 1 % of the median norm), so that no single prompt decides (AntiPaSTO).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from ws.subspace import capture, spans
from ws.subspace.bases.from_activations import suppressed
from ws.subspace.bases.from_weights import (
    broad_unembedding,
    qk_circuit,
    write_not_downstream_read,
    write_projectors,
)
from ws.subspace.bases.registry import Material, basis
from ws.subspace.spans import Span
from ws.subspace.weights import Unavailable

FLOOR = 0.01
CLUSTERS, STEPS = 8, 8
JOINT = 32
"""Rank of the joint space in which a rotation is fitted."""
STRICT = 0.5
"""Cosine of 60 degrees: pairs of directions further apart do not count as shared."""


def contrast(m: Material) -> Tensor:
    """h(positive persona) - h(negative) behind the layer, rows of about norm 1."""
    pos, neg = m.persona_states
    return spans.unit_rows(pos - neg, FLOOR)


# -------------------------------------------------------------------- differences


@basis("mixed", "personas", "personas")
def taskdiff(m: Material) -> Span:
    """Leading right singular vectors of h(positive) - h(negative) behind the layer, all persona pairs."""
    return spans.right(contrast(m), m.rank)


@basis("mixed", "personas", "personas")
def taskdiff_first_pair(m: Material) -> Span:
    """`taskdiff` of the first persona pair alone, as in the replicated work."""
    pos, neg = m.persona_states
    first = len(pos) // len(m.background.personas)
    return spans.right(spans.unit_rows(pos[:first] - neg[:first], FLOOR), m.rank)


@basis("mixed", "personas", "personas")
def taskdiff_increments(m: Material) -> Span:
    """Leading right singular vectors of what the layer itself adds to the difference of the personas."""
    pos, neg = m.persona_pairs(lambda one: one.block[m.layer])
    return spans.right(spans.unit_rows(pos - neg, FLOOR), m.rank)


@basis("mixed", "personas", "personas")
def taskdiff_all_layers(m: Material) -> Span:
    """Leading right singular vectors of the difference of the personas, averaged over all layers."""

    def make() -> Span:
        pos, neg = m.persona_pairs(lambda one: torch.stack(list(one.after.double())).mean(0))
        return spans.right(spans.unit_rows(pos - neg, FLOOR), m.rank)

    return m.background.once(("taskdiff of all layers", m.rank), make)


@basis("mixed", "personas", "personas")
def global_persona_pca(m: Material) -> Span:
    """Principal components of the states under all personas, all layers, not subtracted: a control."""

    def make() -> Span:
        pos, neg = m.persona_pairs(lambda one: one.after.flatten(0, 1))
        return spans.pca(torch.cat([pos, neg]), m.rank)

    return m.background.once(("persona states", m.rank), make)


@basis("reads", "MLP", "personas")
def up_input_contrast(m: Material) -> Span:
    """Leading right singular vectors of the persona difference of the inputs of W_up."""
    pos, neg = m.persona_pairs(_mlp_inputs(m))
    return spans.right(spans.unit_rows(pos - neg, FLOOR), m.rank)


@basis("writes", "MLP", "personas")
def up_output_written_contrast(m: Material) -> Span:
    """Leading right singular vectors of W_down (W_up x(positive) - W_up x(negative)), without the gate."""
    pos, neg = m.persona_pairs(_mlp_inputs(m))
    written = (pos - neg) @ m.weights.matrix("up").T @ m.weights.writes("down").T
    return spans.right(spans.unit_rows(written, FLOOR), m.rank)


def _mlp_inputs(m: Material) -> Callable[[capture.Captured], Tensor | None]:
    return lambda one: None if one.mlp_inputs is None else one.mlp_inputs[m.layer]


# -------------------------------------------------------------------- attended tokens


Weighting = Literal["min", "max", "diff", "min x norm"]


def attended(m: Material, weighting: Weighting) -> Span:
    """Leading right singular vectors of token-wise persona differences, weighted by the root of the attention.

    Tokens are those that both prompts share: all behind the different system prompts. Attention: of the anchor, mean
    over heads, under the positive (a) and the negative (b) persona.
    """
    tokens = m.background.tokens
    if isinstance(tokens, str):
        raise Unavailable(tokens)
    rows, weights = [], []
    for number, (pos_ids, neg_ids) in enumerate(zip(tokens[0].ids, tokens[1].ids, strict=True)):
        shared = capture.shared_ending(pos_ids, neg_ids)
        states = [side.states[number][m.layer, -shared:].double() for side in tokens]
        a, b = (side.attention[number][m.layer, -shared:].double() for side in tokens)
        rows.append(states[0] - states[1])
        weights.append({"max": torch.maximum(a, b), "diff": (a - b).abs()}.get(weighting, torch.minimum(a, b)))
    differences, attention = torch.cat(rows), torch.cat(weights)
    if weighting == "min x norm":
        norms = differences.norm(dim=1)
        attention = attention * norms / norms.mean()
    return spans.right(differences * attention.sqrt()[:, None], m.rank)


@basis("mixed", "attended tokens", "personas", "attention")
def attn_min_taskdiff(m: Material) -> Span:
    """Persona differences of all shared tokens, weighted by min(a, b): attended under both personas."""
    return attended(m, "min")


@basis("mixed", "attended tokens", "personas", "attention")
def attn_max_taskdiff(m: Material) -> Span:
    """Persona differences of all shared tokens, weighted by max(a, b): attended under one persona."""
    return attended(m, "max")


@basis("mixed", "attended tokens", "personas", "attention")
def attn_diff_taskdiff(m: Material) -> Span:
    """Persona differences of all shared tokens, weighted by |a - b|: attended differently."""
    return attended(m, "diff")


@basis("mixed", "attended tokens", "personas", "attention")
def attn_min_x_diffnorm_taskdiff(m: Material) -> Span:
    """Persona differences of all shared tokens, weighted by min(a, b) times their norm over the mean norm."""
    return attended(m, "min x norm")


# -------------------------------------------------------------------- clusters and rotation


@basis("mixed", "clusters", "personas", "activations")
def chars_clusters(m: Material) -> Span:
    """PCA of the centroids of k-means (k = 8) over clean and persona states; at most 7 directions."""
    states = torch.cat([m.clean, *m.persona_states])
    centroids = states[states.norm(dim=1).argsort(descending=True)[:CLUSTERS]]  # the largest states as a start
    for _ in range(STEPS):
        owner = torch.cdist(states, centroids).argmin(dim=1)
        parts = [states[owner == number] for number in range(len(centroids))]
        centroids = torch.stack([p.mean(0) if len(p) else c for p, c in zip(parts, centroids, strict=True)])
    return spans.pca(centroids, m.rank)


@basis("mixed", "rotation", "personas")
def rotation_contrast(m: Material) -> Span:
    """Leading left singular vectors of R - R', R: the rotation that best takes negative states to positive ones.

    Procrustes in the joint principal components of both sides (at most 32).
    """
    pos, neg = m.persona_states
    joint = spans.pca(torch.cat([pos, neg]), JOINT)
    centre = torch.cat([pos, neg]).mean(dim=0)
    u, _, v = torch.linalg.svd(((neg - centre) @ joint).T @ ((pos - centre) @ joint))
    rotation = u @ v
    return joint @ spans.left(rotation - rotation.T, m.rank)


# -------------------------------------------------------------------- compounds


@basis("mixed", "compound", "personas")
def qk_x_chars_clusters(m: Material) -> Span:
    """Bisectors of `qk_circuit` and `chars_clusters`."""
    return spans.bisector(qk_circuit(m), chars_clusters(m), m.rank)


@basis("mixed", "compound", "personas")
def wnr_union_taskdiff(m: Material) -> Span:
    """Union of `write_not_downstream_read` and `taskdiff`; up to twice the rank, and judged at its own rank."""
    return spans.union(write_not_downstream_read(m), taskdiff(m))


@basis("mixed", "compound", "personas", "activations")
def stenographic(m: Material) -> Span:
    """Bisectors of `taskdiff` and `suppressed` that are less than 60 degrees apart."""
    return spans.bisector(taskdiff(m), suppressed(m), m.rank, STRICT)


@basis("mixed", "compound", "personas")
def taskdiff_x_logits_read(m: Material) -> Span:
    """Bisectors of `taskdiff` and the broad readout of U (AntiPaSTO)."""
    return spans.bisector(taskdiff(m), broad_unembedding(m), m.rank)


@basis("mixed", "compound", "personas", "activations")
def taskdiff_x_suppressed(m: Material) -> Span:
    """Bisectors of `taskdiff` and `suppressed`, however far apart (AntiPaSTO)."""
    return spans.bisector(taskdiff(m), suppressed(m), m.rank)


@basis("mixed", "compound", "personas", "activations")
def taskdiff_x_suppressed_x_write(m: Material) -> Span:
    """Bisectors of `taskdiff_x_suppressed` and `write_projectors` (AntiPaSTO)."""
    return spans.bisector(taskdiff_x_suppressed(m), write_projectors(m), m.rank)
