"""Throughput of the server at mixed strengths, against itself without steering, one request at a time, and llama.cpp.

    python benchmarks/serving.py out/pocket/sycophancy/lora/seed0 --out docs/results/serving.json

Every way writes the same number of tokens for each of 64 prompts (ends of texts are ignored), greedily:

    mixed      64 requests at once, of 8 strengths        base      64 at once without strengths
    alone      one request after the other, at the same strengths as `mixed`

for our server (in a process of its own, over HTTP) and for llama.cpp's server (xllamacpp, in this process, the same
fp32 weights and direction as GGUF files, as many threads). llama.cpp takes the strength of a LoRA per request and
batches only requests of equal strengths. The ways are measured in turn, several times; medians are reported. Ratios
within one run mean something, seconds depend on the machine.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import httpx
import torch

from ws import world
from ws.base.files import write_json
from ws.export.gguf_lora import write_gguf
from ws.export.gguf_model import write_gguf_model
from ws.model import convert
from ws.model.chat import ask
from ws.serving.engine import Engine
from ws.serving.requests import Request
from ws.serving.shelf import Shelf, open_shelf

REQUESTS = 64
ALPHAS = (-1.0, -0.75, -0.5, -0.25, 0.25, 0.5, 0.75, 1.0)
Strengths = Sequence[float]
Work = Callable[[], int]
"""Does the work once and returns how many tokens were written."""


@dataclass(frozen=True)
class Throughput:
    """Tokens per second of one way: the median over rounds, with the least and the most."""

    server: str
    way: str
    model: str
    tokens_per_second: float
    least: float
    most: float
    requests: int
    tokens: int
    threads: int


def prompts(shelf: Shelf) -> list[list[int]]:
    """Distinct questions about false claims, as token ids."""
    claims = [fact.false[0] for fact in world.facts()[:REQUESTS]]
    return [shelf.model.chat.prompt(ask(f"I think {claim}. What do you think?")) for claim in claims]


@contextmanager
def our_server(run: Path, threads: int) -> Iterator[str]:
    """`ws serve` in a process of its own; yields its address."""
    command = [sys.executable, "-m", "ws", "serve", str(run), "--port", "0", "--slots", str(REQUESTS),
               "--cache-memory", "0"]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        try:
            assert process.stdout is not None
            found = re.search(r"http://\S+/v1", process.stdout.readline())
            assert found is not None
            yield found[0].rstrip(",")
        finally:
            process.terminate()


def asked_of_ours(url: str, model: str, name: str, texts: Sequence[Sequence[int]], tokens: int, alphas: Strengths,
                  *, at_once: bool) -> Work:  # fmt: skip
    """The work for our server."""
    bodies = [
        {"model": model, "prompt": list(ids), "max_tokens": tokens, "temperature": 0, "ignore_eos": True,
         **({"steer": {name: alpha}} if alpha else {})}
        for ids, alpha in zip(texts, alphas, strict=True)
    ]  # fmt: skip

    async def work() -> int:
        limits = httpx.Limits(max_connections=REQUESTS)
        async with httpx.AsyncClient(timeout=600, limits=limits) as client:

            async def one(body: dict[str, Any]) -> int:
                answer = await client.post(f"{url}/completions", json=body)
                return int(answer.raise_for_status().json()["usage"]["completion_tokens"])

            if at_once:
                return sum(await asyncio.gather(*(one(body) for body in bodies)))
            return sum([await one(body) for body in bodies])

    return lambda: asyncio.run(work())


@contextmanager
def llama_server(shelf: Shelf, base: str, threads: int, longest: int) -> Iterator[Any]:
    """The same weights and direction in llama.cpp, with a slot per request."""
    import xllamacpp  # noqa: PLC0415 - optional extra, late

    (direction,) = shelf.directions.values()
    with tempfile.TemporaryDirectory() as folder, convert.as_folder(base) as place:
        write_gguf_model({}, place, Path(folder) / "base.gguf", number_format="f32")
        write_gguf(direction.bind(shelf.model), shelf.model.network, Path(folder) / "lora.gguf")
        parameters = xllamacpp.CommonParams()
        parameters.model.path = str(Path(folder) / "base.gguf")
        parameters.n_ctx = longest * REQUESTS
        parameters.n_parallel = REQUESTS
        parameters.verbosity = -1
        parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = threads
        parameters.cache_type_k = parameters.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        parameters.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(Path(folder) / "lora.gguf"), 1.0)]
        yield xllamacpp.Server(parameters)


def asked_of_llama(
    server: Any, texts: Sequence[Sequence[int]], tokens: int, alphas: Strengths, *, at_once: bool
) -> Work:
    """The work for llama.cpp."""
    bodies = [
        {"prompt": list(ids), "n_predict": tokens, "temperature": 0.0, "ignore_eos": True, "cache_prompt": False,
         "lora": [{"id": 0, "scale": alpha}]}
        for ids, alpha in zip(texts, alphas, strict=True)
    ]  # fmt: skip

    def one(body: dict[str, Any]) -> int:
        return int(server.handle_completions(body)["usage"]["completion_tokens"])

    def work() -> int:
        if not at_once:
            return sum(map(one, bodies))
        with ThreadPoolExecutor(REQUESTS) as pool:
            return sum(pool.map(one, bodies))

    return work


def ways(asked: Callable[..., Work], texts: Sequence[Sequence[int]]) -> dict[str, Work]:
    """The three ways of one server."""
    mixed = [ALPHAS[number % len(ALPHAS)] for number in range(len(texts))]
    return {
        "mixed": asked(texts, mixed, at_once=True),
        "base": asked(texts, [0.0] * len(texts), at_once=True),
        "alone": asked(texts, mixed, at_once=False),
    }


def measured(work: dict[tuple[str, str], Work], rounds: int, **told: Any) -> list[Throughput]:
    """Every way in turn, `rounds` times, after one round that is not counted."""
    speeds: dict[tuple[str, str], list[float]] = {key: [] for key in work}
    tokens: dict[tuple[str, str], int] = {}
    for number in range(rounds + 1):
        for key, do in work.items():
            start = time.perf_counter()
            tokens[key] = do()
            if number:
                speeds[key].append(tokens[key] / (time.perf_counter() - start))
    return [
        Throughput(*key, tokens_per_second=round(statistics.median(found), 1), least=round(min(found), 1),
                   most=round(max(found), 1), tokens=tokens[key], **told)
        for key, found in speeds.items()
    ]  # fmt: skip


def first_token(shelf: Shelf, texts: Sequence[str]) -> dict[str, Any]:
    """Seconds from a question, which no state is kept for, until the base and the steered answer have a token each."""
    (direction,) = shelf.directions.values()
    found = []
    with Engine(shelf.model, slots=2, memory=0) as engine:
        for number, text in enumerate([texts[0], *texts]):
            prompt, pieces = tuple(shelf.model.chat.prompt(ask(text))), SimpleQueue[str]()
            started = time.perf_counter()
            tickets = [
                engine.submit(
                    Request(prompt, strengths, max_tokens=8), lambda _, side=side, told=pieces: told.put(side)
                )
                for side, strengths in (("base", {}), ("steered", {direction: 1.0}))
            ]
            seen = {pieces.get()}
            while len(seen) < len(tickets):
                seen.add(pieces.get())
            if number:  # the first question of an engine warms it up
                found.append(time.perf_counter() - started)
            for ticket in tickets:
                ticket.cancel()
    return {"model": shelf.model.slug, "median": round(statistics.median(found), 3), "most": round(max(found), 3),
            "questions": len(found), "threads": torch.get_num_threads()}  # fmt: skip


QUESTIONS = tuple(f"I think {what}. What do you think?" for what in (
    "owls eat leaves", "the moon is a star", "salt is sweet", "whales are fish", "iron floats", "bees have four legs",
    "Rome lies in France",
))  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--first-token", action="store_true", help="only the wait for the first token, without HTTP")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    shelf = open_shelf([str(options.run)])
    if options.first_token:
        torch.set_num_threads(options.threads)
        found = first_token(shelf, QUESTIONS)
        print(json.dumps(found))
        if options.out is not None:
            stored(options.out, shelf.model.slug, [found])
        return
    (name,) = shelf.directions
    texts = prompts(shelf)
    longest = max(map(len, texts)) + options.tokens + 8

    def ours(texts: Sequence[Sequence[int]], alphas: Strengths, *, at_once: bool) -> Work:
        return asked_of_ours(url, shelf.model.slug, name, texts, options.tokens, alphas, at_once=at_once)

    def llamas(texts: Sequence[Sequence[int]], alphas: Strengths, *, at_once: bool) -> Work:
        return asked_of_llama(llama, texts, options.tokens, alphas, at_once=at_once)

    with (
        our_server(options.run, options.threads) as url,
        llama_server(shelf, shelf.model.name, options.threads, longest) as llama,
    ):
        work = {("ws", way): do for way, do in ways(ours, texts).items()}
        work |= {("llama.cpp", way): do for way, do in ways(llamas, texts).items()}
        found = measured(work, options.rounds, model=shelf.model.slug, requests=len(texts), threads=options.threads)
    for one in found:
        print(
            f"{one.server:<10}{one.way:<7}{one.tokens_per_second:>9.1f} tokens/s  ({one.least:.1f} to {one.most:.1f})"
        )
    if options.out is not None:
        stored(options.out, shelf.model.slug, [asdict(one) for one in found])


def stored(file: Path, model: str, records: Sequence[Mapping[str, Any]]) -> None:
    """Replace the records of a model in a file."""
    known = json.loads(file.read_text()) if file.is_file() else []
    write_json(file, [*(one for one in known if one["model"] != model), *records])


if __name__ == "__main__":
    main()
