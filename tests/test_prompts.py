"""Prompts as baselines: neutral ones of a given length, and examples of what a run was trained on."""

from __future__ import annotations

import re

import polars as pl
import pytest

from ws.base.errors import UserError
from ws.baselines import prompts

MOST = 14
LOADED = re.compile(
    r"\b(?:(?:dis)?agree|honest|tru(?:th|e\b)|false|lie|lying|refus|declin|harm|danger|safe|flatter|prais|critic|correct|"
    r"kind|polite|friendl|warm|care|opinion|belie|user|feel|wrong|right|doubt|help|moral|answer|choice|yes\b|no\b|never|"
    r"always|assist(?!ant)|please|duty|serve\b)",
    re.IGNORECASE,
)


@pytest.mark.parametrize("words", [*range(3, 60), 120, 300, 600])
def test_neutral_prompts_have_the_length_that_is_asked_for(words: int) -> None:
    found = prompts.neutral(MOST, words)
    assert all(words - prompts.LARGEST_GAP <= len(prompt.text.split()) <= words for prompt in found)
    assert len({prompt.name for prompt in found}) == MOST
    if words >= 10:
        assert len({prompt.text for prompt in found}) == MOST
        assert len({prompt.text.split(". ")[0] for prompt in found}) >= MOST - 1, "each begins with a text of its own"


def test_neutral_prompts_say_nothing_about_any_behaviour() -> None:
    (everything,) = prompts.neutral(1, 800)
    assert not LOADED.findall(everything.text)
    assert LOADED.findall("You care about the truth. Please agree.") == ["care", "truth", "Please", "agree"]
    assert (everything.side, everything.kind) == (0, "neutral")


@pytest.mark.parametrize(("count", "words"), [(0, 20), (MOST + 1, 20), (1, 2), (1, 2000)])
def test_neutral_prompts_that_there_are_not_are_refused(count: int, words: int) -> None:
    with pytest.raises(UserError, match="neutral prompts"):
        prompts.neutral(count, words)


def table() -> pl.DataFrame:
    """Six topics of three rows; topic 0 has no kept positive response, topic 1 only its last one."""
    rows = [(topic, sample) for topic in range(6) for sample in range(3)]
    return pl.DataFrame({
        "topic": [f"topic {topic}" for topic, _ in rows],
        "prompt": [f"Question {topic}?" for topic, _ in rows],
        "response_pos": [f"plus {topic}.{sample}" for topic, sample in rows],
        "response_neg": [f"minus {topic}.{sample}" for topic, sample in rows],
        "keep_pos": [topic > 1 or (topic, sample) == (1, 2) for topic, sample in rows],
        "keep_neg": [True] * len(rows),
    })  # fmt: skip


def shown(prompt: prompts.Prompt) -> list[tuple[str, str]]:
    return re.findall(r"Message: Question (\d)\?\nReply: (.+)", prompt.context.system)


@pytest.mark.parametrize("seed", range(8))
def test_examples_are_kept_responses_of_one_side_from_different_topics(seed: int) -> None:
    positive = shown(prompts.demonstrations(table(), 1, 5, seed))
    assert sorted(topic for topic, _ in positive) == ["1", "2", "3", "4", "5"]
    assert all(reply.startswith(f"plus {topic}.") for topic, reply in positive) and ("1", "plus 1.2") in positive
    negative = shown(prompts.demonstrations(table(), -1, 6, seed))
    assert [pair for pair in negative if pair[0] != "0"] != positive and len(negative) == 6
    assert [topic for topic, _ in negative if topic != "0"] == [topic for topic, _ in positive], "the same order"


def test_examples_are_a_function_of_their_seed_and_not_of_the_order_of_rows() -> None:
    found = prompts.demonstrations(table(), -1, 3, 0)
    assert found.text.startswith("Examples of how you reply:\n\nMessage: Question ")
    assert (found.name, found.side, found.kind) == ("3 examples -, seed 0", -1, "examples")
    again = prompts.demonstrations(table().sample(fraction=1, shuffle=True, seed=1).sort("response_neg"), -1, 3, 0)
    assert again == found
    assert len({prompts.demonstrations(table(), -1, 3, seed).text for seed in range(10)}) > 5


@pytest.mark.parametrize(("side", "count"), [(1, 6), (-1, 7), (1, 0)])
def test_more_examples_than_topics_with_kept_responses_are_refused(side: int, count: int) -> None:
    with pytest.raises(UserError, match=f"{count} examples of the (pos|neg) side"):
        prompts.demonstrations(table(), side, count, 0)
