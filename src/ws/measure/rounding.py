"""What half precision does to the scores of a probe, measured on the model at hand.

bfloat16 is used where it is fast; whether it is exact enough depends on the model. The unedited model scores the first
rows of a probe in its own dtype and in fp32:

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
"""Beyond this an fp32 copy costs more memory than the answer is worth."""


class Rounding(NamedTuple):
    """Differences between a probe's log-ratios in the model's dtype and in fp32, nats."""

    dtype: str
    rows: int
    mean_shift: float
    p95: float

    @property
    def is_small(self) -> bool:
        """Whether scores in this dtype can stand for those in fp32."""
        return self.mean_shift <= LARGEST_SHIFT and self.p95 <= LARGEST_P95


def measure(model: ChatModel, probe: Probe) -> Rounding | None:
    """Score the first rows twice; None for an fp32 model and for one too large to copy."""
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
