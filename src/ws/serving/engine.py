"""Answer many requests at once, each at its own strengths: continuous batching over slotted caches.

One round:  drop what was cancelled -> admit waiting requests into free rows (one pass over their prompts) -> one pass
            that gives every active row its next token

Requests join and leave between rounds. The rows of a pass may have any mix of directions (`Dial`), so requests of
different strengths share it. Greedy answers, and sampled ones with a seed, do not depend on what else is in the batch,
up to the order of floating-point sums. The engine runs in one thread of its own; `submit` and `cancel` may be called
from any thread.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from queue import SimpleQueue
from time import perf_counter
from types import TracebackType
from typing import get_args

import torch
from jaxtyping import Float
from torch import Tensor

from ws.algebra.direction import Direction
from ws.base.errors import UserError
from ws.edit.dial import Dial, require_turnable
from ws.measure.generate import Sampling, draw, uniforms
from ws.model import architecture
from ws.model.loading import ChatModel
from ws.serving.prefixes import LEAST_SHARED, Prefixes, Strengths, key_of, shared
from ws.serving.requests import STRONGEST, Answer, Deliver, Finish, Piece, Request, Ticket, Token
from ws.serving.slots import Slots, require_slots
from ws.serving.writing import CONTEXT, Writing

PROMPT_TOKENS = 1024
"""Most prompt tokens (padding included) of one pass, so that running answers never wait long for a new prompt."""
LONGEST = 4096
"""Most tokens of prompt and answer, if the model allows more."""
LEAST_LOGPROB = -9999.0
"""What a log-probability of minus infinity is told as, because JSON has no infinity."""


@dataclass
class Counts:
    """What the engine has done since it started; for `/metrics`."""

    requests: dict[Finish, int] = field(default_factory=lambda: dict.fromkeys(get_args(Finish), 0))
    prompt_tokens: int = 0
    reused_tokens: int = 0
    written_tokens: int = 0
    rounds: int = 0
    rows: int = 0
    first_token_seconds: float = 0.0
    first_tokens: int = 0


FAILURES = (ArithmeticError, LookupError, MemoryError, RuntimeError, TypeError, ValueError, UserError)
"""What a pass through the model can raise. The requests in flight get it as their problem."""


class _Row:
    """An active request: its tokens so far, and how many of them are in the cache."""

    def __init__(self, ticket: Ticket, model: ChatModel, limit: int) -> None:
        request = ticket.request
        self.ticket, self.request, self.limit = ticket, request, limit
        self.key = key_of(request.strengths)
        self.tokens = list(request.prompt)
        self.cached = 0
        self.ends = model.chat.stop_ids if request.ends is None else request.ends
        before = request.prompt[-CONTEXT:] if request.continues else ()
        self.writing = Writing(model.chat.tokenizer, request.stops, before)
        random = request.temperature > 0
        self.uniforms = uniforms(request.key, request.seed, limit).tolist() if random else [0.0] * limit
        self.sampling = Sampling(1, request.temperature, request.top_p if random else 1.0)

    @property
    def written(self) -> int:
        return len(self.tokens) - len(self.request.prompt)


class Engine:
    """Serves one model with `slots` rows of at most `longest` tokens. Use as a context manager; it starts a thread.

    memory: bytes for the states of finished requests, which prompts that begin alike reuse. 0: nothing is reused; None:
    `model.cache_memory`.
    """

    def __init__(
        self, model: ChatModel, *, slots: int = 32, longest: int | None = None, memory: int | None = None
    ) -> None:
        if slots < 1:
            raise UserError(f"--slots is {slots}", "Give 1 or more.")
        require_slots(model)
        most = _most_tokens(model)
        if longest is not None and not 2 <= longest <= most:
            raise UserError(f"--context is {longest}; {model.name} reads up to {most} tokens", f"Give 2 to {most}.")
        self.model = model
        self.longest = longest or min(most, LONGEST)
        self.counts = Counts()
        self._slots = Slots(model, slots, self.longest)
        self._prefixes = Prefixes(model.cache_memory if memory is None else memory)
        self._reuses = self._prefixes.memory > 0
        self._rows: list[_Row] = []
        self._waiting: deque[Ticket] = deque()
        self._forgotten: deque[Direction] = deque()
        self._known: set[Direction] = set()
        self._mounted: dict[Direction, int] = {}
        self._dial: Dial | None = None
        self._changed = threading.Condition()
        self._closing = False
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Engine:
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        with self._changed:
            self._closing = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.join()

    # ---------------------------------------------------------------- for any thread

    @property
    def active(self) -> int:
        """Requests that are being answered."""
        return len(self._rows)

    @property
    def waiting(self) -> int:
        """Requests that wait for a row."""
        return len(self._waiting)

    @property
    def kept_bytes(self) -> int:
        """Bytes of kept states of finished requests."""
        return self._prefixes.nbytes

    def submit(self, request: Request, deliver: Deliver) -> Ticket:
        """Queue a request; `deliver` gets the pieces of its answer. Raises `UserError` for one that cannot be met."""
        self._require_answerable(request)
        ticket = Ticket(request, deliver)
        with self._changed:
            if self._closing:
                raise UserError("the engine is closed", "Start the server again.")
            self._waiting.append(ticket)
            self._changed.notify()
        return ticket

    def stream(self, request: Request) -> Iterator[Piece]:
        """The pieces of an answer as they are written. Leaving the loop early cancels the request."""
        pieces: SimpleQueue[Piece] = SimpleQueue()
        ticket = self.submit(request, pieces.put)
        try:
            while True:
                piece = pieces.get()
                yield piece
                if piece.finish is not None:
                    return
        finally:
            ticket.cancel()

    def answer(self, request: Request) -> Answer:
        """The whole answer; waits for it."""
        return Answer.of(list(self.stream(request)))

    def forget(self, direction: Direction) -> None:
        """Drop what is kept of a direction that nobody will ask for again. Running requests keep it to their end."""
        self._known.discard(direction)
        with self._changed:
            self._forgotten.append(direction)
            self._changed.notify()

    def _require_answerable(self, request: Request) -> None:
        limit, room = request.max_tokens, self.longest - len(request.prompt)
        if not request.prompt:
            raise UserError("the prompt is empty", "Give at least one token.")
        if room < 1 or (limit is not None and limit > room):
            asked = f"{len(request.prompt)} tokens of prompt" + (f" and {limit} of answer" if limit else "")
            raise ContextError(f"the context holds {self.longest} tokens, but {asked} were asked for", "Shorten them.")
        if limit is not None and limit < 1:
            raise UserError(f"max_tokens is {limit}", "Give 1 or more.")
        for direction, alpha in request.strengths.items():
            if not abs(alpha) <= STRONGEST:
                raise UserError(f"a strength is {alpha}", f"Give a number from {-STRONGEST:g} to {STRONGEST:g}.")
            if direction not in self._known:
                require_turnable(self.model, direction)
                self._known.add(direction)

    # ---------------------------------------------------------------- the thread of the engine

    def _run(self) -> None:
        while True:
            with self._changed:
                while not (self._closing or self._rows or self._waiting or self._forgotten):
                    self._changed.wait()
                if self._closing:
                    break
            try:
                self.round()
            except FAILURES as error:  # a bug or no memory: those in flight fail, the engine goes on
                self._fail(f"{type(error).__name__}: {error}")
        self._fail("the engine was closed")
        if self._dial is not None:
            self._dial.remove()

    @torch.no_grad()
    def round(self) -> None:
        """One round; see the module's description."""
        while self._forgotten:
            self._drop(self._forgotten.popleft())
        for row in [row for row in self._rows if row.ticket.cancelled]:
            self._end(row, "cancelled")
        self._admit()
        if self._rows:
            self._go_on()

    def _drop(self, direction: Direction) -> None:
        """Forget what was computed with a direction, and take it off the model unless a running request has it."""
        self._prefixes.forget(direction)
        if direction in self._mounted and not any(direction in row.request.strengths for row in self._rows):
            assert self._dial is not None
            self._dial.remove()
            self._dial, self._mounted = None, {}

    def _admit(self) -> None:
        free = self._slots.count - len(self._rows)
        chosen: list[_Row] = []
        held: list[Ticket] = []
        width = 0
        while self._waiting and len(chosen) < free:
            ticket = self._waiting.popleft()
            if ticket.cancelled:
                self._close(ticket, Piece(finish="cancelled"))
                continue
            request = ticket.request
            row = _Row(ticket, self.model, request.max_tokens or self.longest - len(request.prompt))
            wider = max(width, len(row.tokens))
            if chosen and (len(chosen) + 1) * wider > PROMPT_TOKENS:
                held.append(ticket)
                break
            if self._reuses and any(
                one.key == row.key and shared(one.tokens, row.tokens) >= LEAST_SHARED for one in chosen
            ):
                held.append(ticket)  # the next round copies the states of the one that is chosen now
                continue
            chosen.append(row)
            width = wider
        self._waiting.extendleft(reversed(held))
        if not chosen:
            return
        first = len(self._rows)
        for place, row in enumerate(chosen, start=first):
            row.cached = self._begun(row, place)
            self.counts.prompt_tokens += len(row.tokens)
            self.counts.reused_tokens += row.cached
        self._rows.extend(chosen)
        self._take(chosen, self._pass(first, [row.tokens[row.cached :] for row in chosen]))

    def _begun(self, row: _Row, place: int) -> int:
        """Copy the states of the longest known beginning of the prompt into a row; how many tokens that is."""
        if not self._reuses:
            return 0
        stored = self._prefixes.find(row.tokens, row.key)
        best, source = (0 if stored is None else stored.tokens), None
        for number, other in enumerate(self._rows):
            if other.key == row.key:
                common = min(shared(other.tokens[: other.cached], row.tokens), len(row.tokens) - 1)
                if common >= max(LEAST_SHARED, best + 1):
                    best, source = common, number
        if source is not None:
            self._slots.move(source, place, best)
        elif stored is not None:
            self._slots.write(place, stored.states, best)
        return best

    def _go_on(self) -> None:
        self.counts.rounds += 1
        self.counts.rows += len(self._rows)
        self._take(list(self._rows), self._pass(0, [row.tokens[-1:] for row in self._rows]))

    def _pass(self, first: int, texts: Sequence[Sequence[int]]) -> Float[Tensor, "rows vocabulary"]:
        """Logits after these tokens, which continue the rows from `first` on."""
        device = self.model.device
        rows = self._rows[first : first + len(texts)]
        width = max(map(len, texts))
        ids = torch.tensor([[*text, *[0] * (width - len(text))] for text in texts], device=device)
        starts = torch.tensor([row.cached for row in rows], device=device)
        lengths = torch.tensor([len(text) for text in texts], device=device)
        self._turn([row.request.strengths for row in rows])
        logits = self._slots.logits(first, ids, starts, lengths)
        for row, text in zip(rows, texts, strict=True):
            row.cached += len(text)
        return logits

    def _turn(self, strengths: Sequence[Strengths]) -> None:
        used = {direction for row in strengths for direction, alpha in row.items() if alpha}
        if not used <= self._mounted.keys():
            if self._dial is not None:
                self._dial.remove()
            running = [row.request.strengths for row in self._rows]
            order = dict.fromkeys(direction for row in running for direction, alpha in row.items() if alpha)
            self._dial = Dial(self.model, list(order))
            self._mounted = {direction: number for number, direction in enumerate(order)}
        if self._dial is not None:
            numbers = [[0.0] * len(self._mounted) for _ in strengths]
            for of_row, row in zip(numbers, strengths, strict=True):
                for direction, alpha in row.items():
                    if alpha:
                        of_row[self._mounted[direction]] = alpha
            self._dial.turn(torch.tensor(numbers, dtype=torch.float32, device=self.model.device))

    def _take(self, rows: Sequence[_Row], logits: Float[Tensor, "rows vocabulary"]) -> None:
        """Choose the next token of every row and deliver it."""
        chosen = self._drawn(rows, logits)
        told = [number for number, row in enumerate(rows) if row.request.top is not None or row.request.watched]
        logprobs = dict(zip(told, torch.log_softmax(logits[told], dim=-1), strict=True)) if told else {}
        ended: list[tuple[_Row, Finish, Piece]] = []
        for number, (row, token) in enumerate(zip(rows, chosen, strict=True)):
            of_row, first = logprobs.get(number), row.written == 0
            watched: tuple[float, ...] = ()
            if first:
                self.counts.first_tokens += 1
                self.counts.first_token_seconds += perf_counter() - row.ticket.submitted
                if row.request.watched and of_row is not None:
                    watched = tuple(of_row[list(row.request.watched)].tolist())
            if token in row.ends:
                ended.append((row, "stop", Piece(row.writing.end(), watched=watched)))
                continue
            row.tokens.append(token)
            self.counts.written_tokens += 1
            text = row.writing.add(token)
            told_token = _told(token, of_row, row.request.top)
            finish: Finish | None = "stop" if row.writing.stopped else "length" if row.written >= row.limit else None
            if finish is None:
                row.ticket.deliver(Piece(text, (told_token,), watched=watched))
            else:
                ended.append((row, finish, Piece(text + row.writing.end(), (told_token,), watched=watched)))
        for row, finish, piece in ended:
            self._end(row, finish, piece)

    def _drawn(self, rows: Sequence[_Row], logits: Float[Tensor, "rows vocabulary"]) -> list[int]:
        groups: dict[Sampling, list[int]] = {}
        for number, row in enumerate(rows):
            groups.setdefault(row.sampling, []).append(number)
        chosen = [0] * len(rows)
        for sampling, numbers in groups.items():
            numbers_drawn = [rows[number].uniforms[rows[number].written] for number in numbers]
            draws = torch.tensor(numbers_drawn, dtype=torch.float64, device=logits.device)
            of_group = logits if len(groups) == 1 else logits[numbers]
            for number, token in zip(numbers, draw(of_group, draws, sampling).tolist(), strict=True):
                chosen[number] = token
        return chosen

    def _end(self, row: _Row, finish: Finish, piece: Piece = Piece()) -> None:  # noqa: B008 - an immutable value
        """Deliver the last piece, keep the states, and let the last row move into the place."""
        place, last = self._rows.index(row), len(self._rows) - 1
        if self._reuses and finish != "error" and row.cached >= LEAST_SHARED:
            tokens = tuple(row.tokens[: row.cached])
            self._prefixes.keep(tokens, row.key, self._slots.read(place, row.cached))
        if place != last:
            self._slots.move(last, place, self._rows[last].cached)
            self._rows[place] = self._rows[last]
        self._rows.pop()
        self._close(row.ticket, piece._replace(finish=finish))

    def _close(self, ticket: Ticket, piece: Piece) -> None:
        assert piece.finish is not None
        self.counts.requests[piece.finish] += 1
        ticket.deliver(piece)

    def _fail(self, problem: str) -> None:
        """End everything that runs or waits."""
        tickets = [row.ticket for row in self._rows]
        self._rows.clear()
        while self._waiting:
            tickets.append(self._waiting.popleft())
        for ticket in tickets:
            self._close(ticket, Piece(finish="error", problem=problem))


class ContextError(UserError):
    """A prompt and its answer do not fit into the context."""


def _told(token: int, logprobs: Tensor | None, top: int | None) -> Token:
    if logprobs is None or top is None:
        return Token(token)
    values, ids = logprobs.clamp(min=LEAST_LOGPROB).topk(min(top, len(logprobs)))
    own = max(LEAST_LOGPROB, float(logprobs[token]))
    return Token(token, own, tuple(zip(ids.tolist(), values.tolist(), strict=True)))


def _most_tokens(model: ChatModel) -> int:
    return int(getattr(architecture.text_config(model.network), "max_position_embeddings", LONGEST))
