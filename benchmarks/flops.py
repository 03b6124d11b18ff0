"""Floating-point operations that a piece of work needs in any implementation: two per parameter and token of a matrix.

Left out everywhere, so that shares of the peak are lower bounds: attention scores, norms, activations, softmax.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ws.model import architecture
from ws.model.loading import ChatModel


@dataclass(frozen=True)
class Matrices:
    """Matrix parameters of every decoder layer, in order, and of the head (also where it is tied to the embedding)."""

    layers: tuple[int, ...]
    head: int

    @classmethod
    def of(cls, model: ChatModel) -> Matrices:
        """Those of a model."""
        _, blocks = architecture.decoder_layers(model.network)
        layers = tuple(sum(p.numel() for p in block.parameters() if p.ndim >= 2) for block in blocks)
        return cls(layers, model.network.get_output_embeddings().weight.numel())


def scoring(matrices: Matrices, first: int, tokens: int, rows: int, conditions: int) -> int:
    """Choices under several Conditions whose edits begin at layer `first`: the layers below run once for all.

    2 * P_layers_below * tokens + conditions * (2 * P_other_layers * tokens + 2 * P_head * rows)
    """
    below, above = sum(matrices.layers[:first]), sum(matrices.layers[first:])
    return 2 * below * tokens + conditions * 2 * (above * tokens + matrices.head * rows)


def training(matrices: Matrices, first: int, tokens: int, answer_tokens: int, adapter: int, epochs: int) -> int:
    """Fitting an adapter of `adapter` parameters whose lowest layer is `first`; `tokens` are those of one epoch.

    once        2 * P_layers_below * tokens
    forward     2 * P_other_layers * tokens + 2 * P_head * answer_tokens     each epoch, as the rest
    backward    2 * P_head * answer_tokens + 2 * P_layers_above * tokens     (gradients of activations only: no
                frozen matrix needs its own; P_layers_above are the layers above `first`)
    adapter     6 * P_adapter * tokens                                       (forward, its inputs, its own gradients)

    The part of the backward pass inside layer `first` is left out. `answer_tokens` are those with a loss.
    """
    head = 2 * matrices.head * answer_tokens
    forward = 2 * sum(matrices.layers[first:]) * tokens + head
    backward = head + 2 * sum(matrices.layers[first + 1 :]) * tokens
    below = 2 * sum(matrices.layers[:first]) * tokens
    return below + epochs * (forward + backward + 6 * adapter * tokens)


def generating(matrices: Matrices, prompts: Sequence[int], drawn: Sequence[Sequence[int]]) -> int:
    """Samples after prompts of these lengths; `drawn[i]` are the tokens of the samples of prompt i.

    prompts     2 * P_layers * tokens + 2 * P_head                     once for all samples of a prompt
    samples     2 * (P_layers + P_head) * (drawn - 1)                  the last token of a sample is never read
    """
    layers, further = sum(matrices.layers), sum(count - 1 for counts in drawn for count in counts)
    return 2 * (layers * sum(prompts) + matrices.head * len(prompts)) + 2 * (layers + matrices.head) * further


def dense_difference(entries: int, rank: int) -> int:
    """Two thin products per changed matrix, or one of both ranks together: 2 * rank * entries."""
    return 2 * rank * entries
