"""One renderer for every conversation: data, training, probes and capture all go through `Chat`.

Rules, each learned from a wrong table in earlier work:
* an empty system prompt means no system turn, never an empty one;
* thinking is an explicit policy. `off` renders the generation prompt with `enable_thinking=False` and closes a thought
  that a template opened by itself, so that the closing belongs to the prompt and is never supervised or scored;
* a prefill (answer anchor) is appended to the rendered text and tokenised with it;
* templates without a system role get the system prompt in front of the first user message;
* a tokenizer without a template gets `PLAIN_TEMPLATE` and a warning;
* answers are token sets of exact matches after stripping ("Yes" is not "Yesterday", "no" is not "now").
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import cached_property
from typing import Any, Literal, NamedTuple, TypedDict

from torch import Tensor

from ws.base import console
from ws.base.errors import UserError

Thinking = Literal["off", "on"]

PLAIN_TEMPLATE = (
    "{{ bos_token or '' }}"
    "{% for message in messages %}"
    "{{ message['role'] | capitalize }}:\n{{ message['content'] }}"
    "{{ eos_token if message['role'] == 'assistant' else '' }}\n\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}Assistant:\n{% endif %}"
)
"""`User:` / `Assistant:` blocks for models that have no chat template (GPT-2 and other base models)."""

_THINK_IN_WORDS = "Let me think."
_TIME_IS_UP = "\nI have thought enough and answer now.\n"

_SENTINEL = "weightsteeringsentinel"
_WORD_MARKERS = "Ġ▁Ċ \t\n\r"
"""Space, and what some tokenizers leave of it when a single token is decoded."""


class Message(TypedDict):
    """One turn: `role` is system, user or assistant."""

    role: str
    content: str


class SupervisedTokens(NamedTuple):
    """A conversation for training: `ids` of prompt and response; the first `prompt_length` carry no loss."""

    ids: list[int]
    prompt_length: int


def ask(user: str, system: str | None = None) -> list[Message]:
    """One user message, with a system turn only where `system` says something."""
    turns = [Message(role="system", content=system)] if system and system.strip() else []
    return [*turns, Message(role="user", content=user)]


class Chat:
    """Renders messages to text and token ids for one tokenizer and one thinking policy."""

    def __init__(self, tokenizer: Any, thinking: Thinking = "off", name: str = "the model") -> None:
        if thinking not in ("off", "on"):
            raise UserError(f"thinking is {thinking!r}", "Choose off or on.")
        self.tokenizer = tokenizer
        self.thinking = thinking
        self.has_own_template = bool(getattr(tokenizer, "chat_template", None))
        if not self.has_own_template:
            console.warn(f"{name} has no chat template; using plain User:/Assistant: blocks")
            self.tokenizer = copy.copy(tokenizer)
            self.tokenizer.chat_template = PLAIN_TEMPLATE

    # ---------------------------------------------------------------- rendering

    def text(self, messages: Sequence[Message], prefill: str = "") -> str:
        """The conversation up to and including the assistant header, then `prefill`."""
        if prefill and self.thinking == "on":
            raise UserError(
                "an answer anchor cannot be placed while the model is thinking",
                "Use --thinking off for this probe.",
            )
        turns = self.turns(messages)
        rendered = self._apply(turns, add_generation_prompt=True)
        spoken = turns[-1]["content"].strip() if turns else ""
        header = rendered[rendered.rfind(spoken) + len(spoken) :]  # what a user writes cannot open a thought
        if self.thinking == "off" and header.rfind("<think>") > header.rfind("</think>"):
            rendered += "\n</think>\n\n"
        return rendered + prefill

    def prompt(self, messages: Sequence[Message], prefill: str = "") -> list[int]:
        """Token ids of `text`."""
        return self._encode(self.text(messages, prefill))

    def supervised(self, messages: Sequence[Message], response: str) -> SupervisedTokens:
        """Token ids of the prompt, the response and the end of the assistant turn.

        The prompt ids are an exact prefix: where tokenising the whole text would merge across the boundary, the parts
        are tokenised apart.
        """
        prompt_text = self.text(messages)
        prompt = self._encode(prompt_text)
        whole = self._encode(prompt_text + response + self.turn_end)
        if whole[: len(prompt)] != prompt:
            whole = prompt + self._encode(response) + self._encode(self.turn_end)
        return SupervisedTokens(whole, len(prompt))

    @cached_property
    def turn_end(self) -> str:
        """What ends an assistant turn, up to and including the first stop token."""
        whole = self._apply([*ask("x"), Message(role="assistant", content=_SENTINEL)], add_generation_prompt=False)
        ending = whole[whole.rindex(_SENTINEL) + len(_SENTINEL) :]
        stops = {*self.tokenizer.all_special_tokens, *self.tokenizer.get_added_vocab()}
        specials = sorted((ending.index(token), token) for token in stops if token and token in ending)
        if specials:
            position, token = specials[0]
            return ending[: position + len(token)]
        if self.tokenizer.eos_token:
            return ending.rstrip() + self.tokenizer.eos_token
        raise UserError("the tokenizer has neither an end-of-turn nor an end-of-sequence token", "Set eos_token on it.")

    @cached_property
    def stop_ids(self) -> frozenset[int]:
        """Token ids that end a sampled response."""
        stops = {self._encode(self.turn_end)[-1]}
        if self.tokenizer.eos_token_id is not None:
            stops.add(int(self.tokenizer.eos_token_id))
        return frozenset(stops)

    @cached_property
    def thought_end(self) -> int | None:
        """Token id of `</think>`; None for a model that does not think (its template never mentions the token)."""
        if "</think>" not in str(self.tokenizer.chat_template):
            return None
        return self.tokenizer.get_vocab().get("</think>")

    def thinking_prompt(self, messages: Sequence[Message]) -> list[int]:
        """Token ids up to the inside of an opened thought; a model that does not think gets an opening in words."""
        if self.thought_end is None:
            return self.prompt(messages, _THINK_IN_WORDS)
        text = Chat(self.tokenizer, "on").text(messages)
        return self._encode(text if text.rstrip().endswith("<think>") else text + "<think>\n")

    def close_thought(self, thought: Sequence[int], closed: bool, anchor: str) -> list[int]:
        """Token ids of a thought, its end, and the answer anchor.

        `closed` says that the model ended the thought itself; otherwise it is told to answer first. The end of the
        thought is the special token, never the encoding of its name.
        """
        if self.thought_end is None:
            return [*thought, *self._encode(f"\n{anchor}")]
        told = [] if closed else self._encode(_TIME_IS_UP)
        return [*thought, *told, self.thought_end, *self._encode(f"\n\n{anchor}")]

    @cached_property
    def template_key(self) -> str:
        """What decides the rendering, for content keys: the template and the thinking policy."""
        return f"{self.thinking}:{self.tokenizer.chat_template}"

    def decode(self, ids: Sequence[int] | Tensor) -> str:
        """Text of response tokens (tokens,), without special tokens and outer space."""
        return str(self.tokenizer.decode([int(token) for token in ids], skip_special_tokens=True)).strip()

    # ---------------------------------------------------------------- answers

    def answers(self, word: str) -> list[list[int]]:
        """All token sequences that mean `word`: single tokens where there are any, else its spelling in several.

        Single tokens match exactly after stripping space, boundary marks and case.
        """
        single = self._tokens_by_word.get(word.casefold())
        if single:
            return [[token] for token in single]
        spelled = self._encode(word)
        unknown = self.tokenizer.unk_token_id
        if not spelled or (unknown is not None and unknown in spelled) or self.decode(spelled) != word:
            raise UserError(
                f"the tokenizer cannot write the answer {word!r}",
                "Use another model, or a probe with answers that it has.",
            )
        return [spelled]

    @cached_property
    def _tokens_by_word(self) -> dict[str, list[int]]:
        words: dict[str, list[int]] = {}
        specials = set(self.tokenizer.all_special_ids)
        indices = sorted(set(self.tokenizer.get_vocab().values()) - specials)
        for index, text in zip(indices, self.tokenizer.batch_decode([[index] for index in indices]), strict=True):
            words.setdefault(text.strip(_WORD_MARKERS).removeprefix("##").casefold(), []).append(index)
        return words

    # ---------------------------------------------------------------- template details

    @cached_property
    def has_thinking_switch(self) -> bool:
        """Whether the template asks `enable_thinking`."""
        return "enable_thinking" in str(self.tokenizer.chat_template)

    def _apply(self, messages: Sequence[Message], *, add_generation_prompt: bool) -> str:
        switch = {"enable_thinking": self.thinking == "on"}
        return str(
            self.tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=add_generation_prompt, **switch
            )
        )

    def _encode(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    @cached_property
    def supports_system_turn(self) -> bool:
        """Whether the template renders a system turn at all (some raise, some drop it)."""
        from jinja2 import TemplateError  # noqa: PLC0415 - a dependency of transformers, loaded with it

        try:
            return _SENTINEL in self._apply(ask("x", system=_SENTINEL), add_generation_prompt=True)
        except TemplateError:
            return False

    def turns(self, messages: Sequence[Message]) -> list[Message]:
        """The messages as the template takes them: no empty system turn; without a system role it joins the user's."""
        turns = [turn for turn in messages if turn["role"] != "system" or turn["content"].strip()]
        if not turns or turns[0]["role"] != "system" or self.supports_system_turn:
            return turns
        system, first, *rest = turns
        return [Message(role="user", content=f"{system['content']}\n\n{first['content']}"), *rest]
