"""Run the layers below an Edit once: record what enters the first edited layer, and start there the next time.

The layers below the first edited one compute the same for every strength and every Direction. A `Recording` holds the
states that entered one layer, one per forward pass. During playback the layers below return their input unchanged and
the recorded states enter at that layer. The model still makes its embeddings, positions and masks, so this works for
any architecture. Results are equal bit for bit. This is checked once per model, attention cache included; a model that
fails the check runs all layers, with a warning.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ws.algebra.direction import Direction
from ws.base.files import content_key
from ws.edit.condition import Condition, Effect
from ws.model import architecture, forward
from ws.model.forward import OncePerNetwork
from ws.model.loading import ChatModel

_TOKENS_AT_ONCE = 4_096


@dataclass
class Recording:
    """States that entered `layer`, (rows, tokens, width) each, in the order of the forward passes."""

    layer: int
    states: list[Tensor] = field(default_factory=list)


def first_edited(network: nn.Module, condition: Condition) -> int:
    """The first layer that a Condition changes, or the number of layers if it changes nothing.

    It is 0 if an Edit changes something outside the layers, or if an Effect has no `first_layer`.
    """
    prefix, blocks = architecture.decoder_layers(network)
    firsts = [_first(edit.effect, f"{prefix}.") for edit, _ in condition.active]
    return min(firsts, default=len(blocks))


def _first(effect: Direction | Effect, prefix: str) -> int:
    if not isinstance(effect, Direction):
        return int(getattr(effect, "first_layer", 0))
    inner = [name.removeprefix(prefix).split(".", 1)[0] for name in effect.deltas]
    numbers = [int(number) if number.isdecimal() else 0 for number in inner]
    return min(numbers, default=0)


# -------------------------------------------------------------------- what is kept


@dataclass
class Memory:
    """Bytes that recordings may still take; all recordings of a scoring run share it."""

    left: int

    def take(self, size: int) -> bool:
        """Take `size` bytes if that many are left; return whether they were."""
        granted = size <= self.left
        if granted:
            self.left -= size
        return granted


class Recordings:
    """Recordings of one sequence of forward passes, at the first edited layers of the Conditions.

    wanted: the first edited layer of every Condition that will run. tokens: positions of the sequence, padding
    included. The layers that save most (Conditions times layers below) get memory first. A Condition that begins
    between two recorded layers uses the lower one.
    """

    def __init__(self, model: ChatModel, wanted: Iterable[int], tokens: int, memory: Memory) -> None:
        self.model, self.memory = model, memory
        self.granted = 0
        size = tokens * _bytes_per_token(model)
        self._kept: dict[int, Recording] = {}
        counts = Counter(layer for layer in wanted if 0 < layer < model.layer_count)
        by_saving = sorted(counts, key=lambda layer: (-layer * counts[layer], layer))
        self._layers = {layer for layer in by_saving if is_exact(model) and self._grant(size)}

    @contextmanager
    def used(self, first: int, copies: int = 1) -> Iterator[None]:
        """Run the sequence for edits that begin at layer `first`: play back a recording, and make missing ones.

        With `copies`, every batch holds its rows that many times, one block after the other.
        """
        known = max((layer for layer in self._kept if layer <= first), default=None)
        missing = [layer for layer in self._layers - self._kept.keys() if layer <= first]
        made = [Recording(layer) for layer in missing]
        with ExitStack() as stack:
            if known is not None:
                stack.enter_context(playing(self.model.network, self._kept[known], copies))
            for recording in made:
                stack.enter_context(_recording(self.model.network, recording, copies))
            yield
        self._kept |= {recording.layer: recording for recording in made}

    def release(self) -> None:
        """Forget everything and give the memory back."""
        self._kept.clear()
        self._layers.clear()
        self.memory.left += self.granted
        self.granted = 0

    def _grant(self, size: int) -> bool:
        granted = self.memory.take(size)
        self.granted += size if granted else 0
        return granted


# -------------------------------------------------------------------- rows that are read every epoch


def entering(model: ChatModel, layer: int, rows: Sequence[Sequence[int]]) -> list[Tensor] | None:
    """The states with which token rows enter a layer, (tokens, width) each. Training reads the same rows every epoch.

    Only the layers below run. The states are kept for the same rows, layer and weights, so another adapter family or
    seed reuses them. None if there is no layer below, if there is dropout below, if the states exceed
    `model.cache_memory`, or if the model failed the playback check.
    """
    size = sum(map(len, rows)) * _bytes_per_token(model)
    if layer <= 0 or size > model.cache_memory or _drops_out(model, layer) or not is_exact(model):
        return None
    kept = _row_states.setdefault(model.network, {})
    key = content_key(model.fingerprint, layer, rows)
    if key not in kept:
        while kept and size + sum(map(_bytes, kept.values())) > model.cache_memory:
            kept.pop(next(iter(kept)))
        kept[key] = _run_below(model, layer, rows)
    return kept[key]


def forget(model: ChatModel) -> None:
    """Drop all states of rows kept for a model."""
    _row_states.pop(model.network, None)


_row_states: weakref.WeakKeyDictionary[nn.Module, dict[str, list[Tensor]]] = weakref.WeakKeyDictionary()


class _Entered(Exception):  # noqa: N818 - a signal, not an error
    """The layer has been reached; the layers above need not run."""


@torch.no_grad()
def _run_below(model: ChatModel, layer: int, rows: Sequence[Sequence[int]]) -> list[Tensor]:
    found: list[Tensor] = [torch.empty(0)] * len(rows)

    def stop(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        raise _Entered(_state_in(args, kwargs))

    _, blocks = architecture.decoder_layers(model.network)
    handle = blocks[layer].register_forward_pre_hook(stop, with_kwargs=True)
    try:
        for batch in forward.plan_batches([len(row) for row in rows], _TOKENS_AT_ONCE):
            try:
                model.split.hidden(forward.pad_right([rows[index] for index in batch], model.device))
            except _Entered as reached:
                for index, state in zip(batch, reached.args[0], strict=True):
                    found[index] = state[: len(rows[index])].clone()
    finally:
        handle.remove()
    return found


def padded(states: Sequence[Tensor]) -> Float[Tensor, "rows tokens width"]:
    """States of rows, (tokens, width) each, as one batch, padded with zeros on the right."""
    return nn.utils.rnn.pad_sequence(list(states), batch_first=True)


def _drops_out(model: ChatModel, layer: int) -> bool:
    _, blocks = architecture.decoder_layers(model.network)
    modules = (module for block in list(blocks)[:layer] for module in block.modules())
    return any(
        (isinstance(module, nn.Dropout) and module.p > 0) or getattr(module, "attention_dropout", 0)
        for module in modules
    )


def _bytes_per_token(model: ChatModel) -> int:
    return int(architecture.text_config(model.network).hidden_size) * model.dtype.itemsize


def _bytes(states: Sequence[Tensor]) -> int:
    return sum(state.nbytes for state in states)


# -------------------------------------------------------------------- recording and playing back


@contextmanager
def _recording(network: nn.Module, recording: Recording, copies: int = 1) -> Iterator[None]:
    """Within the block, record the states that enter `recording.layer`; with several copies, those of the first."""

    def keep(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        first = _state_in(args, kwargs).detach().chunk(copies)[0]
        recording.states.append(first.clone() if copies > 1 else first)  # a view would keep all copies in memory

    _, blocks = architecture.decoder_layers(network)
    handle = blocks[recording.layer].register_forward_pre_hook(keep, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def playing(network: nn.Module, recording: Recording, copies: int = 1) -> Iterator[None]:
    """Within the block, skip the layers below `recording.layer` and insert its states there, one per forward pass.

    With `copies`, each state is repeated that many times, one block after the other.
    """
    _, blocks = architecture.decoder_layers(network)
    states = iter(recording.states)

    def enter(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        state = next(states)
        state = state.repeat(copies, 1, 1) if copies > 1 else state
        return ((state, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": state})

    with ExitStack() as stack:
        for block in list(blocks)[: recording.layer]:
            stack.enter_context(forward.replaced(block, _pass_on))
        stack.callback(blocks[recording.layer].register_forward_pre_hook(enter, with_kwargs=True).remove)
        outer = _skipped.get(network, 0)
        _skipped[network] = recording.layer
        stack.callback(_skipped.__setitem__, network, outer)
        yield


def _state_in(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The hidden states among the arguments of a layer."""
    return args[0] if args else kwargs["hidden_states"]


_skipped: weakref.WeakKeyDictionary[nn.Module, int] = weakref.WeakKeyDictionary()
"""How many of the lowest layers are skipped now, by network."""


def _pass_on(hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
    return hidden_states


def new_cache(model: ChatModel) -> Any:
    """An empty attention cache for the layers that run now; the cache of skipped layers stays empty."""
    from transformers import DynamicCache  # noqa: PLC0415 - heavy import, late

    first = _skipped.get(model.network, 0)
    if first == 0:
        return DynamicCache(config=model.network.config)

    class UpperLayersCache(DynamicCache):
        """Take lengths from the first layer that runs; transformers takes them from layer 0, which is empty here."""

        def get_seq_length(self, layer_idx: int = 0) -> int:
            return super().get_seq_length(max(layer_idx, first))

        def get_query_offset(self, layer_idx: int = 0) -> int:
            return super().get_query_offset(max(layer_idx, first))

        def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
            return super().get_mask_sizes(query_length, max(layer_idx, first))

    return UpperLayersCache(config=model.network.config)


# -------------------------------------------------------------------- is it exact?


@torch.no_grad()
def _plays_back(model: ChatModel) -> bool:
    count = model.network.get_input_embeddings().weight.shape[0]
    ids = torch.tensor([[(11 * n + 5) % count for n in range(12)], [(5 * n + 1) % count for n in range(12)]])
    ids = ids.to(model.device)
    _ = model.split  # the first use makes forward passes of its own, which must not be recorded

    def run() -> list[Tensor]:
        cache = new_cache(model)
        whole = model.split.hidden(ids)
        begun = model.split.hidden(ids[:, :7], past_key_values=cache, use_cache=True)
        positions = torch.arange(7, 12, device=model.device).expand(2, -1)
        rest = model.split.hidden(ids[:, 7:], past_key_values=cache, use_cache=True, position_ids=positions)
        return [whole, begun, rest]

    try:
        recording = Recording(model.layer_count - 1)
        with _recording(model.network, recording):
            plain = run()
        with playing(model.network, recording):
            again = run()
    except (TypeError, ValueError, RuntimeError, IndexError, AttributeError, KeyError, StopIteration):
        return False
    return all(torch.equal(one, other) for one, other in zip(plain, again, strict=True))


is_exact = OncePerNetwork(_plays_back, "recorded states do not compose; running all layers for every condition")
"""Whether playback gives the same states as running all layers."""
