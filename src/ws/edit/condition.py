"""What a model is measured under: a Context and any number of Edits with their strengths.

A Context is a system prompt or none; it changes tokens and has no strength. An Edit changes the model and has a
strength alpha. Every baseline, control and ablation is a Condition, so one runner measures them all; and because the
Context is part of the key, a persona at alpha 0 can never be averaged with the plain model at alpha 0.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from torch import nn

from ws.algebra.delta import Alpha
from ws.algebra.direction import Direction

Undo = Callable[[], None]
"""Takes an effect off again, restoring the network bit for bit."""


@runtime_checkable
class Effect(Protocol):
    """An edit that is not a weight Direction, such as an activation direction added to the residual stream.

    An Effect may have an attribute `first_layer`, the first decoder layer that it changes: layers below are then run
    once for all of its strengths.
    """

    @property
    def base(self) -> str:
        """Fingerprint of the model that it belongs to."""
        ...

    def attach(self, network: nn.Module, alpha: Alpha) -> Undo:
        """Put the effect on the network at a strength; the result takes it off."""
        ...


@dataclass(frozen=True)
class Context:
    """A named system prompt; the empty text means no system turn at all."""

    name: str
    system: str = ""


PLAIN = Context("plain")
"""No system prompt: how every direction is evaluated."""


@dataclass(frozen=True, eq=False)
class Edit:
    """A named Direction or Effect; `name` is its label in tables, the seeds tell replicates apart."""

    name: str
    effect: Direction | Effect
    seed: int | None = None
    data_seed: int | None = None


@dataclass(frozen=True, eq=False)
class Condition:
    """A Context with edits at strengths. Without edits it is the base model."""

    context: Context = PLAIN
    edits: tuple[tuple[Edit, float], ...] = ()

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
        """Whether the model is left as it is."""
        return not self.active

    def key(self) -> dict[str, Any]:
        """The columns that identify it in a scores table: context, edit, alpha, seed, data_seed."""
        if self.is_base:
            edit, alpha, seed, data_seed = "none", 0.0, None, None
        elif len(self.active) == 1:
            (only, alpha) = self.active[0]
            edit, seed, data_seed = only.name, only.seed, only.data_seed
        else:
            first = self.active[0][0]
            edit = " + ".join(f"{strength:g}*{part.name}" for part, strength in self.active)
            alpha, seed, data_seed = 1.0, first.seed, first.data_seed
        return {
            "context": self.context.name,
            "edit": edit,
            "alpha": alpha,
            "seed": seed,
            "data_seed": data_seed,
        }
