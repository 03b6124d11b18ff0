"""A conversation in the terminal whose strengths change on the fly."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from ws.base import console
from ws.base.errors import UserError
from ws.model.chat import Message
from ws.serving import mix
from ws.serving.engine import ContextError, Engine
from ws.serving.requests import Request
from ws.serving.shelf import Shelf

HELP = """\
/alpha -1      the first direction alone, at this strength
/mix 0.3 honesty - 0.2 sycophancy
               several directions; names of loaded ones, of other runs of this model, or paths. /mix 0: none
/base          what the unedited model answers to the same conversation
/reset         forget the conversation
/help          this list
/quit          end"""


@dataclass
class Conversation:
    """What was said so far, and the strengths of the next answer."""

    shelf: Shelf
    engine: Engine
    strengths: dict[str, float]
    system: str = ""
    temperature: float = 0.0
    max_tokens: int | None = None
    seed: int = 0
    turns: list[Message] = field(default_factory=list)

    def run(self, lines: Iterable[str]) -> None:
        """Answer line after line, until they end or one is /quit."""
        for line in lines:
            try:
                if line.strip() == "/quit":
                    return
                if line.startswith("/"):
                    self._obey(line.strip())
                elif line.strip():
                    self._answer(line.strip())
            except UserError as error:
                console.fail(str(error))

    def _obey(self, line: str) -> None:
        command, _, rest = line.partition(" ")
        match command:
            case "/alpha":
                self._set({self._first: _number(rest)})
            case "/mix" if rest.strip():
                self._set(mix.parse(rest))
            case "/mix":
                console.say(f"mix         {mix.written(self.strengths)}", style="dim")
            case "/base":
                self._answer_as_base()
            case "/reset":
                self.turns.clear()
                console.say("the conversation starts again", style="dim")
            case "/help":
                console.say(HELP)
            case _:
                raise UserError(f"there is no command {command}", "Type /help for the list.")

    @property
    def _first(self) -> str:
        first = next(iter(self.shelf.directions), None)
        assert first is not None  # a shelf is opened with at least one run
        return first

    def _set(self, strengths: dict[str, float]) -> None:
        self.shelf.strengths(strengths, local=True)  # refuses what it does not know
        self.strengths = strengths
        console.say(f"mix         {mix.written(strengths)}", style="dim")

    def _answer(self, text: str) -> None:
        self.turns.append(Message(role="user", content=text))
        try:
            said = self._written(self.turns, self.strengths)
        except UserError as error:
            self.turns.pop()
            if isinstance(error, ContextError):
                raise UserError(f"{error} Or type /reset to forget the conversation.") from error
            raise
        self.turns.append(Message(role="assistant", content=said))

    def _answer_as_base(self) -> None:
        last = next((place for place in reversed(range(len(self.turns))) if self.turns[place]["role"] == "user"), None)
        if last is None:
            raise UserError("nothing was asked yet", "Ask a question first.")
        console.write("base: ")
        self._written(self.turns[: last + 1], {})

    def _written(self, turns: list[Message], strengths: dict[str, float]) -> str:
        system = [Message(role="system", content=self.system)] if self.system else []
        request = Request(
            tuple(self.shelf.model.chat.prompt([*system, *turns])), self.shelf.strengths(strengths, local=True),
            max_tokens=self.max_tokens, temperature=self.temperature, seed=self.seed, key=str(len(turns)),
        )  # fmt: skip
        said = ""
        for piece in self.engine.stream(request):
            console.write(piece.text)
            said += piece.text
            if piece.finish == "error":
                console.write("\n")
                raise UserError(f"the answer could not be written ({piece.problem})")
        console.write("\n")
        return said


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        problem = f"{text.strip()!r} is not a number" if text.strip() else "give a strength"
        raise UserError(problem, "Write it like: /alpha -1") from None
