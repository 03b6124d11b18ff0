"""Choose a learning rate: try a few and take the one with the lowest loss, averaged over both signs.

The range grows at an end that is best, so that a poor guess of the range does not decide.

Both signs get one rate, so that their updates can be compared.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import polars as pl

from ws.base import console
from ws.base.errors import UserError
from ws.base.poles import Pole
from ws.fitting.train import DivergedError
from ws.fitting.train_settings import TrainSettings

CANDIDATES: dict[str, tuple[float, ...]] = {
    "lora": (1e-4, 2e-4, 5e-4),
    "rslora": (5e-5, 1e-4, 2e-4),
    "dora": (1e-4, 2e-4, 5e-4),
    "pissa": (5e-5, 1e-4, 2e-4),
    "delora": (2e-4, 1e-3, 5e-3),
    "oft": (2e-4, 1e-3, 4e-3),
    "boft": (2e-4, 1e-3, 4e-3),
    "ia3": (1e-3, 3e-3, 1e-2),
}
"""Rates that `--lr auto` tries for real models, by family. At LoRA's rates, IA3 and OFT would learn nothing."""


@dataclass(frozen=True)
class TriedRate:
    """A learning rate with the last loss of each sign and their mean; None if a fit diverged."""

    lr: float
    pos: float | None = None
    neg: float | None = None
    mean: float | None = None

    def __str__(self) -> str:
        return f"{self.lr:g} -> " + ("diverged" if self.mean is None else f"{self.mean:.4f}")


@dataclass(frozen=True)
class RateChoice:
    """The rate with the lowest mean loss, and all rates that were tried; stored in `lr_sweep.json`."""

    chosen: float
    tried: tuple[TriedRate, ...]

    @classmethod
    def of_record(cls, record: Mapping[str, object]) -> RateChoice:
        """The choice stored in `lr_sweep.json`."""
        return cls(record["chosen"], tuple(TriedRate(**row) for row in record["tried"]))  # type: ignore[attr-defined, arg-type]

    @property
    def is_at_an_end(self) -> bool:
        """Whether the chosen rate is the lowest or the highest tried, so that a better one may be outside the range."""
        return self.chosen in (self.tried[0].lr, self.tried[-1].lr)


FURTHER = 3
"""How many rates beyond the given ones are tried while the best is the lowest or the highest so far."""
LARGEST_RATIO = 5.0


def choose(rates: Sequence[float], losses_at: Callable[[float], Mapping[Pole, float]]) -> RateChoice:
    """Fit both signs at every rate with `losses_at`, which returns each sign's last loss; skip rates that diverge.

    If the best rate is the lowest or the highest, up to `FURTHER` more are tried beyond it, each in the ratio of the
    last two at that end, at most `LARGEST_RATIO`.
    """
    tried = sorted((_try(rate, losses_at) for rate in rates), key=lambda one: one.lr)
    for _ in range(FURTHER):
        best = _best(tried)
        if best is None or len(tried) < 2 or best not in (tried[0], tried[-1]):
            break
        end, neighbour = tried[:2] if best is tried[0] else tried[:-3:-1]
        ratio = min(max(end.lr / neighbour.lr, 1 / LARGEST_RATIO), LARGEST_RATIO)
        further = _try(float(f"{end.lr * ratio:.4g}"), losses_at)
        tried = sorted([*tried, further], key=lambda one: one.lr)
    if (best := _best(tried)) is None:
        listed = ", ".join(f"{rate:g}" for rate in rates)
        raise UserError(f"training diverged at all learning rates that were tried ({listed})", "Give a lower --lr.")
    return RateChoice(best.lr, tuple(tried))


def _best(tried: Sequence[TriedRate]) -> TriedRate | None:
    return min((one for one in tried if one.mean is not None), key=lambda one: one.mean or 0.0, default=None)


def _try(rate: float, losses_at: Callable[[float], Mapping[Pole, float]]) -> TriedRate:
    try:
        losses = losses_at(rate)
    except DivergedError as error:
        console.warn(f"learning rate {rate:g} is ruled out: {error}")
        return TriedRate(rate)
    return TriedRate(rate, losses["pos"], losses["neg"], (losses["pos"] + losses["neg"]) / 2)


def require_validation(chosen: TrainSettings, pairs: pl.DataFrame | None = None) -> None:
    """Raise unless there will be a validation loss to choose by: training losses favour high rates and are noisy."""
    remedy = "Give a number as --lr"
    if chosen.validation == 0:
        raise UserError("--lr auto needs a validation loss, but the validation share is 0", f"{remedy}, or raise it.")
    if pairs is None:
        return
    for sign in ("pos", "neg"):
        if pairs.filter(pl.col(f"keep_{sign}"))["topic"].n_unique() < 2:
            raise UserError(
                f"--lr auto holds out topics, but the kept {sign} responses cover fewer than two",
                f"{remedy}, or sample more topics.",
            )
