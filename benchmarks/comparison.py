"""What every comparison has: its inputs, its ways of doing the work, and the lines of the table."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import ClassVar

import memory
import torch
from inputs import Inputs
from timing import Row, Way

from ws.models import ChatModel


class Comparison(ABC):
    """The same work, done by every one of `ways`.

    `peaks` are GFLOP/s of large matrix products by dtype; a process that runs one way needs none.
    """

    name: ClassVar[str]

    def __init__(self, inputs: Inputs, peaks: Mapping[torch.dtype, float] | None = None) -> None:
        self.inputs = inputs
        self.workload = inputs.workload
        self._peaks = peaks or {}

    @cached_property
    def model(self) -> ChatModel:
        """Our copy of the model."""
        return self.inputs.load()

    @property
    def peak(self) -> float | None:
        """The limit of this machine in the dtype of the model, GFLOP/s."""
        return self._peaks.get(self.model.dtype)

    @abstractmethod
    def ways(self) -> Sequence[Way]:
        """All ways; nothing is loaded before one is called."""

    @abstractmethod
    def rows(self) -> list[Row]:
        """Check the ways against each other, time them in turn, and compare."""

    def way(self, name: str) -> Way:
        """The way of this name."""
        return next(way for way in self.ways() if way.name == name)

    def peaks_of(self, names: Sequence[str]) -> dict[str, float]:
        """MiB that one run of each of these ways adds to the loaded model, each in a process of its own."""
        loaded = memory.peak_of(self.inputs.folder, self.name, memory.LOADED)
        return {name: memory.peak_of(self.inputs.folder, self.name, name) - loaded for name in names}
