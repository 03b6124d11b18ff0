"""Finished requests' attention states, kept for prompts that begin alike.

States are functions of the tokens and of the strengths of all directions. They are kept under both, so a conversation
that goes on at another strength starts from its first token: no state of another strength is ever reused. A direction
that is loaded again is another object, hence another key.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ws.algebra.direction import Direction
from ws.serving.slots import States

LEAST_SHARED = 8
"""Tokens that two prompts must share; below it, copying costs more than computing."""

Strengths = Mapping[Direction, float]
"""Strength of every direction of a request."""
Key = frozenset[tuple[Direction, float]]
"""Strengths that are not 0."""


def key_of(strengths: Strengths) -> Key:
    """What states are kept under, besides their tokens."""
    return frozenset((direction, float(alpha)) for direction, alpha in strengths.items() if alpha)


def shared(one: Sequence[int], other: Sequence[int]) -> int:
    """Number of first tokens that are equal."""
    for place, (mine, theirs) in enumerate(zip(one, other, strict=False)):
        if mine != theirs:
            return place
    return min(len(one), len(other))


@dataclass(eq=False)
class _Entry:
    key: Key
    tokens: tuple[int, ...]
    states: States


class Found(NamedTuple):
    """States of another request whose first `tokens` tokens are those of the prompt."""

    states: States
    tokens: int


class Prefixes:
    """States of finished requests, at most `memory` bytes; the least recently used leave first."""

    def __init__(self, memory: int) -> None:
        self.memory = self._left = memory
        self._entries: list[_Entry] = []

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def nbytes(self) -> int:
        """Bytes in use."""
        return self.memory - self._left

    def find(self, prompt: Sequence[int], key: Key) -> Found | None:
        """The longest stored beginning of a prompt at these strengths, at least `LEAST_SHARED` tokens.

        The last token of the prompt is always left to be computed, because its logits are needed.
        """
        own = [entry for entry in self._entries if entry.key == key]
        lengths = [shared(entry.tokens, prompt[:-1]) for entry in own]
        if not lengths or max(lengths) < LEAST_SHARED:
            return None
        best = own[lengths.index(max(lengths))]
        self._entries.remove(best)
        self._entries.append(best)
        return Found(best.states, max(lengths))

    def keep(self, tokens: tuple[int, ...], key: Key, states: States) -> None:
        """Keep the states of a finished request; an entry that they extend is replaced."""
        for entry in [one for one in self._entries if one.key == key and tokens[: len(one.tokens)] == one.tokens]:
            self._drop(entry)
        while self._entries and states.nbytes > self._left:
            self._drop(self._entries[0])
        if states.nbytes <= self._left:
            self._entries.append(_Entry(key, tokens, states))
            self._left -= states.nbytes

    def forget(self, direction: Direction) -> None:
        """Drop everything that was computed with a direction."""
        for entry in [one for one in self._entries if any(direction is used for used, _ in one.key)]:
            self._drop(entry)

    def _drop(self, entry: _Entry) -> None:
        self._entries.remove(entry)
        self._left += entry.states.nbytes
