"""Many runs of one behaviour: adapter families x training seeds x data seeds, and the table that compares them.

Every cell is an ordinary run folder, so a sweep resumes, and single runs are part of it. Runs of one data seed share
their sampled responses. A cell that fails is reported and the rest go on. Seeds are the replicates: a mean over seeds
has a t interval over seeds, beside the interval over rows that each run has.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.table import Table

from ws import adapters
from ws.base import console, stats
from ws.base.errors import UserError
from ws.base.store import atomic_file, write_json, write_text
from ws.eval import dilemmas
from ws.fitting import behaviour
from ws.fitting.run_settings import Settings, run_path, stored_in
from ws.fitting.stages import FittedRun
from ws.model.loading import ChatModel
from ws.report.findings import Summary
from ws.runs.replicate import Replication


@dataclass(frozen=True)
class Cell:
    """One run of the sweep."""

    family: str
    seed: int
    data_seed: int

    @property
    def name(self) -> str:
        """How it is called in messages."""
        return f"{self.family}, seed {self.seed}, data seed {self.data_seed}"


@dataclass(frozen=True)
class Outcome:
    """A finished cell with its row of the table, or the error that ended it."""

    cell: Cell
    row: Mapping[str, Any] | None
    folder: Path | None = None
    error: str = ""


def run(
    settings: Settings, families: Sequence[str], seeds: Sequence[int], data_seeds: Sequence[int]
) -> tuple[list[Outcome], Path]:
    """Run all cells, write the tables one level above the runs, and return the outcomes and that folder."""
    for family in families:
        adapters.require_family(family)
    if not (families and seeds and data_seeds):
        raise UserError("the sweep has no cells", "Give at least one of --families, --seeds and --data-seeds.")
    dilemmas.load(settings.dilemmas, settings.rows)  # a wrong source is told before anything is fitted
    cells = [Cell(family, seed, data) for data in data_seeds for family in families for seed in seeds]
    model = settings.load()
    outcomes = []
    for number, cell in enumerate(cells):
        console.say(f"\n[{number + 1}/{len(cells)}] {cell.name}", style="bold")
        outcomes.append(_run_cell(_settings_of(settings, cell), cell, model))
    finished = [outcome for outcome in outcomes if outcome.row is not None]
    if not finished:
        raise UserError(f"no cell of the sweep finished; the first failed with: {outcomes[0].error}")
    assert finished[0].folder is not None
    place = finished[0].folder.parents[1]
    write_tables(place, outcomes)
    return outcomes, place


def _settings_of(settings: Settings, cell: Cell) -> Settings:
    """The settings of a cell; what an earlier run there was measured at beyond them stays part of it."""
    wanted = replace(settings, adapter=cell.family, seed=cell.seed, data_seed=cell.data_seed)
    config = run_path(wanted, behaviour.load(wanted.behaviour)) / "config.json"
    if not config.is_file():
        return wanted
    earlier = stored_in(config.parent)
    return replace(
        wanted,
        alphas=tuple(sorted({*wanted.alphas, *earlier["alphas"]})),
        control_seeds=max(wanted.control_seeds, earlier["control_seeds"]),
    )


def _run_cell(settings: Settings, cell: Cell, model: ChatModel) -> Outcome:
    try:
        with Replication(settings, model) as replication:
            summary = replication.report()
            return Outcome(cell, _row(cell, summary, replication.fitted), replication.folder.path)
    except UserError as error:
        console.warn(f"{cell.name}: {error}")
        return Outcome(cell, None, error=str(error))


def _row(cell: Cell, summary: Summary, run: FittedRun) -> dict[str, Any]:
    """The columns of the replicated work's tables, and what qualifies them."""
    numbers, moral = summary.numbers, summary.dilemmas
    changes, costs = numbers.change[summary.behaviour], numbers.side_effects["1"]
    return {
        "family": cell.family,
        "seed": cell.seed,
        "data_seed": cell.data_seed,
        "delta": changes["1"].mean,
        "delta_minus": changes["-1"].mean,
        "min_pmass": min(level.pmass for level in summary.own.values()),
        **{f"dilemmas_{key}": moral[key].mean for key in ("-1", "0", "1")},
        "dd_delta": numbers.dd_delta["1"].mean,
        "pmass_1": moral["1"].pmass,
        "facts_1": costs.facts,
        "kl_1": costs.kl,
        "norm": summary.direction_norm,
        **{name: summary.geometry[name] for name in ("cos_anti", "asymmetry", "drift_ratio", "cos_dw_m")},
        "lr": run.training.lr,
        "trainable": run.records["pos"].trainable_parameters,
        "seconds": sum(record.seconds for record in run.records.values()) + summary.seconds.get("eval", 0.0),
    }


# -------------------------------------------------------------------- tables

_MEASURES = (
    "delta", "delta_minus", "min_pmass", "dilemmas_-1", "dilemmas_0", "dilemmas_1", "dd_delta", "pmass_1", "facts_1",
    "kl_1", "norm", "cos_anti", "asymmetry", "drift_ratio", "cos_dw_m", "trainable", "seconds",
)  # fmt: skip


def by_family(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Mean and 95 % t interval over seeds of every measure, by family; one seed has no interval."""
    found = []
    for family in dict.fromkeys(row["family"] for row in rows):
        of_family = [row for row in rows if row["family"] == family]
        line: dict[str, Any] = {"family": family, "runs": len(of_family)}
        for name in _MEASURES:
            interval = stats.over_seeds([float(row[name]) for row in of_family])
            has_limits = len(of_family) > 1
            line[name] = interval.mean
            line[f"{name}_low"], line[f"{name}_high"] = (interval.low, interval.high) if has_limits else (None, None)
        found.append(line)
    return found


def rank_stability(rows: Sequence[Mapping[str, Any]], measure: str = "delta") -> dict[str, Any]:
    """How much the order of the families depends on the seed: Spearman's rho of all pairs of seeds.

    `ranks` holds the rank of every family (1 = largest) by replicate; replicates that lack a family are left out.
    """
    from scipy.stats import rankdata, spearmanr  # noqa: PLC0415 - slow import

    families = list(dict.fromkeys(row["family"] for row in rows))
    replicates: dict[tuple[int, int], dict[str, float]] = {}
    for row in rows:
        replicates.setdefault((row["seed"], row["data_seed"]), {})[row["family"]] = row[measure]
    whole = {key: values for key, values in replicates.items() if values.keys() == set(families)}
    ranks = {
        f"seed {seed}, data seed {data}": dict(
            zip(families, map(float, rankdata([-values[family] for family in families])), strict=True)
        )
        for (seed, data), values in whole.items()
    }
    keys = list(whole)
    rhos = [
        float(spearmanr([whole[a][f] for f in families], [whole[b][f] for f in families]).statistic)
        for number, a in enumerate(keys)
        for b in keys[number + 1 :]
        if len(families) > 2
    ]
    return {"ranks": ranks, "mean_rho": sum(rhos) / len(rhos) if rhos else None}


def write_tables(folder: Path, outcomes: Sequence[Outcome]) -> None:
    """`sweep_per_run.csv`, `sweep_summary.csv`, `sweep.json` and `sweep.md`."""
    rows = [outcome.row for outcome in outcomes if outcome.row is not None]
    summary = by_family(rows)
    stability = rank_stability(rows)
    failed = [{"cell": outcome.cell.name, "error": outcome.error} for outcome in outcomes if outcome.row is None]
    _write_csv(folder / "sweep_per_run.csv", rows)
    _write_csv(folder / "sweep_summary.csv", summary)
    write_json(
        folder / "sweep.json",
        {"per_run": rows, "by_family": summary, "rank_stability": stability, "failed": failed},
    )
    write_text(folder / "sweep.md", markdown(summary, stability, failed))


def _write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    with atomic_file(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as handle:
        writer = csv.DictWriter(handle, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


COLUMNS = (
    ("delta", "+1 minus 0", "+.2f"), ("min_pmass", "min pmass", ".3f"), ("dilemmas_-1", "dilemmas -1", "+.2f"),
    ("dilemmas_0", "0", "+.2f"), ("dilemmas_1", "+1", "+.2f"), ("dd_delta", "dd_delta", "+.2f"),
    ("pmass_1", "pmass @ +1", ".3f"), ("facts_1", "facts @ +1", ".3f"), ("kl_1", "KL @ +1", ".3f"),
    ("norm", "norm of dW", ".3g"), ("cos_anti", "cos_anti", "+.2f"), ("drift_ratio", "drift", ".2f"),
    ("trainable", "trainable", ",.0f"), ("seconds", "seconds", ".0f"),
)  # fmt: skip
"""Measure, heading and number format of the printed table."""


SHOWN = ("delta", "dd_delta", "min_pmass", "facts_1", "norm", "seconds")
"""What a terminal has room for."""


def cells_of(line: Mapping[str, Any], columns: Sequence[tuple[str, str, str]] = COLUMNS) -> list[str]:
    """One family's line as text: mean with its interval over seeds where there is one."""
    found = [str(line["family"]), str(line["runs"])]
    for name, _, form in columns:
        text = format(line[name], form)
        if name in ("delta", "dd_delta") and line[f"{name}_low"] is not None:
            text += f" [{line[f'{name}_low']:+.2f}, {line[f'{name}_high']:+.2f}]"
        found.append(text)
    return found


def show(summary: Sequence[Mapping[str, Any]]) -> None:
    """Print the cross-family table, the columns that a terminal has room for."""
    columns = [column for column in COLUMNS if column[0] in SHOWN]
    table = Table(title="adapter families", title_justify="left", header_style="bold")
    for heading in ("adapter", "runs", *(heading for _, heading, _ in columns)):
        table.add_column(heading, justify="left" if heading == "adapter" else "right")
    for line in summary:
        table.add_row(*cells_of(line, columns))
    console.show(table)


def markdown(
    summary: Sequence[Mapping[str, Any]], stability: Mapping[str, Any], failed: Sequence[Mapping[str, str]]
) -> str:
    """The cross-family table as Markdown."""
    head = ["adapter", "runs", *(heading for _, heading, _ in COLUMNS)]
    lines = [
        "# Adapter families",
        "",
        "| " + " | ".join(head) + " |",
        "|" + "---|" * len(head),
        *("| " + " | ".join(cells_of(line)) + " |" for line in summary),
        "",
        "Log-ratios in nats. Brackets: 95 % t interval over seeds; a single run has none. Seconds: both adapters and "
        "the evaluation.",
        "",
    ]
    if stability["mean_rho"] is not None:
        lines += [f"Order of the families between seeds: mean Spearman rho {stability['mean_rho']:.2f}.", ""]
    lines += [f"- failed: {entry['cell']}: {entry['error']}" for entry in failed]
    return "\n".join(lines) + "\n"
