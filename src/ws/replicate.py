"""The whole pipeline on one run folder: data, train pos, train neg, diff, eval, alignment, samples, report.

Every step is a stage of the run folder: it is skipped when its inputs are unchanged, survives a kill, and rebuilds what
depends on it when they change. The single-stage commands go through the same methods.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import polars as pl
import torch

from ws import adapters, behaviour, console, data, diff, judge, models, rounding, samples, train
from ws.baselines import controls
from ws.behaviour import Behaviour
from ws.condition import Condition, Context, Edit
from ws.diff import Geometry
from ws.direction import Direction
from ws.engine import LOCAL
from ws.eval import dilemmas, side_effects, sycophancy
from ws.generate import Sampling
from ws.models import ChatModel
from ws.probe import Probe
from ws.report import behaviours, page, summary
from ws.run_settings import Settings, run_path, shared_base, stored_settings
from ws.score import score
from ws.settings import make as make_settings
from ws.store import RunFolder, Shards, StageResult, atomic_file, digest, move_folder, read_json, write_json
from ws.subspace import alignment
from ws.train import Side, Sign, TrainSettings

CONTROL_ALPHAS = (-1.0, 1.0)
SIGNS: tuple[Sign, Sign] = ("pos", "neg")
PERSONA_CONTEXTS = ("prompt +", "prompt -")
MANY_IDENTICAL = 0.2
"""Share of identical pairs above which the personas are said to be ignored."""


class Replication:
    """One run: a model, a behaviour and settings on a run folder; each method is a stage with what it depends on."""

    def __init__(self, settings: Settings, model: ChatModel | None = None) -> None:
        self.settings = settings
        adapters.require_family(settings.adapter)
        if 0.0 not in settings.alphas:
            settings = self.settings = replace(settings, alphas=tuple(sorted({0.0, *settings.alphas})))
        self.behaviour: Behaviour = behaviour.load(settings.behaviour)
        self.given_pairs = data.read_pairs(settings.pairs, self.behaviour) if settings.pairs else None
        self.model = model or settings.load()
        given = {name: value for name, value in settings.train.items() if (name, value) != ("lr", "auto")}
        self.training: TrainSettings = train.resolve_settings(self.model, settings.adapter, given)
        self.lr_is_open = settings.train.get("lr") == "auto"
        self.sampling = _resolve_sampling(self.model, settings.sampling)
        # a recommendation is about responses that the model samples, not about given ones
        self.judge = settings.judge if settings.pairs else judge.resolve(settings.judge, self.model)
        self.folder = RunFolder(run_path(settings, self.behaviour), self._identity())
        self.warnings: list[str] = []
        self.behaviours_page: Path | None = None
        self._told: set[str] = set()
        write_json(self.folder / "config.json", {"settings": stored_settings(settings)})

    def __enter__(self) -> Replication:
        return self

    def __exit__(self, *_: object) -> None:
        self.folder.close()

    def _identity(self) -> dict[str, Any]:
        return {
            "model": self.model.name if self.model.name in models.POCKET_MODELS else self.model.slug,
            "fingerprint": self.model.fingerprint,
            "behaviour": self.behaviour.name,
            "adapter": self.settings.adapter,
            "seed": self.settings.seed,
            "data_seed": self.settings.data_seed,
        }

    @property
    def _arithmetic(self) -> dict[str, str]:
        """What decides how the same formulas are rounded."""
        return {
            "dtype": str(self.model.dtype), "device": self.model.device.type,
            "attention": self.model.network.config._attn_implementation,
        }  # fmt: skip

    # ---------------------------------------------------------------- stages

    def data(self) -> pl.DataFrame:
        """Sample or read the pairs, judge them, and write `pairs.parquet`."""
        settings = self.settings
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
            _write_parquet(judge.judged(pairs, self.behaviour, self.judge, rater, shards), path)

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
    def dilemma_rows(self) -> dilemmas.Loaded:
        """The dilemmas and where they are from; read once, because a hub may answer differently a second time."""
        return dilemmas.load(self.settings.dilemmas, self.settings.rows)

    def probes(self) -> list[Probe]:
        """The behaviour's own probe, the dilemmas, the side effects, and the other shipped behaviours."""
        rows = self.settings.rows
        others = [behaviour.load(name) for name in behaviour.names() if name != self.behaviour.name]
        return [
            sycophancy.probe(self.behaviour, rows),
            self.dilemma_rows.probe(),
            *side_effects.probes(self.model, rows),
            *(sycophancy.headline_probe(other, rows) for other in others),
        ]

    def conditions(self, direction: Direction) -> list[Condition]:
        """The direction at every alpha, and the first personas as prompts."""
        edit = Edit(self.edit_name, direction, self.settings.seed, self.settings.data_seed)
        personas = self.behaviour.personas
        prompts = zip(PERSONA_CONTEXTS, (personas.positive[0], personas.negative[0]), strict=True)
        return [
            *(Condition.of(edit, alpha) for alpha in self.settings.alphas),
            *(Condition(Context(name, system)) for name, system in prompts),
        ]

    def control_conditions(self, direction: Direction) -> list[Condition]:
        """Random directions at -1 and +1."""
        edits = controls.random_edits(direction, self.settings.control_seeds)
        return [
            Condition.of(edit, alpha) for edit in edits for alpha in CONTROL_ALPHAS if alpha in self.settings.alphas
        ]

    @property
    def edit_name(self) -> str:
        """Label of the trained direction in scores tables."""
        return f"dW:{self.settings.adapter}"

    def eval(self) -> pl.DataFrame:
        """Score all probes, under the random controls those that have a band, and write `scores.parquet`."""
        direction, _ = self.diff()
        probes = self.probes()
        inputs = {
            "direction": digest(self.folder / "direction.safetensors"),
            "probes": [probe.key for probe in probes],
            "alphas": self.settings.alphas,
            "control_seeds": self.settings.control_seeds,
            "controls_on": [probe.name for probe in probes[:2]],
            "personas": self.behaviour.personas,
            "rendering": self.model.chat.template_key,
            **self._arithmetic,
        }
        path = self.folder / "scores.parquet"

        def make(shards: Shards) -> None:
            base = shared_base(self.model, self.settings.out)
            table = score(self.model, probes, self.conditions(direction), shards=shards, base_shards=base)
            if random_directions := self.control_conditions(direction):
                found = score(
                    self.model, probes[:2], random_directions, shards=shards, base_shards=base,
                    description="scoring random directions",
                )  # fmt: skip
                table = pl.concat([table, found.filter(pl.col("edit") != summary.BASE)])  # the base is there already
            _write_parquet(table, path)

        result = self._build("eval", inputs, ["scores.parquet"], make)
        table = pl.read_parquet(path)
        rows = table.select("probe", "row").unique().height
        conditions = table.select("context", "edit", "alpha", "seed").unique().height
        self._say("eval", result, f"{rows} rows under {conditions} conditions")
        return table

    def rounding(self) -> dict[str, Any] | None:
        """What a half-precision dtype does to the behaviour's own probe; None for a model in fp32."""
        if self.model.dtype == torch.float32:
            return None
        probe = sycophancy.probe(self.behaviour, self.settings.rows)
        inputs = {"model": self.model.fingerprint, **self._arithmetic, "probe": probe.key,
                  "rendering": self.model.chat.template_key}  # fmt: skip

        def make(_: Shards) -> None:
            found = rounding.measure(self.model, probe)
            record = None if found is None else {**found._asdict(), "is_small": found.is_small}
            write_json(self.folder / "rounding.json", record)

        result = self._build("rounding", inputs, ["rounding.json"], make)
        record: dict[str, Any] | None = read_json(self.folder / "rounding.json")
        if record is not None:
            told = f"{record['dtype']} moves log-ratios by {record['mean_shift']:.3f} nats (p95 {record['p95']:.3f})"
            self._say("rounding", result, told)
            if not record["is_small"]:
                allowed = f"{rounding.LARGEST_SHIFT} (p95 {rounding.LARGEST_P95})"
                self._warn(f"{told} on {self.behaviour.name}, more than {allowed}: --dtype float32 is exact")
        return record

    def alignment(self) -> pl.DataFrame:
        """Where the direction lies relative to the singular directions of the weights; by kind of module."""
        direction, _ = self.diff()
        names = ["subspace_per_layer.csv", "subspace_summary.csv"]

        def make(_: Shards) -> None:
            rows = alignment.table(self.model, direction)
            for name, table in zip(names, (rows, alignment.by_kind(rows)), strict=True):
                with atomic_file(self.folder / name) as temporary:
                    table.write_csv(temporary)

        inputs = {"direction": digest(self.folder / "direction.safetensors")}
        result = self._build("alignment", inputs, names, make)
        table = pl.read_csv(self.folder / names[1])
        self._say("alignment", result, f"{int(table['n'].sum())} matrices")
        return table

    def samples(self) -> pl.DataFrame:
        """The same prompts and random numbers under alpha -1, 0 and +1."""
        direction, _ = self.diff()
        prompts = samples.prompts(self.behaviour, self.settings.samples)
        inputs = {
            "direction": digest(self.folder / "direction.safetensors"),
            "prompts": prompts,
            "sampling": self.sampling,
            **self._arithmetic,
            "rendering": self.model.chat.template_key,
        }
        path = self.folder / "samples.parquet"

        def make(_: Shards) -> None:
            _write_parquet(samples.under_strengths(self.model, direction, prompts, self.sampling), path)

        result = self._build("samples", inputs, ["samples.parquet"], make)
        self._say(
            "samples",
            result,
            f"{len(prompts)} prompts at alpha {', '.join(f'{a:+g}' for a in samples.ALPHAS)}",
        )
        return pl.read_parquet(path)

    def report(self) -> dict[str, Any]:
        """Run whatever is missing and write `summary.json`, `config.json`, the figure and the two reports."""
        direction, geometry = self.diff()
        scores, kinds, said = self.eval(), self.alignment(), self.samples()
        training: dict[str, Any] = {sign: read_json(self.folder / sign / train.RESULT_FILE) for sign in SIGNS}
        rounded = self.rounding()
        content = self._summary(scores, geometry) | {"rounding": rounded}
        config = self._config(direction)
        write_json(self.folder / "config.json", config)
        write_json(self.folder / "summary.json", content)
        page.write(self.folder.path, content, config, said, kinds, training)
        self.behaviours_page = behaviours.write(
            self.folder.path.parents[2], self.settings.adapter, self.folder.path.name
        )
        return content

    def _summary(self, scores: pl.DataFrame, geometry: Geometry) -> dict[str, Any]:
        name, group = self.behaviour.name, self.behaviour.probe.headline
        numbers = summary.summarise(scores, self.edit_name, name, group)
        stages = sorted((self.folder / "stages").glob("*.json"), key=lambda path: path.stat().st_mtime)
        head: dict[str, Any] = {
            "model": self.model.name,
            "behaviour": name,
            "adapter": self.settings.adapter,
            "seed": self.settings.seed,
            "data_seed": self.settings.data_seed,
            "headline_group": group,
            "noun": self.behaviour.probe.noun,
            "direction_norm": geometry.norm_dw,
            "geometry": asdict(geometry),
        }
        seconds = {path.stem: read_json(path)["seconds"] for path in stages}
        content = head | numbers | {"seconds": seconds}
        content["warnings"] = [*dict.fromkeys(self.warnings), *summary.doubts(content, name)]
        content["headline"] = summary.headline(content, name)
        return content

    def _config(self, direction: Direction) -> dict[str, Any]:
        return {
            "settings": stored_settings(self.settings),
            "model": self.model.describe(),
            "behaviour": {
                "name": self.behaviour.name, "summary": self.behaviour.summary,
                "positive_means": self.behaviour.positive_means, "key": self.behaviour.key,
            },
            "dilemmas": self.dilemma_rows.record(),
            "sampling": asdict(self.sampling),
            "judge": asdict(self.judge),
            "training": asdict(self.training),
            "data": data.describe(pl.read_parquet(self.folder / "pairs.parquet")),
            "direction": {
                "layers": f"{direction.layer_numbers[0]}-{direction.layer_numbers[-1]} of {self.model.layer_count}",
                "parameters": len(direction.deltas), "rank": direction.rank, "bytes": direction.stored_bytes,
            },
        }  # fmt: skip

    # ---------------------------------------------------------------- talking

    def _build(
        self, stage: str, inputs: Mapping[str, Any], outputs: Sequence[str], make: Any, siblings: Sequence[Path] = ()
    ) -> StageResult:
        changed = self.folder.changed_inputs(stage, inputs)
        if changed and stage not in self._told:
            console.say(f"{stage}: rebuilding, because {', '.join(changed)} changed")
        return self.folder.build(stage, inputs, outputs, make, siblings)

    def _say(self, stage: str, result: StageResult, text: str) -> None:
        if stage not in self._told:
            self._told.add(stage)
            how = f"{result.seconds:.1f} s" if result.built else "done before"
            console.say(f"{stage:<12} {text}  ({how})")

    def _warn(self, text: str) -> None:
        if text not in self.warnings:
            self.warnings.append(text)
            console.warn(text)


def train_together(runs: Sequence[Replication]) -> None:
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
    loaded = models.load(model) if isinstance(model, str) else model
    with tempfile.TemporaryDirectory() as scratch:
        settings = Settings(
            model=loaded.name, behaviour=behaviour, adapter=adapter, seed=seed, data_seed=data_seed,
            out=Path(out or scratch), train=training, thinking=loaded.chat.thinking,
        )  # fmt: skip
        with Replication(settings, loaded) as run:
            return run.diff()[0]


def _resolve_sampling(model: ChatModel, given: Mapping[str, Any]) -> Sampling:
    chosen = dict(model.settings.get("sampling", {})) | {k: v for k, v in given.items() if v is not None}
    return make_settings(Sampling, chosen, "sampling settings")


def _write_parquet(table: pl.DataFrame, path: Path) -> None:
    with atomic_file(path) as temporary:
        table.write_parquet(temporary)


if __name__ == "__main__":
    from ws.cli import main_as

    main_as("replicate")
