"""Output for people: messages on stdout, progress and warnings on stderr.

All output goes through this module, so `--json` can silence stdout in one place. Work that takes longer than about two
seconds shows a progress bar, on stderr, so it never mixes with results.
"""

from __future__ import annotations

import re
import shlex
import time
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

T = TypeVar("T")

_HIDDEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
"""Control characters except tab and line feed (terminals obey them), and marks that reverse the order of a text."""


def visible(text: str) -> str:
    """The text with control characters spelled out: what a model or a file says cannot steer the terminal."""
    return _HIDDEN.sub(lambda found: f"\\x{ord(found[0]):02x}", text)


class _PlainConsole(Console):
    """A console that takes no markup and no emoji codes, and shows control characters instead of obeying them."""

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(visible(text), **options)


_out = _PlainConsole(highlight=False, soft_wrap=True, markup=False, emoji=False)
_err = _PlainConsole(stderr=True, highlight=False, soft_wrap=True, markup=False, emoji=False)
_quiet = False


@contextmanager
def quiet(on: bool = True) -> Iterator[None]:
    """Silence messages and progress while the block runs (used by `--json`); warnings and errors stay."""
    global _quiet  # noqa: PLW0603 - one process-wide switch, restored at the end of the block
    before, _quiet = _quiet, on
    try:
        yield
    finally:
        _quiet = before


def say(text: str = "", style: str = "") -> None:
    """Print one message for people on stdout, as plain text without markup."""
    if not _quiet:
        _out.print(Text(visible(text), style=style))


def write(text: str) -> None:
    """Print a piece of a text as it arrives, without a line end. Control characters are shown, never obeyed."""
    shown = "".join(one if one.isprintable() or one in "\n\t" else ascii(one)[1:-1] for one in text)
    _out.file.write(shown)
    _out.file.flush()


def command(*words: object) -> str:
    """A `ws` command, quoted so that it can be pasted into a shell."""
    return shlex.join(["ws", *map(str, words)])


def say_next(*commands: str) -> None:
    """Print the commands that can follow: complete, one per line, ready to paste."""
    for number, line in enumerate(commands):
        say(f"{'' if number else 'next':<12}{line}")


def show(renderable: object) -> None:
    """Print a rich table or panel on stdout."""
    if not _quiet:
        _out.print(renderable)


def print_json(text: str) -> None:
    """Print machine-readable output on stdout, also when `quiet`."""
    _out.print(Text(text))


def warn(text: str) -> None:
    """Print one warning on stderr."""
    _err.print(Text.assemble(("warning: ", "yellow"), visible(text)))


def fail(text: str) -> None:
    """Print one error line on stderr."""
    _err.print(Text.assemble(("ws: ", "red bold"), visible(text)))


class Bar:
    """Progress of one task: a live bar on a terminal, a line every few seconds in a log."""

    def __init__(self, description: str, total: float, live: Progress | None) -> None:
        self._description, self._total, self._live = description, total, live
        self._task = None if live is None else live.add_task(description, total=total, note="")
        self._done = 0.0
        self._next_line = time.monotonic() + LINE_EVERY

    def advance(self, steps: float = 1, note: str = "") -> None:
        """Advance by `steps`; `note` replaces the text after the bar."""
        self._done += steps
        if self._live is not None and self._task is not None:
            self._live.advance(self._task, steps)
            if note:
                self._live.update(self._task, note=note)
        elif self._description and not _quiet and time.monotonic() >= self._next_line:
            self._next_line = time.monotonic() + LINE_EVERY
            _err.print(Text(f"{self._description}: {self._done:g} of {self._total:g} {note}".rstrip()))


LINE_EVERY = 10.0
"""Seconds between progress lines if stderr is not a terminal."""


@contextmanager
def progress(description: str, total: float) -> Iterator[Bar]:
    """Show progress on stderr while the block runs; an empty description shows none."""
    if _quiet or not description or not _err.is_terminal:
        yield Bar(description, total, None)
        return
    live = Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", markup=False),
        console=_err,
        transient=True,
        refresh_per_second=4,
    )
    with live:
        yield Bar(description, total, live)


def track(items: Iterable[T], description: str, total: float) -> Iterator[T]:
    """Yield `items` under a progress bar."""
    with progress(description, total) as bar:
        for item in items:
            yield item
            bar.advance()


@contextmanager
def library_noise_muted() -> Iterator[None]:
    """Silence progress bars and log messages of the libraries; our own messages are enough."""
    from huggingface_hub.utils import logging as hub_logging  # noqa: PLC0415
    from transformers.utils import logging as transformers_logging  # noqa: PLC0415 - heavy import, late

    verbosity, hub_verbosity = transformers_logging.get_verbosity(), hub_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    hub_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        hub_logging.set_verbosity(hub_verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
