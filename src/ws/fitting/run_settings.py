"""The settings of a run: everything that decides its results, its folder, and how settings are stored and restored."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal

from ws.base import console
from ws.base.errors import UserError
from ws.base.files import content_key
from ws.base.settings import make as make_settings
from ws.base.store import Shards, read_config
from ws.base.version import __version__
from ws.fitting import behaviour
from ws.fitting.behaviour import Behaviour
from ws.fitting.data import Grid
from ws.fitting.judge import JudgeSettings
from ws.fitting.responses import LOCAL, EngineSettings
from ws.measure.score import SCORES_VERSION
from ws.model import loading
from ws.model.chat import Thinking
from ws.model.loading import ChatModel, Dtype
from ws.model.sources import model_slug

DEFAULT_ALPHAS = (-2.0, -1.0, 0.0, 1.0, 2.0)

Recipe = Literal["own", "original"]
ORIGINAL: Mapping[str, Any] = {
    "sampling": {"max_new_tokens": 96, "temperature": 0.8},
    "judge": {"backend": "none"},
    "run": {"grid": {"topics": None, "personas": None, "samples": 10}},
}
"""The recommendations of `--recipe original`, for any model: 20 topics x 5 personas x 10 samples of at most 96 tokens,
no judge. Its other settings (rank 32, alpha 64, rate 2e-4, layers 30-80 %, one epoch) are the defaults of training."""


@dataclass(frozen=True)
class Settings:
    """Everything that decides a run. `train` and `sampling` hold the user's values; the model folder adds the others.

    `LOADING` lists the settings that load the model. `out` and `cache_memory` (GiB) have no effect on results. judged:
    how many held-out prompts get free replies that are judged. recipe: `own` takes the recommendations of the model
    folder, `original` those of the replicated work. fit_dtype: dtype of the model that samples and trains; auto: the
    model folder's recommendation if this machine is fast in it, else the dtype of the model.
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
    judged: int = 24
    recipe: Recipe = "own"
    fit_dtype: Dtype = "auto"

    def __post_init__(self) -> None:
        least = {"seed": 0, "data_seed": 0, "control_seeds": 0, "samples": 0, "judged": 0, "rows": 1}
        for name, smallest in least.items():
            value = getattr(self, name)
            if value is not None and value < smallest:
                option = {"samples": "shown"}.get(name, name).replace("_", "-")
                raise UserError(f"--{option} is {value}", f"Give {smallest} or more.")
        given = {"alphas": self.alphas, "cache_memory": self.cache_memory, **self.sampling, **self.train}
        for name, value in given.items():
            numbers = [one for one in (value if isinstance(value, list | tuple) else [value]) if isinstance(one, float)]
            if not all(map(math.isfinite, numbers)):
                raise UserError(f"--{name.replace('_', '-')} has {', '.join(f'{a:g}' for a in numbers)}",
                                "Give finite numbers.")  # fmt: skip
        if not self.alphas:
            raise UserError("--alphas is empty", "Give at least one number.")

    def load(self) -> ChatModel:
        """Load the model as the settings say."""
        return loading.load(
            self.model, dtype=self.dtype, device=self.device, thinking=self.thinking, attention=self.attention,
            revision=self.revision, trust_remote_code=self.trust_remote_code,
            cache_memory=round(self.cache_memory * 2**30),
        )  # fmt: skip


def recommended(settings: Settings, model: ChatModel) -> tuple[Settings, ChatModel]:
    """Settings and model with the recommendations of the recipe; values that the user set are kept.

    The part `run` of the recommendations holds defaults for `grid`, `alphas`, `control_seeds`, `samples` and `judged`.
    A value that equals its general default counts as not set.
    """
    if settings.recipe == "original":
        rows = {name: model.settings[name] for name in ("rows", "rows_for", "fit_dtype") if name in model.settings}
        model = replace(model, settings={**ORIGINAL, **rows})
    default, found = Settings(), {}
    part, where = model.recommended("run", settings.behaviour), f"{model.settings_told}, run"
    for name in part:
        if name not in ("grid", "alphas", "control_seeds", "samples", "judged"):
            raise UserError(f"{where}: unknown setting {name!r}", loading.CORRECT)
    known = make_settings(Settings, part, where, loading.CORRECT)
    for name in part:
        found[name] = _merged(getattr(known, name), getattr(settings, name), getattr(default, name))
    return replace(settings, **found), model


def limit_of(settings: Settings, model: ChatModel, probe: str) -> int | None:
    """How many rows of a probe are asked: the user's --rows, else what the model folder recommends, else None (all)."""
    if settings.rows is not None:
        return settings.rows
    found = model.recommended("rows", settings.behaviour).get(probe)
    if found is not None and (type(found) is not int or found < 1):
        raise UserError(f"{model.settings_told}, rows: {probe} is {found!r}, but must be 1 or more", loading.CORRECT)
    return found


def run_path(settings: Settings, subject: Behaviour) -> Path:
    """`out/<model>/<behaviour>/<adapter>/seed<k>`, with `-data<j>` for a data seed j > 0.

    Another recipe has a folder of its own, `out/<model>-original/`, so that no table mixes two recipes.
    """
    model = model_slug(settings.model) + ("" if settings.recipe == "own" else f"-{settings.recipe}")
    seed = f"seed{settings.seed}" + (f"-data{settings.data_seed}" if settings.data_seed else "")
    return settings.out / model / subject.name / settings.adapter / seed


def command(settings: Settings, *words: object) -> str:
    """The command line `ws WORDS` for this run, ready to paste, with every option that differs from its default."""
    default = Settings()
    options: list[object] = []
    for name in (*_NAMING, "thinking", *LOADING):
        value = getattr(settings, name)
        if value != getattr(default, name):
            options += [f"--{name.replace('_', '-')}", *([] if value is True else [value])]
    return console.command(*words, *options)


def arithmetic(model: ChatModel) -> dict[str, str]:
    """The settings that rounding depends on: dtype, device and attention implementation."""
    return {
        "dtype": str(model.dtype), "device": model.device.type,
        "attention": model.network.config._attn_implementation,
    }  # fmt: skip


def scored_with(model: ChatModel) -> dict[str, Any]:
    """What scores depend on apart from probes and Conditions; part of the key of every stage that stores scores.

    It includes the version of the engine, so that scores of an older engine are never reused.
    """
    return {"engine": SCORES_VERSION, "rendering": model.chat.rendering_key, **arithmetic(model)}


def shared_base(model: ChatModel, out: Path) -> Shards:
    """Scores of the unedited model, shared by all its runs, in `out/<model>/base/<key of model and versions>/`."""
    key = content_key(model.describe(), __version__, SCORES_VERSION)
    return Shards(out / model.slug / "base" / key)


LOADING = ("dtype", "device", "attention", "revision", "trust_remote_code", "cache_memory")
"""Settings that load the model. They come from the current command. `ws report` alone takes those that it does not name
from the run, except `trust_remote_code`, which is never stored."""
_NAMING = ("model", "behaviour", "adapter", "seed", "data_seed", "recipe", "out")
_NOT_STORED = ("out", "cache_memory", "trust_remote_code")
"""They have no effect on results, or they are a permission that the user must give in every command."""


def stored_in(folder: Path) -> Mapping[str, Any]:
    """The settings stored in a run folder."""
    found = read_config(folder).get("settings") if (folder / "config.json").is_file() else None
    if not isinstance(found, dict):
        raise UserError(f"{folder} is not a run folder", "Give a folder such as out/pocket/sycophancy/lora/seed0.")
    return dict(found)


def settings_of(folder: Path, **loading_options: Any) -> Settings:
    """The settings of the run in a folder; `loading_options` override those of `LOADING`.

    The run must be where its settings say, because its other stages are looked for there.
    """
    stored = stored_in(folder)
    place = folder.resolve()
    if len(place.parents) < RUN_DEPTH:
        raise UserError(f"{folder} is not inside a folder of runs", "Give a folder as ws replicate made it.")
    try:
        naming = {name: stored[name] for name in ("model", "behaviour", "adapter", "seed", "data_seed")}
    except KeyError as error:
        raise UserError(f"{folder / 'config.json'} lacks the setting {error}", "Run ws replicate again.") from error
    naming["recipe"] = stored.get("recipe", "own")  # runs of earlier versions have none
    given = {name: stored[name] for name in LOADING if name in stored and name not in _NOT_STORED}
    out = place.parents[RUN_DEPTH - 1]
    where = folder / "config.json"
    named = make_settings(Settings, {**naming, **given, **loading_options, "out": out}, str(where), _DAMAGED)
    settings = restore_settings(stored, named, where)
    expected = run_path(settings, behaviour.load(settings.behaviour))
    if expected.resolve() != place:
        raise UserError(
            f"{folder} was moved: its settings are those of {expected.relative_to(settings.out)}",
            "Give it that place again, in any folder.",
        )
    return settings


_DAMAGED = "Restore the file, or repeat the command that made the run in another folder."
RUN_DEPTH = 4
"""Folders from `--out` down to a run: <model>/<behaviour>/<adapter>/seed<k>."""


def stored_settings(settings: Settings) -> dict[str, Any]:
    """Settings as plain data, for `config.json`."""
    plain = {name: value for name, value in asdict(settings).items() if name not in _NOT_STORED}
    return {name: str(value) if isinstance(value, Path) else value for name, value in plain.items()}


def restore_settings(stored: Mapping[str, Any], given: Settings, where: Path = Path("config.json")) -> Settings:
    """The stored settings of a run, overridden by the values that `given` sets.

    A value that equals its default counts as not set. The `LOADING` settings always come from `given`. `where` is the
    file of the stored settings, for error messages.
    """
    default = Settings()
    names = [one.name for one in fields(Settings) if one.name not in (*_NAMING, *LOADING) and one.name in stored]
    known = make_settings(Settings, {name: stored[name] for name in names}, str(where), _DAMAGED)
    return replace(given, **{
        name: _merged(getattr(known, name), getattr(given, name), getattr(default, name)) for name in names
    })  # fmt: skip


def _merged(known: Any, given: Any, default: Any) -> Any:
    """`given` over `known`; mappings and dataclasses are merged part by part."""
    if isinstance(given, Mapping):
        return {**known, **given}
    if is_dataclass(given) and not isinstance(given, type):
        parts = (one.name for one in fields(given))
        return replace(known, **{
            name: _merged(getattr(known, name), getattr(given, name), getattr(default, name)) for name in parts
        })  # fmt: skip
    return known if given == default else given
