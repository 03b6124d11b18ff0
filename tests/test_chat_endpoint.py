"""Responses from a chat endpoint: ordered, seeded by row, resumed, clear in failure; and from a real server."""

from __future__ import annotations

import copy
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from transformers.utils.import_utils import is_serve_available

from listening import QuietHandler, listening
from making import assert_one_line
from test_chat import DROPS_SYSTEM, QWEN3, RAISES_ON_SYSTEM
from ws.base.errors import UserError
from ws.base.files import read_json
from ws.base.poles import POLES
from ws.base.store import Shards
from ws.commands import cli
from ws.fitting import behaviour, data, responses
from ws.fitting.behaviour import Behaviour
from ws.fitting.chat_endpoint import ChatEndpoint, Reply
from ws.fitting.data import Grid
from ws.fitting.responses import Asked, EngineSettings, Response
from ws.fitting.run_settings import Settings, restore_settings, stored_settings
from ws.measure.generate import Sampling
from ws.model import library, loading
from ws.model.chat import Chat, ask
from ws.model.loading import ChatModel
from ws.runs.replicate import Replication

SAMPLING = Sampling(max_new_tokens=7, temperature=0.9, top_p=0.8)
GRID = Grid(topics=2, personas=2, samples=3)
EMBEDDED = library.POCKET_MODELS["pocket"]


@pytest.fixture(scope="module")
def sycophancy() -> Behaviour:
    return behaviour.load("sycophancy")


# ---------------------------------------------------------------- an endpoint with a script


def completion(content: Any, finish: str | None = "stop", tokens: int | None = 3) -> bytes:
    choice = {"index": 0, "message": {"role": "assistant", "content": content}, "finish_reason": finish}
    usage = None if tokens is None else {"completion_tokens": tokens}
    return json.dumps({"choices": [choice], "usage": usage}).encode()


def echo(body: dict[str, Any]) -> bytes:
    """A text that tells conversation and seed."""
    return completion(" / ".join([*(turn["content"] for turn in body["messages"]), str(body.get("seed"))]))


@dataclass
class Server:
    """Answers with what `answer` makes of a request: the body of a reply, or the status of a failure."""

    url: str
    answer: Callable[[dict[str, Any]], bytes | int] = echo
    bodies: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)

    @property
    def settings(self) -> EngineSettings:
        """The openai engine at this endpoint."""
        return EngineSettings("openai", self.url, "served")

    @property
    def seeds(self) -> list[int]:
        """Seeds that were asked for, sorted: requests arrive in any order."""
        return sorted(body["seed"] for body in self.bodies)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    class Handler(QuietHandler):
        def answer(self) -> None:
            body = json.loads(self.posted())
            found.bodies.append(body)
            found.keys.append(self.headers["Authorization"])
            answer = found.answer(body)
            self.reply(*((answer, b"{}") if isinstance(answer, int) else (200, answer)))

    with listening(Handler, monkeypatch) as url:
        found = Server(url)
        yield found


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that would have been waited between tries."""
    waited: list[float] = []
    monkeypatch.setattr(time, "sleep", waited.append)
    return waited


def ask_all(server: Server, model: ChatModel, *asked: Asked, sampling: Sampling = SAMPLING) -> list[Response]:
    return responses.respond(server.settings, model, asked, sampling, 0, lambda _: None)


def pairs_from(server: Server, model: ChatModel, subject: Behaviour, folder: Path, seed: int = 0) -> pl.DataFrame:
    return data.make_pairs(model, subject, GRID, SAMPLING, seed, Shards(folder), server.settings)


# ---------------------------------------------------------------- what is asked


def test_a_request_is_a_chat_completion_with_persona_prompt_and_sampling(server: Server, qwen: ChatModel) -> None:
    ask_all(server, qwen, Asked("Who?", "Be kind.", ("a",)))
    assert server.bodies == [
        {
            "model": "served",
            "messages": [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Who?"}],
            "temperature": 0.9,
            "top_p": 0.8,
            "max_tokens": 7,
            "seed": responses.row_seed(0, "a"),
        }
    ]


@pytest.mark.parametrize("empty", ["", "  \n"])
def test_an_empty_persona_is_no_system_message(server: Server, qwen: ChatModel, empty: str) -> None:
    ask_all(server, qwen, Asked("Who?", empty, ("a",)))
    assert server.bodies[0]["messages"] == [{"role": "user", "content": "Who?"}]


def with_template(model: ChatModel, template: str, **more: Any) -> ChatModel:
    tokenizer = copy.copy(model.chat.tokenizer)
    tokenizer.chat_template = template
    return ChatModel(model.name, model.network, Chat(tokenizer, **more))


@pytest.mark.parametrize("template", [RAISES_ON_SYSTEM, DROPS_SYSTEM], ids=["raises", "drops"])
def test_without_a_system_role_the_persona_leads_the_user_message(
    server: Server, qwen: ChatModel, template: str
) -> None:
    ask_all(server, with_template(qwen, template), Asked("Who?", "Be kind.", ("a",)))
    assert server.bodies[0]["messages"] == [{"role": "user", "content": "Be kind.\n\nWho?"}]


@pytest.mark.parametrize("thinking", ["off", "on"])
def test_the_thinking_policy_goes_with_templates_that_have_a_switch(
    server: Server, qwen: ChatModel, thinking: str
) -> None:
    ask_all(server, with_template(qwen, QWEN3, thinking=thinking), Asked("Who?", "", ("a",)))
    assert server.bodies[0]["chat_template_kwargs"] == {"enable_thinking": thinking == "on"}


def test_the_key_goes_along_and_into_no_message(
    server: Server, qwen: ChatModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret-1")
    server.answer = lambda _: 401
    with pytest.raises(UserError) as caught:
        ask_all(server, qwen, Asked("Who?", "", ("a",)))
    assert server.keys == ["Bearer secret-1"]
    assert "secret-1" not in str(caught.value)


def test_every_row_has_a_seed_of_its_own_the_same_on_a_rerun(
    server: Server, qwen: ChatModel, sycophancy: Behaviour, tmp_path: Path
) -> None:
    first = pairs_from(server, qwen, sycophancy, tmp_path / "first")
    seeds = server.seeds
    assert len(seeds) == len(set(seeds)) == 2 * 12
    assert all(0 <= seed < 2**31 for seed in seeds)
    server.bodies.clear()
    assert pairs_from(server, qwen, sycophancy, tmp_path / "again").equals(first)
    assert server.seeds == seeds
    server.bodies.clear()
    pairs_from(server, qwen, sycophancy, tmp_path / "other", seed=1)
    assert not set(server.seeds) & set(seeds)


# ---------------------------------------------------------------- what comes back


def test_responses_are_in_the_order_of_the_grid(
    server: Server, qwen: ChatModel, sycophancy: Behaviour, tmp_path: Path
) -> None:
    pairs = pairs_from(server, qwen, sycophancy, tmp_path)
    for side in POLES:
        for row in pairs.iter_rows(named=True):
            key = f"sycophancy/{side}/{row['topic']}/{row['persona']}/{row['sample']}"
            expected = (row[f"system_{side}"], row["prompt"], str(responses.row_seed(0, key)))
            assert row[f"response_{side}"] == " / ".join(expected)


def test_requests_run_side_by_side_and_a_late_reply_keeps_its_place(server: Server, qwen: ChatModel) -> None:
    others = threading.Barrier(responses.CONNECTIONS - 1)
    answered = threading.Event()

    def slow_first(body: dict[str, Any]) -> bytes:
        if body["messages"][0]["content"] == "0":
            assert answered.wait(10)
        else:
            others.wait(10)
            answered.set()
        return echo(body)

    server.answer = slow_first
    found = ask_all(server, qwen, *(Asked(str(number), "", ("k",)) for number in range(responses.CONNECTIONS)))
    assert [one.text.split(" / ")[0] for one in found] == [str(number) for number in range(responses.CONNECTIONS)]


def test_every_finished_response_is_told(server: Server, qwen: ChatModel) -> None:
    steps: list[int] = []
    responses.respond(server.settings, qwen, [Asked("Who?", "", ("a", "b", "c"))], SAMPLING, 0, steps.append)
    assert sum(steps) == 3


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        (completion(" Yes.\n"), Response("Yes.", "eos", 3)),
        (completion("Yes", "length", 7), Response("Yes", "length", 7)),
        (completion("Yes", tokens=None), Response("Yes", "eos", None)),
        (completion("Yes", "content_filter"), Response("Yes", "content_filter", 3)),
        (completion("Yes", None), Response("Yes", "unknown", 3)),
        (completion(None), Response("", "eos", 3)),
        (b'{"choices": [{"message": {"content": "Yes"}}]}', Response("Yes", "unknown", None)),
    ],
)
def test_finish_and_token_count_are_those_of_the_reply(
    server: Server, qwen: ChatModel, reply: bytes, expected: Response
) -> None:
    server.answer = lambda _: reply
    assert ask_all(server, qwen, Asked("Who?", "", ("a",))) == [expected]


def test_pairs_without_token_counts_are_pairs(
    server: Server, qwen: ChatModel, sycophancy: Behaviour, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data, "_PIECE", 3)
    server.answer = lambda body: completion(str(body["seed"]), tokens=3 if body["seed"] % 2 else None)
    pairs = pairs_from(server, qwen, sycophancy, tmp_path)
    assert pairs["tokens_pos"].dtype == pl.Int64
    assert data.describe(pairs)["pos"]["ended_by_itself"] == 1.0


@pytest.mark.parametrize(("temperature", "warned"), [(0.9, True), (0.0, False)])
def test_an_endpoint_that_ignores_the_temperature_is_noticed(
    server: Server, qwen: ChatModel, capsys: pytest.CaptureFixture[str], temperature: float, warned: bool
) -> None:
    server.answer = lambda body: completion(body["messages"][0]["content"])
    sampling = replace(SAMPLING, temperature=temperature)
    ask_all(server, qwen, Asked("Who?", "", ("a", "b")), Asked("Why?", "", ("a", "b")), sampling=sampling)
    assert ("as if it were greedy" in " ".join(capsys.readouterr().err.split())) == warned


def test_one_sample_a_prompt_says_nothing_about_the_temperature(
    server: Server, qwen: ChatModel, capsys: pytest.CaptureFixture[str]
) -> None:
    ask_all(server, qwen, Asked("Who?", "", ("a",)), Asked("Why?", "", ("a",)))
    assert capsys.readouterr().err == ""


# ---------------------------------------------------------------- failures


def test_a_passing_failure_is_tried_again(server: Server, qwen: ChatModel, waits: list[float]) -> None:
    server.answer = lambda body: 503 if len(server.bodies) <= 2 else echo(body)
    (found,) = ask_all(server, qwen, Asked("Who?", "", ("a",)))
    assert found.text.startswith("Who?")
    assert server.bodies[0] == server.bodies[2]
    assert len(waits) == 2


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        (404, "HTTP 404"),
        (500, "HTTP 500"),
        (b"{}", "a reply without choices[0].message.content"),
        (b'{"choices": []}', "a reply without choices[0].message.content"),
        (b'{"choices": [{"message": {"content": ["Yes"]}}]}', "a reply without choices[0].message.content"),
        (b"<html>", "a reply without choices[0].message.content"),
    ],
)
def test_a_lasting_failure_is_one_line(
    server: Server, qwen: ChatModel, waits: list[float], answer: bytes | int, problem: str
) -> None:
    server.answer = lambda _: answer
    with pytest.raises(UserError) as caught:
        ask_all(server, qwen, Asked("Who?", "", ("a",)))
    assert_one_line(
        caught.value, f"the endpoint of the responses at {server.url}/chat/completions failed ({problem})", "run again"
    )


def test_an_endpoint_that_is_not_there_is_one_line(server: Server, qwen: ChatModel, waits: list[float]) -> None:
    server.url = "http://127.0.0.1:1/v1"
    with pytest.raises(UserError) as caught:
        ask_all(server, qwen, Asked("Who?", "", ("a",)))
    assert_one_line(
        caught.value, "the endpoint of the responses at http://127.0.0.1:1/v1/chat/completions failed", "refused"
    )


def test_after_a_failure_nothing_more_is_asked(server: Server, qwen: ChatModel) -> None:
    def refuses_the_first(body: dict[str, Any]) -> bytes | int:
        if body["seed"] == responses.row_seed(0, "0"):
            return 401
        threading.Event().wait(0.05)
        return echo(body)

    server.answer = refuses_the_first
    with pytest.raises(UserError):
        ask_all(server, qwen, Asked("Who?", "", tuple(str(number) for number in range(500))))
    assert len(server.bodies) < 250


def test_an_interrupted_run_asks_only_for_what_is_missing(
    server: Server, qwen: ChatModel, sycophancy: Behaviour, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = pairs_from(server, qwen, sycophancy, tmp_path / "whole")
    everything = server.seeds
    monkeypatch.setattr(data, "_PIECE", 3)
    server.bodies.clear()
    server.answer = lambda body: 401 if len(server.bodies) > 15 else echo(body)
    with pytest.raises(UserError, match="run again to continue"):
        pairs_from(server, qwen, sycophancy, tmp_path / "resumed")
    kept = len(list((tmp_path / "resumed").glob("*.parquet")))
    assert kept == 5
    server.bodies.clear()
    server.answer = echo
    assert pairs_from(server, qwen, sycophancy, tmp_path / "resumed").equals(whole)
    assert len(server.bodies) == 24 - 3 * kept
    assert set(server.seeds) < set(everything)


def test_top_k_is_refused(server: Server, qwen: ChatModel) -> None:
    with pytest.raises(UserError) as caught:
        ask_all(server, qwen, Asked("Who?", "", ("a",)), sampling=Sampling(top_k=20))
    assert_one_line(caught.value, "top_k is 20", "OpenAI protocol")
    assert server.bodies == []


# ---------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("given", "mentioned"),
    [
        (("openai",), "--responses-url"),
        (("openai", "http://localhost/v1"), "--responses-model"),
        (("openai", "", "m"), "--responses-url"),
        (("openai", "localhost/v1", "m"), "--responses-url"),
        (("local", "http://localhost/v1", "m"), "--responses openai"),
    ],
)
def test_settings_that_do_not_fit_are_one_line(given: tuple[Any, ...], mentioned: str) -> None:
    with pytest.raises(UserError) as caught:
        EngineSettings(*given)
    assert_one_line(caught.value, mentioned)


def test_an_endpoint_gives_the_parsed_reply(server: Server) -> None:
    assert ChatEndpoint(server.url + "/", "m", "judge").complete(ask("Who?"), seed=5) == Reply("Who? / 5", "stop", 3)


def run_settings(folder: Path, out: Path, **more: Any) -> Settings:
    return Settings(model=str(folder), out=out, grid=GRID, sampling={"max_new_tokens": 6}, **more)


def test_the_engine_decides_the_pairs_and_the_local_one_leaves_keys_as_they_were(
    server: Server, tiny_folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = {}
    for name, settings in (("local", responses.LOCAL), ("openai", server.settings), ("back", responses.LOCAL)):
        with Replication(run_settings(tiny_folders["qwen3"], tmp_path, engine=settings)) as run:
            run.data()
            record[name] = read_json(run.folder / "stages" / "data.json")
    assert "engine" not in record["local"]["inputs"]
    assert record["local"]["key"] == record["back"]["key"] != record["openai"]["key"]
    assert record["openai"]["inputs"]["engine"] == {"kind": "openai", "url": server.url, "model": "served"}
    assert capsys.readouterr().out.count("data: rebuilding, because engine changed") == 2
    assert len(server.bodies) == 24


def test_the_engine_is_stored_with_the_run(tmp_path: Path) -> None:
    chosen = Settings(out=tmp_path, engine=EngineSettings("openai", "http://localhost/v1", "m"))
    plain = json.loads(json.dumps(stored_settings(chosen)))
    assert restore_settings(plain, Settings(out=tmp_path)).engine == chosen.engine
    del plain["engine"]  # as stored before there were engines
    assert restore_settings(plain, Settings(out=tmp_path)).engine == responses.LOCAL


def test_the_command_line_takes_an_engine(
    server: Server, tiny_folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["data", "--model", tiny_folders["qwen3"], "--out", tmp_path, "--topics", 1, "--personas", 1,
                 "--samples", 2, "--json", "--responses", "openai"]  # fmt: skip
    assert cli._main([str(one) for one in arguments]) == 2
    assert "--responses-url" in capsys.readouterr().err
    arguments += ["--responses-url", server.url, "--responses-model", "served"]
    assert cli._main([str(one) for one in arguments]) == 0
    assert json.loads(capsys.readouterr().out)["pairs"] == 2
    assert len(server.bodies) == 4


# ---------------------------------------------------------------- a real server


@pytest.fixture(scope="module")
def serving(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URL of `transformers serve` in a process of its own, which loads the folder that a request names."""
    if not is_serve_available():
        pytest.skip("transformers serve needs what the serve extra brings")
    if not (EMBEDDED / "config.json").is_file():
        pytest.skip("the embedded model is not built")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = tmp_path_factory.mktemp("serving") / "log.txt"
    options = ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu", "--dtype", "float32"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "no_proxy": "*"}
    with log.open("w") as lines, pytest.MonkeyPatch.context() as patch:
        patch.setenv("no_proxy", "*")
        command = [sys.executable, "-m", "transformers.cli.transformers", "serve", *options]
        process = subprocess.Popen(command, stdout=lines, stderr=lines, env=environment)
        try:
            url = f"http://127.0.0.1:{port}"
            deadline = time.monotonic() + 180
            while not answers(f"{url}/health"):
                assert process.poll() is None, log.read_text()
                assert time.monotonic() < deadline, log.read_text()
                time.sleep(0.5)
            yield f"{url}/v1"
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as reply:
            return reply.status == 200
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return False


@pytest.fixture(scope="module")
def pocket(serving: str) -> ChatModel:
    """The embedded model, as it is served."""
    return loading.load("pocket", device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def sampled_model(serving: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model with a generation_config.json that lets `transformers serve` sample, from all tokens."""
    folder = tmp_path_factory.mktemp("served") / "pocket"
    shutil.copytree(EMBEDDED, folder)
    file = folder / "generation_config.json"
    file.write_text(json.dumps({**read_json(file), "do_sample": True, "top_k": 0}), encoding="utf-8")
    return folder


@pytest.mark.slow
def test_a_real_server_writes_pairs(
    serving: str, pocket: ChatModel, sampled_model: Path, sycophancy: Behaviour, tmp_path: Path
) -> None:
    source = EngineSettings("openai", serving, str(sampled_model))
    sampling = Sampling(max_new_tokens=48, temperature=1.5)
    pairs = data.make_pairs(pocket, sycophancy, Grid(1, 1, 2), sampling, 0, Shards(tmp_path), source)
    for side in POLES:
        assert all(text.strip() for text in pairs[f"response_{side}"])
        assert pairs[f"response_{side}"].n_unique() == 2
        assert set(pairs[f"finish_{side}"]) <= {"eos", "length"}
        assert all(0 < count <= 48 for count in pairs[f"tokens_{side}"])
    assert not set(pairs["response_pos"]) & set(pairs["response_neg"])


@pytest.mark.slow
def test_greedy_responses_of_a_real_server_are_those_of_the_local_sampler(
    serving: str, pocket: ChatModel, sycophancy: Behaviour
) -> None:
    source = EngineSettings("openai", serving, str(EMBEDDED))
    greedy = Sampling(max_new_tokens=48, temperature=0.0)
    topic, personas = sycophancy.train[0].text, sycophancy.personas
    asked = [Asked(topic, system, ("k",)) for system in (personas.pos[0], personas.neg[0], "")]
    served = responses.respond(source, pocket, asked, greedy, 0, lambda _: None)
    local = responses.respond(responses.LOCAL, pocket, asked, greedy, 0, lambda _: None)
    assert all(one.text for one in local) and len({one.text for one in local}) > 1
    assert [one.text for one in served] == [one.text for one in local]
    assert [one.finish for one in served] == [one.finish for one in local]


@pytest.mark.slow
def test_a_real_server_that_does_not_know_the_model_is_one_line(
    serving: str, pocket: ChatModel, waits: list[float]
) -> None:
    source = EngineSettings("openai", serving, "/no/such/model")
    with pytest.raises(UserError) as caught:
        responses.respond(source, pocket, [Asked("Who?", "", ("a",))], SAMPLING, 0, lambda _: None)
    assert_one_line(caught.value, "the endpoint of the responses at", "HTTP")
