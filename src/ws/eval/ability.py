"""What an unedited model can answer: the records behind the choice of an instrument (`eval.instrument`).

This module imports nothing heavy, so that `ws show` is quick.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Name = Literal["choice", "replies"]
"""Names of the instruments."""


@dataclass(frozen=True)
class Share:
    """A share with its 95 % limits over clusters; they are None if there are too few clusters for an interval."""

    mean: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Ability:
    """What the unedited model can answer, and the instrument that follows from it.

    mass: mean probability of the two answers on the headline items. consistent: share of (item, order) whose opposite
    question gets the other answer; None if there are no opposite questions. wordings: mean correlation over the items
    between the wordings of the replies; None if it is undefined (fewer than two wordings or three items, no variation).
    """

    instrument: Name
    reason: str
    mass: float
    consistent: Share | None
    wordings: float | None
