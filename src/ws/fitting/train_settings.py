"""The settings for fitting an adapter, and the sources of their values."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from ws import adapters
from ws.adapters import AdapterSettings
from ws.base import settings
from ws.base.errors import UserError
from ws.model.loading import CORRECT, ChatModel


@dataclass(frozen=True)
class TrainSettings:
    """How to fit an adapter; the defaults are those of the replicated work for real models.

    `lr_candidates` are the rates that `--lr auto` tries (if empty: the family's `learning_rate.CANDIDATES`).
    `validation` is the share of topics held out. `micro_tokens` limits memory and changes results by rounding only.
    """

    adapter: AdapterSettings = field(default_factory=AdapterSettings)
    lr: float = 2e-4
    lr_candidates: tuple[float, ...] = ()
    weight_decay: float = 0.01
    warmup_steps: int = 5
    epochs: int = 1
    batch_size: int = 16
    max_length: int = 512
    validation: float = 0.1
    evaluate_every: int = 10
    clip_norm: float = 1.0
    micro_tokens: int = 4_096

    def __post_init__(self) -> None:
        positive = ("lr", "epochs", "batch_size", "max_length", "evaluate_every", "micro_tokens", "clip_norm")
        for name in (*positive, "weight_decay", "warmup_steps"):
            value, may_be_zero = getattr(self, name), name not in positive
            if not (0 < value < math.inf or (may_be_zero and value == 0)):
                remedy = "Give zero or a positive number." if may_be_zero else "Give a positive number."
                raise UserError(f"training setting {name} is {value}", remedy)
        if not all(0 < rate < math.inf for rate in self.lr_candidates):
            told = ", ".join(f"{rate:g}" for rate in self.lr_candidates)
            raise UserError(f"training setting lr_candidates is {told}", "Give positive numbers.")
        if not 0 <= self.validation < 1:
            raise UserError(f"training setting validation is {self.validation}", "Give a share from 0 to below 1.")


def resolve(model: ChatModel, family: str, given: Mapping[str, Any], behaviour: str = "") -> TrainSettings:
    """The settings from three sources. Later ones override earlier ones.

    The sources are: the defaults; what the model folder recommends for this family and behaviour; and the values in
    `given` that are not None.
    """
    adapters.require_family(family)
    of_families = model.recommended("train", behaviour)
    for name in of_families:
        if name not in adapters.FAMILIES:
            raise UserError(f"{model.settings_told}, train: unknown adapter family {name!r}", CORRECT)
    recommended, where = of_families.get(family, {}), f"{model.settings_told}, train.{family}"
    _made(family, recommended, where, CORRECT)
    chosen = recommended | {name: value for name, value in given.items() if value is not None}
    return _made(family, chosen, f"training settings for {family}")


def _made(family: str, chosen: Any, where: str, remedy: str = "") -> TrainSettings:
    """Settings by name, in one mapping, as the settings of the adapter and of training."""
    if not isinstance(chosen, Mapping):
        raise UserError(f"{where} is {chosen!r}, not settings by name", remedy)
    adapter_names = {f.name for f in fields(AdapterSettings)}
    of_adapter = {"family": family} | {name: value for name, value in chosen.items() if name in adapter_names}
    of_training = {name: value for name, value in chosen.items() if name not in adapter_names}
    adapter = settings.make(AdapterSettings, of_adapter, where, remedy)
    return settings.make(TrainSettings, {**of_training, "adapter": adapter}, where, remedy)
