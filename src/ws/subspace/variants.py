"""Variants of a trained direction: keep a part of it, drop it, or put something of equal size in its place.

    keep         the part alone                                   is it enough?
    drop         the direction without the part                   is it needed?
    matched      the part, scaled to the norm of the whole        one factor for all parameters: does only size lack?
    complement   the rest of the whole, where the whole is only a piece of the direction (its residual writes)
    random       a random twin of the part: per parameter the same norm, and as many dimensions
    random matched   such a twin, scaled to the norm of the whole like `matched`: would any part do at that size?
    full         the whole direction

keep + drop (or keep + complement) is the whole. This is checked for every pair before it is measured.

Every variant is a Direction, so it is scored like any other edit. Fractions: `energy` is |part|^2 / |direction|^2,
`frobenius` is |variant| / |direction|, and `null` is the energy of a random part of as many dimensions.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, Literal

import torch

from ws.algebra import parts
from ws.algebra.delta import Delta
from ws.algebra.direction import Direction
from ws.algebra.random_like import draws_like
from ws.base import keyed_random
from ws.model import architecture
from ws.model.loading import ChatModel

Operation = Literal["keep", "drop", "matched", "complement", "random", "random matched", "full"]
RANDOM: tuple[Operation, ...] = ("random", "random matched")
Whole = Literal["direction", "writes"]
Draw = Callable[[int], Direction]
"""A random twin of a part, before its norms are matched, as a function of the seed."""
LARGEST_MISMATCH = 1e-6
"""Largest |keep + drop - whole| / |whole|."""
_PROBES = 16
EVERY: tuple[Operation, ...] = ("keep", "drop", "matched", "random")


class Unavailable(Exception):  # noqa: N818 - an answer, not an error
    """A part that this direction does not have; the message says why."""


@dataclass(frozen=True, eq=False)
class Pieces:
    """A part of a direction (`keep`), the rest of the whole that it belongs to, and how random twins are drawn.

    twin: None for random directions with the singular values of the part.
    """

    keep: Direction
    rest: Direction | None = None
    twin: Draw | None = None


@dataclass(frozen=True, eq=False)
class Part:
    """One part that a lens looks at. It is made only when it is measured, so that a plan costs nothing.

    make: returns the pieces, or raises `Unavailable`. whole: what keep and rest add up to. k, layer, module: columns of
    the tables. null: the expected energy of a random part, if it is known. draws: how many random twins, if not the
    number that the user asks for. trials: how many directions `make` scores on dev rows.
    """

    name: str
    make: Callable[[], Pieces]
    operations: tuple[Operation, ...] = EVERY
    whole: Whole = "direction"
    k: int | None = None
    layer: int | None = None
    module: str | None = None
    draws: int | None = None
    trials: int = 0

    def count(self, controls: int) -> int:
        """How many variants it has."""
        return sum(self.twins(controls) if one in RANDOM else 1 for one in self.operations)

    def twins(self, controls: int) -> int:
        """How many random twins it has."""
        return controls if self.draws is None else self.draws


@dataclass(frozen=True, eq=False)
class Variant:
    """A Direction to measure, or the reason why there is none. draw: the number of a random twin."""

    lens: str
    part: str
    operation: Operation
    direction: Direction | None
    reason: str = ""
    draw: int | None = None
    k: int | None = None
    layer: int | None = None
    module: str | None = None
    whole: Whole = "direction"
    energy: float | None = None
    energy_of_whole: float | None = None
    frobenius: float | None = None
    parameters: int = 0
    remark: str = ""

    @property
    def name(self) -> str:
        """Label of its edit in scores tables."""
        return f"{self.lens}: {self.part}: {self.operation}"

    def record(self) -> dict[str, Any]:
        """Everything but the Direction, as plain data."""
        return {one.name: getattr(self, one.name) for one in fields(self) if one.name != "direction"} | {
            "edit": self.name, "available": self.direction is not None
        }  # fmt: skip


@dataclass(frozen=True, eq=False)
class Subject:
    """The direction under study, bound to its base, and the parameters that write to the residual stream.

    name: tells runs apart, so that no two of them share a random draw.
    """

    direction: Direction
    writers: frozenset[str]
    name: str = ""

    @classmethod
    def on(cls, model: ChatModel, direction: Direction, name: str = "") -> Subject:
        """A direction of this model; unbound ones are bound."""
        writers = (site.parameter for site in architecture.sites(model.network) if site.writes_residual)
        return cls(direction.bind(model), frozenset(one for one in writers if one in direction.deltas), name)

    @cached_property
    def writes(self) -> Direction:
        """The deltas of residual writers (o, down) alone."""
        return only(self.direction, self.writers)

    @cached_property
    def reads(self) -> Direction:
        """All other deltas."""
        return without(self.direction, self.writers)

    @cached_property
    def norm(self) -> float:
        """Frobenius norm of the direction."""
        return self.direction.norm()

    @cached_property
    def writes_norm(self) -> float:
        """Frobenius norm of its residual writes."""
        return self.writes.norm()

    def of(self, whole: Whole) -> tuple[Direction, float]:
        """The whole that a part belongs to, and its norm."""
        return (self.direction, self.norm) if whole == "direction" else (self.writes, self.writes_norm)


def variants(lens: str, part: Part, subject: Subject, controls: int) -> Iterator[Variant]:
    """All variants of a part; one without a Direction per operation if the part is unavailable."""
    blank = Variant(lens, part.name, "keep", None, k=part.k, layer=part.layer, module=part.module, whole=part.whole)
    try:
        pieces = part.make()
        if not any(float(norm) > 0 for norm in pieces.keep.norms().values()):
            raise Unavailable("the direction has nothing there")
        if pieces.rest is not None:
            require_sum(pieces.keep, pieces.rest, subject.of(part.whole)[0], f"{lens}: {part.name}")
    except Unavailable as reason:
        for operation in part.operations:
            yield replace(blank, operation=operation, reason=str(reason))
        return
    whole_norm = subject.of(part.whole)[1]
    own_norms = pieces.keep.norms()
    size = math.sqrt(sum(value**2 for value in own_norms.values()))
    blank = replace(
        blank, energy=(size / subject.norm) ** 2, energy_of_whole=(size / whole_norm) ** 2,
        remark=str(pieces.keep.provenance.get("remark", "")),
    )  # fmt: skip

    def made(operation: Operation, direction: Direction, norm: float | None = None, draw: int | None = None) -> Variant:
        norm = direction.norm() if norm is None else norm
        return replace(blank, operation=operation, direction=direction, draw=draw, frobenius=norm / subject.norm,
                       parameters=len(direction.deltas))  # fmt: skip

    for operation in part.operations:
        match operation:
            case "keep" | "full":
                yield made(operation, pieces.keep, size)
            case "matched":
                yield made("matched", pieces.keep * (whole_norm / size), whole_norm)
            case "complement" if pieces.rest is not None:
                yield made("complement", pieces.rest)
            case "drop" if pieces.rest is not None:
                rest = pieces.rest if part.whole == "direction" else joined(pieces.rest, subject.reads)
                yield made("drop", rest)
            case "random" | "random matched":
                factor = whole_norm / size if operation == "random matched" else 1.0
                norms = {name: factor * norm for name, norm in own_norms.items()}
                for number, twin, energy in _twins(lens, part, pieces, norms, subject, controls):
                    one = made(operation, twin, factor * size, number)
                    yield replace(one, energy=energy / subject.norm**2, energy_of_whole=energy / whole_norm**2)


def _twins(
    lens: str, part: Part, pieces: Pieces, norms: Mapping[str, float], subject: Subject, controls: int
) -> Iterator[tuple[int, Direction, float]]:
    """Random twins with these norms by parameter, and the squared norm of each draw before its norms were matched."""
    draw = pieces.twin or draws_like(pieces.keep)
    for number in range(part.twins(controls)):
        twin = draw(seed_of(subject.name, lens, part.name, str(number)))
        own = twin.norms()
        matched = {name: delta * (norms[name] / own[name] if own[name] > 0 else 0.0)
                   for name, delta in twin.deltas.items()}  # fmt: skip
        yield number, replace(twin, deltas=matched), sum(value**2 for value in own.values())


def seed_of(*words: str) -> int:
    """A seed of its own for every run, part and number, so that no two controls share their luck."""
    return int(hashlib.blake2b("|".join(words).encode(), digest_size=6).hexdigest(), 16)


# -------------------------------------------------------------------- pieces of directions


def only(direction: Direction, names: frozenset[str]) -> Direction:
    """The deltas of these parameters."""
    return replace(direction, deltas={name: delta for name, delta in direction.deltas.items() if name in names})


def without(direction: Direction, names: frozenset[str]) -> Direction:
    """The deltas of all other parameters."""
    return only(direction, frozenset(direction.deltas.keys() - names))


def joined(first: Direction, second: Direction) -> Direction:
    """Two directions on different parameters as one."""
    return replace(first, deltas={**first.deltas, **second.deltas}, weights={**first.weights, **second.weights})


def split_each(
    direction: Direction, names: frozenset[str], divide: Callable[[str, Delta], parts.Split]
) -> tuple[Direction, Direction]:
    """Divide the deltas of these parameters; all others belong to the second direction, which is the rest."""
    pieces, rest = {}, dict(direction.deltas)
    for name in sorted(names & direction.deltas.keys()):
        pieces[name], rest[name] = divide(name, direction.deltas[name])
    return replace(direction, deltas=pieces), replace(direction, deltas=rest)


def mismatch(keep: Direction, rest: Direction, whole: Direction) -> float:
    """`|keep + rest - whole| / |whole|`, estimated with Gaussian inputs; exact up to a factor near 1.

    Nothing dense is formed: both sides are applied to 16 random inputs in fp64. The largest ratio over parameters
    would punish tiny ones, so squares are summed over all parameters first.
    """
    gap = size = 0.0
    for name in sorted({*keep.deltas, *rest.deltas, *whole.deltas}):
        present = [one.deltas[name] for one in (keep, rest) if name in one.deltas]
        target = whole.deltas.get(name)
        weight = next((one.weights[name] for one in (whole, keep, rest) if name in one.weights), None)
        shape = (target or present[0]).shape
        probes = torch.randn(shape[-1], _PROBES, generator=keyed_random.generator(f"sum|{name}"), dtype=torch.float64)
        zero = Delta.zero(shape)
        gap += parts.mismatch(present, target or zero, weight, probes)
        size += parts.mismatch([], target or zero, weight, probes)
    return math.sqrt(gap / size) if size > 0 else math.sqrt(gap)


def require_sum(keep: Direction, rest: Direction, whole: Direction, name: str) -> None:
    """Raise unless the two pieces add up to the whole."""
    found = mismatch(keep, rest, whole)
    if not found <= LARGEST_MISMATCH:
        raise RuntimeError(f"{name}: keep and drop miss the whole by {found:.1e} of its norm")
