"""How cost grows with the amount of work: seconds at several sizes, and the exponent b of seconds = a * n^b.

b is the slope of log seconds over log n by least squares, of the medians; its range is that of the single repetitions.
Below 1, something is shared or fixed; above 1, something is repeated.
"""

from __future__ import annotations

import random
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate, count, islice
from pathlib import Path
from typing import Any

import numpy as np
import shapes
import torch
from inputs import Inputs
from timing import seconds
from workload import Growth

from ws import adapters
from ws.adapters import AdapterSettings
from ws.base.poles import POLES
from ws.edit.condition import Condition, Edit
from ws.eval import dilemmas, sycophancy
from ws.fitting import behaviour, train, train_settings
from ws.fitting.train import Examples
from ws.fitting.train_settings import TrainSettings
from ws.measure.probe import Probe, ProbeRow
from ws.measure.score import score
from ws.model.chat import Message, SupervisedTokens
from ws.model.loading import ChatModel

SCORED_ROWS, SCORED_TOKENS = 8, 128
TRAINED_ROWS, TRAINED_TOKENS, TRAINED_PROMPT = 4, 128, 64


@dataclass(frozen=True)
class Series:
    """Seconds at growing sizes: `seconds[i]` are the repetitions at `sizes[i]`."""

    what: str
    sizes: tuple[float, ...]
    seconds: tuple[tuple[float, ...], ...]

    @property
    def medians(self) -> list[float]:
        """Median seconds of every size."""
        return [statistics.median(times) for times in self.seconds]

    @property
    def exponent(self) -> float:
        """b of the medians."""
        return fitted_exponent(self.sizes, self.medians)

    @property
    def exponent_range(self) -> tuple[float, float]:
        """Smallest and largest b of a single repetition."""
        single = [fitted_exponent(self.sizes, times) for times in zip(*self.seconds, strict=True)]
        return min(single), max(single)

    def as_record(self) -> dict[str, Any]:
        """Plain data for `results.json`."""
        return {
            "what": self.what, "sizes": self.sizes, "seconds": self.seconds, "exponent": self.exponent,
            "exponent_range": self.exponent_range,
        }  # fmt: skip


def fitted_exponent(sizes: Sequence[float], times: Sequence[float]) -> float:
    """b of times = a * sizes^b, least squares in log-log."""
    return float(np.polyfit(np.log(sizes), np.log(times), 1)[0])


def measure(inputs: Inputs) -> list[Series]:
    """Every series of the workload."""
    given = inputs.workload.growth
    assert given is not None
    return [*_on_model(inputs, given), *_shapes(given)]


def _on_model(inputs: Inputs, given: Growth) -> list[Series]:
    model = inputs.load()
    edit = Edit("d", inputs.direction(model))
    whole = dilemmas.probe()
    probe = Probe(whole.name, whole.kind, whole.rows[: inputs.workload.scoring_rows])

    def alphas(number: int) -> object:
        return score(model, [probe], [Condition.of(edit, (n + 1) / number) for n in range(number)])

    def directions(number: int) -> object:
        direction = inputs.direction(model)
        edits = [Edit(f"d{n}", direction * (1 + n / number)) for n in range(number)]
        return score(model, [probe], [Condition.of(one, 1.0) for one in edits])

    def rows(number: int) -> object:
        return score(model, [distinct_rows(number)], [Condition.of(edit, 1.0)])

    def seeds(number: int) -> None:
        _fit(model, inputs, "lora", range(number))

    return [
        _grown("scoring: strengths of one Direction, and the base", given.alphas, alphas, given.repeats),
        _grown("scoring: Directions in one call, and the base", given.directions, directions, given.repeats),
        _grown("scoring: rows of a probe, one strength and the base", given.rows, rows, given.repeats),
        _grown("training: seeds, pos and neg", given.seeds, seeds, given.repeats),
        _families(model, inputs, given),
    ]


def _grown(what: str, sizes: Sequence[int], work: Callable[[int], object], repeats: int) -> Series:
    """Sizes in turn, `repeats` times, after one untimed run of the smallest."""
    work(sizes[0])
    rounds = [[seconds(partial(work, size)) for size in sizes] for _ in range(repeats)]
    return Series(what, tuple(sizes), tuple(zip(*rounds, strict=True)))


def _fit(model: ChatModel, inputs: Inputs, family: str, seeds: Sequence[int]) -> None:
    """Both signs under every seed, as a sweep fits them: with what earlier families have left."""
    chosen = train_settings.resolve(model, family, {"validation": 0.0})
    pairs = inputs.pairs.gather_every(inputs.workload.sweep_every)
    with tempfile.TemporaryDirectory() as scratch:
        for seed in seeds:
            for sign in POLES:
                folder = Path(scratch) / f"{sign}{seed}"
                train.fit(model, pairs, sign, chosen, seed=seed, data_seed=0, folder=folder)


def _families(model: ChatModel, inputs: Inputs, given: Growth) -> Series:
    """Cumulated seconds of the first n families."""
    _fit(model, inputs, given.families[0], [0])
    rounds = [
        list(accumulate(seconds(partial(_fit, model, inputs, family, [0])) for family in given.families))
        for _ in range(given.repeats)
    ]
    sizes = tuple(range(1, len(given.families) + 1))
    return Series(f"training: families ({', '.join(given.families)})", sizes, tuple(zip(*rounds, strict=True)))


# -------------------------------------------------------------------- rows


def distinct_rows(number: int) -> Probe:
    """A probe of `number` rows in which nothing is asked twice.

    Clusters of the dilemma and sycophancy probes in a fixed random order, again and again. Every cluster of every round
    opens with a number of its own, so that a situation is shared by its own rows and never by its copies.
    """
    pool = [*dilemmas.probe().rows, *sycophancy.probe(behaviour.load("sycophancy")).rows]
    clusters: dict[str, list[ProbeRow]] = {}
    for row in pool:
        clusters.setdefault(row.cluster, []).append(row)
    order = list(clusters)
    random.Random("growth").shuffle(order)
    endless = (
        _numbered(row, around * len(order) + place)
        for around in count()
        for place, cluster in enumerate(order)
        for row in clusters[cluster]
    )
    return Probe("distinct", "choice", tuple(islice(endless, number)))


def _numbered(row: ProbeRow, number: int) -> ProbeRow:
    first, *rest = row.messages
    opened = Message(role=first["role"], content=f"Case {number}. {first['content']}")
    return replace(row, row=f"{number}/{row.row}", messages=(opened, *rest), cluster=f"{number}/{row.cluster}")


# -------------------------------------------------------------------- shapes


def _shapes(given: Growth) -> list[Series]:
    """One batch of scoring and one step of training over random models; n: matrix parameters of their layers."""
    sizes, scoring, training = [], [], []
    for name in given.shapes:
        model = shapes.in_memory(name, shapes.fast_dtype())
        sizes.append(shapes.SHAPES[name].layers * shapes.SHAPES[name].layer_parameters)
        works = {"scoring": partial(_score_batch, model), "training": _training_step(model)}
        for series, work in zip((scoring, training), works.values(), strict=True):
            work()
            series.append(tuple(seconds(work) for _ in range(given.repeats)))
        del model, works, work
    listed = ", ".join(name.removeprefix("qwen3-").removesuffix("-shape") for name in given.shapes)
    scored, trained = SCORED_ROWS * SCORED_TOKENS, f"{TRAINED_ROWS} rows x {TRAINED_TOKENS} tokens"
    return [
        Series(f"scoring: a batch of {scored} tokens, parameters in layers ({listed})", tuple(sizes), tuple(scoring)),
        Series(f"training: a LoRA step of {trained}, parameters in layers ({listed})", tuple(sizes), tuple(training)),
    ]


def _ids(rows: int, tokens: int) -> list[list[int]]:
    return [[(7 * row + 13 * column) % 1000 for column in range(tokens)] for row in range(rows)]


@torch.no_grad()
def _score_batch(model: ChatModel) -> object:
    ids = torch.tensor(_ids(SCORED_ROWS, SCORED_TOKENS), device=model.device)
    rows = torch.arange(SCORED_ROWS, device=model.device)
    return model.split.logits_at(ids, rows, torch.full_like(rows, SCORED_TOKENS - 1))


def _training_step(model: ChatModel) -> Callable[[], None]:
    rows = [SupervisedTokens(ids, TRAINED_PROMPT) for ids in _ids(TRAINED_ROWS, TRAINED_TOKENS)]
    chosen = TrainSettings(adapter=AdapterSettings(), batch_size=TRAINED_ROWS, validation=0.0)

    def step() -> None:
        attached = adapters.attach(model.network, chosen.adapter, model.name)
        try:
            train.optimise(model, Examples(rows, [], 0), attached.trainable, chosen, seed=0)
        finally:
            attached.detach()

    return step


# -------------------------------------------------------------------- table


def as_table(records: Sequence[Mapping[str, Any]]) -> str:
    """Records of Series as a Markdown table."""
    lines = ["| what grows | n | median s | exponent b (range) |", "|---|---|---|---|"]
    for one in records:
        sizes = ", ".join(f"{size:.3g}" if size >= 1e5 else f"{size:g}" for size in one["sizes"])
        medians = ", ".join(f"{statistics.median(times):.3g}" for times in one["seconds"])
        low, high = one["exponent_range"]
        lines.append(f"| {one['what']} | {sizes} | {medians} | {one['exponent']:.2f} ({low:.2f}-{high:.2f}) |")
    return "\n".join(lines)
