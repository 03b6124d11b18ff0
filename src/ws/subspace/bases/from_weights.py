"""Bases from the pretrained weights alone. R: readers, W: writers, U: unembedding, each with its norm folded in.

The unembedding, read and write families follow the replicated work's catalogue; sums of projectors are those of
AntiPaSTO (Clark, 2601.07473), where every module votes equally however large its matrix is.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ws.subspace import spans
from ws.subspace.bases.registry import Material, basis
from ws.subspace.spans import Span
from ws.subspace.weights import Unavailable

# -------------------------------------------------------------------- what several bases share


def read_gram(m: Material, layer: int) -> Tensor:
    """Sum of R'R over the readers of a layer; kept, because bases of all layers add them up."""

    def make() -> Tensor:
        weights = m.view.layer(layer)
        if not weights.readers:
            raise Unavailable(f"no reader of layer {layer} has a known role")
        rows = weights.reads(*weights.readers)
        return rows.T @ rows

    return m.background.once(("read gram", layer), make)


def write_gram(m: Material, layer: int) -> Tensor:
    """Sum of W W' over the writers of a layer."""

    def make() -> Tensor:
        weights = m.view.layer(layer)
        if not weights.writers:
            raise Unavailable(f"no writer of layer {layer} has a known role")
        columns = weights.writes(*weights.writers)
        return columns @ columns.T

    return m.background.once(("write gram", layer), make)


def total_read(m: Material, after: int = -1) -> Tensor:
    """Sum of R'R over all layers above `after`, plus U'U."""
    return sum((read_gram(m, layer) for layer in range(after + 1, m.view.layer_count)), m.view.head_gram)


def top(m: Material, name: str, gram: Tensor, k: int) -> Span:
    """Leading eigenvectors, decomposed once for all layers that use this name."""
    values, vectors = m.background.once(("eigen", name), lambda: torch.linalg.eigh(gram))
    return vectors.flip(1)[:, : min(k, int((values > 0).sum()))]


def broad_unembedding(m: Material) -> Span:
    """The broad subspace that the unembedding reads."""
    return top(m, "head", m.view.head_gram, m.broad)


def writers(m: Material) -> Tensor:
    """[W_o, W_down] of the layer."""
    return m.weights.writes("o", "down")


def _projectors(m: Material, matrices: list[Tensor]) -> Span:
    """Leading eigenvectors of the sum of `V_k V_k'` over modules, V_k: the k leading singular vectors of each."""
    votes = [spans.left(one, m.broad) for one in matrices]
    return spans.top_eigenvectors(sum((v @ v.T for v in votes[1:]), votes[0] @ votes[0].T), m.rank)


# -------------------------------------------------------------------- unembedding


@basis("reads", "unembedding")
def lm_head_read(m: Material) -> Span:
    """Leading right singular vectors of U: what the logits read."""
    return top(m, "head", m.view.head_gram, m.rank)


@basis("reads", "unembedding")
def logits_null(m: Material) -> Span:
    """Last right singular vectors of U: the weak readout, which moves the logits least."""
    _, vectors = m.background.once(("eigen", "head"), lambda: torch.linalg.eigh(m.view.head_gram))
    return vectors[:, : m.rank]


# -------------------------------------------------------------------- reads


@basis("reads", "read")
def global_read(m: Material) -> Span:
    """Leading eigenvectors of the sum of R'R over all layers and readers, plus U'U."""
    return top(m, "global read", total_read(m), m.rank)


@basis("reads", "read")
def mlp_up_read(m: Material) -> Span:
    """Leading right singular vectors of W_up."""
    return spans.right(m.weights.reads("up"), m.rank)


@basis("reads", "read")
def mlp_gate_read(m: Material) -> Span:
    """Leading right singular vectors of W_gate."""
    return spans.right(m.weights.reads("gate"), m.rank)


@basis("reads", "read")
def attn_qkv_read(m: Material) -> Span:
    """Leading right singular vectors of [W_q; W_k; W_v]."""
    return spans.right(m.weights.reads("q", "k", "v"), m.rank)


@basis("reads", "read")
def input_super(m: Material) -> Span:
    """Leading right singular vectors of all readers of the layer, one above the other."""
    return spans.top_eigenvectors(read_gram(m, m.layer), m.rank)


@basis("reads", "read")
def kv_super(m: Material) -> Span:
    """Leading right singular vectors of [W_k; W_v]."""
    return spans.right(m.weights.reads("k", "v"), m.rank)


@basis("reads", "read")
def input_super_not_lm_read(m: Material) -> Span:
    """`input_super`, projected away from the broad readout of U."""
    return spans.project_away(input_super(m), broad_unembedding(m))


@basis("reads", "read")
def read_projectors(m: Material) -> Span:
    """Leading eigenvectors of the sum of the projectors on what each reader of the layer reads (AntiPaSTO `read`)."""
    return _projectors(m, [m.weights.reads(role).T for role in m.weights.readers])


# -------------------------------------------------------------------- writes


@basis("writes", "write")
def global_write(m: Material) -> Span:
    """Leading left singular vectors of [W_o, W_down] of all layers, side by side."""
    total = sum((write_gram(m, layer) for layer in range(1, m.view.layer_count)), write_gram(m, 0))
    return top(m, "global write", total, m.rank)


@basis("writes", "write")
def write(m: Material) -> Span:
    """Leading left singular vectors of [W_o, W_down]."""
    return spans.left(writers(m), m.rank)


@basis("writes", "write")
def attn_write(m: Material) -> Span:
    """Leading left singular vectors of W_o."""
    return spans.left(m.weights.writes("o"), m.rank)


@basis("writes", "write")
def mlp_write(m: Material) -> Span:
    """Leading left singular vectors of W_down."""
    return spans.left(m.weights.writes("down"), m.rank)


@basis("writes", "write")
def weak_write(m: Material) -> Span:
    """Last left singular vectors of [W_o, W_down]: where the pretrained layer writes least."""
    return spans.last_eigenvectors(write_gram(m, m.layer), m.rank)


@basis("writes", "write")
def write_projectors(m: Material) -> Span:
    """Leading eigenvectors of the sum of the projectors on what each writer of the layer writes (AntiPaSTO `write`)."""
    return _projectors(m, [m.weights.writes(role) for role in m.weights.writers])


# -------------------------------------------------------------------- written, but not read


@basis("writes", "write, not read")
def write_not_lm_head_read(m: Material) -> Span:
    """Leading left singular vectors of [W_o, W_down] after the broad readout of U is projected out."""
    return spans.left_away(writers(m), broad_unembedding(m), m.rank)


@basis("writes", "write, not read")
def write_not_global_read(m: Material) -> Span:
    """Leading left singular vectors of [W_o, W_down] after the broad `global_read` is projected out."""
    return spans.left_away(writers(m), top(m, "global read", total_read(m), m.broad), m.rank)


@basis("writes", "write, not read")
def write_not_downstream_read(m: Material) -> Span:
    """Leading left singular vectors of [W_o, W_down] without what later layers and U read most."""
    downstream = spans.top_eigenvectors(total_read(m, m.layer), m.broad)
    return spans.left_away(writers(m), downstream, m.rank)


@basis("writes", "write, not read")
def global_write_not_global_read(m: Material) -> Span:
    """Leading left singular vectors of the writers of all layers after the broad `global_read` is projected out."""

    def make() -> Span:
        total = sum((write_gram(m, layer) for layer in range(1, m.view.layer_count)), write_gram(m, 0))
        away = top(m, "global read", total_read(m), m.broad)
        rest = torch.eye(m.width, dtype=torch.float64) - away @ away.T
        return spans.top_eigenvectors(rest @ total @ rest, m.rank)

    return m.background.once(("global write, not read", m.rank), make)


@basis("writes", "write, not read")
def causally_isolated(m: Material) -> Span:
    """[W_o, W_down] without what the layer itself, its keys and values, and the broad U read."""
    away = spans.union(input_super(m), kv_super(m), broad_unembedding(m))
    return spans.left_away(writers(m), away, m.rank)


@basis("writes", "write, not read")
def write_not_own_read(m: Material) -> Span:
    """`write_projectors`, projected away from `read_projectors` (AntiPaSTO `write_not_read`)."""
    return spans.project_away(write_projectors(m), read_projectors(m))


@basis("writes", "write, not read")
def write_x_notlogits(m: Material) -> Span:
    """`write_projectors`, projected away from the broad readout of U (AntiPaSTO)."""
    return spans.project_away(write_projectors(m), broad_unembedding(m))


# -------------------------------------------------------------------- circuits


@basis("reads", "QK")
def qk_circuit(m: Material) -> Span:
    """Leading left singular vectors of the sum over heads of W_q' W_k, keys repeated per head block."""
    return spans.left(m.weights.heads.qk.sum(dim=0), m.rank)


@basis("reads", "QK")
def qk_heads(m: Material) -> Span:
    """Leading left singular vectors of the W_q' W_k of all heads side by side: no two heads cancel."""
    return spans.left(m.weights.heads.qk.movedim(0, 1).flatten(1), m.rank)


@basis("writes", "OV")
def attn_ov_write(m: Material) -> Span:
    """Leading left singular vectors of the sum over heads of W_o W_v, values repeated per head block."""
    return spans.left(m.weights.heads.ov.sum(dim=0), m.rank)


@basis("writes", "OV")
def ov_heads(m: Material) -> Span:
    """Leading left singular vectors of the W_o W_v of all heads side by side: no two heads cancel."""
    return spans.left(m.weights.heads.ov.movedim(0, 1).flatten(1), m.rank)


@basis("writes", "OV")
def attention_sink(m: Material) -> Span:
    """Span over heads of W_o W_v e, e: the embedding with which every prompt begins, scaled to norm sqrt(d)."""
    start = m.view.embedding(m.background.first_token)
    start = start * (m.width**0.5 / start.norm())
    return spans.right(m.weights.heads.ov @ start, m.rank)


@basis("writes", "MLP")
def mlp_roundtrip_write(m: Material) -> Span:
    """Leading left singular vectors of W_down W_up."""
    return spans.left(m.weights.writes("down") @ m.weights.reads("up"), m.rank)
