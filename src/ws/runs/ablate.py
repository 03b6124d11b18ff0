"""Ablations of trained directions: every lens, every variant (`subspace.lenses`, `.variants`), the same rows.

Each run (family, seed) and lens is a stage of `<behaviour>/ablate/`, so that a rerun measures only what is missing; a
stage that was interrupted keeps the variants that it has scored. The base is scored once per model. Bases and sets are
chosen on dev rows; all results are on the test rows of the headline's instrument and of the dilemmas.
"""

from __future__ import annotations

import difflib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import polars as pl

from ws import adapters
from ws.adapters import diff
from ws.algebra import random_like
from ws.algebra.direction import Direction
from ws.base import console
from ws.base.errors import UserError
from ws.base.files import digest, read_json, write_json, write_table
from ws.base.poles import POLES
from ws.base.store import RunFolder, Shards
from ws.edit.condition import BASE, Condition, Edit
from ws.eval import dilemmas, instrument
from ws.fitting import behaviour
from ws.fitting.behaviour import Behaviour
from ws.fitting.run_settings import Settings, command, limit_of, recommended, run_path, scored_with, shared_base
from ws.measure.probe import Probe, split
from ws.measure.score import score
from ws.model import architecture
from ws.model.loading import ChatModel
from ws.report import ablation_numbers, ablations
from ws.report.ablation_numbers import Measured
from ws.report.ablations import Report
from ws.runs.replicate import Replication
from ws.subspace import prompts
from ws.subspace.lenses import Lens, Material, registry
from ws.subspace.variants import Part, Subject, Variant, variants

ALPHAS = (1.0, -1.0)
VERSION = 1
"""Raise it when a lens or a variant is made in another way, so that earlier scores are not reused."""
BYTES_AT_ONCE = 2**28
"""Variants are made and scored in portions of about this size."""
SUGGESTED = 8
"""How many names of parts a message about an unknown one gives; a large model has hundreds."""


@dataclass(frozen=True)
class Plan:
    """What to measure. controls: random twins of every part. rows: how many headline items, and dilemma situations.

    parts: names of parts; a lens that has some of them measures only these, other lenses all of theirs.
    """

    lenses: tuple[str, ...] = ("all",)
    families: tuple[str, ...] = ("lora", "delora")
    seeds: tuple[int, ...] = (0,)
    controls: int = 3
    rows: int | None = 40
    parts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        registry.chosen(self.lenses)
        if not (self.families and self.seeds):
            raise UserError("there is no run to ablate", "Give --families and --seeds one value or more.")
        for family in self.families:
            adapters.require_family(family)
        if self.controls < 2:
            raise UserError(f"{self.controls} random twins are too few for a band", "Give --controls 2 or more.")


@dataclass(frozen=True)
class Cell:
    """One run: family and seed, and its folder."""

    family: str
    seed: int
    folder: Path

    @property
    def name(self) -> str:
        """Name of its folder among the ablations."""
        return f"{self.family}-{self.folder.name}"

    @property
    def said(self) -> str:
        """Its name in messages."""
        return f"{self.family}, seed {self.seed}"


class Ablation:
    """The runs of one model and behaviour under the lenses of a plan."""

    def __init__(self, settings: Settings, plan: Plan, model: ChatModel | None = None) -> None:
        self.plan, self.lenses = plan, registry.chosen(plan.lenses)
        self.behaviour: Behaviour = behaviour.load(settings.behaviour)
        self.cells = [_cell(replace(settings, adapter=family, seed=seed), self.behaviour)
                      for family in plan.families for seed in plan.seeds]  # fmt: skip
        everything = dilemmas.load(settings.dilemmas)
        self.settings, self.model = recommended(settings, model or settings.load())
        self.place = self.cells[0].folder.parents[1]
        self.folder = RunFolder(self.place / "ablate", {
            "model": self.model.slug, "fingerprint": self.model.fingerprint, "behaviour": self.behaviour.name,
        })  # fmt: skip
        first = replace(self.settings, adapter=self.cells[0].family, seed=self.cells[0].seed)
        with Replication(first, self.model) as run:
            self.ability = run.ability
        self.own = instrument.level_probe(self.ability.instrument, self.behaviour, self._limit(self.ability.instrument))
        self.dilemmas = everything.first(self._limit("dilemmas", len({row.group for row in everything.rows})))
        self.probes: list[Probe] = [split(self.own, dev=False), split(self.dilemmas.probe(), dev=False)]

    def __enter__(self) -> Ablation:
        return self

    def __exit__(self, *_: object) -> None:
        self.folder.close()

    def _limit(self, probe: str, groups: int = 1) -> int | None:
        """How many rows of a probe are asked, in each of its groups; None: all."""
        known = limit_of(replace(self.settings, rows=None), self.model, probe)
        asked = None if self.plan.rows is None else max(1, self.plan.rows // groups)
        return min((one for one in (known, asked) if one is not None), default=None)

    # ---------------------------------------------------------------- directions

    @cached_property
    def _directions(self) -> dict[tuple[str, int], Direction]:
        return {
            (cell.family, cell.seed): Direction.load(cell.folder / "direction.safetensors").bind(self.model)
            for cell in self.cells
        }

    def material(self, cell: Cell, shards: Shards | None = None) -> Material:
        """What the lenses may use of one run. Other families have the same seed."""
        direction = self._directions[cell.family, cell.seed]
        others = {family: one for (family, seed), one in self._directions.items()
                  if seed == cell.seed and family != cell.family}  # fmt: skip
        sides = [cell.folder / pole for pole in POLES]
        return Material(
            model=self.model,
            subject=Subject.on(self.model, direction, cell.name),
            family=cell.family,
            others=others,
            sides=lambda: (diff.task_vector(self.model, sides[0]), diff.task_vector(self.model, sides[1])),
            folders=lambda: (adapters.read(sides[0]), adapters.read(sides[1])),
            prompts=lambda: prompts.of(self.behaviour).fit,
            dev_effect=lambda directions: self._dev_effect(directions, shards),
        )

    def _dev_effect(self, directions: Sequence[Direction], shards: Shards | None) -> list[float]:
        edits = [Edit("on dev rows", direction, seed=number) for number, direction in enumerate(directions)]
        conditions = [Condition.of(edit, alpha) for edit in edits for alpha in ALPHAS]
        table = score(self.model, [split(self.own, dev=True)], conditions, shards=shards,
                      base_shards=shared_base(self.model, self.settings.out), description="dev rows")  # fmt: skip
        rows = table.filter((pl.col("metric") == "logratio") & (pl.col("edit") != BASE))
        signed = pl.col("value") * pl.col("label") * pl.col("alpha")
        means = dict(rows.group_by("seed").agg(signed.mean()).iter_rows())
        return [means[number] for number in range(len(directions))]

    def parts(self, lens: Lens, material: Material) -> list[Part]:
        """The parts of a lens that the plan asks for. The lens that all others are read against is always complete."""
        every = list(lens.parts(material))
        asked = [part for part in every if part.name in self.plan.parts and lens.name != registry.WHOLE]
        return asked or every

    def _require_known_parts(self) -> None:
        """Raise if no chosen lens has a part of a name that the plan asks for."""
        if not self.plan.parts:
            return
        material = self.material(self.cells[0])
        names = {
            part.name: None for lens in self.lenses if lens.name != registry.WHOLE for part in lens.parts(material)
        }
        if unknown := [name for name in self.plan.parts if name not in names]:
            near = difflib.get_close_matches(unknown[0], names, SUGGESTED) or list(names)[:SUGGESTED]
            told = f"Parts are, for example: {'; '.join(near)}."
            raise UserError(f"no chosen lens has a part {unknown[0]!r}", told)

    # ---------------------------------------------------------------- measuring

    def measure(self, cell: Cell, lens: Lens) -> Measured:
        """Make and score all variants of a lens on a run, unless that is done."""
        stage = f"{cell.name}-{lens.name}"
        files = [f"{stage}.parquet", f"{stage}.json"]
        asked = [[part.name, part.operations, part.twins(self.plan.controls)]
                 for part in self.parts(lens, self.material(cell))]  # fmt: skip
        inputs: dict[str, Any] = {
            "version": VERSION, "parts": asked, "random": random_like.VERSION,
            "direction": digest(cell.folder / "direction.safetensors"),
            "probes": [probe.key for probe in self.probes],
            **scored_with(self.model),
        }  # fmt: skip
        if lens.name == "shared":
            inputs["others"] = {c.name: digest(c.folder / "direction.safetensors") for c in self.cells
                                if c.seed == cell.seed and c != cell}  # fmt: skip

        def make(shards: Shards) -> None:
            described: list[dict[str, Any]] = []
            tables: list[pl.DataFrame] = []
            for portion in self._portions(lens, self.material(cell, shards)):
                described += [one.record() for one in portion]
                table = self._scored(portion, shards, f"{cell.said}: {lens.name}")
                tables.append(table.filter(pl.col("edit") != BASE) if tables else table)
            write_json(self.folder / files[1], described)
            write_table(self.folder / files[0], pl.concat(tables))

        self.folder.build(stage, inputs, files, make)
        described = tuple(read_json(self.folder / files[1]))
        return Measured(cell.family, cell.seed, lens.name, described, pl.read_parquet(self.folder / files[0]))

    def _portions(self, lens: Lens, material: Material) -> Iterator[list[Variant]]:
        pending: list[Variant] = []
        for part in self.parts(lens, material):
            pending += variants(lens.name, part, material.subject, self.plan.controls)
            if sum(one.direction.stored_bytes for one in pending if one.direction is not None) > BYTES_AT_ONCE:
                yield pending
                pending = []
        yield pending

    def _scored(self, portion: Sequence[Variant], shards: Shards | None, description: str) -> pl.DataFrame:
        edits = [Edit(one.name, one.direction, seed=one.draw) for one in portion if one.direction is not None]
        conditions = [Condition(), *(Condition.of(edit, alpha) for edit in edits for alpha in ALPHAS)]
        table = score(self.model, self.probes, conditions, shards=shards,
                      base_shards=shared_base(self.model, self.settings.out), description=description)  # fmt: skip
        return table.filter(pl.col("metric").is_in(["logratio", "pmass"]))

    def run(self) -> list[Measured]:
        """All lenses on all runs."""
        self._require_known_parts()
        found = []
        for cell in self.cells:
            for lens in self.lenses:
                started = time.perf_counter()
                found.append(self.measure(cell, lens))
                counted = sum(one["available"] for one in found[-1].variants)
                seconds = time.perf_counter() - started
                console.say(f"{cell.said:<20}{lens.name:<12}{counted:>4} variants  {seconds:6.1f} s")
        return found

    # ---------------------------------------------------------------- cost

    def outlook(self) -> list[str]:
        """How many variants there are, and about how long they take: one Condition is timed on this machine."""
        self._require_known_parts()
        material = self.material(self.cells[0])
        by_lens = {lens.name: self.parts(lens, material) for lens in self.lenses}
        counts = {name: sum(part.count(self.plan.controls) for part in some) for name, some in by_lens.items()}
        trials = sum(part.trials for some in by_lens.values() for part in some)
        timed = [Variant("plan", "direction", "full", material.direction, draw=draw) for draw in range(3)]
        self._scored([], None, "")  # the base, once per model
        started = time.perf_counter()
        self._scored(timed, None, "timing")
        each = (time.perf_counter() - started) / (len(ALPHAS) * len(timed))
        rows = [len(probe.rows) for probe in self.probes]
        dev = len(split(self.own, dev=True).rows) / sum(rows)
        conditions = len(ALPHAS) * (sum(counts.values()) + dev * trials)
        listed = ", ".join(f"{name} {count}" for name, count in counts.items())
        runs = f"{len(self.cells)} runs" if len(self.cells) > 1 else "1 run"
        return [
            f"variants of a run: {sum(counts.values())} ({listed})",
            f"searched on dev rows: at most {trials} sets of matrices",
            f"rows: {rows[0]} of {self.own.name}, {rows[1]} dilemmas, each at alpha +1 and -1",
            f"time: about {each:.2f} s per Condition, {each * conditions / 60:.1f} min per run, "
            f"{each * conditions * len(self.cells) / 60:.1f} min for {runs}",
        ]  # fmt: skip


def _cell(settings: Settings, subject: Behaviour) -> Cell:
    """A run that exists; an error with the command that makes it otherwise."""
    folder = run_path(settings, subject)
    needed = [folder / "direction.safetensors", *(folder / pole / "adapter_config.json" for pole in POLES)]
    if missing := [path for path in needed if not path.is_file()]:
        raise UserError(f"the run {folder} has no {missing[0].relative_to(folder)}",
                        f"Make it with: {command(settings, 'diff')}")  # fmt: skip
    return Cell(settings.adapter, settings.seed, folder)


def run(settings: Settings, plan: Plan, model: ChatModel | None = None) -> tuple[Report, Path]:
    """Measure all lenses on all runs, write the tables and the page one level above the runs, and return both."""
    with Ablation(settings, plan, model) as ablation:
        found = ablation.run()
        rows = ablation_numbers.table(found)
        report = Report(
            model=ablation.model.name, behaviour=ablation.behaviour.name, ability=ablation.ability,
            questions={lens.name: lens.question for lens in ablation.lenses}, table=rows,
            summary=ablation_numbers.summary(rows), own=ablation.own.name, dilemmas=dilemmas.NAME,
            noun=ablation.dilemmas.noun, controls=plan.controls,
            width=int(architecture.text_config(ablation.model.network).hidden_size),
        )  # fmt: skip
        ablations.write(ablation.place, report)
        return report, ablation.place
