"""What lenses are given in tests: the material around a direction, and the pieces and variants of a lens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ws import adapters
from ws.adapters import diff
from ws.algebra.direction import Direction
from ws.fitting import behaviour
from ws.model.loading import ChatModel
from ws.subspace import prompts
from ws.subspace.lenses import LENSES, Material
from ws.subspace.variants import Pieces, Subject, Unavailable, Variant, variants


def material(model: ChatModel, direction: Direction, family: str = "lora", pos: Path | None = None,
             neg: Path | None = None, others: dict[str, Direction] | None = None) -> Material:  # fmt: skip
    def sizes(directions: Sequence[Direction]) -> list[float]:
        return [sum(one.norms().values()) for one in directions]

    def sides() -> tuple[Direction, Direction]:
        assert pos is not None and neg is not None
        return diff.task_vector(model, pos), diff.task_vector(model, neg)

    def folders() -> tuple[adapters.AdapterFolder, adapters.AdapterFolder]:
        assert pos is not None and neg is not None
        return adapters.read(pos), adapters.read(neg)

    return Material(
        model, Subject.on(model, direction, "test"), family, others or {}, sides, folders,
        lambda: prompts.of(behaviour.load("sycophancy")).fit, sizes,
    )  # fmt: skip


def made(lens: str, source: Material) -> dict[str, Pieces]:
    found = {}
    for part in LENSES[lens].parts(source):
        try:
            found[part.name] = part.make()
        except Unavailable:
            continue
    return found


def of_lens(lens: str, source: Material, part: str, controls: int = 3) -> list[Variant]:
    (wanted,) = [one for one in LENSES[lens].parts(source) if one.name == part]
    return list(variants(lens, wanted, source.subject, controls))
