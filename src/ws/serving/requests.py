"""What is asked of the engine and what it answers: a Request, and Pieces that make an Answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Literal, NamedTuple

from ws.serving.prefixes import Strengths

Finish = Literal["stop", "length", "cancelled", "error"]
STRONGEST = 1000.0
"""Largest strength of a request; far beyond any use, and far from the limits of the number format."""


@dataclass(frozen=True, eq=False)
class Request:
    """A prompt, its strengths and how to continue it.

    stops: strings that end the answer and are not part of it. ends: token ids that end it (None: the template's).
    seed and key: name the random stream. top: how many likeliest tokens to report with every token (None: no
    log-probabilities). watched: tokens whose log-probabilities after the prompt are reported. continues: the answer is
    spelled as a continuation of the prompt's last word, not as a new message.
    """

    prompt: tuple[int, ...]
    strengths: Strengths = field(default_factory=dict)
    max_tokens: int | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    key: str = ""
    stops: tuple[str, ...] = ()
    ends: frozenset[int] | None = None
    top: int | None = None
    watched: tuple[int, ...] = ()
    continues: bool = False


class Token(NamedTuple):
    """A token of an answer, with its log-probability and the likeliest tokens at its place if they were asked for."""

    id: int
    logprob: float | None = None
    likeliest: tuple[tuple[int, float], ...] = ()


class Piece(NamedTuple):
    """What a round adds to an answer. The last piece has `finish`; after an error, `problem` says which."""

    text: str = ""
    tokens: tuple[Token, ...] = ()
    finish: Finish | None = None
    watched: tuple[float, ...] = ()
    problem: str = ""


class Answer(NamedTuple):
    """A whole answer: its pieces put together. The token that ended it is not among `tokens`."""

    text: str
    tokens: tuple[Token, ...]
    finish: Finish
    watched: tuple[float, ...] = ()
    problem: str = ""

    @classmethod
    def of(cls, pieces: Sequence[Piece]) -> Answer:
        """The answer that these pieces make; the last one must have a finish."""
        finish = pieces[-1].finish
        assert finish is not None
        return cls(
            "".join(piece.text for piece in pieces), tuple(token for piece in pieces for token in piece.tokens),
            finish, pieces[0].watched, pieces[-1].problem,
        )  # fmt: skip


Deliver = Callable[[Piece], None]
"""Receives the pieces of an answer, in the thread of the engine; it must return at once."""


class Ticket:
    """A submitted request. `cancel` frees its row at the next round."""

    def __init__(self, request: Request, deliver: Deliver) -> None:
        self.request, self.deliver = request, deliver
        self.cancelled = False
        self.submitted = perf_counter()

    def cancel(self) -> None:
        """Stop writing the answer; the last piece says `cancelled`."""
        self.cancelled = True
