"""What every comparison has: its inputs, its ways of doing the work, and the lines of the table."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import ClassVar

import aims
import memory
import spending
from inputs import Inputs
from limits import GEMM, Limits, Need
from spending import Spending
from timing import Row, Way, row

from ws.model.loading import ChatModel


class Comparison(ABC):
    """The same work, done by every one of `ways`.

    `limits` are those of the machine by dtype, as `results.json` names them; a process that runs one way needs none.
    """

    name: ClassVar[str]

    def __init__(self, inputs: Inputs, limits: Mapping[str, Limits] | None = None) -> None:
        self.inputs = inputs
        self.workload = inputs.workload
        self._limits = limits or {}

    @cached_property
    def model(self) -> ChatModel:
        """Our copy of the model."""
        return self.inputs.load()

    @property
    def limits(self) -> Limits | None:
        """The limits of this machine in the dtype of the model."""
        return self._limits.get(str(self.model.dtype).removeprefix("torch."))

    @abstractmethod
    def ways(self) -> Sequence[Way]:
        """All ways; nothing is loaded before one is called."""

    @abstractmethod
    def rows(self) -> list[Row]:
        """Check the ways against each other, time them in turn, and compare."""

    def spending(self) -> list[Spending]:
        """Where the time goes, by the name of the comparison: our way of the work, once it is set up."""
        way = self.way("ours")
        (way.warm_up or way.work)()
        return [spending.measure(way.work, self.name, self.inputs.size)]

    def way(self, name: str) -> Way:
        """The way of this name."""
        return next(way for way in self.ways() if way.name == name)

    def peaks_of(self, names: Sequence[str]) -> dict[str, float]:
        """MiB that one run of each of these ways adds to the loaded model, each in a process of its own."""
        if not names:
            return {}
        loaded = memory.loaded_peak(self.inputs.folder)
        return {name: memory.peak_of(self.inputs.folder, self.name, name) - loaded for name in names}

    def line(
        self, work: str, peer: str, ours: list[float], theirs: list[float], *, aim: str | None, need: Need,
        memory: tuple[float | None, float | None] = (None, None), note: str = "", profile: str | None = None,
    ) -> Row:  # fmt: skip
        """A line of the table with its aims; `aim` is the peer's name among them, None for another way of ours."""
        found = row(
            work, peer, self.inputs.size, ours, theirs, need=need, limits=self.limits, memory=memory, note=note,
            profile=self.name if profile is None else profile,
        )  # fmt: skip
        if aim is None or not self.workload.has_aims:
            return found
        of_gemm = found.share_of_limit if found.limit == GEMM else None
        return found.aiming(
            *aims.ratio(self.name, aim, self.inputs.size, found.ratio),
            *aims.share(self.name, self.inputs.size, of_gemm),
            *aims.peak(*memory, cache=self.model.cache_memory / 2**20),
        )
