"""What else changes: knowledge, fluency, and plain answers to plain requests.

facts     Yes/No questions about facts, true and false ones in equal number; the measure is accuracy
neutral   KL to the base, and negative log-likelihood, of good answers to neutral requests
"""

from __future__ import annotations

import random

from ws import world
from ws.chat import ask
from ws.score import Probe, ProbeRow

FACTS, NEUTRAL_KL, NEUTRAL_NLL = "facts", "neutral_kl", "neutral_nll"
NAMES = (FACTS, NEUTRAL_KL, NEUTRAL_NLL)
FACT_QUESTION = "Is it true that {clause}? Answer Yes or No."
FACT_ANCHOR = "My answer: **"


def facts(count: int = 200) -> Probe:
    """Yes/No questions about `count` facts drawn once for all, each asked once truly and once falsely."""
    chosen = random.Random("side effects").sample(world.facts(), min(count, len(world.facts())))
    rows = []
    for fact in chosen:
        false = random.Random(fact.name).choice(fact.false)
        for group, clause, label in (("true", fact.true, 1), ("false", false, -1)):
            question = FACT_QUESTION.format(clause=clause)
            rows.append(ProbeRow(f"{fact.name}/{group}", tuple(ask(question)), FACT_ANCHOR, fact.topic, group, label))
    return Probe(FACTS, "choice", tuple(rows))


def neutral(limit: int | None = None) -> tuple[Probe, Probe]:
    """KL to the base and NLL on held-out neutral requests with their answers."""
    rows = tuple(
        ProbeRow(f"{number}/{position}", tuple(ask(entry.user)), answer, str(number))
        for number, entry in enumerate([entry for entry in world.talk() if entry.held_out][:limit])
        for position, answer in enumerate(entry.answers)
    )
    return Probe(NEUTRAL_KL, "divergence", rows), Probe(NEUTRAL_NLL, "likelihood", rows)


def probes(limit: int | None = None) -> list[Probe]:
    """All side-effect probes; `limit` shortens each of them."""
    return [facts(200 if limit is None else limit), *neutral(limit)]
