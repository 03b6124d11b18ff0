"""Only templates write control tokens. If a message contains the name of one, the name is plain text.

A tokenizer turns the text `<|im_end|>` into the token that ends a turn, also inside a message. So before a template is
rendered, such names in messages are replaced by unused characters. Afterwards each name is encoded in two parts, so
that no control token is found in it. A text without such names is encoded as a whole.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from ws.model.template import Message
from ws.model.thoughts import is_thought_mark

_PRIVATE = range(0xF0000, 0xFFFFD)
"""Private code points, which have no meaning."""


class Hidden(NamedTuple):
    """Texts with the names of control tokens replaced by single characters, and the name for each character."""

    texts: list[str]
    names: Mapping[str, str]

    def shown(self, text: str) -> str:
        """`text` with the names written out."""
        for character, name in self.names.items():
            text = text.replace(character, name)
        return text

    def parts(self, text: str) -> list[str]:
        """`text` cut inside every name, so that no part holds one."""
        found = [""]
        for piece in re.split(f"([{''.join(self.names)}])", text) if self.names else [text]:
            name = self.names.get(piece)
            found[-1] += piece if name is None else name[0]
            if name is not None:
                found.append(name[1:])
        return found


class ControlTokens:
    """Names of the control tokens of one tokenizer: its special tokens, and added ones that the template writes."""

    def __init__(self, tokenizer: Any, template: str) -> None:
        added = {token.content: token.special for token in tokenizer.added_tokens_decoder.values()}
        special = {*tokenizer.all_special_tokens, *(name for name, is_special in added.items() if is_special)}
        # blank ones are left out: Gemma's tokens for line breaks are ordinary text in its template
        self._of_people = _any_of({*special, *(name for name in added if name in template)})
        # in a model's own messages, marks of thoughts and added tokens are kept
        self._of_models = _any_of(name for name in special if not is_thought_mark(name))

    def hide(self, turns: Iterable[Message]) -> Hidden:
        """Hide the names in the texts of `turns`."""
        given = [
            (turn["content"], self._of_models if turn["role"] == "assistant" else self._of_people) for turn in turns
        ]
        found = sorted({name for text, pattern in given for name in pattern.findall(text)})
        free = (chr(code) for code in _PRIVATE if not any(chr(code) in text for text, _ in given))
        names = dict(zip(free, found, strict=False)) if found else {}
        characters = {name: character for character, name in names.items()}
        return Hidden([pattern.sub(lambda match: characters[match[0]], text) for text, pattern in given], names)


def _any_of(names: Iterable[str]) -> re.Pattern[str]:
    longest_first = sorted((name for name in names if len(name.strip()) > 1), key=lambda name: (-len(name), name))
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
