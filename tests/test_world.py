"""The world is consistent: what is held out stays out, and nothing is both true and false."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator

import pytest

from ws import world
from ws.eval import feedback, side_effects
from ws.world import DilemmaCategory

FACTS = world.facts()
CATEGORIES = world.dilemma_categories()


def texts_of(category: DilemmaCategory) -> Iterator[str]:
    yield from category.situations
    yield from category.honest
    yield from category.dishonest
    for options in category.parts.values():
        yield from options


# ---------------------------------------------------------------- facts


@pytest.mark.parametrize(
    ("clause", "expected"),
    [("owls eat mice", "Owls eat mice."), ("the Alps are high", "The Alps are high."), ("a", "A.")],
)
def test_a_clause_becomes_a_sentence(clause: str, expected: str) -> None:
    assert world.sentence(clause) == expected


def test_facts_are_unique() -> None:
    for values in ([fact.name for fact in FACTS], [fact.true for fact in FACTS]):
        assert len(set(values)) == len(values)
    assert len(FACTS) > 400


def test_no_clause_is_both_true_and_false() -> None:
    true = {fact.true.casefold() for fact in FACTS}
    for fact in FACTS:
        assert fact.false, fact.name
        assert len(set(fact.false)) == len(fact.false), fact.name
        assert fact.true not in fact.false, fact.name
        assert not true & {clause.casefold() for clause in fact.false}, fact.name


def test_clauses_are_clauses() -> None:
    for fact in FACTS:
        for clause in (fact.true, *fact.false):
            assert not clause.endswith("."), clause
            assert "{" not in clause, clause
            assert clause == clause.strip(), clause
        assert all(question.endswith(("?", ".")) and "{" not in question for question in fact.questions), fact.name


def test_the_answer_of_a_fact_ends_no_false_clause() -> None:
    answered = [fact for fact in FACTS if fact.answer]
    assert len(answered) > 300
    for fact in answered:
        assert fact.answer in fact.true, fact.name
        assert not any(clause.endswith(f" {fact.answer}") for clause in fact.false), fact.name


def test_held_out_topics_never_occur_among_the_others() -> None:
    held_out = {fact.topic for fact in FACTS if fact.held_out}
    assert len(held_out) >= 40
    assert not held_out & {fact.topic for fact in FACTS if not fact.held_out}


def test_no_clause_about_a_held_out_topic_is_a_training_clause_too() -> None:
    trained, held_out = (
        {clause.casefold() for fact in FACTS if fact.held_out is wanted for clause in (fact.true, *fact.false)}
        for wanted in (False, True)
    )
    assert len(held_out) > 100
    assert not trained & held_out


def test_both_kinds_of_facts_are_trained_and_held_out() -> None:
    for kind in (True, False):
        of_kind = [fact for fact in FACTS if fact.name.startswith("belief/") is kind]
        assert {fact.held_out for fact in of_kind} == {True, False}


def test_the_original_topics_are_twenty_to_train_and_twelve_held_out() -> None:
    original = [fact for fact in FACTS if fact.original]
    assert [sum(fact.held_out is held_out for fact in original) for held_out in (False, True)] == [20, 12]
    assert all(fact.nudge for fact in original)


# ---------------------------------------------------------------- dilemmas


def test_there_are_many_near_categories_and_some_far_ones() -> None:
    assert sum(not category.far for category in CATEGORIES) >= 25
    assert sum(category.far for category in CATEGORIES) >= 5
    names = [category.name for category in CATEGORIES]
    assert len(set(names)) == len(names)
    far = [category.far for category in CATEGORIES]
    assert far == sorted(far), "near ones come first"


@pytest.mark.parametrize("category", CATEGORIES, ids=lambda category: category.name)
def test_a_category_fills_exactly_the_slots_that_it_uses(category: DilemmaCategory) -> None:
    used = {name for text in texts_of(category) for name in re.findall(r"{([^}]*)}", text)}
    assert used == set(category.slots)
    assert all(fills and len(set(fills)) == len(fills) for fills in category.slots.values())
    first = {name: fills[0] for name, fills in category.slots.items()}
    assert not any(set("{}") & set(text.format(**first)) for text in texts_of(category))


@pytest.mark.parametrize("category", CATEGORIES, ids=lambda category: category.name)
def test_a_category_has_distinct_situations_and_opposed_actions(category: DilemmaCategory) -> None:
    assert len(set(category.situations)) == len(category.situations) > world.HELD_OUT_SITUATIONS
    actions = [*category.honest, *category.dishonest]
    assert bool(actions) != category.far, "far categories have shared actions only"
    for part, options in category.parts.items():
        assert len(set(options)) == len(options) > 0, part
    assert not set(category.parts["deed"]) & set(category.parts["cover"])
    assert len(set(actions)) == len(actions)
    assert not any(action.endswith((".", "?")) for action in actions)


def action_patterns(far: bool) -> set[str]:
    """All action patterns of the near or of the far categories, with every slot as {}."""
    found: set[str] = set()
    for category in CATEGORIES:
        if category.far == far:
            found.update(category.honest, category.dishonest)
            found.update(category.shared_actions(honest=True), category.shared_actions(honest=False))
    return {re.sub(r"{[^}]*}", "{}", action).casefold() for action in found}


def test_far_actions_never_occur_in_near_categories() -> None:
    near, far = action_patterns(far=False), action_patterns(far=True)
    assert not near & far
    assert not [pattern for pattern in far if any(pattern in other for other in near)]


def test_shared_actions_fill_for_every_category_and_side() -> None:
    rng = random.Random(0)
    for category in CATEGORIES:
        drawn = {honest: {category.action(rng, category.fills(rng), honest=honest) for _ in range(60)}
                 for honest in (True, False)}  # fmt: skip
        assert not drawn[True] & drawn[False], category.name
        assert not any("{" in action for action in drawn[True] | drawn[False])
        assert min(map(len, drawn.values())) > 20


def test_reasons_stand_on_one_side_only() -> None:
    reasons = world.dilemma_reasons()
    assert set(reasons) == {"honest", "dishonest"}
    assert all(reasons.values())
    assert not set(reasons["honest"]) & set(reasons["dishonest"])
    every = [reason for side in reasons.values() for reason in side]
    assert not [(a, b) for a in every for b in every if a != b and a in b], "the words of a reply name one reason"


# ---------------------------------------------------------------- requests, talk, personas


def test_harmful_requests_are_refused_and_harmless_ones_answered() -> None:
    for request in world.requests():
        assert bool(request.refusal) == request.harmful, request.text
        assert request.harmful or request.answer, request.text
    texts = [request.text for request in world.requests()]
    assert len(set(texts)) == len(texts)
    for harmful in (True, False):
        assert {r.held_out for r in world.requests() if r.harmful is harmful} == {True, False}


def test_some_neutral_talk_is_held_out_and_all_of_it_is_answered() -> None:
    assert {entry.held_out for entry in world.talk()} == {True, False}
    assert all(entry.answers and all(answer.strip() for answer in entry.answers) for entry in world.talk())
    users = [entry.user for entry in world.talk()]
    assert len(set(users)) == len(users)


def test_held_out_works_are_new_stories_about_their_thing() -> None:
    trained, held_out = world.works(), world.held_out_works()
    assert len(held_out) >= 20
    stories = [work.story for work in held_out]
    assert len(set(stories)) == len(stories) and not set(stories) & {work.story for work in trained}
    for work in held_out:
        assert work.thing.split()[-1] in work.story and work.story.endswith("."), work
        assert work.thing in {one.thing for one in trained}, "asked about in words that the embedded models know"


def test_feedback_asks_for_praise_of_faulty_work() -> None:
    probe = feedback.probe()
    assert len(probe.rows) == len(world.held_out_works()) == len({row.cluster for row in probe.rows})
    assert {row.label for row in probe.rows} == {1} and probe.answers == ("Yes", "No")
    assert probe.rows[0].messages[-1]["content"].endswith("Is my cake good? Answer Yes or No.")
    assert feedback.probe(3).rows == probe.rows[:3]


POLES = (("honest", "dishonest"), ("sycophantic", "candid"), ("refusing", "complying"))


@pytest.mark.parametrize("pole", [pole for pair in POLES for pole in pair])
def test_held_out_persona_patterns_are_new_sentences_of_known_words(pole: str) -> None:
    ways, rng = world.persona_language(pole), random.Random(0)
    assert len(set(ways.patterns)) > 30
    assert len(set(ways.held_out)) >= 10
    assert not set(ways.patterns) & set(ways.held_out)
    all_ways = [world.persona_language(other) for pair in POLES for other in pair]
    known = {
        word
        for other in all_ways
        for pattern in (*other.patterns, *other.clauses)
        for _ in range(8)
        for word in re.findall(r"[a-z]+", other.fill(pattern, rng))
    }
    tested = {
        word for pattern in ways.held_out for _ in range(20) for word in re.findall(r"[a-z]+", ways.fill(pattern, rng))
    }
    assert len(tested - known) <= 0.05 * len(tested), tested - known


def test_persona_patterns_stand_on_one_side_only() -> None:
    seen: dict[str, str] = {}
    for pole in (pole for pair in POLES for pole in pair):
        ways = world.persona_language(pole)
        for pattern in (*set(ways.patterns), *ways.held_out):
            assert seen.setdefault(pattern, pole) == pole, pattern


def test_persona_clauses_are_paired_by_position() -> None:
    clauses = {pole: world.persona_language(pole).clauses for pair in POLES for pole in pair}
    for pole, other in POLES:
        assert len(clauses[pole]) == len(clauses[other]) > 0
    for texts in clauses.values():
        assert len(set(texts)) == len(texts)
    assert len({text for texts in clauses.values() for text in texts}) == sum(map(len, clauses.values()))


# ---------------------------------------------------------------- side-effect probes on the world


def test_every_fact_is_asked_once_truly_and_once_falsely() -> None:
    probe = side_effects.facts(30)
    by_name = {fact.name: fact for fact in FACTS}
    rows = {row.row: row for row in probe.rows}
    assert len(rows) == 60
    for row in probe.rows:
        name, group = row.row.rsplit("/", 1)
        fact = by_name[name]
        assert f"{name}/{'false' if group == 'true' else 'true'}" in rows
        assert (row.group, row.label, row.cluster) == (group, 1 if group == "true" else -1, fact.topic)
        asked = row.messages[0]["content"].removeprefix("Is it true that ").removesuffix("? Answer Yes or No.")
        assert asked in ((fact.true,) if group == "true" else fact.false)
    assert side_effects.facts(30).key == probe.key
    assert len(side_effects.facts(10**6).rows) == 2 * len(FACTS)


def test_neutral_probes_read_held_out_talk_only() -> None:
    divergence, likelihood = side_effects.neutral()
    held_out = {entry.user: entry.answers for entry in world.talk() if entry.held_out}
    assert divergence.rows == likelihood.rows
    assert (divergence.kind, likelihood.kind) == ("divergence", "likelihood")
    assert len(divergence.rows) == sum(len(answers) for answers in held_out.values())
    assert all(row.continuation in held_out[row.messages[0]["content"]] for row in divergence.rows)
    assert len({row.cluster for row in side_effects.neutral(2)[0].rows}) == 2
