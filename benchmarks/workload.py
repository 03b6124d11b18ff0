"""How much of everything is measured: one Workload per size of model, and a small one that covers every comparison."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import shapes

from ws.data import Grid

FAMILIES = ("lora", "dora", "pissa", "delora", "oft", "ia3")


@dataclass(frozen=True)
class Generation:
    """Prompts x samples of `new_tokens` tokens; `batches` are the sizes that `generate` may choose from."""

    prompts: int
    samples: int
    batches: tuple[int, ...]
    new_tokens: int = 48


@dataclass(frozen=True)
class Pipeline:
    """The run that is measured end to end: its grid, and how many items of each probe (None: all)."""

    grid: Grid
    rows: int | None


@dataclass(frozen=True)
class Growth:
    """Sizes at which costs are measured; `shapes` names random models."""

    repeats: int
    alphas: tuple[int, ...]
    directions: tuple[int, ...]
    families: tuple[str, ...]
    seeds: tuple[int, ...]
    rows: tuple[int, ...]
    shapes: tuple[str, ...]


@dataclass(frozen=True)
class Workload:
    """What is compared on one model, and on how much.

    `grid` is sampled from the model for the pairs; None takes `written` pairs of ready sentences instead. `seeds` are
    those of the sweep. `fixed_repeats` counts the processes that are started per fixed cost.
    """

    name: str
    comparisons: tuple[str, ...]
    repeats: int
    grid: Grid | None
    written: int
    scoring_rows: int
    generation: Generation
    seeds: tuple[int, ...]
    families: tuple[str, ...] = FAMILIES
    pipeline: Pipeline | None = None
    growth: Growth | None = None
    fixed_repeats: int = 0


COMPARISONS = ("scoring", "training", "sweeping", "generating", "algebra", "pipeline")

FULL = Workload(
    name="full", comparisons=COMPARISONS, repeats=5, grid=Grid(samples=10), written=0, scoring_rows=10_000,
    generation=Generation(200, 10, (50, 100, 200)), seeds=(0, 1, 2), pipeline=Pipeline(Grid(samples=10), None),
    growth=Growth(
        repeats=3, alphas=(1, 2, 4, 8, 16), directions=(1, 2, 4, 8), families=FAMILIES, seeds=(1, 2, 4),
        rows=(50, 100, 200, 500, 1000, 2000),
        shapes=("qwen3-0.1b-shape", "qwen3-0.6b-shape", "qwen3-1.7b-shape"),
    ),
    fixed_repeats=3,
)  # fmt: skip
QUICK = Workload(
    name="quick", comparisons=COMPARISONS, repeats=1, grid=Grid(topics=6, personas=2, samples=3), written=0,
    scoring_rows=48, generation=Generation(10, 4, (20, 40)), seeds=(0,),
    pipeline=Pipeline(Grid(topics=4, personas=1, samples=4), 12),
    growth=Growth(
        repeats=1, alphas=(1, 2), directions=(1, 2), families=FAMILIES[:2], seeds=(1, 2), rows=(20, 40),
        shapes=("qwen3-0.04b-shape", "qwen3-0.1b-shape"),
    ),
    fixed_repeats=1,
)  # fmt: skip
SHAPE = Workload(
    name="shape", comparisons=("scoring", "training", "generating", "algebra"), repeats=3, grid=None, written=64,
    scoring_rows=32, generation=Generation(8, 4, (8, 16, 32)), seeds=(0,),
)  # fmt: skip
WORKLOADS = {one.name: one for one in (FULL, QUICK, SHAPE)}


def choose(model: str, quick: bool) -> Workload:
    """The workload of a model, by its name."""
    if model in shapes.SHAPES:
        return SHAPE
    return QUICK if quick else FULL


def without(names: Sequence[str], skipped: Sequence[str]) -> tuple[str, ...]:
    """The names that are not skipped, in their order."""
    return tuple(name for name in names if name not in skipped)
