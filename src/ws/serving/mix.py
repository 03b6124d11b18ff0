"""Mix expressions: `0.3 honesty - 0.2 sycophancy` names directions and their strengths.

    mix  = "" | 0 | [sign] term { sign term }        sign = + | -
    term = [number [*]] name                         name = letters, digits and _ . / ~ -, or anything in quotes

A term without a number has strength 1. The same name twice adds up. Names may hold `-`, so a sign that follows a name
needs a space before it.
"""

from __future__ import annotations

import math
import re

from ws.base.errors import UserError

_TOKEN = re.compile(
    r"""\s*(?:
        (?P<number>(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)(?=\s|\*|$|["'])
      | (?P<name>[\w./~][\w./~-]*)
      | "(?P<double>[^"]+)" | '(?P<single>[^']+)'
      | (?P<sign>[+-]) | (?P<times>\*)
    )\s*""",
    re.VERBOSE,
)
_EXAMPLE = "Write it like: 0.3 honesty - 0.2 sycophancy"


def parse(text: str) -> dict[str, float]:
    """Strength of every name in a mix expression; empty for an empty text or 0. Raises `UserError`."""
    tokens = _tokens(text)
    if [value for _, value in tokens] in ([], ["0"]):
        return {}
    found: dict[str, float] = {}
    place = 0
    while place < len(tokens):
        sign = 1.0
        if tokens[place][0] == "sign":
            sign = -1.0 if tokens[place][1] == "-" else 1.0
            place += 1
        elif place:
            raise UserError(f"the mix {text!r} has no + or - before {tokens[place][1]!r}", _EXAMPLE)
        factor = 1.0
        if place < len(tokens) and tokens[place][0] == "number":
            factor = float(tokens[place][1])
            place += 1
            if place < len(tokens) and tokens[place][0] == "times":
                place += 1
        if place == len(tokens) or tokens[place][0] != "name":
            after = f" after {tokens[place - 1][1]!r}" if place else ""
            raise UserError(f"the mix {text!r} lacks a name{after}", _EXAMPLE)
        name = tokens[place][1]
        found[name] = found.get(name, 0.0) + sign * factor
        place += 1
    for name, strength in found.items():
        if not math.isfinite(strength):
            raise UserError(f"the strength of {name!r} in the mix {text!r} is {strength}", "Give a finite number.")
    return found


def written(strengths: dict[str, float]) -> str:
    """The expression of a mix: what `parse` reads back as the same strengths; `0` for none."""
    terms = []
    for name, strength in strengths.items():
        shown = name if re.fullmatch(r"[A-Za-z_./~][\w./~-]*", name) else f'"{name}"'
        terms.append(f"{'-' if strength < 0 else '+'} {float(abs(strength))!r}".removesuffix(".0") + f" {shown}")
    whole = " ".join(terms)
    return "-" + whole[2:] if whole.startswith("- ") else whole.removeprefix("+ ") or "0"


def _tokens(text: str) -> list[tuple[str, str]]:
    """(kind, text) of every part, where kind is number, name, sign or times."""
    tokens, place = [], 0
    while place < len(text.rstrip()):
        match = _TOKEN.match(text, place)
        if match is None:
            raise UserError(f"the mix {text!r} cannot be read from {text[place:].strip()!r} on", _EXAMPLE)
        kind = str(match.lastgroup)
        tokens.append(("name" if kind in ("double", "single") else kind, match[kind]))
        place = match.end()
    return tokens
