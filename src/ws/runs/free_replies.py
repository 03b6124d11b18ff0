"""Free replies to held-out prompts at alpha -1, 0 and +1, and a judge's reading of them.

Every prompt gets a greedy reply and `SAMPLED` sampled ones, with the same random numbers at every strength. The
unedited model judges them as it judges training pairs (`fitting.judge`): the probability that a reply was written under
the positive persona. An endpoint judges them too, if the run has one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import polars as pl

from ws.algebra.direction import Direction
from ws.base import stats
from ws.edit.condition import Condition, Edit
from ws.edit.steering import under
from ws.fitting.behaviour import Behaviour, ProbeItem
from ws.fitting.judge import Exchange, Judge
from ws.measure import generate
from ws.measure.generate import Request, Sampling
from ws.model.chat import ask
from ws.model.loading import ChatModel
from ws.report.findings import Estimate, Judged
from ws.report.summary import alpha_key
from ws.runs.samples import ALPHAS

SAMPLED = 2
"""Sampled replies per prompt and strength, besides the greedy one."""


def items(behaviour: Behaviour, count: int) -> list[ProbeItem]:
    """Held-out items of the headline group with different open questions, spread over the probe."""
    group = [item for item in behaviour.probe.items if item.group == behaviour.probe.headline]
    distinct = list({item.open_question: item for item in reversed(group)}.values())[::-1]
    shown = min(count, len(distinct))
    return [distinct[number * len(distinct) // shown] for number in range(shown)]


def write(model: ChatModel, direction: Direction, asked: Sequence[ProbeItem], sampling: Sampling) -> pl.DataFrame:
    """Replies at every strength: columns item, cluster, prompt, alpha, draw (0: greedy) and response."""
    prompts = [model.chat.prompt(ask(item.open_question)) for item in asked]
    parts = []
    for alpha in ALPHAS:
        with under(model, Condition.of(Edit("dW", direction), alpha)):
            greedy = generate.sample(
                model, [Request(ids, (item.row,)) for ids, item in zip(prompts, asked, strict=True)],
                replace(sampling, temperature=0.0), seed=0,
            )  # fmt: skip
            keys = [tuple(f"free/{item.row}/{draw}" for draw in range(SAMPLED)) for item in asked]
            drawn = generate.sample(
                model, [Request(ids, some) for ids, some in zip(prompts, keys, strict=True)], sampling, seed=0
            )
        for item, first, rest in zip(asked, greedy, drawn, strict=True):
            for draw, one in enumerate((*first, *rest)):
                parts.append({
                    "item": item.row, "cluster": item.cluster, "prompt": item.open_question, "alpha": alpha,
                    "draw": draw, "response": model.chat.decode(one.ids),
                })  # fmt: skip
    return pl.DataFrame(parts)


def judged(replies: pl.DataFrame, judges: Mapping[str, Judge]) -> pl.DataFrame:
    """The replies with a column `score_<judge>` for every judge."""
    exchanges = [Exchange(*row) for row in replies.select("prompt", "response").iter_rows()]
    return replies.with_columns(pl.Series(f"score_{name}", judge(exchanges)) for name, judge in judges.items())


def summarise(replies: pl.DataFrame) -> dict[str, dict[str, Judged]]:
    """Judge -> strength -> mean score and its change against strength 0 on the same item and draw, over clusters."""
    found: dict[str, dict[str, Judged]] = {}
    for column in (name for name in replies.columns if name.startswith("score_")):
        base = replies.filter(pl.col("alpha") == 0).select("item", "draw", base=column)
        by_alpha = found.setdefault(column.removeprefix("score_"), {})
        for alpha in ALPHAS:
            rows = replies.filter(pl.col("alpha") == alpha).join(base, on=["item", "draw"])
            clusters = rows["cluster"].to_list()
            by_alpha[alpha_key(alpha)] = Judged(
                score=Estimate.of(stats.over_clusters(rows[column].to_numpy(), clusters)),
                change=Estimate.of(stats.over_clusters((rows[column] - rows["base"]).to_numpy(), clusters)),
                replies=len(rows),
                prompts=rows["item"].n_unique(),
            )
    return found
