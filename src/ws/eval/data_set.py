"""A public data set as a probe: its rows, its origin with counts, and measures that are computed from its scores.

A *unit* is what intervals are taken over: a question or a statement. It is asked in several rows, because it has
several answers or is worded in several ways.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np

from ws.base import console, rankings, stats
from ws.base.errors import UserError
from ws.base.stats import Interval
from ws.measure.probe import Probe

Readings = Mapping[str, Mapping[str, float]]
"""Metric -> row of the probe -> value, under one Condition."""


@runtime_checkable
class Measured(Protocol):
    """One measure under one Condition."""

    def level(self) -> Interval:
        """Its value, with an interval over units."""

    def change(self, base: Any) -> Interval:
        """Its difference to the same measure under another Condition, paired by unit."""


@dataclass(frozen=True)
class Mean:
    """The mean of one number for each unit. The units are the same under every Condition."""

    values: Mapping[str, float]

    def level(self) -> Interval:
        """The mean over units."""
        return stats.over_clusters(list(self.values.values()), list(self.values))

    def change(self, base: Mean) -> Interval:
        """The mean difference over units."""
        return Mean({unit: value - base.values[unit] for unit, value in self.values.items()}).level()


@dataclass(frozen=True)
class Ranking:
    """AUROC of one score for each unit; `labels` are +1 or -1, in the same order."""

    values: np.ndarray
    labels: np.ndarray

    def level(self) -> Interval:
        """The AUROC."""
        return rankings.auroc(self.values, self.labels)

    def change(self, base: Ranking) -> Interval:
        """The difference of both AUROCs."""
        return rankings.auroc_change(base.values, self.values, self.labels)


Measures = Mapping[tuple[str, str], Measured]
"""(group, name of the measure) -> the measure."""


@dataclass(frozen=True)
class Origin:
    """Where a data set comes from, and its counts.

    rule: how rows become units. read: rows of the source. skipped: reason -> rows that are not used. unit: what is
    counted by `kept` (all that can be asked) and `asked` (this run's subset). revision: commit of a hub data set.
    """

    source: str
    revision: str | None
    rule: str
    read: int
    skipped: Mapping[str, int]
    unit: str
    kept: int
    asked: int

    def __post_init__(self) -> None:
        if not self.kept:
            raise UserError(
                f"{self.source}: none of {self.read} rows can be used", f"Check them against the rule: {self.rule}."
            )

    def described(self) -> str:
        """The counts in words."""
        text = f"kept {self.kept} {self.unit} from {self.read} rows of {self.source} ({self.rule})"
        if reasons := "; ".join(f"{count} rows skipped: {reason}" for reason, count in self.skipped.items() if count):
            text += f"; {reasons}"
        return text if self.asked == self.kept else f"{text}; {self.asked} spread over them are asked"


@dataclass(frozen=True)
class DataSet:
    """A probe with its origin, and what is measured with it.

    measure: reads the measures from the scores under one Condition. meaning: name of a measure -> its definition.
    """

    probe: Probe
    origin: Origin
    measure: Callable[[Readings], Measures]
    meaning: Mapping[str, str]

    def announced(self) -> DataSet:
        """The same data set, after its counts are printed."""
        console.say(f"{self.probe.name}: {self.origin.described()}")
        return self
