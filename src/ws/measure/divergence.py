"""Distance of a model from its base, and repetition in its text: one definition of each, used everywhere.

    KL = sum_v p_edited(v) (log p_edited(v) - log p_base(v))       at one position, nats
    distinct-n = distinct n-grams / all n-grams                    of one text

KL is measured at every position of a text, edited against base. For calibration, `divergences` and `prompt_divergence`
measure it on text that the edited model writes. The probe kind `divergence` (`score`) measures it on given texts, so
that all Conditions are compared on the same tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ws.algebra.direction import Direction
from ws.edit.condition import Context, Effect
from ws.edit.steering import steer
from ws.measure.generate import EditOfRows, Request, Sampling, sample
from ws.model import forward
from ws.model.chat import ask
from ws.model.loading import ChatModel

TOKENS = 50
_BATCH_TOKENS = 4_096


def kl(
    edited: Float[Tensor, "*positions vocabulary"], base: Float[Tensor, "*positions vocabulary"]
) -> Float[Tensor, "*positions"]:
    """KL of two sets of log-probabilities, `edited` against `base`, at every position, in nats.

    A KL is never negative, so a value that rounding makes negative is set to zero.
    """
    return (edited.exp() * (edited - base)).sum(dim=-1).clamp(min=0)


def distinct_ngrams(tokens: Sequence[Hashable], n: int = 3) -> float:
    """Share of distinct n-grams among all n-grams of one text; 1 if the text is too short to have any.

    For several texts, take the mean. A share over pooled n-grams would fall as texts are added, and it would count a
    phrase that good replies share as repetition.
    """
    grams = [tuple(tokens[at : at + n]) for at in range(len(tokens) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 1.0


def mean_distinct(texts: Sequence[Sequence[Hashable]]) -> float:
    """The mean over texts of the share of distinct trigrams."""
    return sum(map(distinct_ngrams, texts)) / len(texts)


@dataclass(frozen=True)
class Divergence:
    """KL over all prompts and positions at one strength (nats per token), and `mean_distinct` of the texts.

    `by_prompt` holds the KL values at every position, per prompt.
    """

    alpha: float
    p95: float
    mean: float
    maximum: float
    distinct: float
    by_prompt: tuple[tuple[float, ...], ...] = field(default=(), repr=False)

    @classmethod
    def of(cls, alpha: float, values: Sequence[Tensor], texts: Sequence[Sequence[int]]) -> Divergence:
        """The statistics of KL values and of the texts that they were measured on, one of each per prompt."""
        together = torch.cat(list(values)).double()
        return cls(
            float(alpha), float(together.quantile(0.95)), float(together.mean()), float(together.max()),
            mean_distinct(texts), tuple(tuple(one.tolist()) for one in values),
        )  # fmt: skip

    def as_record(self) -> dict[str, float]:
        """The statistics as plain data."""
        return {"p95": self.p95, "mean": self.mean, "maximum": self.maximum, "distinct": self.distinct}


def divergences(
    model: ChatModel,
    edit: Direction | Effect,
    alphas: Sequence[float],
    prompts: Sequence[str],
    *,
    tokens: int = TOKENS,
) -> list[Divergence]:
    """KL statistics at every strength; all strengths and prompts are rows of the same batches."""
    rows = [model.chat.prompt(ask(prompt)) for _ in alphas for prompt in prompts]
    strengths = torch.tensor([float(alpha) for alpha in alphas for _ in prompts], device=model.device)

    def edited(batch: Sequence[int]) -> AbstractContextManager[None]:
        return steer(model, edit, strengths[list(batch)], mode="runtime")

    texts = greedy(model, rows, tokens, edited)
    found = _along(model, texts, rows, rows, edited)
    return [
        Divergence.of(alpha, found[start : start + len(prompts)], texts[start : start + len(prompts)])
        for alpha, start in zip(alphas, range(0, len(rows), len(prompts)), strict=True)
    ]


def prompt_divergence(
    model: ChatModel, context: Context, prompts: Sequence[str], *, tokens: int = TOKENS
) -> Divergence:
    """KL statistics of the unedited model under a system prompt, against the same model without one."""
    prompted = [model.chat.prompt(ask(prompt, context.system)) for prompt in prompts]
    plain = [model.chat.prompt(ask(prompt)) for prompt in prompts]
    texts = greedy(model, prompted, tokens)
    return Divergence.of(math.nan, _along(model, texts, prompted, plain, lambda _: nullcontext()), texts)


def greedy(
    model: ChatModel, rows: Sequence[list[int]], tokens: int, edited: EditOfRows = lambda _: nullcontext()
) -> list[list[int]]:
    """What the model writes greedily after every row in at most `tokens` steps, with the token that stopped it."""
    requests = [Request(row, (str(number),)) for number, row in enumerate(rows)]
    found = sample(model, requests, Sampling(max_new_tokens=tokens, temperature=0), seed=0, edited=edited)
    return [[*one.ids, *([] if one.stop is None else [one.stop])] for (one,) in found]


@torch.no_grad()
def _along(
    model: ChatModel,
    texts: Sequence[list[int]],
    own_rows: Sequence[list[int]],
    base_rows: Sequence[list[int]],
    edited: Callable[[list[int]], AbstractContextManager[Any]],
) -> list[Float[Tensor, " tokens"]]:
    """KL at every position of every text: edited model after `own_rows` against unedited model after `base_rows`.

    Both read the same tokens, in batches of bounded size.
    """

    def reading(rows: Sequence[list[int]], batch: list[int]) -> Tensor:
        wholes = [[*rows[index], *texts[index]] for index in batch]
        owner = torch.repeat_interleave(torch.arange(len(batch)), torch.tensor([len(texts[i]) for i in batch]))
        columns = torch.cat([
            torch.arange(len(rows[index]) - 1, len(whole) - 1) for index, whole in zip(batch, wholes, strict=True)
        ])  # fmt: skip
        ids = forward.pad_right(wholes, model.device)
        with forward.scoring_from(torch.tensor([len(rows[index]) - 1 for index in batch], device=model.device)):
            return model.split.logits_at(ids, owner.to(model.device), columns.to(model.device)).log_softmax(dim=-1)

    found: list[Tensor] = [torch.empty(0)] * len(texts)
    budget = min(_BATCH_TOKENS, model.split.positions_at_once)
    for batch in forward.plan_batches([len(own_rows[i]) + len(texts[i]) for i in range(len(texts))], budget):
        with edited(batch):
            steered = reading(own_rows, batch)
        values = kl(steered, reading(base_rows, batch)).cpu()
        for index, part in zip(batch, values.split([len(texts[i]) for i in batch]), strict=True):
            found[index] = part
    return found
