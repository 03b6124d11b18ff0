"""How much of everything is measured: one Workload per size of model, and a small one that covers every comparison."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import shapes

from ws.fitting.data import Grid
from ws.model import sources

FAMILIES = ("lora", "dora", "pissa", "delora", "oft", "ia3")


@dataclass(frozen=True)
class Generation:
    """Prompts x samples of `new_tokens` tokens.

    `batches` are the sizes that `generate` may choose from, by what its first `searched_tokens` tokens take.
    """

    prompts: int
    samples: int
    batches: tuple[int, ...]
    new_tokens: int = 48
    searched_tokens: int = 48


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
class Paths:
    """The works on which fast paths are tried: rows of a probe at `alphas` strengths, samples, and one fit of pairs."""

    rows: int
    alphas: int
    prompts: int
    samples: int
    new_tokens: int
    pairs: int
    repeats: int


@dataclass(frozen=True)
class Workload:
    """What is compared on one model, and on how much.

    `grid` is sampled from the model for the pairs; None takes `written` pairs of ready sentences instead. A work that
    takes long is repeated less often than `repeats` (`timing.py`). `checked_rows` of the probe are scored in every way
    and compared. `seeds` are those of the sweep, which takes every `sweep_every`-th pair and is done `sweeps` times.
    `fixed_repeats` counts the processes that are started per fixed cost. `has_aims`: large enough for its ratios to be
    compared with the aims.
    """

    name: str
    comparisons: tuple[str, ...]
    repeats: int
    grid: Grid | None
    written: int
    scoring_rows: int
    generation: Generation
    seeds: tuple[int, ...]
    paths: Paths
    checked_rows: int = 10_000
    families: tuple[str, ...] = FAMILIES
    sweep_every: int = 1
    sweeps: int = 1
    pipeline: Pipeline | None = None
    growth: Growth | None = None
    fixed_repeats: int = 0
    has_aims: bool = True


COMPARISONS = ("scoring", "training", "sweeping", "generating", "algebra", "activations", "pipeline", "paths")

FULL = Workload(
    name="full", comparisons=COMPARISONS, repeats=3, grid=Grid(samples=10), written=0, scoring_rows=10_000,
    generation=Generation(200, 10, (50, 100, 200)), seeds=(0, 1, 2), sweep_every=4, sweeps=2,
    paths=Paths(200, 4, 20, 10, 48, 128, 5),
    pipeline=Pipeline(Grid(samples=10), None),
    growth=Growth(
        repeats=2, alphas=(1, 2, 4, 8, 16), directions=(1, 2, 4, 8), families=FAMILIES, seeds=(1, 2, 4),
        rows=(50, 100, 200, 500, 1000, 2000),
        shapes=("qwen3-0.1b-shape", "qwen3-0.6b-shape", "qwen3-1.7b-shape"),
    ),
    fixed_repeats=3,
)  # fmt: skip
QUICK = Workload(
    name="quick", comparisons=COMPARISONS, repeats=1, grid=Grid(topics=6, personas=2, samples=3), written=0,
    scoring_rows=48, generation=Generation(10, 4, (20, 40)), seeds=(0,), paths=Paths(24, 2, 3, 4, 8, 8, 1),
    pipeline=Pipeline(Grid(topics=4, personas=1, samples=4), 12),
    growth=Growth(
        repeats=1, alphas=(1, 2), directions=(1, 2), families=FAMILIES[:2], seeds=(1, 2), rows=(20, 40),
        shapes=("qwen3-0.04b-shape", "qwen3-0.1b-shape"),
    ),
    fixed_repeats=1, has_aims=False,
)  # fmt: skip
SHAPE = Workload(
    name="shape", comparisons=("scoring", "training", "generating", "algebra", "activations", "paths"), repeats=3,
    grid=None,
    written=32, scoring_rows=32, checked_rows=8, seeds=(0,), paths=Paths(12, 3, 3, 8, 12, 8, 3),
    generation=Generation(10, 10, (50, 100), searched_tokens=4),
)  # fmt: skip
REAL = replace(
    FULL, name="real", comparisons=("scoring", "training", "generating", "algebra", "pipeline"), repeats=1,
    grid=Grid(topics=4, personas=5, samples=4), scoring_rows=32, checked_rows=8, seeds=(0,),
    generation=Generation(10, 6, (30, 60), searched_tokens=4), pipeline=Pipeline(Grid(topics=5, samples=4), 20),
    growth=None, fixed_repeats=0,
)  # fmt: skip
"""A real chat model of 135 M parameters, in float32 on both sides."""
RUN = replace(
    FULL, name="run", comparisons=("algebra", "activations"), grid=None, pipeline=None, growth=None, fixed_repeats=0,
    has_aims=False,
)  # fmt: skip
"""What can be done with the adapters and the personas of a run."""
WORKLOADS = {one.name: one for one in (FULL, QUICK, SHAPE, REAL, RUN)}


def choose(model: str, quick: bool, of_run: bool = False) -> Workload:
    """The workload of a model by its name, or of a run."""
    if of_run:
        return RUN
    if model in shapes.SHAPES:
        return SHAPE
    if model == sources.SMOLLM2:
        return REAL
    return QUICK if quick else FULL


def without(names: Sequence[str], skipped: Sequence[str]) -> tuple[str, ...]:
    """The names that are not skipped, in their order."""
    return tuple(name for name in names if name not in skipped)
