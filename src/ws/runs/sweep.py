"""Many runs of one behaviour: adapter families x training seeds x data seeds, and the table that compares them.

Every cell is an ordinary run folder, so a sweep can resume and reuses single runs. If a cell fails, the failure is
reported and the other cells still run. Seeds are the replicates: a mean over seeds has a t interval over seeds. Each
run also has its interval over rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ws import adapters
from ws.base import console
from ws.base.errors import UserError
from ws.engines import Done
from ws.eval import dilemmas
from ws.fitting.run_settings import Settings
from ws.runs import cells, sweep_tables
from ws.runs.cells import Cell, Outcome, Workplace
from ws.runs.sweep_tables import Failure, SweepTables


def run(
    settings: Settings, families: Sequence[str], seeds: Sequence[int], data_seeds: Sequence[int],
    place: Workplace | None = None,
) -> tuple[list[Outcome], Path]:  # fmt: skip
    """Run all cells, write the tables one level above the runs, and return the outcomes and that folder."""
    for family in families:
        adapters.require_family(family)
    if not (families and seeds and data_seeds):
        raise UserError("the sweep has no cells", "Give each of --families, --seeds and --data-seeds a value.")
    cells.require_different(families=families, seeds=seeds, data_seeds=data_seeds)
    dilemmas.load(settings.dilemmas, settings.rows)  # report a wrong source before anything is fitted
    place = place or Workplace()
    settings = place.settings(settings)
    wanted = [Cell(family, seed, data) for data in data_seeds for family in families for seed in seeds]
    found: dict[Cell, Outcome] = {}
    with place.opened([settings]) as engine:
        for done in engine.run(*cells.tasks_of(settings, wanted, place)):
            if done.task.function is cells.measured:
                cell = Cell.of(done.task.arguments[0])
                found[cell] = _arrived(cell, done, place, settings)
    outcomes = [found[cell] for cell in wanted]
    finished = [outcome for outcome in outcomes if outcome.row is not None]
    if not finished:
        raise UserError(f"all cells of the sweep failed; the first with: {outcomes[0].error}")
    assert finished[0].folder is not None
    tables = finished[0].folder.parents[1]
    sweep_tables.write(tables, tables_of(outcomes))
    place.keep([tables / name for name in sweep_tables.FILES], settings.out)
    return outcomes, tables


def _arrived(cell: Cell, done: Done, place: Workplace, settings: Settings) -> Outcome:
    """The outcome of a finished task, with its folder on this machine."""
    error = done.error
    if not error:
        try:
            place.fetch(done.value.folder, settings.out, "summary.json")
            return done.value
        except UserError as refused:
            error = str(refused)
    console.warn(f"{cell.name}: {error}")
    return Outcome(cell, None, error=error)


def tables_of(outcomes: Sequence[Outcome]) -> SweepTables:
    """The tables of the finished cells, the list of failed ones, and what differs between their environments."""
    failed = [Failure(outcome.cell.name, outcome.error) for outcome in outcomes if outcome.row is None]
    rows = [outcome.row for outcome in outcomes if outcome.row is not None]
    return replace(sweep_tables.of(rows, failed), mixed=cells.mixed(outcomes))
