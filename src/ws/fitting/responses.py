"""Sample responses under a persona, with one of two engines.

    local     the sampler of this process, on the model that will be trained
    openai    any OpenAI-compatible chat endpoint (vLLM, transformers serve, llama.cpp), one request per sample

An endpoint renders, batches and samples on its side. A request carries the conversation, temperature, top_p, max_tokens
and the seed of the row, so a rerun requests the same random stream. A server may ignore the seed, or use one stream for
all concurrent requests. The server decides everything else: vLLM and transformers serve take top_k and penalties from
the model's generation_config.json, and transformers serve samples only if that file says `"do_sample": true`.
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
"""Concurrent requests."""
_PATIENCE = 600.0
"""Timeout in seconds for one response, including the wait in the server's queue."""
_FINISH = {"stop": "eos", "length": "length"}
"""The local sampler's names for the finish reasons of the protocol."""


@dataclass(frozen=True)
class EngineSettings:
    """Which engine to use; `url` and `model` are for openai. The pairs depend on these settings."""

    kind: Kind = "local"
    url: str = ""
    model: str = ""

    def __post_init__(self) -> None:
        if self.kind == "openai":
            self.endpoint()  # reports a missing url or model before a model is loaded
        elif self.url or self.model:
            raise UserError("an endpoint is given, but --responses is local", "Add --responses openai.")

    def endpoint(self) -> ChatEndpoint:
        """The endpoint of the openai engine; a missing url or model is a UserError."""
        return ChatEndpoint(self.url, self.model, "responses", timeout=_PATIENCE)


LOCAL = EngineSettings()


class Asked(NamedTuple):
    """A prompt, its persona (empty: none), and one random key per sample to draw."""

    prompt: str
    system: str
    keys: tuple[str, ...]


class Response(NamedTuple):
    """A response. `finish` is eos, length, or the endpoint's own word; `tokens` is None if an endpoint omits the count.

    The local count excludes the stop token; most endpoints include it.
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
    """All responses, in the order of `asked` and of their keys; `advance` gets the number of newly finished ones."""
    if settings.kind == "local":
        return _sampled_here(model, asked, sampling, seed, advance)
    return _from_endpoint(settings.endpoint(), model, asked, sampling, seed, advance)


def row_seed(seed: int, key: str) -> int:
    """Seed of one sample for an endpoint, in [0, 2^31), which every server accepts."""
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
            f"the sampling setting top_k is {sampling.top_k}, but the OpenAI protocol has no top_k",
            "Set top_k to 0 here and configure it on the server, or use --responses local.",
        )
    options: dict[str, Any] = {
        "temperature": sampling.temperature, "top_p": sampling.top_p, "max_tokens": sampling.max_new_tokens,
    }  # fmt: skip
    if model.chat.switches:  # not in the protocol, but all three servers accept it; without it, a thinking model thinks
        options["chat_template_kwargs"] = model.chat.switches

    def one(job: tuple[Asked, str]) -> Response:
        wanted, key = job
        turns = model.chat.turns(ask(wanted.prompt, wanted.system))
        reply = endpoint.complete(turns, **options, seed=row_seed(seed, key))
        reason = reply.finish or "unknown"
        return Response(reply.text.strip(), _FINISH.get(reason, reason), reply.tokens)

    found = []
    pool, is_interrupted = ThreadPoolExecutor(CONNECTIONS), False
    try:
        for response in pool.map(one, [(wanted, key) for wanted in asked for key in wanted.keys]):
            found.append(response)
            advance(1)
    except KeyboardInterrupt:
        is_interrupted = True
        raise
    finally:  # no more requests after a failure; those that are out may take minutes
        pool.shutdown(wait=not is_interrupted, cancel_futures=True)
    if sampling.temperature > 0:
        _warn_of_greedy(endpoint, asked, found)
    return found


def _warn_of_greedy(endpoint: ChatEndpoint, asked: Sequence[Asked], found: Sequence[Response]) -> None:
    """Warn if an endpoint seems to ignore the temperature: all samples of every prompt are identical."""
    texts = iter(found)
    variants = [{next(texts).text for _ in wanted.keys} for wanted in asked]
    if len(found) > len(asked) and all(len(variant) == 1 for variant in variants):
        console.warn(
            f"{endpoint.url} wrote the same text in all samples of every prompt, as if it were greedy; "
            'transformers serve samples only if generation_config.json says "do_sample": true'
        )
