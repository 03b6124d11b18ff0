"""The English grammar that sentences need when their parts are drawn at random: person, verb form and article."""

from __future__ import annotations

import re

_THIRD = {"do": "does", "have": "has", "be": "is", "go": "goes"}
_VERB = re.compile(r"^((?:(?:always|(?!(?:apply|rely|reply)\b)\w+ly) )*)(\S+)")
"""Splits a clause into its leading adverbs and its verb."""

_BEFORE_ME = "to for at with from of on about gave asks asked told tells saw sees trusts believes forgive taught"
_FIRST = (
    (r"\bthank you\b", "thanks"),
    (r"\byou are\b", "I am"),
    (r"\byou were\b", "I was"),
    (r"\byourself\b", "myself"),
    (r"\byours\b", "mine"),
    (r"\byour\b", "my"),
    (rf"\b({_BEFORE_ME.replace(' ', '|')}) you\b", r"\1 me"),
    (r"\byou(?=$|[.,;])", "me"),
    (r"\byou\b", "I"),
)


def third_person(clause: str) -> str:
    """`always agree with the user` -> `always agrees with the user`; `clause` begins with a verb or its adverbs."""
    return _VERB.sub(lambda found: found[1] + _inflected(found[2]), clause)


def _inflected(verb: str) -> str:
    if verb in _THIRD:
        return _THIRD[verb]
    if re.search(r"[^aeiou]y$", verb):
        return verb[:-1] + "ies"
    return verb + ("es" if re.search(r"(s|sh|ch|x|z|o)$", verb) else "s")


def first_person(action: str) -> str:
    """`tell your boss that you were late` -> `tell my boss that I was late`."""
    for pattern, replacement in _FIRST:
        action = re.sub(pattern, replacement, action)
    return action


def with_articles(text: str) -> str:
    """`a honest helper` -> `an honest helper`, and the reverse. A slot does not know which word follows an article."""
    return re.sub(
        r"\b([Aa])n? (?=(\w+))",
        lambda found: f"{found[1]}n " if re.match(r"[aeioAEIO]|u(?!s|ni)|honest", found[2]) else f"{found[1]} ",
        text,
    )
