"""The catalogue of candidate subspaces of the residual stream, one function per basis.

`registry` holds the decorator and what a basis is made from (`Material`); the other modules hold the bases, by what
they need. Add one with a function and a decorator: docs/subspaces.md.
"""

from ws.subspace.bases import (  # noqa: F401 - importing them fills the registry
    from_activations,
    from_directions,
    from_personas,
    from_weights,
)
from ws.subspace.bases.registry import BASES, Background, Basis, Built, Material, Run, build, named

__all__ = ["BASES", "Background", "Basis", "Built", "Material", "Run", "build", "named"]
