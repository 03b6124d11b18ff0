"""Probes: named rows of one kind, with the label and the cluster that tables need.

choice       one of two answers at an anchor
likelihood   a given text, read by the model
contrast     which of two given replies is likelier
divergence   a given text, read by the edited model and by the base
guided       a choice after a thought that the edited model writes itself
reply        a reply that the edited model writes itself
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

from ws.base.errors import UserError
from ws.base.files import content_key
from ws.model.chat import Message

Kind = Literal["choice", "likelihood", "contrast", "divergence", "guided", "reply"]

JSON = "json"
"""Name of a group of reply rows and of their metric: does the reply hold a JSON object?"""

TEXTS: tuple[Kind, ...] = ("likelihood", "contrast", "divergence")
"""Kinds for which the model reads given texts."""

WRITTEN: tuple[Kind, ...] = ("guided", "reply")
"""Kinds for which the model writes text under the Condition before anything is measured."""

DEV_SHARE = 0.25
"""Share of the clusters of a probe on which choices are made; results are on the others."""


def is_dev(cluster: str) -> bool:
    """Whether a cluster belongs to the dev split; a function of its name alone."""
    return int(hashlib.blake2b(cluster.encode(), digest_size=4).hexdigest(), 16) < DEV_SHARE * 2**32


@dataclass(frozen=True)
class ProbeRow:
    """One thing to score.

    messages: without a system turn, which the Context adds. continuation: the answer anchor of a choice, or the text
    that likelihood and divergence read. label: +1 if the first answer counts as positive, -1 if the second does.
    cluster: rows with the same cluster are resampled together in intervals. group: groups are reported separately.
    replies: the two replies of a contrast.
    """

    row: str
    messages: tuple[Message, ...]
    continuation: str
    cluster: str = ""
    group: str = "all"
    label: int = 1
    replies: tuple[str, str] | None = None


@dataclass(frozen=True)
class Probe:
    """Named rows of one kind; `answers` are the two words of a choice, `tokens` limits the text the model writes.

    closed: whether a text that the model reads includes the end of its turn.
    """

    name: str
    kind: Kind
    rows: tuple[ProbeRow, ...]
    answers: tuple[str, str] = ("Yes", "No")
    tokens: int = 0
    closed: bool = True

    def __post_init__(self) -> None:
        if not self.rows:
            raise UserError(f"probe {self.name!r} has no rows", "Give at least one row.")
        names = [row.row for row in self.rows]
        if len(set(names)) != len(names):
            raise UserError(f"probe {self.name!r} has two rows with the same id", "Give every row its own id.")
        first, second = (answer.strip().casefold() for answer in self.answers)
        if not first or not second or first == second:
            raise UserError(
                f"probe {self.name!r} needs two different answers, not {self.answers[0]!r} and {self.answers[1]!r}",
                "Give two different words. Spaces and case are ignored.",
            )
        for row in self.rows:
            if (self.kind == "contrast") != (row.replies is not None):
                raise UserError(
                    f"row {row.row!r} of probe {self.name!r} (kind {self.kind}) has replies {row.replies!r}",
                    "Give two replies to every row of a contrast, and none to other rows.",
                )
        if (self.kind in WRITTEN) != (self.tokens > 0):
            raise UserError(
                f"probe {self.name!r} of kind {self.kind} has tokens = {self.tokens}",
                "Set tokens above 0 for guided and reply probes, and to 0 for all other kinds.",
            )

    @cached_property
    def key(self) -> str:
        """Digest of everything that is asked."""
        others = [*([self.tokens] if self.tokens else []), *([] if self.closed else ["open"])]
        return content_key(self.name, self.kind, self.rows, self.answers, *others)

    def guided(self, tokens: int) -> Probe:
        """The same choices, each after a thought of at most `tokens` that the model writes under the Condition."""
        if self.kind != "choice":
            raise UserError(f"probe {self.name!r} is not a choice probe", "Use thoughts with choice probes only.")
        return replace(self, kind="guided", tokens=tokens)


def split(probe: Probe, dev: bool) -> Probe:
    """The dev or the test rows of a probe, whole clusters."""
    rows = tuple(row for row in probe.rows if is_dev(row.cluster or row.row) == dev)
    if not rows:
        raise UserError(f"probe {probe.name!r} has no {'dev' if dev else 'test'} rows", "Use more rows.")
    return replace(probe, rows=rows)
