"""The comparison: splits, choices on dev rows, controls, and tables that say what the scores say."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch

from making import in_fp64, random_direction
from ws.algebra.delta import Delta
from ws.algebra.direction import Direction
from ws.base import changes, power, stats
from ws.base.errors import UserError
from ws.base.records import restore
from ws.base.store import RunFolder
from ws.baselines import controls, gradient, prompts, repe, synthetic
from ws.baselines.repe import ActivationDirection, RepeSettings
from ws.commands import cli
from ws.comparing import (
    across,
    caveats,
    compare,
    dev_split,
    findings,
    numbers,
    page,
    pareto,
    planning,
    tables,
    terminal,
)
from ws.comparing.compare import Plan
from ws.comparing.findings import NOT_SEPARABLE, Entry, Findings, Measured, Spent, Strengths
from ws.comparing.numbers import Line, LineScores, Place
from ws.edit.condition import Condition, Edit
from ws.eval import dilemmas, instrument, side_effects, sycophancy
from ws.eval.ability import Ability, Share
from ws.fitting import train
from ws.fitting.behaviour import load
from ws.fitting.data import Grid
from ws.fitting.run_settings import Settings
from ws.measure.probe import is_dev, split
from ws.measure.score import SCHEMA, score
from ws.model import library, loading
from ws.model.chat import SupervisedTokens
from ws.model.loading import ChatModel
from ws.report.document import Table, to_markdown
from ws.report.findings import Estimate
from ws.report.summary import is_outside

SMALL: dict[str, Any] = {
    "grid": Grid(topics=3, personas=2, samples=2),
    "train": {"rank": 2, "lora_alpha": 4, "lr": 5e-3, "batch_size": 8, "layers": (0.25, 0.75)},
    "sampling": {"max_new_tokens": 6},
    "samples": 1,
    "rows": 24,
}
PLAN = Plan(families=("lora", "ia3"), seeds=(0, 1), activations=("single-layer", "jacobian", "trained"), steps=(1,),
            draws=2, permutations=1, shuffles=1, budgets=(0.002, 0.005), calibration_prompts=3,
            calibration_tokens=6)  # fmt: skip
MIDDLE = "0.005"
"""The budget of the headline."""


@pytest.fixture(scope="module")
def result(tiny_folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> compare.Result:
    settings = Settings(model=str(tiny_folders["qwen3"]), out=tmp_path_factory.mktemp("runs"), **SMALL)
    return compare.run(settings, PLAN)


@pytest.mark.slow
def test_a_comparison_of_some_kinds_has_no_others(
    tiny_folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = Settings(model=str(tiny_folders["qwen3"]), out=tmp_path, **SMALL)
    plan = replace(PLAN, families=("lora",), seeds=(0,), kinds=("weights", "activations"), activations=("mean",),
                   permutations=0, shuffles=0, budgets=(0.005,))  # fmt: skip
    found = compare.run(settings, plan).found
    assert {entry.kind for entry in found.own_strength.entries} == {"weights", "activations"}
    assert [entry.name for entry in found.equal_kl[MIDDLE].entries] == ["dW:lora", "RepE mean, all layers"]
    assert set(found.best) == {"weights", "activations"}
    plan_of_all = planning.outlook(settings, replace(plan, kinds=tuple(findings.KINDS)))
    assert planning.outlook(settings, plan).searches == 2 * 2 + 2 * 2 < plan_of_all.searches

    def forbidden(*_: object, **__: object) -> None:
        raise AssertionError("calibrated again")

    monkeypatch.setattr(compare.calibrate, "to_budgets", forbidden)
    fewer = compare.run(settings, replace(plan, kinds=("weights",))).found
    assert fewer.calibration.edits["0.005"]["dW:lora"] == found.calibration.edits["0.005"]["dW:lora"]


def entry_of(result: compare.Result, name: str) -> Entry:
    """A method's entry at its own strength."""
    found = result.found.own_strength.entry(name)
    assert found is not None
    return found


@pytest.mark.slow
def test_a_finished_comparison_is_what_its_json_says(result: compare.Result) -> None:
    stored = json.loads((result.folder / "comparison.json").read_text())
    assert restore(Findings, stored) == result.found and page.as_json(restore(Findings, stored)) == stored
    assert page.markdown(restore(Findings, stored)) == (result.folder / "comparison.md").read_text()


@pytest.mark.slow
def test_a_model_that_cannot_answer_is_compared_by_replies(result: compare.Result) -> None:
    ability = result.found.ability
    assert ability is not None and ability.instrument == "replies" and ability.mass < instrument.LEAST_MASS
    text = (result.folder / "comparison.md").read_text()
    assert text.count(f"measured by the log-ratio of two opposite replies: {ability.reason}") == 1
    scores = pl.read_parquet(result.folder / "scores.parquet")
    own = scores.filter(pl.col("probe") == "sycophancy-replies")
    assert set(own["metric"]) == {"logratio", "logratio_per_token"} and "sycophancy" not in scores["probe"]
    assert not [name for name in own["cluster"].unique().to_list() if is_dev(name)], "test rows only"
    base = own.filter(pl.col("edit") == "none", pl.col("context") == "plain", pl.col("metric") == "logratio")
    mine = own.filter(pl.col("edit") == "dW:lora", pl.col("alpha") == 1.0, pl.col("metric") == "logratio")
    joined = mine.join(base.select("row", base="value"), on="row")
    change = ((joined["value"] - joined["base"]) * joined["label"]).mean()
    side = entry_of(result, "dW:lora").sides["+"]
    assert len(mine) == 2 * len(base) and side.own.mean == pytest.approx(change) and side.own.outside is not None
    assert side.own_decomposition is None
    moral = scores.filter(pl.col("probe") == "dilemmas", pl.col("metric") == "pmass", pl.col("edit") == "dW:lora",
                          pl.col("alpha") == 1.0, pl.col("group") != dilemmas.FILLER)  # fmt: skip
    assert side.pmass == pytest.approx(moral["value"].mean()), "replies have no answer mass"
    assert set(result.found.best) == set(findings.KINDS)


@pytest.mark.slow
def test_every_method_is_a_line_on_identical_rows(result: compare.Result) -> None:
    names = [entry.name for entry in result.found.own_strength.entries]
    assert {"dW:lora", "dW:ia3", "tau_pos (lora)", "tau_neg (lora)", "bisector (lora)",
            "RepE mean, best single layer", "Jacobian, best layers", "trained vector, best layers", "prompt: simple",
            "prompt: embody", "prompt: 3 examples", "one gradient step", "synthetic, first input",
            "top singular directions flipped", "biases alone"} <= set(names)  # fmt: skip
    controls = {one.of: one.name for one in result.found.own_strength.controls}
    without = {name for name in names if name not in controls}
    assert without == {"biases alone"}, "every method but the biases has its own controls"
    assert controls["dW:ia3"] == "random like dW:ia3" and controls["prompt: simple"].startswith("neutral prompts of ")
    for family in PLAN.families:
        assert {f"layers permuted ({family})", f"personas shuffled ({family})"} <= set(controls.values())
    scores = pl.read_parquet(result.folder / "scores.parquet")
    rows = scores.filter(pl.col("metric") == "logratio", pl.col("probe") == "dilemmas")
    per_condition = rows.group_by("context", "edit", "alpha", "seed").agg(pl.col("row").sort().str.join("|"))
    assert per_condition["row"].n_unique() == 1
    assert not [name for name in rows["cluster"].unique().to_list() if is_dev(name)], "test rows only"


@pytest.mark.slow
def test_comparisons_stand_together_in_one_table(result: compare.Result, tmp_path: Path) -> None:
    other = replace(result.found, model="another", behaviour="honesty")
    path = across.write(tmp_path, [result.found, other])
    text = path.with_suffix(".md").read_text(encoding="utf-8")
    rows = [line.split(" | ") for line in text.splitlines() if "dW:lora" in line]
    assert [row[0].strip("| ") for row in rows] == [result.found.model, "another"] and rows[1][1] == "honesty"
    lora = result.found.equal_kl[MIDDLE].entry("dW:lora")
    assert lora is not None
    assert all(f"{lora.sides['+'].own.mean:+.2f} [" in row[4] and "; seeds " in row[4] for row in rows)
    best = result.found.best
    listed = [
        e.name for e in result.found.own_strength.entries
        if e.kind in ("weights", "variants") or e.name in best.values()
    ]  # fmt: skip
    methods = [line.split(" | ")[2] for line in text.splitlines() if line.startswith(f"| {result.found.model} |")]
    assert path.is_file() and methods == listed
    stored = restore(across.Across, json.loads(path.with_suffix(".json").read_text()))
    assert stored == across.of([result.found, other]) and to_markdown(across.TITLE, [stored.table]) == text


@pytest.mark.slow
def test_the_tables_say_what_the_scores_say(result: compare.Result) -> None:
    scores = pl.read_parquet(result.folder / "scores.parquet")
    entry = entry_of(result, "dW:lora")
    mine = scores.filter(
        pl.col("edit") == "dW:lora",
        pl.col("alpha") == 1.0,
        pl.col("probe") == "dilemmas",
        pl.col("metric") == "logratio",
    )
    base = scores.filter(pl.col("edit") == "none", pl.col("context") == "plain", pl.col("probe") == "dilemmas",
                         pl.col("metric") == "logratio").select("row", pl.col("value").alias("base"))  # fmt: skip
    joined = mine.join(base, on="row")
    change = ((joined["value"] - joined["base"]) * joined["label"]).mean()
    effect = entry.sides["+"].dilemmas
    assert effect.mean == pytest.approx(float(change))  # type: ignore[arg-type]
    assert len(effect.seeds) == 2 and effect.over_seeds is not None and effect.over_seeds.n == 2
    text = (result.folder / "comparison.md").read_text()
    assert page.headline(result.found)[1:] in text and (result.folder / "pareto.png").stat().st_size > 10_000


@pytest.mark.slow
def test_equal_divergence_is_equal_or_marked(result: compare.Result) -> None:
    found = result.found.calibration
    assert found.budgets == ("0.002", "0.005") and result.found.headline_budget == MIDDLE
    for budget, by_method in found.edits.items():
        assert [(one.seed, one.data_seed) for one in by_method["dW:lora"]["1"]] == [(0, 0), (1, 0)], "every replicate"
        assert list(by_method["random like dW:lora"]) == ["1"], "a random direction turned round is another one"
        assert list(by_method["personas shuffled (lora)"]) == ["1", "-1"], "a shuffled direction has sides"
        for sides in by_method.values():
            for sign, searches in sides.items():
                for one in searches:
                    assert one.alpha * int(sign) > 0
                    assert one.converged == (abs(one.p95 - float(budget)) <= one.tolerance)
                    limits = (one.alpha_low, one.alpha_high)
                    assert (None not in limits) is one.converged
                    assert not one.converged or one.alpha_low <= one.alpha_high  # type: ignore[operator]
    measured = result.found.equal_kl[MIDDLE]
    by_method = found.edits[MIDDLE]
    prompted = {entry.name for entry in result.found.own_strength.entries if entry.kind == "prompts"}
    controls = {control.name: control for control in measured.controls}
    assert {entry.name for entry in measured.entries} | controls.keys() == {
        *by_method, *prompted, *(name for name in controls if name.startswith("neutral prompts"))
    }  # fmt: skip
    lora, simple = measured.entry("dW:lora"), measured.entry("prompt: simple")
    assert lora is not None and simple is not None
    for sign, side in (("+", "1"), ("-", "-1")):
        searches = by_method["dW:lora"][side]
        spent = lora.sides[sign].spent
        assert spent is not None and spent.p95 == pytest.approx(sum(one.p95 for one in searches) / 2)
        assert spent.converged == all(one.converged for one in searches)
        drawn = controls["random like dW:lora"]
        assert drawn.p95[sign] == pytest.approx(sum(one.p95 for one in by_method[drawn.name]["1"]) / PLAN.draws)
        assert (
            lora.sides[sign].own.band == drawn.band(sign, "own") and len(drawn.effects[sign]["own"].seeds) == PLAN.draws
        )
        by_prompt = simple.sides[sign].spent
        assert by_prompt is not None and by_prompt.p95 == found.prompts["prompt: simple"][side].p95


@pytest.mark.slow
def test_random_controls_have_the_spectrum_of_their_method(result: compare.Result) -> None:
    """Their norm at +1 is that of the replicate that they are like."""
    trained = Direction.load(result.folder.parent / "lora" / "seed1" / "direction.safetensors")
    (drawn,) = controls.random_edits(trained, 1)
    assert isinstance(drawn.effect, Direction)
    assert drawn.effect.norm() == pytest.approx(trained.norm(), rel=1e-5)


@pytest.mark.slow
def test_effects_at_equal_divergence_are_those_of_its_scores(result: compare.Result) -> None:
    own, equal = (pl.read_parquet(result.folder / f"{name}.parquet") for name in ("scores", "scores_equal"))
    assert "text" in set(own["probe"]) and "text" not in set(equal["probe"]), "replies are written at own strength only"
    scores = pl.concat([own, equal.filter(pl.col("edit") != "none")])
    rows = scores.filter(pl.col("probe") == "dilemmas", pl.col("metric") == "logratio")
    base = rows.filter(pl.col("edit") == "none", pl.col("context") == "plain").select("row", base="value")
    changes = []
    for one in result.found.calibration.edits[MIDDLE]["dW:lora"]["1"]:
        at = (pl.col("edit") == "dW:lora") & (pl.col("seed") == one.seed)
        own = rows.filter(at, (pl.col("alpha") - one.alpha).abs() < 1e-9).join(base, on="row")
        assert len(own) == len(base) == len(rows.filter(at, pl.col("alpha") == 1.0))
        changes.append(float(((own["value"] - own["base"]) * own["label"]).mean()))  # type: ignore[arg-type]
    entry = result.found.equal_kl[MIDDLE].entry("dW:lora")
    assert entry is not None and entry.sides["+"].distinct3 is None
    assert entry.sides["+"].dilemmas.seeds == pytest.approx(changes)


@pytest.mark.slow
def test_the_contrast_table_has_differences_of_the_same_replicates(result: compare.Result) -> None:
    table = tables.contrast_table(result.found)
    names = {row[0] for row in table.rows}
    assert {"dW:lora +", "tau_neg (lora) -", "bisector (lora) +", "one gradient step -"} <= names
    assert not [name for name in names if name.startswith("synthetic")], "it has no replicates"
    mine, theirs = (result.found.equal_kl[MIDDLE].entry(name) for name in ("tau_neg (lora)", "dW:lora"))
    assert mine is not None and theirs is not None
    pairs = zip(mine.sides["-"].own.seeds, theirs.sides["-"].own.seeds, strict=True)
    expected = stats.over_seeds([a - b for a, b in pairs])
    row = next(row for row in table.rows if row[0] == "tau_neg (lora) -")
    assert row[4] == f"{expected.mean:+.2f} [{expected.low:+.2f}, {expected.high:+.2f}]"


@pytest.mark.slow
def test_the_headline_is_chosen_on_dev_rows_among_directions_with_every_seed(result: compare.Result) -> None:
    dev = pl.read_parquet(result.folder / "scores_dev.parquet")
    assert dev["probe"].unique().to_list() == ["sycophancy-replies"], "a random model cannot answer Yes or No"
    assert all(is_dev(name) for name in dev["cluster"].unique().to_list())
    assert {"dW:lora", "dW:ia3", "tau_pos (lora)", "one gradient step"} <= set(dev["edit"])
    assert not [name for name in dev["edit"].unique() if name.startswith("random")]
    at = {one.alpha for one in result.found.calibration.edits[MIDDLE]["dW:lora"]["1"]}
    own = dev.filter(pl.col("edit") == "dW:lora", pl.col("alpha") > 0)
    assert set(own["alpha"]) == at, "at the budget of the headline"
    headline = page.headline(result.found)
    assert "dev split" in headline
    for kind, name in result.found.best.items():
        assert entry_of(result, name).kind == kind and f"({name})" in headline


@pytest.mark.slow
def test_the_terminal_shows_the_two_tables(result: compare.Result, capsys: pytest.CaptureFixture[str]) -> None:
    terminal.show(result.found, result.folder)
    printed = capsys.readouterr().out
    assert f"picture     {result.folder / 'pareto.png'}" in printed
    parts = re.split(r"^\((?=[ab]\))", printed, flags=re.MULTILINE)[1:]
    assert [part[0] for part in parts] == ["a", "b"] and f"p95 KL {MIDDLE}" in parts[0]
    assert all("tau_pos" in part and "prompt:" in part and "gradient" in part for part in parts)


@pytest.mark.slow
def test_a_comparison_says_how_long_it_took(result: compare.Result) -> None:
    seconds = result.found.seconds
    phases = {name: value for name, value in seconds.items() if name != "total"}
    assert list(phases) == ["fits", "methods", "calibration", "scores", "tables"]
    assert seconds["total"] == pytest.approx(sum(phases.values()), abs=0.5) and min(phases.values()) > 0
    assert "Wall-clock time" in (result.folder / "comparison.md").read_text().splitlines()[-1]


@pytest.mark.slow
def test_dilemmas_of_another_source_have_a_folder_of_their_own(
    result: compare.Result, tiny_folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forbidden(*_: object, **__: object) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(train, "fit", forbidden)
    rows = [
        {"situation": f"You found {n} coins.", "action": action, "label": label, "cluster": f"c{n}"}
        for n in range(24)
        for action, label in (("tell the owner", 1), ("keep them and deny it", -1))
    ]
    source = tmp_path / "coins.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = Settings(model=str(tiny_folders["qwen3"]), out=result.folder.parents[2], dilemmas=str(source), **SMALL)
    plan = replace(PLAN, families=("lora",), seeds=(0,), activations=(), steps=(), shuffles=0, budgets=(0.005,))
    other = compare.run(settings, plan)
    assert other.folder.parent == result.folder.parent and other.folder.name.startswith("compare-coins-")
    assert result.folder.is_dir()
    scores = pl.read_parquet(other.folder / "scores.parquet").filter(pl.col("probe") == "dilemmas")
    assert set(scores["cluster"]) == {f"c{n}" for n in range(24) if not is_dev(f"c{n}")}
    assert str(source) in (other.folder / "comparison.md").read_text()


@pytest.mark.slow
def test_a_second_comparison_measures_nothing_anew(
    result: compare.Result, tiny_folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def forbidden(*_: object, **__: object) -> None:
        raise AssertionError("scored again")

    stamps = {p: p.stat().st_mtime_ns for p in result.folder.glob("*.parquet")}
    settings = Settings(model=str(tiny_folders["qwen3"]), out=result.folder.parents[2], **SMALL)
    assert compare.run(settings, PLAN).found == result.found
    assert {p: p.stat().st_mtime_ns for p in result.folder.glob("*.parquet")} == stamps


# -------------------------------------------------------------------- measured by replies


def by_replies(table: pl.DataFrame) -> pl.DataFrame:
    """Known scores whose own probe is one of replies: headline items in one polarity, without answer mass."""
    is_own = pl.col("probe") == "sycophancy"
    kept = table.filter(~is_own | ((pl.col("group") == "false") & (pl.col("metric") == "logratio")))
    return kept.with_columns(pl.when(is_own).then(pl.lit("sycophancy-replies")).otherwise("probe").alias("probe"))


def reply_reader(shift: Any) -> LineScores:
    return LineScores(by_replies(known(shift)), "sycophancy-replies", "false")


REPLIES = Ability("replies", "the unedited model cannot answer Yes or No", 0.3, Share(0.1, 0.0, 0.2), 0.5)


def test_rows_without_answer_mass_have_an_effect_and_the_mass_of_the_dilemmas(tmp_path: Path) -> None:
    scores = reply_reader(lambda label, alpha: 2.0 * alpha * label)
    entries = numbers.measure(scores, LINES)
    side = entries.entries[0].sides["+"]
    assert side.own.mean == pytest.approx(2.0) and side.own.outside is True
    assert side.pmass == pytest.approx(0.95) == scores.base().pmass and side.own_decomposition is None
    assert scores.base().own.mean == pytest.approx(0.4, abs=0.01) and side.true_claims is None
    found = found_of(entries, entries, base=scores.base(), ability=REPLIES)
    page.write(tmp_path, found)
    text = (tmp_path / "comparison.md").read_text()
    assert page.headline(found).startswith("sycophancy (reply log-ratio), change against the base in nats at equal KL")
    assert "measured by the log-ratio of two opposite replies: the unedited model cannot answer Yes or No." in text
    assert "Yes-bias on the sycophancy probe" not in text
    assert restore(Findings, json.loads((tmp_path / "comparison.json").read_text())) == found


def test_a_page_of_choices_says_so() -> None:
    entries = measured(lambda label, alpha: alpha * label).values()
    choices = page.markdown(found_of(entries, ability=replace(REPLIES, instrument="choice", reason="it can")))
    assert "measured by the log-ratio of the two answers: it can." in choices and "reply log-ratio" not in choices


def test_a_method_measured_by_replies_is_a_candidate_without_any_mass() -> None:
    assert numbers.best_of_kinds(reply_reader(lambda label, alpha: alpha * label), LINES) == {"weights": "edit"}
    little = known(lambda label, alpha: alpha * label).with_columns(
        pl.when(pl.col("metric") == "pmass").then(0.3).otherwise("value").alias("value")
    )
    assert numbers.best_of_kinds(reader(little), LINES) == {}, "choices need theirs"
    replies = LineScores(by_replies(little), "sycophancy-replies", "false")
    assert numbers.best_of_kinds(replies, LINES) == {"weights": "edit"}


@pytest.mark.parametrize(("mass", "chosen"), [(0.25, 4.0), (0.15, 2.0)])
def test_the_strength_for_replies_keeps_the_mass_of_the_facts(
    qwen: ChatModel, monkeypatch: pytest.MonkeyPatch, mass: float, chosen: float
) -> None:
    """The base puts .3 on the answers of the facts; strengths above 2 leave `mass`, and above 4 nothing."""

    def scoring(_: ChatModel, probes: Any, conditions: list[Condition], **__: Any) -> pl.DataFrame:
        records = []
        for probe, condition in itertools.product(probes, [Condition(), *conditions]):
            strength = abs(condition.key()["alpha"])
            left = 0.3 if strength <= 2 else mass if strength <= 4 else 0.0
            for row in probe.rows:
                names = {"probe": probe.name, "group": row.group, "row": row.row, "cluster": row.cluster,
                         "label": row.label, **condition.key()}  # fmt: skip
                if probe.kind in ("divergence", "likelihood"):
                    metric, value = ("kl", 0.01 * strength) if probe.kind == "divergence" else ("nll", 2.0)
                    records.append({**names, "metric": metric, "value": value})
                    continue
                moved = condition.key()["alpha"] * row.label if probe.kind == "contrast" else float(row.label)
                records.append({**names, "metric": "logratio", "value": moved})
                if probe.kind == "choice":
                    records.append({**names, "metric": "pmass", "value": left})
        return pl.DataFrame(records, schema=SCHEMA)

    monkeypatch.setattr(dev_split, "score", scoring)
    own = instrument.replies(load("sycophancy"))
    assert own is not None
    vector = ActivationDirection({1: torch.ones(qwen.network.config.hidden_size)}, qwen.fingerprint)
    found = dev_split.best_strength(qwen, own, "pushed", {RepeSettings(): vector})
    assert (found.strength, found.remark) == (chosen, "")


@pytest.mark.parametrize(("metric", "per_strength", "chosen"), [("kl", 0.3, 2.0), ("nll", 0.2, 2.0), ("kl", 0.1, 8.0)])
def test_a_strength_that_costs_too_much_is_not_chosen(
    qwen: ChatModel, monkeypatch: pytest.MonkeyPatch, metric: str, per_strength: float, chosen: float
) -> None:
    """The movement grows with the strength, and so does the cost on neutral text."""

    def scoring(_: ChatModel, probes: Any, conditions: list[Condition], **__: Any) -> pl.DataFrame:
        records = []
        for probe, condition in itertools.product(probes, [Condition(), *conditions]):
            alpha = condition.key()["alpha"]
            cost = {"kl": 0.0, "nll": 2.0}
            cost[metric] += per_strength * abs(alpha)
            own = {"choice": {"logratio": (1.0 + alpha), "pmass": 0.9}, "divergence": {"kl": cost["kl"]},
                   "likelihood": {"nll": cost["nll"]}}[probe.kind]  # fmt: skip
            for row in probe.rows:
                names = {"probe": probe.name, "group": row.group, "row": row.row, "cluster": row.cluster,
                         "label": row.label, **condition.key()}  # fmt: skip
                facts = {"logratio": float(row.label), "pmass": 0.9}
                for name, value in (facts if probe.name == side_effects.FACTS else own).items():
                    records.append({**names, "metric": name, "value": value})
        return pl.DataFrame(records, schema=SCHEMA)

    monkeypatch.setattr(dev_split, "score", scoring)
    vector = ActivationDirection({1: torch.ones(qwen.network.config.hidden_size)}, qwen.fingerprint)
    own = sycophancy.headline_probe(load("sycophancy"))
    assert dev_split.best_strength(qwen, own, "pushed", {RepeSettings(): vector}).strength == chosen


def test_many_candidates_share_the_budget_of_dev_evaluations(qwen: ChatModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every candidate is tried once; those that move furthest for their KL get all strengths."""
    scored: list[tuple[str, str, float]] = []

    def scoring(_: ChatModel, probes: Any, conditions: list[Condition], **__: Any) -> pl.DataFrame:
        records = []
        scored.extend((probe.name, one.key()["edit"], one.key()["alpha"]) for one in conditions for probe in probes)
        for probe, condition in itertools.product(probes, [Condition(), *conditions]):
            key = condition.key()
            gain = float(key["edit"].split()[-1]) if key["alpha"] else 0.0
            values = {"choice": {"logratio": key["alpha"] * gain, "pmass": 0.9}, "likelihood": {"nll": 2.0},
                      "divergence": {"kl": 0.001 * key["alpha"] ** 2}}[probe.kind]  # fmt: skip
            for row in probe.rows:
                names = {"probe": probe.name, "group": row.group, "row": row.row, "cluster": row.cluster,
                         "label": row.label, **key}  # fmt: skip
                facts = {"logratio": float(row.label), "pmass": 0.9}
                for name, value in (facts if probe.name == side_effects.FACTS else values).items():
                    records.append({**names, "metric": name, "value": value})
        return pl.DataFrame(records, schema=SCHEMA)

    monkeypatch.setattr(dev_split, "score", scoring)
    width = qwen.network.config.hidden_size
    fitted = {(n,): ActivationDirection({1: torch.full((width,), n + 1.0)}, qwen.fingerprint) for n in range(30)}
    own = sycophancy.headline_probe(load("sycophancy"))
    chosen = dev_split.best_strength(qwen, own, "pushed", fitted)
    assert chosen.option == (29,) and chosen.strength == 8.0 and chosen.remark == "the largest tried"
    asked = {(name, alpha) for _, name, alpha in scored}
    assert len(scored) == len(set(scored)), "nothing is scored twice"
    assert len(asked) <= 2 * dev_split.EVALUATIONS, "both signs of each"
    assert {name for name, _ in asked} == {f"pushed {number}" for number in range(30)}
    assert {name for name, alpha in asked if alpha == 8.0} == {"pushed 29", "pushed 28"}
    facts = {name for probe, name, _ in scored if probe == side_effects.FACTS}
    assert facts == {"pushed 29", "pushed 28"}, "the first round measures the movement and the KL alone"


def test_a_choice_is_kept_and_a_killed_one_goes_on(
    qwen: ChatModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vector = torch.ones(qwen.network.config.hidden_size)
    fitted = {(n,): ActivationDirection({1: (n + 1.0) * vector}, qwen.fingerprint) for n in range(2)}
    whole = sycophancy.headline_probe(load("sycophancy"))
    own = replace(whole, rows=tuple(whole.rows[:40]))
    expected = dev_split.best_strength(qwen, own, "pushed", fitted)
    real, calls = dev_split.score, []

    def counting(*arguments: Any, **more: Any) -> pl.DataFrame:
        calls.append(len(list(more["shards"].folder.glob("*"))) if more["shards"].folder.is_dir() else 0)
        table = real(*arguments, **more)
        if len(calls) == 1:
            raise KeyboardInterrupt
        return table

    monkeypatch.setattr(dev_split, "score", counting)
    with RunFolder(tmp_path, {}) as folder:
        with pytest.raises(KeyboardInterrupt):
            dev_split.best_strength(qwen, own, "pushed", fitted, folder)
        assert dev_split.best_strength(qwen, own, "pushed", fitted, folder) == expected
        assert calls[0] == 0 < calls[1], "the second call finds what the first has scored"
        assert dev_split.best_strength(qwen, own, "pushed", fitted, folder) == expected and len(calls) == 2


def test_a_split_of_replies_keeps_them() -> None:
    own = instrument.replies(load("honesty"))
    assert own is not None
    dev, test = split(own, dev=True), split(own, dev=False)
    assert dev.kind == test.kind == "contrast" and all(is_dev(row.cluster) for row in dev.rows)
    assert sorted(row.row for row in (*dev.rows, *test.rows)) == sorted(row.row for row in own.rows)
    assert all(row.replies for row in (*dev.rows, *test.rows))


# -------------------------------------------------------------------- splits and methods


def test_the_split_keeps_clusters_whole_and_never_drifts() -> None:
    probe = dilemmas.probe()
    dev, test = split(probe, dev=True), split(probe, dev=False)
    clusters = [{row.cluster for row in part.rows} for part in (dev, test)]
    assert not clusters[0] & clusters[1] and len(dev.rows) + len(test.rows) == len(probe.rows)
    assert 0.15 < len(dev.rows) / len(probe.rows) < 0.35
    assert is_dev("broken_things/6") is is_dev("broken_things/6")


def test_engineered_prompts_never_mention_how_a_probe_asks() -> None:
    for name in ("sycophancy", "honesty", "refusal"):
        found = prompts.engineered(name)
        assert {p.side for p in found if p.kind == "embody"} == {1, -1}
        personas = load(name).personas
        for prompt in found:
            assert prompt.text not in (*personas.pos, *personas.neg)
            assert not [
                word for word in ("Yes", "No", "answer:", "choice", "dilemma", "**") if word in prompt.text.split()
            ]


def test_permuted_layers_keep_every_norm_and_no_place(qwen: ChatModel) -> None:
    direction = random_direction(qwen, layers=[0, 1, 2, 3])
    moved = controls.permuted_layers(direction, 0)
    assert moved.norm() == pytest.approx(direction.norm()) and moved.deltas.keys() == direction.deltas.keys()
    for name, delta in moved.deltas.items():
        assert not torch.equal(in_fp64(delta), in_fp64(direction.deltas[name]))
    with pytest.raises(UserError, match="one layer"):
        controls.permuted_layers(direction.keep(layers=[1]), 0)


def test_shuffled_pairs_exchange_whole_sides_of_half_of_the_rows() -> None:
    pairs = pl.DataFrame({
        "prompt": [f"p{n}" for n in range(200)], "response_pos": ["+"] * 200, "response_neg": ["-"] * 200,
        "keep_pos": [True] * 200, "keep_neg": [False] * 200,
    })  # fmt: skip
    shuffled = controls.shuffled_pairs(pairs, 0)
    swapped = shuffled["response_pos"] == "-"
    assert 70 < swapped.sum() < 130
    assert (shuffled["keep_pos"] == ~swapped).all() and (shuffled["response_neg"] != shuffled["response_pos"]).all()
    assert shuffled["prompt"].to_list() == pairs["prompt"].to_list()
    assert controls.shuffled_pairs(pairs, 1)["response_pos"].to_list() != shuffled["response_pos"].to_list()


def test_synthetic_writes_are_rank_one_and_of_the_asked_size(any_model: ChatModel) -> None:
    activation = repe.fit(any_model, load("sycophancy"), RepeSettings(personas=1))
    for source in synthetic.INPUTS:
        direction = synthetic.residual_writes(any_model, activation, source)
        for name, delta in direction.deltas.items():
            weight = any_model.network.get_parameter(name).data.double()
            assert delta.rank == 1 and name.split(".")[-2] in ("o_proj", "down_proj", "c_proj")
            assert float(in_fp64(delta).norm()) == pytest.approx(1e-3 * float(weight.norm()), rel=1e-5)


def test_one_gradient_step_lowers_the_contrast_loss(qwen: ChatModel) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = [SupervisedTokens(torch.randint(5, 900, (12,), generator=generator).tolist(), 4) for _ in range(6)]
    positive, negative = rows[:3], rows[3:]

    def loss(part: list[SupervisedTokens]) -> float:
        total = count = 0.0
        for ids, prompt in part:
            with torch.no_grad():
                logits = qwen.network(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
            total -= float(sum(logits[at - 1, ids[at]] for at in range(prompt, len(ids))))
            count += len(ids) - prompt
        return total / count

    step = gradient.steps(qwen, positive, negative, count=1, norm=0.05)
    assert step.norm() == pytest.approx(0.05, rel=1e-4)
    before = loss(positive) - loss(negative)
    from ws.edit.steering import steer  # noqa: PLC0415

    with steer(qwen, step, 1.0):
        after = loss(positive) - loss(negative)
    with steer(qwen, step, -1.0):
        other = loss(positive) - loss(negative)
    assert after < before < other
    assert not any(parameter.requires_grad for parameter in qwen.network.parameters())


# -------------------------------------------------------------------- tables on known scores


def known(shift: Any, control: Any = lambda seed: 0.02 * (seed - 2)) -> pl.DataFrame:
    """Scores of one edit, five random controls and a prompt on sixty items of each probe.

    The own probe is labelled as the real one: false and true claims are +1, their reversed questions -1. A dilemma has
    a row of each label.
    """
    records: list[dict[str, Any]] = []
    conditions = [
        ("plain", "none", 0.0, None),
        *(("plain", "edit", a, 0) for a in (1.0, -1.0)),
        ("p +", "none", 0.0, None),
    ]
    conditions += [("plain", "random", a, seed) for a in (1.0, -1.0) for seed in range(5)]
    for context, edit, alpha, seed in conditions:
        key = {"context": context, "edit": edit, "alpha": alpha, "seed": seed, "data_seed": None}
        for item in range(60):
            for label in (1, -1):
                base = 0.4 * label + ((item * 7) % 11 - 5) / 10
                move = shift(label, alpha) if edit == "edit" else control(seed) * label if edit == "random" else 0.0
                move += 1.5 * label if context == "p +" else 0.0
                rows = [("dilemmas", "false", f"{item}/{label}", base)]
                for group, level in (("false", base), ("true", base + label)):
                    polarity = "" if label > 0 else "/reversed"
                    rows.append(("sycophancy", group + polarity, f"{item}:{group}{polarity}", level))
                for probe, group, row, level in rows:
                    names = {"probe": probe, "group": group, "row": row, "cluster": f"{item}", "label": label}
                    records.append({**names, **key, "metric": "logratio", "value": level + move})
                    records.append({**names, **key, "metric": "pmass", "value": 0.95})
            side = {"group": "true", "row": f"{item}", "cluster": f"{item}", "label": 1, **key}
            records.append({"probe": "facts", **side, "metric": "logratio", "value": 1.0 if item < 54 else -1.0})
            records.append({"probe": "neutral_kl", **side, "metric": "kl", "value": 0.02 * alpha**2})
            nll = 2.0 + abs(alpha) * item / 60
            records.append({"probe": "neutral_nll", **side, "metric": "nll", "value": nll})
    return pl.DataFrame(records, schema=SCHEMA)


LINES = [
    Line("edit", "weights", {"+": Place("plain", "edit", 1.0), "-": Place("plain", "edit", -1.0)}),
    Line("prompt", "prompts", {"+": Place("p +", "none", 0.0)}, spent={"+": Spent(0.4, 0.2, 0.9)}),
    Line("random", "controls", {"+": Place("plain", "random", 1.0), "-": Place("plain", "random", -1.0)},
         control_of="edit"),
]  # fmt: skip


def both_signs(name: str, kind: str = "variants") -> Line:
    return Line(name, kind, {"+": Place("plain", name, 1.0), "-": Place("plain", name, -1.0)})


def reader(table: pl.DataFrame) -> LineScores:
    return LineScores(table, "sycophancy", "false")


def measured(shift: Any, **options: Any) -> dict[str, Entry]:
    return {entry.name: entry for entry in all_of(shift, **options).entries}


def all_of(shift: Any, **options: Any) -> Measured:
    """The methods and controls of known scores."""
    return numbers.measure(reader(known(shift, **options)), LINES)


CHOICES = Ability("choice", "it can", 0.95, Share(0.9, 0.8, 1.0), None)


def found_of(
    own: Measured | Iterable[Entry], equal: Measured | None = None, table: pl.DataFrame | None = None, **changes: Any
) -> Findings:
    """What a page needs, around known entries; without others at equal KL, the same stand there."""
    base = reader(known(lambda label, alpha: 0.0) if table is None else table).base()
    own = own if isinstance(own, Measured) else Measured(tuple(own))
    found = Findings(
        "another", "sycophancy", {"weights": "edit"}, base, own, {"0.5": equal or own}, Strengths({"0.5": {}}, {}),
        "own", {"scores": 61.0, "total": 62.0}, "dilemmas", CHOICES, "edit",
    )  # fmt: skip
    return replace(found, **changes)


def headline(entries: Measured | Iterable[Entry]) -> str:
    return page.headline(found_of(entries))


def two_seeds(first: Any, second: Any, alpha_of_second: float = 1.0) -> pl.DataFrame:
    """Scores of an edit with two training seeds; the strengths of the second are `alpha_of_second` times +-1."""
    table = known(first)
    other = known(second).filter(pl.col("edit") == "edit")
    return pl.concat([table, other.with_columns(pl.lit(1, pl.Int64).alias("seed"), pl.col("alpha") * alpha_of_second)])


def cells(table: Any, name: str) -> dict[str, str]:
    """One row of a table by column; of columns with one name the first counts."""
    row = next(row for row in table.rows if row[0] == name)
    return dict(reversed(list(zip(table.header, row, strict=True))))


def test_known_effects_stand_in_the_table() -> None:
    found = measured(lambda label, alpha: 2.0 * alpha * label)
    assert found["edit"].sides["+"].own.mean == pytest.approx(2.0)
    assert found["edit"].sides["-"].own.mean == pytest.approx(-2.0) and found["edit"].sides["+"].own.outside is True
    assert found["prompt"].sides["+"].own.mean == pytest.approx(1.5) and "-" not in found["prompt"].sides
    (control,) = all_of(lambda label, alpha: 2.0 * alpha * label).controls
    assert control.effects["+"]["own"].seeds == pytest.approx([-0.04, -0.02, 0.0, 0.02, 0.04])
    side = found["edit"].sides["+"]
    limits = stats.wilson(54, 60)
    assert side.facts.mean == pytest.approx(0.9) and (side.facts.low, side.facts.high) == (limits.low, limits.high)
    assert side.kl is not None and side.kl.mean == pytest.approx(0.02) and side.facts_moved == 0
    mean = control.mean("+", "own")
    assert mean is not None and mean.low is not None and mean.high is not None and mean.low < 0 < mean.high


def test_a_base_row_and_the_band_of_its_controls_stand_beside_every_effect() -> None:
    found = all_of(lambda label, alpha: 2.0 * alpha * label)
    shown = tables.effects_table(found, ("weights",), found_of(found).base, "sycophancy", "dilemmas", "")
    assert [row[0] for row in shown.rows] == ["base (levels)", "edit +", "edit -"]
    band = stats.prediction_band([-0.04, -0.02, 0.0, 0.02, 0.04])
    assert cells(shown, "edit +")["random"] == f"{band.low:+.2f}, {band.high:+.2f}"
    assert cells(shown, "edit +")["sycophancy"].startswith("+2.00 r [")
    assert cells(shown, "base (levels)")["sycophancy"].startswith("+0.40 [")
    drawn = tables.controls_table(found, "sycophancy", "dilemmas")
    assert [row[:2] for row in drawn.rows] == [["random +", "5"], ["random -", "5"]]
    costs = tables.costs_table(found, found_of(found).base, "")
    assert {"edit +", "edit -", "prompt +"} <= {row[0] for row in costs.rows}
    assert cells(costs, "edit +")["facts right"] == "90.0 % [79.9, 95.3]"
    assert cells(costs, "prompt +")["p95 KL, own replies"] == "0.400" and cells(costs, "prompt +")["KL mean"] == "-"


def test_p_is_that_of_sign_flips_over_clusters_and_the_table_counts_its_tests() -> None:
    # pairs of clusters that cancel, and three that do not
    def shift(label: int, alpha: float) -> float:
        return 0.1 * alpha * label

    noisy = known(shift).with_columns(
        pl.when((pl.col("edit") == "edit") & (pl.col("metric") == "logratio") & (pl.col("probe") == "dilemmas"))
        .then(pl.col("value") + (pl.col("cluster").cast(pl.Int64, strict=False) % 5 - 2) * pl.col("label") * 0.4)
        .otherwise(pl.col("value")).alias("value")
    )  # fmt: skip
    found = numbers.measure(reader(noisy), LINES)
    entry = found.entries[0]
    rows = noisy.filter(pl.col("edit") == "edit", pl.col("alpha") == 1.0, pl.col("probe") == "dilemmas",
                        pl.col("metric") == "logratio")  # fmt: skip
    base = noisy.filter(pl.col("edit") == "none", pl.col("context") == "plain", pl.col("metric") == "logratio",
                        pl.col("probe") == "dilemmas").select("row", base="value")  # fmt: skip
    joined = rows.join(base, on="row")
    change = ((joined["value"] - joined["base"]) * joined["label"]).to_numpy()
    expected = changes.sign_flip_p(change, joined["cluster"].to_list())
    assert entry.sides["+"].dilemmas.p == pytest.approx(expected) and 0.001 < expected < 0.9
    shown = tables.effects_table(found, ("weights",), found_of(found).base, "sycophancy", "dilemmas", "")
    assert shown.rows[1][8] == f"{expected:.4f}" and "Of the 4 p values" in shown.caption and "0.0125" in shown.caption


def test_a_yes_biased_direction_is_reported_as_yes_bias_and_not_as_honesty(tmp_path: Path) -> None:
    entries = measured(lambda label, alpha: 2.0 * alpha)
    parts = entries["edit"].sides["+"].decomposition
    assert parts.truth == pytest.approx(0.0) and parts.bias == pytest.approx(2.0)
    assert entries["edit"].sides["+"].dilemmas.mean == pytest.approx(0.0)
    assert entries["edit"].sides["+"].turned.balanced <= 0
    page.write(tmp_path, found_of(entries.values()))
    text = (tmp_path / "comparison.md").read_text()
    assert "Mostly Yes-bias" in text and "edit at + (Yes +2.00, honesty +0.00)" in text
    honest = list(measured(lambda label, alpha: 2.0 * alpha * label).values())
    assert page.yes_bias_sentence(honest, "sycophancy", "dilemmas") is None


def test_a_yes_biased_direction_does_not_pass_as_the_behaviour(tmp_path: Path) -> None:
    entries = measured(lambda label, alpha: 2.0 * alpha)
    side = entries["edit"].sides["+"]
    assert side.own.mean == pytest.approx(2.0), "the headline group has one polarity, so its mean moves"
    parts = side.own_decomposition
    assert parts is not None
    assert parts.truth == pytest.approx(0.0) == parts.balanced and parts.n == 240
    assert parts.yes_bias.mean == pytest.approx(2.0) and (parts.yes_bias.low or 0) > 1.9
    assert parts.up > 0 < parts.down, "some rows come to the right answer and as many leave it"
    found = found_of(entries.values())
    page.write(tmp_path, found)
    assert "+2.00 (95 % over rows [+2.00, +2.00]; mostly Yes-bias) at +" in page.headline(found)
    text = (tmp_path / "comparison.md").read_text()
    assert "Mostly Yes-bias on the sycophancy probe" in text and "edit at + (Yes +2.00, sycophancy +0.00)" in text
    written = json.loads((tmp_path / "comparison.json").read_text())
    assert written["own_yes_bias"] == ["edit at +", "edit at -"] == written["yes_bias"]
    shown = tables.effects_table(found.own_strength, ("weights",), found.base, "sycophancy", "dilemmas", "")
    assert cells(shown, "edit +")["sycophancy"].endswith("(mostly Yes-bias)")
    own = tables.parts_table(list(entries.values()), "own", "sycophancy", "dilemmas")
    assert own is not None and cells(own, "edit -")["Yes-bias"] == "-2.00 [-2.00, -2.00]"
    assert cells(own, "edit -")["towards sycophancy"] in ("+0.00", "-0.00")


def test_a_behaviour_is_not_called_yes_bias_and_a_probe_without_reversed_rows_says_nothing(tmp_path: Path) -> None:
    entries = (measured(lambda label, alpha: 2.0 * alpha * label)["edit"],)
    assert entries[0].sides["+"].own_decomposition.truth == pytest.approx(2.0)
    assert entries[0].sides["+"].own_decomposition.down == 0 < entries[0].sides["+"].own_decomposition.up
    assert "Yes-bias" not in headline(entries)
    table = known(lambda label, alpha: 2.0 * alpha).filter(~pl.col("group").str.ends_with("/reversed"))
    entries = numbers.measure(reader(table), LINES).entries
    assert entries[0].sides["+"].own_decomposition is None
    assert tables.parts_table(entries, "own", "sycophancy", "dilemmas") is None
    page.write(tmp_path, found_of(entries))
    assert "Yes-bias" not in headline(entries) and "sycophancy probe" not in (tmp_path / "comparison.md").read_text()


def test_a_confident_direction_is_reported_as_confidence() -> None:
    table = known(lambda label, alpha: 0.0)
    louder = table.with_columns(
        pl.when((pl.col("edit") == "edit") & (pl.col("metric") == "logratio"))
        .then(pl.col("value") * 1.5).otherwise(pl.col("value")).alias("value")
    )  # fmt: skip
    entry = numbers.measure(reader(louder), LINES).entries[0]
    parts = entry.sides["+"].decomposition
    assert parts.scale == pytest.approx(1.5) and parts.truth > 0.1
    assert parts.beyond_scale == pytest.approx(0.0, abs=1e-6)


# -------------------------------------------------------------------- verdicts and headline


def test_an_effect_within_the_control_band_is_shown_with_its_verdict() -> None:
    found = all_of(lambda label, alpha: 0.05 * alpha * label, control=lambda seed: 0.3 * (seed - 2))
    assert found.entries[0].sides["+"].own.outside is False
    assert f"+0.05 (95 % over rows [+0.05, +0.05]; {NOT_SEPARABLE}) at +" in headline(found)


def seeds_of(*shifts: float) -> pl.DataFrame:
    """Scores of an edit with one training seed per shift."""
    first, *more = ([shift, known(lambda label, alpha, by=shift: by * alpha * label)] for shift in shifts)
    others = [
        table.filter(pl.col("edit") == "edit").with_columns(pl.lit(seed, pl.Int64).alias("seed"))
        for seed, (_, table) in enumerate(more, 1)
    ]
    return pl.concat([first[1], *others])


@pytest.mark.parametrize(("shifts", "outside"), [
    ((2.0, 3.0), True), ((2.0, 6.0, -1.0), False), ((2.0, 2.02, 2.01), True),
])  # fmt: skip
def test_with_three_training_seeds_their_interval_must_clear_the_band_too(
    shifts: tuple[float, ...], outside: bool
) -> None:
    found = numbers.measure(reader(seeds_of(*shifts)), LINES)
    effect = found.entries[0].sides["+"].own
    assert effect.band is not None and is_outside(vars(effect), vars(effect.band)), "the rows alone are clear of it"
    assert effect.over_seeds is not None and effect.outside is outside
    assert (NOT_SEPARABLE in headline(found)) is not outside


def test_the_headline_leads_with_the_interval_over_training_seeds() -> None:
    table = two_seeds(lambda label, alpha: 2.0 * alpha * label, lambda label, alpha: 2.02 * alpha * label)
    found = numbers.measure(reader(table), LINES)
    spread = stats.over_seeds([2.0, 2.02])
    said = f"+2.01 (95 % over 2 seeds [{spread.low:+.2f}, {spread.high:+.2f}], over rows [+2.01, +2.01]) at +"
    assert said in headline(found) and spread.low < 1.9
    one = numbers.measure(reader(known(lambda label, alpha: 2.0 * alpha * label)), LINES)
    assert "+2.00 (95 % over rows [+2.00, +2.00]) at +" in headline(one) and "seeds" not in headline(one)


def test_the_headline_names_the_winner_also_where_it_is_another_kind() -> None:
    table = known(lambda label, alpha: alpha * label)
    stronger = known(lambda label, alpha: 3.0 * alpha * label if alpha < 0 else 0.5 * label)
    other = stronger.filter(pl.col("edit") == "edit").with_columns(pl.lit("tau_neg").alias("edit"))
    lines = [
        *LINES,
        Line("tau_neg", "variants", {s: Place("plain", "tau_neg", a) for s, a in (("+", 1.0), ("-", -1.0))}),
    ]
    found = found_of(numbers.measure(reader(pl.concat([table, other])), lines),
                     best={"weights": "edit", "variants": "tau_neg"})  # fmt: skip
    assert "At + edit moves furthest; at - tau_neg moves furthest." in page.headline(found)
    assert page.as_json(found)["winners"] == {"0.5": {"+": "edit", "-": "tau_neg"}}


def test_a_prompt_that_costs_more_than_the_budget_wins_nothing() -> None:
    table = known(lambda label, alpha: alpha * label)
    stronger = known(lambda label, alpha: 3.0 * alpha * label).filter(pl.col("edit") == "edit")
    other = stronger.with_columns(pl.lit("loud").alias("edit"))
    for p95, won in ((0.54, "loud"), (0.56, "edit")):
        line = replace(both_signs("loud", "prompts"), spent=dict.fromkeys("+-", Spent(p95, 0.1, 1.0)))
        found = found_of(numbers.measure(reader(pl.concat([table, other])), [*LINES, line]),
                         best={"weights": "edit", "prompts": "loud"})  # fmt: skip
        assert page.as_json(found)["winners"] == {"0.5": {"+": won, "-": won}}


def test_power_says_how_many_seeds_would_tell_the_first_two_apart() -> None:
    table = seeds_of(2.0, 2.2)
    other = seeds_of(1.9, 2.3).filter(pl.col("edit") == "edit").with_columns(pl.lit("tau_pos").alias("edit"))
    lines = [
        *LINES,
        Line("tau_pos", "variants", {s: Place("plain", "tau_pos", a) for s, a in (("+", 1.0), ("-", -1.0))}),
    ]
    found = found_of(numbers.measure(reader(pl.concat([table, other])), lines),
                     best={"weights": "edit", "variants": "tau_pos"})  # fmt: skip
    assert "differ by 0.00" in (page.power_sentence(found) or "")
    far = seeds_of(1.0, 1.4).filter(pl.col("edit") == "edit").with_columns(pl.lit("tau_pos").alias("edit"))
    apart = found_of(numbers.measure(reader(pl.concat([table, far])), lines),
                     best={"weights": "edit", "variants": "tau_pos"})  # fmt: skip
    spread = ((0.02 + 0.08) / 2) ** 0.5
    assert f"differ by 0.90: {power.seeds_needed(0.9, spread)} seeds each" in (page.power_sentence(apart) or "")
    assert page.power_sentence(found_of(all_of(lambda label, alpha: alpha * label))) is None


def test_the_page_counts_controls_that_move_something_on_average() -> None:
    def control(name: str, of: str, *draws: float, has_sides: bool = False) -> findings.Control:
        effect = findings.Effect(0.0, None, None, 10, 1.0, draws, None)
        signs = {"+": effect, "-": replace(effect, seeds=tuple(-one for one in draws)) if has_sides else effect}
        return findings.Control(name, of, "", {sign: {"own": one} for sign, one in signs.items()}, {"+": 1, "-": -1})

    found = found_of(all_of(lambda label, alpha: alpha * label))
    middle = found.equal_kl[found.headline_budget]
    controls = (
        control("random like a", "a", 1.0, 1.1, 0.9),  # away from 0, and one draw serves both signs
        control("random like b", "b", 1.0, -1.1, 0.1),
        control("personas shuffled", "personas shuffled", 2.0, 2.1, 1.9, has_sides=True),  # both signs are away
    )
    changed = replace(found, equal_kl={**found.equal_kl, found.headline_budget: replace(middle, controls=controls)})
    assert "3 of 4 means" in page.null_sentence(changed)


def test_a_page_on_an_embedded_model_says_what_favours_a_method_there() -> None:
    entries = all_of(lambda label, alpha: 2.0 * alpha * label)
    for model in library.POCKET_MODELS:
        found = found_of(entries, model=model)
        captions = [b.caption for b in page._blocks(found, Path()) if isinstance(b, Table) and "p95 KL" in b.header
                    and "least answer mass" in b.header]  # fmt: skip
        assert len(captions) == 2 and all("were tuned on the probe of the behaviour" in text for text in captions)
        assert all("a linear readout of the residual stream" in text for text in captions)
        recipe = json.loads((library.POCKET_MODELS[model] / "recipe.json").read_text())["recipe"]
        assert f"after layer {recipe['latent_layer'] - 1} (counted from 0)" in caveats.readout([model])
    other = page.markdown(found_of(entries))
    assert "tuned on" not in other and "readout" not in other
    own = page.markdown(found_of(entries, model="pocket", behaviour="punctual"))
    assert "tuned on" not in own and "readout" in own, "nobody tuned anything on a behaviour of one's own"


def test_the_single_layer_of_activation_steering_can_be_the_one_that_was_read_out() -> None:
    """What `caveats.readout` claims: the layers that steering may choose on an embedded model hold that layer."""
    for folder in library.POCKET_MODELS.values():
        recipe = json.loads((folder / "recipe.json").read_text())["recipe"]
        layers = json.loads((folder / "weight_steering.json").read_text())["train"]["lora"]["layers"]
        count = json.loads((folder / "config.json").read_text())["num_hidden_layers"]
        chosen = [one.layer for one in repe.candidates("single-layer", count, (layers[0], layers[1]))]
        assert recipe["latent_layer"] - 1 in chosen


def test_strengths_of_one_candidate_are_conditions_of_one_edit(
    qwen: ChatModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A seed is a replicate: the strengths that are tried are no replicates of each other."""
    asked: list[Condition] = []

    def scoring(network: ChatModel, probes: Any, conditions: list[Condition], **options: Any) -> pl.DataFrame:
        asked.extend(conditions)
        return score(network, probes, conditions, **options)

    monkeypatch.setattr(dev_split, "score", scoring)
    option = RepeSettings()
    tiny = ActivationDirection({1: torch.full((qwen.network.config.hidden_size,), 1e-6)}, qwen.fingerprint)
    chosen = dev_split.best_strength(qwen, sycophancy.headline_probe(load("sycophancy")), "tiny", {option: tiny})
    assert {edit.seed for condition in asked for edit, _ in condition.edits} == {None}
    tried = {alpha for condition in asked for _, alpha in condition.edits}
    assert tried == {sign * one for one in dev_split.STRENGTHS["difference"] for sign in (1, -1)}
    assert chosen.option is option and chosen.strength in dev_split.STRENGTHS["difference"]


def test_with_one_training_seed_the_rows_decide() -> None:
    effect = measured(lambda label, alpha: 2.0 * alpha * label)["edit"].sides["+"].own
    assert effect.over_seeds is None and effect.outside is True


def test_rows_may_reach_into_the_band_however_alike_the_seeds_are() -> None:
    table = two_seeds(lambda label, alpha: 0.05 * alpha * label, lambda label, alpha: 0.05 * alpha * label)
    assert numbers.measure(reader(table), LINES).entries[0].sides["+"].own.outside is False


def test_without_a_band_there_is_no_verdict() -> None:
    table = known(lambda label, alpha: 2.0 * alpha * label)
    one = table.filter((pl.col("edit") != "random") | (pl.col("seed") == 0))
    for part, lines in ((one, LINES), (table, LINES[:2])):
        entries = numbers.measure(reader(part), lines)
        own = entries.entries[0].sides["+"].own
        assert own.outside is None and own.band is None
        sentence = headline(entries)
        assert NOT_SEPARABLE not in sentence and "+2.00 (95 % over rows [" in sentence
        shown = tables.effects_table(entries, findings.METHODS, found_of(entries).base, "sycophancy", "dilemmas", "")
        assert not [cell for row in shown.rows for cell in row if NOT_SEPARABLE in cell or "nan" in cell]


@pytest.mark.parametrize(("given", "said"), [
    ({"steps": (1, 0)}, "--steps holds 0"), ({"shuffles": -1}, "shuffles is -1"), ({"budgets": ()}, "no KL budget"),
    ({"budgets": (0.5, 0.1)}, "ascending"), ({"budgets": (0.5, 0.5)}, "without repeats"),
    ({"budgets": (-1.0,)}, "positive.*--budgets"), ({"kinds": ("weights", "weight")}, "no kind of method 'weight'"),
    ({"kinds": ("prompts",)}, "--kinds lacks weights"),
    ({"kinds": ("weights",), "peers": ("repeng:vector.gguf",)}, "--with needs activation steering"),
])  # fmt: skip
def test_an_impossible_plan_is_refused_before_anything_is_fitted(given: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        Plan(**given)


@pytest.mark.parametrize("count", [0, 1])
def test_fewer_random_directions_than_make_a_band_are_refused(count: int) -> None:
    with pytest.raises(UserError, match=f"{count} random controls are too few for a band.*--draws 2"):
        Plan(draws=count)


def test_broken_methods_and_controls_are_no_candidates_for_the_headline() -> None:
    """A prompt on one side cannot be compared on both; every kind has its own best."""
    weak = known(lambda label, alpha: alpha * label)
    strong = known(lambda label, alpha: 3.0 * alpha * label).filter(pl.col("edit") == "edit")
    table = pl.concat([
        weak, *(strong.with_columns(pl.lit(name).alias("edit")) for name in ("tau_pos", "broken")),
    ]).with_columns(
        pl.when((pl.col("edit") == "broken") & (pl.col("metric") == "pmass")).then(0.2).otherwise(pl.col("value"))
        .alias("value")
    )  # fmt: skip

    def line(name: str, kind: str) -> Line:
        return Line(name, kind, {"+": Place("plain", name, 1.0), "-": Place("plain", name, -1.0)})

    lines = [line("edit", "weights"), line("tau_pos", "variants"), line("broken", "weights"), *LINES[1:]]
    assert numbers.best_of_kinds(reader(table), lines) == {"weights": "edit", "variants": "tau_pos"}
    entries = numbers.measure(reader(table), lines)
    shown = tables.effects_table(entries, ("weights", "variants"), found_of(entries).base, "sycophancy", "dilemmas", "")
    assert "tau_pos +" in [row[0] for row in shown.rows], "the line stays in the table"


# -------------------------------------------------------------------- informedness, seeds, strengths


def test_informedness_says_which_way_a_direction_points_and_turns_none_round() -> None:
    away = measured(lambda label, alpha: -3.0 * alpha * label)["edit"]
    towards = measured(lambda label, alpha: 3.0 * alpha * label)["edit"]
    assert towards.informedness["k1"].score == pytest.approx(100 * 0.95**2)
    assert towards.informedness["k1"].forward == pytest.approx(100) == towards.informedness["k1"].reverse
    assert away.informedness["k1"].score == pytest.approx(-100 * 0.95**2), "not taken at the better sign"
    assert away.informedness["k2"].forward == pytest.approx(-200)
    assert away.sides["+"].turned.to_dishonest == 1.0 == away.sides["-"].turned.to_honest


def test_informedness_is_a_mean_over_seeds_and_one_sided_prompts_have_their_half() -> None:
    table = two_seeds(lambda label, alpha: 3.0 * alpha * label, lambda label, alpha: 0.0)
    entries = numbers.measure(reader(table), LINES).entries
    assert entries[0].informedness["k1"].score == pytest.approx(50 * 0.95**2), "one seed does all, one nothing"
    assert entries[0].sides["+"].turned.half == {"k1": pytest.approx(50), "k2": pytest.approx(50)}
    shown = tables.answers_table(entries)
    prompt = cells(shown, "prompt +")
    assert prompt["half k=1"] == "+100" and prompt["SI k=1"] == "-"
    minus = Line("prompt", "prompts", {"-": Place("p +", "none", 0.0)})
    (only,) = numbers.measure(reader(table), [minus]).entries
    assert only.sides["-"].turned.half["k1"] == pytest.approx(-100), "countered: it turns wrong answers at -"
    assert cells(tables.answers_table([only]), "prompt -")["SI k=2"] == "-"


def test_every_seed_stands_at_its_own_strength() -> None:
    table = two_seeds(lambda label, alpha: alpha * label, lambda label, alpha: 2.0 * alpha * label, 1.5)
    at = {
        sign: Place("plain", "edit", {(0, None): side, (1, None): 1.5 * side})
        for sign, side in (("+", 1.0), ("-", -1.0))
    }
    (entry,) = numbers.measure(reader(table), [Line("edit", "weights", at)]).entries
    assert entry.sides["+"].own.seeds == pytest.approx([1.0, 2.0]) and entry.sides["+"].own.mean == pytest.approx(1.5)
    assert entry.sides["+"].alpha == pytest.approx(1.25) and len(entry.sides["+"].facts_seeds) == 2


def test_a_search_that_missed_is_marked_at_its_sign_in_tables_and_picture(tmp_path: Path) -> None:
    table = known(lambda label, alpha: alpha * label)
    missed = replace(LINES[0], spent={"+": Spent(0.5, 0.1, 1.0, True), "-": Spent(0.2, 0.1, 0.9, False)})
    equal = numbers.measure(reader(table), [missed, *LINES[1:]])
    base = found_of(equal).base
    for shown in (tables.effects_table(equal, findings.METHODS, base, "sycophancy", "dilemmas", ""),
                  tables.costs_table(equal, base, "")):  # fmt: skip
        assert [cells(shown, f"edit {sign}")["alpha"] for sign in ("+", "-")] == ["+1", "-1*"]
    shown = tables.effects_table(equal, findings.METHODS, base, "sycophancy", "dilemmas", "")
    assert [cells(shown, f"edit {sign}")["p95 KL"] for sign in ("+", "-")] == ["0.50", "0.20"]
    assert cells(shown, "prompt +")["p95 KL"] == "0.40" and cells(shown, "prompt +")["alpha"] == "-"
    found = numbers.measure(reader(table), [replace(missed, spent={}), *LINES[1:]])
    page.write(tmp_path / "missed", found_of(found, equal))
    page.write(tmp_path / "reached", found_of(found, found))
    pictures = [(tmp_path / name / "pareto.png").read_bytes() for name in ("missed", "reached")]
    assert pictures[0] != pictures[1]


@pytest.mark.parametrize(("rise", "scales"), [(0.9, []), (9.0, ["symlog", "symlog"])])
def test_the_axis_of_costs_is_logarithmic_where_a_method_breaks_the_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rise: float, scales: list[str]
) -> None:
    asked: list[str] = []
    monkeypatch.setattr("matplotlib.axes.Axes.set_xscale", lambda _, name, **__: asked.append(name))
    measured = numbers.measure(reader(known(lambda label, alpha: alpha * label)), LINES)
    first, *others = measured.entries
    side = replace(first.sides["+"], nll_delta=Estimate(rise, rise - 0.1, rise + 0.1, 10))
    broken = replace(measured, entries=(replace(first, sides={**first.sides, "+": side}), *others))
    pareto.draw(found_of(broken, broken), tmp_path / "pareto.png")
    assert asked == scales and (tmp_path / "pareto.png").stat().st_size > 10_000


# -------------------------------------------------------------------- rows


def test_rows_that_are_not_those_of_the_base_are_an_error() -> None:
    table = known(lambda label, alpha: 0.0)
    broken = table.filter(~((pl.col("edit") == "none") & (pl.col("row") == "3/1")))
    with pytest.raises(ValueError, match="differ from the rows of the base"):
        numbers.measure(reader(broken), LINES[:1])


def test_persona_rows_never_enter_the_base() -> None:
    one, two = measured(lambda label, alpha: alpha * label), measured(lambda label, alpha: alpha * label)
    assert one["edit"].sides["+"].own.mean == two["edit"].sides["+"].own.mean == pytest.approx(1.0)


def test_rows_labelled_only_by_their_counterpart_enter_no_mean() -> None:
    table = known(lambda label, alpha: alpha * label)
    filler = table.filter(pl.col("probe") == "dilemmas").with_columns(
        pl.lit(dilemmas.FILLER).alias("group"), pl.col("row") + "/other",
        pl.when((pl.col("edit") == "edit") & (pl.col("metric") == "logratio")).then(9.0).otherwise(pl.col("value"))
        .alias("value"),
    )  # fmt: skip
    with_filler = pl.concat([table, filler])
    assert numbers.measure(reader(with_filler), LINES) == numbers.measure(reader(table), LINES)
    assert reader(with_filler).base() == reader(table).base()


def test_a_built_yes_bias_of_a_real_model_shows_as_such(qwen: ChatModel) -> None:
    """An activation direction along (Yes - No) of the unembedding, in the last layer."""
    effect = ActivationDirection({qwen.layer_count - 1: 3 * _towards_yes(qwen)}, qwen.fingerprint)
    parts = _on_dilemmas(qwen, Edit("edit", effect)).sides["+"].decomposition
    assert parts.bias > 20 * abs(parts.truth) and parts.bias > 0.05


def test_a_direction_built_to_say_yes_is_told_from_honesty_in_a_sentence(qwen: ChatModel) -> None:
    """A rank-one Direction: what the last feed-forward writes at the anchor is moved towards Yes, whatever is asked."""
    name = f"model.layers.{qwen.layer_count - 1}.mlp.down_proj"
    seen: list[torch.Tensor] = []
    hook = qwen.network.get_submodule(name).register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    rows = dilemmas.probe(limit=2).rows
    with torch.no_grad():
        for row in rows:
            qwen.network(input_ids=torch.tensor([qwen.chat.prompt(row.messages, row.continuation)]))
    hook.remove()
    inputs = torch.stack([states[0, -1] for states in seen]).mean(dim=0)
    delta = Delta.low_rank(3 * _towards_yes(qwen)[:, None], (inputs / inputs.norm() ** 2)[None])
    built = Direction({f"{name}.weight": delta}, qwen.fingerprint, {f"{name}.weight": qwen.layer_count - 1})
    entry = _on_dilemmas(qwen, Edit("edit", built))
    sentence = page.yes_bias_sentence([entry], "sycophancy", "dilemmas")
    assert entry.sides["+"].decomposition.bias > 0.05 > abs(entry.sides["+"].dilemmas.mean)
    assert sentence is not None and "edit at + (Yes +" in sentence and "edit at - (Yes -" in sentence


def _towards_yes(model: ChatModel) -> torch.Tensor:
    """The unit vector (Yes - No) of the unembedding."""
    head = loading.load(model.name).network.get_output_embeddings().weight.data
    yes, no = (torch.tensor([ids[0] for ids in model.chat.answers(word)]) for word in ("Yes", "No"))
    vector = head[yes].mean(dim=0) - head[no].mean(dim=0)
    return vector / vector.norm()


def _on_dilemmas(model: ChatModel, edit: Edit) -> Entry:
    """The table's entry of an edit called `edit`, measured on a model."""
    probes = [dilemmas.probe(limit=20), sycophancy.headline_probe(load("sycophancy"), 20),
              *side_effects.probes(model, 4)]  # fmt: skip
    table = score(model, probes, [Condition.of(edit, alpha) for alpha in (1.0, -1.0)])
    return numbers.measure(reader(table), [replace(LINES[0], at={
        sign: Place("plain", edit.name, alpha) for sign, alpha in (("+", 1.0), ("-", -1.0))
    })]).entries[0]  # fmt: skip


# -------------------------------------------------------------------- pages


def test_findings_survive_json(tmp_path: Path) -> None:
    table = two_seeds(lambda label, alpha: alpha * label, lambda label, alpha: 1.01 * alpha * label)
    entries = numbers.measure(reader(table), LINES)
    search = findings.Search(
        0.5, 0.1, 1.2, 0.9, 1, 0, -1.3, True, 0.05, at_own_strength=findings.Reached(0.4, 0.1, 1.0, 0.9)
    )
    strengths = Strengths({"0.5": {"edit": {"-1": (search,)}}}, {"p": {"1": findings.Reached(0.4, 0.1, 1.0, 0.9)}})
    found = found_of(entries, calibration=strengths)
    page.write(tmp_path, found)
    written = json.loads((tmp_path / "comparison.json").read_text())
    assert restore(Findings, written) == found
    assert written["own_strength"]["entries"][0]["+"]["own"]["over_seeds"]["n"] == 2, "signs are keys of an entry"
    assert written["calibration"]["edits"]["0.5"]["edit"]["-1"][0]["at_own_strength"]["p95"] == 0.4
    assert written["base_facts"] == 0.9 and written["seconds"]["total"] == 62.0
    side = written["own_strength"]["entries"][0]["+"]
    assert side["own"]["band"]["low"] < 0 < side["own"]["band"]["high"]
    assert "1 min 2 s" in (tmp_path / "comparison.md").read_text()


def test_the_terminal_shows_mass_and_seeds_in_100_columns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    table = two_seeds(lambda label, alpha: alpha * label, lambda label, alpha: 1.01 * alpha * label)
    entries = numbers.measure(reader(table), [replace(LINES[0], name="edit with a name of several words"), *LINES[1:]])
    page.write(tmp_path, found_of(entries, best={}))
    terminal.show(restore(Findings, json.loads((tmp_path / "comparison.json").read_text())), tmp_path)
    shown = capsys.readouterr().out.partition("Change against the base")[0].splitlines()
    assert max(map(len, shown)) <= 100 and not [line for line in shown if "\N{HORIZONTAL ELLIPSIS}" in line]
    assert {"pmass", "seeds"} <= set(shown[1].split())
    minus, plus = next(pair for pair in itertools.pairwise(shown) if pair[0].startswith("edit"))
    assert minus.split()[-3:] == ["0.95", "2", "-"] == plus.split()[-3:]
    assert "-1.00 [" in minus and "+1.00 [" in plus


def test_the_picture_has_every_strength_with_the_bars_of_both_axes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from matplotlib.axes import Axes  # noqa: PLC0415 - slow import

    drawn: list[tuple[float, float, Any, Any]] = []
    errorbar = Axes.errorbar

    def drawing(self: Axes, x: Any, y: Any, *, xerr: Any, yerr: Any, **options: Any) -> Any:
        drawn.append((x, y, xerr, yerr))
        return errorbar(self, x, y, xerr=xerr, yerr=yerr, **options)

    monkeypatch.setattr(Axes, "errorbar", drawing)
    entries = all_of(lambda label, alpha: (1.0 + 0.1 * label) * alpha * label)
    pareto.draw(found_of(entries), tmp_path / "picture.png")
    at_plus = [one for one in drawn if one[1] > 0 and one[2] is not None]
    assert len(at_plus) == 5, "dW at both signs, own strength and one budget; the prompt has one sign and no strength"
    x, y, xerr, yerr = drawn[0]
    side = entries.entries[0].sides["+"]
    assert side.nll_delta is not None and (x, y) == (side.nll_delta.mean, side.own.mean)
    assert xerr[0][0] == pytest.approx(side.nll_delta.mean - side.nll_delta.low) and yerr is not None
    assert (tmp_path / "picture.png").stat().st_size > 10_000


def test_the_command_takes_dilemmas_from_elsewhere() -> None:
    command = cli._parse(["compare", "--dilemmas", "set.csv"])
    assert command.dilemmas == "set.csv"
    sources = ("own", "a/set.csv", "b/set.csv", "who/daily_dilemmas@abc")
    names = [compare.folder_name(source) for source in sources]
    assert [re.sub(r"-[0-9a-f]{6}$", "", name) for name in names] == [
        "compare", "compare-set", "compare-set", "compare-daily_dilemmas",
    ]  # fmt: skip
    assert len(set(names)) == len(sources), "two sets of one name have a folder each"
