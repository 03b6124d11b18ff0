"""Ablations: the run, its tables, its sentences, and what it refuses."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from ws.base import stats
from ws.base.errors import UserError
from ws.commands.cli import _main
from ws.edit.condition import BASE
from ws.eval import instrument
from ws.eval.dilemmas import FILLER
from ws.fitting import behaviour
from ws.fitting.data import Grid
from ws.fitting.run_settings import Settings, run_path
from ws.fitting.stages import Fitting
from ws.measure.probe import is_dev
from ws.measure.score import SCHEMA
from ws.report import ablation_numbers, ablations
from ws.report.ablation_numbers import Measured
from ws.runs import ablate
from ws.runs.ablate import Plan
from ws.subspace.lenses import bases, families

SMALL: dict[str, Any] = {
    "grid": Grid(topics=3, personas=2, samples=2),
    "train": {"rank": 2, "lora_alpha": 4, "lr": 5e-3, "batch_size": 8, "layers": (0.25, 0.75)},
    "sampling": {"max_new_tokens": 6},
}
LENSES = ("projection", "shared", "native", "layers", "smallest")
pytestmark = pytest.mark.slow
PLAN = Plan(LENSES, ("lora", "ia3"), (0, 1), controls=2, rows=4)


@pytest.fixture(scope="module", autouse=True)
def few_parts() -> Iterator[None]:
    """Fewer subspaces and draws, so that a run takes seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bases, "RANKS", (2,))
        patch.setattr(bases, "SHARED_RANKS", (8, 64))
        patch.setattr(families, "DRAWS", 2)
        yield


@pytest.fixture(scope="module")
def settings(tiny_folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """Two families and two seeds, fitted."""
    found = Settings(model=str(tiny_folders["qwen3"]), out=tmp_path_factory.mktemp("runs"), **SMALL)
    for family in ("lora", "ia3"):
        for seed in (0, 1):
            wanted = Settings(**{**vars(found), "adapter": family, "seed": seed})
            with Fitting(wanted) as run:
                _ = run.fitted
    return found


@pytest.fixture(scope="module")
def done(settings: Settings) -> tuple[ablations.Report, Path]:
    return ablate.run(settings, PLAN)


# -------------------------------------------------------------------- the run


def test_every_variant_has_a_row_with_interval_and_null_on_both_probes(done: tuple[ablations.Report, Path]) -> None:
    report, place = done
    table = pl.read_parquet(place / "ablations.parquet")
    assert table.equals(report.table) and table.schema == pl.Schema(ablation_numbers.SCHEMA)
    measured = table.filter(pl.col("unavailable").is_null())
    for column in ("n", "mean", "low", "high", "null_mean", "null_low", "null_high", "energy", "frobenius"):
        assert measured[column].null_count() == 0, column
    assert set(table["lens"]) == {"whole", *LENSES} and set(table["family"]) == {"lora", "ia3"}
    assert set(table["seed"]) == {0, 1} and set(table["alpha"]) == {1.0, -1.0, None}
    assert table.group_by("probe").agg(pl.col("n").drop_nulls().n_unique())["n"].to_list() == [1, 1], "the same rows"


def test_results_are_on_test_rows_and_choices_on_dev_rows(done: tuple[ablations.Report, Path]) -> None:
    _, place = done
    for file in (place / "ablate").glob("*.parquet"):
        assert not [name for name in pl.read_parquet(file)["cluster"].unique() if is_dev(name)], file


def test_variants_that_do_not_exist_say_why(done: tuple[ablations.Report, Path]) -> None:
    missing = done[0].table.filter(pl.col("unavailable").is_not_null())
    assert missing["n"].null_count() == len(missing)
    reasons = set(missing["unavailable"])
    assert any("residual stream" in reason for reason in reasons), "K = 64 of a model of width 64"


def test_keep_and_drop_of_a_layer_are_the_two_layers_of_the_slice(done: tuple[ablations.Report, Path]) -> None:
    table = done[0].table.filter((pl.col("lens") == "layers") & (pl.col("family") == "lora"))
    keep, drop = (table.filter((pl.col("layer") == layer) & (pl.col("operation") == operation)).sort("seed", "probe",
                  "alpha")["mean"] for layer, operation in ((1, "keep"), (2, "drop")))  # fmt: skip
    assert len(keep) and keep.to_list() == pytest.approx(drop.to_list(), abs=1e-5)


def test_a_second_run_measures_nothing_and_writes_the_same(
    done: tuple[ablations.Report, Path], settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    report, place = done
    before = (place / "ablations.md").read_text()

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("scored again")

    monkeypatch.setattr(ablate, "score", refuse)
    again, _ = ablate.run(settings, PLAN)
    assert again.summary.equals(report.summary) and (place / "ablations.md").read_text() == before


def test_only_the_parts_that_are_asked_for_are_measured(
    settings: Settings, done: tuple[ablations.Report, Path], tmp_path: Path
) -> None:
    shutil.copytree(settings.out, tmp_path / "copy")
    elsewhere = Settings(**{**vars(settings), "out": tmp_path / "copy"})
    plan = Plan(("layers", "native"), ("lora",), (0,), controls=2, rows=4, parts=("layer 1",))
    report, place = ablate.run(elsewhere, plan)
    of_layers, other = (report.table.filter(pl.col("lens") == name) for name in ("layers", "native"))
    assert set(of_layers["part"]) == {"layer 1"} and other["part"].n_unique() > 1, "a lens without such a part is whole"
    full = done[0].table.filter((pl.col("family") == "lora") & (pl.col("seed") == 0) & (pl.col("part") == "layer 1"))
    keys = ["operation", "draw", "probe", "alpha"]
    assert of_layers.sort(keys)["mean"].to_list() == pytest.approx(full.sort(keys)["mean"].to_list(), abs=1e-5)
    assert "layer 1" in (place / "ablations.md").read_text()
    with pytest.raises(UserError, match=r"no chosen lens has a part 'layer 9'. Parts are, for example: .*layer 1"):
        ablate.run(elsewhere, Plan(("layers",), ("lora",), (0,), controls=2, rows=4, parts=("layer 9",)))


def test_a_part_that_is_named_like_one_of_the_whole_leaves_the_whole_complete(
    settings: Settings, done: tuple[ablations.Report, Path], tmp_path: Path
) -> None:
    """The lens `modules` and the whole direction both have residual writes; all shares are read against the whole."""
    shutil.copytree(settings.out, tmp_path / "copy")
    elsewhere = Settings(**{**vars(settings), "out": tmp_path / "copy"})
    plan = Plan(("modules",), ("lora",), (0,), controls=2, rows=4, parts=("residual writes",))
    table = ablate.run(elsewhere, plan)[0].table
    wholes, modules = (table.filter(pl.col("lens") == name)["part"] for name in ("whole", "modules"))
    full = done[0].table.filter(pl.col("lens") == "whole")["part"]
    assert set(wholes) == set(full) == {"direction", "residual writes"} and set(modules) == {"residual writes"}


def test_a_killed_lens_continues_with_the_variants_that_it_has(
    settings: Settings, done: tuple[ablations.Report, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(settings.out, tmp_path / "copy")
    elsewhere = Settings(**{**vars(settings), "out": tmp_path / "copy"})
    plan = Plan(("norm",), ("lora",), (0,), controls=2, rows=4)
    written, scored = [], ablate.write_table

    def dies(path: Path, table: pl.DataFrame) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(ablate, "write_table", dies)
    with pytest.raises(KeyboardInterrupt):
        ablate.run(elsewhere, plan)
    monkeypatch.setattr(ablate, "write_table", scored)
    from ws.measure import score as engine  # noqa: PLC0415

    monkeypatch.setattr(engine, "write_table", lambda path, table: written.append(path))
    report, _ = ablate.run(elsewhere, plan)
    assert not written and len(report.table.filter(pl.col("lens") == "norm")), "every variant was on disk"
    assert done[0].families == ["lora", "ia3"]


def test_the_page_has_the_table_of_the_replicated_work_and_every_lens(done: tuple[ablations.Report, Path]) -> None:
    report, place = done
    text = (place / "ablations.md").read_text()
    assert "| adapter | alpha | full change | residual-write change | raw / residual |" in text
    for lens in ("whole", *LENSES):
        assert f"## {lens}: " in text
    assert "cannot be told: the change of the residual writes is within" in text, "a random model has no effects"
    brief = ablations.in_brief(ablations.projection_table(report, report.own))
    assert len(brief.rows) == 2 * 3 and {len(row) for row in brief.rows} == {len(brief.header)}
    stored = json.loads((place / "ablations.json").read_text())
    assert stored == json.loads(json.dumps(ablations.as_json(report))) and stored["families"] == ["lora", "ia3"]
    csv = pl.read_csv(place / "ablations_summary.csv", infer_schema_length=None)
    assert len(csv) == len(report.summary) and set(csv["seeds"]) >= {2}


def test_the_command_prints_a_plan_json_and_one_line_errors(
    settings: Settings, done: tuple[ablations.Report, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["ablate", "--model", settings.model, "--out", str(settings.out), "--families", "lora", "ia3", "--seeds",
              "0", "1", "--rows", "4", "--controls", "2", "--lens", *LENSES]  # fmt: skip
    assert _main([*common, "--plan"]) == 0
    assert "variants of a run: " in capsys.readouterr().out
    assert _main([*common, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["sentences"] == ablations.sentences(done[0])
    for wrong, said in (
        (["--seeds", "7"], "ws diff --model"), (["--lens", "hat"], "no lens 'hat'"),
        (["--controls", "1"], "too few for a band"), (["--families", "lorra"], "lorra"),
    ):  # fmt: skip
        assert _main([*common, *wrong]) == 2
        printed = capsys.readouterr().err.strip()
        assert said in printed and "\n" not in printed


def test_the_level_probe_asks_every_headline_item_in_all_four_ways() -> None:
    subject = behaviour.load("sycophancy")
    probe = instrument.level_probe("choice", subject, 5)
    assert len(probe.rows) == 5 * 4 and len({row.cluster for row in probe.rows}) <= 5
    assert sum(row.label for row in probe.rows) == 0, "a Yes-bias cancels"
    assert {row.group.split("/")[0] for row in probe.rows} == {subject.probe.headline}
    assert instrument.level_probe("replies", subject, 5) == instrument.replies(subject, 5)


# -------------------------------------------------------------------- numbers


def scores(effects: Mapping[tuple[str, int | None], float], noise: float = 0.05, rows: int = 40) -> pl.DataFrame:
    """A table in which an edit moves rows by its effect times alpha (and noise), of two probes."""
    rng, records = np.random.default_rng(0), []
    for probe in ("own", "dilemmas"):
        for row in range(rows):
            key = {"probe": probe, "group": "g", "row": f"{row}", "cluster": f"c{row // 2}", "context": "plain",
                   "data_seed": None, "metric": "logratio", "label": 1 if row % 2 else -1}  # fmt: skip
            base = float(rng.normal())
            records.append({**key, "edit": BASE, "alpha": 0.0, "seed": None, "value": base})
            for (edit, draw), effect in effects.items():
                for alpha in (1.0, -1.0):
                    moved = (effect * alpha + noise * float(rng.normal())) * key["label"]
                    records.append({**key, "edit": edit, "alpha": alpha, "seed": draw, "value": base + moved})
    return pl.DataFrame(records, schema=SCHEMA)


def measured(effects: Mapping[tuple[str, str, str, int | None], float], seed: int = 0, **options: Any) -> Measured:
    """One run whose variants (lens, part, operation, draw) have these effects."""
    described = tuple(
        {"lens": lens, "part": part, "operation": operation, "draw": draw, "edit": f"{lens}: {part}: {operation}",
         "available": True, "reason": "", "k": 4, "layer": None, "module": None, "remark": "", "energy": 0.5,
         "energy_of_whole": 0.5, "frobenius": 0.7, "parameters": 2,
         "whole": "writes" if lens == "projection" else "direction"}
        for lens, part, operation, draw in effects
    )  # fmt: skip
    table = scores({(one["edit"], one["draw"]): value for one, value in zip(described, effects.values(), strict=True)},
                   **options)  # fmt: skip
    return Measured("lora", seed, "whole", described, table)


WHOLE = {
    ("whole", "direction", "full", None): 2.0, ("whole", "residual writes", "keep", None): 1.0,
    **{("whole", part, "random", draw): 0.05 * (-1) ** draw for part in ("direction", "residual writes")
       for draw in range(6)},
}  # fmt: skip
PART = {
    ("projection", "K = 4", "keep", None): 0.25, ("projection", "K = 4", "complement", None): 0.75,
    ("projection", "K = 4", "random", 0): 0.02, ("projection", "K = 4", "random", 1): 0.04,
}  # fmt: skip


def rows_of(table: pl.DataFrame, operation: str, probe: str = "own", alpha: float | None = None) -> dict[str, Any]:
    (found,) = table.filter(
        (pl.col("lens") == "projection") & (pl.col("operation") == operation) & (pl.col("probe") == probe)
        & pl.col("alpha").eq_missing(alpha)
    ).to_dicts()  # fmt: skip
    return found


def test_retained_is_the_share_of_the_whole_change_on_the_same_rows() -> None:
    table = ablation_numbers.table([measured(WHOLE | PART)])
    keep, rest = rows_of(table, "keep"), rows_of(table, "complement")
    assert keep["retained"] == pytest.approx(0.125, abs=0.02) and keep["of_writes"] == pytest.approx(0.25, abs=0.04)
    assert rest["of_writes"] == pytest.approx(0.75, abs=0.04)
    assert keep["of_writes_low"] < keep["of_writes"] < keep["of_writes_high"]
    assert keep["null_mean"] == pytest.approx(0.03, abs=0.02), "the null of a part is its twins"
    assert rest["null_mean"] == pytest.approx(0.0, abs=0.02), "of the rest: random directions like the writes"
    for alpha, sign in ((1.0, 1), (-1.0, -1)):
        one = rows_of(table, "keep", alpha=alpha)
        assert one["mean"] == pytest.approx(0.25 * sign, abs=0.05) and one["of_writes"] == pytest.approx(0.25, abs=0.05)


@pytest.mark.parametrize(
    ("changed", "options", "reason"),
    [
        ({("whole", "residual writes", "keep", None): 0.0}, {}, "the residual writes is within its noise"),
        ({("whole", "residual writes", "keep", None): 0.3, ("whole", "residual writes", "random", 0): 1.0,
          ("whole", "residual writes", "random", 1): -1.0}, {}, "within the band of random directions"),
        ({("whole", "residual writes", "keep", None): 0.3}, {"noise": 8.0}, "within its noise"),
    ],
)  # fmt: skip
def test_ratios_to_a_denominator_that_says_nothing_are_suppressed(
    changed: dict[Any, float], options: dict[str, Any], reason: str
) -> None:
    found = rows_of(ablation_numbers.table([measured(WHOLE | PART | changed, **options)]), "keep")
    assert found["of_writes"] is None and found["of_writes_low"] is None and reason in found["of_writes_suppressed"]
    assert found["mean"] is not None and found["n"] == 40, "the change itself is still there"


def test_over_seeds_the_interval_is_over_seeds_and_one_suppressed_seed_suppresses_the_ratio() -> None:
    runs = [measured(WHOLE | PART | {("projection", "K = 4", "keep", None): 0.2 + 0.05 * seed}, seed=seed)
            for seed in range(3)]  # fmt: skip
    line = rows_of(ablation_numbers.summary(ablation_numbers.table(runs)), "keep")
    assert line["seeds"] == 3 and line["of_writes"] == pytest.approx(0.25, abs=0.03)
    expected = stats.over_seeds([0.2, 0.25, 0.3])
    assert line["of_writes_high"] - line["of_writes_low"] == pytest.approx(expected.high - expected.low, rel=0.4)
    silent = measured(WHOLE | PART | {("whole", "residual writes", "keep", None): 0.0}, seed=3)
    line = rows_of(ablation_numbers.summary(ablation_numbers.table([*runs, silent])), "keep")
    assert line["of_writes"] is None and "noise" in line["of_writes_suppressed"] and line["mean"] is not None


def test_variants_with_other_rows_and_uncounted_dilemmas_are_caught() -> None:
    table = scores({("x", None): 1.0})
    with pytest.raises(ValueError, match="rows of own differ"):
        ablation_numbers.changes(table.filter((pl.col("edit") == BASE) | (pl.col("row") != "3")), "own")
    filler = table.with_columns(group=pl.when(pl.col("row") == "3").then(pl.lit(FILLER)).otherwise("group"))
    assert len(ablation_numbers.changes(filler, "dilemmas").clusters) == 39


def test_paired_ratios_cover_the_truth_and_a_whole_over_itself_is_one() -> None:
    rng, inside = np.random.default_rng(1), 0
    clusters = np.repeat(np.arange(30), 3)
    for trial in range(120):
        shared = rng.normal(1.0, 1.0, size=30)[clusters]
        whole, part = shared + rng.normal(0, 0.3, 90), 0.4 * shared + rng.normal(0, 0.3, 90)
        found, same = stats.ratios(np.stack([part, whole]), whole, clusters, seed=trial)
        inside += found.low <= 0.4 <= found.high
        assert (same.mean, same.low, same.high) == pytest.approx((1.0, 1.0, 1.0))
    assert inside / 120 > 0.88
    (alone,) = stats.ratios(part[None], whole, np.zeros(90))
    assert math.isnan(alone.low)


# -------------------------------------------------------------------- sentences


@pytest.mark.parametrize(
    ("inside", "outside", "matched", "said"),
    [
        (0.07, 0.89, 0.30, "mostly outside S"),
        (0.47, 0.64, 1.14, "divided between S and the rest; potent when amplified"),
        (-0.01, 0.69, 1.57, "divided between S and the rest; potent when amplified"),
        (0.9, 0.1, 1.0, "mostly inside S"),
        (0.9, 0.8, 1.0, "S or the rest is enough, so it cannot be placed"),
        (0.1, 0.2, 0.5, "neither S nor the rest is enough"),
        (None, 0.5, 1.0, "cannot be told: too small"),
    ],
)
def test_readings_follow_the_rule(inside: float | None, outside: float, matched: float, said: str) -> None:
    def line(value: float | None) -> dict[str, Any]:
        return {"retained": value, "beyond_null": True, "unavailable": None,
                "suppressed": None if value is not None else "too small"}  # fmt: skip

    assert ablations.reading("S", line(inside), line(outside), line(matched)) == said


def test_a_part_within_its_twins_is_called_no_more_than_random() -> None:
    weak = {"retained": 0.1, "beyond_null": False, "unavailable": None, "suppressed": None}
    said = ablations.reading("S", weak, {**weak, "retained": 0.9}, None)
    assert said == "mostly outside S; not distinct from random parts of equal norm"
    absent = {**weak, "retained": None, "unavailable": "it has no writes"}
    assert ablations.reading("S", absent, absent, None) == "cannot be told: it has no writes"


def test_figures_show_every_family_and_are_left_out_without_numbers(tmp_path: Path) -> None:
    lines = [
        {"family": family, "lens": lens, "part": part, "operation": operation, "layer": layer, "retained": 0.5,
         "retained_low": 0.4, "retained_high": None, "energy": 0.3, "frobenius": 0.5}
        for family in ("lora", "delora") for operation in ("keep", "drop", "random")
        for lens, part, layer in (("layers", "layer 1", 1), ("layers", "layer 2", 2), ("modules", "mlp", None))
    ]  # fmt: skip
    shown = pl.DataFrame(lines)
    for name, draw, _ in ablations.FIGURES:
        assert draw(shown, tmp_path / name) and (tmp_path / name).read_bytes().startswith(b"\x89PNG")
        assert not draw(shown.with_columns(retained=pl.lit(None, dtype=pl.Float64)), tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


def test_a_missing_run_names_the_command_that_makes_it(settings: Settings, tmp_path: Path) -> None:
    elsewhere = Settings(**{**vars(settings), "out": tmp_path})
    with pytest.raises(UserError, match="Make it with: ws diff"):
        ablate.run(elsewhere, PLAN)
    assert not run_path(elsewhere, behaviour.load("sycophancy")).exists(), "nothing was made"
