"""System prompts as baselines: the personas themselves, engineered prompts, and the best of several on a dev split.

A prompt is a Context: it changes tokens and has no strength. `simple` is the first persona of each side, as in the
replicated work; the engineered prompts are in `prompts.toml`, with the behaviour that they were written for.
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ws.edit.condition import Context
from ws.fitting.behaviour import Behaviour

_FILE = Path(__file__).with_name("prompts.toml")


@dataclass(frozen=True)
class Prompt:
    """A named system prompt; `side` is +1 for the positive pole of its behaviour, -1 for the negative one."""

    name: str
    side: int
    kind: Literal["persona", "embody", "mention"]
    text: str

    @property
    def context(self) -> Context:
        """The Context with this prompt."""
        return Context(f"prompt: {self.name}", self.text)


def engineered(behaviour: str) -> list[Prompt]:
    """The hand-written prompts of a shipped behaviour; empty for a user's own behaviour."""
    entries = tomllib.loads(_FILE.read_text(encoding="utf-8"))["prompt"]
    return [Prompt(e["name"], e["side"], e["kind"], e["text"]) for e in entries if e["behaviour"] == behaviour]


def simple(behaviour: Behaviour) -> list[Prompt]:
    """The first persona of each side, as in the replicated work."""
    personas = behaviour.personas
    return [
        Prompt("simple +", 1, "persona", personas.pos[0]),
        Prompt("simple -", -1, "persona", personas.neg[0]),
    ]


def all_personas(behaviour: Behaviour) -> list[Prompt]:
    """Every persona of both sides, the pool that `best of k` chooses from."""
    sides = ((1, "+", behaviour.personas.pos), (-1, "-", behaviour.personas.neg))
    return [
        Prompt(f"persona {sign}{number}", side, "persona", text)
        for side, sign, texts in sides
        for number, text in enumerate(texts)
    ]
