"""System prompts as baselines: the personas themselves, engineered prompts, examples of replies, and neutral prompts.

A prompt is a Context: it changes tokens and has no strength. `simple` is the first persona of each side, as in the
replicated work; the engineered prompts are in `prompts.toml`, with the behaviour that they were written for.
`demonstrations` show what a run was trained on. `neutral` prompts are the control: they speak of no behaviour.
"""

from __future__ import annotations

import re
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import polars as pl
import torch

from ws.base import keyed_random
from ws.base.errors import UserError
from ws.edit.condition import Context
from ws.fitting.behaviour import Behaviour

_FILE = Path(__file__).with_name("prompts.toml")
_NEUTRAL_FILE = Path(__file__).with_name("neutral_prompts.toml")
LARGEST_GAP = 2
"""A neutral prompt has at most this many words fewer than it was asked for."""


@dataclass(frozen=True)
class Prompt:
    """A named system prompt; `side` is +1 for the positive pole of its behaviour, -1 for the negative, 0 for none."""

    name: str
    side: int
    kind: Literal["persona", "embody", "mention", "examples", "neutral"]
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


def neutral(count: int, words: int) -> list[Prompt]:
    """`count` prompts of about `words` words about other things: what any text of that length changes.

    Each begins with another text of `neutral_prompts.toml` and takes the sentences that still fit, in order; if its
    text is used up, it goes on with the next one. Words are counted at white space. More prompts or words than there
    are, or fewer words than a sentence has, are a UserError.
    """
    texts = [
        re.split(r"(?<=\.) ", text) for text in tomllib.loads(_NEUTRAL_FILE.read_text(encoding="utf-8"))["prompts"]
    ]
    if not 0 < count <= len(texts):
        raise UserError(f"{count} neutral prompts were requested", f"Give a number from 1 to {len(texts)}.")
    found = []
    for first in range(count):
        chosen, left = [], words
        for sentence in (sentence for text in texts[first:] + texts[:first] for sentence in text):
            if (length := len(sentence.split())) <= left:
                chosen.append(sentence)
                left -= length
        if left > LARGEST_GAP or not chosen:
            every = sum(len(sentence.split()) for text in texts for sentence in text)
            raise UserError(
                f"neutral prompts of {words} words were requested", f"Give a number from 3 to about {every}."
            )
        found.append(Prompt(f"neutral {first} of {words} words", 0, "neutral", " ".join(chosen)))
    return found


def demonstrations(pairs: pl.DataFrame, side: int, count: int, seed: int) -> Prompt:
    """A prompt that shows `count` kept responses of one side with their messages, each from another topic.

    pairs: the table of a run (`fitting.data`). side: +1 or -1. The order of topics depends only on `seed`, so both
    sides show the same topics as far as both have kept responses there. Fewer topics than `count` are a UserError.
    """
    pole = "pos" if side > 0 else "neg"
    generator = keyed_random.generator(f"demonstrations|{seed}")
    topics = pairs["topic"].unique().sort().to_list()
    order = torch.randperm(len(topics), generator=generator).tolist()
    places = torch.rand(len(topics), generator=generator).tolist()
    kept = pairs.filter(pl.col(f"keep_{pole}")).partition_by("topic", as_dict=True)
    shown = [rows.row(int(places[index] * len(rows)), named=True) for index in order
             if (rows := kept.get((topics[index],))) is not None]  # fmt: skip
    if not 0 < count <= len(shown):
        raise UserError(
            f"{count} examples of the {pole} side were requested, and {len(shown)} topics have a kept response",
            "Give a number from 1 to that.",
        )
    parts = [f"Message: {row['prompt']}\nReply: {row[f'response_{pole}']}" for row in shown[:count]]
    text = "\n\n".join(["Examples of how you reply:", *parts])
    return Prompt(f"{count} examples {'+' if side > 0 else '-'}, seed {seed}", side, "examples", text)
