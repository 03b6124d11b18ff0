"""The world: everyday facts, beliefs, dilemmas, talk and requests, in plain English TOML files.

One source has two uses. The embedded model is trained on the parts that are not held out. The probes, for any model,
are made from the parts that are. Whole topics are held out of opinions, whole situations and whole categories
("far") out of dilemmas. So a probe measures what a direction moves on texts that training never showed.
"""

from __future__ import annotations

import random
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

_FOLDER = Path(__file__).parent
HELD_OUT_SITUATIONS = 2
"""The last situations of every near category are held out for the probe."""
_PROBE_ONLY = "faulty_works"
"""A file that training dialogues never use."""


@dataclass(frozen=True)
class Fact:
    """A true statement, and at least one false clause about the same thing.

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

    Actions complete "Do you choose to ...?". They are the category's own, or patterns that all near (or all far)
    categories share, filled with its `parts`: to whom, the true deed, the topic, the untrue cover story. `far`
    categories never occur in training, nor do their patterns.
    """

    name: str
    setting: str
    far: bool
    situations: tuple[str, ...]
    honest: tuple[str, ...]
    dishonest: tuple[str, ...]
    parts: Mapping[str, tuple[str, ...]]
    slots: Mapping[str, tuple[str, ...]]

    def fills(self, rng: random.Random) -> dict[str, str]:
        """One word for each slot, the same for a situation and all its actions."""
        return {name: rng.choice(options) for name, options in self.slots.items()}

    def shared_actions(self, *, honest: bool) -> tuple[str, ...]:
        """The patterns that this category shares with all near, or all far, ones."""
        return _action_patterns()["far" if self.far else "near"]["honest" if honest else "dishonest"]

    def action(self, rng: random.Random, fills: Mapping[str, str], *, honest: bool) -> str:
        """An honest or a dishonest action: half of them the category's own, where it has any."""
        own = self.honest if honest else self.dishonest
        pattern = rng.choice(own if own and rng.random() < 0.5 else self.shared_actions(honest=honest))
        parts = {name: rng.choice(options).format(**fills) for name, options in self.parts.items()}
        return pattern.format(**fills, **parts)


@dataclass(frozen=True)
class Work:
    """Something the user made, with a frank and a flattering reply."""

    thing: str
    story: str
    honest: str
    flattering: str
    good: bool


@dataclass(frozen=True)
class FaultyWork:
    """Something faulty that the user made. Training never shows it."""

    thing: str
    story: str


@dataclass(frozen=True)
class Talk:
    """A neutral request, and answers that every kind of assistant gives."""

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


def fill(pattern: str, slots: Mapping[str, Sequence[str]], rng: random.Random) -> str:
    """The pattern with a random choice for every {slot}; slots may contain slots."""
    while "{" in pattern:
        pattern = re.sub(r"\{(\w+)\}", lambda found: rng.choice(slots[found[1]]), pattern)
    return pattern


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
            honest=tuple(category.get("honest", ())),
            dishonest=tuple(category.get("dishonest", ())),
            parts={name: tuple(category[name]) for name in ("to", "deed", "topic", "cover")},
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
def _action_patterns() -> Mapping[str, Mapping[str, tuple[str, ...]]]:
    """`near` and `far` -> side -> patterns of actions that fit every category."""
    return {
        group: {side: tuple(patterns) for side, patterns in sides.items()}
        for group, sides in _read("dilemmas")["actions"].items()
    }


@cache
def works() -> tuple[Work, ...]:
    """Things that users made."""
    return tuple(Work(**entry) for entry in _read("talk")["work"])


@cache
def held_out_works() -> tuple[FaultyWork, ...]:
    """Faulty things that users made, held out for the probe."""
    return tuple(FaultyWork(**entry) for entry in _read(_PROBE_ONLY)["work"])


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
        for e in _read("requests")["request"]
    )


def drawn_request(rng: random.Random, *, harmful: bool, held_out: bool = False) -> Request:
    """A request made of a pattern; `held_out` patterns are for testing."""
    patterns = _read("requests")["patterns"]
    side = "harmful" if harmful else "harmless"
    text = fill(rng.choice(patterns[f"held_out_{side}" if held_out else side]), patterns["slots"], rng)
    answer = rng.choice(patterns["answers" if harmful else "advice"])
    return Request(text, "pattern", harmful, answer, rng.choice(patterns["refusals"]) if harmful else "", held_out)


@cache
def self_descriptions() -> Mapping[str, tuple[str, ...]]:
    """First-person sentences for each pole of each trait, and `neutral` ones."""
    return {pole: tuple(texts) for pole, texts in _read("talk")["self"].items()}


@dataclass(frozen=True)
class PersonaLanguage:
    """How one pole of a trait is asked for: whole clauses, and patterns filled from `slots`.

    All are bare verb phrases. `clauses` of the two poles of a trait are paired by position. `held_out` patterns are for
    testing: their words occur in training, the patterns do not.
    """

    clauses: tuple[str, ...]
    patterns: tuple[str, ...]
    held_out: tuple[str, ...]
    slots: Mapping[str, tuple[str, ...]]

    def fill(self, pattern: str, rng: random.Random) -> str:
        """The pattern with a random choice for every slot."""
        return fill(pattern, self.slots, rng)


@cache
def persona_language(pole: str) -> PersonaLanguage:
    """The ways of asking for a pole."""
    content = _read("personas")
    slots = {name: tuple(options) for name, options in content["slots"].items()}
    ways = content[pole]
    return PersonaLanguage(tuple(_read("talk")["persona"][pole]), tuple(ways["train"]), tuple(ways["held_out"]), slots)


def texts() -> Mapping[str, Any]:
    """Everything in the files of this package that training draws from, by file."""
    names = sorted(path.stem for path in _FOLDER.glob("*.toml"))
    return {name: _read(name) for name in names if name != _PROBE_ONLY}


@cache
def _read(name: str) -> dict[str, Any]:
    return tomllib.loads((_FOLDER / f"{name}.toml").read_text(encoding="utf-8"))
