"""Time our way and a peer's way of the same work in turn, in one process, and keep medians with their range."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Row:
    """One line of the table; `ours` and `theirs` are median seconds with (min, max) beside them."""

    work: str
    peer: str
    size: str
    ours: float
    theirs: float
    ours_range: tuple[float, float]
    theirs_range: tuple[float, float]
    unit: str = "s"
    share_of_limit: float | None = None
    note: str = ""

    @property
    def ratio(self) -> float:
        """How many times longer the peer takes."""
        return self.theirs / self.ours

    def as_record(self) -> dict[str, Any]:
        """Plain data for `results.json`."""
        return {**self.__dict__, "ratio": self.ratio}


def in_turn(ways: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Seconds of every way, run in turn `repeats` times after one round that is thrown away."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(repeats + 1):
        for name, work in ways.items():
            gc.collect()
            started = time.perf_counter()
            work()
            if number:
                times[name].append(time.perf_counter() - started)
    return times


def row(
    work: str, peer: str, size: str, ours: list[float], theirs: list[float], *, flops: float | None = None,
    peak: float | None = None, note: str = "",
) -> Row:  # fmt: skip
    """The line of one comparison; `flops` that are necessary and the measured `peak` (GFLOP/s) give our share of it."""
    median = statistics.median(ours)
    share = flops / median / 1e9 / peak if flops is not None and peak else None
    return Row(
        work, peer, size, median, statistics.median(theirs), (min(ours), max(ours)), (min(theirs), max(theirs)),
        share_of_limit=share, note=note,
    )  # fmt: skip
