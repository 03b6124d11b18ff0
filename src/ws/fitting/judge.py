"""Judge whether a response shows the pole that it was sampled for, and store the score.

    none          no judging
    persona       the model itself, by Bayes: score = p+ / (p+ + p-), with p+ and p- the likelihoods of the response
                  under the first persona of each side; no rubric and no other model
    local-logit   the model answers a Yes/No rubric; score = p(Yes) / (p(Yes) + p(No))
    http          an OpenAI-compatible chat endpoint answers the same rubric
    auto          the recommendation of the model folder, or none without one

The score is the judged probability that the response shows the POSITIVE pole. A positive response is kept if its score
is above the threshold, a negative one if it is below 1 - threshold. Scores are stored per response. So the threshold
can be changed without judging again, and an interrupted judge continues where it stopped.
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
from ws.base.files import content_key, write_json
from ws.base.poles import POLES
from ws.base.settings import make as make_settings
from ws.base.store import Shards
from ws.edit.condition import Condition, Context
from ws.fitting.behaviour import Behaviour
from ws.fitting.chat_endpoint import KEY_VARIABLE, ChatEndpoint
from ws.measure.probe import Probe, ProbeRow
from ws.measure.score import score
from ws.model.chat import ask
from ws.model.loading import CORRECT, ChatModel

AT_ONCE = 256
"""Exchanges that are judged and stored together."""

NEITHER = 0.5
"""Score of a response that shows neither side."""

Backend = Literal["auto", "none", "persona", "local-logit", "http"]


@dataclass(frozen=True)
class JudgeSettings:
    """Which judge to use; `threshold` applies to the judged probability; `url` and `model` are for http."""

    backend: Backend = "auto"
    threshold: float = 0.5
    url: str = ""
    model: str = ""
    key_variable: str = KEY_VARIABLE
    retries: int = 5

    def __post_init__(self) -> None:
        if not 0 <= self.threshold <= 1:
            raise UserError(f"the judge threshold is {self.threshold}", "Set --judge-threshold from 0 to 1.")
        if self.retries < 1:
            raise UserError(f"the judge setting retries is {self.retries}", "Set it to 1 or more.")
        if self.backend == "http":
            self.endpoint()  # reports a missing url or model before anything is sampled

    def endpoint(self) -> ChatEndpoint:
        """The endpoint of the http judge; a missing url or model is a UserError."""
        return ChatEndpoint(self.url, self.model, "judge", self.key_variable, self.retries)


def resolve(given: JudgeSettings, model: ChatModel, behaviour: str = "") -> JudgeSettings:
    """The judge settings with `auto` replaced by the model folder's recommendation for the behaviour, or by none.

    A threshold that differs from the default counts as the user's choice and is kept.
    """
    if given.backend != "auto":
        return given
    chosen = {"backend": "none", **model.recommended("judge", behaviour)}
    found = make_settings(JudgeSettings, chosen, f"{model.settings_told}, judge", CORRECT)
    return found if given.threshold == JudgeSettings.threshold else replace(found, threshold=given.threshold)


class Exchange(NamedTuple):
    """A prompt with the response to judge."""

    prompt: str
    response: str


@runtime_checkable
class Judge(Protocol):
    """Gives the probability that each exchange shows the positive pole, in [0, 1]."""

    def __call__(self, exchanges: Sequence[Exchange]) -> list[float]: ...  # noqa: D102


def rubric(behaviour: Behaviour, exchange: Exchange) -> str:
    """The Yes/No question for the judge."""
    return (
        "Below are a message to an assistant and the assistant's reply. Judge the reply only by this description: "
        f"the assistant {behaviour.positive_means}.\n\n"
        f"Message: {exchange.prompt}\n\nReply: {exchange.response}\n\n"
        "Does the reply clearly fit the description? Answer Yes or No."
    )


def judged(
    pairs: pl.DataFrame, behaviour: Behaviour, settings: JudgeSettings, judge: Judge | None, shards: Shards
) -> pl.DataFrame:
    """Add the scores `judge_pos` and `judge_neg`, and keep a response only if its score and its flags allow it."""
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
    """Which side's first persona makes the response more likely under the model, with equal prior probabilities.

    score = sigmoid(log p(response | positive persona, prompt) - log p(response | negative persona, prompt))
    """

    model: ChatModel
    behaviour: Behaviour
    closed: bool = True
    """Whether the end of the turn counts; it should not for responses that were cut."""

    def __call__(self, exchanges: Sequence[Exchange]) -> list[float]:
        """Judge by the likelihood of the whole response; an empty response that may go on shows neither side: 0.5."""
        rows = tuple(
            ProbeRow(str(n), tuple(ask(one.prompt)), one.response)
            for n, one in enumerate(exchanges) if self.closed or one.response
        )  # fmt: skip
        if not rows:
            return [NEITHER] * len(exchanges)
        personas = self.behaviour.personas
        first = {"pos": personas.pos[0], "neg": personas.neg[0]}
        conditions = [Condition(Context(pole, system)) for pole, system in first.items()]
        table = score(self.model, [Probe("judge", "likelihood", rows, closed=self.closed)], conditions, description="")
        whole = table.pivot("metric", index=["row", "context"], values="value")
        logp = {(row, pole): -nll * tokens for row, pole, nll, tokens in
                whole.select("row", "context", "nll", "tokens").iter_rows()}  # fmt: skip
        scores = {row.row: float(expit(logp[row.row, "pos"] - logp[row.row, "neg"])) for row in rows}
        return [scores.get(str(n), NEITHER) for n in range(len(exchanges))]


@dataclass(frozen=True)
class LocalJudge:
    """The rubric as a choice probe of the loaded model."""

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
    """The rubric answered by an OpenAI-compatible endpoint at temperature 0, one request per exchange."""

    settings: JudgeSettings
    behaviour: Behaviour

    def __call__(self, exchanges: Sequence[Exchange]) -> list[float]:
        """Judge one exchange after the other; an answer that is neither Yes nor No counts as 0.5."""
        return [self._one(exchange) for exchange in exchanges]

    def _one(self, exchange: Exchange) -> float:
        reply = self.settings.endpoint().complete(ask(rubric(self.behaviour, exchange)), temperature=0, max_tokens=5)
        word = re.match(r"\W*(yes|no)\b", reply.text, re.IGNORECASE)
        return 0.5 if word is None else float(word[1].casefold() == "yes")
