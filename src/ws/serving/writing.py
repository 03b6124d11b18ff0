"""Text from tokens, one at a time: only whole characters leave, and nothing that may still become a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokenizers.decoders import DecodeStream

CONTEXT = 8
"""Last tokens of a prompt that decide how the first token of its continuation is spelled (spaces)."""


class Writing:
    """The text of an answer as it is written. It ends before the first of the stop strings, if one appears.

    `before`: tokens that the answer continues. All pieces together are `text`.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str] = (), before: Sequence[int] = ()) -> None:
        self.stopped = False
        self._tokenizer, self._stops, self._before = tokenizer, stops, list(before)
        self._stream = DecodeStream(skip_special_tokens=True)
        for token in before:
            self._stream.step(tokenizer.backend_tokenizer, token)
        self._ids: list[int] = []
        self._text = ""
        self._given = 0

    def add(self, token: int) -> str:
        """The text that is certain after one more token and was not before."""
        self._ids.append(token)
        self._text += self._stream.step(self._tokenizer.backend_tokenizer, token) or ""
        return self._certain()

    def end(self) -> str:
        """The rest of the text, if no token follows. Half a character becomes a replacement mark."""
        given = self._given
        if not self.stopped:
            whole = self._decoded([*self._before, *self._ids])[len(self._decoded(self._before)) :]
            if whole.startswith(self._text):
                self._text = whole
            self._certain()
        self._given = len(self._text)
        return self._text[given:]

    def _decoded(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.backend_tokenizer.decode(list(ids), skip_special_tokens=True))

    def _certain(self) -> str:
        found = [place for stop in self._stops if (place := self._text.find(stop)) >= 0]
        if found:
            self._text, self.stopped = self._text[: min(found)], True
        certain = len(self._text) if self.stopped else len(self._text) - self._pending()
        piece = self._text[self._given : certain]
        self._given = max(self._given, certain)
        return piece

    def _pending(self) -> int:
        """Characters at the end that may be the beginning of a stop string."""
        return max(
            (length for stop in self._stops for length in range(1, len(stop)) if self._text.endswith(stop[:length])),
            default=0,
        )
