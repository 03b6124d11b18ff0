"""The blocks of the documents that docs/update.py writes from stored results."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from ws.model import loading
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
    assert len(stored) == len(update.BEHAVIOURS) * len(loading.POCKET_MODELS)
    assert {
        f"{one['model']} {one['behaviour']}": update.missed_bars(one) for one in stored if update.missed_bars(one)
    } == {}


def test_only_independent_traits_are_said_to_be_moved_against_the_plan(update: ModuleType) -> None:
    said = update.steered("pocket", {"a": run("sycophancy", 2.0, leak=-1.26)})
    assert "sycophancy at +1 moves refusal by -1.26 nats (63 % of its own +2.00)" in said
    assert "moves honesty" not in said, "that one is planted"
    assert "No LoRA direction" in update.steered("pocket", {"a": run("sycophancy", 2.0, leak=-0.4)})


def comparison_of(folder: Path, seeds: int, randoms: int, padding: int = 0) -> Path:
    """A finished comparison: its page, its picture, and its numbers."""
    folder.mkdir()
    counts = {"dW:ia3": ("weights", 1), "dW:lora": ("weights", seeds), "random": ("controls", randoms)}
    entries = [
        {"name": name, "kind": kind, "+": {"own": {"seeds": [0.0] * count}}} for name, (kind, count) in counts.items()
    ]
    numbers = {"own_strength": entries, "padding": "x" * padding}
    (folder / "comparison.json").write_text(json.dumps(numbers))
    (folder / "comparison.md").write_text("# title\n\n**It moved.**\n")
    (folder / "pareto.png").write_bytes(b"picture")
    return folder


def test_how_many_replicates_a_comparison_has_is_counted_in_its_numbers(
    update: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = tmp_path / "kept"
    kept.mkdir()
    monkeypatch.setattr(update, "COMPARED", kept)
    update.store(comparison_of(tmp_path / "one", 3, 20))
    assert update.compared(kept) == "On pocket, training seeds: 3, random directions: 20.\n\n> It moved."
    update.store(comparison_of(tmp_path / "two", 1, 12))
    assert update.compared(kept).startswith("On pocket, training seeds: 1, random directions: 12.")
    with pytest.raises(SystemExit, match="too many to keep"):
        update.store(comparison_of(tmp_path / "large", 3, 20, padding=update.LARGEST_KEPT))
    assert "random directions: 12" in update.compared(kept), "nothing of it has been kept"
    (kept / "comparison.json").unlink()
    assert update.compared(kept) == "> It moved.", "no count without numbers"


def test_the_stored_comparison_has_its_controls_and_keeps_its_verdicts(update: ModuleType) -> None:
    place = update.COMPARED / "comparison.json"
    if not place.is_file():
        pytest.skip("the numbers of the comparison are not stored")
    stored = json.loads(place.read_text())
    entries = {entry["name"]: entry for entry in stored["own_strength"]}
    bands = stored["bands"]["own_strength"]
    for sign in ("+", "-"):
        assert len(entries["random"][sign]["own"]["seeds"]) >= 20
        assert len(entries["personas shuffled"][sign]["own"]["seeds"]) >= 5
        families = [entry for entry in entries.values() if entry["kind"] == "weights"]
        assert families
        for entry in families:
            effect, band = entry[sign]["own"], bands[sign]["own"]
            intervals = [one for one in (effect, effect["over_seeds"]) if one is not None]
            is_clear = all(one["low"] > band["high"] or one["high"] < band["low"] for one in intervals)
            assert effect["outside"] is is_clear, f"{entry['name']} {sign}"
    means = [one["mean"] for one in stored["controls"] if one["control"] == "random" and one["probe"] == "own"]
    assert len(means) == 2
    assert all(-0.1 <= mean["low"] <= mean["high"] <= 0.1 for mean in means)


def test_a_run_without_persona_changes_is_said_to_have_none(update: ModuleType) -> None:
    assert "do not hold" in update.persona_leak({"a": run("refusal", 2.0)})
    changes = {"prompt +": {"refusal": {"mean": 2.5}, "sycophancy": {"mean": -0.125}}}
    text = update.persona_leak({"a": run("refusal", 2.0, persona_changes=changes)})
    assert text.endswith("| pocket | refusal, prompt + | -0.12 | - | **+2.50** | - |")


@pytest.mark.skipif(
    not all((folder / card.METRICS_FILE).is_file() for folder in loading.POCKET_MODELS.values()),
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
    for name, folder in loading.POCKET_MODELS.items():
        record = build.recorded(folder)
        recipe = record["recipe"] | {"seed": 7} | ({"steps": 1} if name == "pocket-gemma" else {})
        kept = {"recipe": recipe, "minutes": 3.5, "metrics": metrics, "texts": record["corpus"]["texts"]}
        (tmp_path / f"rebuild-{recipe['architecture']}-seed7.json").write_text(json.dumps(kept))
    text = update.rebuilds()
    told = [line for line in text.splitlines() if line.startswith("- ")]
    assert len(told) == len(loading.POCKET_MODELS) and text.count("| metric |") == len(told)
    assert all("0 of 1 bars reached; missed: yes/no facts, accuracy (0.500, bar >= 0.97)." in line for line in told)
    (gemma,) = [line for line in told if line.startswith("- pocket-gemma")]
    (qwen,) = [line for line in told if line.startswith("- pocket (")]
    assert "with other steps than" in gemma and "the recipe of the shipped weights" in qwen
    assert text.count("| a new metric | - | 0.250 |") == len(told)
