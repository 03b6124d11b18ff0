"""An attention cache for many samples of few prompts, allocated once for whole samples.

The transformers cache is copied for every token, and again whenever rows leave. Here the keys and values of the prompts
are copied once into buffers with room for a whole sample, and each new token is written in place. Finished rows are
removed once they are a quarter of the batch; until then they are computed and ignored.
"""

from __future__ import annotations

from typing import Any

from jaxtyping import Float, Int
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

LEAST_ENDED = 0.25
"""Finished rows are removed once they are this share of the batch."""


def prompt_cache(network: Any, longest: int) -> DynamicCache:
    """An empty cache for prompts; without windows if a sequence of `longest` tokens fits in every attention window."""
    windowed = DynamicCache(config=network.config)
    kinds = {type(layer) for layer in windowed.layers}
    windows = [layer.sliding_window for layer in windowed.layers if isinstance(layer, DynamicSlidingWindowLayer)]
    plain = kinds <= {DynamicLayer, DynamicSlidingWindowLayer} and longest <= min(windows, default=longest)
    return DynamicCache() if plain else windowed


def for_samples(prompts: DynamicCache, owners: Int[Tensor, " rows"], room: int) -> DynamicCache:
    """The cache of the samples, each with room for `room` more tokens; `owners[i]` is the prompt of sample i."""
    if any(type(layer) is not DynamicLayer for layer in prompts.layers):
        prompts.reorder_cache(owners)
        return prompts
    found = DynamicCache()
    while prompts.layers:  # layer by layer, so that the whole cache is never in memory twice
        layer = prompts.layers.pop(0)
        found.layers.append(_RoomyLayer(layer.keys, layer.values, owners, room))
    found.layer_class_to_replicate = None
    return found


class _RoomyLayer(DynamicLayer):
    """Keys and values (rows, heads, tokens, width) at the front of larger buffers."""

    def __init__(
        self,
        keys: Float[Tensor, "prompts heads past width"],
        values: Float[Tensor, "prompts heads past values"],
        owners: Int[Tensor, " rows"],
        room: int,
    ) -> None:
        super().__init__()
        self.dtype, self.device = keys.dtype, keys.device
        self._buffers = [_expanded(one, owners, room) for one in (keys, values)]
        self._length = keys.shape[2]
        self._show(len(owners))
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Append the states of new tokens."""
        rows, end = len(key_states), self._length + key_states.shape[2]
        for buffer, states in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[:rows, :, self._length : end] = states
        self._length = end
        self._show(rows)
        return self.keys, self.values

    def reorder_cache(self, beam_idx: Int[Tensor, " rows"]) -> None:
        """Keep these rows, in this order."""
        # whole rows of a contiguous buffer are copied many times faster than parts of them
        self._buffers = [buffer.index_select(0, beam_idx) for buffer in self._buffers]
        self._show(len(beam_idx))

    def _show(self, rows: int) -> None:
        self.keys, self.values = (buffer[:rows, :, : self._length] for buffer in self._buffers)


def _expanded(states: Tensor, owners: Int[Tensor, " rows"], room: int) -> Tensor:
    _, heads, past, width = states.shape
    buffer = states.new_empty(len(owners), heads, past + room, width)
    buffer[:, :, :past] = states.index_select(0, owners)
    return buffer
