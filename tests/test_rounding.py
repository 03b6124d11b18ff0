"""What half precision does to scores: measured against fp32, recorded, and said where it is too much."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from ws.base.records import plain
from ws.edit.condition import Condition
from ws.fitting.data import Grid
from ws.fitting.run_settings import Settings
from ws.measure import rounding
from ws.measure.probe import Probe, ProbeRow
from ws.measure.rounding import Rounding
from ws.measure.score import score
from ws.model import loading
from ws.model.chat import ask
from ws.model.loading import ChatModel
from ws.runs.replicate import Replication

WORDS = ("bread", "rain", "moss")
PROBE = Probe("words", "choice", tuple(
    ProbeRow(word, tuple(ask(f"Is {word} good?")), "My answer: **") for word in WORDS
))  # fmt: skip


def test_it_is_the_difference_to_the_same_weights_in_fp32(qwen: ChatModel) -> None:
    half = loading.load(qwen.name, dtype="bfloat16")
    widened = loading.load(qwen.name, dtype="bfloat16")
    widened.network.float()
    found = rounding.measure(half, PROBE)
    scores = [score(m, [PROBE], [Condition()]).filter(metric="logratio")["value"].to_numpy() for m in (half, widened)]
    errors = scores[0] - scores[1]
    assert found is not None and found.dtype == "bfloat16" and found.rows == 3
    assert found.mean_shift == pytest.approx(abs(errors.mean()), abs=1e-7) and found.mean_shift > 0
    assert found.p95 == pytest.approx(np.quantile(abs(errors), 0.95), abs=1e-7)
    assert half.network.dtype == loading.torch.bfloat16, "the model itself is left alone"


def test_fp32_needs_no_measurement_and_a_huge_model_gets_none(qwen: ChatModel, monkeypatch: pytest.MonkeyPatch) -> None:
    assert rounding.measure(qwen, PROBE) is None
    monkeypatch.setattr(rounding, "MOST_PARAMETERS", 10)
    assert rounding.measure(loading.load(qwen.name, dtype="bfloat16"), PROBE) is None


def test_both_bounds_must_hold() -> None:
    assert Rounding("bfloat16", 9, 0.01, 0.1).is_small
    assert not Rounding("bfloat16", 9, 0.011, 0.1).is_small and not Rounding("bfloat16", 9, 0.01, 0.11).is_small


def test_a_run_records_it_and_warns(
    tiny_folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(rounding, "LARGEST_P95", 0.0)
    settings = Settings(
        model=str(tiny_folders["qwen3"]), out=tmp_path, dtype="bfloat16", grid=Grid(topics=2, personas=1, samples=2),
        train={"rank": 2, "lora_alpha": 4, "lr": 5e-3}, sampling={"max_new_tokens": 4}, alphas=(-1.0, 0.0, 1.0),
        control_seeds=1, rows=4, samples=1,
    )  # fmt: skip
    with Replication(settings) as run:
        summary = plain(run.report())
        recorded = json.loads((run.folder / "rounding.json").read_text())
    assert summary["rounding"] == recorded and recorded["rows"] > 0 and not recorded["is_small"]
    assert any("--dtype float32 is exact" in warning for warning in summary["warnings"])
    assert "bfloat16 moves log-ratios by" in capsys.readouterr().out
