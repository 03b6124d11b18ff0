"""The cache of samples is the library's cache without the copies: expanded, extended and thinned out alike."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from ws.measure import sample_cache
from ws.measure.generate import Request, Sampling, sample
from ws.model.chat import ask
from ws.model.loading import ChatModel

PROMPT, ROOM = 7, 6


def ids(model: ChatModel, rows: int, tokens: int, seed: int) -> Tensor:
    count = model.network.get_input_embeddings().weight.shape[0]
    return torch.randint(count, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def run(model: ChatModel, tokens: Tensor, cache: Any) -> Tensor:
    with torch.no_grad():
        return model.network(input_ids=tokens, past_key_values=cache, use_cache=True).logits[:, -1]


def test_samples_continue_their_prompts_as_whole_rows_would(any_model: ChatModel) -> None:
    prompts = ids(any_model, 2, PROMPT, seed=1)
    owners = torch.tensor([0, 0, 1, 1, 1])
    first, second = ids(any_model, 5, 2, seed=2), ids(any_model, 3, 1, seed=3)
    kept = torch.tensor([4, 0, 2])
    cache = sample_cache.prompt_cache(any_model.network, PROMPT + ROOM)
    run(any_model, prompts, cache)
    cache = sample_cache.for_samples(cache, owners, ROOM)
    assert cache.get_seq_length() == PROMPT
    grown = run(any_model, first, cache)
    whole = torch.cat([prompts[owners], first], dim=1)
    assert torch.allclose(grown, run(any_model, whole, DynamicCache()), atol=1e-4)
    cache.reorder_cache(kept)
    assert cache.get_seq_length() == PROMPT + 2
    thinned = run(any_model, second, cache)
    assert torch.allclose(thinned, run(any_model, torch.cat([whole[kept], second], dim=1), DynamicCache()), atol=1e-4)


def test_a_token_is_written_without_moving_the_others(qwen: ChatModel) -> None:
    cache = sample_cache.prompt_cache(qwen.network, PROMPT + ROOM)
    run(qwen, ids(qwen, 1, PROMPT, seed=1), cache)
    cache = sample_cache.for_samples(cache, torch.tensor([0, 0]), ROOM)
    places = {layer.keys.data_ptr() for layer in cache.layers}
    for step in range(ROOM):
        run(qwen, ids(qwen, 2, 1, seed=step), cache)
    assert {layer.keys.data_ptr() for layer in cache.layers} == places
    assert cache.get_seq_length() == PROMPT + ROOM


def test_a_window_shorter_than_the_sequence_keeps_its_own_cache(tiny_gemma: ChatModel) -> None:
    network = tiny_gemma.network
    window = network.config.sliding_window
    kinds = {type(layer) for layer in sample_cache.prompt_cache(network, window).layers}
    assert kinds <= {DynamicLayer}
    windowed = sample_cache.prompt_cache(network, window + 1)
    assert DynamicSlidingWindowLayer in {type(layer) for layer in windowed.layers}
    prompts = ids(tiny_gemma, 2, window - 2, seed=1)
    run(tiny_gemma, prompts, windowed)
    theirs = copy.deepcopy(windowed)
    theirs.reorder_cache(torch.tensor([1, 1, 0]))
    mine = sample_cache.for_samples(windowed, torch.tensor([1, 1, 0]), 5)
    more = ids(tiny_gemma, 3, 5, seed=2)
    assert torch.equal(run(tiny_gemma, more, mine), run(tiny_gemma, more, theirs))


def test_when_rows_leave_has_no_effect_on_samples(qwen: ChatModel, monkeypatch: pytest.MonkeyPatch) -> None:
    requests = [
        Request(qwen.chat.prompt(ask(text)), tuple(f"{text}/{n}" for n in range(6))) for text in ("Why?", "And you?")
    ]
    stops = frozenset(range(0, 1000, 9))  # rows end all the time
    found = []
    for share in (0.0, 0.25, 1.0):
        monkeypatch.setattr(sample_cache, "LEAST_ENDED", share)
        found.append(sample(qwen, requests, Sampling(24, 1.0), seed=3, stops=stops))
    assert found[0] == found[1] == found[2]
    assert {one.finish for many in found[0] for one in many} == {"eos", "length"}


@pytest.fixture
def tiny_gemma(tiny_folders: dict[str, Any]) -> ChatModel:
    from ws.model import loading  # noqa: PLC0415

    return loading.load(str(tiny_folders["gemma3"]))
