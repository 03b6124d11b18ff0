"""The blocks of the documents that docs/update.py writes from stored results."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from ws import models
from ws.pocket import build, card

SCRIPT = Path(__file__).parents[1] / "docs" / "update.py"


@pytest.fixture(scope="module")
def update() -> ModuleType:
    spec = importlib.util.spec_from_file_location("update", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(behaviour: str, by_prompt: float, leak: float = 0.0, **more: Any) -> dict[str, Any]:
    """A stored summary: the direction moves its behaviour by 2 nats at each sign, prompts by `by_prompt`."""
    at = {"-1": {"mean": -2.0, "low": -2.1, "high": -1.9}, "1": {"mean": 2.0, "low": 1.9, "high": 2.1}}
    others = [name for name in ("sycophancy", "honesty", "refusal") if name != behaviour]
    bands = {key: {behaviour: {"low": low, "high": low + 0.1}} for key, low in (("-1", -0.31), ("1", 0.17))}
    return {
        "model": "pocket", "behaviour": behaviour,
        behaviour: {"0": {"mean": 0.5}},
        "change": {behaviour: at},
        "contexts": {f"prompt {sign}": {behaviour: {"mean": 0.5 + factor * by_prompt}}
                     for sign, factor in (("-", -1), ("+", 1))},
        "other_behaviours": {name: {"change": {"-1": {"mean": 0.0}, "1": {"mean": leak}}} for name in others},
        "controls": {"random": bands},
        "side_effects": {key: {"facts": 1.0} for key in ("-1", "0", "1")},
        "warnings": [],
        **more,
    }  # fmt: skip


def test_prompts_stand_beside_weights_at_both_signs(update: ModuleType) -> None:
    text = update.behaviours({"a": run("refusal", 6.0), "b": run("sycophancy", 2.5)})
    assert "| pocket | refusal | -6.00 | +6.00 | -2.00 | +2.00 | 3.00 | 3.00 |" in text
    assert "within a factor 1.5 of that under the weights in 2 of 4 cells" in text
    assert "outside: pocket refusal at -1 (3.00), pocket refusal at +1 (3.00)." in text
    assert "4 of 4 cells." in update.behaviours({"a": run("refusal", 2.9), "b": run("sycophancy", 1.4)})
    assert "0 of 2 cells" in update.behaviours({"a": run("refusal", -2.0)}), "the wrong way is not close"


def test_the_random_band_is_shown_at_both_signs(update: ModuleType) -> None:
    assert "| -0.31 to -0.21 | +0.17 to +0.27 |" in update.behaviours({"a": run("refusal", 2.0)})


def test_bars_that_a_run_misses_are_named(update: ModuleType) -> None:
    good = {"controls": {"random": {key: {"refusal": {"low": -0.1, "high": 0.1}} for key in ("-1", "1")}}}
    assert update.missed_bars(run("refusal", 2.0, **good)) == []
    lost = {"side_effects": {"-1": {"facts": 0.96}, "0": {"facts": 1.0}, "1": {"facts": 0.98}}, "warnings": ["oh"]}
    weak = {"change": {"refusal": {"-1": {"mean": -1.2, "low": 0, "high": 0}, "1": {"mean": 0.9, "low": 0, "high": 0}}}}
    assert update.missed_bars(run("refusal", 2.0, **good | lost | weak)) == [
        "loses 4.0 points of facts at -1",
        "moves 0.90 nats at +1",
    ]
    wrong_way = {"change": {"refusal": {key: {"mean": 2.0, "low": 2.0, "high": 2.0} for key in ("-1", "1")}}}
    assert "moves -2.00 nats at -1" in update.missed_bars(run("refusal", 2.0, **good | wrong_way))
    assert update.missed_bars(run("refusal", 2.0))[0].startswith("has a random band of -0.31")
    said = update.bars_told({"a": run("refusal", 2.0, **good), "b": run("refusal", 2.0, **good | lost)})
    assert "1 of 2 runs reach all of them; short: pocket refusal loses 4.0 points" in said
    assert said.endswith("- pocket refusal: oh")


def test_the_stored_runs_reach_their_bars(update: ModuleType) -> None:
    stored = [json.loads(path.read_text()) for path in update.RESULTS.glob("pocket*-lora-seed0.json")]
    assert len(stored) == len(update.BEHAVIOURS) * len(models.POCKET_MODELS)
    assert {
        f"{one['model']} {one['behaviour']}": update.missed_bars(one) for one in stored if update.missed_bars(one)
    } == {}


def test_only_independent_traits_are_said_to_be_moved_against_the_plan(update: ModuleType) -> None:
    said = update.steered("pocket", {"a": run("sycophancy", 2.0, leak=-1.26)})
    assert "sycophancy at +1 moves refusal by -1.26 nats (63 % of its own +2.00)" in said
    assert "moves honesty" not in said, "that one is planted"
    assert "No LoRA direction" in update.steered("pocket", {"a": run("sycophancy", 2.0, leak=-0.4)})


def test_a_run_without_persona_changes_is_said_to_have_none(update: ModuleType) -> None:
    assert "do not hold" in update.persona_leak({"a": run("refusal", 2.0)})
    changes = {"prompt +": {"refusal": {"mean": 2.5}, "sycophancy": {"mean": -0.125}}}
    text = update.persona_leak({"a": run("refusal", 2.0, persona_changes=changes)})
    assert text.endswith("| pocket | refusal, prompt + | -0.12 | - | **+2.50** |")


@pytest.mark.skipif(
    not all((folder / card.METRICS_FILE).is_file() for folder in models.POCKET_MODELS.values()),
    reason="an embedded model is not built",
)
def test_every_rebuild_has_its_sentence_and_its_table(
    update: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(update, "RESULTS", tmp_path)
    assert update.rebuilds() == "No rebuild has been made."
    metrics = [
        {"metric": "yes/no facts, accuracy", "value": 0.5, "bar": ">= 0.97", "passes": False},
        {"metric": "a new metric", "value": 0.25, "bar": "", "passes": True},
    ]
    for name, folder in models.POCKET_MODELS.items():
        record = build.recorded(folder)
        recipe = record["recipe"] | {"seed": 7} | ({"steps": 1} if name == "pocket-gemma" else {})
        kept = {"recipe": recipe, "minutes": 3.5, "metrics": metrics, "texts": record["corpus"]["texts"]}
        (tmp_path / f"rebuild-{recipe['architecture']}-seed7.json").write_text(json.dumps(kept))
    text = update.rebuilds()
    told = [line for line in text.splitlines() if line.startswith("- ")]
    assert len(told) == len(models.POCKET_MODELS) and text.count("| metric |") == len(told)
    assert all("0 of 1 bars reached; missed: yes/no facts, accuracy (0.500, bar >= 0.97)." in line for line in told)
    (gemma,) = [line for line in told if line.startswith("- pocket-gemma")]
    (qwen,) = [line for line in told if line.startswith("- pocket (")]
    assert "with other steps than" in gemma and "the recipe of the shipped weights" in qwen
    assert text.count("| a new metric | - | 0.250 |") == len(told)
