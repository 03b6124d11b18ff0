"""The whole pipeline on one run folder: a Direction (`fitting`), then eval, alignment, samples, report.

Every step is a stage of the run folder. The single-stage commands call the same methods.
"""

from __future__ import annotations

from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import polars as pl
import torch

from ws.algebra import random_like
from ws.algebra.direction import Direction
from ws.base.files import atomic_file, digest, read_json, write_json, write_table
from ws.base.records import plain
from ws.base.store import Shards
from ws.baselines import controls
from ws.edit.condition import Condition, Context, Edit
from ws.eval import dilemmas, feedback, instrument, side_effects, sycophancy
from ws.eval.ability import Ability
from ws.fitting import behaviour
from ws.fitting.judge import HttpJudge, Judge, PersonaJudge
from ws.fitting.run_settings import arithmetic, limit_of, scored_with, shared_base, stored_settings
from ws.fitting.stages import FittedRun, Fitting
from ws.measure import rounding
from ws.measure.probe import Probe
from ws.measure.score import score
from ws.report import behaviours, flips, page, sentences, summary
from ws.report.findings import SUMMARY_FILE, Estimate, Summary
from ws.report.story import FLIPS_FILE, Story
from ws.runs import free_replies, samples
from ws.subspace import alignment

PERSONA_CONTEXTS = ("prompt +", "prompt -")
ALIGNMENT_DRAWS = 3
"""Random directions in the table of alignments."""


class Replication(Fitting):
    """One run with its evaluation: effects, side effects, alignment with the weights, and sampled responses."""

    behaviours_page: Path | None = None
    """The page about all behaviours of the model, if `report` found more than one."""

    @cached_property
    def dilemma_rows(self) -> dilemmas.Loaded:
        """The dilemmas and their source; read once, because a hub data set may change between two reads."""
        return dilemmas.load(self.settings.dilemmas, self.limit("dilemmas"))

    def limit(self, probe: str) -> int | None:
        """How many rows of a probe this run asks; None: all."""
        return limit_of(self.settings, self.model, probe)

    def own_probes(self) -> list[Probe]:
        """The probes of the behaviour: choices, choices with the other order of the answers, replies."""
        choices = self.limit("choice")
        wanted = (
            sycophancy.probe(self.behaviour, choices),
            instrument.orders(self.behaviour, choices),
            instrument.replies(self.behaviour, self.limit("replies")),
        )
        return [probe for probe in wanted if probe is not None]

    def probes(self) -> list[Probe]:
        """The behaviour's own probes, the dilemmas, the side effects, the other shipped behaviours, feedback."""
        others = [behaviour.load(name) for name in behaviour.names() if name != self.behaviour.name]
        return [
            *self.own_probes(),
            self.dilemma_rows.probe(),
            *side_effects.probes(self.model, self.limit("side_effects")),
            *(sycophancy.headline_probe(other, self.limit("others")) for other in others),
            feedback.probe(self.limit("others")),
        ]

    @cached_property
    def ability(self) -> Ability:
        """What the unedited model can answer, and the instrument of the headline that follows from it."""
        base = shared_base(self.model, self.settings.out)
        found = score(self.model, self.own_probes(), [Condition()], base_shards=base, description="scoring the base")
        return instrument.choose(found, self.behaviour)

    def control_probes(self) -> list[Probe]:
        """The probes that random directions are asked: those of the headline's instrument, and the dilemmas."""
        has_replies = self.ability.instrument == "replies"
        own = [probe for probe in self.own_probes() if (probe.kind == "contrast") == has_replies]
        return [*own, self.dilemma_rows.probe()]

    def conditions(self, direction: Direction) -> list[Condition]:
        """The direction at every alpha, and the first personas as prompts."""
        edit = Edit(self.edit_name, direction, self.settings.seed, self.settings.data_seed)
        personas = self.behaviour.personas
        prompts = zip(PERSONA_CONTEXTS, (personas.pos[0], personas.neg[0]), strict=True)
        return [
            *(Condition.of(edit, alpha) for alpha in self.settings.alphas),
            *(Condition(Context(name, system)) for name, system in prompts),
        ]

    def control_conditions(self, direction: Direction) -> list[Condition]:
        """Random directions at +1, or at the outermost strengths if 1 was not requested."""
        edits = controls.random_edits(direction, self.settings.control_seeds)
        strengths = controls.control_strengths(self.settings.alphas)
        return [Condition.of(edit, alpha) for edit in edits for alpha in strengths]

    @property
    def edit_name(self) -> str:
        """Label of the trained direction in scores tables."""
        return f"dW:{self.settings.adapter}"

    def eval(self) -> pl.DataFrame:
        """Choose the instrument on the base, score all probes, some also under random directions: `scores.parquet`."""
        direction, probes, on_controls = self.fitted.direction, self.probes(), self.control_probes()
        inputs = {
            "direction": digest(self.folder / "direction.safetensors"),
            "probes": [probe.key for probe in probes],
            "alphas": self.settings.alphas,
            "control_seeds": self.settings.control_seeds,
            "controls": random_like.VERSION,
            "control_alphas": controls.control_strengths(self.settings.alphas),
            "controls_on": [probe.name for probe in on_controls],
            "personas": self.behaviour.personas,
            **scored_with(self.model),
        }
        path = self.folder / "scores.parquet"

        def make(shards: Shards) -> None:
            base = shared_base(self.model, self.settings.out)
            table = score(self.model, probes, self.conditions(direction), shards=shards, base_shards=base)
            if random_directions := self.control_conditions(direction):
                found = score(
                    self.model, on_controls, random_directions, shards=shards, base_shards=base,
                    description="scoring random directions",
                )  # fmt: skip
                table = pl.concat([table, found.filter(pl.col("edit") != summary.BASE)])  # the first table has the base
            write_table(path, table)

        result = self._build("eval", inputs, ["scores.parquet"], make)
        table = pl.read_parquet(path)
        rows = table.select("probe", "row").unique().height
        conditions = table.select("context", "edit", "alpha", "seed").unique().height
        self._say("eval", result, f"{rows} rows under {conditions} conditions")
        return table

    def rounding(self) -> dict[str, Any] | None:
        """The rounding error of a half-precision dtype on the behaviour's own probe; None for an fp32 model."""
        if self.model.dtype == torch.float32:
            return None
        probe = sycophancy.probe(self.behaviour, self.limit("choice"))
        inputs = {"model": self.model.fingerprint, "probe": probe.key, **scored_with(self.model)}

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

    def alignment(self, direction: Direction | None = None, share: float = alignment.TOP_SHARE) -> pl.DataFrame:
        """How the direction aligns with the singular directions of the weights, by kind of module.

        The last row is of random directions with the same singular values. direction: the run's own, if it is known;
        else what is missing of the run is built. share: of the singular directions of a weight, what counts as top.
        """
        direction = direction or self.fitted.direction
        names = ["subspace_per_layer.csv", "subspace_summary.csv"]
        tables = [name.replace(".csv", ".parquet") for name in names]

        def make(_: Shards) -> None:
            rows = alignment.table(self.model, direction, share)
            drawn = [edit.effect for edit in controls.random_edits(direction, ALIGNMENT_DRAWS)]
            random = [alignment.table(self.model, one, share) for one in drawn if isinstance(one, Direction)]
            summed = alignment.with_random(alignment.by_kind(rows), random)
            for name, stored, table in zip(names, tables, (rows, summed), strict=True):
                write_table(self.folder / stored, table)
                with atomic_file(self.folder / name) as temporary:
                    table.write_csv(temporary)

        inputs = {
            "direction": digest(self.folder / "direction.safetensors"), "share": share,
            "controls": [random_like.VERSION, ALIGNMENT_DRAWS],
        }  # fmt: skip
        result = self._build("alignment", inputs, [*names, *tables], make)
        table = pl.read_csv(self.folder / names[1])
        matrices = table.filter(pl.col("kind") != alignment.RANDOM)["n"].sum()
        self._say("alignment", result, f"{int(matrices)} matrices")
        return table

    def samples(self) -> pl.DataFrame:
        """Responses to the same prompts with the same random numbers at alpha -1, 0 and +1."""
        direction = self.fitted.direction
        prompts = samples.prompts(self.behaviour, self.settings.samples)
        inputs = {
            "direction": digest(self.folder / "direction.safetensors"),
            "prompts": prompts,
            "sampling": self.sampling,
            **arithmetic(self.model),
            "rendering": self.model.chat.rendering_key,
        }
        path = self.folder / "samples.parquet"

        def make(_: Shards) -> None:
            write_table(path, samples.under_strengths(self.model, direction, prompts, self.sampling))

        result = self._build("samples", inputs, ["samples.parquet"], make)
        self._say(
            "samples",
            result,
            f"{len(prompts)} prompts at alpha {', '.join(f'{a:+g}' for a in samples.ALPHAS)}",
        )
        return pl.read_parquet(path)

    def free_replies(self) -> pl.DataFrame | None:
        """Free replies to held-out prompts, judged by the unedited model and an endpoint; None if none are wanted."""
        asked = free_replies.items(self.behaviour, self.settings.judged)
        if not asked:
            return None
        direction, path = self.fitted.direction, self.folder / "replies.parquet"
        judges: dict[str, Judge] = {"persona": PersonaJudge(self.fitting_model, self.behaviour, closed=False)}
        if self.judge.backend == "http":
            judges["http"] = HttpJudge(self.judge, self.behaviour)
        inputs: dict[str, Any] = {
            "direction": digest(self.folder / "direction.safetensors"),
            "asked": [(item.row, item.cluster, item.open_question) for item in asked],
            "drawn": free_replies.SAMPLED,
            "personas": self.behaviour.personas,
            "positive_means": self.behaviour.positive_means,
            "sampling": self.sampling,
            "judge": self.judge,
            **scored_with(self.model),
        }
        if self.fitting_model is not self.model:  # no key otherwise, so that earlier runs stay valid
            inputs["judged_in"] = self._arithmetic

        def make(shards: Shards) -> None:
            unjudged = shards.path("replies.parquet")
            if not shards.has(unjudged.name):
                write_table(unjudged, free_replies.write(self.model, direction, asked, self.sampling))
            write_table(path, free_replies.judged(pl.read_parquet(unjudged), judges))

        result = self._build("replies", inputs, [path.name], make)
        table = pl.read_parquet(path)
        self._say("replies", result, f"{len(table)} free replies judged")
        return table

    def other_claims(self) -> dict[str, dict[str, Estimate]]:
        """Change of the reply log-ratio on the groups that the headline does not show, by group and strength."""
        probe = instrument.other_replies(self.behaviour, self.limit("other_replies"))
        if probe is None:
            return {}
        direction, path = self.fitted.direction, self.folder / "scores-other-replies.parquet"
        strengths = samples.ALPHAS
        inputs = {
            "direction": digest(self.folder / "direction.safetensors"), "probe": probe.key, "alphas": strengths,
            **scored_with(self.model),
        }  # fmt: skip

        def make(shards: Shards) -> None:
            edit = Edit(self.edit_name, direction, self.settings.seed, self.settings.data_seed)
            conditions = [Condition.of(edit, alpha) for alpha in strengths]
            base = shared_base(self.model, self.settings.out)
            write_table(path, score(self.model, [probe], conditions, shards=shards, base_shards=base))

        result = self._build("other-replies", inputs, [path.name], make)
        self._say("other groups", result, f"{len(probe.rows)} contrasts of other groups")
        return summary.by_group(pl.read_parquet(path), self.edit_name, probe.name)

    def report(self) -> Summary:
        """Run the missing stages and write `summary.json`, `config.json`, the figure and the two reports."""
        _ = self.dilemma_rows  # report a wrong source before anything is fitted
        run = self.fitted
        scores, rounded = self.eval(), self.rounding()
        self.alignment()
        self.samples()
        content, config = self._summary(run, scores, rounded, self.free_replies()), self._config(run)
        write_json(self.folder / "config.json", config)
        write_json(self.folder / SUMMARY_FILE, plain(content))
        write_table(self.folder / FLIPS_FILE, flips.table(scores, self.edit_name, self._flipping_probes()))
        page.write(Story.read(self.folder.path))
        self.behaviours_page = behaviours.write(
            self.folder.path.parents[2], self.settings.adapter, self.folder.path.name
        )
        return content

    def _flipping_probes(self) -> list[Probe]:
        """The probes whose flipped rows the report shows: the behaviour's Yes/No probe, its replies, the dilemmas."""
        own = [sycophancy.probe(self.behaviour, self.limit("choice"))]
        if self.ability.instrument == "replies" and (told := instrument.replies(self.behaviour, self.limit("replies"))):
            own.insert(0, told)
        return [*own, self.dilemma_rows.probe()]

    def _summary(
        self, run: FittedRun, scores: pl.DataFrame, rounded: dict[str, Any] | None, replies: pl.DataFrame | None
    ) -> Summary:
        name, probe, shown_by = run.behaviour.name, run.behaviour.probe, self.ability.instrument
        numbers = summary.summarise(scores, self.edit_name, name, probe.headline, self.dilemma_rows.noun)
        return Summary(
            model=self.model.name, behaviour=name, adapter=self.settings.adapter, seed=self.settings.seed,
            data_seed=self.settings.data_seed, headline_group=probe.headline, noun=probe.noun,
            direction_norm=run.geometry.norm_dw, geometry=asdict(run.geometry), numbers=numbers,
            seconds=dict(self.seconds),
            warnings=(*dict.fromkeys(self.warnings), *sentences.doubts(numbers, name, shown_by)),
            headline=sentences.headline(numbers, name, probe.noun, shown_by), rounding=rounded,
            ability=self.ability, judged={} if replies is None else free_replies.summarise(replies),
            recipe=self.settings.recipe, other_claims=self.other_claims(),
            in_short=sentences.in_short(numbers, self.model.name, name, probe.noun, shown_by),
        )  # fmt: skip

    def _config(self, run: FittedRun) -> dict[str, Any]:
        direction, subject = run.direction, run.behaviour
        return {
            "settings": stored_settings(self.settings),
            "model": self.model.describe(),
            "behaviour": {
                "name": subject.name, "summary": subject.summary, "positive_means": subject.positive_means,
                "key": subject.key,
            },
            "dilemmas": self.dilemma_rows.record(),
            "fitted_in": str(self.fitting_model.dtype).removeprefix("torch."),
            "sampling": asdict(self.sampling),
            "judge": asdict(self.judge),
            "training": asdict(run.training),
            "data": run.data,
            "direction": {
                "layers": f"{direction.layer_numbers[0]}-{direction.layer_numbers[-1]} of {self.model.layer_count}",
                "parameters": len(direction.deltas), "rank": direction.rank, "bytes": direction.stored_bytes,
                "norms_by_layer": direction.norms_by_layer(),
            },
        }  # fmt: skip
