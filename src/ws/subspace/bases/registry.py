"""The registry of bases: the decorator, the checks on every result, and what a basis is made from.

A basis is a function from `Material` to a matrix (d, k <= rank) with orthonormal columns. It may raise `Unavailable`
with the reason why this model or run has no such basis; it is then listed with that reason, never as zero.

    axis             reads: directions that something reads; writes: directions that something writes; mixed: states,
                     which are both. Bases of readers are not ranked on what dW writes: a match would be accidental.
    uses_trained_dW  built from a trained direction, so it cannot show that the base model knew the subspace before
    needs            weights, activations, personas, attention, directions or gradient
    draws            for random bases: how many are drawn and averaged
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from ws.algebra.direction import Direction
from ws.base import keyed_random
from ws.base.errors import UserError
from ws.subspace import capture, moments
from ws.subspace.capture import Captured, CapturedTokens
from ws.subspace.spans import Span
from ws.subspace.weights import LayerWeights, ResidualWeights, Unavailable

Kind = Literal["reads", "writes", "mixed"]
Need = Literal["weights", "activations", "personas", "attention", "directions", "gradient"]
Value = TypeVar("Value")

RANK = 8
BROAD = 64
"""Rank of the broad subspaces that others are projected away from; at most a quarter of the width."""
TOLERANCE = 1e-4
"""Largest allowed entry of `|B'B - 1|`, fp32."""
DRAWS = 20


@dataclass(frozen=True, eq=False)
class Background:
    """What is the same for all layers and directions of one model and behaviour.

    clean: FIT prompts without a persona. personas: per pair, the same prompts under the positive and the negative one.
    tokens: all tokens under the first pair, or the reason why there are none. gradient: `grad L_neg - grad L_pos` at
    the base weights, as a direction. first_token: the id with which every prompt begins.
    """

    weights: ResidualWeights
    clean: Captured
    personas: Sequence[tuple[Captured, Captured]] = ()
    tokens: tuple[CapturedTokens, CapturedTokens] | str = "no tokens were captured"
    gradient: Direction | None = None
    first_token: int = 0
    _known: dict[Any, Any] = field(default_factory=dict)

    def once(self, key: Any, make: Callable[[], Value]) -> Value:
        """What `make` returns, made at the first call with this key."""
        if key not in self._known:
            self._known[key] = make()
        value: Value = self._known[key]
        return value


@dataclass(frozen=True, eq=False)
class Run:
    """One trained direction: fit and evaluation hold the states at +1 and -1 on the FIT and the EVAL prompts."""

    family: str
    seed: int
    direction: Direction
    fit: tuple[Captured, Captured]
    evaluation: tuple[Captured, Captured]

    @property
    def name(self) -> str:
        """Its label, e.g. `lora seed 0`."""
        return f"{self.family} seed {self.seed}"


@dataclass(frozen=True, eq=False)
class Material:
    """What one basis is made from: the background, a layer, a rank, and for some bases a run and its siblings.

    siblings: the directions of all families with the seed of the run, by family, its own included. draw: number of the
    draw of a random basis. Materials of one layer share `_known`.
    """

    background: Background
    layer: int
    rank: int = RANK
    run: Run | None = None
    siblings: Mapping[str, Direction] = field(default_factory=dict)
    draw: int = 0
    _known: dict[Any, Any] = field(default_factory=dict)

    def once(self, key: Any, make: Callable[[], Value]) -> Value:
        """What `make` returns, made at the first call with this key at this layer."""
        if key not in self._known:
            self._known[key] = make()
        value: Value = self._known[key]
        return value

    @property
    def view(self) -> ResidualWeights:
        """The weights of the whole model."""
        return self.background.weights

    @property
    def width(self) -> int:
        """Dimension of the residual stream."""
        return self.view.width

    @property
    def broad(self) -> int:
        """Rank of broad subspaces."""
        return max(self.rank, min(BROAD, self.width // 4))

    @property
    def weights(self) -> LayerWeights:
        """The weights of the layer."""
        return self.once("weights", lambda: self.view.layer(self.layer))

    @property
    def clean(self) -> Float[Tensor, "prompts width"]:
        """Residual stream behind the layer on FIT prompts without a persona, fp64."""
        return self.background.clean.after[self.layer].double()

    @property
    def persona_states(self) -> tuple[Float[Tensor, "n width"], Float[Tensor, "n width"]]:
        """Residual stream behind the layer under positive and negative personas, all pairs below one another, fp64."""
        return self.persona_pairs(lambda one: one.after[self.layer])

    def persona_pairs(self, pick: Callable[[Captured], Tensor | None]) -> tuple[Tensor, Tensor]:
        """What `pick` takes from the captured states of both sides, paired row by row, fp64."""
        if not self.background.personas:
            raise Unavailable("the behaviour has no personas")
        sides = []
        for side in (0, 1):
            parts = [pick(pair[side]) for pair in self.background.personas]
            if any(part is None for part in parts):
                raise Unavailable("these states were not captured, because the model has no such module")
            sides.append(torch.cat([part.double() for part in parts if part is not None]))
        return sides[0], sides[1]

    @property
    def trained(self) -> Run:
        """The run, for bases that are built from one."""
        if self.run is None:
            raise Unavailable("it needs a trained direction")
        return self.run

    def steered(self, half: Literal["fit", "evaluation"], which: Literal["block", "cumulative"]) -> Tensor:
        """The difference of states between +1 and -1 of the run at this layer, (prompts, width) fp64."""
        difference = capture.block_difference if which == "block" else capture.cumulative_difference
        key = (self.trained, half, which)
        whole = self.background.once(key, lambda: difference(*getattr(self.trained, half)))
        return whole[self.layer]

    def moment(self, axis: moments.Axis) -> moments.Moment:
        """The second moment of the run on an axis; activations are those of the EVAL prompts."""
        return self.once((self.trained, axis), lambda: self._moment(axis))

    def _moment(self, axis: moments.Axis) -> moments.Moment:
        if axis in ("block", "cumulative"):
            return moments.of_rows(self.steered("evaluation", axis))
        direction = self.trained.direction
        if axis == "read":
            return moments.read(self.view, direction, self.layer)
        return moments.written(self.view, direction, self.layer, *(("o", "down") if axis == "written" else (axis,)))

    def generator(self, name: str) -> torch.Generator:
        """The random stream of one draw of a basis at this layer."""
        return keyed_random.generator(f"basis|{name}|{self.layer}|{self.rank}|{self.draw}")


@dataclass(frozen=True, eq=False)
class Basis:
    """A registered basis."""

    name: str
    axis: Kind
    family: str
    needs: tuple[Need, ...]
    uses_trained_dW: bool  # noqa: N815 - the name of the tag
    draws: int
    make: Callable[[Material], Span]

    @cached_property
    def formula(self) -> str:
        """The first sentence of its docstring: how it is made."""
        return " ".join((inspect.getdoc(self.make) or "").split("\n\n")[0].split())

    @property
    def is_null(self) -> bool:
        """Whether it is a control without information."""
        return self.family == "null"

    @property
    def is_oracle(self) -> bool:
        """Whether it is the best possible basis on some axis, by construction."""
        return self.family == "oracle"


BASES: dict[str, Basis] = {}
"""All registered bases, in order of registration."""


def basis(
    axis: Kind, family: str, *needs: Need, uses_trained_dW: bool = False, draws: int = 1,
) -> Callable[[Callable[[Material], Span]], Callable[[Material], Span]]:  # fmt: skip
    """Register a function under its own name as a basis."""

    def register(make: Callable[[Material], Span]) -> Callable[[Material], Span]:
        name = make.__name__
        if name in BASES:
            raise ValueError(f"there are two bases {name}")
        BASES[name] = Basis(name, axis, family, needs or ("weights",), uses_trained_dW, draws, make)
        return make

    return register


def named(names: Sequence[str]) -> list[Basis]:
    """Registered bases by name; `all` means every one."""
    if unknown := [name for name in names if name != "all" and name not in BASES]:
        raise UserError(f"there is no basis {unknown[0]!r}", f"Choose all, or from: {', '.join(BASES)}.")
    return list(BASES.values()) if "all" in names else [BASES[name] for name in dict.fromkeys(names)]


@dataclass(frozen=True, eq=False)
class Built:
    """A basis on one Material: one span per draw, (d, k) fp32, or the reason why there is none."""

    basis: Basis
    spans: tuple[Span, ...]
    reason: str = ""

    @property
    def rank(self) -> int:
        """Effective rank: the number of orthonormal columns."""
        return self.spans[0].shape[1] if self.spans else 0


def build(one: Basis, material: Material) -> Built:
    """Make a basis and check it: the shape, at most `rank` columns (twice for unions), orthonormal."""
    try:
        drawn = [one.make(replace(material, draw=draw)) for draw in range(one.draws)]
    except Unavailable as reason:
        return Built(one, (), str(reason))
    if not drawn[0].shape[1]:
        return Built(one, (), "no direction fulfils its definition here")
    return Built(one, tuple(_checked(one.name, span, material) for span in drawn))


def _checked(name: str, span: Span, material: Material) -> Span:
    result = span.to(torch.float32)
    most = 2 * material.rank
    if result.ndim != 2 or result.shape[0] != material.width or result.shape[1] > most:
        raise ValueError(f"basis {name} has shape {tuple(result.shape)}, not ({material.width}, at most {most})")
    off = (result.T @ result - torch.eye(result.shape[1])).abs().max()
    if not off < TOLERANCE:
        raise ValueError(f"basis {name} is not orthonormal: B'B differs from 1 by {off:.2g}")
    return result
