"""Measure the rounding error of half precision in the scores of a probe.

bfloat16 is used where it is fast. Whether it is exact enough depends on the model, so the unedited model scores the
first rows of a probe both in its own dtype and in fp32:

    mean shift = |mean of the differences of log-ratios|, nats      must stay below 0.01
    p95        = 95th percentile of their absolute values, nats     must stay below 0.1
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import NamedTuple

import polars as pl
import torch

from ws.edit.condition import Condition
from ws.measure.probe import Probe
from ws.measure.score import score
from ws.model.loading import ChatModel

ROWS = 64
LARGEST_SHIFT = 0.01
LARGEST_P95 = 0.1
MOST_PARAMETERS = 2_000_000_000
"""For larger models the fp32 copy takes too much memory, so nothing is measured."""


class Rounding(NamedTuple):
    """Differences between a probe's log-ratios in the model's dtype and in fp32, nats."""

    dtype: str
    rows: int
    mean_shift: float
    p95: float

    @property
    def is_small(self) -> bool:
        """Whether the error is small enough to use this dtype instead of fp32."""
        return self.mean_shift <= LARGEST_SHIFT and self.p95 <= LARGEST_P95


def measure(model: ChatModel, probe: Probe) -> Rounding | None:
    """Score the first rows in both dtypes; None if the model is fp32 or too large to copy."""
    if model.dtype == torch.float32 or model.parameter_count > MOST_PARAMETERS:
        return None
    some = Probe(probe.name, probe.kind, probe.rows[:ROWS], answers=probe.answers)
    exact = replace(model, network=copy.deepcopy(model.network).to(torch.float32))
    rounded, reference = (_log_ratios(one, some) for one in (model, exact))
    errors = (rounded - reference).to_numpy()
    return Rounding(
        str(model.dtype).removeprefix("torch."), len(some.rows), float(abs(errors.mean())),
        float(torch.tensor(abs(errors)).quantile(0.95)),
    )  # fmt: skip


def _log_ratios(model: ChatModel, probe: Probe) -> pl.Series:
    return score(model, [probe], [Condition()], description="").filter(metric="logratio").sort("row")["value"]
