"""Controls: directions that hold no information about the behaviour.

Random directions are like the trained one, parameter by parameter (`algebra.random_like`). Permuted ones have its
deltas in other layers. Directions from shuffled personas are trained like it.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable

import polars as pl
import torch

from ws.algebra.delta import Delta
from ws.algebra.direction import Direction
from ws.algebra.random_like import draws_like
from ws.base.errors import UserError
from ws.edit.condition import Edit

RANDOM = "random"


def random_edits(direction: Direction, seeds: int) -> list[Edit]:
    """`spectrum_like` for seeds 0, 1, ... as Edits named `random`."""
    draw = draws_like(direction)
    return [Edit(RANDOM, draw(seed), seed=seed) for seed in range(seeds)]


def control_strengths(alphas: Iterable[float]) -> tuple[float, ...]:
    """The strengths at which random directions are measured: for each sign of `alphas` 1 if it was asked for, else the
    largest, without its sign.

    A random direction turned round is another random direction, so one sign is measured and its band serves for both.
    One strength, because a band at every strength would multiply the cost.
    """
    asked = tuple(alphas)
    sides = ({abs(alpha) for alpha in asked if alpha < 0}, {alpha for alpha in asked if alpha > 0})
    return tuple(sorted({1.0 if 1.0 in side else max(side) for side in sides if side}))


PERMUTED = "layers permuted"
SHUFFLED = "personas shuffled"


def possible_orders(direction: Direction) -> int:
    """How many orders of the touched layers leave none at its place: 0, 1, 2, 9, 44 for 1, 2, 3, 4, 5 layers."""
    orders = 1
    for layers in range(1, len(direction.layer_numbers) + 1):
        orders = layers * orders + (-1) ** layers
    return orders


def permuted_edits(direction: Direction, count: int) -> list[Edit]:
    """`count` different orders of the layers as Edits, without repeats, or all `possible_orders` if these are fewer."""
    layers, wanted = len(direction.layer_numbers), min(count, possible_orders(direction))
    seeds: dict[tuple[int, ...], int] = {}
    for seed in itertools.count():
        if len(seeds) >= wanted:
            break
        seeds.setdefault(tuple(_derangement(layers, seed)), seed)
    return [Edit(PERMUTED, permuted_layers(direction, seed), seed) for seed in seeds.values()]


def permuted_layers(direction: Direction, seed: int) -> Direction:
    """Every delta moved to the same module of another touched layer; no layer keeps its own.

    Norms, ranks and spectra stay the same; only the place of each delta changes. A delta that is a function of the base
    weights is first computed in its own layer and then moved as a dense delta.
    """
    if direction.needs_weights:
        direction = direction.resolved()
    layers = direction.layer_numbers
    if len(layers) < 2:
        raise UserError("a direction on one layer cannot be permuted", "Use random directions.")
    order = _derangement(len(layers), seed)
    target = {layers[index]: layers[order[index]] for index in range(len(layers))}
    deltas: dict[str, Delta] = {}
    of_layer: dict[str, int] = {}
    for name, delta in direction.deltas.items():
        layer = direction.layers.get(name)
        if layer is None:
            continue
        moved = re.sub(rf"\.{layer}\.", f".{target[layer]}.", name, count=1)
        if moved not in direction.deltas or direction.deltas[moved].shape != delta.shape:
            raise UserError(
                f"{name} has no counterpart in layer {target[layer]}",
                "Use random directions: the layers of this model differ.",
            )
        deltas[moved], of_layer[moved] = delta, target[layer]
    provenance = {"control": PERMUTED, "seed": seed, "like": dict(direction.provenance)}
    return Direction(deltas, direction.base, of_layer, provenance)


def _derangement(count: int, seed: int) -> list[int]:
    """A permutation without fixed points."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order: list[int] = torch.randperm(count, generator=generator).tolist()
        if all(index != place for index, place in enumerate(order)):
            return order


def shuffled_pairs(pairs: pl.DataFrame, seed: int) -> pl.DataFrame:
    """The pairs with the two sides exchanged in a random half of the rows: the contrast of personas is gone.

    A direction trained on them keeps everything else (text, length, optimiser). It is reported at its own norm:
    rescaling to the trained norm would amplify the little of the trait that chance leaves.
    """
    swapped = torch.rand(len(pairs), generator=torch.Generator().manual_seed(seed)) < 0.5
    mark = pl.Series("swapped", swapped.tolist())
    sided = [name.removesuffix("_pos") for name in pairs.columns if name.endswith("_pos")]
    columns = []
    for name in sided:
        for side, other in (("pos", "neg"), ("neg", "pos")):
            columns.append(
                pl.when(pl.col("swapped")).then(pl.col(f"{name}_{other}")).otherwise(pl.col(f"{name}_{side}"))
                .alias(f"{name}_{side}")
            )  # fmt: skip
    return pairs.with_columns(mark).with_columns(columns).drop("swapped")
