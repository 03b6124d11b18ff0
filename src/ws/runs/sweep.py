"""Many runs of one behaviour: adapter families x training seeds x data seeds, and the table that compares them.

Every cell is an ordinary run folder, so a sweep can resume and reuses single runs. Runs with the same data seed share
their sampled responses. If a cell fails, the failure is reported and the other cells still run. Seeds are the
replicates: a mean over seeds has a t interval over seeds. Each run also has its interval over rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ws import adapters
from ws.base import console
from ws.base.errors import UserError
from ws.eval import dilemmas
from ws.fitting import behaviour
from ws.fitting.run_settings import Settings, run_path, stored_in
from ws.fitting.stages import FittedRun
from ws.model.loading import ChatModel
from ws.report.findings import Summary
from ws.runs import sweep_tables
from ws.runs.replicate import Replication
from ws.runs.sweep_tables import Failure, SweepTables


@dataclass(frozen=True)
class Cell:
    """One run of the sweep."""

    family: str
    seed: int
    data_seed: int

    @property
    def name(self) -> str:
        """Its name in messages."""
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
        raise UserError("the sweep has no cells", "Give each of --families, --seeds and --data-seeds a value.")
    dilemmas.load(settings.dilemmas, settings.rows)  # report a wrong source before anything is fitted
    cells = [Cell(family, seed, data) for data in data_seeds for family in families for seed in seeds]
    model = settings.load()
    outcomes: list[Outcome] = []
    chosen: dict[str, float] = {}
    for number, cell in enumerate(cells):
        console.say(f"\n[{number + 1}/{len(cells)}] {cell.name}", style="bold")
        wanted = _settings_of(settings, cell)
        if wanted.train.get("lr") == "auto" and cell.family in chosen:
            wanted = replace(wanted, train={**wanted.train, "lr": chosen[cell.family]})
        outcomes.append(_run_cell(wanted, cell, model))
        if (row := outcomes[-1].row) is not None:
            chosen.setdefault(cell.family, row["lr"])
    finished = [outcome for outcome in outcomes if outcome.row is not None]
    if not finished:
        raise UserError(f"all cells of the sweep failed; the first with: {outcomes[0].error}")
    assert finished[0].folder is not None
    place = finished[0].folder.parents[1]
    sweep_tables.write(place, tables_of(outcomes))
    return outcomes, place


def tables_of(outcomes: Sequence[Outcome]) -> SweepTables:
    """The tables of the finished cells, and the list of failed ones."""
    failed = [Failure(outcome.cell.name, outcome.error) for outcome in outcomes if outcome.row is None]
    return sweep_tables.of([outcome.row for outcome in outcomes if outcome.row is not None], failed)


def _settings_of(settings: Settings, cell: Cell) -> Settings:
    """The settings of a cell, including the strengths and control seeds that an earlier run there already used."""
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
    """The columns of the replicated work's tables, with side effects and geometry."""
    numbers, moral = summary.numbers, summary.dilemmas
    changes, costs = summary.measured.change, numbers.side_effects["1"]
    return {
        "family": cell.family,
        "seed": cell.seed,
        "data_seed": cell.data_seed,
        "dilemmas": numbers.dilemma_counts.noun,
        "instrument": summary.ability.instrument,
        "delta": changes["1"].mean,
        "delta_minus": changes["-1"].mean,
        "yes_no": numbers.change[summary.behaviour]["1"].mean,
        "min_pmass": min(level.pmass for level in summary.own.values()),
        **{f"dilemmas_{key}": moral[key].mean for key in ("-1", "0", "1")},
        "dd_delta": numbers.dd_delta["1"].mean,
        "pmass_1": moral["1"].pmass,
        "facts_1": costs.facts,
        "kl_1": costs.kl,
        "nll_1": costs.nll_delta,
        "norm": summary.direction_norm,
        **{name: summary.geometry[name] for name in ("cos_anti", "asymmetry", "drift_ratio", "cos_dw_m")},
        "lr": run.training.lr,
        "trainable": run.records["pos"].trainable_parameters,
        "seconds": sum(summary.seconds.get(stage, 0.0) for stage in ("train-pos", "train-neg", "eval")),
    }
