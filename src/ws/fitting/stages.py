"""A run up to its Direction: data, train pos, train neg, diff.

Every step is a stage of the run folder: it is skipped when its inputs are unchanged, survives a kill, and rebuilds what
depends on it when they change.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import polars as pl

from ws import adapters
from ws.adapters import diff
from ws.adapters.diff import Geometry
from ws.algebra.direction import Direction
from ws.base import console
from ws.base.settings import make as make_settings
from ws.base.store import RunFolder, Shards, StageResult, digest, move_folder, read_json, write_json, write_table
from ws.fitting import behaviour, data, judge, train
from ws.fitting.behaviour import Behaviour
from ws.fitting.responses import LOCAL
from ws.fitting.run_settings import Settings, arithmetic, run_path, stored_settings
from ws.fitting.train import Side, Sign, TrainSettings
from ws.measure.generate import Sampling
from ws.model import loading
from ws.model.loading import ChatModel

Run = TypeVar("Run", bound="Fitting")
SIGNS: tuple[Sign, Sign] = ("pos", "neg")
MANY_IDENTICAL = 0.2
"""Share of identical pairs above which the personas are said to be ignored."""


@dataclass(frozen=True)
class FittedRun:
    """A run up to its Direction, resolved once: all that those need who measure, compare or describe it.

    `direction` is bound to its base. `records` holds per sign what training wrote; `data` counts the pairs.
    """

    folder: Path
    behaviour: Behaviour
    direction: Direction
    geometry: Geometry
    pairs: pl.DataFrame
    data: Mapping[str, Any]
    training: TrainSettings
    records: Mapping[Sign, Mapping[str, Any]]


class Fitting:
    """A model, a behaviour and settings on a run folder; each method is a stage with what it depends on."""

    def __init__(self, settings: Settings, model: ChatModel | None = None) -> None:
        self.settings = settings
        adapters.require_family(settings.adapter)
        if 0.0 not in settings.alphas:
            settings = self.settings = replace(settings, alphas=tuple(sorted({0.0, *settings.alphas})))
        self.behaviour: Behaviour = behaviour.load(settings.behaviour)
        self.given_pairs = data.read_pairs(settings.pairs, self.behaviour) if settings.pairs else None
        self.model = model or settings.load()
        given = {name: value for name, value in settings.train.items() if (name, value) != ("lr", "auto")}
        self.training: TrainSettings = train.resolve_settings(self.model, settings.adapter, given, self.behaviour.name)
        self.lr_is_open = settings.train.get("lr") == "auto"
        self.sampling = _resolve_sampling(self.model, settings.sampling)
        # a recommendation is about responses that the model samples, not about given ones
        self.judge = settings.judge if settings.pairs else judge.resolve(settings.judge, self.model)
        self.folder = RunFolder(run_path(settings, self.behaviour), self._identity())
        self.warnings: list[str] = []
        self.seconds: dict[str, float] = {}
        self._told: set[str] = set()

    def __enter__(self: Run) -> Run:
        return self

    def __exit__(self, *_: object) -> None:
        self.folder.close()

    def _identity(self) -> dict[str, Any]:
        return {
            "model": self.model.name if self.model.name in loading.POCKET_MODELS else self.model.slug,
            "fingerprint": self.model.fingerprint,
            "behaviour": self.behaviour.name,
            "adapter": self.settings.adapter,
            "seed": self.settings.seed,
            "data_seed": self.settings.data_seed,
        }

    @property
    def _arithmetic(self) -> dict[str, str]:
        return arithmetic(self.model)

    # ---------------------------------------------------------------- stages

    def data(self) -> pl.DataFrame:
        """Sample or read the pairs, judge them, and write `pairs.parquet`."""
        settings = self.settings
        self._record_settings()
        inputs: dict[str, Any] = {
            "model": self.model.fingerprint,
            **self._arithmetic,
            "rendering": self.model.chat.template_key,
            "behaviour": self.behaviour.key,
            "grid": settings.grid,
            "sampling": self.sampling,
            "data_seed": settings.data_seed,
            "pairs": digest(settings.pairs) if settings.pairs else None,
            "judge": self.judge,
        }
        if settings.engine != LOCAL:  # not named otherwise, so that earlier runs stay valid
            inputs["engine"] = settings.engine
        path = self.folder / "pairs.parquet"

        def make(shards: Shards) -> None:
            pairs = self.given_pairs
            if pairs is None:
                pairs = data.make_pairs(
                    self.model,
                    self.behaviour,
                    settings.grid,
                    self.sampling,
                    settings.data_seed,
                    shards,
                    settings.engine,
                )
            rater = judge.make_judge(self.judge, self.behaviour, self.model)
            write_table(path, judge.judged(pairs, self.behaviour, self.judge, rater, shards))

        siblings = sorted(self.folder.path.parents[1].glob("*/seed*"))  # other families and training seeds
        result = self._build("data", inputs, ["pairs.parquet"], make, siblings)
        pairs = pl.read_parquet(path)
        counts = data.describe(pairs)
        self._say(
            "data",
            result,
            f"{counts['pairs']} pairs, kept {counts['pos']['kept']} + and {counts['neg']['kept']} -",
        )
        for side in data.SIDES:
            ended = counts[side]["ended_by_itself"]
            if ended is not None and ended < 0.9:
                share = f"{100 * (1 - ended):.0f} %"
                limit = self.sampling.max_new_tokens
                self._warn(f"{share} of the {side} responses did not end by themselves within {limit} tokens")
        if counts["identical"] > MANY_IDENTICAL * counts["pairs"]:
            self._warn(f"{counts['identical']} of {counts['pairs']} pairs are identical: the personas hardly matter")
        return pairs

    def choose_lr(self) -> dict[str, Any]:
        """Try the family's learning rates, keep the one with the lowest validation loss, and write `lr_sweep.json`.

        The mean over both signs decides, so that both branches are trained alike.
        """
        pairs = self.data()
        rates = self.training.lr_candidates or train.LEARNING_RATES[self.settings.adapter]
        tried = [replace(self.training, lr=rate) for rate in rates]

        def make(shards: Shards) -> None:
            rows = []
            for chosen in tried:
                sides = [self._side(pairs, sign, shards.path(f"lr-{chosen.lr:g}-{sign}")) for sign in SIGNS]
                if missing := [side for side in sides if not (side.folder / train.RESULT_FILE).is_file()]:
                    train.fit_together(self.model, missing, chosen)
                records = {side.sign: read_json(side.folder / train.RESULT_FILE) for side in sides}
                losses = {str(sign): float(record["last_loss"]) for sign, record in records.items()}
                rows.append({"lr": chosen.lr, **losses, "mean": sum(losses.values()) / len(losses)})
            best = min(rows, key=lambda row: row["mean"])["lr"]
            write_json(self.folder / "lr_sweep.json", {"chosen": best, "tried": rows})

        result = self._build("lr", {**self._fit_inputs(self.training), "tried": rates}, ["lr_sweep.json"], make)
        record: dict[str, Any] = read_json(self.folder / "lr_sweep.json")
        listed = ", ".join(f"{row['lr']:g} -> {row['mean']:.4f}" for row in record["tried"])
        self._say("lr", result, f"validation loss {listed}; chosen {record['chosen']:g}")
        if record["chosen"] in (rates[0], rates[-1]):
            self._warn(
                f"the chosen learning rate {record['chosen']:g} is the last of those tried; a better one may lie beyond"
            )
        self.training, self.lr_is_open = replace(self.training, lr=record["chosen"]), False
        return record

    def _side(self, pairs: pl.DataFrame, sign: Sign, folder: Path) -> Side:
        return Side(pairs, sign, self.settings.seed, self.settings.data_seed, folder)

    def _fit_inputs(self, chosen: TrainSettings) -> dict[str, Any]:
        return {
            "pairs": digest(self.folder / "pairs.parquet"),
            "training": chosen,
            "seed": self.settings.seed,
            "data_seed": self.settings.data_seed,
            "model": self.model.fingerprint,
            **self._arithmetic,
            "rendering": self.model.chat.template_key,
        }

    def missing_sides(self) -> list[Side]:
        """The adapters that are still to be fitted; each will wait among the shards of its stage."""
        pairs = self.data()
        inputs = self._fit_inputs(self.training)
        sides = [self._side(pairs, sign, self._waiting(sign, inputs)) for sign in SIGNS]
        return [
            side for side in sides if not side.folder.is_dir() and not self.folder.is_done(f"train-{side.sign}", inputs)
        ]

    def _waiting(self, sign: Sign, inputs: Mapping[str, Any]) -> Path:
        return self.folder.shards(f"train-{sign}", inputs).path("adapter")

    def train(self, sign: Sign, with_other: bool = False) -> dict[str, Any]:
        """Fit one adapter on its side of the pairs and write its PEFT folder.

        with_other: the other sign will be needed too, so both are fitted in one pass.
        """
        if self.lr_is_open:
            self.choose_lr()
        self.data()
        inputs = self._fit_inputs(self.training)
        waiting = self._waiting(sign, inputs)

        def make(_: Shards) -> None:
            if not waiting.is_dir():
                sides = [side for side in self.missing_sides() if side.sign == sign or with_other]
                train.fit_together(self.model, sides, self.training)
            move_folder(waiting, self.folder / sign)

        result = self._build(f"train-{sign}", inputs, [sign], make)
        record: dict[str, Any] = read_json(self.folder / sign / train.RESULT_FILE)
        losses = f"{record['measure']} {record['first_loss']:.3f} -> {record['last_loss']:.3f}"
        company = record["fitted_together"] - 1
        shared = f", one pass with {company} other{'s' if company > 1 else ''}" if company else ""
        self._say(f"train {sign}", result, f"{losses} in {record['steps']} steps{shared}")
        self.warnings += [f"{sign}: {warning}" for warning in record["warnings"]]
        return record

    def diff(self) -> tuple[Direction, Geometry]:
        """Subtract the adapters exactly and write `direction.safetensors`."""
        for sign in SIGNS:
            self.train(sign, with_other=True)
        inputs: dict[str, str] = {sign: digest(self.folder / sign / "adapter_model.safetensors") for sign in SIGNS}
        path = self.folder / "direction.safetensors"

        def make(_: Shards) -> None:
            provenance = {
                "behaviour": {"name": self.behaviour.name, "positive_means": self.behaviour.positive_means},
                "data": digest(self.folder / "pairs.parquet"),
                "seed": self.settings.seed,
                "data_seed": self.settings.data_seed,
                "training": asdict(self.training),
            }
            direction, geometry = diff.direction(self.model, self.folder / "pos", self.folder / "neg", provenance)
            direction.save(path)
            write_json(self.folder / "geometry.json", geometry)

        result = self._build("diff", inputs, ["direction.safetensors", "geometry.json"], make)
        direction = Direction.load(path).bind(self.model)
        geometry = Geometry(**read_json(self.folder / "geometry.json"))
        self._say(
            "diff", result,
            f"|dW| = {geometry.norm_dw:.3g}, cos(tau pos, tau neg) {-geometry.cos_anti:+.2f}, rank <= {direction.rank}",
        )  # fmt: skip
        return direction, geometry

    @cached_property
    def fitted(self) -> FittedRun:
        """The run up to its Direction; what is missing is built on the first use."""
        direction, geometry = self.diff()
        pairs = pl.read_parquet(self.folder / "pairs.parquet")
        return FittedRun(
            self.folder.path, self.behaviour, direction, geometry, pairs, data.describe(pairs), self.training,
            {sign: read_json(self.folder / sign / train.RESULT_FILE) for sign in SIGNS},
        )  # fmt: skip

    def _record_settings(self) -> None:
        """Put the settings on record before anything is built, so that stage commands find them after a kill.

        Only what builds the run writes there: a command that measures it further leaves its record alone.
        """
        file = self.folder / "config.json"
        known = read_json(file) if file.is_file() else {}
        write_json(file, {**known, "settings": stored_settings(self.settings)})

    # ---------------------------------------------------------------- talking

    def _build(
        self, stage: str, inputs: Mapping[str, Any], outputs: Sequence[str], make: Any, siblings: Sequence[Path] = ()
    ) -> StageResult:
        result = self.folder.build(stage, inputs, outputs, make, siblings)
        self.seconds[stage] = result.seconds
        return result

    def _say(self, stage: str, result: StageResult, text: str) -> None:
        if stage not in self._told:
            self._told.add(stage)
            how = f"{result.seconds:.1f} s" if result.built else "done before"
            console.say(f"{stage:<12} {text}  ({how})")

    def _warn(self, text: str) -> None:
        if text not in self.warnings:
            self.warnings.append(text)
            console.warn(text)


def train_together(runs: Sequence[Fitting]) -> None:
    """Fit what is missing of runs with one model and equal training settings, such as seeds of a family, in one pass.

    Their `train` finds the adapters waiting. A learning rate that a run chooses for itself is not shared.
    """
    if any(run.lr_is_open or run.training != runs[0].training or run.model is not runs[0].model for run in runs):
        return
    if sides := [side for run in runs for side in run.missing_sides()]:
        train.fit_together(runs[0].model, sides, runs[0].training)


def fit(
    model: ChatModel | str = "pocket",
    behaviour: str = "sycophancy",
    *,
    adapter: str = "lora",
    seed: int = 0,
    data_seed: int = 0,
    out: str | Path | None = None,
    **training: Any,
) -> Direction:
    """Fit a Direction: sample pairs, train both adapters, subtract.

    model: a loaded ChatModel or a name for `load`; behaviour: a shipped name or a file; training: rank, lora_alpha, lr,
    epochs ... as in `TrainSettings`. With `out` the run folder is kept and resumed there.
    """
    loaded = loading.load(model) if isinstance(model, str) else model
    with tempfile.TemporaryDirectory() as scratch:
        settings = Settings(
            model=loaded.name, behaviour=behaviour, adapter=adapter, seed=seed, data_seed=data_seed,
            out=Path(out or scratch), train=training, thinking=loaded.chat.thinking,
        )  # fmt: skip
        with Fitting(settings, loaded) as run:
            return run.diff()[0]


def _resolve_sampling(model: ChatModel, given: Mapping[str, Any]) -> Sampling:
    chosen = dict(model.settings.get("sampling", {})) | {k: v for k, v in given.items() if v is not None}
    return make_settings(Sampling, chosen, "sampling settings")
