"""A run up to its Direction: data, train pos, train neg, diff.

Every step is a stage of the run folder. A stage is skipped if its inputs are unchanged. If they change, it is built
again, and so are the stages that depend on it. Finished work survives a kill.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar, get_args

import polars as pl
import torch

from ws import adapters
from ws.adapters import diff
from ws.adapters.diff import Geometry
from ws.algebra.direction import Direction
from ws.base import console, precision
from ws.base.errors import UserError
from ws.base.files import digest, read_json, write_json, write_table
from ws.base.poles import POLES, Pole
from ws.base.settings import make as make_settings
from ws.base.store import RunFolder, Shards, StageResult, read_config
from ws.fitting import behaviour, data, judge, learning_rate, persona_check, train, train_settings
from ws.fitting.behaviour import Behaviour
from ws.fitting.learning_rate import RateChoice
from ws.fitting.responses import LOCAL
from ws.fitting.run_settings import Settings, arithmetic, recommended, run_path, stored_settings
from ws.fitting.train import FitResult
from ws.fitting.train_settings import TrainSettings
from ws.measure.generate import Sampling
from ws.model import library, loading
from ws.model.loading import ChatModel, Dtype

Run = TypeVar("Run", bound="Fitting")
MANY_IDENTICAL = 0.2
"""Share of identical pairs above which a warning says that the personas hardly matter."""


@dataclass(frozen=True)
class FittedRun:
    """A run up to its Direction, with everything that is needed to measure, compare or describe it.

    `direction` is bound to its base. `records` holds the training result of each sign; `data` holds counts of pairs.
    """

    folder: Path
    behaviour: Behaviour
    direction: Direction
    geometry: Geometry
    pairs: pl.DataFrame
    data: Mapping[str, Any]
    training: TrainSettings
    records: Mapping[Pole, FitResult]


class Fitting:
    """A model, a behaviour and settings with a run folder; each method is a stage and runs the stages it needs."""

    def __init__(self, settings: Settings, model: ChatModel | None = None) -> None:
        adapters.require_family(settings.adapter)
        self.behaviour: Behaviour = behaviour.load(settings.behaviour)
        self.given_pairs = data.read_pairs(settings.pairs, self.behaviour) if settings.pairs else None
        self.settings, self.model = recommended(settings, model or settings.load())
        if 0.0 not in self.settings.alphas:
            self.settings = replace(self.settings, alphas=tuple(sorted({0.0, *self.settings.alphas})))
        given = {name: value for name, value in settings.train.items() if (name, value) != ("lr", "auto")}
        self.training: TrainSettings = train_settings.resolve(self.model, settings.adapter, given, self.behaviour.name)
        adapters.require_sites(self.model.network, self.training.adapter)
        self.lr_is_open = settings.train.get("lr") == "auto"
        self.sampling = _resolve_sampling(self.model, settings.sampling, self.behaviour.name)
        # the model folder recommends a judge for sampled responses, not for given pairs
        subject = self.behaviour.name
        self.judge = settings.judge if settings.pairs else judge.resolve(settings.judge, self.model, subject)
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
            "model": self.model.name if self.model.name in library.POCKET_MODELS else self.model.slug,
            "fingerprint": self.model.fingerprint,
            "behaviour": self.behaviour.name,
            "adapter": self.settings.adapter,
            "seed": self.settings.seed,
            "data_seed": self.settings.data_seed,
        }

    @cached_property
    def fitting_model(self) -> ChatModel:
        """The model that samples, judges and trains: the model itself, or a copy of it in another dtype.

        Half precision is several times as fast on some machines, and its rounding hardly matters there. Scores are read
        from the model itself.
        """
        wanted, known = self.settings.fit_dtype, self.model.settings.get("fit_dtype", "auto")
        if wanted == "auto":
            wanted = known if precision.bfloat16_is_fast(self.model.device.type) else "auto"
        if wanted not in get_args(Dtype):
            raise UserError(
                f"the recommended settings of {self.model.name} hold fit_dtype {wanted!r}",
                f"Use one of {', '.join(get_args(Dtype))} in weight_steering.json there.",
            )
        dtype = self.model.dtype if wanted == "auto" else getattr(torch, wanted)
        if dtype == self.model.dtype:
            return self.model
        return replace(self.model, network=copy.deepcopy(self.model.network).to(dtype))

    @property
    def _arithmetic(self) -> dict[str, str]:
        return arithmetic(self.fitting_model)

    # ---------------------------------------------------------------- stages

    def data(self) -> pl.DataFrame:
        """Sample or read the pairs, judge them, and write `pairs.parquet`."""
        settings = self.settings
        self._record_settings()
        inputs: dict[str, Any] = {
            "model": self.model.fingerprint,
            **self._arithmetic,
            "rendering": self.model.chat.rendering_key,
            "behaviour": self.behaviour.key,
            "grid": settings.grid,
            "sampling": self.sampling,
            "data_seed": settings.data_seed,
            "pairs": digest(settings.pairs) if settings.pairs else None,
            "judge": self.judge,
        }
        if settings.engine != LOCAL:  # no key for the local engine, so that earlier runs stay valid
            inputs["engine"] = settings.engine
        path = self.folder / "pairs.parquet"
        self.personas()

        def make(shards: Shards) -> None:
            pairs = self.given_pairs
            if pairs is None:
                pairs = data.make_pairs(
                    self.fitting_model,
                    self.behaviour,
                    settings.grid,
                    self.sampling,
                    settings.data_seed,
                    shards,
                    settings.engine,
                )
            rater = judge.make_judge(self.judge, self.behaviour, self.fitting_model)
            write_table(path, judge.judged(pairs, self.behaviour, self.judge, rater, shards))

        result = self._build("data", inputs, ["pairs.parquet"], make, self._siblings)
        pairs = pl.read_parquet(path)
        counts = data.describe(pairs)
        self._say(
            "data",
            result,
            f"{counts['pairs']} pairs, kept {counts['pos']['kept']} + and {counts['neg']['kept']} -",
        )
        for pole in POLES:
            ended = counts[pole]["ended_by_itself"]
            if ended is not None and ended < 0.9:
                share = f"{100 * (1 - ended):.0f} %"
                limit = self.sampling.max_new_tokens
                self._warn(f"{share} of the {pole} responses reached the limit of {limit} tokens before their end")
        if counts["identical"] > MANY_IDENTICAL * counts["pairs"]:
            self._warn(f"{counts['identical']} of {counts['pairs']} pairs are identical: the personas hardly matter")
        return pairs

    @property
    def _siblings(self) -> list[Path]:
        """The runs of other families and seeds, which may have the same data."""
        return sorted(self.folder.path.parents[1].glob("*/seed*"))

    def personas(self) -> Mapping[str, float]:
        """How often both sides of a persona pair get the same greedy answer, before anything is sampled or trained.

        Not for pairs that the user gives, and not for an endpoint.
        """
        settings = self.settings
        if self.given_pairs is not None or settings.engine != LOCAL:
            return {}
        file = self.folder / "personas.json"
        inputs = {
            "model": self.model.fingerprint, **self._arithmetic, "rendering": self.model.chat.rendering_key,
            "behaviour": self.behaviour.key, "personas": settings.grid.personas,
            "max_new_tokens": self.sampling.max_new_tokens,
        }  # fmt: skip

        def make(_: Shards) -> None:
            write_json(file, persona_check.same_answers(
                self.fitting_model, self.behaviour, settings.grid.personas, self.sampling.max_new_tokens
            ))  # fmt: skip

        result = self._build("personas", inputs, [file.name], make, self._siblings)
        shares: dict[str, float] = read_json(file)
        told = ", ".join(f"{share:.0%}" for share in shares.values())
        self._say("personas", result, f"answers that are the same on both sides: {told}")
        for number, share in shares.items():
            if share > persona_check.COLLAPSED:
                self._warn(
                    f"persona pair {number} hardly matters: {share:.0%} of the answers are the same on both sides"
                )
        return shares

    def choose_lr(self) -> RateChoice:
        """Try the family's learning rates, keep the best for both signs, and write `lr_sweep.json`."""
        learning_rate.require_validation(self.training)
        pairs = self.data()
        learning_rate.require_validation(self.training, pairs)
        rates = self.training.lr_candidates or learning_rate.CANDIDATES[self.settings.adapter]

        def make(shards: Shards) -> None:
            def losses_at(rate: float) -> dict[Pole, float]:
                chosen, losses = replace(self.training, lr=rate), {}
                for pole in POLES:
                    folder = shards.path(f"lr-{rate:g}-{pole}")
                    known = FitResult.read(folder) if folder.is_dir() else self._fit(pairs, pole, chosen, folder)
                    losses[pole] = known.last_loss
                return losses

            write_json(self.folder / "lr_sweep.json", learning_rate.choose(rates, losses_at))

        result = self._build("lr", {**self._fit_inputs(self.training), "tried": rates}, ["lr_sweep.json"], make)
        choice = RateChoice.of_record(read_json(self.folder / "lr_sweep.json"))
        self._say("lr", result, f"validation loss {', '.join(map(str, choice.tried))}; chosen {choice.chosen:g}")
        if choice.is_at_an_end:
            self._warn(f"the chosen learning rate {choice.chosen:g} is the lowest or highest tried; a rate outside the "
                       "range may be better")  # fmt: skip
        self.training, self.lr_is_open = replace(self.training, lr=choice.chosen), False
        return choice

    def _fit(self, pairs: pl.DataFrame, pole: Pole, chosen: TrainSettings, folder: Path) -> FitResult:
        seeds = {"seed": self.settings.seed, "data_seed": self.settings.data_seed}
        return train.fit(self.fitting_model, pairs, pole, chosen, **seeds, folder=folder)

    def _fit_inputs(self, chosen: TrainSettings) -> dict[str, Any]:
        return {
            "pairs": digest(self.folder / "pairs.parquet"),
            "training": chosen,
            "seed": self.settings.seed,
            "data_seed": self.settings.data_seed,
            "model": self.model.fingerprint,
            **self._arithmetic,
            "rendering": self.model.chat.rendering_key,
        }

    def train(self, pole: Pole) -> FitResult:
        """Fit one adapter on its side of the pairs and write its PEFT folder."""
        if self.lr_is_open:
            self.choose_lr()
        pairs, folder = self.data(), self.folder / pole

        def make(_: Shards) -> None:
            self._fit(pairs, pole, self.training, folder)

        result = self._build(f"train-{pole}", self._fit_inputs(self.training), [pole], make)
        found = FitResult.read(folder)
        losses = f"{found.measure} {found.first_loss:.3f} -> {found.last_loss:.3f}"
        self._say(f"train {pole}", result, f"{losses} in {found.steps} steps")
        self.warnings += [f"{pole}: {warning}" for warning in found.warnings]
        return found

    def diff(self) -> tuple[Direction, Geometry]:
        """Subtract the adapters exactly and write `direction.safetensors`."""
        for pole in POLES:
            self.train(pole)
        inputs: dict[str, str] = {pole: digest(self.folder / pole / "adapter_model.safetensors") for pole in POLES}
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
        """The run up to its Direction; missing stages are built on first use."""
        direction, geometry = self.diff()
        pairs = pl.read_parquet(self.folder / "pairs.parquet")
        return FittedRun(
            self.folder.path, self.behaviour, direction, geometry, pairs,
            {**data.describe(pairs), "same_answers": dict(self.personas())}, self.training,
            {pole: FitResult.read(self.folder / pole) for pole in POLES},
        )  # fmt: skip

    def _record_settings(self) -> None:
        """Store the settings before anything is built, so that stage commands find them after a kill.

        Only commands that build the run store them; commands that measure an existing run do not.
        """
        file = self.folder / "config.json"
        try:
            known = read_config(self.folder.path) if file.is_file() else {}
        except UserError:  # this command has the settings of the run, so it writes a damaged file again
            known = {}
        self.folder.settings = stored_settings(self.settings)
        write_json(file, {**known, "settings": self.folder.settings})

    # ---------------------------------------------------------------- progress and warnings

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

    model: a loaded ChatModel or a name for `load`. behaviour: a shipped name or a file. training: rank, lora_alpha, lr,
    epochs and so on, as in `TrainSettings`. With `out`, the run folder is kept there and a later call resumes it.
    """
    loaded = loading.load(model) if isinstance(model, str) else model
    with tempfile.TemporaryDirectory() as scratch:
        settings = Settings(
            model=loaded.name, behaviour=behaviour, adapter=adapter, seed=seed, data_seed=data_seed,
            out=Path(out or scratch), train=training, thinking=loaded.chat.thinking,
        )  # fmt: skip
        with Fitting(settings, loaded) as run:
            return run.diff()[0]


def _resolve_sampling(model: ChatModel, given: Mapping[str, Any], behaviour: str) -> Sampling:
    recommended = model.recommended("sampling", behaviour)
    make_settings(Sampling, recommended, f"{model.settings_told}, sampling", loading.CORRECT)
    return make_settings(Sampling, recommended | {k: v for k, v in given.items() if v is not None}, "sampling settings")
