"""Commands that compare runs, methods and parts of directions: sweep, compare, generalise, ablate, calibrate."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from types import MappingProxyType
from typing import Annotated, Any

from tyro.conf import OmitArgPrefixes, UseAppendAction, arg

from ws.base import console
from ws.base.errors import UserError
from ws.commands.options import EngineOptions, EvalOptions, FitOptions, RunOptions, Tracker, run_settings


@dataclass(frozen=True)
class Sweep(RunOptions):
    """Make a run for every combination of adapter family, training seed and data seed, and compare them in a table."""

    families: tuple[str, ...] = ("lora", "dora", "pissa", "delora", "oft", "ia3")
    """Adapter families."""
    seeds: tuple[int, ...] = (0,)
    """Training seeds."""
    data_seeds: tuple[int, ...] = (0,)
    """Data seeds."""
    fit: OmitArgPrefixes[FitOptions] = field(default_factory=FitOptions)
    evaluation: OmitArgPrefixes[EvalOptions] = field(
        default_factory=lambda: EvalOptions(alphas=(-1.0, 0.0, 1.0), control_seeds=2)
    )
    engines: OmitArgPrefixes[EngineOptions] = field(default_factory=EngineOptions)
    track: Tracker | None = None
    """Send training curves and final numbers to an experiment tracker, with its own client and settings."""

    def run(self) -> None:
        """Run the missing cells and print the table. Failed cells are reported and make the exit code 2."""
        from ws.runs import sweep, sweep_tables, tracking  # noqa: PLC0415

        tracking.require(self.track)
        settings = run_settings(self, self.fit, self.evaluation)
        outcomes, place = sweep.run(settings, self.families, self.seeds, self.data_seeds, self.engines.workplace())
        if self.json:
            console.print_json((place / "sweep.json").read_text(encoding="utf-8").strip())
        else:
            sweep_tables.show(sweep.tables_of(outcomes))
            console.say(f"\ntables      {place / 'sweep.md'}")
            finished = next(outcome.folder for outcome in outcomes if outcome.folder is not None)
            console.say_next(console.command("show", finished))
        for outcome in outcomes:
            if outcome.folder is not None:
                tracking.send(self.track, outcome.folder)
        if failed := [outcome for outcome in outcomes if outcome.row is None]:
            raise UserError(f"{len(failed)} of {len(outcomes)} cells failed; the first, {failed[0].cell.name}: "
                            f"{failed[0].error}")  # fmt: skip


@dataclass(frozen=True)
class Compare(RunOptions):
    """Compare weight directions, activation steering, prompts and controls on the same rows: at their default strength,
    and at equal KL to the base model."""

    models: tuple[str, ...] = ()
    """Models to compare on; --model alone if left out."""
    behaviours: tuple[str, ...] = ()
    """Behaviours to compare on; --behaviour alone if left out."""
    families: tuple[str, ...] = ("lora", "dora", "pissa", "delora", "oft", "ia3")
    """Adapter families."""
    seeds: tuple[int, ...] = (0,)
    """Training seeds."""
    data_seeds: tuple[int, ...] = (0,)
    """Data seeds. Every training seed is run with every data seed."""
    kinds: tuple[str, ...] = ("weights", "variants", "untrained", "activations", "prompts")
    """Kinds of methods to compare: weights (the directions), variants (their parts), untrained (gradient steps and
    constructions without data), activations, prompts. weights is needed."""
    activations: tuple[str, ...] = ("mean", "incremental", "pca-diff", "logistic", "single-layer", "paper", "jacobian",
                                    "trained")  # fmt: skip
    """Kinds of activation steering. More kinds: svd (inside the top write directions of a layer), pca-center,
    all-positions, response, residual-norm, and original (as in the replicated work)."""
    peers: Annotated[UseAppendAction[tuple[str, ...]], arg(name="with", metavar="LIBRARY:FILE")] = ()
    """A vector that another library trained, to compare as activation steering: repeng:FILE.gguf, or
    steering-vectors:FILE. May be repeated."""
    steps: tuple[int, ...] = (1, 4, 16)
    """How many gradient steps the untrained directions take; one method per number."""
    draws: int = 10
    """How many random controls every method gets. A verdict needs at least two."""
    permutations: int = 20
    """How many orders of the layers of every family are measured, as controls."""
    shuffles: int = 3
    """How many directions are trained on shuffled personas, as controls."""
    budgets: tuple[float, ...] = (0.1, 0.5, 1.0)
    """KL to the base that every direction may cost: 95th percentile, nats per token. The headline takes the middle
    one."""
    plan: bool = False
    """Only say what this comparison would cost and which effects it could find; nothing runs."""
    quick: bool = False
    """A first look: LoRA, one seed, one budget, two kinds of activation steering, few rows and controls."""
    dilemmas: str = "own"
    """Source of the dilemmas: own (shipped), a CSV, JSONL or parquet file, or a hub id. Each source except own writes
    to its own folder, compare-SOURCE-DIGEST."""
    rows: int | None = None
    """Use only the first rows of every probe, for a quick look."""
    fit: OmitArgPrefixes[FitOptions] = field(default_factory=FitOptions)
    engines: OmitArgPrefixes[EngineOptions] = field(default_factory=EngineOptions)

    def run(self) -> None:
        """Compare on every model and behaviour; print the tables, the headlines, and the paths of the pages."""
        from dataclasses import replace  # noqa: PLC0415

        from ws.comparing import across, compare, many, page, planning, terminal  # noqa: PLC0415

        if self.peers and (len(self.models) > 1 or len(self.behaviours) > 1):
            raise UserError("--with takes a vector of one model and one behaviour", "Compare them one at a time.")
        asked = replace(self, **_QUICK) if self.quick else self
        chosen = compare.Plan(**{one.name: getattr(asked, one.name) for one in fields(compare.Plan)
                               if hasattr(asked, one.name)})  # fmt: skip
        settings = run_settings(self, self.fit, EvalOptions(rows=asked.rows, dilemmas=self.dilemmas))
        if self.plan:
            for name in self.behaviours or (self.behaviour,):
                for line in planning.told(planning.outlook(replace(settings, behaviour=name), chosen)):
                    console.say(line)
            return
        found = many.run([
            replace(settings, model=model, behaviour=name)
            for model in self.models or (self.model,)
            for name in self.behaviours or (self.behaviour,)
        ], chosen, self.engines.workplace())  # fmt: skip
        together = across.write(self.out, [result.found for result in found]) if len(found) > 1 else None
        if self.json:
            console.print_json(json.dumps([page.as_json(result.found) for result in found]))
            return
        for result in found:
            console.say(f"\n{result.found.behaviour} in {result.found.model}", style="bold")
            terminal.show(result.found, result.folder)
            console.say(f"\n{page.headline(result.found)}.", style="bold")
            console.say(f"tables      {result.folder / 'comparison.html'}")
        if together is not None:
            console.say(f"together    {together}")


_QUICK: Mapping[str, Any] = MappingProxyType(
    {
        "families": ("lora",),
        "seeds": (0,),
        "data_seeds": (0,),
        "activations": ("mean", "single-layer"),
        "steps": (1,),
        "draws": 4,
        "permutations": 4,
        "shuffles": 0,
        "budgets": (0.5,),
        "rows": 40,
    }
)
"""What `--quick` sets, whatever else is given."""


@dataclass(frozen=True)
class Generalise(RunOptions):
    """Measure what the directions of several behaviours do to each other's probes, and how well personas, gradients and
    cosines predict it."""

    behaviours: tuple[str, ...] = ("sycophancy", "honesty", "refusal")
    """Behaviours whose directions are measured on each other's probes; at least two."""
    seeds: tuple[int, ...] = (0,)
    """Training seeds."""
    data_seeds: tuple[int, ...] = (0,)
    """Data seeds. Every training seed is run with every data seed."""
    budget: float = 0.5
    """KL to the base that every direction may cost: 95th percentile, nats per token."""
    dilemmas: str = "own"
    """Source of the dilemmas: own (shipped), a CSV, JSONL or parquet file, or a hub id."""
    rows: int | None = None
    """Use only the first rows of every probe, for a quick look."""
    fit: OmitArgPrefixes[FitOptions] = field(default_factory=FitOptions)

    def run(self) -> None:
        """Fit the missing runs, measure, print the tables and the path of the page."""
        from ws.comparing import generalisation, generalisation_page  # noqa: PLC0415
        from ws.report import document  # noqa: PLC0415

        settings = run_settings(self, self.fit, EvalOptions(rows=self.rows, dilemmas=self.dilemmas))
        with generalisation.Study(settings, self.behaviours, self.seeds, self.data_seeds, self.budget) as study:
            found = study.result()
            page = generalisation_page.write(study.folder.path, found)
        if self.json:
            console.print_json(json.dumps(generalisation_page.as_json(found)))
            return
        for table in (generalisation_page.effects_table(found), generalisation_page.agreement_table(found)):
            console.say()
            console.say(document.markdown_table(table.header, table.rows))
        console.say(f"\n{generalisation_page.sentence(found)}", style="bold")
        console.say(f"tables      {page}")


@dataclass(frozen=True)
class Ablate(RunOptions):
    """Find out where in the weights the behaviour lives: keep or drop parts of trained directions, beside random parts.
    Needs finished runs. Continues after an interruption."""

    lens: tuple[str, ...] = ("all",)
    """How directions are cut into parts: all, or some of projection, shared, layers, modules, heads, own-svd, base-svd,
    native, norm, smallest. The whole direction is always measured."""
    parts: tuple[str, ...] = ()
    """Measure only these parts of the lenses that have them, such as early late attention mlp. Asking a lens for other
    parts later measures it anew."""
    families: tuple[str, ...] = ("lora", "delora")
    """Adapter families. The lens shared needs two or more."""
    seeds: tuple[int, ...] = (0,)
    """Training seeds."""
    rows: int | None = 40
    """How many items of the behaviour and how many dilemma situations are asked; a quarter of them are dev rows."""
    controls: int = 3
    """How many random twins every part gets."""
    dilemmas: str = "own"
    """Source of the dilemmas: own (shipped), a CSV, JSONL or parquet file, or a hub id."""
    plan: bool = False
    """Only say how many variants there are and about how long they take."""

    def run(self) -> None:
        """Measure every variant; print the findings, the projection table, and the path of the page."""
        from ws.report import ablations, terminal  # noqa: PLC0415
        from ws.runs import ablate  # noqa: PLC0415

        asked = ablate.Plan(self.lens, self.families, self.seeds, self.controls, self.rows, self.parts)
        settings = run_settings(self, FitOptions(), EvalOptions(dilemmas=self.dilemmas))
        if self.plan:
            with ablate.Ablation(settings, asked) as ablation:
                for line in ablation.outlook():
                    console.say(line)
            return
        report, place = ablate.run(settings, asked)
        if self.json:
            console.print_json(json.dumps(ablations.as_json(report)))
            return
        console.say()
        for sentence in ablations.sentences(report):
            console.say(sentence)
        if report.parts("projection"):
            for probe in (report.own, report.dilemmas):
                table = ablations.in_brief(ablations.projection_table(report, probe))
                terminal.show_cells(table, f"{report.title(probe)}: changes, and shares of the residual writes")
        console.say(f"\npage        {place / 'ablations.html'}")
        console.say_next(console.command("subspace", "--model", self.model, "--behaviour", self.behaviour,
                                         "--adapter", self.families[0], "--out", self.out))  # fmt: skip


@dataclass(frozen=True)
class Calibrate(RunOptions):
    """Find the strengths, one per sign, at which a run's direction costs a given KL on neutral text."""

    target: float = 0.5
    """KL to the base that the direction may cost: 95th percentile, nats per token."""
    prompts: int | None = None
    """How many neutral prompts are continued; all if left out."""
    tokens: int = 50
    """Length of the continuations, in tokens."""

    def run(self) -> None:
        """Search both signs, write `calibration.json` into the run, and print the strengths."""
        from ws.base.files import write_json  # noqa: PLC0415
        from ws.fitting.run_settings import command  # noqa: PLC0415
        from ws.measure import calibrate  # noqa: PLC0415
        from ws.runs.evaluate import direction_of  # noqa: PLC0415

        calibrate.require_budget(self.target)
        with self.replication() as run:
            direction = direction_of(run).effect
            texts = calibrate.neutral_prompts(self.prompts)
            record = {
                name: calibrate.to_budget(
                    run.model, direction, self.target, texts, sign=sign, tokens=self.tokens
                ).as_record(with_history=True)
                for name, sign in (("1", 1), ("-1", -1))
            }
            write_json(run.folder / "calibration.json", {"target": self.target, **record})
            if self.json:
                console.print_json(json.dumps(record))
                return
            for name, found in record.items():
                sure = "" if found["converged"] else "   NOT CONVERGED: the closest coherent strength that was tried"
                low, high = found["alpha_low"], found["alpha_high"]
                limits = "" if low is None else f" [{low:+.3g}, {high:+.3g}]"
                console.say(
                    f"sign {name:>2}   alpha {found['alpha']:+.4g}{limits}   KL p95 {found['p95']:.3f}   mean "
                    f"{found['mean']:.3f}   max {found['maximum']:.2f}{sure}"
                )
            console.say()
            alphas = (f"{record[sign]['alpha']:.3g}" for sign in ("-1", "1"))
            console.say_next(command(run.settings, "eval", "sycophancy", "--alphas", *alphas))
