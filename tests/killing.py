"""Commands of `ws` in processes of their own, which a test can kill: a server that has imported all forks them."""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

PATIENCE = 300.0
"""Seconds after which a command counts as stuck."""

_SMALL_PLAN: dict[str, Any] = {
    "permutations": 0, "calibration_prompts": 2, "calibration_tokens": 4,
    "__annotations__": {"permutations": "int", "calibration_prompts": "int", "calibration_tokens": "int"},
}  # fmt: skip
"""What the command line cannot set of a comparison: without it, one would take minutes."""

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["killing_preload"])


def _command(arguments: Sequence[str], log: str, largest_file: int | None) -> None:
    with open(log, "ab", buffering=0) as file:  # noqa: PTH123 - its descriptor replaces the process's own
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # the server ignores it
    if largest_file is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    from ws.commands import cli  # noqa: PLC0415 - in the child only
    from ws.comparing import compare  # noqa: PLC0415

    compare.Plan = dataclass(frozen=True)(type("Plan", (compare.Plan,), _SMALL_PLAN))  # type: ignore[misc]
    cli.main(list(arguments))


@cache
def _serve() -> None:
    """Start the server with this folder on its path; without it, what it should import is silently left out."""
    known = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), *([known] if known else [])])
    try:
        forkserver.ensure_running()
    finally:
        os.environ.pop("PYTHONPATH") if known is None else os.environ.update(PYTHONPATH=known)


def start(arguments: Sequence[object], log: Path, largest_file: int | None = None) -> BaseProcess:
    """A command that runs by itself; what it prints is appended to `log`. largest_file: limit in bytes."""
    _serve()
    process = _context.Process(target=_command, args=([str(one) for one in arguments], str(log), largest_file))
    process.start()
    return process


def ended(process: BaseProcess, log: Path) -> int:
    """Exit code of a command, once it has ended."""
    process.join(PATIENCE)
    assert process.exitcode is not None, f"the command is stuck:\n{log.read_text()}"
    return process.exitcode


def finished(arguments: Sequence[object], log: Path) -> int:
    """Run a command to its end and return the exit code."""
    return ended(start(arguments, log), log)


def killed_when(arguments: Sequence[object], log: Path, is_time: Callable[[float], bool]) -> bool:
    """Start a command and kill it outright once `is_time(seconds since its start)`; False if it ended before."""
    process, started = start(arguments, log), time.monotonic()
    while process.is_alive():
        now = time.monotonic() - started
        assert now < PATIENCE, f"the command is stuck:\n{log.read_text()}"
        if is_time(now):
            process.kill()
            process.join()
            return process.exitcode == -signal.SIGKILL
        process.join(0.01)
    assert process.exitcode == 0, log.read_text()
    return False


def timed(arguments: Sequence[object], log: Path) -> float:
    """Seconds of a command that must succeed."""
    started = time.monotonic()
    assert finished(arguments, log) == 0, log.read_text()
    return time.monotonic() - started


def wait_for(pattern: str, folder: Path, process: BaseProcess) -> None:
    """Return once a file of this pattern is in the folder, or the command has ended."""
    started = time.monotonic()
    while process.is_alive() and not any(folder.rglob(pattern)):
        assert time.monotonic() - started < PATIENCE, f"{pattern} does not appear"
        process.join(0.01)
