"""Time our way and a peer's way of the same work in turn, in one process, and keep medians with their range."""

from __future__ import annotations

import gc
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from aims import Aim
from limits import Limits, Need

SLOW, VERY_SLOW = 20.0, 90.0
"""Seconds beyond which a way is timed twice at most, and once."""


@dataclass(frozen=True)
class Way:
    """One way of doing a comparison's work: `work` does the whole of it once, and makes what it needs on first use.

    `warm_up` is a small part of it that sets everything up, where the whole is slow; `for_peak` a part that needs as
    much memory as the whole. None: the whole.
    """

    name: str
    work: Callable[[], object]
    warm_up: Callable[[], object] | None = None
    for_peak: Callable[[], object] | None = None


@dataclass(frozen=True)
class Row:
    """One line of the table; `ours` and `theirs` are median seconds with (min, max) and number of repetitions.

    `limit` names the limit that binds (`limits.py`), `share_of_limit` is the least seconds over ours. The peaks are
    MiB that one run in a fresh process adds to the loaded model. `profile` is the work that `spending.py` knows it by.
    """

    work: str
    peer: str
    size: str
    ours: float
    theirs: float
    ours_range: tuple[float, float]
    theirs_range: tuple[float, float]
    repetitions: tuple[int, int] = (1, 1)
    unit: str = "s"
    limit: str = ""
    share_of_limit: float | None = None
    ours_peak: float | None = None
    theirs_peak: float | None = None
    note: str = ""
    profile: str = ""
    aims: tuple[Aim, ...] = ()

    @property
    def ratio(self) -> float:
        """How many times longer the peer takes."""
        return self.theirs / self.ours

    def aiming(self, *more: Aim) -> Row:
        """The same line with further aims."""
        return replace(self, aims=(*self.aims, *more))

    def as_record(self) -> dict[str, Any]:
        """Plain data for `results.json`."""
        return {**self.__dict__, "aims": [aim.as_record() for aim in self.aims], "ratio": self.ratio}


def in_turn(
    ways: Iterable[Way], repeats: int, warm_up: int = 1, clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """Seconds of every way, run in turn up to `repeats` times after `warm_up` rounds that are thrown away.

    A way that takes long is left out of later rounds. `clock` tells the seconds.
    """
    chosen = list(ways)
    times: dict[str, list[float]] = {way.name: [] for way in chosen}
    for _ in range(warm_up):
        for way in chosen:
            _say(way, seconds(way.warm_up or way.work, clock), " (warm-up)")
    for number in range(repeats):
        for way in chosen:
            if number < repetitions(repeats, times[way.name]):
                times[way.name].append(seconds(way.work, clock))
                _say(way, times[way.name][-1])
    return times


def repetitions(wanted: int, known: Sequence[float]) -> int:
    """How often a way is timed, from its seconds so far."""
    longest = max(known, default=0.0)
    return min(wanted, 1 if longest > VERY_SLOW else 2 if longest > SLOW else wanted)


def seconds(work: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> float:
    """Seconds of one run, after the garbage of earlier ones has been collected; an accelerator has finished by then."""
    gc.collect()
    _finish()
    started = clock()
    work()
    _finish()
    return clock() - started


def _finish() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _say(way: Way, spent: float, remark: str = "") -> None:
    sys.stderr.write(f"{way.name}: {spent:.3g} s{remark}\n")


def row(
    work: str, peer: str, size: str, ours: list[float], theirs: list[float], *, need: Need | None = None,
    limits: Limits | None = None, memory: tuple[float | None, float | None] = (None, None), note: str = "",
    profile: str = "",
) -> Row:  # fmt: skip
    """The line of one comparison; what is necessary and the limits of the machine give our share of them."""
    median = statistics.median(ours)
    least = limits.least(need) if limits is not None and need is not None else None
    return Row(
        work, peer, size, median, statistics.median(theirs), (min(ours), max(ours)), (min(theirs), max(theirs)),
        (len(ours), len(theirs)), limit=least.limit if least else "",
        share_of_limit=least.seconds / median if least else None, ours_peak=memory[0], theirs_peak=memory[1],
        note=note, profile=profile,
    )  # fmt: skip
