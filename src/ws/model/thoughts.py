"""Marks of thoughts: which marks open and close one, and whether a text ends inside one.

Models mark thoughts in many ways: `<think>`, `<thought>`, `[THINK]`, `<|START_THINKING|>`, `<|channel>thought`. A
list of names is never complete. So a mark is recognised by its form. A thought is open if the generation prompt opens a
mark that an assistant's turn of the same template does not.
"""

from __future__ import annotations

import re
from collections.abc import Callable

_MARK = re.compile(r"<[^<>\s]{1,60}>|\[/?[A-Z_]{2,40}\]|◁[^◁▷\s]{1,40}▷")
_CLOSES = re.compile(r"^[<\[◁]\|?/|(?<![a-z])(?:end|close)|^<[^|].*\|>$", re.IGNORECASE)
_THINKS = re.compile(r"think|thought|reason|scratch|analysis", re.IGNORECASE)
_OPPOSITES = (("START", "END"), ("start", "end"), ("BEGIN", "END"), ("begin", "end"), ("open", "close"))


def opened_mark(text: str) -> str | None:
    """The last mark that `text` opens and does not close; None if there is none."""
    opened = None
    for mark in _MARK.findall(text):
        opened = None if _CLOSES.search(mark) else mark
    return opened


def closing_of(mark: str, knows: Callable[[str], bool]) -> str | None:
    """The mark that closes `mark`: the first usual form that `knows` accepts.

    If it accepts none, the name decides: `</thought>` closes `<thought>`; None for a mark that is not about thoughts.
    """
    forms = _closing_forms(mark)
    known = next((form for form in forms if knows(form)), None)
    return known or (forms[0] if _THINKS.search(mark) and "|" not in mark else None)


def thought_marks(template: str, knows: Callable[[str], bool]) -> tuple[str, str] | None:
    """Opening and closing mark of the thoughts in a template; None if it has none."""
    for mark in filter(_THINKS.search, _MARK.findall(template)):
        opening = mark.replace("/", "", 1)
        closing = closing_of(opening, knows)
        if not _CLOSES.search(opening) and closing is not None and knows(closing):
            return opening, closing
    return None


def left_open(prompt: str, header: str) -> str | None:
    """The mark that a generation prompt leaves open, unless the header of an assistant's turn leaves it open too."""
    mark = opened_mark(prompt)
    return None if mark == opened_mark(header) else mark


def is_thought_mark(name: str) -> bool:
    """Whether a token's name shows that it opens or closes a thought."""
    return bool(_MARK.fullmatch(name) and _THINKS.search(name))


def _closing_forms(mark: str) -> list[str]:
    inner, bar = mark[1:-1], "|" if mark.startswith("<|") else ""
    forms = [f"{mark[0]}{bar}/{inner.removeprefix('|')}{mark[-1]}"]  # </think> [/THINK] <|/think|>
    if bar and not inner.endswith("|"):
        forms.append(f"<{inner[1:]}|>")  # <|channel> <channel|>
    return forms + [mark.replace(first, last) for first, last in _OPPOSITES if first in mark]
