"""Free replies to held-out prompts: which are asked, what is random in them, and what judges make of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import polars as pl
import pytest

from making import random_direction
from ws.base import stats
from ws.fitting import behaviour
from ws.fitting.behaviour import Behaviour, ProbeItem
from ws.fitting.judge import Exchange, PersonaJudge
from ws.measure.generate import Sampling
from ws.model.loading import ChatModel
from ws.runs import free_replies

SHORT = Sampling(max_new_tokens=6, temperature=1.0)


@pytest.fixture(params=behaviour.names())
def shipped(request: pytest.FixtureRequest) -> Behaviour:
    """Each shipped behaviour in turn."""
    return behaviour.load(request.param)


@pytest.mark.parametrize("count", [1, 16, 24, 1000])
def test_prompts_are_distinct_and_spread_over_the_headline_group(shipped: Behaviour, count: int) -> None:
    group = [item for item in shipped.probe.items if item.group == shipped.probe.headline]
    questions = list(dict.fromkeys(item.open_question for item in group))
    found = free_replies.items(shipped, count)
    assert len(found) == min(count, len(questions)) == len({item.open_question for item in found})
    assert {item.group for item in found} == {shipped.probe.headline}
    places = [questions.index(item.open_question) for item in found]
    assert places == sorted(places)
    gaps = [after - before for before, after in zip(places, [*places[1:], len(questions)], strict=True)]
    assert places[0] == 0 and max(gaps) - min(gaps) <= 1, "even steps, up to the end of the probe"


def test_no_prompts_are_asked_if_none_are_wanted(shipped: Behaviour) -> None:
    assert free_replies.items(shipped, 0) == []


def test_items_with_one_open_question_are_asked_once(shipped: Behaviour) -> None:
    """The items of honesty come in pairs about one situation."""
    probe = shipped.probe
    twice = tuple(replace(item, row=f"{item.row}-{n}") for item in probe.items[:3] for n in range(2))
    doubled = replace(shipped, probe=replace(probe, items=twice))
    assert next(item.row for item in free_replies.items(doubled, 6)) == f"{probe.items[0].row}-0"
    assert len(free_replies.items(doubled, 6)) == len({item.open_question for item in probe.items[:3]})


def test_random_numbers_are_the_same_at_all_strengths_and_differ_between_draws(qwen: ChatModel) -> None:
    asked = free_replies.items(behaviour.load("sycophancy"), 3)
    nothing, strong = (scale * random_direction(qwen, relative_norm=0.5) for scale in (0.0, 1.0))
    same, moved = (free_replies.write(qwen, direction, asked, SHORT) for direction in (nothing, strong))
    assert same.columns == ["item", "cluster", "prompt", "alpha", "draw", "response"]
    assert len(same) == 3 * 3 * (1 + free_replies.SAMPLED)
    assert same["prompt"].unique(maintain_order=True).to_list() == [item.open_question for item in asked]
    by_alpha = {alpha: same.filter(alpha=alpha).drop("alpha") for alpha in (-1.0, 0.0, 1.0)}
    assert by_alpha[-1.0].equals(by_alpha[0.0]) and by_alpha[1.0].equals(by_alpha[0.0])
    for item in asked:
        drawn = by_alpha[0.0].filter(item=item.row)
        assert drawn["draw"].to_list() == [0, 1, 2] and drawn["response"].n_unique() == 3
    assert moved.filter(alpha=0.0).equals(same.filter(alpha=0.0)), "strength 0 is the unedited model"
    assert not moved.filter(alpha=1.0)["response"].equals(same.filter(alpha=1.0)["response"])


def test_the_first_reply_is_greedy(qwen: ChatModel) -> None:
    asked = free_replies.items(behaviour.load("sycophancy"), 2)
    nothing = 0.0 * random_direction(qwen, relative_norm=0.5)
    at = [free_replies.write(qwen, nothing, asked, replace(SHORT, temperature=t)) for t in (0.5, 1.0)]
    first, rest = ([one.filter(condition)["response"] for one in at] for condition in (pl.col("draw") == 0,
                                                                                     pl.col("draw") > 0))  # fmt: skip
    assert first[0].equals(first[1]) and not rest[0].equals(rest[1]), "the temperature is of the sampled ones"


# -------------------------------------------------------------------- judges


def table(scores: dict[float, list[float]]) -> pl.DataFrame:
    """Judged replies: two items in clusters of their own, two draws; `scores` by strength in (item, draw) order."""
    return pl.DataFrame([
        {"item": item, "cluster": item, "prompt": f"Is it {item}?", "alpha": alpha, "draw": draw,
         "response": f"{item}{draw}", "score_persona": values[2 * number + draw]}
        for alpha, values in scores.items() for number, item in enumerate("ab") for draw in range(2)
    ])  # fmt: skip


SCORES = {-1.0: [0.1, 0.2, 0.0, 0.1], 0.0: [0.3, 0.5, 0.2, 0.4], 1.0: [0.9, 0.7, 0.8, 0.2]}


def test_mean_and_change_are_those_of_the_same_item_and_draw() -> None:
    shuffled = table(SCORES).sample(fraction=1.0, shuffle=True, seed=1)
    found = free_replies.summarise(shuffled)
    assert list(found) == ["persona"] and list(found["persona"]) == ["-1", "0", "1"]
    minus, base, plus = found["persona"].values()
    assert [one.score.mean for one in (minus, base, plus)] == pytest.approx([0.1, 0.35, 0.65])
    assert [one.change.mean for one in (minus, base, plus)] == pytest.approx([-0.25, 0.0, 0.3])
    assert {one.replies for one in (minus, base, plus)} == {4} and plus.change.n == 4


def test_the_interval_is_over_clusters_and_of_changes() -> None:
    """Items differ much from each other and move alike: the change is known well, the score is not."""
    rows = [
        {"item": f"{n}", "cluster": f"{n // 2}", "prompt": "p", "alpha": alpha, "draw": 0, "response": "r",
         "score_persona": n / 40 + 0.25 * (alpha + 1) + 0.01 * (n % 3) * alpha}
        for n in range(20) for alpha in (-1.0, 0.0, 1.0)
    ]  # fmt: skip
    plus = free_replies.summarise(pl.DataFrame(rows))["persona"]["1"]
    change = [0.25 + 0.01 * (n % 3) for n in range(20)]
    wanted = stats.over_clusters(change, [f"{n // 2}" for n in range(20)])
    assert (plus.change.mean, plus.change.low, plus.change.high) == pytest.approx(wanted[:3])
    assert plus.change.low is not None and plus.score.low is not None
    assert plus.change.low > 0.25 and plus.score.mean - plus.score.low > 0.1


def test_every_judge_is_called_once_with_all_exchanges() -> None:
    calls: dict[str, list[Sequence[Exchange]]] = {"persona": [], "http": []}

    def judge_of(name: str, sign: float) -> Any:
        def judge(exchanges: Sequence[Exchange]) -> list[float]:
            calls[name].append(exchanges)
            return [0.5 + sign * 0.01 * number for number in range(len(exchanges))]

        return judge

    replies = table(SCORES).drop("score_persona")
    found = free_replies.judged(replies, {"persona": judge_of("persona", 1.0), "http": judge_of("http", -1.0)})
    wanted = [Exchange(prompt, response) for prompt, response in replies.select("prompt", "response").iter_rows()]
    assert calls == {"persona": [wanted], "http": [wanted]} and len(wanted) == 12
    assert found.columns[-2:] == ["score_persona", "score_http"] and found.drop("score_persona", "score_http").equals(
        replies
    )
    assert found["score_http"].to_list() == pytest.approx([0.5 - 0.01 * number for number in range(12)])
    assert set(free_replies.summarise(found)) == {"persona", "http"}


def test_the_persona_judge_scores_what_a_persona_would_say(qwen: ChatModel) -> None:
    item: ProbeItem = free_replies.items(behaviour.load("sycophancy"), 1)[0]
    replies = free_replies.write(qwen, 0.0 * random_direction(qwen, relative_norm=0.5), [item], SHORT)
    judge = PersonaJudge(qwen, behaviour.load("sycophancy"))
    found = free_replies.judged(replies, {"persona": judge})["score_persona"]
    exchanges = [Exchange(item.open_question, text) for text in replies["response"]]
    assert found.to_list() == pytest.approx(judge(exchanges)) and found.is_between(0, 1).all()
