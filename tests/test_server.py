"""The server, asked by OpenAI's own client: strengths per request, exact in any company; errors; keys; directions."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("starlette", reason="the server is not installed (pip install weight-steering[serve])")
pytest.importorskip("uvicorn", reason="the server is not installed (pip install weight-steering[serve])")
pytest.importorskip("openai", reason="OpenAI's client is not installed (pip install weight-steering[dev])")

import httpx
import openai

from served import Served, made_run, serving
from ws.commands import cli
from ws.edit.steering import steer
from ws.model import loading
from ws.model.chat import ask
from ws.serving.shelf import open_shelf

ANIMALS = ("owls", "bees", "cats", "sharks", "frogs", "cows", "ants", "hens")
CLAIMS = ("eat leaves", "can fly", "live in water", "are green")
QUESTIONS = [f"I think {animal} {claim}. What do you think?" for animal in ANIMALS for claim in CLAIMS]
STEERS: list[dict[str, float]] = [{"left": -0.8}, {}, {"left": 0.5}, {"right": 0.6, "left": -0.2}, {"right": -1.0}]


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run folders of pocket with random directions; nothing else is in the folder but a file beside it."""
    root = tmp_path_factory.mktemp("served")
    pocket = loading.load("pocket")
    for number, name in enumerate(("left", "right", "spare")):
        made_run(pocket, root / "out", name, seed=number)
    (root / "secret.safetensors").write_bytes((root / "out/pocket/left/lora/seed0/direction.safetensors").read_bytes())
    return root / "out"


@pytest.fixture(scope="module")
def server(out: Path) -> Iterator[Served]:
    shelf = open_shelf([str(out / f"pocket/{name}/lora/seed0") for name in ("left", "right")])
    with serving(shelf) as found:
        yield found


@pytest.fixture(scope="module")
def client(server: Served) -> Any:
    return openai.OpenAI(base_url=server.url, api_key="none", max_retries=0, timeout=120)


def chat(question: str, steer_by: Any = None, **options: Any) -> dict[str, Any]:
    """Arguments of a greedy chat completion."""
    extra = {} if steer_by is None else {"extra_body": {"steer": steer_by}}
    return {"model": "pocket", "messages": [{"role": "user", "content": question}], "temperature": 0,
            "max_tokens": 24, **extra, **options}  # fmt: skip


def text(completion: Any) -> str:
    return str(completion.choices[0].message.content)


# ---------------------------------------------------------------- answers


def test_64_concurrent_requests_of_mixed_strengths_get_their_single_request_greedy_answers(
    server: Served, client: Any
) -> None:
    asked = [chat(QUESTIONS[number % len(QUESTIONS)], STEERS[number % len(STEERS)]) for number in range(64)]
    alone = [text(client.chat.completions.create(**one)) for one in asked]

    async def together() -> list[str]:
        async with openai.AsyncOpenAI(base_url=server.url, api_key="none", max_retries=0, timeout=120) as many:
            return [text(one) for one in await asyncio.gather(*(many.chat.completions.create(**one) for one in asked))]

    rounds, rows = server.engine.counts.rounds, server.engine.counts.rows
    assert asyncio.run(together()) == alone
    rounds, rows = server.engine.counts.rounds - rounds, server.engine.counts.rows - rows
    assert rows > 4 * rounds  # they did share passes
    assert len(set(alone)) > 8


def test_the_single_request_answer_is_that_of_the_steered_model(server: Served, client: Any) -> None:
    model, fresh = server.shelf.model, loading.load("pocket")
    for question, mix in zip(QUESTIONS[:5], STEERS, strict=True):
        prompt = model.chat.prompt(ask(question))
        strengths = dict(server.shelf.strengths(mix))
        with steer(fresh, strengths):
            ids = fresh.network.generate(torch.tensor([prompt]), max_new_tokens=24, do_sample=False)[0, len(prompt) :]
        assert text(client.chat.completions.create(**chat(question, mix))).strip() == model.chat.decode(ids)


@pytest.mark.parametrize("name", ["pocket@left=-0.8", "pocket@-0.8 left", "pocket@left=-0.8,right=0"])
def test_the_name_of_the_model_may_hold_the_strengths(client: Any, name: str) -> None:
    wanted = client.chat.completions.create(**chat(QUESTIONS[0], {"left": -0.8}))
    named = client.chat.completions.create(**chat(QUESTIONS[0], model=name))
    assert text(named) == text(wanted)
    assert named.model == name and named.steer["left"] == -0.8


def test_a_mix_expression_is_the_same_as_an_object(client: Any) -> None:
    one = client.chat.completions.create(**chat(QUESTIONS[0], "0.6 right - 0.2 left"))
    other = client.chat.completions.create(**chat(QUESTIONS[0], {"right": 0.6, "left": -0.2}))
    assert text(one) == text(other) and one.steer == other.steer


@pytest.mark.parametrize("stop", [None, ["e", "."]])
def test_streaming_gives_the_text_usage_and_log_probabilities_of_the_whole_answer(client: Any, stop: Any) -> None:
    asked = chat(QUESTIONS[1], {"left": 0.5}, logprobs=True, top_logprobs=3, stop=stop)
    whole = client.chat.completions.create(**asked)
    chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    parts = [chunk.choices[0] for chunk in chunks if chunk.choices]
    assert "".join(part.delta.content or "" for part in parts) == text(whole)
    assert parts[0].delta.role == "assistant"
    assert [part.finish_reason for part in parts if part.finish_reason] == [whole.choices[0].finish_reason]
    assert chunks[-1].usage == whole.usage
    told = [one for part in parts if part.logprobs for one in part.logprobs.content]
    wanted = whole.choices[0].logprobs.content
    assert [one.token for one in told] == [one.token for one in wanted]
    assert [one.logprob for one in told] == pytest.approx([one.logprob for one in wanted], abs=1e-4)
    assert all(len(one.top_logprobs) == 3 and one.top_logprobs[0].logprob == one.logprob for one in wanted)
    if stop is None:
        assert "".join(one.token for one in wanted) == text(whole)


def test_a_seed_reproduces_samples_and_choices_differ(client: Any) -> None:
    asked = chat(QUESTIONS[2], {"left": 1.0}, temperature=1.5, n=4, seed=7)
    first, again = (client.chat.completions.create(**asked) for _ in range(2))
    texts = [choice.message.content for choice in first.choices]
    assert texts == [choice.message.content for choice in again.choices]
    assert len(set(texts)) > 1 and [choice.index for choice in first.choices] == [0, 1, 2, 3]


def test_completions_continue_texts_and_token_ids(server: Served, client: Any) -> None:
    model = server.shelf.model
    ids = model.chat.prompt(ask(QUESTIONS[3]))
    asked = {"model": "pocket", "max_tokens": 12, "temperature": 0, "extra_body": {"steer": {"left": -0.8}}}
    by_ids = client.completions.create(prompt=ids, logprobs=2, **asked)
    wanted = client.chat.completions.create(**chat(QUESTIONS[3], {"left": -0.8}, max_tokens=12))
    assert by_ids.choices[0].text == text(wanted)
    assert len(by_ids.choices[0].logprobs.tokens) == len(by_ids.choices[0].logprobs.top_logprobs) > 0
    two = client.completions.create(prompt=["The owl", "A bee"], **asked)
    assert [choice.index for choice in two.choices] == [0, 1]
    streamed = client.completions.create(prompt="The owl", stream=True, **asked)
    assert "".join(chunk.choices[0].text for chunk in streamed) == two.choices[0].text


def test_a_conversation_at_another_strength_is_answered_as_by_a_fresh_server(
    server: Served, client: Any, out: Path
) -> None:
    turns: list[Any] = [{"role": "user", "content": QUESTIONS[4]}]
    said = text(client.chat.completions.create(**chat("", {"left": 0.8}, messages=turns)))
    turns += [{"role": "assistant", "content": said}, {"role": "user", "content": QUESTIONS[5]}]
    turned = text(client.chat.completions.create(**chat("", {"left": -0.8}, messages=turns)))
    with serving(open_shelf([str(out / "pocket/left/lora/seed0")])) as fresh:
        other = openai.OpenAI(base_url=fresh.url, api_key="none", max_retries=0)
        assert text(other.chat.completions.create(**chat("", {"left": -0.8}, messages=turns))) == turned


def test_a_client_that_goes_away_frees_its_row(server: Served, client: Any) -> None:
    endless = chat(QUESTIONS[6], max_tokens=900, temperature=2, seed=1, logprobs=True)
    before = server.engine.counts.requests["cancelled"]
    ended = sum(server.engine.counts.requests.values())
    for _ in range(3):
        stream = client.chat.completions.create(**endless, stream=True)
        next(iter(stream))
        stream.close()
    with pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=0.05).chat.completions.create(**{**endless, "n": 32})
    deadline = time.monotonic() + 20
    while (server.engine.active or server.engine.waiting) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert server.engine.active == server.engine.waiting == 0
    assert sum(server.engine.counts.requests.values()) == ended + 3 + 32
    assert server.engine.counts.requests["cancelled"] > before


# ---------------------------------------------------------------- refusals

JSON = {"Content-Type": "application/json"}
HELLO = [{"role": "user", "content": "Hello"}]
BAD: list[tuple[dict[str, Any], int, str]] = [
    ({"messages": HELLO}, 400, "model is missing"),
    ({"model": 7, "messages": HELLO}, 400, "model must be a string"),
    ({"model": "gpt-4", "messages": HELLO}, 404, "the model 'gpt-4' does not exist"),
    ({"model": "pocket@nothing=1", "messages": HELLO}, 404, "no direction 'nothing'"),
    ({"model": "pocket@left=much", "messages": HELLO}, 400, "left=much"),
    ({"model": "pocket@0.3", "messages": HELLO}, 400, "lacks a name"),
    ({"model": "pocket@left=1", "messages": HELLO, "steer": {"left": 1}}, 400, "give them once"),
    ({"model": "pocket", "messages": HELLO, "steer": {"lft": 1}}, 404, "Did you mean left?"),
    ({"model": "pocket", "messages": HELLO, "steer": {"../../secret": 1}}, 404, "no direction '../../secret'"),
    ({"model": "pocket", "messages": HELLO, "steer": {"left": "1"}}, 400, "steer must be like"),
    ({"model": "pocket", "messages": HELLO, "steer": {"left": True}}, 400, "steer must be like"),
    ({"model": "pocket", "messages": HELLO, "steer": [1]}, 400, "steer must be like"),
    ({"model": "pocket", "messages": HELLO, "steer": "left left"}, 400, "no + or - before"),
    ({"model": "pocket", "messages": HELLO, "steer": {"left": 1e999}}, 400, "is inf. Give a number from -1000"),
    ({"model": "pocket", "messages": HELLO, "steer": {"left": 10**400}}, 400, "too large"),
    ({"model": "pocket", "messages": HELLO, "steer": {"left": 1e30}}, 400, "from -1000 to 1000"),
    ({"model": "pocket", "messages": HELLO, "steeer": {"left": 1}}, 400, "'steeer'"),
    ({"model": "pocket", "messages": HELLO, "\ud800": 1}, 400, "unrecognized request argument: '\\ud800'"),
    ({"model": "pocket", "messages": HELLO, "steer": {"\ud800": 1}}, 404, "no direction '\\ud800'"),
    ({"model": "pocket"}, 400, "messages must be a list"),
    ({"model": "pocket", "messages": []}, 400, "messages must be a list"),
    ({"model": "pocket", "messages": ["Hi"]}, 400, "messages[0] has the role None"),
    ({"model": "pocket", "messages": [{"role": "tool", "content": "x"}]}, 400, "role 'tool'"),
    ({"model": "pocket", "messages": [{"role": "user", "content": 3}]}, 400, "content of messages[0] is not text"),
    ({"model": "pocket", "messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "is not text"),
    ({"model": "pocket", "messages": [{"role": "user", "content": "\ud800"}]}, 400, "surrogate"),
    ({"model": "pocket", "messages": [*HELLO, {"role": "system", "content": "x"}]}, 400, "first message"),
    ({"model": "pocket", "messages": HELLO, "max_tokens": 0}, 400, "max_tokens must be a whole number"),
    ({"model": "pocket", "messages": HELLO, "max_tokens": 2.5}, 400, "max_tokens"),
    ({"model": "pocket", "messages": HELLO, "max_tokens": 10**9}, 400, "max_tokens"),
    ({"model": "pocket", "messages": HELLO, "max_tokens": 1024}, 400, "the context holds 1024 tokens"),
    ({"model": "pocket", "messages": [{"role": "user", "content": "owl " * 3000}]}, 400, "the context holds"),
    ({"model": "pocket", "messages": HELLO, "temperature": -1}, 400, "temperature must be a number from 0 to 2"),
    ({"model": "pocket", "messages": HELLO, "temperature": "hot"}, 400, "temperature"),
    ({"model": "pocket", "messages": HELLO, "top_p": 0}, 400, "top_p"),
    ({"model": "pocket", "messages": HELLO, "n": 0}, 400, "n must be"),
    ({"model": "pocket", "messages": HELLO, "n": 100000}, 400, "n must be"),
    ({"model": "pocket", "messages": HELLO, "seed": "x"}, 400, "seed"),
    ({"model": "pocket", "messages": HELLO, "stop": [""]}, 400, "stop must be"),
    ({"model": "pocket", "messages": HELLO, "stop": 3}, 400, "stop must be"),
    ({"model": "pocket", "messages": HELLO, "stream": "yes"}, 400, "stream must be true or false"),
    ({"model": "pocket", "messages": HELLO, "top_logprobs": 3}, 400, "needs logprobs"),
    ({"model": "pocket", "messages": HELLO, "logprobs": True, "top_logprobs": 99}, 400, "top_logprobs"),
    ({"model": "pocket", "messages": HELLO, "tools": [{"type": "function"}]}, 400, "tools is not supported"),
    ({"model": "pocket", "messages": HELLO, "presence_penalty": 1}, 400, "presence_penalty is not supported"),
    ({"model": "pocket", "messages": HELLO, "response_format": {"type": "json_object"}}, 400, "response_format"),
]


@pytest.mark.parametrize(("body", "status", "mentioned"), BAD, ids=[mentioned for _, _, mentioned in BAD])
def test_a_bad_request_is_an_error_in_openai_form(
    server: Served, body: dict[str, Any], status: int, mentioned: str
) -> None:
    raw = json.dumps(body).encode()
    answer = httpx.post(f"{server.url}/chat/completions", content=raw, headers={"Content-Type": "application/json"})
    assert answer.status_code == status
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert mentioned in error["message"] and error["type"] == "invalid_request_error"
    assert error["param"] == "steer" or "from -1000" not in mentioned


@pytest.mark.parametrize(
    ("method", "path", "options", "status"),
    [
        ("POST", "/chat/completions", {"content": b"{", "headers": JSON}, 400),
        ("POST", "/chat/completions", {"content": b"[]", "headers": JSON}, 400),
        ("POST", "/chat/completions", {"content": b"[" * 100_000, "headers": JSON}, 400),
        ("POST", "/chat/completions", {"content": b"{}", "headers": {"Content-Type": "text/plain"}}, 415),
        ("POST", "/chat/completions", {"content": b" " * (5 << 20), "headers": JSON}, 413),
        ("GET", "/chat/completions", {}, 405),
        ("GET", "/nothing", {}, 404),
        ("GET", "/models/nothing", {}, 404),
        ("POST", "/completions", {"json": {"model": "pocket"}}, 400),
        ("POST", "/completions", {"json": {"model": "pocket", "prompt": ""}}, 400),
        ("POST", "/completions", {"json": {"model": "pocket", "prompt": [99999999]}}, 400),
        ("POST", "/completions", {"json": {"model": "pocket", "prompt": ["x"] * 1000}}, 400),
        ("POST", "/completions", {"json": {"model": "pocket", "prompt": ["x"] * 20, "n": 20}}, 400),
        ("POST", "/completions", {"json": {"model": "pocket", "prompt": "x", "echo": True}}, 400),
        ("DELETE", "/directions/nothing", {}, 404),
        ("GET", "/models", {"headers": {"Host": "evil.example:80"}}, 403),
    ],
)  # fmt: skip
def test_other_bad_calls_have_their_status(
    server: Served, method: str, path: str, options: dict[str, Any], status: int
) -> None:
    answer = httpx.request(method, server.url + path, **options)
    assert answer.status_code == status and answer.json()["error"]["message"]


# ---------------------------------------------------------------- directions, models, metrics


def test_directions_are_loaded_and_unloaded_while_the_server_runs(server: Served, client: Any) -> None:
    names = f"{server.url}/directions"
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(**chat(QUESTIONS[7], {"extra": 1.0}))
    made = httpx.post(names, json={"name": "extra", "run": "spare/lora/seed0"})
    assert made.status_code == 201 and made.json()["id"] == "extra"
    steered = text(client.chat.completions.create(**chat(QUESTIONS[7], {"extra": 1.0})))
    assert steered != text(client.chat.completions.create(**chat(QUESTIONS[7])))
    assert "pocket@extra" in [model.id for model in client.models.list()]
    assert httpx.post(names, json={"name": "extra", "run": "spare"}).status_code == 409
    assert httpx.delete(f"{names}/extra").json()["deleted"]
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(**chat(QUESTIONS[7], {"extra": 1.0}))
    assert [one["id"] for one in httpx.get(names).json()["data"]] == ["left", "right"]


@pytest.mark.parametrize(
    ("name", "run"),
    [
        ("x", "../../secret.safetensors"),
        ("x", "/etc/passwd"),
        ("x", "left/../../../secret.safetensors"),
        ("x", "link"),
        ("x", "."),
        ("x", "nothing"),
        ("../x", "spare"),
        ("x/y", "spare"),
        ("", "spare"),
        (".", "spare"),
        ("x" * 65, "spare"),
        ("\ud800", "spare"),
        ("x", "\0"),
        ("x", "x" * 5000),
        ("x", "\ud800"),
    ],
)
def test_no_path_leads_out_of_the_folder_of_the_runs(server: Served, out: Path, name: str, run: str) -> None:
    link = out / "pocket" / "link"
    if run == "link" and not link.is_symlink():
        link.symlink_to(out.parent / "secret.safetensors")
    raw = json.dumps({"name": name, "run": run}).encode()
    answer = httpx.post(f"{server.url}/directions", content=raw, headers=JSON)
    assert answer.status_code == 400 and answer.json()["error"]["message"]
    assert [one["id"] for one in httpx.get(f"{server.url}/directions").json()["data"]] == ["left", "right"]


def test_models_metrics_and_health_tell_what_is_there(server: Served, client: Any) -> None:
    assert [model.id for model in client.models.list()] == ["pocket", "pocket@left", "pocket@right"]
    assert client.models.retrieve("pocket@left").id == "pocket@left"
    client.chat.completions.create(**chat(QUESTIONS[8]))
    told = httpx.get(server.url.removesuffix("/v1") + "/metrics")
    assert told.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert all(re.fullmatch(r'# (HELP|TYPE) ws_\w+ .+|ws_\w+(\{\w+="\w+"\})? [\d.e+-]+', line)
               for line in told.text.splitlines())  # fmt: skip
    values = dict(line.rsplit(" ", 1) for line in told.text.splitlines() if not line.startswith("#"))
    assert float(values["ws_written_tokens_total"]) == server.engine.counts.written_tokens > 0
    assert httpx.get(server.url.removesuffix("/v1") + "/health").json() == {"status": "ok", "model": "pocket"}


def test_a_key_is_needed_where_there_is_one(out: Path) -> None:
    shelf = open_shelf([str(out / "pocket/left/lora/seed0")])
    with serving(shelf, key="ключ") as locked:
        statuses = [
            httpx.get(f"{locked.url}/models", headers={b"Authorization": f"Bearer {key}".encode()}).status_code
            for key in ("ключ", "ключи")
        ]
        assert statuses == [200, 401]
    with serving(shelf, key="right-key") as locked:
        root = locked.url.removesuffix("/v1")
        for wrong in ("Bearer wrong", "Bearer right-key-", "Bearer right", "right-key", "Bearer \xe9", ""):
            refused = httpx.get(f"{locked.url}/models", headers={"Authorization": wrong.encode("latin-1")})
            assert refused.status_code == 401 and "right-key" not in refused.text
        with pytest.raises(openai.AuthenticationError):
            openai.OpenAI(base_url=locked.url, api_key="wrong", max_retries=0).models.list()
        assert httpx.get(f"{root}/metrics").status_code == 401
        assert httpx.get(f"{root}/health").status_code == 200
        good = openai.OpenAI(base_url=locked.url, api_key="right-key", max_retries=0)
        assert [model.id for model in good.models.list()] == ["pocket", "pocket@left"]


# ---------------------------------------------------------------- the command


def test_the_command_serves_until_interrupted_and_prints_a_request_that_works(out: Path) -> None:
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-m", "ws", "serve", str(out / "pocket/left/lora/seed0"), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        serving_line, next_line = process.stdout.readline(), process.stdout.readline()
        assert "pocket at http://127.0.0.1:" in serving_line and next_line.startswith("next")
        pasted = subprocess.run(
            ["bash", "-c", next_line.removeprefix("next").strip() + " --retry 10 --retry-connrefused -s"],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 130
    assert json.loads(pasted.stdout)["steer"] == {"left": -1.0}


@pytest.mark.parametrize(
    ("options", "mentioned"),
    [
        ([], "no run is given"),
        (["nowhere"], "no run folder or direction file nowhere"),
        (["RUN", "RUN"], "two directions are named left"),
        (["RUN", "--host", "0.0.0.0"], "no API key"),
        (["RUN", "--host", "0.0.0.0", "--api-key", ""], "no API key"),
        (["RUN", "--host", "not.a.host.invalid", "--api-key", "k"], "cannot listen"),
        (["RUN", "--port", "65536"], "--port is 65536. Give 1 to 65535, or 0 for a free one"),
        (["RUN", "--port", "-1"], "--port is -1"),
        (["RUN", "--slots", "0"], "--slots is 0"),
        (["RUN", "--context", "99999"], "--context is 99999"),
        (["RUN", "--model", "pocket-gemma"], "base model"),
    ],
)
def test_a_bad_command_is_one_line(
    out: Path, options: list[str], mentioned: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WS_API_KEY", "")  # an empty key is none
    run = str(out / "pocket/left/lora/seed0")
    given = ["--port", "0", *(run if option == "RUN" else option for option in options)]
    assert cli._main(["serve", *given]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("ws: ")]
    assert len(errors) == 1 and mentioned in errors[0]
