"""A page with a slider per direction: the unedited and the steered model answer side by side, as they write.

Both answers come from one engine, so they share every pass. Turning a slider answers the last question again. The
meter reads the probabilities of Yes and No at the first token of the same answer. The page loads nothing from other
machines, and it shows what a model writes as plain text.
"""

from __future__ import annotations

import html
import math
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from queue import SimpleQueue
from typing import Any, NamedTuple, no_type_check

import gradio

from ws.algebra.direction import Direction
from ws.base.errors import UserError
from ws.model.chat import Message
from ws.serving import mix
from ws.serving.engine import Engine
from ws.serving.prefixes import Strengths
from ws.serving.requests import Piece, Request, Ticket
from ws.serving.shelf import Shelf

FARTHEST = 3.0
"""Largest strength of a slider, in both directions."""
LONGEST_ANSWER = 200
BETWEEN_UPDATES = 0.04
"""Seconds between two updates of a running answer."""
_BASE, _STEERED = "base", "steered"
_STYLE = """
footer { display: none !important; }
.meter { position: relative; height: 2.2em; border-radius: 6px; overflow: hidden;
         background: linear-gradient(90deg, #d9480f22, #8881 50%, #1971c222); }
.meter .bar { position: absolute; top: 0; bottom: 0; transition: left .2s, width .2s; }
.meter .mark { position: absolute; top: 0; bottom: 0; width: 3px; background: #343a40; }
.meter-ends { display: flex; justify-content: space-between; font-weight: 600; }
"""
_NO_COLOUR, _YES_COLOUR = "#d9480f", "#1971c2"


class Lean(NamedTuple):
    """Probabilities of Yes and of No at the first token of an answer."""

    yes: float
    no: float

    @property
    def share(self) -> float:
        """Yes among Yes and No."""
        return self.yes / (self.yes + self.no) if self.yes + self.no else 0.5


@dataclass(frozen=True)
class Turn:
    """A question and both answers to it."""

    question: str
    base: str = ""
    steered: str = ""
    base_lean: Lean | None = None
    steered_lean: Lean | None = None


Turns = tuple[Turn, ...]


class Page:
    """The logic of the page: what is asked at which strengths, and what is shown."""

    def __init__(self, shelf: Shelf, engine: Engine) -> None:
        self.shelf, self.engine = shelf, engine
        self.names = list(shelf.directions)
        directions = shelf.directions.values()
        self.layers = sorted({layer for direction in directions for layer in direction.layer_numbers})
        parameters = {name for direction in directions for name in direction.deltas}
        self.modules = sorted({name.rsplit(".", 2)[-2] for name in parameters})
        self._selected: dict[tuple[str, tuple[int, ...], tuple[str, ...]], Direction] = {}
        self._running: dict[str, list[Ticket]] = {}
        self._exports = tempfile.TemporaryDirectory(prefix="weight-steering-")
        self._words = self._answer_tokens()

    # ---------------------------------------------------------------- strengths

    def strengths(self, alphas: Sequence[float], layers: Sequence[int], modules: Sequence[str]) -> Strengths:
        """Directions with their strengths; only these layers and modules of them."""
        if len(layers) == len(self.layers) and len(modules) == len(self.modules):
            chosen = self.shelf.directions
        else:
            chosen = {name: self._selection(name, tuple(sorted(layers)), tuple(sorted(modules))) for name in self.names}
        return {chosen[name]: alpha for name, alpha in zip(self.names, alphas, strict=True) if alpha}

    def _selection(self, name: str, layers: tuple[int, ...], modules: tuple[str, ...]) -> Direction:
        key = (name, layers, modules)
        if key not in self._selected:  # kept, because states are reused for the same object only
            self._selected[key] = self.shelf.directions[name].keep(layers=layers, modules=modules)
        return self._selected[key]

    def alphas(self, expression: str) -> list[float]:
        """The sliders' values that a mix expression means."""
        given = mix.parse(expression)
        self.shelf.strengths(given)
        if far := [name for name, alpha in given.items() if abs(alpha) > FARTHEST]:
            raise UserError(f"the strength of {far[0]!r} is beyond {FARTHEST:g}", "Sliders end there.")
        return [given.get(name, 0.0) for name in self.names]

    def export(self, alphas: Sequence[float], layers: Sequence[int], modules: Sequence[str]) -> Path:
        """Write the current mix as one direction file: at alpha 1 it is what the page shows."""
        whole: Direction | None = None
        for direction, alpha in self.strengths(alphas, layers, modules).items():
            whole = alpha * direction if whole is None else whole + alpha * direction
        if whole is None or not whole.deltas:
            raise UserError("the mix is empty", "Turn a slider first.")
        told = "_".join(f"{alpha:+g}-{name}" for name, alpha in zip(self.names, alphas, strict=True) if alpha)
        target = Path(self._exports.name) / f"{told}.safetensors"
        note = {"operation": "mix", "of": dict(zip(self.names, alphas, strict=True)), "layers": list(layers),
                "modules": list(modules), "base": {"name": self.shelf.model.name}}  # fmt: skip
        replace(whole, provenance=note).save(target)
        return target

    # ---------------------------------------------------------------- answers

    def ask(self, question: str, turns: Turns, strengths: Strengths, session: str = "") -> Iterator[Turns]:
        """The conversation with a new question, while both models answer it."""
        turns = (*turns, Turn(question.strip()))
        yield from self._answered(turns, {_BASE: {}, _STEERED: strengths}, session)

    def answer_again(self, turns: Turns, strengths: Strengths, session: str = "") -> Iterator[Turns]:
        """The conversation while the steered model answers the last question again."""
        if turns:
            turns = (*turns[:-1], replace(turns[-1], steered="", steered_lean=None))
            yield from self._answered(turns, {_STEERED: strengths}, session)

    def _answered(self, turns: Turns, sides: Mapping[str, Strengths], session: str) -> Iterator[Turns]:
        for ticket in self._running.pop(session, []):
            ticket.cancel()  # an older answer of the same page
        pieces: SimpleQueue[tuple[str, Piece]] = SimpleQueue()
        watched = tuple(token for ids in self._words for token in ids)
        tickets = []
        for side, strengths in sides.items():
            request = Request(self._prompt(turns, side), strengths, max_tokens=None, watched=watched)
            room = self.engine.longest - len(request.prompt)
            request = replace(request, max_tokens=max(1, min(room, LONGEST_ANSWER)))
            tickets.append(self.engine.submit(request, lambda piece, side=side: pieces.put((side, piece))))  # type: ignore[misc]
        self._running[session] = tickets
        left, shown = len(tickets), 0.0
        try:
            while left:
                side, piece = pieces.get()
                if piece.finish == "cancelled":
                    return
                if piece.finish == "error":
                    raise UserError(f"the answer could not be written ({piece.problem})")
                left -= piece.finish is not None
                turns = (*turns[:-1], self._with_piece(turns[-1], side, piece))
                if time.monotonic() - shown > BETWEEN_UPDATES or not left:
                    shown = time.monotonic()
                    yield turns
        finally:
            for ticket in tickets:
                ticket.cancel()

    def _with_piece(self, turn: Turn, side: str, piece: Piece) -> Turn:
        lean = self._lean(piece.watched) if piece.watched else None
        if side == _BASE:
            return replace(turn, base=turn.base + piece.text, base_lean=lean or turn.base_lean)
        return replace(turn, steered=turn.steered + piece.text, steered_lean=lean or turn.steered_lean)

    def _prompt(self, turns: Turns, side: str) -> tuple[int, ...]:
        """The conversation as one of the two models had it."""
        messages: list[Message] = []
        for turn in turns[:-1]:
            said = turn.base if side == _BASE else turn.steered
            messages += [Message(role="user", content=turn.question), Message(role="assistant", content=said)]
        messages.append(Message(role="user", content=turns[-1].question))
        return tuple(self.shelf.model.chat.prompt(messages))

    # ---------------------------------------------------------------- the meter

    def _answer_tokens(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """First tokens of every spelling of Yes and of No; none if the two share one."""
        yes, no = ({ids[0] for ids in self.shelf.model.chat.answers(word)} for word in ("Yes", "No"))
        return ((), ()) if yes & no else (tuple(sorted(yes)), tuple(sorted(no)))

    def _lean(self, logprobs: Sequence[float]) -> Lean:
        count = len(self._words[0])
        probabilities = [math.exp(one) for one in logprobs]
        return Lean(sum(probabilities[:count]), sum(probabilities[count:]))

    def meter(self, turns: Turns) -> str:
        """The meter as HTML: the steered model's lean as a bar, the base's as a mark."""
        steered = turns[-1].steered_lean if turns else None
        base = turns[-1].base_lean if turns else None
        if steered is None or base is None:
            return "<div class='meter-ends'><span>No</span><span>Yes</span></div><div class='meter'></div>"
        share, mark = 100 * steered.share, 100 * base.share
        left, colour = (50.0, _YES_COLOUR) if share >= 50 else (share, _NO_COLOUR)
        told = (
            f"steered: Yes {100 * steered.yes:.0f} %, No {100 * steered.no:.0f} %<br>"
            f"base: Yes {100 * base.yes:.0f} %, No {100 * base.no:.0f} %"
        )
        return (
            "<div class='meter-ends'><span>No</span><span>Yes</span></div>"
            f"<div class='meter' role='img' aria-label='Yes against No: steered {share:.0f} %, base {mark:.0f} %'>"
            f"<div class='bar' style='left:{left:.2f}%;width:{abs(share - 50):.2f}%;background:{colour}'></div>"
            f"<div class='mark' style='left:calc({mark:.2f}% - 1px)'></div></div><div>{told}</div>"
        )


# -------------------------------------------------------------------- the page itself


@no_type_check  # gradio must see that its handlers are generators; a checked function does not show it
def build(page: Page, title: str) -> gradio.Blocks:
    """The page. Events by name: `ask`, `turn`, `mix`, `export`."""
    with gradio.Blocks(title=title, analytics_enabled=False, fill_width=True) as blocks:
        turns = gradio.State(())
        gradio.Markdown(f"## {html.escape(title)}")
        with gradio.Row():
            with gradio.Column(scale=1, min_width=300):
                sliders = [
                    gradio.Slider(-FARTHEST, FARTHEST, value=1.0 if number == 0 else 0.0, step=0.1, label=name,
                                  elem_id=f"slider-{name}")
                    for number, name in enumerate(page.names)
                ]  # fmt: skip
                expression = gradio.Textbox(label="Mix", placeholder="0.3 honesty - 0.2 sycophancy", elem_id="mix")
                meter = gradio.HTML(page.meter(()), label="Yes or No", elem_id="meter")
                with gradio.Accordion("Layers and modules", open=False):
                    layers = gradio.CheckboxGroup(page.layers, value=page.layers, label="Layers", elem_id="layers")
                    modules = gradio.CheckboxGroup(page.modules, value=page.modules, label="Modules",
                                                   elem_id="modules")  # fmt: skip
                exported = gradio.Button("Export this mix", elem_id="export", size="sm")
                file = gradio.File(label="Direction file", visible=False, elem_id="file")
            with gradio.Column(scale=3):
                with gradio.Row():
                    base, steered = (
                        gradio.Chatbot(label=label, elem_id=name, render_markdown=False, height=360, buttons=[])
                        for label, name in (("Base model", _BASE), ("Steered model", _STEERED))
                    )
                question = gradio.Textbox(label="Question", placeholder="I think owls eat leaves. What do you think?",
                                          submit_btn=True, elem_id="question", autofocus=True)  # fmt: skip
                cleared = gradio.Button("New conversation", elem_id="clear", size="sm")
        dials = [*sliders, layers, modules]
        shown = [turns, base, steered, meter]

        def strengths(values: Sequence[Any]) -> Strengths:
            return page.strengths(values[: len(sliders)], values[-2], values[-1])

        def ask(request: gradio.Request, text: str, before: Turns, *values: Any) -> Iterator[tuple[Any, ...]]:
            if text.strip():
                for now in _told(lambda: page.ask(text, before, strengths(values), _session(request))):
                    yield *_shown(page, now), ""

        def turn(request: gradio.Request, before: Turns, *values: Any) -> Iterator[tuple[Any, ...]]:
            for now in _told(lambda: page.answer_again(before, strengths(values), _session(request))):
                yield _shown(page, now)

        def mixed(text: str) -> list[float]:
            try:
                return page.alphas(text)
            except UserError as error:
                raise gradio.Error(str(error)) from None

        def export(*values: Any) -> Any:
            try:
                return gradio.File(str(page.export(values[: len(sliders)], values[-2], values[-1])), visible=True)
            except UserError as error:
                raise gradio.Error(str(error)) from None

        open_to_all = {"concurrency_limit": None, "show_progress": "hidden"}
        question.submit(ask, [question, turns, *dials], [*shown, question], api_name="ask", **open_to_all)
        gradio.on([dial.change for dial in dials], turn, [turns, *dials], shown, api_name="turn",
                  trigger_mode="multiple", **open_to_all)  # fmt: skip
        expression.submit(mixed, expression, sliders, api_name="mix", **open_to_all)
        exported.click(export, dials, file, api_name="export", **open_to_all)
        gradio.on([cleared.click, base.clear, steered.clear], lambda: _shown(page, ()), None, shown, api_name="clear",
                  **open_to_all)  # fmt: skip
    return blocks


def _session(request: gradio.Request) -> str:
    return str(request.session_hash)


def _told(answers: Callable[[], Iterator[Turns]]) -> Iterator[Turns]:
    """The same, with a user error as a message on the page."""
    try:
        yield from answers()
    except UserError as error:
        raise gradio.Error(str(error)) from None


def _shown(page: Page, turns: Turns) -> tuple[Any, ...]:
    def side(name: str) -> list[dict[str, str]]:
        # escaped, because the component would render tags: an image in an answer must not be loaded, but shown as text
        return [
            message
            for turn in turns
            for message in (
                {"role": "user", "content": html.escape(turn.question, quote=False)},
                {"role": "assistant", "content": html.escape(getattr(turn, name), quote=False)},
            )
        ]

    return turns, side(_BASE), side(_STEERED), page.meter(turns)


def launch(blocks: gradio.Blocks, host: str, port: int, password: str | None = None) -> str:
    """Serve the page in the background; returns its address."""
    fonts = ["system-ui", "-apple-system", "Segoe UI", "sans-serif"]
    theme = gradio.themes.Base(font=fonts, font_mono=["ui-monospace", "monospace"])
    _, address, _ = blocks.launch(
        server_name=host, server_port=port, share=False, quiet=True, prevent_thread_lock=True,
        auth=None if password is None else ("ws", password), theme=theme, css=_STYLE, ssr_mode=False,
        footer_links=[], show_error=True, enable_monitoring=False,
    )  # fmt: skip
    return str(address)
