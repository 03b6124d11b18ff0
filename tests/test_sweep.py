"""Sweeps: cells are runs, a failed one does not stop the rest, tables say what the runs say."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from ws.base import stats
from ws.base.errors import UserError
from ws.base.poles import POLES
from ws.base.records import restore
from ws.commands.cli import _main
from ws.fitting.data import Grid
from ws.fitting.run_settings import Settings
from ws.fitting.train import FitResult
from ws.report.findings import read_summary
from ws.runs import cells, sweep, sweep_tables
from ws.runs.cells import Cell
from ws.runs.replicate import Replication
from ws.runs.sweep_tables import Failure, SweepTables, by_family, rank_stability

SMALL: dict[str, Any] = {
    "grid": Grid(topics=3, personas=2, samples=2),
    "train": {"rank": 2, "lora_alpha": 4, "lr": 5e-3, "batch_size": 8, "delora_lambda": 1.0, "block_size": 4},
    "sampling": {"max_new_tokens": 6},
    "alphas": (-1.0, 0.0, 1.0),
    "control_seeds": 1,
    "rows": 4,
    "samples": 1,
}


@pytest.fixture(scope="module")
def done(tiny_folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[cells.Outcome]]:
    settings = Settings(model=str(tiny_folders["qwen3"]), out=tmp_path_factory.mktemp("runs"), **SMALL)
    outcomes, place = sweep.run(settings, ("lora", "ia3", "oft"), (0, 1), (0,))
    return place, outcomes


def test_every_cell_is_a_run_folder_and_shares_its_data(done: tuple[Path, list[cells.Outcome]]) -> None:
    place, outcomes = done
    assert [(o.cell.family, o.cell.seed) for o in outcomes] == [
        (family, seed) for family in ("lora", "ia3", "oft") for seed in (0, 1)
    ]
    pairs = [(outcome.folder / "pairs.parquet").read_bytes() for outcome in outcomes if outcome.folder]
    assert len(pairs) == 6 and len(set(pairs)) == 1
    assert (place / "lora" / "seed0" / "summary.json").is_file()


def test_the_tables_hold_what_the_runs_found(done: tuple[Path, list[cells.Outcome]]) -> None:
    place, outcomes = done
    rows = list(csv.DictReader((place / "sweep_per_run.csv").open()))
    assert len(rows) == len(outcomes) == 6
    for row, outcome in zip(rows, outcomes, strict=True):
        assert outcome.folder is not None
        summary = json.loads((outcome.folder / "summary.json").read_text())
        assert float(row["yes_no"]) == pytest.approx(summary["change"]["sycophancy"]["1"]["mean"])
        assert float(row["dd_delta"]) == pytest.approx(summary["dd_delta"]["1"]["mean"])
        assert float(row["norm"]) == pytest.approx(summary["direction_norm"])
    lines = {row["family"]: row for row in csv.DictReader((place / "sweep_summary.csv").open())}
    of_lora = [float(row["delta"]) for row in rows if row["family"] == "lora"]
    assert float(lines["lora"]["delta"]) == pytest.approx(sum(of_lora) / 2)
    assert "| lora | 2 |" in (place / "sweep.md").read_text()


def test_the_seconds_of_a_cell_count_its_fits(done: tuple[Path, list[cells.Outcome]]) -> None:
    _, outcomes = done
    for outcome in outcomes:
        assert outcome.folder is not None and outcome.row is not None
        fits = [json.loads((outcome.folder / "stages" / f"train-{pole}.json").read_text()) for pole in POLES]
        assert outcome.row["seconds"] > sum(record["seconds"] for record in fits) > 0


def test_a_sweep_keeps_what_an_earlier_run_was_measured_at(tiny_folders: dict[str, Path], tmp_path: Path) -> None:
    wide = Settings(model=str(tiny_folders["qwen3"]), out=tmp_path, **SMALL | {"alphas": (-2.0, 0.0, 2.0)})
    with Replication(replace(wide, control_seeds=3)) as run:
        run.eval()
    asked = Settings(model=str(tiny_folders["qwen3"]), out=tmp_path, **SMALL)
    outcomes, _ = sweep.run(asked, ("lora",), (0,), (0,))
    assert outcomes[0].folder is not None
    after = pl.read_parquet(outcomes[0].folder / "scores.parquet")
    assert set(after["alpha"]) == {-2.0, -1.0, 0.0, 1.0, 2.0}
    assert after.filter(edit="random")["seed"].unique().sort().to_list() == [0, 1, 2]
    assert cells.settings_of(replace(asked, seed=1)).control_seeds == SMALL["control_seeds"]


def test_the_first_cell_of_a_family_chooses_its_learning_rate_and_the_others_use_it(
    tiny_folders: dict[str, Path], tmp_path: Path
) -> None:
    train = SMALL["train"] | {"lr": "auto", "lr_candidates": (1e-3, 2e-2), "validation": 0.2}
    settings = Settings(model=str(tiny_folders["qwen3"]), out=tmp_path, **SMALL | {"train": train})
    outcomes, _ = sweep.run(settings, ("lora",), (0, 1), (0,))
    first, second = (outcome.folder for outcome in outcomes)
    assert first is not None and (first / "lr_sweep.json").is_file()
    assert second is not None and not (second / "lr_sweep.json").exists()
    chosen = json.loads((first / "lr_sweep.json").read_text())["chosen"]
    assert [outcome.row["lr"] for outcome in outcomes if outcome.row] == [chosen, chosen]
    assert FitResult.read(second / "pos").steps == FitResult.read(first / "pos").steps


def test_the_changes_of_a_sweep_are_those_of_the_headline(done: tuple[Path, list[cells.Outcome]]) -> None:
    for outcome in done[1]:
        assert outcome.folder is not None and outcome.row is not None
        found = read_summary(outcome.folder)
        shown = found.numbers.instruments[found.ability.instrument].change
        assert (outcome.row["delta_minus"], outcome.row["delta"]) == (shown["-1"].mean, shown["1"].mean)
        assert outcome.row["yes_no"] == found.numbers.change["sycophancy"]["1"].mean


@pytest.mark.parametrize("command", ["replicate", "sweep", "compare"])
def test_a_missing_file_of_dilemmas_is_told_before_anything_is_fitted(
    tiny_folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    missing = str(tmp_path / "none.csv")
    arguments = ["--model", str(tiny_folders["qwen3"]), "--out", str(tmp_path), "--dilemmas", missing]
    assert _main([command, *arguments]) == 2
    assert "none.csv" in capsys.readouterr().err
    assert not list(tmp_path.rglob("pairs.parquet")) and not list(tmp_path.rglob("direction.safetensors"))


def test_a_second_sweep_builds_nothing(
    done: tuple[Path, list[cells.Outcome]], tiny_folders: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    place, _ = done
    stamps = {path: path.stat().st_mtime_ns for path in place.rglob("stages/*.json")}
    settings = Settings(model=str(tiny_folders["qwen3"]), out=place.parents[1], **SMALL)
    sweep.run(settings, ("lora", "ia3", "oft"), (0, 1), (0,))
    assert {path: path.stat().st_mtime_ns for path in place.rglob("stages/*.json")} == stamps
    assert len(stamps) > 30


def test_a_failed_cell_is_told_and_the_rest_go_on(
    tiny_folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["sweep", "--model", str(tiny_folders["gpt2"]), "--out", str(tmp_path), "--families", "oft", "lora",
                 "--topics", "2", "--personas", "1", "--samples", "2", "--max-new-tokens", "4", "--rank", "2",
                 "--rows", "2", "--shown", "1", "--control-seeds", "1"]  # fmt: skip
    assert _main(arguments) == 2
    told = capsys.readouterr()
    assert "1 of 2 cells failed" in told.err and "oft" in told.err and "lora" in told.out
    tables = json.loads(next(tmp_path.rglob("sweep.json")).read_text())
    assert [row["family"] for row in tables["per_run"]] == ["lora"] and "transposed" in tables["failed"][0]["error"]


def test_an_unknown_family_is_refused_before_anything_runs(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="unknown adapter family 'loar'"):
        sweep.run(Settings(out=tmp_path), ("loar",), (0,), (0,))
    assert not list(tmp_path.iterdir())


def line(family: str, seed: int, delta: float) -> dict[str, Any]:
    return {
        "family": family,
        "seed": seed,
        "data_seed": 0,
        "instrument": "replies",
        **dict.fromkeys(sweep_tables.MEASURES, 1.0),
        "delta": delta,
    }


def test_means_have_intervals_over_seeds_and_a_single_run_has_none() -> None:
    rows = [line("a", 0, 1.0), line("a", 1, 2.0), line("a", 2, 3.0), line("b", 0, 5.0)]
    a, b = by_family(rows)
    delta = a.measures["delta"]
    assert delta.mean == pytest.approx(2.0) and delta.low == pytest.approx(2 - 4.30265 / 3**0.5, rel=1e-4)
    assert (b.measures["delta"].mean, b.measures["delta"].low, b.runs) == (5.0, None, 1)


def test_a_sweep_is_shown_from_its_json(tmp_path: Path) -> None:
    rows = [line(family, seed, value + seed) for seed in (0, 1) for family, value in (("a", 1.0), ("b", 2.0), ("c", 3))]
    tables = sweep_tables.of(rows, [Failure("d, seed 0, data seed 0", "it diverged")])
    sweep_tables.write(tmp_path, tables)
    stored = restore(SweepTables, json.loads((tmp_path / "sweep.json").read_text()))
    assert stored == tables and stored.by_family[0].measures["delta"].mean == 1.5
    text = (tmp_path / "sweep.md").read_text()
    assert sweep_tables.markdown(stored) in text and "mean Spearman rho 1.00" in text
    spread = stats.over_seeds([1.0, 2.0])
    assert f"| a | 2 | +1.00 [+1.00, +1.00] | +1.50 [{spread.low:+.2f}, {spread.high:+.2f}] | +1.00" in text
    assert "Changes: log p(reply) - log p(opposite reply)" in text
    assert text.endswith("- failed: d, seed 0, data seed 0: it diverged\n")
    assert list(csv.DictReader((tmp_path / "sweep_summary.csv").open()))[2]["delta_low"] == str(
        stored.by_family[2].measures["delta"].low
    )


def test_rank_stability_is_one_for_the_same_order_and_minus_one_for_the_opposite() -> None:
    same = [line(f, seed, value + seed) for seed in (0, 1) for f, value in (("a", 1.0), ("b", 2.0), ("c", 3.0))]
    assert rank_stability(same).mean_rho == pytest.approx(1.0)
    assert rank_stability(same).ranks["seed 0, data seed 0"] == {"a": 3.0, "b": 2.0, "c": 1.0}
    turned = [line(f, 0, v) for f, v in (("a", 1.0), ("b", 2.0), ("c", 3.0))]
    turned += [line(f, 1, v) for f, v in (("a", 3.0), ("b", 2.0), ("c", 1.0))]
    assert rank_stability(turned).mean_rho == pytest.approx(-1.0)
    assert rank_stability(turned[:3]).mean_rho is None


def test_learning_rates_are_tried_and_the_best_is_kept(tiny_folders: dict[str, Path], tmp_path: Path) -> None:
    training = {**SMALL["train"], "lr": "auto", "lr_candidates": (1e-6, 2e-2)}
    settings = Settings(model=str(tiny_folders["qwen3"]), out=tmp_path, **{**SMALL, "train": training})
    with Replication(settings) as run:
        run.diff()
        record = json.loads((run.folder / "lr_sweep.json").read_text())
        assert run.training.lr == record["chosen"] == min(record["tried"], key=lambda row: row["mean"])["lr"]
        assert [row["lr"] for row in record["tried"]][:2] == [1e-6, 2e-2], "beyond the last one only while it is best"
        result = json.loads((run.folder / "pos" / "train_result.json").read_text())
        assert result["settings"]["lr"] == record["chosen"]


def test_cells_have_names() -> None:
    assert Cell("lora", 1, 2).name == "lora, seed 1, data seed 2"
