"""Commands of `ws` in processes of their own, which a test can kill: a server that has imported all forks them."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

PATIENCE = 300.0
"""Seconds after which a command counts as stuck."""

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["killing_preload"])


def _command(arguments: Sequence[str], log: str) -> None:
    with open(log, "ab", buffering=0) as file:  # noqa: PTH123 - its descriptor replaces the process's own
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    from ws.commands import cli  # noqa: PLC0415 - in the child only

    code = cli._main(list(arguments))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def start(arguments: Sequence[object], log: Path) -> BaseProcess:
    """A command that runs by itself; what it prints is appended to `log`."""
    process = _context.Process(target=_command, args=([str(one) for one in arguments], str(log)))
    process.start()
    return process


def finished(arguments: Sequence[object], log: Path) -> int:
    """Run a command to its end and return the exit code."""
    process = start(arguments, log)
    process.join(PATIENCE)
    assert process.exitcode is not None, f"the command is stuck:\n{log.read_text()}"
    return process.exitcode


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
        process.join(0.002)
    assert process.exitcode == 0, log.read_text()
    return False


def timed(arguments: Sequence[object], log: Path) -> float:
    """Seconds of a command that must succeed."""
    started = time.monotonic()
    assert finished(arguments, log) == 0, log.read_text()
    return time.monotonic() - started
