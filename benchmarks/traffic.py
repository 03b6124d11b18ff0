"""Least bytes that a piece of work moves in any implementation.

Left out everywhere, so that shares of the bandwidth are lower bounds: activations, logits, temporary copies.
"""

from __future__ import annotations

from collections.abc import Sequence

from flops import Matrices

from ws.model import architecture
from ws.model.loading import ChatModel


def generating(
    matrices: Matrices, weight_bytes: int, kv_bytes: int, prompts: Sequence[int], drawn: Sequence[Sequence[int]]
) -> int:
    """Samples after prompts of these lengths, all in one batch; `drawn[i]` are the tokens of the samples of prompt i.

    weights     max(drawn) * weight_bytes * (P_layers + P_head)       once for the prompts, once for each further token
    cache       kv_bytes * sum over samples of (prompt + t), t = 1 .. drawn - 1     read back whole for each of those

    `kv_bytes` are those of one token (`kv_bytes_per_token`). Keys and values of a prompt count once per sample.
    """
    steps = max(max(counts) for counts in drawn)
    read = sum(
        (count - 1) * length + count * (count - 1) // 2
        for length, counts in zip(prompts, drawn, strict=True)
        for count in counts
    )
    return steps * weight_bytes * (sum(matrices.layers) + matrices.head) + kv_bytes * read


def kv_bytes_per_token(model: ChatModel) -> int:
    """2 (keys, values) * layers * kv_heads * head_width * bytes of the dtype."""
    config = architecture.text_config(model.network)
    return 2 * model.layer_count * config.num_key_value_heads * config.head_dim * model.dtype.itemsize


def factors(stored: int) -> int:
    """The difference of two adapters as factors: the `stored` bytes of both are read, and written side by side."""
    return 2 * stored


def dense(stored: int, entries: int) -> int:
    """The difference in full: the adapters are read, and every entry of the changed matrices is written in fp32."""
    return stored + 4 * entries


def checkpoint(stored: int) -> int:
    """W + dW as files: the `stored` bytes of the base are read, and as many are written."""
    return 2 * stored
