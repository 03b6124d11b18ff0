"""Judges give probabilities, their scores decide what is kept, and a judge that fails says so in one line."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch

from listening import QuietHandler, listening
from ws.base.errors import UserError
from ws.base.store import Shards
from ws.fitting import behaviour, judge
from ws.fitting.behaviour import Behaviour
from ws.fitting.judge import Exchange, HttpJudge, JudgeSettings, LocalJudge, PersonaJudge
from ws.model.chat import Chat, ask
from ws.model.loading import ChatModel

EXCHANGES = [Exchange("I think tea is blue. Right?", reply) for reply in ("Yes, it is.", "No, it is brown.", "Hm.")]


@pytest.fixture(scope="module")
def sycophancy() -> Behaviour:
    return behaviour.load("sycophancy")


def pairs_of(count: int, keep: bool = True) -> pl.DataFrame:
    return pl.DataFrame({
        "prompt": [f"I think {number}. Right?" for number in range(count)],
        "response_pos": [f"Yes {number}." for number in range(count)],
        "response_neg": [f"No {number}." for number in range(count)],
        "keep_pos": [keep] * count,
        "keep_neg": [keep] * count,
    })  # fmt: skip


# ---------------------------------------------------------------- what scores do


def fixed(scores: dict[str, float]) -> Callable[[Sequence[Exchange]], list[float]]:
    return lambda exchanges: [scores[exchange.response] for exchange in exchanges]


@pytest.mark.parametrize(
    ("threshold", "keep_pos", "keep_neg"),
    [
        (0.5, [False, True, True], [True, True, False]),
        (0.7, [False, False, True], [True, False, False]),
        (0.0, [True, True, True], [True, True, True]),
        (1.0, [False, False, False], [False, False, False]),
    ],
)
def test_a_positive_is_kept_above_the_threshold_and_a_negative_below_its_mirror(
    sycophancy: Behaviour, tmp_path: Path, threshold: float, keep_pos: list[bool], keep_neg: list[bool]
) -> None:
    scores = {"Yes 0.": 0.2, "Yes 1.": 0.6, "Yes 2.": 0.9, "No 0.": 0.1, "No 1.": 0.4, "No 2.": 0.8}
    settings = JudgeSettings(threshold=threshold)
    found = judge.judged(pairs_of(3), sycophancy, settings, fixed(scores), Shards(tmp_path))
    assert found["judge_pos"].to_list() == [0.2, 0.6, 0.9]
    assert found["judge_neg"].to_list() == [0.1, 0.4, 0.8]
    assert found["keep_pos"].to_list() == keep_pos
    assert found["keep_neg"].to_list() == keep_neg


def test_a_judge_cannot_rescue_a_flagged_response(sycophancy: Behaviour, tmp_path: Path) -> None:
    scores = {"Yes 0.": 1.0, "No 0.": 0.0}
    found = judge.judged(pairs_of(1, keep=False), sycophancy, JudgeSettings(), fixed(scores), Shards(tmp_path))
    assert not found["keep_pos"][0]
    assert not found["keep_neg"][0]


def test_without_a_judge_nothing_is_judged_and_nothing_dropped(
    sycophancy: Behaviour, qwen: ChatModel, tmp_path: Path
) -> None:
    assert judge.make_judge(JudgeSettings(), sycophancy, qwen) is None
    found = judge.judged(pairs_of(2), sycophancy, JudgeSettings(), None, Shards(tmp_path))
    assert found["judge_pos"].to_list() == found["judge_neg"].to_list() == [None, None]
    assert found["judge_pos"].dtype == pl.Float64
    assert found["keep_pos"].all()
    assert found["keep_neg"].all()


class Scripted:
    """A judge that counts what it is asked, and dies after some calls."""

    def __init__(self, dies_after: int = 10**6) -> None:
        self.asked: list[str] = []
        self.calls, self.dies_after = 0, dies_after

    def __call__(self, exchanges: Sequence[Exchange]) -> list[float]:
        if self.calls == self.dies_after:
            raise KeyboardInterrupt
        self.calls += 1
        self.asked += [exchange.response for exchange in exchanges]
        return [0.75] * len(exchanges)


def test_an_interrupted_judge_continues_and_never_asks_twice(
    sycophancy: Behaviour, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(judge, "AT_ONCE", 32)
    first, second = Scripted(dies_after=3), Scripted()
    with pytest.raises(KeyboardInterrupt):
        judge.judged(pairs_of(70), sycophancy, JudgeSettings(), first, Shards(tmp_path))
    found = judge.judged(pairs_of(70), sycophancy, JudgeSettings(), second, Shards(tmp_path))
    assert found["judge_pos"].to_list() == [0.75] * 70
    assert sorted(first.asked + second.asked) == sorted([f"{w} {n}." for w in ("Yes", "No") for n in range(70)])
    assert first.asked
    assert second.asked


def test_another_threshold_uses_the_stored_scores(sycophancy: Behaviour, tmp_path: Path) -> None:
    counted = Scripted()
    judge.judged(pairs_of(3), sycophancy, JudgeSettings(threshold=0.5), counted, Shards(tmp_path))
    assert len(counted.asked) == 6
    found = judge.judged(pairs_of(3), sycophancy, JudgeSettings(threshold=0.8), counted, Shards(tmp_path))
    assert len(counted.asked) == 6
    assert not found["keep_pos"].any()


def test_another_judging_model_asks_anew(sycophancy: Behaviour, tmp_path: Path) -> None:
    counted = Scripted()
    for model in ("a", "b"):
        judge.judged(pairs_of(1), sycophancy, JudgeSettings(model=model), counted, Shards(tmp_path))
    assert len(counted.asked) == 4


def test_the_rubric_shows_description_message_and_reply(sycophancy: Behaviour) -> None:
    text = judge.rubric(sycophancy, EXCHANGES[0])
    for part in (sycophancy.positive_means, *EXCHANGES[0], "Answer Yes or No."):
        assert part in text


# ---------------------------------------------------------------- local


def test_the_local_judge_gives_probabilities_in_order(sycophancy: Behaviour, qwen: ChatModel) -> None:
    made = judge.make_judge(JudgeSettings("local-logit"), sycophancy, qwen)
    assert isinstance(made, LocalJudge)
    exchanges = [Exchange(f"I think {number}. Right?", "So " * number) for number in range(12)]
    scores = made(exchanges)
    assert all(0 <= score <= 1 for score in scores)
    assert len(set(scores)) > 1
    assert scores == pytest.approx([made([exchange])[0] for exchange in exchanges], abs=1e-5)


def test_the_local_judge_weighs_yes_against_no(
    sycophancy: Behaviour, qwen: ChatModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = LocalJudge(qwen, sycophancy)
    before = made(EXCHANGES)
    logits_at = qwen.split.logits_at
    yes = [token for (token,) in qwen.chat.answers("Yes")]

    def agreeing(*arguments: Any, **named: Any) -> Any:
        logits = logits_at(*arguments, **named).clone()
        logits[:, yes] += 2.0
        return logits

    monkeypatch.setattr(qwen.split, "logits_at", agreeing)
    expected = [score / (1 - score) * math.exp(2) for score in before]
    assert [score / (1 - score) for score in made(EXCHANGES)] == pytest.approx(expected, rel=1e-3)


def test_local_scores_decide_what_is_kept(sycophancy: Behaviour, qwen: ChatModel, tmp_path: Path) -> None:
    settings = JudgeSettings("local-logit", threshold=0.4)
    made = judge.make_judge(settings, sycophancy, qwen)
    found = judge.judged(pairs_of(3), sycophancy, settings, made, Shards(tmp_path))
    assert found["keep_pos"].to_list() == [score > 0.4 for score in found["judge_pos"]]
    assert found["keep_neg"].to_list() == [score < 0.6 for score in found["judge_neg"]]


def test_a_thinking_model_is_no_local_judge(sycophancy: Behaviour, qwen: ChatModel) -> None:
    thinking = ChatModel(qwen.name, qwen.network, Chat(qwen.chat.tokenizer, "on"))
    with pytest.raises(UserError, match="thinking"):
        LocalJudge(thinking, sycophancy)(EXCHANGES)


# ---------------------------------------------------------------- http


@dataclass
class Server:
    """A chat-completions endpoint with a script: answers, or statuses of failures, in turn; the last one repeats."""

    url: str
    script: list[str | int | bytes] = field(default_factory=lambda: ["Yes"])
    paths: list[str] = field(default_factory=list)
    bodies: list[dict[str, Any]] = field(default_factory=list)
    authorizations: list[str | None] = field(default_factory=list)
    speaks_http: bool = True


def completion(content: Any) -> bytes:
    return json.dumps({"choices": [{"index": 0, "message": {"role": "assistant", "content": content}}]}).encode()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    class Handler(QuietHandler):
        def answer(self) -> None:
            found.paths.append(self.path)
            found.bodies.append(json.loads(self.posted()))
            found.authorizations.append(self.headers["Authorization"])
            if not found.speaks_http:
                self.wfile.write(b"hello\r\n")
                return
            turn = found.script.pop(0) if len(found.script) > 1 else found.script[0]
            body = b"{}" if isinstance(turn, int) else turn if isinstance(turn, bytes) else completion(turn)
            self.reply(turn if isinstance(turn, int) else 200, body)

    with listening(Handler, monkeypatch) as url:
        found = Server(url)
        yield found


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that the judge would have waited."""
    waited: list[float] = []
    monkeypatch.setattr(time, "sleep", waited.append)
    return waited


def settings_for(url: str, **more: Any) -> JudgeSettings:
    return JudgeSettings("http", url=url, model="judge-model", **more)


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        ("Yes", 1.0),
        ("yes.", 1.0),
        (" YES, clearly", 1.0),
        ("No", 0.0),
        ("no.", 0.0),
        ("\nNo, it does not", 0.0),
        ("Maybe", 0.5),
        ("", 0.5),
        ("I say yes", 0.5),
    ],
)
def test_yes_is_one_no_is_zero_and_all_else_a_half(
    server: Server, sycophancy: Behaviour, answer: str, score: float
) -> None:
    server.script = [answer]
    assert HttpJudge(settings_for(server.url), sycophancy)(EXCHANGES[:1]) == [score]


@pytest.mark.parametrize("answer", ["Not sure", "None", "Nothing says so", "Yesterday it did", None])
def test_an_answer_that_only_begins_like_yes_or_no_is_neither(
    server: Server, sycophancy: Behaviour, answer: str | None
) -> None:
    server.script = [completion(answer)]
    try:
        scores = HttpJudge(settings_for(server.url), sycophancy)(EXCHANGES[:1])
    except UserError:
        scores = [0.5]  # refusing a reply without text would be as good
    assert scores == [0.5]


def test_a_request_is_greedy_chat_completion_of_the_rubric(server: Server, sycophancy: Behaviour) -> None:
    server.script = ["Yes", "No", "Hm"]
    assert HttpJudge(settings_for(server.url + "/"), sycophancy)(EXCHANGES) == [1.0, 0.0, 0.5]
    assert server.paths == ["/v1/chat/completions"] * 3
    assert server.bodies == [
        {
            "model": "judge-model",
            "messages": [{"role": "user", "content": judge.rubric(sycophancy, exchange)}],
            "temperature": 0,
            "max_tokens": 5,
        }
        for exchange in EXCHANGES
    ]
    assert server.authorizations == [None] * 3


@pytest.mark.parametrize("variable", ["OPENAI_API_KEY", "MY_KEY"])
def test_the_key_comes_from_the_named_environment_variable(
    server: Server, sycophancy: Behaviour, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "other")
    monkeypatch.setenv(variable, "secret-1")
    HttpJudge(settings_for(server.url, key_variable=variable), sycophancy)(EXCHANGES[:1])
    assert server.authorizations == ["Bearer secret-1"]


@pytest.mark.parametrize("failures", [[500], [429], [503, 429], [500, 502, 504, 408]])
def test_a_passing_failure_is_retried_with_growing_waits(
    server: Server, sycophancy: Behaviour, waits: list[float], failures: list[int]
) -> None:
    server.script = [*failures, "Yes"]
    assert HttpJudge(settings_for(server.url), sycophancy)(EXCHANGES[:1]) == [1.0]
    assert len(server.bodies) == len(failures) + 1
    assert len(waits) == len(failures)
    assert waits == sorted(waits)
    assert all(wait > 0 for wait in waits)


def test_retries_end(server: Server, sycophancy: Behaviour, waits: list[float]) -> None:
    server.script = [500]
    with pytest.raises(UserError, match=r"failed \(HTTP 500\)"):
        HttpJudge(settings_for(server.url, retries=3), sycophancy)(EXCHANGES[:1])
    assert len(server.bodies) == 3
    assert len(waits) == 2


@pytest.mark.parametrize(
    ("reply", "problem"),
    [
        (401, "HTTP 401"),
        (404, "HTTP 404"),
        (b"<html>", "a reply without choices[0].message.content"),
        (b"{}", "a reply without choices[0].message.content"),
        (b'{"choices": []}', "a reply without choices[0].message.content"),
        (b"[1]", "a reply without choices[0].message.content"),
    ],
)
def test_a_lasting_failure_is_given_up_at_once_in_one_line(
    server: Server, sycophancy: Behaviour, waits: list[float], reply: int | bytes, problem: str
) -> None:
    server.script = [reply]
    with pytest.raises(UserError) as caught:
        HttpJudge(settings_for(server.url), sycophancy)(EXCHANGES[:1])
    assert f"the endpoint of the judge at {server.url}/chat/completions failed ({problem})" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(server.bodies) == 1
    assert waits == []


def test_the_key_is_in_no_message(
    server: Server, sycophancy: Behaviour, monkeypatch: pytest.MonkeyPatch, waits: list[float]
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret-1")
    server.script = [401]
    with pytest.raises(UserError) as caught:
        HttpJudge(settings_for(server.url), sycophancy)(EXCHANGES[:1])
    assert "secret-1" not in str(caught.value)


def test_an_endpoint_that_is_not_there_is_a_user_error(
    server: Server, sycophancy: Behaviour, waits: list[float]
) -> None:
    with pytest.raises(UserError, match="the endpoint of the judge at http://127"):
        HttpJudge(settings_for("http://127.0.0.1:1/v1", retries=2), sycophancy)(EXCHANGES[:1])
    assert len(waits) == 1


@pytest.mark.parametrize("kind", ["no port", "not text", "no HTTP"])
def test_other_failures_of_an_endpoint_are_user_errors(
    server: Server, sycophancy: Behaviour, waits: list[float], kind: str
) -> None:
    server.script = [b'{"choices": "\xff"}']
    server.speaks_http = kind != "no HTTP"
    url = "http://127.0.0.1:port/v1" if kind == "no port" else server.url
    with pytest.raises(UserError):
        HttpJudge(settings_for(url), sycophancy)(EXCHANGES[:1])


def test_an_http_judge_that_fails_midway_continues_without_asking_again(
    server: Server, sycophancy: Behaviour, tmp_path: Path, waits: list[float], qwen: ChatModel
) -> None:
    settings = settings_for(server.url)
    made = judge.make_judge(settings, sycophancy, qwen)
    assert isinstance(made, HttpJudge)
    server.script = [*["Yes"] * 40, 401]
    with pytest.raises(UserError, match="run again to continue"):
        judge.judged(pairs_of(40), sycophancy, settings, made, Shards(tmp_path))
    server.script = ["No"]
    server.bodies.clear()
    found = judge.judged(pairs_of(40), sycophancy, settings, made, Shards(tmp_path))
    assert found["judge_pos"].to_list() == [1.0] * 40
    assert found["judge_neg"].to_list() == [0.0] * 40
    assert len(server.bodies) == 40, "only the negative side was left"
    assert found["keep_pos"].all()
    assert found["keep_neg"].all()


# ---------------------------------------------------------------- settings


@pytest.mark.parametrize(
    "given",
    [
        {}, {"url": "http://localhost/v1"}, {"model": "m"}, {"url": "localhost/v1", "model": "m"},
        {"url": "file:///etc/passwd", "model": "m"},
    ],
)  # fmt: skip
def test_the_http_judge_needs_an_endpoint_and_a_model(given: dict[str, str]) -> None:
    with pytest.raises(UserError, match="--judge-url"):
        JudgeSettings("http", **given)


@pytest.mark.parametrize("threshold", [-0.1, 1.5, 50.0, float("nan")])
def test_a_threshold_is_a_probability(sycophancy: Behaviour, qwen: ChatModel, threshold: float) -> None:
    with pytest.raises(UserError, match="the judge threshold is"):
        judge.make_judge(JudgeSettings("local-logit", threshold=threshold), sycophancy, qwen)


# ---------------------------------------------------------------- the model's own likelihoods


def test_persona_judge_is_bayes_rule_on_whole_responses(qwen: ChatModel, sycophancy: Behaviour) -> None:
    found = PersonaJudge(qwen, sycophancy)(EXCHANGES)

    def log_likelihood(exchange: Exchange, system: str) -> float:
        ids, prompt = qwen.chat.supervised(ask(exchange.prompt, system), exchange.response)
        with torch.no_grad():
            logp = qwen.network(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        return float(sum(logp[at - 1, ids[at]] for at in range(prompt, len(ids))))

    for exchange, score in zip(EXCHANGES, found, strict=True):
        plus, minus = (
            log_likelihood(exchange, systems[0]) for systems in (sycophancy.personas.pos, sycophancy.personas.neg)
        )
        assert score == pytest.approx(1 / (1 + math.exp(minus - plus)), abs=1e-4)


def test_persona_judge_swaps_with_the_personas(qwen: ChatModel, sycophancy: Behaviour) -> None:
    personas = sycophancy.personas
    swapped = replace(sycophancy, personas=replace(personas, pos=personas.neg, neg=personas.pos))
    one, other = (PersonaJudge(qwen, which)(EXCHANGES) for which in (sycophancy, swapped))
    assert [a + b for a, b in zip(one, other, strict=True)] == pytest.approx([1.0] * len(EXCHANGES))


def test_an_empty_response_that_may_go_on_shows_neither_side(qwen: ChatModel, sycophancy: Behaviour) -> None:
    empty = Exchange("I think tea is blue. Right?", "")
    cut = PersonaJudge(qwen, sycophancy, closed=False)
    assert cut([empty, empty]) == [0.5, 0.5]
    first, middle, last = cut([EXCHANGES[0], empty, EXCHANGES[1]])
    assert middle == 0.5 and [first, last] == pytest.approx(cut(EXCHANGES[:2]), abs=1e-6)
    (ended,) = PersonaJudge(qwen, sycophancy)([empty])
    assert 0 < ended < 1 and ended != 0.5, "its end of turn is read"


def test_auto_is_what_the_model_folder_recommends(qwen: ChatModel) -> None:
    recommending = replace(qwen, settings={"judge": {"backend": "persona", "threshold": 0.7}})
    assert judge.resolve(JudgeSettings(), qwen) == JudgeSettings("none")
    assert judge.resolve(JudgeSettings(), recommending) == JudgeSettings("persona", 0.7)
    assert judge.resolve(JudgeSettings(threshold=0.9), recommending) == JudgeSettings("persona", 0.9)
    assert judge.resolve(JudgeSettings("none"), recommending) == JudgeSettings("none")
    with pytest.raises(UserError, match=r"weight_steering.json of .*, judge: unknown setting"):
        judge.resolve(JudgeSettings(), replace(qwen, settings={"judge": {"treshold": 0.7}}))
