"""Several comparisons as tasks of an engine: every model with every behaviour, after the runs that it compares."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ws.base.errors import UserError
from ws.comparing import compare
from ws.comparing.compare import Plan, Result
from ws.engines import Task
from ws.fitting.run_settings import Settings
from ws.model.loading import ChatModel
from ws.runs import cells
from ws.runs.cells import Cell, Workplace


def run(wanted: Sequence[Settings], plan: Plan, place: Workplace | None = None) -> list[Result]:
    """One comparison per settings, in their order. A cluster first fits the missing runs, each as a task of its own."""
    place = place or Workplace()
    wanted = [place.settings(settings) for settings in wanted]
    names = [f"{one.behaviour} in {one.model}" for one in wanted]
    if repeated := next((name for name in names if names.count(name) > 1), None):
        raise UserError(f"{repeated} would be compared twice", "Give each of --models and --behaviours once.")
    peers = [(library, str(Path(file).expanduser().resolve())) for library, _, file in (
        peer.partition(":") for peer in plan.peers
    )]  # fmt: skip
    plan = replace(plan, peers=tuple(f"{library}:{file}" for library, file in peers))
    tasks, shared = list[Task](), {}
    for name, settings in zip(names, wanted, strict=True):
        fits = cells.fits_of(settings, _cells(plan), place) if place.engine == "ray" else []
        runs = [
            cells.folder_of(replace(settings, adapter=one.family, seed=one.seed, data_seed=one.data_seed))
            for one in _cells(plan)
        ]
        folder = runs[0].parents[1] / compare.folder_name(settings.dilemmas)
        comparison = Task(name, compared, (settings, plan, place, folder, runs),
                          settings.model, tuple(task.name for task in fits))  # fmt: skip
        tasks += [*fits, comparison]
        shared[settings.model] = place.model(settings)
    found: dict[str, Result] = {}
    with place.opened(wanted, [file for _, file in peers]) as engine:
        for done in engine.run(tasks, shared):
            if done.error:
                raise UserError(f"{done.task.name}: {done.error}" if place.engine == "ray" else done.error)
            if done.task.function is compared:
                settings, *_, folder, runs = done.task.arguments
                place.fetch(folder, settings.out, "comparison.json")
                for run in runs:
                    place.fetch(run, settings.out, "direction.safetensors")
                found[done.task.name] = replace(done.value, folder=folder)
    return [found[task.name] for task in tasks if task.function is compared]


def compared(
    model: ChatModel | None, settings: Settings, plan: Plan, place: Workplace, folder: Path, runs: Sequence[Path],
    *_: None,
) -> Result:  # fmt: skip
    """One comparison. Runs that are missing are fitted."""
    with place.working_on(settings, folder, runs=runs) as here:
        return place.patiently(lambda: compare.run(here, plan, model))


def _cells(plan: Plan) -> list[Cell]:
    return [Cell(family, seed, data) for family in plan.families for data in plan.data_seeds for seed in plan.seeds]
