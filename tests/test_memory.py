"""When memory runs out, batches are halved and this is said; nothing else changes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch

from test_cli import one_line, run
from test_score import choice, direction, texts
from test_train import SMALL, pairs
from ws.base import memory
from ws.edit.condition import Condition, Edit
from ws.fitting import train
from ws.measure import generate
from ws.measure.generate import Request, Sampling
from ws.measure.score import score
from ws.model.loading import ChatModel

SHORT_OF_MEMORY = [
    MemoryError(),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: 8 bytes"),
    RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes."),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 8 GiB"),
]


def run_short(model: ChatModel, monkeypatch: pytest.MonkeyPatch, rows: int) -> Callable[[], int]:
    """Let every forward pass over more than `rows` rows run out of memory; returns how often that happened."""
    real, failures = model.network.model.forward, [0]

    def forward(*arguments: Any, **more: Any) -> Any:
        given = more.get("input_ids", arguments[0] if arguments else None)
        if given is None:
            given = more["inputs_embeds"]
        if len(given) > rows:
            failures[0] += 1
            raise SHORT_OF_MEMORY[failures[0] % len(SHORT_OF_MEMORY)]
        return real(*arguments, **more)

    monkeypatch.setattr(model.network.model, "forward", forward)
    return lambda: failures[0]


@pytest.mark.parametrize("error", SHORT_OF_MEMORY, ids=str)
def test_a_size_is_halved_until_it_fits(error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    def work(tokens: int) -> int:
        if tokens > 300:
            raise error
        return tokens

    assert memory.halving(1024, "batches", work) == 256
    assert capsys.readouterr().err.count("not enough memory for batches of") == 2


def test_other_errors_and_tiny_batches_are_not_tried_again() -> None:
    tried: list[int] = []

    def fails_with(error: Exception) -> Callable[[int], None]:
        def work(tokens: int) -> None:
            tried.append(tokens)
            raise error

        return work

    for error in (RuntimeError("shapes differ"), ValueError("out of memory")):
        with pytest.raises(type(error)):
            memory.halving(1024, "batches", fails_with(error))
    assert tried == [1024, 1024]
    with pytest.raises(MemoryError):
        memory.halving(1024, "batches", fails_with(MemoryError()))
    assert tried[2:] == [1024, 512, 256, 128, 64]


def test_scores_are_those_of_smaller_batches(
    qwen: ChatModel, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    probes, conditions = [choice(), texts("likelihood")], [Condition.of(Edit("d", direction(qwen)), 1.0)]
    whole = score(qwen, probes, conditions)
    with monkeypatch.context() as patch:
        failures = run_short(qwen, patch, rows=2)
        found = score(qwen, probes, conditions)
        assert failures() > 0
    assert "not enough memory for batches of 4096 tokens: going on with 2048" in capsys.readouterr().err
    assert found.drop("value").equals(whole.drop("value"))
    assert found["value"].to_numpy() == pytest.approx(whole["value"].to_numpy(), abs=1e-4)


def test_samples_are_the_same_in_smaller_batches(
    qwen: ChatModel, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    requests = [Request([5 + n, 6, 7], (f"a{n}", f"b{n}")) for n in range(6)]
    whole = generate.sample(qwen, requests, Sampling(max_new_tokens=5), 0)
    with monkeypatch.context() as patch:
        failures = run_short(qwen, patch, rows=4)
        assert generate.sample(qwen, requests, Sampling(max_new_tokens=5), 0) == whole
        assert failures() > 0
    assert "not enough memory to sample 6 prompts at once: going on with 3" in capsys.readouterr().err


def test_a_fit_in_smaller_batches_is_the_same_fit(
    qwen: ChatModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = train.fit(qwen, pairs(), "pos", SMALL, seed=0, data_seed=0, folder=tmp_path / "whole")
    with monkeypatch.context() as patch:
        real, failures = train._Fit._token_losses, [0]

        def short(self: Any, rows: Any) -> Any:
            found = real(self, rows)  # what a failed attempt has accumulated must not count
            if len(rows) > 2:
                failures[0] += 1
                raise MemoryError
            return found

        patch.setattr(train._Fit, "_token_losses", short)
        found = train.fit(qwen, pairs(), "pos", SMALL, seed=0, data_seed=0, folder=tmp_path / "short")
    assert failures[0] > 0 and "going on with" in capsys.readouterr().err
    assert found.last_loss == pytest.approx(whole.last_loss, abs=1e-4)
    one, other = (pl.read_csv(tmp_path / name / train.LOG_FILE) for name in ("whole", "short"))
    assert one["loss"].drop_nulls().to_list() == pytest.approx(other["loss"].drop_nulls().to_list(), abs=1e-4)


def test_memory_that_is_never_enough_is_one_line(
    tiny_folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def exhausted(*_: object, **__: object) -> None:
        raise SHORT_OF_MEMORY[1]

    monkeypatch.setattr("ws.measure.generate._sample_batch", exhausted)
    assert run("replicate", "--model", tiny_folders["qwen3"], "--out", tmp_path) == 2
    assert "not enough memory" in one_line(capsys)
