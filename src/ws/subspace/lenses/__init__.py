"""Lenses: ways to cut a trained direction into parts, to keep, to drop and to replace by random ones.

    places.py    layers, modules, attention heads
    bases.py     projections on activation and shared subspaces; crops of singular directions
    families.py  parts that belong to an adapter family; norms against directions
    smallest.py  the smallest set of tensors with most of the effect

A lens is one function from a `Material` to parts, registered by `@lens(name, question)`.
"""

from ws.subspace.lenses import bases, families, places, smallest  # noqa: F401 - they register their lenses
from ws.subspace.lenses.registry import LENSES, Lens, Material

__all__ = ["LENSES", "Lens", "Material"]
