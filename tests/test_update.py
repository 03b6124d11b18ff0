"""The blocks of the documents that docs/update.py writes from stored results."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import update
from blocks import comparisons, rebuilds, runs
from blocks.alignment import alignment
from blocks.llama_cpp import llama_cpp

from ws.base.records import plain, restore
from ws.comparing import page, planning
from ws.comparing.across import Across
from ws.comparing.findings import KINDS
from ws.model import library
from ws.pocket import build, card
from ws.runs import sweep_tables
from ws.runs.sweep_tables import SweepTables

ARE_BUILT = all((folder / card.METRICS_FILE).is_file() for folder in library.POCKET_MODELS.values())
MADE_FROM_MODELS = ("pocket-card", "gemma-card", "rebuild", "compare", "across")
"""Blocks that also read the files of the embedded models."""


def marked() -> list[Any]:
    """Every block of every document; the support matrix fits many small models."""
    return [
        pytest.param(file, match["name"], match["content"], id=f"{file.name}:{match['name']}",
                     marks=[pytest.mark.slow] if match["name"] == "families" else [])
        for file in update.documents()
        for match in update.MARKED.finditer(file.read_text(encoding="utf-8"))
    ]  # fmt: skip


@pytest.mark.parametrize(("file", "name", "content"), marked())
def test_every_block_is_what_the_stored_results_say(file: Path, name: str, content: str) -> None:
    if name in MADE_FROM_MODELS and not ARE_BUILT:
        pytest.skip("an embedded model is not built")
    assert content == update.block(name), f"{file.name} was changed by hand, or python docs/update.py was not run"


def test_all_markers_of_documents_are_pairs() -> None:
    for file in update.documents():
        text = file.read_text(encoding="utf-8")
        assert text.count("<!-- begin: ") == len(update.MARKED.findall(text)) == text.count("<!-- end: "), file.name


@pytest.mark.parametrize("name", [name for name in update.COMPARED.values() if update.stored_comparison(name)])
def test_the_page_of_a_comparison_is_made_from_its_numbers(name: str) -> None:
    found, place = update.stored_comparison(name), update.place_of_comparison(name)
    assert name.startswith(found.model)
    assert (place / "comparison.md").read_text() == page.markdown(found)
    assert json.loads((place / "comparison.json").read_text()) == page.as_json(found)


def test_blocks_show_the_stored_numbers_and_no_others() -> None:
    """A number that changes in the stored results changes its block."""
    sweep = restore(SweepTables, json.loads(update.SWEEP.read_text()))
    first = sweep.by_family[0]
    other = replace(first, measures={**first.measures, "delta": replace(first.measures["delta"], low=-9.87)})
    assert "[-9.87, " in sweep_tables.markdown(replace(sweep, by_family=(other, *sweep.by_family[1:])))
    across = restore(Across, json.loads(update.ACROSS.read_text()))
    row = across.rows[0]
    moved = replace(row, own={**row.own, "+": replace(row.own["+"], seeds_high=9.87)})
    assert ", +9.87 |" in comparisons.across(replace(across, rows=(moved, *across.rows[1:])))
    found = update.stored_comparison("pocket")
    measured = found.equal_kl[found.headline_budget]
    chosen = measured.entry(found.best["weights"])
    assert chosen is not None
    side = chosen.sides["+"]
    assert side.own.over_seeds is not None
    changed = replace(side, own=replace(side.own, over_seeds=replace(side.own.over_seeds, high=9.87)))
    entry = replace(chosen, sides={**chosen.sides, "+": changed})
    entries = tuple(entry if one.name == chosen.name else one for one in measured.entries)
    tables = {**found.equal_kl, found.headline_budget: replace(measured, entries=entries)}
    other = replace(found, equal_kl=tables)
    assert f"+9.87], over rows and calibration [{side.own.limits}]" in comparisons.compared(other)
    assert "+9.87] r [" in comparisons.winners(other) and "+9.87" not in comparisons.winners(found)


def run(behaviour: str, by_prompt: float, **more: Any) -> dict[str, Any]:
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
        "other_behaviours": {name: {"change": {"-1": {"mean": 0.0}, "1": {"mean": 0.0}}} for name in others},
        "controls": {"random": bands},
        "side_effects": {key: {"facts": 1.0} for key in ("-1", "0", "1")},
        "warnings": [],
        **more,
    }  # fmt: skip


def test_prompts_stand_beside_weights_at_both_signs() -> None:
    text = runs.behaviours({"a": run("refusal", 6.0), "b": run("sycophancy", 2.5)})
    assert "| pocket | refusal | -6.00 | +6.00 | -2.00 | +2.00 | 3.00 | 3.00 |" in text
    assert "within a factor 1.5 of that under the weights in 2 of 4 cells" in text
    assert "outside: pocket refusal at -1 (3.00), pocket refusal at +1 (3.00)." in text
    assert "4 of 4 cells." in runs.behaviours({"a": run("refusal", 2.9), "b": run("sycophancy", 1.4)})
    assert "0 of 2 cells" in runs.behaviours({"a": run("refusal", -2.0)}), "the wrong way is not close"


def test_a_run_with_instruments_is_shown_by_that_of_its_headline() -> None:
    """Random directions are asked only what that instrument asks, so the other one has no bands."""
    replies = {
        "levels": {"0": {"mean": -4.0}},
        "change": {"-1": {"mean": -7.0, "low": -8.0, "high": -6.0}, "1": {"mean": 6.0, "low": 5.0, "high": 7.0}},
        "bands": {"-1": {"low": -0.12, "high": -0.02}, "1": {"low": 0.03, "high": 0.13}},
        "contexts": {"prompt -": {"mean": -18.0}, "prompt +": {"mean": 8.0}},
    }
    parts = {"instruments": {"choice": {}, "replies": replies}, "ability": {"instrument": "replies"}}
    one = run("refusal", 2.0, **parts, controls={"random": {"-1": {}, "1": {}}})
    text = runs.behaviours({"a": one})
    assert "| refusal | -4.00 | -7.00 [-8.00, -6.00] | +6.00 [+5.00, +7.00] | -0.12 to -0.02 | +0.03 to +0.13 |" in text
    assert "| pocket | refusal | -14.00 | +12.00 | -7.00 | +6.00 | 2.00 | 2.00 |" in text
    assert "what the unedited model can answer: pocket refusal: replies." in text
    assert runs.missed_thresholds(one) == [] and "Instruments" not in runs.behaviours({"a": run("refusal", 2.0)})


def test_the_random_band_is_shown_at_both_signs() -> None:
    assert "| -0.31 to -0.21 | +0.17 to +0.27 |" in runs.behaviours({"a": run("refusal", 2.0)})


def test_thresholds_that_a_run_misses_are_named() -> None:
    good = {"controls": {"random": {key: {"refusal": {"low": -0.1, "high": 0.1}} for key in ("-1", "1")}}}
    assert runs.missed_thresholds(run("refusal", 2.0, **good)) == []
    lost = {"side_effects": {"-1": {"facts": 0.96}, "0": {"facts": 1.0}, "1": {"facts": 0.98}}, "warnings": ["oh"]}
    weak = {"change": {"refusal": {"-1": {"mean": -1.2, "low": 0, "high": 0}, "1": {"mean": 0.9, "low": 0, "high": 0}}}}
    assert runs.missed_thresholds(run("refusal", 2.0, **good | lost | weak)) == [
        "loses 4.0 points of facts at -1",
        "moves 0.90 nats at +1",
    ]
    wrong_way = {"change": {"refusal": {key: {"mean": 2.0, "low": 2.0, "high": 2.0} for key in ("-1", "1")}}}
    assert "moves -2.00 nats at -1" in runs.missed_thresholds(run("refusal", 2.0, **good | wrong_way))
    assert runs.missed_thresholds(run("refusal", 2.0))[0].startswith("has a random band of -0.31")
    said = runs.thresholds_told({"a": run("refusal", 2.0, **good), "b": run("refusal", 2.0, **good | lost)})
    assert "1 of 2 runs pass all of them; short: pocket refusal loses 4.0 points" in said
    assert said.endswith("- pocket refusal: oh")


def test_the_stored_runs_pass_their_thresholds() -> None:
    stored = [json.loads(path.read_text()) for path in update.RESULTS.glob("pocket*-lora-seed0.json")]
    assert len(stored) == len(runs.BEHAVIOURS) * len(library.POCKET_MODELS)
    assert {
        f"{one['model']} {one['behaviour']}": runs.missed_thresholds(one)
        for one in stored
        if runs.missed_thresholds(one)
    } == {}


def leaking(to_refusal: float, to_honesty: float = 2.0) -> dict[str, dict[str, Any]]:
    """The stored sycophancy run on pocket with known effects: 2 nats on its own probe at each sign, and on others."""
    found = update.stored_runs()[update.FIRST]

    def at(plus: float) -> dict[str, Any]:
        return {key: {"mean": mean, "low": mean, "high": mean, "n": 9} for key, mean in (("-1", -plus), ("1", plus))}

    found["change"]["sycophancy"] = at(2.0)
    found["other_behaviours"]["refusal"]["change"] = at(to_refusal)
    found["other_behaviours"]["honesty"]["change"] = at(to_honesty)
    return {update.FIRST: found}


def test_only_independent_traits_are_said_to_be_moved_against_the_plan() -> None:
    said = runs.steered("pocket", leaking(to_refusal=-1.26))
    assert "sycophancy at +1 moves refusal by -1.26 nats (63 % of its own +2.00)" in said
    assert "moves honesty" not in said, "that one is planted"
    assert "No LoRA direction" in runs.steered("pocket", leaking(to_refusal=-0.4))


def comparison_of(folder: Path, seeds: int, randoms: int, padding: int = 0) -> Path:
    """A finished comparison: its picture, and the stored numbers with other counts of replicates."""
    folder.mkdir()
    found = update.stored_comparison("pocket")
    measured = found.equal_kl[found.headline_budget]
    reference = measured.entry(found.reference)
    control = next(one for one in measured.controls if one.of == found.reference)
    assert reference is not None
    entry = replace(reference, sides={
        sign: replace(side, own=replace(side.own, seeds=(0.0,) * seeds)) for sign, side in reference.sides.items()
    })  # fmt: skip
    drawn = replace(control, effects={
        sign: {probe: replace(effect, seeds=(0.0,) * randoms) for probe, effect in effects.items()}
        for sign, effects in control.effects.items()
    })  # fmt: skip
    small = replace(measured, entries=(entry,), controls=(drawn,))
    changed = replace(found, own_strength=small, equal_kl=dict.fromkeys(found.equal_kl, small), best={},
                      dilemmas="x" * padding or "own")  # fmt: skip
    (folder / "comparison.json").write_text(json.dumps(page.as_json(changed)))
    (folder / "pareto.png").write_bytes(b"picture")
    return folder


def test_how_many_replicates_a_comparison_has_is_counted_in_its_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second, large = (
        comparison_of(tmp_path / name, *counts)
        for name, counts in {"1": (3, 20), "2": (1, 12), "3": (3, 20, update.LARGEST_KEPT)}.items()
    )
    monkeypatch.setattr(update, "RESULTS", tmp_path)
    kept = update.place_of_comparison("pocket")
    update.store(first)
    text = comparisons.compared(update.stored_comparison("pocket"))
    assert text.startswith(
        "On pocket, runs per weight direction: 3, random controls per method: 20.\n\n> Sycophancy, change"
    )
    update.store(second)
    told = "On pocket, runs per weight direction: 1, random controls per method: 12."
    assert comparisons.replicates_told(update.stored_comparison("pocket")) == told
    with pytest.raises(SystemExit, match="too many to keep"):
        update.store(large)
    assert comparisons.replicates_told(update.stored_comparison("pocket")) == told, "nothing of it has been kept"
    assert (kept / "comparison.md").read_text() == page.markdown(update.stored_comparison("pocket"))
    assert (kept / "pareto.png").read_bytes() == b"picture"


def test_a_comparison_of_some_kinds_does_not_replace_that_of_all() -> None:
    found = update.stored_comparison("pocket")
    assert update.name_of_comparison(found) == "pocket" and set(found.best) == set(KINDS)
    some = replace(found, best={kind: found.best[kind] for kind in ("weights", "activations")})
    assert update.name_of_comparison(some) == "pocket-activations"


def test_the_stored_comparison_has_its_controls_and_keeps_its_verdicts() -> None:
    """Every weight direction has ten random controls of its own at the same KL, and its verdict is theirs."""
    found = update.stored_comparison("pocket")
    for budget, measured in found.equal_kl.items():
        controls = {one.of: one for one in measured.controls}
        for entry in (one for one in measured.entries if one.kind in ("weights", "variants")):
            assert len(next(iter(entry.sides.values())).own.seeds) >= 3
            control = controls[entry.name]
            assert len(control.effects["+"]["own"].seeds) >= 10
            assert abs(control.p95["+"] - float(budget)) <= 0.1 * float(budget) + 0.01
            for sign, side in entry.sides.items():
                band = control.band(sign, "own")
                assert band is not None and side.own.band == band
                is_clear = all(one.low > band.high or one.high < band.low for one in side.own.intervals)
                assert side.own.outside is is_clear, f"{entry.name} {sign}"


def test_measures_are_stored_by_behaviour_and_without_the_folder_of_their_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(update, "REAL", tmp_path / "kept")
    run = tmp_path / "smollm2" / "honesty" / "lora" / "seed0"
    run.mkdir(parents=True)
    record = {"probe": "truthfulqa", "data": {"source": str(tmp_path / "TruthfulQA.csv"), "kept": 3}}
    (run / "measures-truthfulqa.json").write_text(json.dumps(record))
    update.store(run / "measures-truthfulqa.json")
    stored = json.loads((tmp_path / "kept" / "data-honesty-truthfulqa.json").read_text())
    assert stored == {"probe": "truthfulqa", "data": {"source": "TruthfulQA.csv", "kept": 3}}


def test_no_stored_result_names_a_folder_of_a_machine() -> None:
    for file in (path for path in update.RESULTS.rglob("*") if path.suffix in (".json", ".jsonl", ".md")):
        found = re.search(r"[\"'( ](/[\w.-]+){2,}", file.read_text(encoding="utf-8"))
        assert found is None, f"{file.name}: {found and found[0]}"


def test_a_plan_without_an_earlier_comparison_takes_the_spreads_of_the_published_one() -> None:
    measured = planning.spread_of(update.place_of_comparison("pocket") / "comparison.json")
    assert (round(measured.rows, 2), round(measured.seeds, 2)) == (planning.TYPICAL.rows, planning.TYPICAL.seeds)


def test_sweeps_and_tables_over_comparisons_are_stored_as_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep, across = (json.loads(path.read_text()) for path in (update.SWEEP, update.ACROSS))
    (tmp_path / "sweep.json").write_text(json.dumps(sweep))
    (tmp_path / "comparisons.json").write_text(json.dumps(across))
    monkeypatch.setattr(update, "SWEEP", tmp_path / "kept" / "sweep.json")
    monkeypatch.setattr(update, "ACROSS", tmp_path / "kept" / "comparisons.json")
    update.store(tmp_path)
    update.store(tmp_path / "comparisons.json")
    assert json.loads(update.SWEEP.read_text()) == sweep and json.loads(update.ACROSS.read_text()) == across
    assert plain(restore(Across, across)) == across


def test_alignments_are_stored_by_run_and_shown_beside_what_random_directions_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(update, "ALIGNMENT", tmp_path / "kept" / "alignment.json")
    assert alignment(update.stored_alignment()) == "No alignment has been stored."
    header = ("name,layer,kind,shape,norm,k,r,energy_top,null_top,ratio_top,energy_bottom,null_bottom,ratio_bottom,"
              "energy_weak,null_weak,ratio_weak\n")  # fmt: skip
    rows = ("a,3,q,4x4,1.0,1,4,0.125,0.01,12.5,0.5,0.81,0.6,,,\n"
            "b,4,q,4x4,1.0,1,4,0.375,0.01,37.5,0.7,0.81,0.9,,,\n"
            "c,3,o,4x4,1.0,1,4,0.2,0.01,20,0.6,0.81,0.7,0.03,0.01,3\n")  # fmt: skip
    for seed in (1, 0):
        folder = tmp_path / f"seed{seed}"
        folder.mkdir()
        (folder / "subspace_per_layer.csv").write_text(header + rows)
        summary = {"model": "pocket", "behaviour": "refusal", "adapter": "lora", "seed": seed}
        (folder / "summary.json").write_text(json.dumps(summary))
        update.store(folder / "subspace_per_layer.csv")
    lines = alignment(update.stored_alignment()).splitlines()
    assert lines[2:6] == [
        f"| pocket-refusal-lora-seed{seed} | {cells} |"
        for seed in (0, 1)
        for cells in (
            "q | 2 | 25.00 % (1.00 %) | 60.00 % (81.00 %) | -",
            "o | 1 | 20.00 % (1.00 %) | 60.00 % (81.00 %) | 3.00 % (1.00 %)",
        )
    ]


def test_agreement_with_llama_cpp_is_shown_beside_that_of_the_base_alone() -> None:
    assert llama_cpp([]) == "Not measured yet."
    row = {"model": "m", "base": "F16", "same_tokens": 1.0, "positions": 12, "lead": 0.0}
    text = llama_cpp([
        {**row, "scale": 0.0, "gap": 0.25, "kl": 0.004, "effect": 0.0, "same": 1.0},
        {**row, "scale": -1.0, "gap": 0.5, "kl": 0.005, "effect": 0.125, "same": 0.75, "lead": 0.31},
        {**row, "scale": 1.0, "gap": 0.125, "kl": 0.003, "effect": 0.25, "same": 1.0, "same_tokens": 0.5},
    ])  # fmt: skip
    assert "| m | F16 | -1 | 12 | 0.125 | 0.005 | 0.5 | 75 % | 0.31 |" in text
    assert "- m, F16: largest gap 0.5 with the LoRA and 0.2 without; KL at most 0.005 and 0.004." in text
    assert "split 50 % of" in text


def test_a_run_without_persona_changes_is_said_to_have_none() -> None:
    assert "do not hold" in runs.persona_leak({"a": run("refusal", 2.0)})
    changes = {"prompt +": {"refusal": {"mean": 2.5}, "sycophancy": {"mean": -0.125}}}
    text = runs.persona_leak({"a": run("refusal", 2.0, persona_changes=changes)})
    assert text.endswith("| pocket | refusal, prompt + | -0.12 | - | **+2.50** | - |")


@pytest.mark.skipif(not ARE_BUILT, reason="an embedded model is not built")
def test_every_rebuild_has_its_sentence_and_its_table() -> None:
    assert rebuilds.rebuilds([]) == "No rebuild has been made."
    metrics = [
        {"metric": "yes/no facts, accuracy", "value": 0.5, "bar": ">= 0.97", "passes": False},
        {"metric": "a new metric", "value": 0.25, "bar": "", "passes": True},
    ]
    kept = []
    for name, folder in library.POCKET_MODELS.items():
        record = build.recorded(folder)
        recipe = record["recipe"] | {"seed": 7} | ({"steps": 1} if name == "pocket-gemma" else {})
        kept.append({"recipe": recipe, "minutes": 3.5, "metrics": metrics, "texts": record["corpus"]["texts"]})
    text = rebuilds.rebuilds(kept)
    told = [line for line in text.splitlines() if line.startswith("- ")]
    assert len(told) == len(library.POCKET_MODELS) and text.count("| metric |") == len(told)
    assert all(
        "0 of 1 thresholds passed; missed: yes/no facts, accuracy (0.500, threshold >= 0.97)." in line for line in told
    )
    (gemma,) = [line for line in told if line.startswith("- pocket-gemma")]
    (qwen,) = [line for line in told if line.startswith("- pocket (")]
    assert "a recipe that differs in steps" in gemma and "the recipe of the shipped weights" in qwen
    assert text.count("| a new metric | - | 0.250 |") == len(told)
