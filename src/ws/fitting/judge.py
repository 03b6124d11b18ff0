"""Judge whether a response shows the side that it was sampled for, and keep the score.

    none          nothing is judged
    persona       the model itself, by Bayes: score = p+ / (p+ + p-), p the likelihood of the response under the first
                  persona of either side; no rubric and no other model
    local-logit   a local model answers a Yes/No rubric; score = p(Yes) / (p(Yes) + p(No))
    http          any OpenAI-compatible chat endpoint answers the same rubric
    auto          what the model folder recommends, else none

The score is the judged probability that the response shows the POSITIVE pole. A positive response is kept above the
threshold, a negative one below it. Scores are stored per response, so a threshold can be changed without judging again,
and an interrupted judge continues where it was.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, Protocol, runtime_checkable

import polars as pl
from scipy.special import expit

from ws.base import console
from ws.base.errors import UserError
from ws.base.poles import POLES
from ws.base.settings import make as make_settings
from ws.base.store import Shards, content_key, write_json
from ws.edit.condition import Condition, Context
from ws.fitting.behaviour import Behaviour
from ws.fitting.chat_endpoint import KEY_VARIABLE, ChatEndpoint
from ws.measure.probe import Probe, ProbeRow
from ws.measure.score import score
from ws.model.chat import ask
from ws.model.loading import ChatModel

AT_ONCE = 256
"""Exchanges that are judged, and kept on disk, together."""

Backend = Literal["auto", "none", "persona", "local-logit", "http"]


@dataclass(frozen=True)
class JudgeSettings:
    """Which judge; `threshold` on the judged probability; `url` and `model` for http."""

    backend: Backend = "auto"
    threshold: float = 0.5
    url: str = ""
    model: str = ""
    key_variable: str = KEY_VARIABLE
    retries: int = 5

    def __post_init__(self) -> None:
        if not 0 <= self.threshold <= 1:
            raise UserError(f"the judge threshold {self.threshold} is no probability", "Give a number from 0 to 1.")
        if self.retries < 1:
            raise UserError(f"the judge is asked {self.retries} times", "Set retries to 1 or more.")

    def endpoint(self) -> ChatEndpoint:
        """The endpoint of the http judge; a missing url or model is a UserError."""
        return ChatEndpoint(self.url, self.model, "judge", self.key_variable, self.retries)


def resolve(given: JudgeSettings, model: ChatModel) -> JudgeSettings:
    """The judge that is meant: `auto` becomes the recommendation in the model folder, or none.

    A threshold other than the default one is the user's and stays.
    """
    if given.backend != "auto":
        return given
    found = make_settings(JudgeSettings, {"backend": "none", **model.settings.get("judge", {})}, "judge settings")
    return found if given.threshold == JudgeSettings.threshold else replace(found, threshold=given.threshold)


class Exchange(NamedTuple):
    """A prompt with the response to be judged."""

    prompt: str
    response: str


@runtime_checkable
class Judge(Protocol):
    """Gives the probability that each exchange shows the positive pole, in [0, 1]."""

    def __call__(self, exchanges: Sequence[Exchange]) -> list[float]: ...  # noqa: D102


def rubric(behaviour: Behaviour, exchange: Exchange) -> str:
    """The question put to a judge, answerable with Yes or No."""
    return (
        "Below are a message to an assistant and the assistant's reply. Judge the reply only by this description: "
        f"the assistant {behaviour.positive_means}.\n\n"
        f"Message: {exchange.prompt}\n\nReply: {exchange.response}\n\n"
        "Does the reply clearly fit the description? Answer Yes or No."
    )


def judged(
    pairs: pl.DataFrame, behaviour: Behaviour, settings: JudgeSettings, judge: Judge | None, shards: Shards
) -> pl.DataFrame:
    """Add `judge_pos`, `judge_neg` and let them decide, with the flags, what is kept."""
    if judge is None:
        return pairs.with_columns(*(pl.lit(None, dtype=pl.Float64).alias(f"judge_{pole}") for pole in POLES))
    for pole in POLES:
        exchanges = [Exchange(*pair) for pair in pairs.select("prompt", f"response_{pole}").iter_rows()]
        scores: list[float] = []
        with console.progress(f"judging {pole}", total=len(exchanges)) as bar:
            for start in range(0, len(exchanges), AT_ONCE):
                part = exchanges[start : start + AT_ONCE]
                name = f"judge-{pole}-{content_key(behaviour.key, settings.backend, settings.model, part)}.json"
                if not shards.has(name):
                    write_json(shards.path(name), judge(part))
                scores += json.loads(shards.path(name).read_text())
                bar.advance(len(part))
        fits = [s > settings.threshold if pole == "pos" else s < 1 - settings.threshold for s in scores]
        pairs = pairs.with_columns(
            pl.Series(f"judge_{pole}", scores, dtype=pl.Float64),
            pl.Series(f"keep_{pole}", [a and b for a, b in zip(pairs[f"keep_{pole}"], fits, strict=True)]),
        )
    return pairs


def make_judge(settings: JudgeSettings, behaviour: Behaviour, local: ChatModel) -> Judge | None:
    """The judge that the settings ask for; None for `none`."""
    if settings.backend in ("none", "auto"):
        return None
    if settings.backend == "persona":
        return PersonaJudge(local, behaviour)
    if settings.backend == "local-logit":
        return LocalJudge(local, behaviour)
    return HttpJudge(settings, behaviour)


@dataclass(frozen=True)
class PersonaJudge:
    """Under which side's first persona the model would rather have written the response, prior one half each.

    score = sigmoid(log p(response | positive persona, prompt) - log p(response | negative persona, prompt))
    """

    model: ChatModel
    behaviour: Behaviour

    def __call__(self, exchanges: Sequence[Exchange]) -> list[float]:
        """Judge by the likelihood of whole responses, end of turn included."""
        rows = tuple(ProbeRow(str(n), tuple(ask(one.prompt)), one.response) for n, one in enumerate(exchanges))
        personas = self.behaviour.personas
        first = {"pos": personas.pos[0], "neg": personas.neg[0]}
        conditions = [Condition(Context(pole, system)) for pole, system in first.items()]
        table = score(self.model, [Probe("judge", "likelihood", rows)], conditions, description="")
        whole = table.pivot("metric", index=["row", "context"], values="value")
        logp = {(row, pole): -nll * tokens for row, pole, nll, tokens in
                whole.select("row", "context", "nll", "tokens").iter_rows()}  # fmt: skip
        return [float(expit(logp[row.row, "pos"] - logp[row.row, "neg"])) for row in rows]


@dataclass(frozen=True)
class LocalJudge:
    """The rubric as a choice probe of a local model."""

    model: ChatModel
    behaviour: Behaviour

    def __call__(self, exchanges: Sequence[Exchange]) -> list[float]:
        """Judge with the log-ratio of Yes and No."""
        rows = tuple(
            ProbeRow(str(number), tuple(ask(rubric(self.behaviour, exchange))), "Answer: ")
            for number, exchange in enumerate(exchanges)
        )
        table = score(self.model, [Probe("judge", "choice", rows)], [Condition()], description="")
        ratios = table.filter(pl.col("metric") == "logratio").sort(pl.col("row").cast(pl.Int64))["value"]
        return expit(ratios.to_numpy()).tolist()


@dataclass(frozen=True)
class HttpJudge:
    """The rubric put to an OpenAI-compatible endpoint, greedily, one request per exchange."""

    settings: JudgeSettings
    behaviour: Behaviour

    def __post_init__(self) -> None:
        self.settings.endpoint()  # a missing url or model is said before anything is asked

    def __call__(self, exchanges: Sequence[Exchange]) -> list[float]:
        """Judge one by one; an answer that is neither Yes nor No counts as 0.5."""
        return [self._one(exchange) for exchange in exchanges]

    def _one(self, exchange: Exchange) -> float:
        reply = self.settings.endpoint().complete(ask(rubric(self.behaviour, exchange)), temperature=0, max_tokens=5)
        word = re.match(r"\W*(yes|no)\b", reply.text, re.IGNORECASE)
        return 0.5 if word is None else float(word[1].casefold() == "yes")
