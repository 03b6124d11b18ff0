"""Send a finished run to an experiment tracker: its training curves by step, and its final numbers.

Each tracker is called through its own client and with its own settings, so its environment variables and its login
apply. What is sent is read from the files of the run, so a run that was resumed, or made earlier, is sent whole.
"""

from __future__ import annotations

import importlib
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any, Literal, Protocol

from ws.base import console
from ws.base.errors import UserError
from ws.base.poles import POLES
from ws.base.store import read_config
from ws.report.findings import SUMMARY_FILE, Summary, read_summary
from ws.report.story import Training

Name = Literal["trackio", "wandb", "tensorboard", "mlflow"]
PROJECT = "weight-steering"


class Tracker(Protocol):
    """An open run of a tracker."""

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Send values at a step."""

    def finish(self, final: Mapping[str, float]) -> None:
        """Send the final numbers and close the run."""


class Trackio:
    """Trackio: a local database (`TRACKIO_DIR`), shown by `trackio show`."""

    def __init__(self, name: str, folder: Path, config: Mapping[str, Any]) -> None:
        self._client = _client("trackio")
        self._run = self._client.init(
            project=PROJECT, name=name, config={**config, "folder": str(folder)}, embed=False, auto_log_gpu=False,
            auto_log_cpu=False,
        )  # fmt: skip

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Send values at a step."""
        self._run.log(dict(metrics), step=step)

    def finish(self, final: Mapping[str, float]) -> None:
        """Send the final numbers and close the run."""
        self._run.log(dict(final))
        self._client.finish()


class Wandb:
    """Weights & Biases; `WANDB_MODE=offline` writes to a local folder."""

    def __init__(self, name: str, folder: Path, config: Mapping[str, Any]) -> None:
        self._run = _client("wandb").init(project=PROJECT, name=name, config={**config, "folder": str(folder)})

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Send values at a step."""
        self._run.log(dict(metrics), step=step)

    def finish(self, final: Mapping[str, float]) -> None:
        """Send the final numbers and close the run."""
        self._run.summary.update(dict(final))
        self._run.finish()


class TensorBoard:
    """TensorBoard: event files in the folder `tensorboard` of the run."""

    def __init__(self, name: str, folder: Path, config: Mapping[str, Any]) -> None:
        _client("tensorboard")
        writer = importlib.import_module("torch.utils.tensorboard").SummaryWriter
        self._writer = writer(str(folder / "tensorboard"))
        self._writer.add_text("run", f"{name}: {dict(config)}")

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Send values at a step."""
        for key, value in metrics.items():
            self._writer.add_scalar(key, value, step)

    def finish(self, final: Mapping[str, float]) -> None:
        """Send the final numbers and close the run."""
        self.log(final, 0)
        self._writer.close()


class MLflow:
    """MLflow; `MLFLOW_TRACKING_URI` says where, by default a local store."""

    def __init__(self, name: str, folder: Path, config: Mapping[str, Any]) -> None:
        self._client = _client("mlflow")
        self._client.set_experiment(PROJECT)
        self._client.start_run(run_name=name)
        self._client.log_params({**config, "folder": str(folder)})

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Send values at a step."""
        self._client.log_metrics(dict(metrics), step=step)

    def finish(self, final: Mapping[str, float]) -> None:
        """Send the final numbers and close the run."""
        self._client.log_metrics(dict(final))
        self._client.end_run()


TRACKERS: Mapping[Name, Callable[[str, Path, Mapping[str, Any]], Tracker]] = {
    "trackio": Trackio, "wandb": Wandb, "tensorboard": TensorBoard, "mlflow": MLflow,
}  # fmt: skip


def _client(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(
            f"--track {module} needs the package {module}, which cannot be imported ({error})",
            f"Install it with: pip install {module}",
        ) from error


def require(tracker: Name | None) -> None:
    """An error now, and not after hours of work, if the library of a tracker is missing."""
    if tracker is not None:
        _client(tracker)


def send(tracker: Name | None, folder: Path) -> None:
    """Send the run in a folder, as far as it is made; nothing without a tracker."""
    if tracker is None:
        return
    config = read_config(folder)
    naming = {key: config["settings"][key] for key in ("model", "behaviour", "adapter", "seed", "data_seed")}
    name = "-".join(map(str, naming.values())).replace("/", "-")
    summary = read_summary(folder) if (folder / SUMMARY_FILE).is_file() else None
    with _problems(tracker), redirect_stdout(sys.stderr):  # clients print; stdout may be for JSON
        run = TRACKERS[tracker](name, folder, naming)
        for step, metrics in curves(folder):
            run.log(metrics, step)
        run.finish({} if summary is None else final(summary))
    console.say(f"tracked     {name} in {tracker}")


@contextmanager
def _problems(tracker: Name) -> Iterator[None]:
    """A tracker that cannot be reached costs the tracking, never the run."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # each client has its own errors
        raise UserError(
            f"{tracker} took no more data: {type(error).__name__}: {' '.join(str(error).split())[:200]}",
            "The run is complete. Give the same command again, or without --track.",
        ) from error


def curves(folder: Path) -> Iterator[tuple[int, dict[str, float]]]:
    """Step -> values of the training of both sides, as far as they are trained, ascending."""
    by_step: dict[int, dict[str, float]] = {}
    for pole in POLES:
        if (folder / pole / "train_log.csv").is_file():
            for row in Training.read(folder / pole).log.iter_rows(named=True):
                for column in ("loss", "eval_loss", "lr", "grad_norm"):
                    if row[column] is not None:
                        by_step.setdefault(row["step"], {})[f"{pole}/{column}"] = row[column]
    yield from sorted(by_step.items())


def final(summary: Summary) -> dict[str, float]:
    """The final numbers of a run by name; a strength is spelled as in `summary.json`."""
    numbers = summary.numbers
    found: dict[str, float | None] = {"direction_norm": summary.direction_norm}
    for name, curve in ((summary.behaviour, summary.measured.change), ("dilemmas", numbers.dd_delta)):
        for key, change in curve.items():
            found |= {f"{name}/change/{key}": change.mean, f"{name}/low/{key}": change.low,
                      f"{name}/high/{key}": change.high}  # fmt: skip
    for key, costs in numbers.side_effects.items():
        found |= {f"side_effects/{name}/{key}": value for name, value in vars(costs).items()}
    found |= {f"seconds/{stage}": seconds for stage, seconds in summary.seconds.items()}
    return {name: float(value) for name, value in found.items() if value is not None and math.isfinite(value)}
