"""The attention cache of many samples of few prompts: room for every token from the start, rows that leave.

The library's cache is made anew for every token, and once more whenever a row leaves. Here the keys and values of the
prompts are copied once into buffers that hold a whole sample; a token is written where it belongs, and rows that have
ended are taken out a quarter of them at a time (until then they are computed and not looked at).
"""

from __future__ import annotations

from typing import Any

from jaxtyping import Float, Int
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

LEAST_ENDED = 0.25
"""Share of the rows that must have ended before the others move together."""


def prompt_cache(network: Any, longest: int) -> DynamicCache:
    """An empty cache for prompts; plain where no sequence of `longest` tokens reaches beyond an attention window."""
    windowed = DynamicCache(config=network.config)
    kinds = {type(layer) for layer in windowed.layers}
    windows = [layer.sliding_window for layer in windowed.layers if isinstance(layer, DynamicSlidingWindowLayer)]
    plain = kinds <= {DynamicLayer, DynamicSlidingWindowLayer} and longest <= min(windows, default=longest)
    return DynamicCache() if plain else windowed


def for_samples(prompts: DynamicCache, owners: Int[Tensor, " rows"], room: int) -> DynamicCache:
    """The cache of samples, `owners[i]` the prompt of sample i, each with room for `room` more tokens."""
    if any(type(layer) is not DynamicLayer for layer in prompts.layers):
        prompts.reorder_cache(owners)
        return prompts
    found = DynamicCache()
    while prompts.layers:  # layer by layer, so that there is never a second copy of everything
        layer = prompts.layers.pop(0)
        found.layers.append(_RoomyLayer(layer.keys, layer.values, owners, room))
    found.layer_class_to_replicate = None
    return found


class _RoomyLayer(DynamicLayer):
    """Keys and values (rows, heads, tokens, width) in the front of larger buffers."""

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
        """Write the states of new tokens behind the others."""
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
