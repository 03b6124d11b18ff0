"""The world: everyday facts, beliefs, dilemmas, talk and requests, in plain English TOML files.

One source for two uses. The embedded model is trained on the parts that are not held out; the probes that any model is
asked are made from the parts that are. Whole topics are held out of opinions, whole situations and whole categories
("far") out of dilemmas, so a probe measures what a direction moves on what it never saw.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

_FOLDER = Path(__file__).parent
HELD_OUT_SITUATIONS = 2
"""The last situations of every near category are kept for the probe."""


@dataclass(frozen=True)
class Fact:
    """Something that is true, with at least one clause that is false about the same thing.

    Clauses read after "I think " and, capitalised, as a sentence. `questions` are open ones that `true` answers;
    `answer` is the short answer where there is one. `held_out` facts occur in questions only, never in opinions.
    """

    name: str
    topic: str
    true: str
    false: tuple[str, ...]
    questions: tuple[str, ...]
    answer: str
    held_out: bool
    nudge: str = ""
    original: bool = False


@dataclass(frozen=True)
class DilemmaCategory:
    """Situations with honest and dishonest actions that fit all of them; `slots` fill the words in braces.

    Actions complete "Do you choose to ...?". `far` categories never occur in training, nor does their wording.
    """

    name: str
    setting: str
    far: bool
    situations: tuple[str, ...]
    honest: tuple[str, ...]
    dishonest: tuple[str, ...]
    slots: Mapping[str, tuple[str, ...]]


@dataclass(frozen=True)
class Work:
    """Something the user made, with a frank and a flattering reply."""

    thing: str
    story: str
    honest: str
    flattering: str
    good: bool


@dataclass(frozen=True)
class Talk:
    """A neutral request with answers that every kind of assistant gives."""

    user: str
    answers: tuple[str, ...]
    held_out: bool


@dataclass(frozen=True)
class Request:
    """A request, harmful or harmless, as a bare verb phrase; `refusal` says why a harmful one is refused."""

    text: str
    topic: str
    harmful: bool
    answer: str
    refusal: str
    held_out: bool


def sentence(clause: str) -> str:
    """`owls eat mice` -> `Owls eat mice.`"""
    return clause[0].upper() + clause[1:] + "."


@cache
def facts() -> tuple[Fact, ...]:
    """Relational facts and beliefs, in file order."""
    return (*_relational_facts(), *_beliefs())


def _relational_facts() -> list[Fact]:
    content = _read("facts")
    held_out = set(content["held_out"])
    found = []
    for relation in content["relation"]:
        values = list(dict.fromkeys(relation["facts"].values()))
        for subject, value in relation["facts"].items():
            possible = {value, *relation.get("not_false", {}).get(subject, ())}
            found.append(Fact(
                name=f"{relation['id']}/{subject}",
                topic=subject,
                true=relation["clause"].format(subject=subject, value=value),
                false=tuple(
                    relation["clause"].format(subject=subject, value=other)
                    for other in values
                    if other not in possible
                ),
                questions=tuple(question.format(subject=subject) for question in relation["questions"]),
                answer=value,
                held_out=subject in held_out,
            ))  # fmt: skip
    return found


def _beliefs() -> list[Fact]:
    return [
        Fact(
            name=f"belief/{belief['id']}",
            topic=belief["id"],
            true=belief["true"],
            false=(belief["false"],),
            questions=(
                f"Tell me the truth about {belief['about']}.",
                f"What do we know about {belief['about']}?",
            ),
            answer="",
            held_out=belief["split"] == "held_out",
            nudge=belief["nudge"],
            original=belief["original"],
        )
        for belief in _read("beliefs")["belief"]
    ]


@cache
def dilemma_categories() -> tuple[DilemmaCategory, ...]:
    """All categories of dilemmas, near ones first."""
    return tuple(
        DilemmaCategory(
            name=category["id"],
            setting=category["setting"],
            far=category["far"],
            situations=tuple(category["situations"]),
            honest=tuple(category["honest"]),
            dishonest=tuple(category["dishonest"]),
            slots={name: tuple(fills) for name, fills in category["slots"].items()},
        )
        for category in _read("dilemmas")["category"]
    )


@cache
def dilemma_reasons() -> Mapping[str, tuple[str, ...]]:
    """Reasons given after a choice, under `honest` and `dishonest`."""
    content = _read("dilemmas")
    return {side: tuple(content[f"reasons_{side}"]) for side in ("honest", "dishonest")}


@cache
def word_meanings() -> Mapping[str, str]:
    """Expressions with their plain meaning, both as bare verb phrases."""
    return dict(_read("dilemmas")["words"])


@cache
def works() -> tuple[Work, ...]:
    """Things that users made."""
    return tuple(Work(**entry) for entry in _read("talk")["work"])


@cache
def talk() -> tuple[Talk, ...]:
    """Neutral small tasks and small talk."""
    return tuple(
        Talk(entry["user"], tuple(entry["answers"]), entry.get("held_out", False)) for entry in _read("talk")["talk"]
    )


@cache
def sentences() -> tuple[str, ...]:
    """Plain everyday sentences."""
    return tuple(_read("talk")["sentences"])


@cache
def requests() -> tuple[Request, ...]:
    """Harmful requests and harmless ones that look alike."""
    return tuple(
        Request(e["text"], e["topic"], e["harmful"], e["answer"], e.get("refusal", ""), e.get("held_out", False))
        for e in _read("talk")["request"]
    )


@cache
def self_descriptions() -> Mapping[str, tuple[str, ...]]:
    """First-person sentences for each pole of each trait, and `neutral` ones."""
    return {pole: tuple(texts) for pole, texts in _read("talk")["self"].items()}


@cache
def persona_clauses() -> Mapping[str, tuple[str, ...]]:
    """Bare verb phrases that instruct a pole of a trait; the poles of one trait are paired by position."""
    return {pole: tuple(clauses) for pole, clauses in _read("talk")["persona"].items()}


def texts() -> Mapping[str, Any]:
    """Everything in the files of this package, by file."""
    return {path.stem: _read(path.stem) for path in sorted(_FOLDER.glob("*.toml"))}


@cache
def _read(name: str) -> dict[str, Any]:
    return tomllib.loads((_FOLDER / f"{name}.toml").read_text(encoding="utf-8"))
