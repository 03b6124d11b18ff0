"""Attention that reads grouped keys and values in place. It is faster than the library's eager form on a CPU.

    scores = scaling * q k^T + mask        out = softmax(scores) v        softmax in fp32

If several query heads share a key-value head, the eager form first copies keys and values once per query head. With a
cache, these copies are most of the memory traffic. Here the query heads of a group are rows of one product, and
scaling and mask are added in place. The result is the same up to rounding. Every loaded model is checked against the
library's eager form, which stays in use if the two differ (attention sinks, position biases).
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ws.base import console

EAGER, GROUPED = "eager", "grouped"
_PROBE_TOKENS = 16


def grouped(
    module: nn.Module,
    query: Float[Tensor, "rows heads tokens width"],
    key: Float[Tensor, "rows groups past width"],
    value: Float[Tensor, "rows groups past values"],
    attention_mask: Float[Tensor, "rows_or_1 1 tokens longest"] | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Float[Tensor, "rows tokens heads values"], Float[Tensor, "rows heads tokens past"]]:
    """The attention function that transformers calls: output and weights. Query heads of a group are adjacent."""
    rows, heads, tokens, width = query.shape
    groups, past = key.shape[1], key.shape[2]
    merged = query.reshape(rows * groups, -1, width)
    keys, values = (one.reshape(rows * groups, past, -1) for one in (key, value))
    factor = width**-0.5 if scaling is None else scaling
    scores = torch.baddbmm(merged.new_empty(()), merged, keys.mT, beta=0, alpha=factor)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.view(rows, groups, -1, tokens, past)
    if attention_mask is not None:
        scores += attention_mask[:, :, None, :, :past]
    weights = nn.functional.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    mixed = torch.bmm(weights.view(rows * groups, -1, past), values).view(rows, heads, tokens, -1)
    return mixed.transpose(1, 2).contiguous(), weights.view(rows, heads, tokens, past)


@cache
def register() -> None:
    """Make the grouped form known to transformers, in this process."""
    from transformers import AttentionInterface, AttentionMaskInterface  # noqa: PLC0415 - heavy import, late
    from transformers.masking_utils import eager_mask  # noqa: PLC0415

    AttentionInterface.register(GROUPED, grouped)
    AttentionMaskInterface.register(GROUPED, eager_mask)


@torch.no_grad()
def use_grouped(network: Any) -> bool:
    """Switch a network from eager attention to the grouped form, unless its outputs change; whether it did."""
    register()
    before = _outputs(network)
    with console.library_noise_muted():
        network.set_attn_implementation(GROUPED)
    try:
        after = _outputs(network)
    except (TypeError, ValueError, RuntimeError, IndexError, AttributeError):
        after = None
    tolerance = 1e-4 if network.dtype == torch.float32 else 5e-2
    if after is not None and (after - before).abs().max() <= tolerance * before.abs().max().clamp(min=1e-6):
        return True
    with console.library_noise_muted():
        network.set_attn_implementation(EAGER)
    return False


def _outputs(network: Any) -> Tensor:
    """Logits of the last position of two rows, one of them padded on the left."""
    embedding = network.get_input_embeddings().weight
    ids = (7 * torch.arange(2 * _PROBE_TOKENS, device=embedding.device) + 3).view(2, -1) % len(embedding)
    mask = torch.ones_like(ids)
    mask[1, : _PROBE_TOKENS // 4] = 0
    return network(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, -1].float()
