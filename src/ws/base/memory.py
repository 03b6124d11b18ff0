"""When the memory of the machine or of its accelerator is exhausted: go on with half of the batch, and say so."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from ws.base import console

T = TypeVar("T")
SMALLEST = 64
"""Tokens per batch that are not halved further: single rows are longer."""
_SIGNS = ("out of memory", "not enough memory", "can't allocate memory", "Cannot allocate memory")
"""Words in the RuntimeError that PyTorch raises, on CPUs and accelerators."""


def is_exhausted(error: BaseException) -> bool:
    """Whether an exception says that no memory is left."""
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SIGNS)
    )


def halving(tokens: int, what: str, work: Callable[[int], T]) -> T:
    """`work(tokens)`; if memory runs out, again with half as many tokens, until it fits or batches are tiny.

    `work` must be able to start again. Results may then differ by rounding, as with any other batch size.
    """
    while True:
        try:
            return work(tokens)
        except (MemoryError, RuntimeError) as error:
            if tokens <= SMALLEST or not is_exhausted(error):
                raise
        # outside of the handler, so that the failed attempt no longer holds its tensors
        tokens //= 2
        console.warn(f"not enough memory for {what} of {2 * tokens} tokens: going on with {tokens}")
