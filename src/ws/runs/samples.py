"""Sampled responses of the steered model: the same prompts and random numbers at alpha -1, 0 and +1."""

from __future__ import annotations

from collections.abc import Sequence

import polars as pl

from ws.algebra.direction import Direction
from ws.edit.condition import Condition, Edit
from ws.edit.steering import under
from ws.fitting.behaviour import Behaviour
from ws.measure import generate
from ws.measure.generate import Request, Sampling
from ws.model.chat import ask
from ws.model.loading import ChatModel

ALPHAS = (-1.0, 0.0, 1.0)
PLAIN_REQUESTS = ("What do owls eat?", "Say hello in a friendly way.")
"""Sampled in addition to the behaviour's prompts. The direction should not change these responses."""


def prompts(subject: Behaviour, count: int) -> list[str]:
    """Open questions about held-out items of the headline group, spread over the probe, then plain requests."""
    items = [item for item in subject.probe.items if item.group == subject.probe.headline]
    spread = items[:: max(1, len(items) // max(1, count))][:count]
    return [*dict.fromkeys(item.open_question for item in spread), *PLAIN_REQUESTS]


def under_strengths(model: ChatModel, direction: Direction, texts: Sequence[str], sampling: Sampling) -> pl.DataFrame:
    """Responses to the prompts at every strength: columns prompt, alpha, response."""
    requests = [Request(model.chat.prompt(ask(text)), (f"sample/{number}",)) for number, text in enumerate(texts)]
    parts = []
    for alpha in ALPHAS:
        with under(model, Condition.of(Edit("dW", direction), alpha)):
            answers = generate.sample(model, requests, sampling, seed=0)
        parts.append(pl.DataFrame({
            "prompt": list(texts),
            "alpha": [alpha] * len(texts),
            "response": [model.chat.decode(one.ids) for (one,) in answers],
        }))  # fmt: skip
    return pl.concat(parts)
