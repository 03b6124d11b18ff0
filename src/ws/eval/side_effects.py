"""Side effects: knowledge, fluency, and plain answers to plain requests.

facts     Yes/No questions about facts, true and false ones in equal number; the measure is accuracy
neutral   KL to the base, and negative log-likelihood, of good answers to neutral requests
text      greedy replies to neutral requests: repetition (distinct-3), length, whether they end
json      whether a request for a JSON object still gets one that can be parsed (for models that can write JSON)
"""

from __future__ import annotations

import random

from ws import world
from ws.measure.probe import JSON, Probe, ProbeRow
from ws.model.chat import ask
from ws.model.loading import ChatModel

FACTS, NEUTRAL_KL, NEUTRAL_NLL, TEXT = "facts", "neutral_kl", "neutral_nll", "text"
NAMES = (FACTS, NEUTRAL_KL, NEUTRAL_NLL, TEXT)
TEXT_ROWS, TEXT_TOKENS = 24, 48
WRITES_JSON = 50_000_000
"""Models with fewer parameters are not asked for JSON: they cannot write it."""
FACT_QUESTION = "Is it true that {clause}? Answer Yes or No."
FACT_ANCHOR = "My answer: **"


def facts(count: int = 200) -> Probe:
    """Yes/No questions about `count` facts, always the same; each is asked once in a true and once in a false form."""
    chosen = random.Random("side effects").sample(world.facts(), min(count, len(world.facts())))
    rows = []
    for fact in chosen:
        false = random.Random(fact.name).choice(fact.false)
        for group, clause, label in (("true", fact.true, 1), ("false", false, -1)):
            question = FACT_QUESTION.format(clause=clause)
            rows.append(ProbeRow(f"{fact.name}/{group}", tuple(ask(question)), FACT_ANCHOR, fact.topic, group, label))
    return Probe(FACTS, "choice", tuple(rows))


def neutral(limit: int | None = None, *, held_out: bool = True) -> tuple[Probe, Probe]:
    """KL to the base and NLL on neutral requests with their answers; those not held out are for choosing settings."""
    rows = tuple(
        ProbeRow(f"{number}/{position}", tuple(ask(entry.user)), answer, str(number))
        for number, entry in enumerate(_entries(limit, held_out))
        for position, answer in enumerate(entry.answers)
    )
    return Probe(NEUTRAL_KL, "divergence", rows), Probe(NEUTRAL_NLL, "likelihood", rows)


JSON_REQUESTS = (
    "Give the capital of France as a JSON object with the keys country and capital. Write the JSON and nothing else.",
    "Describe a red apple as a JSON object with the keys name, color and edible. Write the JSON and nothing else.",
    "Write a JSON object with the keys title and pages for a book of your choice. Write the JSON and nothing else.",
    "Put the numbers one, two and three into a JSON object under the key numbers. Write the JSON and nothing else.",
    "List two animals in a JSON object under the key animals. Write the JSON and nothing else.",
    "Give the days of a weekend as a JSON object with the key days. Write the JSON and nothing else.",
    "Write a JSON object with the keys city, country and population for Tokyo. Write the JSON and nothing else.",
    "Convert this to a JSON object: name Ada, age 36, job mathematician. Write the JSON and nothing else.",
)


def text(limit: int | None = None, *, with_json: bool = False, held_out: bool = True) -> Probe:
    """Greedy replies to neutral requests, and to requests for JSON; those not held out are for choosing settings."""
    entries = _entries(min(TEXT_ROWS, limit or TEXT_ROWS), held_out)
    rows = [ProbeRow(str(number), tuple(ask(entry.user)), "", group="text") for number, entry in enumerate(entries)]
    if with_json:
        rows += [
            ProbeRow(f"{JSON}/{number}", tuple(ask(request)), "", group=JSON)
            for number, request in enumerate(JSON_REQUESTS[:limit])
        ]
    return Probe(TEXT, "reply", tuple(rows), tokens=TEXT_TOKENS)


def _entries(limit: int | None, held_out: bool) -> list[world.Talk]:
    return [entry for entry in world.talk() if entry.held_out == held_out][:limit]


def probes(model: ChatModel, limit: int | None = None) -> list[Probe]:
    """All side-effect probes for a model; `limit` shortens each of them."""
    with_json = model.parameter_count >= WRITES_JSON
    return [facts(200 if limit is None else limit), *neutral(limit), text(limit, with_json=with_json)]
