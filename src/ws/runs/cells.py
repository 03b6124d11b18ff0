"""One run as a task of an engine: the same function on this machine and on a cluster.

A cell is an adapter family, a training seed and a data seed. The runs of a data seed share their responses, so a task
of its own samples them first. With `--lr auto`, the first run of a family chooses the rate, and the others take it.
"""

from __future__ import annotations

import getpass
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

from ws.base import console, environment
from ws.base.errors import FolderInUseError, UserError
from ws.base.files import content_key, read_json
from ws.base.store import REPRODUCE_FILE
from ws.engines import Engine, Local, Task
from ws.engines.ray_cluster import RayCluster
from ws.engines.store_mirror import StoreMirror
from ws.engines.tasks import Shared
from ws.fitting import behaviour
from ws.fitting.run_settings import Settings, run_path, stored_in
from ws.fitting.stages import FittedRun
from ws.model import library
from ws.model.loading import ChatModel
from ws.model.sources import model_slug
from ws.report.findings import Summary
from ws.runs.replicate import Replication

T = TypeVar("T")
POLL = 2.0
"""Seconds between looks at a folder that another process uses."""


@dataclass(frozen=True)
class Cell:
    """One run of a sweep."""

    family: str
    seed: int
    data_seed: int

    @classmethod
    def of(cls, settings: Settings) -> Cell:
        """The cell of a run."""
        return cls(settings.adapter, settings.seed, settings.data_seed)

    @property
    def name(self) -> str:
        """Its name in messages."""
        return f"{self.family}, seed {self.seed}, data seed {self.data_seed}"


@dataclass(frozen=True)
class Outcome:
    """A finished cell with its row of the table and the environment that built it, or the error that ended it."""

    cell: Cell
    row: Mapping[str, Any] | None
    folder: Path | None = None
    error: str = ""
    environment: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Workplace:
    """Where runs are worked on, and by whom.

    engine: as `--engine`. store: URL to which run folders are copied, or "". The others: see `RayCluster`.
    """

    engine: Literal["local", "ray"] = "local"
    address: str = ""
    cpus: float = 1.0
    gpus: float = 0.0
    retries: int = 2
    store: str = ""

    def __post_init__(self) -> None:
        if self.engine == "local" and (self.address or self.gpus):
            raise UserError("--address and --gpus-per-run are for a cluster", "Add --engine ray.")
        self._cluster((), None)  # refuses what makes no sense, whatever the engine

    def _cluster(self, files: Sequence[str], check: Callable[[], str] | None) -> RayCluster:
        return RayCluster(self.address, self.cpus, self.gpus, self.retries, tuple(files), check)

    @contextmanager
    def opened(self, wanted: Sequence[Settings], more_files: Sequence[str] = ()) -> Iterator[Engine]:
        """The engine for runs with these settings, once their folder or store is known to be usable."""
        out = wanted[0].out
        if self.store:
            StoreMirror(self.store, out).require_usable()
        if self.engine == "local":
            yield Local()
            return
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--out {out} cannot be a folder ({error.strerror})", "Choose another one.") from error
        files = {name for one in wanted for name in (one.model, one.behaviour, one.dilemmas, str(one.pairs or ""))}
        absolute = sorted(one for one in (*files, *more_files) if Path(one).is_absolute())
        shared = StoreMirror(self.store or str(out), out)
        with shared.marked() as mark:
            yield self._cluster(absolute, partial(_complaint, shared, mark))

    def settings(self, given: Settings) -> Settings:
        """Settings that mean the same on every machine: paths of the user are absolute."""
        if self.engine == "local":
            return given

        def place_of(name: str, is_name: bool) -> str:
            path = Path(name).expanduser()
            return name if is_name or not path.exists() else str(path.resolve())

        return replace(
            given,
            model=place_of(given.model, given.model in (*library.POCKET_MODELS, library.SMOLLM2)),
            behaviour=place_of(given.behaviour, given.behaviour in behaviour.names()),
            dilemmas=place_of(given.dilemmas, given.dilemmas == "own"),
            pairs=given.pairs.expanduser().resolve() if given.pairs else None,
            out=given.out.expanduser().resolve(),
            # without GPUs of its own, a run must not use one that this machine happens to have
            device="cpu" if given.device == "auto" and not self.gpus else given.device,
        )

    def model(self, settings: Settings) -> Callable[[], ChatModel | None]:
        """Loads what the tasks share; with GPUs nothing, because dtype and device depend on the node."""
        return (lambda: None) if self.gpus else settings.load

    @property
    def _out(self) -> Path | None:
        """Where a worker of a cluster keeps copies of what is in the store; None: where the settings say."""
        if self.engine == "local" or not self.store:
            return None
        return Path(tempfile.gettempdir()) / f"weight-steering-{getpass.getuser()}" / content_key(self.store)

    @contextmanager
    def working_on(
        self, settings: Settings, folder: Path, data: Sequence[Path] = (), runs: Sequence[Path] = ()
    ) -> Iterator[Settings]:
        """A folder to work in, and the settings with which it is found.

        Of the folders `data` only the responses are needed, of `runs` everything; they go back to the store, too.
        """
        here = replace(settings, out=self._out or settings.out)
        if not self.store:
            yield here
            return
        mirror, base = StoreMirror(self.store, here.out), here.out / model_slug(here.model) / "base"
        needed = [here.out / one.relative_to(settings.out) for one in runs]
        for one in (base, *needed):
            mirror.pull(one)
        for one in data:
            mirror.pull(here.out / one.relative_to(settings.out), only=_DATA)
        try:
            with mirror.working_in(here.out / folder.relative_to(settings.out)):
                yield here
        finally:
            for one in (base, *needed):
                mirror.push(one)

    def patiently(self, call: Callable[[], T]) -> T:
        """The result of `call`; on a cluster, another sweep may have the folder, and its result is waited for."""
        told = False
        while True:
            try:
                return call()
            except FolderInUseError as error:
                if self.engine == "local":
                    raise
                if not told:
                    console.warn(f"{error} Waiting for it.")
                told = True
                time.sleep(POLL)

    def fetch(self, folder: Path, out: Path, proof: str) -> None:
        """Bring a finished folder from the store to this machine; `proof` is a file that it must have."""
        if not self.store:
            return
        StoreMirror(self.store, out).pull(folder)
        if not (folder / proof).is_file():
            raise UserError(f"{folder} did not arrive in {self.store}", "Check that all nodes reach the same store.")

    def keep(self, files: Sequence[Path], out: Path) -> None:
        """Bring files of this machine, such as tables, to the store."""
        if self.store:
            StoreMirror(self.store, out).put(files)


def _complaint(shared: StoreMirror, mark: str) -> str:
    """Runs on a node: what is wrong with the folder or store that all nodes share, or nothing."""
    try:
        if not shared.sees(mark):
            return f"does not see the {shared.url} of this machine"
        with shared.marked():
            return ""
    except UserError as error:
        return f"cannot use {shared.url}: {error}"


_DATA = ("pairs.parquet", "personas.json", "identity.json", "stages/data.json", "stages/personas.json")


def require_different(**values: Sequence[object]) -> None:
    """Raise if one of several options names a value twice: a run cannot be its own replicate."""
    for name, some in values.items():
        for number, value in enumerate(some):
            if value in some[:number]:
                raise UserError(f"--{name.replace('_', '-')} names {value} twice", "Give each value once.")


def folder_of(settings: Settings) -> Path:
    """The run folder of settings."""
    return run_path(settings, behaviour.load(settings.behaviour))


# -------------------------------------------------------------------- tasks


def tasks_of(settings: Settings, cells: Sequence[Cell], place: Workplace) -> tuple[list[Task], Shared]:
    """The tasks of whole runs in their order: each after the sampling of its data, and after the choice of its rate."""
    found, first = list[Task](), dict[str, str]()
    for task in _with_sampling(settings, cells, place, measured):
        if task.function is measured and task.arguments[0].train.get("lr") == "auto":
            family = task.arguments[0].adapter
            leader = (first[family],) if family in first else ()
            first.setdefault(family, task.name)
            found.append(replace(task, after=(*task.after, *leader)))
        else:
            found.append(task)
    return found, {settings.model: place.model(settings)}


def fits_of(settings: Settings, cells: Sequence[Cell], place: Workplace) -> list[Task]:
    """The tasks of runs up to their Directions."""
    prefix = f"{settings.behaviour} in {settings.model}: "
    return [
        replace(task, name=prefix + task.name, after=tuple(prefix + name for name in task.after))
        for task in _with_sampling(settings, cells, place, fitted)
    ]


def _with_sampling(
    settings: Settings, cells: Sequence[Cell], place: Workplace, function: Callable[..., Any]
) -> Iterator[Task]:
    sampling: dict[int, Task] = {}
    for cell in cells:
        wanted = replace(settings, adapter=cell.family, seed=cell.seed, data_seed=cell.data_seed)
        data = cell.data_seed
        if data not in sampling:
            sampling[data] = Task(f"responses, data seed {data}", sampled, (wanted, place), settings.model)
            yield sampling[data]
        source = folder_of(sampling[data].arguments[0])
        yield Task(cell.name, function, (wanted, place, source), settings.model, (sampling[data].name,))


def sampled(model: ChatModel | None, settings: Settings, place: Workplace) -> None:
    """Make the pairs of a data seed, in the folder of the first run that needs them."""
    with (
        place.working_on(settings, folder_of(settings)) as here,
        place.patiently(lambda: Replication(settings_of(here), model)) as run,
    ):
        run.data()


def measured(
    model: ChatModel | None, settings: Settings, place: Workplace, data: Path, _: None, first: Outcome | None = None
) -> Outcome:
    """A whole run. first: the first run of the family, which has chosen the learning rate."""
    if first is not None and first.row is not None:
        settings = replace(settings, train={**settings.train, "lr": first.row["lr"]})
    with (
        place.working_on(settings, folder_of(settings), [data]) as here,
        place.patiently(lambda: Replication(settings_of(here), model)) as run,
    ):
        row = row_of(Cell.of(settings), run.report(), run.fitted)
        built = read_json(run.folder / REPRODUCE_FILE)["environment"]
        return Outcome(Cell.of(settings), row, folder_of(settings), environment=built)


def fitted(model: ChatModel | None, settings: Settings, place: Workplace, data: Path, _: None) -> None:
    """A run up to its Direction."""
    with (
        place.working_on(settings, folder_of(settings), [data]) as here,
        place.patiently(lambda: Replication(settings_of(here), model)) as run,
    ):
        run.diff()


def settings_of(settings: Settings) -> Settings:
    """The settings of a run, including the strengths and control seeds that an earlier run there already used."""
    config = folder_of(settings) / "config.json"
    if not config.is_file():
        return settings
    earlier = stored_in(config.parent)
    return replace(
        settings,
        alphas=tuple(sorted({*settings.alphas, *earlier["alphas"]})),
        control_seeds=max(settings.control_seeds, earlier["control_seeds"]),
    )


def mixed(outcomes: Sequence[Outcome]) -> tuple[str, ...]:
    """What differs between the environments of the runs, a line per environment that is not that of the first."""
    known = [outcome for outcome in outcomes if outcome.environment is not None]
    found: dict[tuple[str, ...], list[str]] = {}
    for outcome in known[1:]:
        assert known[0].environment is not None and outcome.environment is not None
        if different := environment.differences(known[0].environment, outcome.environment):
            found.setdefault(tuple(different), []).append(outcome.cell.name)
    return tuple(f"{', '.join(what)}: {'; '.join(names)}" for what, names in found.items())


def row_of(cell: Cell, summary: Summary, run: FittedRun) -> dict[str, Any]:
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
