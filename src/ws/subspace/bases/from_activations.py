"""Bases from the activations of the unedited model on FIT prompts without a persona.

h_l: residual stream at the answer anchor, h_0 in front of the first layer, h_L behind the last. `turnover` bases follow
the magnitudes of single coordinates over the depth (AntiPaSTO, Clark, 2601.07473). States are centred (PCA): their mean
holds no information about the prompt.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ws.subspace import spans
from ws.subspace.bases.from_weights import broad_unembedding
from ws.subspace.bases.registry import Material, basis
from ws.subspace.spans import Span
from ws.subspace.weights import Unavailable

FIRST_DEPTH = 0.1
"""Share of the layers that `suppressed_off_readout` leaves out: there, embeddings become states."""


def depth(m: Material) -> Tensor:
    """(layers + 1, prompts, width): the residual stream in front of, between and behind the layers, fp64."""
    clean = m.background.clean
    return torch.cat([clean.before[:1], clean.after]).double()


def mlp_inputs(m: Material) -> Tensor:
    """What the up projection of the layer reads, (prompts, width) fp64."""
    if m.background.clean.mlp_inputs is None:
        raise Unavailable("the model has no up projection of its own in every layer")
    return m.background.clean.mlp_inputs[m.layer].double()


def gates(m: Material) -> Tensor:
    """act(W_gate x) of every prompt, (prompts, hidden)."""
    activation = m.weights.activation
    gate = m.weights.matrix("gate")
    if activation is None:
        raise Unavailable("the activation function of its gate is unknown")
    return activation(mlp_inputs(m) @ gate.T)


# -------------------------------------------------------------------- residual stream


@basis("mixed", "clean states", "activations")
def layer_clean_pca(m: Material) -> Span:
    """Principal components of h_l behind the layer."""
    return spans.pca(m.clean, m.rank)


@basis("mixed", "clean states", "activations")
def global_clean_pca(m: Material) -> Span:
    """Principal components of the states behind all layers, pooled."""
    return m.background.once(
        ("global clean", m.rank), lambda: spans.pca(m.background.clean.after.double().flatten(0, 1), m.rank)
    )


@basis("mixed", "turnover", "activations")
def suppressed(m: Material) -> Span:
    """PCA of min(sum_l relu(dm_l), sum_l relu(-dm_l)), dm_l = |h_(l+1)| - |h_l|: what grows and shrinks again."""
    change = depth(m).abs().diff(dim=0)
    return spans.pca(torch.minimum(change.relu().sum(0), (-change).relu().sum(0)), m.rank)


@basis("mixed", "turnover", "activations")
def amplified(m: Material) -> Span:
    """PCA of relu(|h_L| - |h_0|): what is larger at the end."""
    states = depth(m).abs()
    return spans.pca((states[-1] - states[0]).relu(), m.rank)


@basis("mixed", "turnover", "activations")
def added_features(m: Material) -> Span:
    """PCA of sum_l relu(|h_(l+1)| - |h_l|): what grows anywhere."""
    return spans.pca(depth(m).abs().diff(dim=0).relu().sum(0), m.rank)


@basis("mixed", "turnover", "activations")
def churn(m: Material) -> Span:
    """PCA of h_(l+1) - h_l over all layers: what layers write."""
    return m.background.once(("churn", m.rank), lambda: spans.pca(m.background.clean.block.flatten(0, 1), m.rank))


@basis("mixed", "turnover", "activations")
def suppressed_off_readout(m: Material) -> Span:
    """PCA of sum_l relu(dh_l) - sum_l relu(-dh_l) behind the first tenth of the layers, off the broad U (AntiPaSTO)."""
    first = round(FIRST_DEPTH * m.view.layer_count)
    change = depth(m)[first:].diff(dim=0)
    away = broad_unembedding(m)
    rows = change.relu().sum(0) - (-change).relu().sum(0)
    return spans.pca(rows - (rows @ away) @ away.T, m.rank)


# -------------------------------------------------------------------- MLP


@basis("writes", "MLP", "activations")
def gate_kernel(m: Material) -> Span:
    """Leading left singular vectors of W_down diag(mean act(W_gate x)) W_up."""
    mean = gates(m).mean(dim=0)
    return spans.left((m.weights.writes("down") * mean) @ m.weights.reads("up"), m.rank)


@basis("writes", "MLP", "activations")
def gate_active_written(m: Material) -> Span:
    """PCA of W_down (act(W_gate x) * W_up x): what the MLP writes on the FIT prompts."""
    hidden = gates(m) * (mlp_inputs(m) @ m.weights.matrix("up").T)
    return spans.pca(hidden @ m.weights.writes("down").T, m.rank)
