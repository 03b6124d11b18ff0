"""Check a run, a direction, an adapter folder or a model: are the files as built, up to date, whole, and not empty?

A target is checked in steps, from its files to its meaning. A later step needs the earlier ones, so the first failure
ends the check.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import polars as pl
import torch

from ws import adapters
from ws.adapters import diff
from ws.algebra.direction import Direction
from ws.base import console
from ws.base.errors import UserError
from ws.base.files import digest
from ws.base.poles import POLES
from ws.base.store import stage_records
from ws.export.lora import logit_error
from ws.fitting.run_settings import settings_of
from ws.model import loading
from ws.model.loading import ChatModel
from ws.model.weight_files import CONFIG
from ws.runs.inspection import Inspection

EXAMPLE = "out/pocket/sycophancy/lora/seed0"
ROUNDING = 1e-5
"""Relative gap between a stored direction and the difference of its adapters: sums in another order."""

LOGITS, HALF_PRECISION_LOGITS = 0.01, 0.5
"""Largest error of a logit of the adapter loaded by PEFT; the forward passes round differently."""


@dataclass(frozen=True)
class Check:
    """One thing that was looked at; `detail` is what was found, `remedy` is empty if it passed."""

    name: str
    passed: bool
    detail: str
    remedy: str = ""


def verify(target: Path, model: str | None = None) -> Iterator[Check]:
    """The checks of a run folder, a direction file, an adapter folder or a model, one by one; the last may have failed.

    model: the base of a direction or adapter, if it is not the one that the file names. It has no effect on runs.
    """
    if (target / "identity.json").is_file():
        found = _of_run(target)
    elif (target / CONFIG).is_file() or target.suffix == ".gguf":
        found = _of_model(target)
    elif adapters.is_adapter_folder(target):
        found = _of_adapter(target, model)
    elif target.is_dir():
        raise UserError(f"{target} is not a run, adapter or model folder", f"Give a folder such as {EXAMPLE}.")
    else:
        found = _of_direction(target, model)
    step = "read"
    try:
        for step, detail in found:
            yield Check(step, True, detail)
    except _FailedError as failure:
        yield Check(failure.step, False, failure.detail, failure.remedy)
    except UserError as error:
        yield Check(f"after {step}", False, str(error), "")


class _FailedError(Exception):
    """A check that did not pass."""

    def __init__(self, step: str, detail: str, remedy: str) -> None:
        super().__init__(detail)
        self.step, self.detail, self.remedy = step, detail, remedy


Passed = Iterator[tuple[str, str]]
"""Name and finding of every check that passed; one that did not raises."""


def _of_run(folder: Path) -> Passed:
    again = f"Build it again with: {console.command('report', folder)}"
    settings = settings_of(folder)
    recorded = stage_records(folder)
    if not recorded:
        raise _FailedError("stages", f"{folder} has no finished stage", again)
    for stage, record in recorded.items():
        for name, known in record["outputs"].items():
            if not (folder / name).exists():
                raise _FailedError(f"files of {stage}", f"{folder / name} is missing", again)
            if digest(folder / name) != known:
                raise _FailedError(f"files of {stage}", f"{folder / name} is not what the stage wrote", again)
        yield f"files of {stage}", f"{', '.join(record['outputs'])} unchanged"
    with Inspection(settings) as run:
        yield "base", f"{run.model.name} has the fingerprint {run.model.fingerprint}"
        for stage, changed in run.changed(recorded).items():
            if changed:
                raise _FailedError(f"inputs of {stage}", f"{stage} is out of date: {', '.join(changed)} changed", again)
        yield "inputs", f"{len(recorded)} stages are up to date"
        yield from _scores(folder, again)
        yield from _adapters_and_direction(run, again)


def _scores(folder: Path, again: str) -> Passed:
    for file in sorted(folder.glob("scores*.parquet")):
        values = pl.read_parquet(file)["value"]
        bad = len(values) - int(values.is_finite().sum())
        if bad or not len(values):
            raise _FailedError(file.name, f"{bad} of {len(values)} values are missing, NaN or infinite", again)
        yield file.name, f"{len(values)} finite values"


def _adapters_and_direction(run: Inspection, again: str) -> Passed:
    sides = {pole: run.folder / pole for pole in POLES}
    if not all(folder.is_dir() for folder in sides.values()):
        return
    tasks = {}
    for pole, folder in sides.items():
        tasks[pole] = diff.task_vector(run.model, folder)
        yield from _not_empty(f"adapter {pole}", tasks[pole], again)
        yield from _reloads(f"adapter {pole}", run.model, tasks[pole], folder)
    file = run.folder / "direction.safetensors"
    if not file.is_file():
        return
    direction = Direction.load(file).bind(run.model)
    yield from _not_empty("direction", direction, again)
    gap = (tasks["pos"] - tasks["neg"] - direction).norm() / direction.norm()
    if gap > ROUNDING:
        raise _FailedError("direction", f"it differs from pos - neg by {gap:.1e} of its norm", again)
    yield "direction", f"it is pos - neg (relative gap {gap:.0e})"


def _not_empty(name: str, direction: Direction, remedy: str) -> Passed:
    norm = direction.norm()
    if not math.isfinite(norm) or norm == 0:
        raise _FailedError(name, f"its norm is {norm:g}: it changes nothing", remedy)
    yield name, f"{len(direction.deltas)} parameters, norm {norm:.4g}"


def _of_model(place: Path) -> Passed:
    model = loading.load(str(place))  # a tensor that is missing, odd or not finite is an error
    yield "model", f"{model.parameter_count:,} parameters, finite logits, fingerprint {model.fingerprint}"


def _of_direction(file: Path, model: str | None) -> Passed:
    try:
        direction = Direction.load(file)
    except UserError:
        if file.suffix == ".safetensors":
            raise
        raise UserError(f"{file} is not a direction file", "Give a run folder, or the path of a result.") from None
    yield "file", f"{len(direction.deltas)} finite deltas of the base {direction.base}"
    named = model or direction.provenance.get("base", {}).get("name")
    if not isinstance(named, str):
        raise _FailedError("base", f"{file} does not name its base model", "Give it with --model.")
    bound = direction.bind(loading.load(named))
    yield "base", f"{named} has the fingerprint {direction.base}"
    yield from _not_empty("direction", bound, "Make the direction again.")


def _of_adapter(folder: Path, model: str | None) -> Passed:
    read = adapters.read(folder)
    yield "files", f"{len(read.tensors)} finite tensors"
    named = model or read.config.get("base_model_name_or_path")
    if not isinstance(named, str) or not named:
        raise _FailedError("base", f"{folder} does not name its base model", "Give it with --model.")
    base = loading.load(named)
    tau = diff.task_vector(base, folder)
    yield "base", f"every tensor belongs to {named}"
    yield from _not_empty("adapter", tau, "Train or export it again.")
    yield from _reloads("adapter", base, tau, folder)


def _reloads(name: str, base: ChatModel, tau: Direction, folder: Path) -> Passed:
    error = logit_error(base, tau, 1.0, folder)["max"]
    if not error <= (LOGITS if base.dtype == torch.float32 else HALF_PRECISION_LOGITS):
        raise _FailedError(name, f"the logits of PEFT differ by {error:.2g}", "Train or export the adapter again.")
    yield name, f"PEFT loads it to the same model (largest logit error {error:.1g})"
