"""The chat template of one model, checked once on known conversations.

Templates differ in many ways: a model may have several by name, some raise, some take lists of parts and drop plain
text, some ignore `add_generation_prompt`, some open a thought or let the model choose the channel. How a template works
is found from its output, not from its source:

    form     text or parts: the first form for which the output contains the user's whole text
    header   the text before an assistant's answer in a finished conversation; a new answer goes after the same header

If these cannot be found, a `UserError` names the template. The date is fixed at loading, so a process renders one date.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import datetime
from functools import cached_property
from typing import Any, NamedTuple, TypedDict

from ws.base.errors import UserError
from ws.model import thoughts
from ws.model.gguf_file import ORIGINAL

PLAIN_TEMPLATE = (
    "{{ bos_token or '' }}"
    "{% for message in messages %}"
    "{{ message['role'] | capitalize }}:\n{{ message['content'] }}"
    "{{ eos_token if message['role'] == 'assistant' else '' }}\n\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}Assistant:\n{% endif %}"
)
"""`User:` / `Assistant:` blocks for models that have no chat template (GPT-2 and other base models)."""

_SWITCHES = ("enable_thinking", "thinking", "reasoning")
"""Names of the variables that switch thinking on and off in templates."""
_CLOCK = re.compile(r"strftime_now\(\s*(['\"])(.*?)\1\s*\)")
_HARMONY_ANSWER = "<|channel|>final<|message|>"
_REMEDY = "Correct chat_template.jinja, or chat_template in tokenizer_config.json, of the model."
_FILLER = "Is the sky Blue today, or is it not? One says yes; another one says No! " * 4


class Message(TypedDict):
    """One turn: `role` is system, user or assistant."""

    role: str
    content: str


class Thought(NamedTuple):
    """The text that opens a thought, the token that ends it, and the text between that token and the answer.

    `opening` is empty if the generation prompt opens the thought.
    """

    opening: str
    closing: str
    before_answer: str = "\n\n"


class Template:
    """Renders conversations for one tokenizer. Raises `UserError` for a template that cannot be used.

    `source` is the template's text; if it asks for the date (`is_dated`), today's date is filled in.
    """

    def __init__(self, tokenizer: Any, name: str) -> None:
        self._tokenizer = tokenizer
        self._name = f"the chat template of {name}"
        self._remedy = ORIGINAL if name.lower().endswith(".gguf") else _REMEDY
        given = self._chosen(tokenizer.chat_template)
        self.is_dated = "strftime_now" in given
        today = datetime.now()
        self.source = _CLOCK.sub(lambda call: repr(today.strftime(call[2])), given)
        self._as_parts = False
        self._header_ends: dict[tuple[tuple[str, ...], bool], str] = {}
        self._find_form()

    # ---------------------------------------------------------------- rendering

    def render(self, turns: Sequence[Message], *, thinking: bool, generation: bool = True) -> str:
        """The conversation as text, with or without the generation prompt."""
        conversation = [
            {"role": turn["role"], "content": [{"type": "text", "text": turn["content"]}]} if self._as_parts else turn
            for turn in turns
        ]
        try:
            return str(
                self._tokenizer.apply_chat_template(
                    conversation, chat_template=self.source, tokenize=False, add_generation_prompt=generation,
                    **dict.fromkeys(self.switches, thinking),
                )
            )  # fmt: skip
        except Exception as error:  # a template is a program and may raise anything
            reason = " ".join(str(error).split()) or type(error).__name__
            roles = [turn["role"] for turn in turns]
            given = "a user message alone" if roles == ["user"] else f"messages of {', '.join(roles)}"
            raise UserError(f"{self._name} cannot render {given} ({reason[:200]})", self._remedy) from error

    def header_end(self, turns: Sequence[Message], thinking: bool) -> str:
        """The text to add after the generation prompt, so that the answer comes next.

        Empty for most templates. Otherwise the channel of answers, the end of an opened thought, or, for a template
        without a generation prompt, the header of an assistant's turn. With thinking on, only that header.
        """
        key = tuple(turn["role"] for turn in turns), thinking
        if key not in self._header_ends:
            self._header_ends[key] = self._find_header_end(*key)
        return self._header_ends[key]

    # ---------------------------------------------------------------- what it can do

    @cached_property
    def switches(self) -> tuple[str, ...]:
        """Names of the variables that switch thinking on and off in this template."""
        return tuple(name for name in _SWITCHES if re.search(rf"(?<![\w.'\"]){name}(?![\w'\"])", self.source))

    @cached_property
    def supports_system_turn(self) -> bool:
        """Whether a system turn is rendered with its whole text (some templates raise, some drop or change it)."""
        turns = _known_turns(("system", "user"))
        try:
            rendered = self.render(turns, thinking=False)
        except UserError:
            return False
        return all(turn["content"] in rendered for turn in turns)

    @cached_property
    def default_system(self) -> str | None:
        """The text of the system turn that the template opens by itself if none is given; None if it opens none.

        Found by comparison: where a given system turn stands, the rendering without one has another text.
        """
        if not self.supports_system_turn:
            return None
        system, user = _known_turns(("system", "user"))
        given = self.render([system, user], thinking=False).partition(user["content"])[0]
        before, _, after = given.rpartition(system["content"])
        opened = self.render([user], thinking=False).partition(user["content"])[0]
        if not (opened.startswith(before) and opened.endswith(after)):
            return None
        return opened[len(before) : len(opened) - len(after)].strip() or None

    @cached_property
    def thought(self) -> Thought | None:
        """The marks of thoughts; None if the template has no thoughts, or no single token that ends them."""
        prompt, header = self._headers(("user",), thinking=True)
        if header.endswith(_HARMONY_ANSWER) and "<|end|>" in self._vocabulary:
            return Thought("<|channel|>analysis<|message|>", "<|end|>", f"<|start|>assistant{_HARMONY_ANSWER}")
        mark = thoughts.left_open(prompt, header)
        closing = None if mark is None else thoughts.closing_of(mark, self._knows)
        if closing in self._vocabulary:
            return Thought("", str(closing))
        found = thoughts.thought_marks(self.source, self._vocabulary.__contains__)
        return None if found is None else Thought(f"{found[0]}\n", found[1])

    # ---------------------------------------------------------------- how it is understood

    def _chosen(self, given: Any) -> str:
        if isinstance(given, str):
            return given
        if "default" in given:
            return str(given["default"])
        raise UserError(
            f"{self._name} is ambiguous: there are {', '.join(sorted(given))}, but no default",
            "Save the template for chat as chat_template.jinja in the model folder.",
        )

    def _find_form(self) -> None:
        """Use the first form that renders the user's whole text. If neither does, raise the first problem."""
        question, answer = _known_turns(("user", "assistant"))
        problems: list[UserError] = []
        for self._as_parts in (False, True):
            try:
                if question["content"] in self.render([question], thinking=False):
                    break
            except UserError as error:
                problems.append(error)
            else:
                dropped = (
                    f"{self._name} drops or changes the user's text, so different questions may give the same prompt"
                )
                problems.append(UserError(dropped, self._remedy))
        else:
            raise problems[0]
        if answer["content"] not in self.render([question, answer], thinking=False, generation=False):
            raise UserError(f"{self._name} drops or changes the assistant's text", self._remedy)

    def _find_header_end(self, roles: tuple[str, ...], thinking: bool) -> str:
        prompt, header = self._headers(roles, thinking)
        if thinking and prompt != self._behind(_known_turns(roles), thinking):
            return ""
        if header.startswith(prompt):
            rest = header[len(prompt) :]
            return rest if rest.strip() else ""
        mark = thoughts.left_open(prompt, header)
        if mark is None:
            return ""
        closing = thoughts.closing_of(mark, self._knows)
        if closing is None:
            raise UserError(
                f"{self._name} ends its generation prompt with {mark!r}, but assistant turns do not begin with it, "
                "and no mark that closes it was found",
                self._remedy,
            )
        return f"\n{closing}\n\n"

    def _headers(self, roles: tuple[str, ...], thinking: bool) -> tuple[str, str]:
        """The text after the last message: the generation prompt, and the header of an assistant's turn."""
        *turns, answer = _known_turns((*roles, "assistant"))
        whole = self.render([*turns, answer], thinking=thinking, generation=False)
        header = whole[: whole.rfind(answer["content"])].rpartition(turns[-1]["content"])[2]
        return self._behind(turns, thinking, generation=True), header

    def _behind(self, turns: Sequence[Message], thinking: bool, *, generation: bool = False) -> str:
        """The rendered text after the last turn's message."""
        return self.render(turns, thinking=thinking, generation=generation).rpartition(turns[-1]["content"])[2]

    @cached_property
    def _vocabulary(self) -> dict[str, int]:
        found: dict[str, int] = self._tokenizer.get_vocab()
        return found

    def _knows(self, mark: str) -> bool:
        return mark in self._vocabulary or mark in self.source


def _known_turns(roles: Sequence[str]) -> list[Message]:
    """Turns with different texts, long enough to show cuts, that no template contains."""
    return [Message(role=role, content=f"Sentinel {n} of {role}.\n{_FILLER}{n}") for n, role in enumerate(roles)]
