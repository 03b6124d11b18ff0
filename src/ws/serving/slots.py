"""Attention caches in slots: every request in the batch owns one row, of its own length, in buffers shared by all.

A pass covers a run of neighbouring rows. Each token is written at its own position of its row, and a mask shows each
row only its own past, so rows of any lengths share a pass. Active rows are always the first ones: when a request ends,
the last row moves into its place. Positions beyond a row's length hold old numbers that no mask ever shows.

Once per model it is checked that rows of different lengths, continued together, give the logits that each gives alone.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DynamicLayer

from ws.base.errors import UnsupportedFeatureError
from ws.model import architecture
from ws.model.forward import OncePerNetwork
from ws.model.loading import ChatModel

_FIRST_ROOM = 128
_WINDOWED = "sliding_attention"


class States(NamedTuple):
    """Keys and values of the first tokens of a row, (heads, tokens, width) per layer."""

    keys: list[Tensor]
    values: list[Tensor]

    @property
    def nbytes(self) -> int:
        """Size in memory."""
        return sum(one.nbytes for one in (*self.keys, *self.values))


class Slots:
    """`count` rows for up to `longest` tokens each. Buffers grow as rows get longer."""

    def __init__(self, model: ChatModel, count: int, longest: int) -> None:
        self.model, self.count, self.longest = model, count, longest
        self._layers = [_SlotLayer(count) for _ in range(model.layer_count)]
        config = architecture.text_config(model.network)
        self._window = getattr(config, "sliding_window", None)
        whole = "full_attention" if self._window is None else _WINDOWED
        self._kinds = sorted(set(getattr(config, "layer_types", None) or [whole]))

    @torch.no_grad()
    def logits(
        self, first: int, ids: Int[Tensor, "rows tokens"], starts: Int[Tensor, " rows"], lengths: Int[Tensor, " rows"]
    ) -> Float[Tensor, "rows vocabulary"]:
        """Write tokens into the rows from `first` on and return the logits after the last token of each, fp32.

        Row i gets `lengths[i]` tokens (the rest is padding) from position `starts[i]` on; its past is left of that.
        """
        columns = torch.arange(ids.shape[1], device=ids.device)
        positions = starts[:, None] + columns
        reach = int((starts + lengths).max())
        for layer in self._layers:
            layer.begin(first, positions, columns < lengths[:, None], reach, self.longest)
        return self.model.split.logits_at(
            ids, torch.arange(len(ids), device=ids.device), lengths - 1, attention_mask=self._masks(positions, reach),
            position_ids=positions.clamp(max=self.longest - 1), past_key_values=Cache(layers=list(self._layers)),
            use_cache=True,
        )  # fmt: skip

    def move(self, source: int, target: int, tokens: int) -> None:
        """Copy the first tokens of one row into another."""
        for layer in self._layers:
            layer.move(source, target, tokens)

    def read(self, row: int, tokens: int) -> States:
        """A copy of the first tokens of a row."""
        keys, values = zip(*(layer.read(row, tokens) for layer in self._layers), strict=True)
        return States(list(keys), list(values))

    def write(self, row: int, states: States, tokens: int) -> None:
        """Put the first tokens of stored states into a row."""
        for layer, keys, values in zip(self._layers, *states, strict=True):
            layer.write(row, keys[:, :tokens], values[:, :tokens], self.longest)

    def _masks(self, positions: Int[Tensor, "rows tokens"], reach: int) -> Any:
        """What every position may see, as numbers to add to attention scores; by kind of layer if there are several."""
        past = torch.arange(reach, device=positions.device)
        distance = positions[:, :, None] - past
        masks = {kind: self._mask(distance, windowed=kind == _WINDOWED) for kind in self._kinds}
        return masks if len(masks) > 1 else next(iter(masks.values()))

    def _mask(self, distance: Int[Tensor, "rows tokens past"], *, windowed: bool) -> Float[Tensor, "rows 1 tokens p"]:
        seen = distance >= 0
        if windowed and self._window is not None:
            seen &= distance < self._window
        hidden = torch.finfo(self.model.dtype).min
        return torch.where(seen, 0.0, hidden).to(self.model.dtype)[:, None]


class _SlotLayer(DynamicLayer):
    """Keys and values of one layer, (slots, heads, room + 1, width); the last place takes the padding."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count = count
        self._buffers: list[Tensor] = []
        self._room = 0

    def begin(self, first: int, positions: Tensor, real: Tensor, reach: int, longest: int) -> None:
        """Say which rows and positions the next `update` writes, and how far the longest row then reaches."""
        self._first, self._reach, self._longest = first, reach, longest
        self._positions, self._real = positions, real

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Write the states of new tokens; returns those of all tokens of the rows of this pass."""
        self._grow((key_states, value_states), self._reach, self._longest)
        rows = torch.arange(self._first, self._first + len(key_states), device=key_states.device)[:, None]
        places = torch.where(self._real, self._positions, self._room)
        for buffer, states in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[rows, :, places] = states.transpose(1, 2)
        keys, values = (one[self._first : self._first + len(key_states), :, : self._reach] for one in self._buffers)
        return keys, values

    def move(self, source: int, target: int, tokens: int) -> None:
        for buffer in self._buffers:
            buffer[target, :, :tokens] = buffer[source, :, :tokens]

    def read(self, row: int, tokens: int) -> tuple[Tensor, Tensor]:
        keys, values = (buffer[row, :, :tokens].clone() for buffer in self._buffers)
        return keys, values

    def write(self, row: int, keys: Tensor, values: Tensor, longest: int) -> None:
        self._grow((keys[None], values[None]), keys.shape[1], longest)
        for buffer, states in zip(self._buffers, (keys, values), strict=True):
            buffer[row, :, : states.shape[1]] = states

    def get_seq_length(self) -> int:
        """Never asked for positions, which are given; a non-empty past."""
        return self._reach

    def _grow(self, like: tuple[Tensor, Tensor], reach: int, longest: int) -> None:
        if self._buffers and reach <= self._room:
            return
        room = min(longest, max(reach, 2 * self._room, _FIRST_ROOM))
        grown = [one.new_zeros(self.count, one.shape[1], room + 1, one.shape[-1]) for one in like]
        for old, new in zip(self._buffers, grown, strict=False):
            new[:, :, : self._room] = old[:, :, : self._room]
        self._buffers, self._room = grown, room


# -------------------------------------------------------------------- is it exact?


def require_slots(model: ChatModel) -> None:
    """Raise unless rows of different lengths can share a pass on this model and give what each gives alone."""
    if not _is_exact(model):
        raise UnsupportedFeatureError(
            f"{model.name} ({type(model.network).__name__}) cannot answer several requests in one pass exactly",
            "Serve another model; ws export --format merged writes a checkpoint for other servers.",
        )


@torch.no_grad()
def _continues_exactly(model: ChatModel) -> bool:
    count = model.network.get_input_embeddings().weight.shape[0]
    rows = [[(7 * n + 3 + row) % count for n in range(length)] for row, length in enumerate((21, 9, 14))]
    device = model.device
    try:
        slots = Slots(model, 3, 32)
        begun = torch.tensor([12, 4, 9], device=device)
        padded = torch.zeros(3, 12, dtype=torch.long, device=device)
        for row, ids in enumerate(rows):
            padded[row, : begun[row]] = torch.tensor(ids[: begun[row]])
        slots.logits(0, padded, torch.zeros_like(begun), begun)
        rest = torch.zeros(3, 9, dtype=torch.long, device=device)
        lengths = torch.tensor([len(ids) for ids in rows], device=device) - begun
        for row, ids in enumerate(rows):
            rest[row, : lengths[row]] = torch.tensor(ids[begun[row] :])
        found = slots.logits(0, rest, begun, lengths)
    except (TypeError, ValueError, RuntimeError, IndexError, AttributeError, KeyError):
        return False  # a model without such a cache
    tolerance = 1e-4 if model.dtype == torch.float32 else 5e-2
    for ids, logits in zip(rows, found, strict=True):
        alone = model.split.logits_at(
            torch.tensor([ids], device=device), torch.tensor([0], device=device),
            torch.tensor([len(ids) - 1], device=device),
        )[0]  # fmt: skip
        if (logits - alone).abs().max() > tolerance * alone.abs().max().clamp(min=1e-6):
            return False
    return True


_is_exact = OncePerNetwork(_continues_exactly, "rows of different lengths cannot share a pass")
