"""One renderer for every conversation: data, training, probes and capture all go through `Chat`.

Rules, each learned from a wrong table in earlier work:
* an empty system prompt means no system turn, never an empty one;
* thinking is an explicit policy. `off` renders the generation prompt without thinking and ends where an assistant's
  answer stands: a thought that a template opened is closed, a channel is chosen, and both belong to the prompt and are
  never supervised or scored;
* a prefill (answer anchor) is appended to the rendered text and tokenised with it;
* templates without a system role get the system prompt in front of the first user message;
* a tokenizer without a template gets `PLAIN_TEMPLATE` and a warning;
* names of control tokens in what people write are plain text;
* answers are token sets of exact matches after stripping ("Yes" is not "Yesterday", "no" is not "now").
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
"""Space, and what some tokenizers leave of it when a single token is decoded."""


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

        vocabulary: rows of the embedding; a token beyond is a `UserError`. ends: token ids that end a response besides
        those of the template.
        """
        if thinking not in ("off", "on"):
            raise UserError(f"thinking is {thinking!r}", "Choose off or on.")
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
            console.warn(f"the chat template of {name} may write today's date; runs of another day are computed anew")
        if self.prompt(ask("Is the sky blue?", "Be kind.")) == self.prompt(ask("Why?", "Be kind.")):
            raise UserError(
                f"the tokenizer of {name} writes two different questions as the same tokens",
                "Save the model with the tokenizer that it was trained with.",
            )

    # ---------------------------------------------------------------- rendering

    def text(self, messages: Sequence[Message], prefill: str = "") -> str:
        """The conversation up to where the assistant answers, then `prefill`."""
        rendered, hidden = self._rendered(messages, prefill)
        return hidden.shown(rendered)

    def prompt(self, messages: Sequence[Message], prefill: str = "") -> list[int]:
        """Token ids of `text`, in which names of control tokens that people wrote are plain text."""
        rendered, hidden = self._rendered(messages, prefill)
        return self._encode(rendered, hidden)

    def supervised(self, messages: Sequence[Message], response: str) -> SupervisedTokens:
        """Token ids of the prompt, the response and the end of the assistant turn.

        The prompt ids are an exact prefix: where tokenising the whole text would merge across the boundary, the parts
        are tokenised apart.
        """
        rendered, hidden = self._rendered(messages)
        prompt = self._encode(rendered, hidden)
        said = self._control_tokens.hide([Message(role="assistant", content=response)])
        if not hidden.names and not said.names:
            whole = self._encode(rendered + response + self.turn_end)
            if whole[: len(prompt)] == prompt:
                return SupervisedTokens(whole, len(prompt))
        answer = [*self._encode(said.texts[0], said), *self._encode(self.turn_end)]
        return SupervisedTokens(prompt + answer, len(prompt))

    @cached_property
    def turn_end(self) -> str:
        """What ends an assistant turn, up to and including the first stop token."""
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
        """Token ids up to the inside of an opened thought; a model that does not think gets an opening in words."""
        if self.template.thought is None:
            return self.prompt(messages, _THINK_IN_WORDS)
        rendered, hidden = self._rendered(messages, thinks=True)
        return self._encode(rendered + self.template.thought.opening, hidden)

    def close_thought(self, thought: Sequence[int], closed: bool, anchor: str) -> list[int]:
        """Token ids of a thought, its end, and the answer anchor.

        `closed` says that the model ended the thought itself; otherwise it is told to answer first. The end of the
        thought is the special token, never the encoding of its name.
        """
        if self.template.thought is None or self.thought_end is None:
            return [*thought, *self._encode(f"\n{anchor}")]
        told = [] if closed else self._encode(_TIME_IS_UP)
        return [*thought, *told, self.thought_end, *self._encode(self.template.thought.before_answer + anchor)]

    @cached_property
    def rendering_key(self) -> str:
        """What decides the rendering, for content keys: a digest of the tokens of known conversations.

        Template, switches, thinking policy, tokenizer and date are in it as far as they change what the model reads.
        """
        plain, marked = ask("Is the sky blue?"), ask(" What does </think> mean?\n", "Be kind.")
        found = [*map(self.prompt, (plain, marked)), self.supervised(marked, "It ends a thought.").ids]
        if self.thought_end is not None:
            found += [self.thinking_prompt(marked), self.close_thought([], False, "My answer: **")]
        content = json.dumps([self.thinking, *found, sorted(self.stop_ids)])
        return hashlib.blake2b(content.encode(), digest_size=12).hexdigest()

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
        known = set(self.tokenizer.get_vocab().values())
        indices = sorted(i for i in known - specials if self._vocabulary is None or i < self._vocabulary)
        for index, text in zip(indices, self.tokenizer.batch_decode([[index] for index in indices]), strict=True):
            words.setdefault(text.strip(_WORD_MARKERS).removeprefix("##").casefold(), []).append(index)
        return words

    # ---------------------------------------------------------------- template details

    @property
    def supports_system_turn(self) -> bool:
        """Whether the template renders a system turn at all (some raise, some drop it)."""
        return self.template.supports_system_turn

    @property
    def switches(self) -> dict[str, bool]:
        """The variables by which the template asks whether to think, as the policy sets them."""
        return dict.fromkeys(self.template.switches, self._thinks)

    def turns(self, messages: Sequence[Message]) -> list[Message]:
        """The messages as the template takes them: no empty system turn; without a system role it joins the user's."""
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
        """The text with hidden names of control tokens, and what they are."""
        thinks = self._thinks if thinks is None else thinks
        if prefill and thinks:
            raise UserError(
                "an answer anchor cannot be placed while the model is thinking",
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
                f"the tokenizer of {self._name} writes {token!r} as token {max(ids)}, but the embedding of the model "
                f"has {self._vocabulary} rows",
                "Call resize_token_embeddings(len(tokenizer)) on the model, train the new rows, and save it again.",
            )
        return ids
