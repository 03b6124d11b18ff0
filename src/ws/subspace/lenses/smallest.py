"""The smallest set of matrices that keeps most of the effect, found on dev rows."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

from ws.subspace.lenses.registry import Material, lens, require
from ws.subspace.variants import Part, Pieces, only, without

WANTED = 0.9
"""Share of the effect that the set must keep on dev rows."""


@lens("smallest", "Which few matrices keep 90 % of the effect? Chosen on dev rows, reported on test rows.")
def smallest(material: Material) -> Iterator[Part]:
    """Matrices are ranked by what each does alone, at both signs. The shortest beginning of that list that keeps 90 %
    of the effect is searched by halving; then every matrix that can be left out again is left out, weakest first."""
    names = list(material.direction.deltas)

    def kept(*sets: list[str]) -> list[float]:
        return material.dev_effect([only(material.direction, frozenset(one)) for one in sets])

    def make() -> Pieces:
        (full,) = kept(names)
        require(math.isfinite(full) and full != 0, "the direction moves nothing on the dev rows")
        alone = dict(zip(names, kept(*([name] for name in names)), strict=True))
        ranked = sorted(names, key=lambda name: -alone[name] / full)
        low, high = 0, len(ranked)  # a beginning of length `high` is enough
        while high - low > 1:
            middle = (low + high) // 2
            if kept(ranked[:middle])[0] / full >= WANTED:
                high = middle
            else:
                low = middle
        chosen = ranked[:high]
        for name in reversed(ranked[:high]):
            fewer = [one for one in chosen if one != name]
            if fewer and kept(fewer)[0] / full >= WANTED:
                chosen = fewer
        said = f"{len(chosen)} of {len(names)} matrices: {', '.join(map(_short, sorted(chosen)))}"
        found = frozenset(chosen)
        keep = replace(only(material.direction, found), provenance={"remark": said})
        return Pieces(keep, without(material.direction, found))

    yield Part("smallest set", make, trials=2 * len(names) + 1 + math.ceil(math.log2(max(len(names), 1))))


def _short(parameter: str) -> str:
    """`model.layers.3.self_attn.o_proj.weight` -> `3 o_proj`."""
    words = parameter.removesuffix(".weight").split(".")
    layer = next((word for word in words if word.isdecimal()), "")
    return f"{layer} {words[-1]}".strip()
