"""Tasks on a Ray cluster. Ray schedules; this file says what a task needs, hands out shared values, and reads failures.

A task that was lost (its node or its process died) or failed is submitted again. Shared values are put into the object
store once, and every task gets a copy of its own. A small actor hears which tasks have started, for the progress bar.
"""

from __future__ import annotations

import contextlib
import math
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ws.base import console, extras, memory
from ws.base.errors import UserError
from ws.base.version import __version__
from ws.engines.tasks import Done, Shared, Task, ended, values_before

PATIENCE, HEALTH_PATIENCE = 5.0, 30.0
"""Seconds until an address counts as unreachable, and until what answers there must say that it is Ray."""
SMALLEST_SHARE = 0.01
"""The smallest fraction of a CPU that a task may ask for."""
NODE_PATIENCE = 120.0
"""Seconds within which every node must answer the first question."""


@dataclass(frozen=True)
class RayCluster:
    """A Ray cluster and what each task may use of it.

    address: "" starts Ray on this machine, "auto" finds a running one, `host:port` and `ray://host:port` name one.
    cpus, gpus: per task; fractions share one. retries: how often a lost or failed task is tried again. files: what
    every node must be able to read. check: called on every node before any task; returns a complaint or "".
    """

    address: str = ""
    cpus: float = 1.0
    gpus: float = 0.0
    retries: int = 2
    files: tuple[str, ...] = ()
    check: Callable[[], str] | None = None

    def __post_init__(self) -> None:
        shares = [("CPUs", self.cpus, "cpus", SMALLEST_SHARE), ("GPUs", self.gpus, "gpus", 0.0)]
        for unit, count, option, least in shares:
            if not (math.isfinite(count) and count >= least and (count <= 1 or count == int(count))):
                raise UserError(f"a run cannot use {count:g} {unit}",
                                f"Give --{option}-per-run a whole number, or a fraction of 1.")  # fmt: skip
        if self.retries < 0:
            raise UserError(f"--retries is {self.retries}", "Give 0 or more.")

    def run(self, tasks: Sequence[Task], shared: Shared) -> Iterator[Done]:
        """See `Engine.run`. Everything that still runs is cancelled if the caller stops early or is interrupted."""
        ray = library()
        with self._connected(ray):
            self._require_resources(ray)
            self._require_nodes(ray)
            yield from _Submission(ray, self, tasks, shared).results()

    # ---------------------------------------------------------------- the cluster

    @contextlib.contextmanager
    def _connected(self, ray: Any) -> Iterator[None]:
        self._require_reachable()
        options: dict[str, Any] = {"logging_level": "ERROR"}
        if not self.address.startswith("ray://"):
            options["log_to_driver"] = False
        if not self.address:
            options |= {"include_dashboard": False}
        try:
            with console.library_noise_muted():
                ray.init(address=self.address or "local", **options)
        except (ConnectionError, RuntimeError, ValueError, TimeoutError, ray.exceptions.RayError) as error:
            told = " ".join(str(error).split())[:300]
            raise UserError(
                f"cannot use the Ray cluster {self.address or 'on this machine'!r} ({told})",
                "Use the versions of the cluster. If it asks for a token, set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN.",
            ) from error
        try:
            yield
        finally:
            ray.shutdown()

    def _require_reachable(self) -> None:
        """Ask the address for a connection first, because Ray itself tries for a minute."""
        host, _, port = self.address.removeprefix("ray://").rpartition(":")
        if not host:
            return
        try:
            socket.create_connection((host, int(port)), timeout=PATIENCE).close()
        except (OSError, ValueError) as error:
            raise UserError(f"no Ray cluster answers at {self.address} ({_first_line(error)})",
                            "Check --address; start a cluster with: ray start --head") from error  # fmt: skip
        if not self.address.startswith("ray://"):
            self._require_healthy()

    def _require_healthy(self) -> None:
        """Ask Ray's own program whether the address is one of a cluster, because `ray.init` waits for ever if not."""
        words = [sys.executable, "-m", "ray.scripts.scripts", "health-check", "--address", self.address]
        try:
            code = subprocess.run(words, capture_output=True, timeout=HEALTH_PATIENCE, check=False).returncode
        except subprocess.TimeoutExpired:
            code = 1
        if code:
            raise UserError(
                f"what answers at {self.address} is not a Ray cluster that this machine may use",
                "Give the port of its head (6379 by default), or ray://HOST:10001. If it asks for a token, set "
                "RAY_AUTH_MODE=token and RAY_AUTH_TOKEN.",
            )

    def _require_resources(self, ray: Any) -> None:
        """A task that fits on no node would wait for ever."""
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        for resource, wanted, option in (("CPU", self.cpus, "cpus"), ("GPU", self.gpus, "gpus")):
            most = max((node.get(resource, 0.0) for node in nodes), default=0.0)
            if wanted > most:
                raise UserError(
                    f"no node of the cluster has {wanted:g} {resource}s: the largest of {len(nodes)} has {most:g}",
                    f"Lower --{option}-per-run, or add a node.",
                )
        if not any(node.get("CPU", 0) >= self.cpus and node.get("GPU", 0) >= self.gpus for node in nodes):
            raise UserError(f"no node has {self.cpus:g} CPUs and {self.gpus:g} GPUs at once",
                            "Lower --cpus-per-run or --gpus-per-run, or add a node.")  # fmt: skip

    def _require_nodes(self, ray: Any) -> None:
        """Every node has this version of the package, sees the files, and has no complaint."""
        place = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy
        asked = {}
        for node in ray.nodes():
            if node["Alive"]:
                at = place(node["NodeID"], soft=False)
                question = ray.remote(num_cpus=0, max_retries=0, scheduling_strategy=at)(_state_of_node)
                asked[question.remote(self.files, self.check)] = node["NodeManagerAddress"]
        answered, silent = ray.wait(list(asked), num_returns=len(asked), timeout=NODE_PATIENCE)
        if silent:
            raise UserError(f"the node {asked[silent[0]]} does not answer", "Remove it: ray stop, on that machine.")
        for reference in answered:
            node = asked[reference]
            try:
                version, unseen, complaint = ray.get(reference)
            except ray.exceptions.RayTaskError as error:
                raise UserError(f"the node {node} cannot run weight-steering ({_cause(error)})",
                                "Install the same version there, with the extra ray.") from error  # fmt: skip
            except ray.exceptions.RayError as error:
                raise UserError(
                    f"the node {node} was lost ({explained(ray, error)})", "Run the command again."
                ) from error
            if version != __version__:
                raise UserError(f"the node {node} has weight-steering {version}, this machine {__version__}",
                                "Install the same version everywhere.")  # fmt: skip
            if unseen:
                raise UserError(f"the node {node} has no {unseen[0]}", "Put it in a folder that all nodes share.")
            if complaint:
                raise UserError(f"the node {node} {complaint}",
                                "Give a folder that all nodes share as --out, or a --store.")  # fmt: skip


class _Submission:
    """One list of tasks on a connected cluster."""

    def __init__(self, ray: Any, cluster: RayCluster, tasks: Sequence[Task], shared: Shared) -> None:
        if len({task.name for task in tasks}) < len(tasks):
            raise ValueError("two tasks have the same name")
        self.ray, self.cluster, self.tasks, self.shared = ray, cluster, tasks, shared
        self.stored: dict[str, Any] = {}
        self.done: dict[str, Done] = {}
        self.waiting: dict[str, Task] = {task.name: task for task in tasks}
        self.flying: dict[Any, tuple[Task, int]] = {}
        here = ray.get_runtime_context().get_node_id()
        at = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(here, soft=True)
        self.board = ray.remote(num_cpus=0, max_restarts=-1, scheduling_strategy=at)(_Board).remote()
        self.call = ray.remote(num_cpus=cluster.cpus, num_gpus=cluster.gpus, max_retries=0)(_called)

    def results(self) -> Iterator[Done]:
        try:
            with console.progress("tasks", len(self.tasks)) as bar:
                while self.waiting or self.flying:
                    self._submit_ready()
                    if not self.flying:
                        raise ValueError(f"tasks wait for what never ends: {', '.join(self.waiting)}")
                    ready, _ = self.ray.wait(list(self.flying), timeout=1.0)
                    for reference in ready:
                        if (finished := self._finished(reference)) is not None:
                            self.done[finished.task.name] = finished
                            bar.advance(note=self._note())
                            yield finished
                    bar.advance(0, note=self._note())
        finally:
            for reference in self.flying:
                with contextlib.suppress(self.ray.exceptions.RayError):
                    self.ray.cancel(reference, force=True)

    def _submit_ready(self) -> None:
        for task in [task for task in self.waiting.values() if ended(task, self.done)]:
            del self.waiting[task.name]
            self._submit(task, attempt=1)

    def _submit(self, task: Task, attempt: int) -> None:
        if task.needs not in self.stored:
            self.stored[task.needs] = self.ray.put(self.shared[task.needs]()) if task.needs else None
        reference = self.call.options(name=task.name).remote(
            task.function, self.stored[task.needs], task.arguments, values_before(task, self.done), task.name,
            self.board, max(1, int(self.cluster.cpus)),
        )  # fmt: skip
        self.flying[reference] = (task, attempt)

    def _finished(self, reference: Any) -> Done | None:
        """The end of a task; None if it is tried again."""
        task, attempt = self.flying.pop(reference)
        try:
            return Done(task, self.ray.get(reference), attempts=attempt)
        except self.ray.exceptions.RayError as error:
            told = explained(self.ray, error)
            if attempt <= self.cluster.retries:
                console.warn(f"{task.name}: {told}; attempt {attempt + 1} of {self.cluster.retries + 1}")
                self._submit(task, attempt + 1)
                return None
            return Done(task, error=told, attempts=attempt)

    def _note(self) -> str:
        try:
            started = self.ray.get(self.board.started.remote(), timeout=PATIENCE)
        except self.ray.exceptions.RayError:  # the node of the board died; Ray starts it anew
            started = []
        names = [task.name for task, _ in self.flying.values()]
        failed = sum(bool(one.error) for one in self.done.values())
        return f"{sum(name in started for name in names)} running, {len(self.done) - failed} done, {failed} failed"


class _Board:
    """Knows which tasks have started."""

    def __init__(self) -> None:
        self._names: set[str] = set()

    def start(self, name: str) -> None:
        self._names.add(name)

    def started(self) -> list[str]:
        return list(self._names)


def _called(
    function: Callable[..., Any], value: Any, arguments: Sequence[Any], before: Sequence[Any], name: str, board: Any,
    threads: int,
) -> Any:  # fmt: skip
    """Runs in a worker: the task with its own number of threads, and nothing printed."""
    import torch  # noqa: PLC0415 - heavy import, late

    board.start.remote(name)
    torch.set_num_threads(threads)
    with console.quiet():
        return function(value, *arguments, *before)


def _state_of_node(files: Sequence[str], check: Callable[[], str] | None) -> tuple[str, list[str], str]:
    """Runs on a node: its version of the package, the files that it lacks, and its complaint."""
    return __version__, [one for one in files if not Path(one).exists()], check() if check else ""


def explained(ray: Any, error: Exception) -> str:
    """One line that says what ended a task: too little memory, a lost node or process, bad input, or a bug."""
    kinds = ray.exceptions
    if isinstance(error, kinds.OutOfMemoryError):
        return "its node ran out of memory. Give each run more of a node with --cpus-per-run, or use larger nodes"
    if isinstance(error, kinds.RayTaskError):
        cause = error.cause
        if isinstance(cause, UserError):
            return str(cause)
        if memory.is_exhausted(cause):
            return "it ran out of memory. Use larger nodes, or a smaller --batch-size"
        if isinstance(cause, OSError) and cause.errno is not None:
            return f"{cause.filename or 'a file'}: {cause.strerror}"
        return f"a bug: {type(cause).__name__}: {_first_line(cause)}"
    if isinstance(error, kinds.NodeDiedError | kinds.ObjectLostError | kinds.OwnerDiedError):
        return "its node was lost"
    if isinstance(error, kinds.WorkerCrashedError | kinds.LocalRayletDiedError):
        return "its process or node died (killed from outside, or by the system for its memory)"
    return f"{type(error).__name__}: {_first_line(error)}"


def library() -> Any:
    """The Ray library."""
    try:
        import ray  # noqa: PLC0415 - optional extra, late
        import ray.util.scheduling_strategies  # noqa: PLC0415
    except ImportError as error:
        raise extras.missing("Ray", "ray") from error
    return ray


def _cause(error: Exception) -> str:
    return _first_line(getattr(error, "cause", None) or error)


def _first_line(error: object) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
