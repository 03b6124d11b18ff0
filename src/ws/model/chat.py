"""`Chat` renders all conversations: for data, training, probes and capture.

Rules, each added after a wrong result:
* An empty system prompt means no system turn, not an empty one.
* Thinking is an explicit setting. `off` renders the generation prompt without thinking, up to the place of the
  assistant's answer. If a template opens a thought it is closed; if it has channels the one for answers is chosen. Both
  are part of the prompt, so they are never supervised or scored.
* A prefill (answer anchor) is appended to the rendered text and tokenised with it.
* If a template has no system role, the system prompt is put before the first user message.
* A tokenizer without a template gets `PLAIN_TEMPLATE` and a warning.
* Names of control tokens in messages are plain text.
* Answers are sets of tokens that match exactly after stripping ("Yes" is not "Yesterday", "no" is not "now").
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any, Literal, NamedTuple

from torch import Tensor

from ws.base import console
from ws.base.errors import UserError
from ws.model.control_tokens import ControlTokens, Hidden
from ws.model.template import PLAIN_TEMPLATE, Message, Template

__all__ = ["PLAIN_TEMPLATE", "Chat", "Message", "SupervisedTokens", "Thinking", "ask"]

Thinking = Literal["off", "on"]

_THINK_IN_WORDS = "Let me think."
_TIME_IS_UP = "\nI have thought enough and answer now.\n"

_SENTINEL = "weightsteeringsentinel"
_WORD_MARKERS = "Ġ▁Ċ \t\n\r"
"""Whitespace, and the marks that some tokenizers leave for it when they decode a single token."""


class SupervisedTokens(NamedTuple):
    """A conversation for training: `ids` of prompt and response; the first `prompt_length` carry no loss."""

    ids: list[int]
    prompt_length: int


def ask(user: str, system: str | None = None) -> list[Message]:
    """One user message, with a system turn unless `system` is blank."""
    turns = [Message(role="system", content=system)] if system and system.strip() else []
    return [*turns, Message(role="user", content=user)]


class Chat:
    """Renders messages to text and token ids for one tokenizer and one thinking setting."""

    def __init__(
        self,
        tokenizer: Any,
        thinking: Thinking = "off",
        name: str = "the model",
        *,
        vocabulary: int | None = None,
        ends: Iterable[int] = (),
    ) -> None:
        """Check the template on known conversations.

        vocabulary: rows of the embedding; a larger token id is a `UserError`. ends: token ids that end a response, in
        addition to those of the template.
        """
        if thinking not in ("off", "on"):
            raise UserError(f"thinking is {thinking!r}; it must be off or on", "Choose one of them.")
        self.tokenizer = tokenizer
        self.thinking = thinking
        self._name, self._vocabulary = name, vocabulary
        self._ends = frozenset(end for end in ends if vocabulary is None or end < vocabulary)
        self.has_own_template = bool(getattr(tokenizer, "chat_template", None))
        if not self.has_own_template:
            console.warn(f"{name} has no chat template; using plain User:/Assistant: blocks")
            self.tokenizer = copy.copy(tokenizer)
            self.tokenizer.chat_template = PLAIN_TEMPLATE
        self.template = Template(self.tokenizer, name)
        self._control_tokens = ControlTokens(self.tokenizer, self.template.source)
        if self.template.is_dated:
            console.warn(f"the chat template of {name} may write today's date; results of other days are not reused")
        if self.prompt(ask("Is the sky blue?", "Be kind.")) == self.prompt(ask("Why?", "Be kind.")):
            raise UserError(
                f"the tokenizer of {name} encodes two different questions as the same tokens",
                "Save the model with the tokenizer that it was trained with.",
            )

    # ---------------------------------------------------------------- rendering

    def text(self, messages: Sequence[Message], prefill: str = "") -> str:
        """The conversation up to the assistant's answer, then `prefill`."""
        rendered, hidden = self._rendered(messages, prefill)
        return hidden.shown(rendered)

    def prompt(self, messages: Sequence[Message], prefill: str = "") -> list[int]:
        """Token ids of `text`; names of control tokens inside messages are encoded as plain text."""
        rendered, hidden = self._rendered(messages, prefill)
        return self._encode(rendered, hidden)

    def supervised(self, messages: Sequence[Message], response: str, *, closed: bool = True) -> SupervisedTokens:
        """Token ids of the prompt, the response and, if `closed`, the end of the assistant turn.

        The prompt ids are an exact prefix: if tokenising the whole text merges tokens across the boundary, prompt and
        response are tokenised separately.
        """
        rendered, hidden = self._rendered(messages)
        prompt = self._encode(rendered, hidden)
        said = self._control_tokens.hide([Message(role="assistant", content=response)])
        end = self.turn_end if closed else ""
        if not hidden.names and not said.names:
            whole = self._encode(rendered + response + end)
            if whole[: len(prompt)] == prompt:
                return SupervisedTokens(whole, len(prompt))
        answer = [*self._encode(said.texts[0], said), *(self._encode(end) if end else ())]
        return SupervisedTokens(prompt + answer, len(prompt))

    @cached_property
    def turn_end(self) -> str:
        """The text that ends an assistant turn, up to and including the first stop token."""
        turns = [*ask("x"), Message(role="assistant", content=_SENTINEL)]
        whole = self.template.render(turns, thinking=self._thinks, generation=False)
        ending = whole[whole.rindex(_SENTINEL) + len(_SENTINEL) :]
        stops = {*self.tokenizer.all_special_tokens, *self.tokenizer.get_added_vocab()}
        specials = sorted((ending.index(token), token) for token in stops if token and token in ending)
        if specials:
            position, token = specials[0]
            return ending[: position + len(token)]
        ends = [self.tokenizer.eos_token, *self.tokenizer.convert_ids_to_tokens(sorted(self._ends))]
        if end := next(filter(None, ends), None):
            return ending.rstrip() + end
        raise UserError("the tokenizer has neither an end-of-turn nor an end-of-sequence token", "Set eos_token on it.")

    @cached_property
    def stop_ids(self) -> frozenset[int]:
        """Token ids that end a sampled response: of the template, of the tokenizer, of `generation_config.json`."""
        eos = self.tokenizer.eos_token_id
        return frozenset({self._encode(self.turn_end)[-1], *self._ends, *([] if eos is None else [int(eos)])})

    @cached_property
    def thought_end(self) -> int | None:
        """Id of the token that ends a thought; None for a model that does not think."""
        thought = self.template.thought
        return None if thought is None else self.tokenizer.get_vocab().get(thought.closing)

    def thinking_prompt(self, messages: Sequence[Message]) -> list[int]:
        """Token ids up to the start of a thought. If the model does not think, words start it."""
        if self.template.thought is None:
            return self.prompt(messages, _THINK_IN_WORDS)
        rendered, hidden = self._rendered(messages, thinks=True)
        return self._encode(rendered + self.template.thought.opening, hidden)

    def close_thought(self, thought: Sequence[int], closed: bool, anchor: str) -> list[int]:
        """Token ids of a thought, its end, and the answer anchor.

        `closed`: the model ended the thought itself; otherwise a sentence ends it. The end of the thought is the
        special token, not the encoding of its name.
        """
        if self.template.thought is None or self.thought_end is None:
            return [*thought, *self._encode(f"\n{anchor}")]
        told = [] if closed else self._encode(_TIME_IS_UP)
        return [*thought, *told, self.thought_end, *self._encode(self.template.thought.before_answer + anchor)]

    @cached_property
    def rendering_key(self) -> str:
        """A digest of the rendering, for content keys: made of the tokens of known conversations.

        It depends on template, switches, thinking setting, tokenizer and date as far as they change the tokens.
        """
        plain, marked = ask("Is the sky blue?"), ask(" What does </think> mean?\n", "Be kind.")
        found = [*map(self.prompt, (plain, marked)), self.supervised(marked, "It ends a thought.").ids]
        if self.thought_end is not None:
            found += [self.thinking_prompt(marked), self.close_thought([], False, "My answer: **")]
        content = json.dumps([self.thinking, *found, sorted(self.stop_ids)])
        return hashlib.blake2b(content.encode(), digest_size=12).hexdigest()

    def decode(self, ids: Sequence[int] | Tensor) -> str:
        """Text of response tokens (tokens,), stripped, without special tokens."""
        return str(self.tokenizer.decode([int(token) for token in ids], skip_special_tokens=True)).strip()

    # ---------------------------------------------------------------- answers

    def answers(self, word: str) -> list[list[int]]:
        """All token sequences that mean `word`: single tokens if there are any, else its encoding in several tokens.

        Single tokens match exactly after stripping space and boundary marks and ignoring case.
        """
        single = self._tokens_by_word.get(word.casefold())
        if single:
            return [[token] for token in single]
        spelled = self._encode(word)
        unknown = self.tokenizer.unk_token_id
        if not spelled or (unknown is not None and unknown in spelled) or self.decode(spelled) != word:
            raise UserError(
                f"the tokenizer cannot encode the answer {word!r}",
                "Use another model, or a probe with other answers.",
            )
        return [spelled]

    @cached_property
    def _tokens_by_word(self) -> dict[str, list[int]]:
        words: dict[str, list[int]] = {}
        specials = set(self.tokenizer.all_special_ids)
        known = set(self.tokenizer.get_vocab().values())
        indices = sorted(i for i in known - specials if self._vocabulary is None or i < self._vocabulary)
        for index, text in zip(indices, self.tokenizer.batch_decode([[index] for index in indices]), strict=True):
            words.setdefault(text.strip(_WORD_MARKERS).removeprefix("##").casefold(), []).append(index)
        return words

    # ---------------------------------------------------------------- template details

    @property
    def supports_system_turn(self) -> bool:
        """Whether the template renders a system turn (some raise, some drop it)."""
        return self.template.supports_system_turn

    @property
    def default_system(self) -> str | None:
        """The system turn that a conversation without one gets from the template; None if it gets none."""
        return self.template.default_system

    @property
    def switches(self) -> dict[str, bool]:
        """The template's variables for thinking, with the values of the thinking setting."""
        return dict.fromkeys(self.template.switches, self._thinks)

    def turns(self, messages: Sequence[Message]) -> list[Message]:
        """The messages for the template: no empty system turn; without a system role, its text joins the user's."""
        turns = [turn for turn in messages if turn["role"] != "system" or turn["content"].strip()]
        if not turns or turns[0]["role"] != "system" or self.supports_system_turn:
            return turns
        system, first, *rest = turns
        return [Message(role="user", content=f"{system['content']}\n\n{first['content']}"), *rest]

    @property
    def _thinks(self) -> bool:
        return self.thinking == "on"

    def _rendered(
        self, messages: Sequence[Message], prefill: str = "", *, thinks: bool | None = None
    ) -> tuple[str, Hidden]:
        """The text with hidden names of control tokens, and these names."""
        thinks = self._thinks if thinks is None else thinks
        if prefill and thinks:
            raise UserError(
                "this probe has an answer anchor, which cannot be combined with thinking",
                "Use --thinking off for this probe.",
            )
        turns = self.turns(messages)
        hidden = self._control_tokens.hide(turns)
        plain = [Message(role=turn["role"], content=text) for turn, text in zip(turns, hidden.texts, strict=True)]
        rendered = self.template.render(plain, thinking=thinks)
        return rendered + self.template.header_end(plain, thinks) + prefill, hidden

    def _encode(self, text: str, hidden: Hidden | None = None) -> list[int]:
        parts = [text] if hidden is None else hidden.parts(text)
        ids = [i for part in parts if part for i in self.tokenizer(part, add_special_tokens=False)["input_ids"]]
        if self._vocabulary is not None and ids and max(ids) >= self._vocabulary:
            token = self.tokenizer.convert_ids_to_tokens(max(ids))
            raise UserError(
                f"the tokenizer of {self._name} encodes {token!r} as token {max(ids)}, but the embedding of the model "
                f"has only {self._vocabulary} rows",
                "Call resize_token_embeddings(len(tokenizer)) on the model, train the new rows, and save it again.",
            )
        return ids
