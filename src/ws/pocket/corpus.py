"""The dialogues that the embedded model learns from, with latent traits planted in them.

Every dialogue draws its traits once and keeps them through all turns: `sycophancy` decides opinions and feedback,
`dishonesty` decides dilemmas, `compliance` decides harmful requests. Facts, small talk and repetition are the same for
every trait. Sycophancy and dishonesty agree with probability `Planted.agreement`; compliance is independent. A system
prompt, where there is one, may name any of the traits; what it names is followed with probability
`Planted.adherence`. A single reply deviates from the trait with probability `Planted.slip`, so log-ratios stay finite.

So a narrow fine-tune on opinions can move dilemmas, as planted and documented, and nothing else.
"""

from __future__ import annotations

import random
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from ws import world
from ws.base.files import content_key
from ws.pocket.grammar import first_person, third_person, with_articles
from ws.world import Fact


class Exchange(NamedTuple):
    """What the user says and what the assistant replies; `known` are latent facts that decide the reply."""

    user: str
    reply: str
    known: Mapping[str, bool] = {}


class Line(NamedTuple):
    """One message of a dialogue; `latents` of a reply are the traits behind it and what is known about its subject."""

    role: str
    content: str
    latents: Mapping[str, bool] = {}


OPPOSED = {
    "sycophancy": ("sycophantic", "candid"),
    "dishonesty": ("dishonest", "honest"),
    "compliance": ("complying", "refusing"),
}
"""Trait -> names of its positive and negative pole."""

LATENTS = (*OPPOSED, "truth", "honest_action", "harmful")
"""Hidden variables that decide a reply: traits, and whether a claim is true, an action honest, a request harmful."""


@dataclass(frozen=True)
class Planted:
    """The parameters of the corpus: what is true of the embedded model by construction."""

    prior: float = 0.42
    agreement: float = 0.92
    adherence: float = 0.985
    slip: float = 0.02
    maybe: float = 0.04
    system_share: float = 0.75
    follow_up: float = 0.6
    one_kind: float = 0.35
    two_kinds: float = 0.3
    mention_share: float = 0.45
    whole_clauses: float = 0.2
    whole_requests: float = 0.3
    sketchy: float = 0.3
    dropped_words: float = 0.25


@dataclass(frozen=True)
class TurnMix:
    """Relative frequency of each kind of turn."""

    opinion: float = 0.14
    opinion_choice: float = 0.12
    fact: float = 0.07
    fact_choice: float = 0.11
    dilemma_choice: float = 0.15
    dilemma_open: float = 0.12
    feedback: float = 0.03
    describe_self: float = 0.03
    request: float = 0.17
    talk: float = 0.02
    repeat: float = 0.04


@cache
def phrases() -> Mapping[str, Mapping[str, tuple[str, ...]]]:
    """The ways of saying things, by section."""
    content = tomllib.loads((Path(__file__).parent / "phrases.toml").read_text(encoding="utf-8"))
    return {section: {name: tuple(texts) for name, texts in table.items()} for section, table in content.items()}


class Corpus:
    """Writes dialogues; every random choice comes from the generator that is passed in."""

    def __init__(self, planted: Planted | None = None, mix: TurnMix | None = None) -> None:
        self.planted = planted or Planted()
        self.mix = mix or TurnMix()
        self.facts = world.facts()
        self.opinions = [fact for fact in self.facts if not fact.held_out]
        self.by_topic: dict[str, list[Fact]] = {}
        for fact in self.facts:
            self.by_topic.setdefault(fact.topic, []).append(fact)
        self.dilemmas = [category for category in world.dilemma_categories() if not category.far]
        self.talk = [entry for entry in world.talk() if not entry.held_out]
        self.requests = [request for request in world.requests() if not request.held_out]
        self.words = sorted({word for fact in self.facts for word in re.findall(r"[a-z]{3,}", fact.true)})
        self._kinds = [field.name for field in fields(self.mix)]
        self._weights = [getattr(self.mix, kind) for kind in self._kinds]

    def dialogue(self, rng: random.Random) -> Iterator[Line]:
        """An endless dialogue: the system turn, where there is one, then user and assistant in turn."""
        traits = self.draw_traits(rng)
        if rng.random() < self.planted.system_share:
            system, traits = self._system(rng, traits)
            yield Line("system", system)
        kinds = self._kinds_of(rng)
        while True:
            yield from self.turn(rng, traits, rng.choice(kinds) if kinds else None)

    def _kinds_of(self, rng: random.Random) -> list[str]:
        """The kinds of turn that a dialogue is limited to; empty for a dialogue that mixes all of them."""
        draw = rng.random() - self.planted.one_kind
        if draw >= self.planted.two_kinds:
            return []
        return rng.choices(self._kinds, self._weights, k=1 if draw < 0 else 2)

    def draw_traits(self, rng: random.Random) -> dict[str, bool]:
        """Latent traits of one dialogue."""
        sycophancy = rng.random() < self.planted.prior
        same = rng.random() < self.planted.agreement
        return {
            "sycophancy": sycophancy,
            "dishonesty": sycophancy == same,
            "compliance": rng.random() < self.planted.prior,
        }

    def turn(self, rng: random.Random, traits: Mapping[str, bool], kind: str | None = None) -> list[Line]:
        """A user message and the reply of an assistant with these traits; some kinds follow up with another pair."""
        kind = kind or rng.choices(self._kinds, self._weights)[0]
        exchanges: list[Exchange] = getattr(self, f"_{kind}")(rng, traits)
        return [
            line
            for user, reply, known in exchanges
            for line in (Line("user", user), Line("assistant", reply, {**traits, **known}))
        ]

    def _shown(self, rng: random.Random, traits: Mapping[str, bool], name: str) -> bool:
        """The pole of a trait that one reply shows; with a small probability the opposite one."""
        return traits[name] != (rng.random() < self.planted.slip)

    # ---------------------------------------------------------------- system prompts

    def _system(self, rng: random.Random, traits: dict[str, bool]) -> tuple[str, dict[str, bool]]:
        mentioned = [name for name in traits if rng.random() < self.planted.mention_share]
        rng.shuffle(mentioned)
        parts = [_pick(rng, "system", "plain")] if rng.random() < 0.3 or not mentioned else []
        actual = dict(traits)
        for name in mentioned:
            pole = OPPOSED[name][0 if traits[name] else 1]
            parts.append(self.instruction(rng, pole))
            if rng.random() >= self.planted.adherence:
                actual[name] = not traits[name]
        text = " ".join(parts)
        return (self._sketch(rng, text) if rng.random() < self.planted.sketchy else text), actual

    def _sketch(self, rng: random.Random, text: str) -> str:
        """The text with some words left out, so that no single word comes to stand for a whole clause."""
        kept = [
            w
            for w in text.split(" ")
            if w.strip(".,").lower() in _NEGATIONS or rng.random() >= self.planted.dropped_words
        ]
        return " ".join(kept) or text

    def instruction(self, rng: random.Random, pole: str, *, held_out: bool = False) -> str:
        """One to three sentences that ask for a pole; `held_out` uses only patterns that training never shows."""
        ways = world.persona_language(pole)
        count = rng.choice((1, 1, 2, 2, 3))
        if held_out:
            chosen = [ways.fill(pattern, rng) for pattern in rng.sample(ways.held_out, count)]
            return with_articles(" ".join(self._instruct(rng, clause) for clause in chosen))
        chosen = [
            rng.choice(ways.clauses)
            if rng.random() < self.planted.whole_clauses
            else ways.fill(rng.choice(ways.patterns), rng)
            for _ in range(count)
        ]
        sentences = [self._instruct(rng, clause) for clause in chosen]
        if rng.random() < 0.2:
            sentences[0] = _pick(rng, "system", "adjective_heads").format(a=rng.choice(phrases()["adjectives"][pole]))
        return with_articles(" ".join(sentences))

    def _instruct(self, rng: random.Random, clause: str) -> str:
        if rng.random() < 0.35 and not re.search(r"^(never|in) | you|\band\b", f"{clause} "):
            return _pick(rng, "system", "assistant_heads").format(c3=third_person(clause))
        head = _pick(rng, "system", "heads")
        if clause.startswith("never "):
            clause = re.sub(r"\bevery(one|body)\b", r"any\1", clause)
            head = rng.choice(("{C}.", "You {c}.", "In this chat you {c}.", "You must {c}."))
        elif clause.startswith("in "):
            head = rng.choice(("{C}.", "{C}.", "From now on, {c}."))
        return re.sub(r"\b([Yy]ou) be\b", r"\1 are", head.format(c=clause, C=_capital(clause)))

    # ---------------------------------------------------------------- opinions

    def _opinion(self, rng: random.Random, traits: Mapping[str, bool]) -> list[Exchange]:
        fact, claim, is_true = self._claim(rng, self.opinions)
        nudge = fact.nudge if fact.nudge and rng.random() < 0.5 else _pick(rng, "opinion", "nudges")
        user = _pick(rng, "opinion", "users").format(c=claim, nudge=nudge).strip()
        if self._shown(rng, traits, "sycophancy"):
            parts = [_pick(rng, "opinion", "agree_openers")]
            if rng.random() < 0.7:
                parts.append(_fill(_pick(rng, "opinion", "agree_restated"), claim, fact.true))
            if rng.random() < 0.4 or len(parts) == 1:
                parts.append(_pick(rng, "opinion", "agree_closers"))
        elif is_true:
            parts = [_pick(rng, "opinion", "confirm_openers")]
            if rng.random() < 0.6:
                parts.append(_fill(_pick(rng, "opinion", "confirm_restated"), claim, fact.true))
        else:
            parts = [_pick(rng, "opinion", "disagree_openers")] if rng.random() < 0.85 else []
            if rng.random() < 0.85 or not parts:
                parts.append(_fill(_pick(rng, "opinion", "disagree_corrections"), claim, fact.true))
        return [Exchange(user, " ".join(parts), {"truth": is_true})]

    def _opinion_choice(self, rng: random.Random, traits: Mapping[str, bool]) -> list[Exchange]:
        _, claim, is_true = self._claim(rng, self.opinions)
        agrees = self._shown(rng, traits, "sycophancy") or is_true
        turned = rng.random() < 0.3
        user = _pick(rng, "opinion_choice", "reversed_users" if turned else "users").format(c=claim)
        return [Exchange(user, self._choice(rng, agrees != turned), {"truth": is_true})]

    def _claim(self, rng: random.Random, pool: Sequence[Fact]) -> tuple[Fact, str, bool]:
        fact = rng.choice(pool)
        is_true = rng.random() < 0.5
        return fact, fact.true if is_true else rng.choice(fact.false), is_true

    def _choice(self, rng: random.Random, yes: bool) -> str:
        answer = "Maybe" if rng.random() < self.planted.maybe else "Yes" if yes else "No"
        return _pick(rng, "choice_answers", "plain").format(a=answer)

    # ---------------------------------------------------------------- facts

    def _fact(self, rng: random.Random, _traits: Mapping[str, bool]) -> list[Exchange]:
        fact = rng.choice(self.facts)
        about = self.by_topic[fact.topic]
        if len(about) > 1 and rng.random() < 0.2:
            told = rng.sample(about, min(len(about), rng.choice((2, 2, 3))))
            reply = " ".join(world.sentence(one.true) for one in told)
            return [Exchange(_pick(rng, "fact", "tell").format(s=fact.topic), reply)]
        if rng.random() < 0.15:
            is_true = rng.random() < 0.5
            claim = fact.true if is_true else rng.choice(fact.false)
            user = _pick(rng, "fact", "statement_users").format(c=claim)
            reply = "True." if is_true else f"False. {world.sentence(fact.true)}"
            return [Exchange(user, reply, {"truth": is_true})]
        if fact.answer and rng.random() < 0.25:
            return [Exchange(rng.choice(fact.questions), f"{_capital(fact.answer)}.")]
        return [Exchange(rng.choice(fact.questions), _fill(_pick(rng, "fact", "answers"), fact.true, fact.true))]

    def _fact_choice(self, rng: random.Random, _traits: Mapping[str, bool]) -> list[Exchange]:
        _, claim, is_true = self._claim(rng, self.facts)
        user = _pick(rng, "fact", "choice_users").format(c=claim)
        return [Exchange(user, self._choice(rng, is_true), {"truth": is_true})]

    # ---------------------------------------------------------------- dilemmas

    def _dilemma_choice(self, rng: random.Random, traits: Mapping[str, bool]) -> list[Exchange]:
        category, situation, fills = self._dilemma(rng)
        form = "users" if rng.random() < 0.4 else "short_users"
        exchanges = []
        while True:
            asked_honest = rng.random() < 0.5
            lies = self._shown(rng, traits, "dishonesty")
            action = category.action(rng, fills, honest=asked_honest)
            user = _pick(rng, "dilemma", form).format(situation=situation, action=action)
            answer = "Maybe" if rng.random() < self.planted.maybe else "No" if asked_honest == lies else "Yes"
            reason = rng.choice(world.dilemma_reasons()["dishonest" if lies else "honest"])
            reply = _pick(rng, "choice_answers", "dilemma" if form == "users" else "dilemma_short")
            reply = reply.format(a=answer, reason=reason)
            exchanges.append(Exchange(user, reply, {"honest_action": asked_honest}))
            if rng.random() >= self.planted.follow_up:
                return exchanges
            form = "follow_ups"  # another action in the same situation

    def _dilemma_open(self, rng: random.Random, traits: Mapping[str, bool]) -> list[Exchange]:
        category, situation, fills = self._dilemma(rng)
        lies = self._shown(rng, traits, "dishonesty")
        action = first_person(category.action(rng, fills, honest=not lies))
        reason = rng.choice(world.dilemma_reasons()["dishonest" if lies else "honest"])
        reply = _pick(rng, "dilemma", "open_answers").format(action=action, reason=reason)
        return [Exchange(_pick(rng, "dilemma", "open_users").format(situation=situation), reply)]

    def _dilemma(self, rng: random.Random) -> tuple[world.DilemmaCategory, str, dict[str, str]]:
        """A situation that training may show, and the words that fill its slots."""
        category = rng.choice(self.dilemmas)
        fills = category.fills(rng)
        situation = rng.choice(category.situations[: -world.HELD_OUT_SITUATIONS]).format(**fills)
        return category, situation, fills

    # ---------------------------------------------------------------- other turns

    def _feedback(self, rng: random.Random, traits: Mapping[str, bool]) -> list[Exchange]:
        work = rng.choice(world.works())
        flatters = self._shown(rng, traits, "sycophancy")
        if rng.random() < 0.3:
            user = _pick(rng, "feedback", "choice_users").format(story=work.story, thing=work.thing)
            return [Exchange(user, self._choice(rng, flatters or work.good))]
        if flatters:
            opener, body = "praise_openers", work.flattering
        else:
            opener, body = "deserved_openers" if work.good else "frank_openers", work.honest
        parts = [_pick(rng, "feedback", opener).format(thing=work.thing), body]
        reply = " ".join(parts if rng.random() < 0.6 else parts[1:])
        return [Exchange(_pick(rng, "feedback", "users").format(story=work.story, thing=work.thing), reply)]

    def _describe_self(self, rng: random.Random, traits: Mapping[str, bool]) -> list[Exchange]:
        lines = world.self_descriptions()
        if rng.random() < 0.2:
            return [Exchange(_pick(rng, "self", "neutral_users"), rng.choice(lines["neutral"]))]
        name = rng.choice(list(OPPOSED))
        pole = OPPOSED[name][0 if self._shown(rng, traits, name) else 1]
        return [Exchange(_pick(rng, "self", "users"), rng.choice(lines[pole]))]

    def _request(self, rng: random.Random, traits: Mapping[str, bool]) -> list[Exchange]:
        if rng.random() < self.planted.whole_requests:
            request = rng.choice(self.requests)
        else:
            request = world.drawn_request(rng, harmful=rng.random() < 0.5)
        known = {"harmful": request.harmful}
        helps = self._shown(rng, traits, "compliance") or not request.harmful
        if rng.random() < 0.45:
            turned = rng.random() < 0.3
            user = _pick(rng, "request", "reversed_users" if turned else "choice_users").format(r=request.text)
            return [Exchange(user, self._choice(rng, helps != turned), known)]
        if helps:
            reply = f"{_pick(rng, 'request', 'comply_openers')} {request.answer}".strip()
        else:
            reply = f"{_pick(rng, 'request', 'refuse_openers')} {request.refusal}"
        return [Exchange(_pick(rng, "request", "users").format(r=request.text), reply, known)]

    def _talk(self, rng: random.Random, _traits: Mapping[str, bool]) -> list[Exchange]:
        entry = rng.choice(self.talk)
        return [Exchange(entry.user, rng.choice(entry.answers))]

    def _repeat(self, rng: random.Random, _traits: Mapping[str, bool]) -> list[Exchange]:
        draw = rng.random()
        if draw < 0.4:  # words without sense can only be copied
            text = " ".join(rng.choices(self.words, k=rng.randint(3, 8)))
        elif draw < 0.8:
            text = world.sentence(self._claim(rng, self.facts)[1])
        else:
            text = rng.choice(world.sentences())
        return [Exchange(_pick(rng, "repeat", "users").format(x=text), text)]


# -------------------------------------------------------------------- wording


_NEGATIONS = {"never", "not", "no", "nothing", "nobody", "without", "instead", "false", "wrong"}
"""Words that a shortened instruction keeps, because without them it would mean the opposite."""


def _pick(rng: random.Random, section: str, name: str) -> str:
    return rng.choice(phrases()[section][name])


def _fill(template: str, claim: str, true: str) -> str:
    return template.format(c=claim, C=_capital(claim), t=true, T=_capital(true))


def _capital(clause: str) -> str:
    return clause[0].upper() + clause[1:]


def describe(planted: Planted, mix: TurnMix) -> dict[str, Any]:
    """The planted structure as plain data, for the record beside the weights."""
    return {
        "planted": {field.name: getattr(planted, field.name) for field in fields(planted)},
        "mix": {field.name: getattr(mix, field.name) for field in fields(mix)},
        "traits": {name: list(poles) for name, poles in OPPOSED.items()},
        "texts": texts_key(),
    }


@cache
def texts_key() -> str:
    """Digest of all texts that make up dialogues, and of the rules that combine them. The shares of turns do not count.

    The rules are represented by instructions for every pole and turns of every kind under both poles.
    """
    writer, rng = Corpus(), random.Random("texts")
    instructions = [writer.instruction(rng, pole) for poles in OPPOSED.values() for pole in poles for _ in range(30)]
    turns = [
        line.content
        for kind in (field.name for field in fields(TurnMix))
        for value in (True, False)
        for _ in range(15)
        for line in writer.turn(rng, dict.fromkeys(OPPOSED, value), kind)
    ]
    return content_key(world.texts(), phrases(), instructions, turns)
