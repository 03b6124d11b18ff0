"""Sampling: equal to the library's own greedy decoding, and a sample never depends on its company."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats as scipy_stats
from transformers import DynamicCache

from making import hook_count, random_direction
from ws.base.errors import UserError
from ws.edit.steering import steer
from ws.measure import generate
from ws.measure.generate import Request, Sample, Sampling
from ws.model import loading
from ws.model.loading import ChatModel
from ws.pocket import tiny

GREEDY = Sampling(max_new_tokens=8, temperature=0)
WARM = Sampling(max_new_tokens=8, temperature=1.0)


def random_prompt(length: int) -> list[int]:
    return np.random.default_rng(length).integers(3, tiny.VOCABULARY, length).tolist()


PROMPTS = [random_prompt(length) for length in (5, 90, 31, 5, 1)]
"""One longer than the sliding window of the Gemma model (64), the others padded far."""


@pytest.fixture(scope="module", params=list(tiny.ARCHITECTURES))
def lively(request: pytest.FixtureRequest, tiny_folders: dict[str, Path]) -> ChatModel:
    """A random model whose weights are large enough that every token of the context matters."""
    model = loading.load(str(tiny_folders[request.param]))
    with torch.no_grad():
        for name, parameter in model.network.named_parameters():
            if parameter.ndim == 2 and not any(part in name for part in ("embed", "wte", "wpe", "lm_head")):
                parameter.mul_(8)
    return model


@pytest.fixture
def stopping(lively: ChatModel, monkeypatch: pytest.MonkeyPatch) -> Iterator[ChatModel]:
    """The same model with many stop tokens, so that rows leave the batch at different steps."""
    monkeypatch.setitem(lively.chat.__dict__, "stop_ids", frozenset(range(3, tiny.VOCABULARY, 5)))
    yield lively


def greedy_by_the_library(model: ChatModel, prompt: Sequence[int]) -> Sample:
    stops = sorted(model.chat.stop_ids)
    ids = torch.tensor([list(prompt)])
    written = model.network.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=GREEDY.max_new_tokens,
        eos_token_id=stops, pad_token_id=0,
    )[0, len(prompt) :].tolist()  # fmt: skip
    if written[-1] in stops:
        return Sample(written[:-1], "eos", written[-1])
    return Sample(written, "length")


def ask(prompts: Sequence[Sequence[int]], keys: Sequence[str] = ("a",)) -> list[Request]:
    return [Request(list(prompt), tuple(f"{number}/{key}" for key in keys)) for number, prompt in enumerate(prompts)]


# ---------------------------------------------------------------- greedy


def test_greedy_sampling_equals_the_library_whatever_the_padding(lively: ChatModel) -> None:
    expected = [[greedy_by_the_library(lively, prompt)] for prompt in PROMPTS]
    assert generate.sample(lively, ask(PROMPTS), GREEDY, seed=0) == expected


def test_greedy_sampling_equals_the_library_when_rows_leave_the_batch(stopping: ChatModel) -> None:
    prompts = [random_prompt(length) for length in range(3, 19)]
    expected = [[greedy_by_the_library(stopping, prompt)] for prompt in prompts]
    lengths = {len(sample.ids) for (sample,) in expected}
    assert len(lengths) > 2, "else no row leaves before another"
    assert generate.sample(stopping, ask(prompts), GREEDY, seed=0) == expected


@pytest.mark.parametrize("cache_tokens", [1, 400, 10**6])
def test_every_request_keeps_its_own_strength_when_rows_leave_the_batch(stopping: ChatModel, cache_tokens: int) -> None:
    direction = random_direction(stopping, relative_norm=0.5)
    requests = ask([random_prompt(length) for length in (9, 3, 12, 3, 7, 5, 11, 4)], keys="ab")
    strengths = torch.linspace(-2, 2, len(requests))
    alone = []
    for request, strength in zip(requests, strengths.tolist(), strict=True):
        with steer(stopping, direction, strength, mode="runtime"):
            alone += generate.sample(stopping, [request], WARM, seed=0)
    plain = generate.sample(stopping, requests, WARM, seed=0)
    assert len({len(one.ids) for samples in alone for one in samples}) > 2, "else no row leaves before another"
    assert sum(one != other for one, other in zip(alone, plain, strict=True)) > len(requests) // 2

    def edited(rows: Sequence[int]) -> AbstractContextManager[None]:
        return steer(stopping, direction, strengths[list(rows)], mode="runtime")

    together = generate.sample(stopping, requests, WARM, seed=0, cache_tokens=cache_tokens, edited=edited)
    assert together == alone and hook_count(stopping.network) == 0


def test_the_models_of_these_tests_read_their_whole_context(lively: ChatModel) -> None:
    prompt = random_prompt(20)
    changed = [prompt[0] + 1, *prompt[1:]]
    assert greedy_by_the_library(lively, prompt) != greedy_by_the_library(lively, changed)


# ---------------------------------------------------------------- independence


def test_the_attention_cache_fits_the_memory(any_model: ChatModel, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = DynamicCache(config=any_model.network.config)
    any_model.network(input_ids=torch.ones(2, 3, dtype=torch.long), past_key_values=cache, use_cache=True)
    per_token = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers) // 6
    monkeypatch.setattr(any_model, "cache_memory", 100 * per_token + 1)
    assert generate.affordable_tokens(any_model) == 100
    monkeypatch.setattr(any_model, "cache_memory", 2**40)
    assert generate.affordable_tokens(any_model) == generate.CACHE_TOKENS


@pytest.mark.parametrize("cache_tokens", [1, 300, 10**6])
def test_a_sample_is_the_same_in_any_batch(stopping: ChatModel, cache_tokens: int) -> None:
    requests = ask(PROMPTS, keys="abc")
    alone = [
        [generate.sample(stopping, [Request(request.prompt, (key,))], WARM, seed=3)[0][0] for key in request.keys]
        for request in requests
    ]
    assert {sample.finish for samples in alone for sample in samples} == {"eos", "length"}
    assert generate.sample(stopping, requests, WARM, seed=3, cache_tokens=cache_tokens) == alone


def test_the_order_of_requests_and_keys_does_not_matter(qwen: ChatModel) -> None:
    requests = ask(PROMPTS, keys="ab")
    found = generate.sample(qwen, requests, WARM, seed=0)
    turned = [Request(request.prompt, request.keys[::-1]) for request in requests[::-1]]
    assert [samples[::-1] for samples in generate.sample(qwen, turned, WARM, seed=0)[::-1]] == found


def test_keys_and_seeds_tell_samples_apart_and_equal_ones_repeat(qwen: ChatModel) -> None:
    prompt = random_prompt(6)

    def draw(key: str, seed: int) -> Sample:
        return generate.sample(qwen, [Request(prompt, (key,))], WARM, seed)[0][0]

    samples = [draw(key, seed) for key in ("a", "b", "a/1") for seed in (0, 1, 2)]
    assert len({tuple(sample.ids) for sample in samples}) == 9
    assert samples == [draw(key, seed) for key in ("a", "b", "a/1") for seed in (0, 1, 2)]


def test_the_global_random_state_neither_matters_nor_changes(qwen: ChatModel) -> None:
    torch.manual_seed(0)
    first = generate.sample(qwen, ask(PROMPTS[:2]), WARM, seed=0)
    state = torch.get_rng_state()
    torch.rand(3)
    assert generate.sample(qwen, ask(PROMPTS[:2]), WARM, seed=0) == first
    torch.manual_seed(0)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_prompt_is_read_once_for_all_its_samples(qwen: ChatModel, monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[tuple[int, ...]] = []
    logits_at = qwen.split.logits_at

    def counted(ids: Any, *arguments: Any, **named: Any) -> Any:
        rows.append(tuple(ids.shape))
        return logits_at(ids, *arguments, **named)

    monkeypatch.setattr(qwen.split, "logits_at", counted)
    generate.sample(qwen, [Request(random_prompt(9), tuple("abcdef"))], Sampling(3, 1.0), seed=0)
    assert rows == [(1, 9), (6, 1), (6, 1)]


def test_progress_counts_every_sample_once(qwen: ChatModel) -> None:
    told: list[int] = []
    generate.sample(qwen, ask(PROMPTS, keys="ab"), Sampling(1, 1.0), seed=0, cache_tokens=1, advance=told.append)
    assert sum(told) == 2 * len(PROMPTS)
    assert len(told) == len(PROMPTS)


def test_nothing_asked_is_nothing_sampled(qwen: ChatModel) -> None:
    assert generate.sample(qwen, [], WARM, seed=0) == []


# ---------------------------------------------------------------- stop tokens


def stop_at(monkeypatch: pytest.MonkeyPatch, stop: int, step: int) -> None:
    """Make `stop` certain at the given step and impossible before."""
    calls = iter(range(10**6))
    next_logits = generate._next_logits

    def patched(*arguments: Any) -> torch.Tensor:
        logits = next_logits(*arguments)
        logits[:, stop] = math.inf if next(calls) == step else -math.inf
        return logits.nan_to_num(posinf=1e4, neginf=-1e4)

    monkeypatch.setattr(generate, "_next_logits", patched)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("pad_is_stop", [False, True])
@pytest.mark.parametrize(("step", "length", "finish"), [(0, 0, "eos"), (2, 2, "eos"), (3, 3, "eos"), (4, 4, "length")])
def test_a_stop_token_ends_a_sample_and_is_no_part_of_it(
    tiny_folders: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    temperature: float,
    pad_is_stop: bool,
    step: int,
    length: int,
    finish: str,
) -> None:
    model = loading.load(str(tiny_folders["qwen3"]))
    if pad_is_stop:
        model.chat.tokenizer.pad_token = model.chat.tokenizer.eos_token
        model.network.config.pad_token_id = model.network.config.eos_token_id
    (stop,) = model.chat.stop_ids
    assert (model.chat.tokenizer.pad_token_id == stop) == pad_is_stop
    stop_at(monkeypatch, stop, step)
    found = generate.sample(model, ask(PROMPTS[:3], keys="ab"), Sampling(4, temperature), seed=0)
    for sample in [sample for samples in found for sample in samples]:
        assert (len(sample.ids), sample.finish) == (length, finish)
        assert stop not in sample.ids


# ---------------------------------------------------------------- one draw

LOGITS = torch.tensor([1.0, -2.0, 0.5, 3.0, 2.5, -9.0, 0.0, 2.4])
DRAWS = 20_000


def drawn(sampling: Sampling, logits: torch.Tensor = LOGITS) -> np.ndarray:
    draws = torch.rand(DRAWS, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    tokens = generate.draw(logits.expand(DRAWS, -1), draws, sampling)
    return np.bincount(tokens.numpy(), minlength=len(logits))


def expected_probabilities(sampling: Sampling) -> np.ndarray:
    """By the definitions: the k likeliest, then the fewest of these whose share reaches p."""
    weights = np.exp(LOGITS.numpy().astype(np.float64) / sampling.temperature)
    order = np.argsort(-weights)[: sampling.top_k or None]
    shares = weights[order] / weights[order].sum()
    count = int(np.searchsorted(shares.cumsum(), sampling.top_p - 1e-12)) + 1
    kept = np.zeros_like(weights)
    kept[order[:count]] = weights[order[:count]]
    return kept / kept.sum()


@pytest.mark.parametrize(
    ("sampling", "allowed"),
    [
        (Sampling(temperature=1.0), 8),
        (Sampling(temperature=0.5), 8),
        (Sampling(temperature=3.0), 8),
        (Sampling(temperature=1.0, top_k=1), 1),
        (Sampling(temperature=1.0, top_k=3), 3),
        (Sampling(temperature=1.0, top_k=100), 8),
        (Sampling(temperature=1.0, top_p=0.01), 1),
        (Sampling(temperature=1.0, top_p=0.5), 2),
        (Sampling(temperature=1.0, top_p=0.9), 4),
        (Sampling(temperature=0.7, top_p=0.8, top_k=20), 3),
        (Sampling(temperature=1.0, top_p=0.9, top_k=3), 3),
    ],
    ids=str,
)
def test_draws_follow_the_distribution_and_stay_within_its_limits(sampling: Sampling, allowed: int) -> None:
    expected = expected_probabilities(sampling)
    assert np.count_nonzero(expected) == allowed
    counts = drawn(sampling)
    assert counts[expected == 0].sum() == 0
    inside = expected > 0
    if allowed > 1:
        assert scipy_stats.chisquare(counts[inside], expected[inside] * DRAWS).pvalue > 1e-4


def test_the_distribution_test_can_tell_a_wrong_temperature() -> None:
    wrong = expected_probabilities(Sampling(temperature=1.1)) * DRAWS
    assert scipy_stats.chisquare(drawn(Sampling(temperature=1.0)), wrong).pvalue < 1e-4


def pairs_by_the_library(model: ChatModel, prompt: list[int], sampling: Sampling, count: int) -> list[tuple[int, ...]]:
    """The first two tokens of samples of `generate`."""
    torch.manual_seed(0)
    found = model.network.generate(
        input_ids=torch.tensor([prompt]), max_new_tokens=2, do_sample=True, num_return_sequences=count, pad_token_id=0,
        temperature=sampling.temperature, top_k=sampling.top_k, top_p=sampling.top_p, eos_token_id=None,
    )  # fmt: skip
    return [tuple(row) for row in found[:, len(prompt) :].tolist()]


def same_distribution(one: Sequence[tuple[int, ...]], other: Sequence[tuple[int, ...]]) -> float:
    """p of a chi-square test that two samples of texts come from one distribution, rare texts taken together."""
    texts = sorted({*one, *other})
    counts = np.array([[sample.count(text) for text in texts] for sample in (one, other)])
    common = counts.sum(axis=0) >= 20
    table = np.column_stack([counts[:, common], counts[:, ~common].sum(axis=1)])
    return float(scipy_stats.chi2_contingency(table[:, table.sum(axis=0) > 0]).pvalue)


def test_samples_have_the_distribution_of_the_librarys(lively: ChatModel) -> None:
    count, sampling = 3_000, Sampling(max_new_tokens=2, temperature=0.8, top_k=6, top_p=0.95)
    request = Request(PROMPTS[0], tuple(str(number) for number in range(count)))
    (found,) = generate.sample(lively, [request], sampling, seed=0, stops=frozenset())
    mine = [tuple(one.ids) for one in found]
    assert len(set(mine)) > 5
    assert same_distribution(mine, pairs_by_the_library(lively, PROMPTS[0], sampling, count)) > 1e-4
    narrower = Sampling(max_new_tokens=2, temperature=0.8, top_k=5, top_p=0.95)
    assert same_distribution(mine, pairs_by_the_library(lively, PROMPTS[0], narrower, count)) < 1e-4


@given(
    logits=st.lists(st.floats(-30, 30, width=32), min_size=2, max_size=12, unique=True),
    draw=st.one_of(st.floats(0, 1, exclude_max=True), st.sampled_from([0.0, 1 - 2**-53, 0.5])),
    top_k=st.integers(0, 13),
    top_p=st.floats(0.01, 1.0),
    temperature=st.sampled_from([0.3, 1.0, 2.0]),
)
@settings(max_examples=200, deadline=None)
def test_no_draw_leaves_the_limits(
    logits: list[float], draw: float, top_k: int, top_p: float, temperature: float
) -> None:
    row = torch.tensor([logits], dtype=torch.float32)
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
    (token,) = generate.draw(row, torch.tensor([draw], dtype=torch.float64), sampling).tolist()
    probabilities = (row[0] / temperature).double().softmax(-1)
    # logits that differ by less than fp32 resolves are as likely as each other
    likelier = probabilities > probabilities[token] * (1 + 1e-6)
    if top_k:
        assert int(likelier.sum()) < top_k
        last = probabilities.topk(min(top_k, len(logits))).values[-1]
        kept = probabilities[probabilities >= last * (1 - 1e-6)].sum()  # ties at the last place are all kept
    else:
        kept = probabilities.sum()
    assert float(probabilities[likelier].sum() / kept) <= top_p + 1e-9
    assert probabilities[token] > 0


@given(logits=st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=9), draw=st.floats(0, 1, exclude_max=True))
@settings(max_examples=50, deadline=None)
def test_temperature_zero_takes_the_likeliest_whatever_the_draw(logits: list[float], draw: float) -> None:
    row = torch.tensor([logits], dtype=torch.float32)
    (token,) = generate.draw(row, torch.tensor([draw], dtype=torch.float64), Sampling(temperature=0)).tolist()
    assert row[0, token] == row.max()


def test_every_row_uses_its_own_draw_and_its_own_logits() -> None:
    logits = torch.log(torch.tensor([[0.5, 0.5, 0.0], [0.0, 0.5, 0.5], [0.5, 0.0, 0.5]]))
    draws = torch.tensor([[0.4, 0.4, 0.4], [0.6, 0.6, 0.6]], dtype=torch.float64)
    assert generate.draw(logits, draws[0], WARM).tolist() == [0, 1, 0]
    assert generate.draw(logits, draws[1], WARM).tolist() == [1, 2, 2]


def test_random_streams_are_uniform_and_belong_to_key_and_seed() -> None:
    numbers = torch.cat([generate.uniforms(f"row/{number}", 0, 50) for number in range(100)])
    assert scipy_stats.kstest(numbers.numpy(), "uniform").pvalue > 1e-4
    assert torch.equal(generate.uniforms("a", 1, 20), generate.uniforms("a", 1, 20))
    assert len({float(generate.uniforms(key, seed, 1)) for key in "abc" for seed in range(4)}) == 12


# ---------------------------------------------------------------- settings and plan


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_new_tokens": 0},
        {"max_new_tokens": -1},
        {"temperature": -0.1},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_p": -1.0},
        {"top_k": -1},
    ],
)
def test_settings_that_cannot_be_sampled_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="is out of range"):
        Sampling(**wrong)


@given(st.lists(st.tuples(st.integers(1, 60), st.integers(1, 5)), max_size=12), st.integers(1, 20), st.integers(1, 600))
@settings(max_examples=100, deadline=None)
def test_batches_hold_every_request_once_longest_first_within_the_budget(
    shapes: list[tuple[int, int]], max_new_tokens: int, budget: int
) -> None:
    requests = [Request([0] * length, tuple(map(str, range(count)))) for length, count in shapes]
    batches = generate._plan(requests, max_new_tokens, budget)
    order = [index for batch in batches for index in batch]
    assert sorted(order) == list(range(len(requests)))
    assert all(len(requests[a].prompt) >= len(requests[b].prompt) for a, b in pairwise(order))
    for batch in batches:
        rows = sum(len(requests[index].keys) for index in batch)
        assert len(batch) == 1 or rows * (len(requests[batch[0]].prompt) + max_new_tokens) <= budget
