"""What a lens is, what it may use, and the table of all lenses."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from ws.adapters import AdapterFolder
from ws.algebra.delta import Delta
from ws.algebra.direction import Direction
from ws.algebra.parts import Split
from ws.base.errors import UserError
from ws.edit.condition import Condition, Edit
from ws.measure.probe import Probe
from ws.model import architecture
from ws.model.architecture import Site
from ws.model.loading import ChatModel
from ws.subspace import capture
from ws.subspace.variants import Part, Subject, Unavailable


@dataclass(frozen=True, eq=False)
class Material:
    """All that lenses may use: one trained direction, and what it came from.

    others: directions of other families on the same model, by family. sides: the task vectors of the positive and the
    negative adapter. folders: both adapters as they were saved. prompts: the FIT prompts for activations. dev_effect:
    how far each direction moves the behaviour on dev rows, half the difference between alpha +1 and -1.
    """

    model: ChatModel
    subject: Subject
    family: str
    others: Mapping[str, Direction]
    sides: Callable[[], tuple[Direction, Direction]]
    folders: Callable[[], tuple[AdapterFolder, AdapterFolder]]
    prompts: Callable[[], Probe]
    dev_effect: Callable[[Sequence[Direction]], list[float]]

    @property
    def direction(self) -> Direction:
        """The trained direction, bound to its base."""
        return self.subject.direction

    @cached_property
    def sites(self) -> Mapping[str, Site]:
        """The touched matrices of decoder layers, by parameter, in layer order."""
        layers = self.direction.layer_numbers
        found = architecture.sites(self.model.network, layers) if layers else []
        return {site.parameter: site for site in found if site.parameter in self.direction.deltas}

    def with_roles(self, *roles: str) -> frozenset[str]:
        """Parameters of sites that hold one of these roles."""
        return frozenset(name for name, site in self.sites.items() if set(roles) & set(site.roles))

    def weight(self, name: str) -> Float[Tensor, "out in"]:
        """The base weight of a site as out x in, fp64 on the CPU."""
        stored = self.model.network.get_parameter(name).data
        return (stored.T if self.sites[name].transposed else stored).to("cpu", torch.float64)

    def oriented(self, name: str, delta: Delta, divide: Callable[[Delta, Tensor | None], Split]) -> Split:
        """Divide a delta as a map from inputs to outputs, whichever way the parameter is stored."""
        weight = self.direction.weights.get(name)
        if not self.sites[name].transposed:
            return divide(delta, weight)
        piece, rest = divide(delta.T, None if weight is None else weight.T)
        return Split(piece.T, rest.T)

    @cached_property
    def block_differences(self) -> Float[Tensor, "layers prompts width"]:
        """What every layer writes at the answer anchor at alpha +1, minus the same at -1, on the FIT prompts; fp64."""
        edit, prompts = Edit("direction", self.direction), self.prompts()
        plus, minus = (capture.at_anchor(self.model, prompts, Condition.of(edit, alpha)) for alpha in (1.0, -1.0))
        return capture.block_difference(plus, minus)


LensFunction = Callable[[Material], Iterator[Part]]


@dataclass(frozen=True)
class Lens:
    """A registered lens. question: what it answers, for people."""

    name: str
    question: str
    parts: LensFunction


LENSES: dict[str, Lens] = {}
"""All lenses by name, in the order of the page."""


def lens(name: str, question: str) -> Callable[[LensFunction], LensFunction]:
    """Register a lens under a name."""

    def register(function: LensFunction) -> LensFunction:
        if name in LENSES:
            raise ValueError(f"two lenses are named {name}")
        LENSES[name] = Lens(name, question, function)
        return function

    return register


WHOLE = "whole"
"""The lens that every other one is read against; it is always measured."""


def chosen(names: Sequence[str]) -> list[Lens]:
    """The lenses of these names, `whole` first; `all` means every one."""
    if unknown := [name for name in names if name not in (*LENSES, "all")]:
        raise UserError(f"there is no lens {unknown[0]!r}", f"Choose from: all, {', '.join(LENSES)}.")
    if not names:
        raise UserError("no lens is chosen", f"Give --lens all, or some of: {', '.join(LENSES)}.")
    wanted = [one for one in LENSES.values() if "all" in names or one.name in names]
    return [LENSES[WHOLE], *(one for one in wanted if one.name != WHOLE)]


def require(condition: bool, reason: str) -> None:
    """Raise `Unavailable` with the reason unless the condition holds."""
    if not condition:
        raise Unavailable(reason)
