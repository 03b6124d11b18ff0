"""Time our way and a peer's way of the same work in turn, in one process, and keep medians with their range."""

from __future__ import annotations

import gc
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Way:
    """One way of doing a comparison's work: `work` does the whole of it once, and makes what it needs on first use."""

    name: str
    work: Callable[[], object]


@dataclass(frozen=True)
class Row:
    """One line of the table; `ours` and `theirs` are median seconds with (min, max) beside them.

    The peaks are MiB of resident memory that one run in a fresh process adds to the loaded model.
    """

    work: str
    peer: str
    size: str
    ours: float
    theirs: float
    ours_range: tuple[float, float]
    theirs_range: tuple[float, float]
    unit: str = "s"
    share_of_limit: float | None = None
    ours_peak: float | None = None
    theirs_peak: float | None = None
    note: str = ""

    @property
    def ratio(self) -> float:
        """How many times longer the peer takes."""
        return self.theirs / self.ours

    def as_record(self) -> dict[str, Any]:
        """Plain data for `results.json`."""
        return {**self.__dict__, "ratio": self.ratio}


def in_turn(ways: Iterable[Way], repeats: int, warm_up: int = 1) -> dict[str, list[float]]:
    """Seconds of every way, run in turn `repeats` times after `warm_up` rounds that are thrown away."""
    chosen = list(ways)
    times: dict[str, list[float]] = {way.name: [] for way in chosen}
    for number in range(repeats + warm_up):
        for way in chosen:
            spent = seconds(way.work)
            sys.stderr.write(f"{way.name}: {spent:.3g} s{'' if number >= warm_up else ' (warm-up)'}\n")
            if number >= warm_up:
                times[way.name].append(spent)
    return times


def seconds(work: Callable[[], object]) -> float:
    """Seconds of one run, after the garbage of earlier ones has been collected."""
    gc.collect()
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def row(
    work: str, peer: str, size: str, ours: list[float], theirs: list[float], *, flops: float | None = None,
    peak: float | None = None, memory: tuple[float | None, float | None] = (None, None), note: str = "",
) -> Row:  # fmt: skip
    """The line of one comparison; `flops` that are necessary and the measured `peak` (GFLOP/s) give our share of it."""
    median = statistics.median(ours)
    share = flops / median / 1e9 / peak if flops is not None and peak else None
    return Row(
        work, peer, size, median, statistics.median(theirs), (min(ours), max(ours)), (min(theirs), max(theirs)),
        share_of_limit=share, ours_peak=memory[0], theirs_peak=memory[1], note=note,
    )  # fmt: skip
