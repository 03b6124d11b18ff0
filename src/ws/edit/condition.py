"""Condition: a Context plus any number of Edits with strengths. A model is measured under a Condition.

A Context is an optional system prompt; it changes tokens and has no strength. An Edit changes the model and has a
strength alpha. Every baseline, control and ablation is a Condition, so one runner measures them all. The Context is
part of the key, so a persona at alpha 0 is never averaged with the plain model at alpha 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, Protocol, runtime_checkable

from torch import nn

from ws.algebra.delta import Alpha
from ws.algebra.direction import Direction
from ws.base.errors import UserError
from ws.base.files import content_key

BaseMismatch = Literal["refuse", "allow"]
"""What happens if an edit was made on a different base model than the one that it is put on."""
Undo = Callable[[], None]
"""Removes an effect; restores the network bit for bit."""


BASE = "none"
"""The label, in the column `edit` of a scores table, of a model without edits."""


@runtime_checkable
class Effect(Protocol):
    """An edit that is not a weight Direction, such as an activation direction added to the residual stream.

    An Effect may have an attribute `first_layer`, the first decoder layer that it changes. The layers below it are
    then computed once for all strengths.
    """

    @property
    def base(self) -> str:
        """Fingerprint of the model that it belongs to."""
        ...

    @property
    def content_key(self) -> str:
        """Digest of everything that determines its effect: its numbers, its layers, its token positions, its base.

        Two Effects with the same name are the same Effect only if their keys are equal.
        """
        ...

    def attach(self, network: nn.Module, alpha: Alpha) -> Undo:
        """Put the effect on the network at a strength; the returned function removes it."""
        ...


@dataclass(frozen=True)
class Context:
    """A named system prompt; an empty text means no system turn."""

    name: str
    system: str = ""


PLAIN = Context("plain")
"""No system prompt. Every direction is evaluated in this Context."""


@dataclass(frozen=True, eq=False)
class Edit:
    """A named Direction or Effect; `name` is its label in tables, the seeds distinguish replicates.

    `base_mismatch` "allow": it may be put on a different base model than its own, such as a fine-tune of it.
    """

    name: str
    effect: Direction | Effect
    seed: int | None = None
    data_seed: int | None = None
    base_mismatch: BaseMismatch = "refuse"

    def __post_init__(self) -> None:
        if self.name == BASE:
            raise UserError(f"an edit cannot be named {BASE!r}", "This is the label of the base model in scores.")
        if not isinstance(self.effect, Direction) and not getattr(self.effect, "content_key", None):
            raise UserError(
                f"the effect of edit {self.name!r}, a {type(self.effect).__name__}, has no content_key",
                "Give its class a content_key: a digest of everything that determines its effect.",
            )


@dataclass(frozen=True, eq=False)
class Condition:
    """A Context and edits with their strengths. Without edits it is the base model."""

    context: Context = PLAIN
    edits: tuple[tuple[Edit, float], ...] = ()

    def __post_init__(self) -> None:
        for edit, alpha in self.edits:
            if not math.isfinite(alpha):
                raise UserError(f"the strength of edit {edit.name!r} is {alpha}", "Give a finite number.")

    @classmethod
    def of(cls, edit: Edit, alpha: float, context: Context = PLAIN) -> Condition:
        """One edit at one strength; alpha 0 is the Condition without edits."""
        return cls(context, ((edit, float(alpha)),))

    @property
    def active(self) -> tuple[tuple[Edit, float], ...]:
        """The edits whose strength is not 0."""
        return tuple((edit, alpha) for edit, alpha in self.edits if alpha != 0)

    @property
    def is_base(self) -> bool:
        """Whether the model is not edited."""
        return not self.active

    @cached_property
    def content_key(self) -> str:
        """Digest of its effect on a model and of its labels; equal only for the same Condition."""
        edits = [
            [edit.name, float(alpha), edit.seed, edit.data_seed, edit.base_mismatch, edit.effect.content_key]
            for edit, alpha in self.active
        ]
        return content_key(self.context, edits)

    def key(self) -> dict[str, Any]:
        """The columns that identify it in a scores table: context, edit, alpha, seed, data_seed.

        Several edits get one label, which contains their exact strengths, and alpha 1. A seed that they share is in its
        column; seeds that differ are in the label.
        """
        seeds, data_seeds = ({getattr(edit, name) for edit, _ in self.active} for name in ("seed", "data_seed"))
        seed = next(iter(seeds)) if len(seeds) == 1 else None
        data_seed = next(iter(data_seeds)) if len(data_seeds) == 1 else None
        if self.is_base:
            edit, alpha = BASE, 0.0
        elif len(self.active) == 1:
            (only, alpha) = self.active[0]
            edit = only.name
        else:
            alpha = 1.0
            edit = " + ".join(
                f"{float(strength)!r}".removesuffix(".0") + f"*{part.name}"
                + _bracketed(("seed", part.seed, seeds), ("data seed", part.data_seed, data_seeds))
                for part, strength in self.active
            )  # fmt: skip
        return {
            "context": self.context.name,
            "edit": edit,
            "alpha": alpha,
            "seed": seed,
            "data_seed": data_seed,
        }


def _bracketed(*seeds: tuple[str, int | None, set[int | None]]) -> str:
    """` (seed 1, data seed 2)`: the seeds of an edit, each only if the edits have different ones."""
    shown = [f"{name} {value}" for name, value, others in seeds if len(others) > 1 and value is not None]
    return f" ({', '.join(shown)})" if shown else ""
