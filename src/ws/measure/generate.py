"""Sample many continuations of few prompts, fast and reproducibly.

Each distinct prompt is prefilled once and its cache is expanded to its samples. Finished rows leave the batch, a
quarter of it at a time (`sample_cache`). Every sample has its own random stream, seeded by its key. Each step draws one
uniform number and inverts the cumulative distribution at it. So a sample does not depend on its batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ws.base import console, keyed_random, memory
from ws.base.errors import UserError
from ws.model import architecture
from ws.model.loading import ChatModel

CACHE_TOKENS = 65_536
"""Upper limit of tokens in the attention cache. Beyond it, larger batches of small models are not faster."""


@dataclass(frozen=True)
class Sampling:
    """How to sample. Temperature 0 is greedy; top_p 1 and top_k 0 do not truncate the distribution."""

    max_new_tokens: int = 160
    temperature: float = 0.8
    top_p: float = 1.0
    top_k: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1 or self.temperature < 0 or not 0 < self.top_p <= 1 or self.top_k < 0:
            raise UserError(
                f"{self} is out of range",
                "Give max_new_tokens >= 1, temperature >= 0, 0 < top_p <= 1 and top_k >= 0.",
            )


class Sample(NamedTuple):
    """One continuation: token ids without the stop token, why it ended, and the stop token if there was one."""

    ids: list[int]
    finish: Literal["eos", "length"]
    stop: int | None = None


class Request(NamedTuple):
    """A prompt and one random key per sample to draw from it."""

    prompt: list[int]
    keys: tuple[str, ...]


EditOfRows = Callable[[Sequence[int]], AbstractContextManager[None]]
"""Applies an edit to the model for one batch, given the request number of each of its rows."""


@torch.no_grad()
def sample(
    model: ChatModel,
    requests: Sequence[Request],
    sampling: Sampling,
    seed: int,
    *,
    stops: frozenset[int] | None = None,
    cache_tokens: int | None = None,
    advance: Callable[[int], None] = lambda _: None,
    edited: EditOfRows = lambda _: nullcontext(),
) -> list[list[Sample]]:
    """Sample every request; results are in the order of `requests` and of their keys.

    stops: the ids that end a sample (None: the chat template's). cache_tokens: limit of the attention cache (None: what
    fits in `model.cache_memory`); it has no effect on results, and a request is never split. advance: called with the
    number of newly finished samples. edited: an edit whose strength may differ between requests; it is entered again
    whenever rows leave the batch.
    """
    ending = model.chat.stop_ids if stops is None else stops
    results: list[list[Sample]] = [[] for _ in requests]
    most = affordable_tokens(model) if cache_tokens is None else cache_tokens
    waiting = _plan(requests, sampling.max_new_tokens, most)[::-1]
    while waiting:
        batch, fits = waiting.pop(), True
        try:
            done = _sample_batch(
                model, [requests[index] for index in batch], sampling, seed, ending,
                _of_requests(edited, batch),
            )  # fmt: skip
        except (MemoryError, RuntimeError) as error:
            if len(batch) == 1 or not memory.is_exhausted(error):
                raise
            fits = False
        if not fits:  # outside of the handler, so that the failed attempt no longer holds its tensors
            half = len(batch) // 2
            console.warn(f"not enough memory to sample {len(batch)} prompts at once: going on with {half}")
            waiting += [batch[half:], batch[:half]]
            continue
        for index, samples in zip(batch, done, strict=True):
            results[index] = samples
        advance(sum(len(samples) for samples in done))
    return results


def _of_requests(edited: EditOfRows, batch: Sequence[int]) -> EditOfRows:
    """The same edit, for rows numbered by their place in a batch of requests."""
    return lambda places: edited([batch[place] for place in places])


def affordable_tokens(model: ChatModel) -> int:
    """Tokens whose keys and values fit in `model.cache_memory`: each takes 2 x layers x heads x head size x bytes."""
    config = architecture.text_config(model.network)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    per_token = 2 * model.layer_count * heads * size * model.dtype.itemsize
    return min(CACHE_TOKENS, model.cache_memory // per_token)


def _plan(requests: Sequence[Request], max_new_tokens: int, cache_tokens: int) -> list[list[int]]:
    """Requests of similar prompt length together, longest first, within the cache budget."""
    order = sorted(range(len(requests)), key=lambda index: (-len(requests[index].prompt), index))
    batches: list[list[int]] = []
    rows = 0
    for index in order:
        wanted = len(requests[index].keys)
        longest = len(requests[batches[-1][0]].prompt) if batches else 0
        if batches and (rows + wanted) * (longest + max_new_tokens) <= cache_tokens:
            batches[-1].append(index)
            rows += wanted
        else:
            batches.append([index])
            rows = wanted
    return batches


def _sample_batch(
    model: ChatModel, requests: Sequence[Request], sampling: Sampling, seed: int, ending: frozenset[int],
    edited: EditOfRows,
) -> list[list[Sample]]:  # fmt: skip
    from ws.measure import sample_cache  # noqa: PLC0415 - imports transformers

    device = model.device
    copies = torch.tensor([len(request.keys) for request in requests], device=device)
    width = max(len(request.prompt) for request in requests)
    # left padding: all rows of a batch then append at the same cache position
    ids = torch.tensor([[0] * (width - len(r.prompt)) + r.prompt for r in requests], device=device)
    mask = torch.tensor([[0] * (width - len(r.prompt)) + [1] * len(r.prompt) for r in requests], device=device)
    prompts = sample_cache.prompt_cache(model.network, width + sampling.max_new_tokens)
    rows_of_prompts = torch.arange(len(requests), device=device)
    with edited(range(len(requests))):
        logits = _next_logits(model, ids, mask, prompts)

    # from prompts to samples: row i of the expanded batch continues prompt owner[i]
    owner = torch.repeat_interleave(rows_of_prompts, copies)
    cache = sample_cache.for_samples(prompts, owner, sampling.max_new_tokens)
    logits, mask = logits[owner], mask[owner]
    drawn = torch.stack([uniforms(key, seed, sampling.max_new_tokens) for r in requests for key in r.keys])
    drawn = drawn.to(device)
    written: list[list[int]] = [[] for _ in range(len(owner))]
    ended: list[int | None] = [None] * len(owner)
    rows = torch.arange(len(owner), device=device)  # the sample of every row of the batch
    alive = torch.ones_like(rows, dtype=torch.bool)
    stops = torch.tensor(sorted(ending), device=device)

    with ExitStack() as stack:
        stack.enter_context(edited(owner.tolist()))
        for step in range(sampling.max_new_tokens):
            tokens = draw(logits, drawn[rows, step], sampling)
            stopped = torch.isin(tokens, stops)
            for row, token, lives, stop in zip(*(one.tolist() for one in (rows, tokens, alive, stopped)), strict=True):
                if lives and stop:
                    ended[row] = token
                elif lives:
                    written[row].append(token)
            alive &= ~stopped
            left = int(alive.sum())
            if not left or step + 1 == sampling.max_new_tokens:
                break
            if left <= (1 - sample_cache.LEAST_ENDED) * len(rows):
                keep = torch.nonzero(alive).flatten()
                rows, alive, tokens, mask = rows[keep], alive[keep], tokens[keep], mask[keep]
                cache.reorder_cache(keep)
                stack.close()
                stack.enter_context(edited(owner[rows].tolist()))
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
            logits = _next_logits(model, tokens[:, None], mask, cache)

    flat = [Sample(ids, "length" if end is None else "eos", end) for ids, end in zip(written, ended, strict=True)]
    starts = [0, *torch.cumsum(copies, 0).tolist()]
    return [flat[start:stop] for start, stop in pairwise(starts)]


def _next_logits(
    model: ChatModel, ids: Int[Tensor, "rows tokens"], mask: Int[Tensor, "rows past"], cache: object
) -> Float[Tensor, "rows vocabulary"]:
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)[:, -ids.shape[1] :]
    rows = torch.arange(len(ids), device=ids.device)
    return model.split.logits_at(
        ids,
        rows,
        torch.full_like(rows, ids.shape[1] - 1),
        attention_mask=mask,
        position_ids=positions,
        past_key_values=cache,
        use_cache=True,
    )


def uniforms(key: str, seed: int, count: int) -> Float[Tensor, " count"]:
    """The uniform numbers of a sample, one per token; fp64."""
    return torch.rand(count, generator=keyed_random.generator(f"{seed}|{key}"), dtype=torch.float64)


def draw(
    logits: Float[Tensor, "rows vocabulary"], draws: Float[Tensor, " rows"], sampling: Sampling
) -> Int[Tensor, " rows"]:
    """The next token of every row: the inverse of its cumulative distribution at its uniform number."""
    if sampling.temperature == 0:
        return logits.argmax(dim=-1)
    probabilities = torch.softmax(logits / sampling.temperature, dim=-1)
    if sampling.top_k:
        floor = probabilities.topk(min(sampling.top_k, probabilities.shape[-1]), dim=-1).values[:, -1:]
        probabilities = probabilities.where(probabilities >= floor, 0)
    if sampling.top_p < 1:
        ordered, order = probabilities.sort(dim=-1, descending=True)
        before = ordered.cumsum(dim=-1) - ordered
        kept = ordered.where(before < sampling.top_p * ordered.sum(dim=-1, keepdim=True), 0)
        probabilities = torch.zeros_like(probabilities).scatter(-1, order, kept)
    wide = torch.float32 if logits.device.type == "mps" else torch.float64
    cumulative = probabilities.cumsum(dim=-1, dtype=wide)
    target = draws.to(wide)[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, target, right=True).flatten().clamp(max=logits.shape[-1] - 1)
