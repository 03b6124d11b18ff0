"""Where in the network: layers, kinds of modules, attention heads."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from ws.algebra import parts
from ws.algebra.delta import Delta
from ws.model import architecture
from ws.subspace.lenses.registry import Material, lens, require
from ws.subspace.variants import Part, Pieces, only, split_each, without

THIRDS = ("early", "middle", "late")
MODULES: dict[str, tuple[str, ...]] = {
    "attention": ("q", "k", "v", "o"), "mlp": ("gate", "up", "down"), "residual writes": ("o", "down"),
    "reads": ("q", "k", "v", "gate", "up"), "q k v": ("q", "k", "v"), "gate up": ("gate", "up"),
    **{role: (role,) for role in architecture.ROLES},
}  # fmt: skip
"""Families of modules, by the roles of their matrices."""


@lens("layers", "In which layers? Each alone, each left out, and early, middle and late thirds.")
def layers(material: Material) -> Iterator[Part]:
    """Layers are those that the direction touches; thirds need at least three of them."""
    touched = material.direction.layer_numbers

    def of(*chosen: int) -> Pieces:
        return Pieces(material.direction.keep(layers=chosen), material.direction.drop(layers=chosen))

    for layer in touched:
        yield Part(f"layer {layer}", partial(of, layer), layer=layer)
    if len(touched) >= len(THIRDS):
        for number, name in enumerate(THIRDS):
            start, stop = (round(len(touched) * place / len(THIRDS)) for place in (number, number + 1))
            yield Part(name, partial(of, *touched[start:stop]))


@lens("modules", "In which kinds of modules, on the reading and on the writing side?")
def modules(material: Material) -> Iterator[Part]:
    """Kinds that one matrix holds together (a fused q, k, v) cannot be told apart and are unavailable."""
    fused = {role: site.roles for site in material.sites.values() for role in site.roles if len(site.roles) > 1}

    def of(roles: tuple[str, ...]) -> Pieces:
        partly = [role for role in roles if not set(fused.get(role, ())) <= set(roles)]
        require(not partly, f"one matrix holds {' '.join(fused.get(partly[0], ()))}" if partly else "")
        names = material.with_roles(*roles)
        require(bool(names), f"the direction does not change {' or '.join(roles)}")
        require(len(names) < len(material.direction.deltas), "the direction changes nothing else")
        return Pieces(only(material.direction, names), without(material.direction, names))

    for name, roles in MODULES.items():
        yield Part(name, partial(of, roles), module=name)


@lens("heads", "In which attention heads? Rows of q, k, v and columns of o.")
def heads(material: Material) -> Iterator[Part]:
    """One part per key-value head and layer: its rows of k and v, and the rows of q and columns of o of all query heads
    that share it. It is the finest division in which no row belongs to two parts.

    The part of a head is every delta on those rows and columns; the rest is everything else.
    """
    config = architecture.text_config(material.model.network)
    count = int(config.num_attention_heads)
    groups = int(getattr(config, "num_key_value_heads", None) or count)
    size = int(getattr(config, "head_dim", None) or config.hidden_size // count)
    per_group = {"q": size * count // groups, "k": size, "v": size, "o": size * count // groups}

    def divide(name: str, delta: Delta, group: int) -> parts.Split:
        (role,) = material.sites[name].roles

        def mask(one: Delta, _weight: torch.Tensor | None) -> parts.Split:
            scale, length = (parts.scale_columns, one.shape[1]) if role == "o" else (parts.scale_rows, one.shape[0])
            inside = torch.zeros(length)
            inside[group * per_group[role] : (group + 1) * per_group[role]] = 1.0
            return parts.Split(scale(one, inside), scale(one, 1 - inside))

        return material.oriented(name, delta, mask)

    def of(layer: int, group: int) -> Pieces:
        names = material.with_roles("q", "k", "v", "o")
        names = frozenset(name for name in names if material.sites[name].layer == layer)
        require(bool(names), "the direction does not change attention there")
        fused = [material.sites[name] for name in names if len(material.sites[name].roles) > 1]
        require(not fused, "q, k and v are one matrix whose rows are in an order of its own")
        return Pieces(*split_each(material.direction, names, lambda name, delta: divide(name, delta, group)))

    for layer in material.direction.layer_numbers:
        for group in range(groups):
            yield Part(f"layer {layer}, head {group}", partial(of, layer, group), layer=layer)
