"""Everything that decides a run, where its folder is, and how both are written down and found again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from ws.base.settings import make as make_settings
from ws.base.store import Shards, content_key
from ws.base.version import __version__
from ws.fitting.behaviour import Behaviour
from ws.fitting.data import Grid
from ws.fitting.judge import JudgeSettings
from ws.fitting.responses import LOCAL, EngineSettings
from ws.measure.score import SCORES_VERSION
from ws.model import loading
from ws.model.chat import Thinking
from ws.model.loading import ChatModel, Dtype

DEFAULT_ALPHAS = (-2.0, -1.0, 0.0, 1.0, 2.0)


@dataclass(frozen=True)
class Settings:
    """Everything that decides a run. `train` and `sampling` hold what the user gave; the model folder adds the rest.

    `out` and `cache_memory` (GiB) decide where and how fast, not what.
    """

    model: str = "pocket"
    behaviour: str = "sycophancy"
    adapter: str = "lora"
    seed: int = 0
    data_seed: int = 0
    out: Path = Path("out")
    dtype: Dtype = "auto"
    device: str = "auto"
    thinking: Thinking = "off"
    attention: str = "auto"
    revision: str | None = None
    trust_remote_code: bool = False
    cache_memory: float = loading.CACHE_MEMORY / 2**30
    grid: Grid = field(default_factory=Grid)
    sampling: Mapping[str, Any] = field(default_factory=dict)
    train: Mapping[str, Any] = field(default_factory=dict)
    judge: JudgeSettings = field(default_factory=JudgeSettings)
    engine: EngineSettings = LOCAL
    pairs: Path | None = None
    alphas: tuple[float, ...] = DEFAULT_ALPHAS
    control_seeds: int = 10
    dilemmas: str = "own"
    rows: int | None = None
    samples: int = 6

    def load(self) -> ChatModel:
        """The model, as the settings want it."""
        return loading.load(
            self.model, dtype=self.dtype, device=self.device, thinking=self.thinking, attention=self.attention,
            revision=self.revision, trust_remote_code=self.trust_remote_code,
            cache_memory=round(self.cache_memory * 2**30),
        )  # fmt: skip


def run_path(settings: Settings, subject: Behaviour) -> Path:
    """`out/<model>/<behaviour>/<adapter>/seed<k>`, with `-data<j>` behind it for another data seed."""
    seed = f"seed{settings.seed}" + (f"-data{settings.data_seed}" if settings.data_seed else "")
    return settings.out / loading.model_slug(settings.model) / subject.name / settings.adapter / seed


def shared_base(model: ChatModel, out: Path) -> Shards:
    """Scores of the unedited model that all its runs share, `out/<model>/base/<key of what decides them>/`."""
    key = content_key(model.describe(), __version__, SCORES_VERSION)
    return Shards(out / model.slug / "base" / key)


def stored_settings(settings: Settings) -> dict[str, Any]:
    """Settings as plain data, without what has no effect on results."""
    plain = asdict(settings)
    del plain["out"], plain["cache_memory"]
    return {name: str(value) if isinstance(value, Path) else value for name, value in plain.items()}


def restore_settings(stored: Mapping[str, Any], out: Path) -> Settings:
    """Settings of an existing run, for single stages on it."""
    known = {f.name for f in fields(Settings)}
    values = {name: value for name, value in stored.items() if name in known}
    values["grid"] = make_settings(Grid, values["grid"], "config.json, grid")
    values["judge"] = make_settings(JudgeSettings, values["judge"], "config.json, judge")
    values["engine"] = make_settings(EngineSettings, values.get("engine", {}), "config.json, engine")
    values["pairs"] = Path(values["pairs"]) if values["pairs"] else None
    return make_settings(Settings, {**values, "out": out}, "config.json")
