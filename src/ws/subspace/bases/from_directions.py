"""Bases from trained directions or gradients, ceilings (oracles) and nulls.

A basis that uses the trained dW of the run itself describes dW; it cannot show that the base model held the subspace
before. `shared_dw_others` and bases on FIT prompts are held out: from another family, or from other prompts.
"""

from __future__ import annotations

import torch

from ws.algebra.direction import Direction
from ws.subspace import moments, spans
from ws.subspace.bases.registry import DRAWS, Material, basis
from ws.subspace.spans import Span
from ws.subspace.weights import Unavailable

# -------------------------------------------------------------------- held out


@basis("mixed", "steered, FIT", "directions", uses_trained_dW=True)
def steered_fit_block(m: Material) -> Span:
    """Leading right singular vectors of the block difference on FIT prompts, rows of norm 1: held-out prompts."""
    return spans.top_eigenvectors(moments.of_rows(m.steered("fit", "block")), m.rank)


@basis("mixed", "steered, FIT", "directions", uses_trained_dW=True)
def steered_fit_cumulative(m: Material) -> Span:
    """Leading right singular vectors of the cumulative difference on FIT prompts, rows of norm 1."""
    return spans.top_eigenvectors(moments.of_rows(m.steered("fit", "cumulative")), m.rank)


def _shared(m: Material, directions: list[Direction]) -> Span:
    found = []
    for one in directions:
        try:
            found.append(moments.written(m.view, one, m.layer, "o", "down"))
        except Unavailable:
            continue
    if not found:
        raise Unavailable("no other family changes a writer of this layer")
    return spans.top_eigenvectors(sum(found[1:], found[0]), m.rank)


@basis("writes", "shared dW", "directions", uses_trained_dW=True)
def shared_dw(m: Material) -> Span:
    """Leading left singular vectors of [dW_o, dW_down] of all families side by side, each of unit norm."""
    if len(m.siblings) < 2:
        raise Unavailable("only one family is given")
    return _shared(m, list(m.siblings.values()))


@basis("writes", "shared dW", "directions", uses_trained_dW=True)
def shared_dw_others(m: Material) -> Span:
    """`shared_dw` of all families but the one that is scored."""
    others = [one for family, one in m.siblings.items() if family != m.trained.family]
    if not others:
        raise Unavailable("only one family is given")
    return _shared(m, others)


# -------------------------------------------------------------------- gradient at the base


def _gradient(m: Material) -> Direction:
    if m.background.gradient is None:
        raise Unavailable("no gradient was computed")
    return m.background.gradient


@basis("writes", "gradient", "gradient")
def gradient_write(m: Material) -> Span:
    """Leading left singular vectors of the persona loss gradient of [W_o, W_down] at the base, unit norm each."""
    return spans.top_eigenvectors(moments.written(m.view, _gradient(m), m.layer, "o", "down"), m.rank)


@basis("reads", "gradient", "gradient")
def gradient_read(m: Material) -> Span:
    """Leading right singular vectors of the persona loss gradient of all readers at the base."""
    return spans.top_eigenvectors(moments.read(m.view, _gradient(m), m.layer), m.rank)


# -------------------------------------------------------------------- ceilings


@basis("writes", "oracle", "directions", uses_trained_dW=True)
def w_oracle(m: Material) -> Span:
    """Leading left singular vectors of [dW_o, dW_down], unit norm each: the best basis for what dW writes."""
    return spans.top_eigenvectors(m.moment("written"), m.rank)


@basis("reads", "oracle", "directions", uses_trained_dW=True)
def read_oracle(m: Material) -> Span:
    """Leading right singular vectors of the dW of all readers: the best basis for what dW reads."""
    return spans.top_eigenvectors(m.moment("read"), m.rank)


@basis("mixed", "oracle", "directions", uses_trained_dW=True)
def act_oracle_block(m: Material) -> Span:
    """Leading right singular vectors of the block difference on EVAL, rows of norm 1: the best basis for it."""
    return spans.top_eigenvectors(m.moment("block"), m.rank)


@basis("mixed", "oracle", "directions", uses_trained_dW=True)
def act_oracle(m: Material) -> Span:
    """Leading right singular vectors of the cumulative difference on EVAL, rows of norm 1: the best basis for it."""
    return spans.top_eigenvectors(m.moment("cumulative"), m.rank)


# -------------------------------------------------------------------- nulls


@basis("mixed", "null", draws=DRAWS)
def random_null(m: Material) -> Span:
    """A uniformly random subspace: energy rank / d on average."""
    return spans.random(m.width, m.rank, m.generator("random"))


@basis("writes", "null", "directions", uses_trained_dW=True, draws=DRAWS)
def null_in_dw(m: Material) -> Span:
    """A uniformly random subspace of the span of [dW_o, dW_down]: knows where dW is, not which of it matters."""
    values, vectors = torch.linalg.eigh(m.moment("written"))
    inside = vectors[:, values > 1e-10 * values[-1]]
    rank = min(m.rank, inside.shape[1])
    return inside @ spans.random(inside.shape[1], rank, m.generator("in dW"))


@basis("mixed", "null", "activations", draws=DRAWS)
def null_activations(m: Material) -> Span:
    """Span of `rank` Gaussian vectors with the covariance of the clean states behind the layer."""
    centred = m.clean - m.clean.mean(dim=0)
    drawn = torch.randn(m.rank, len(centred), generator=m.generator("activations"), dtype=torch.float64)
    return spans.orthonormal((drawn @ centred).T)
