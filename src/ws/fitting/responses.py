"""Where the responses under a persona come from.

    local     the sampler of this process, on the model that will be trained
    openai    any OpenAI-compatible chat endpoint (vLLM, transformers serve, llama.cpp), one request per sample

An endpoint renders, batches and samples by itself. A request carries the conversation, temperature, top_p, max_tokens
and a seed that belongs to the row, so a rerun asks for the same stream; a server may ignore the seed, or draw from one
stream for all that it serves at once. What a request does not say is the server's to decide: vLLM and transformers
serve take top_k and penalties from the generation_config.json of the model, and transformers serve samples only where
that file says `"do_sample": true`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch

from ws.base import console, keyed_random
from ws.base.errors import UserError
from ws.fitting.chat_endpoint import ChatEndpoint
from ws.measure import generate
from ws.measure.generate import Request, Sampling
from ws.model.chat import ask
from ws.model.loading import ChatModel

Kind = Literal["local", "openai"]

CONNECTIONS = 8
"""Requests under way at once."""
_PATIENCE = 600.0
"""Seconds for one response: a request waits behind others in the server's queue."""
_FINISH = {"stop": "eos", "length": "length"}
"""Names of the local sampler for the finish reasons of the protocol."""


@dataclass(frozen=True)
class EngineSettings:
    """Which engine; `url` and `model` for openai. Part of what decides the pairs."""

    kind: Kind = "local"
    url: str = ""
    model: str = ""

    def __post_init__(self) -> None:
        if self.kind == "openai":
            self.endpoint()  # a missing url or model is said before a model is loaded
        elif self.url or self.model:
            raise UserError("an endpoint is given, but the engine is local", "Add --engine openai.")

    def endpoint(self) -> ChatEndpoint:
        """The endpoint of the openai engine; a missing url or model is a UserError."""
        return ChatEndpoint(self.url, self.model, "engine", timeout=_PATIENCE)


LOCAL = EngineSettings()


class Asked(NamedTuple):
    """A prompt under a persona (empty: none), and one random key per sample that is wanted of it."""

    prompt: str
    system: str
    keys: tuple[str, ...]


class Response(NamedTuple):
    """A response; `finish` is eos, length, or an endpoint's own word; `tokens` is None where an endpoint tells none.

    The local count leaves the stop token out, most endpoints count it.
    """

    text: str
    finish: str
    tokens: int | None


def respond(
    settings: EngineSettings,
    model: ChatModel,
    asked: Sequence[Asked],
    sampling: Sampling,
    seed: int,
    advance: Callable[[int], None],
) -> list[Response]:
    """All responses, in the order of `asked` and of their keys; `advance` is told how many more are finished."""
    if settings.kind == "local":
        return _sampled_here(model, asked, sampling, seed, advance)
    return _from_endpoint(settings.endpoint(), model, asked, sampling, seed, advance)


def row_seed(seed: int, key: str) -> int:
    """Seed of one sample for an endpoint, in [0, 2^31): all servers take it."""
    return int(torch.randint(2**31 - 1, (), generator=keyed_random.generator(f"{seed}|{key}")))


def _sampled_here(
    model: ChatModel, asked: Sequence[Asked], sampling: Sampling, seed: int, advance: Callable[[int], None]
) -> list[Response]:
    requests = [Request(model.chat.prompt(ask(one.prompt, one.system)), one.keys) for one in asked]
    sampled = generate.sample(model, requests, sampling, seed, advance=advance)
    return [Response(model.chat.decode(one.ids), one.finish, len(one.ids)) for samples in sampled for one in samples]


def _from_endpoint(
    endpoint: ChatEndpoint,
    model: ChatModel,
    asked: Sequence[Asked],
    sampling: Sampling,
    seed: int,
    advance: Callable[[int], None],
) -> list[Response]:
    if sampling.top_k:
        raise UserError(
            f"top_k is {sampling.top_k}, and the OpenAI protocol has no top_k",
            "Set it to 0 and give it to the server, or use --engine local.",
        )
    options: dict[str, Any] = {
        "temperature": sampling.temperature, "top_p": sampling.top_p, "max_tokens": sampling.max_new_tokens,
    }  # fmt: skip
    if model.chat.switches:  # beyond the protocol, but all three servers take it, and without it they think
        options["chat_template_kwargs"] = model.chat.switches

    def one(job: tuple[Asked, str]) -> Response:
        wanted, key = job
        turns = model.chat.turns(ask(wanted.prompt, wanted.system))
        reply = endpoint.complete(turns, **options, seed=row_seed(seed, key))
        reason = reply.finish or "unknown"
        return Response(reply.text.strip(), _FINISH.get(reason, reason), reply.tokens)

    found = []
    pool = ThreadPoolExecutor(CONNECTIONS)
    try:
        for response in pool.map(one, [(wanted, key) for wanted in asked for key in wanted.keys]):
            found.append(response)
            advance(1)
    finally:
        pool.shutdown(cancel_futures=True)  # after a failure nothing more is asked
    if sampling.temperature > 0:
        _warn_of_greedy(endpoint, asked, found)
    return found


def _warn_of_greedy(endpoint: ChatEndpoint, asked: Sequence[Asked], found: Sequence[Response]) -> None:
    """Say so where an endpoint seems to ignore the temperature: every prompt got the same text each time."""
    texts = iter(found)
    variants = [{next(texts).text for _ in wanted.keys} for wanted in asked]
    if len(found) > len(asked) and all(len(variant) == 1 for variant in variants):
        console.warn(
            f"{endpoint.url} wrote the same text in all samples of every prompt, as if it were greedy; "
            'transformers serve samples only where generation_config.json says "do_sample": true'
        )
