"""The pipeline and its stages: replicate, data, train, diff, eval, subspace, smoke."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tyro.conf import OmitArgPrefixes, Positional

from ws.base import console
from ws.base.errors import UserError
from ws.base.poles import Pole
from ws.base.records import plain
from ws.commands.options import EvalOptions, FitOptions, RunOptions, StageOptions, Tracker, run_settings

if TYPE_CHECKING:
    from ws.report.findings import Summary
    from ws.runs.replicate import Replication


@dataclass(frozen=True)
class Replicate(RunOptions):
    """Do everything: sample responses, train both adapters, subtract them, measure the direction, write the report.
    Stages that are done are skipped."""

    fit: OmitArgPrefixes[FitOptions] = field(default_factory=FitOptions)
    evaluation: OmitArgPrefixes[EvalOptions] = field(default_factory=EvalOptions)
    track: Tracker | None = None
    """Send training curves and final numbers to an experiment tracker, with its own client and settings."""

    def run(self) -> None:
        """Run it and print the headline."""
        from ws.runs import tracking  # noqa: PLC0415
        from ws.runs.replicate import Replication  # noqa: PLC0415

        tracking.require(self.track)
        with Replication(run_settings(self, self.fit, self.evaluation)) as replication:
            finish(replication, replication.report(), self.json)
            tracking.send(self.track, replication.folder.path)


SHOWN = 2
"""Prompts whose replies are printed at the end of a run; the report has all."""


def finish(replication: Replication, summary: Summary, as_json: bool) -> None:
    """Print the results of a finished run and suggest the next commands."""
    from ws.fitting.run_settings import command  # noqa: PLC0415
    from ws.report import terminal  # noqa: PLC0415

    if as_json:
        console.print_json(json.dumps(plain(summary)))
        return
    folder = replication.folder.path
    console.say()
    console.say(summary.sentence, style="bold")
    console.say(terminal.seeds_line(folder, summary))
    for warning in summary.warnings:
        console.warn(warning)
    terminal.show_samples(folder, SHOWN)
    console.say()
    console.say(f"report      {folder / 'report.html'}")
    if replication.behaviours_page is not None:
        console.say(f"behaviours  {replication.behaviours_page}")
    console.say(f"direction   {folder / 'direction.safetensors'}")
    again = command(replication.settings, "eval", "dilemmas", "--alphas", -3, 3)
    console.say_next(console.command("show", folder), again)


@dataclass(frozen=True)
class Data(StageOptions):
    """Sample responses under opposite personas and pair them."""

    def run(self) -> None:
        """Make the pairs and print an example and low keep rates."""
        from ws.fitting import data  # noqa: PLC0415
        from ws.fitting.run_settings import command  # noqa: PLC0415

        with self.replication(self.fit) as run:
            pairs = run.data()
            if self.json:
                console.print_json(json.dumps(data.describe(pairs)))
                return
            for by in ("persona", "topic"):
                rates = data.keep_rates(pairs, by)
                low = rates.filter((rates["keep_pos"] < 0.5) | (rates["keep_neg"] < 0.5))
                for row in low.to_dicts():
                    console.warn(f"{by} {row[by]}: kept {row['keep_pos']:.0%} of the pos and "
                                 f"{row['keep_neg']:.0%} of the neg responses")  # fmt: skip
            first = pairs.to_dicts()[0]
            console.say(
                f"\nprompt  {first['prompt']}\n  pos   {first['response_pos']}\n  neg   {first['response_neg']}"
            )
            console.say(f"\npairs       {run.folder / 'pairs.parquet'}")
            console.say_next(command(run.settings, "train", "--sign", "pos"))


MERGED = ("--format", "merged")
"""The export that every direction has; the default, a PEFT LoRA, needs low-rank deltas."""


@dataclass(frozen=True)
class Train(StageOptions):
    """Train the adapter of one sign on its responses, with the persona left out of the prompt."""

    sign: Pole = "pos"
    """Which adapter: pos or neg."""
    track: Tracker | None = None
    """Send training curves and final numbers to an experiment tracker, with its own client and settings."""

    def run(self) -> None:
        """Train the adapter and print its path."""
        from ws.fitting.run_settings import command  # noqa: PLC0415
        from ws.runs import tracking  # noqa: PLC0415

        tracking.require(self.track)
        with self.replication(self.fit) as run:
            record = run.train(self.sign)
            tracking.send(self.track, run.folder.path)
            if self.json:
                console.print_json(json.dumps(record))
                return
            console.say(f"\nadapter     {run.folder / self.sign}")
            other = ("train", "--sign", "neg") if self.sign == "pos" else ("diff",)
            console.say_next(command(run.settings, *other))


@dataclass(frozen=True)
class Diff(StageOptions):
    """Subtract two adapters exactly: the two of a run, or any two PEFT adapter folders or checkpoints of one base
    model."""

    pos: Path | None = None
    """Adapter folder or checkpoint of the positive side. Give --neg too; --out is then the file to write."""
    neg: Path | None = None
    """Adapter folder or checkpoint of the negative side."""
    numerics: bool = False
    """Show instead, by layer, how much merging both adapters in bf16 and subtracting the results would lose."""

    def run(self) -> None:
        """Write the direction and print its geometry."""
        from dataclasses import asdict  # noqa: PLC0415

        if (self.pos is None) != (self.neg is None):
            raise UserError("--pos and --neg go together", "Give both, or neither to use the adapters of the run.")
        from ws.adapters import diff  # noqa: PLC0415
        from ws.fitting.run_settings import command  # noqa: PLC0415

        next_commands = []
        if self.pos is None or self.neg is None:
            with self.replication(self.fit) as run:
                direction, geometry = run.diff()
                target, model = run.folder / "direction.safetensors", run.model
                sides = run.folder / "pos", run.folder / "neg"
                next_commands = [command(run.settings, "eval", "sycophancy")]
        else:
            target = Path("direction.safetensors") if self.out == Path("out") else self.out
            sides = self.pos, self.neg
            if not diff.are_adapters(*sides):
                self._checkpoints(target, *sides)
                return
            model = self.load()
            direction, geometry = diff.direction(model, *sides)
            direction.save(target)
        if self.numerics:
            self._numerics(diff.bf16_loss(model, *(diff.task_vector(model, side) for side in sides)))
            return
        if self.json:
            console.print_json(json.dumps(asdict(geometry)))
            return
        console.say(f"{direction}")
        console.say(
            f"|tau pos| {geometry.norm_pos:.4g}   |tau neg| {geometry.norm_neg:.4g}   |dW| {geometry.norm_dw:.4g}   "
            f"cos(tau pos, tau neg) {-geometry.cos_anti:+.3f}   drift ratio {geometry.drift_ratio:.2f}"
        )
        console.say(f"\ndirection   {target}")
        is_low_rank = all(delta.is_thin for delta in direction.deltas.values())
        console.say_next(*next_commands, console.command("export", target, *(() if is_low_rank else MERGED)))

    def _checkpoints(self, target: Path, pos: Path, neg: Path) -> None:
        from ws.adapters import checkpoints  # noqa: PLC0415
        from ws.model import convert  # noqa: PLC0415

        if self.numerics:
            raise UserError(
                "--numerics works with adapters, not with checkpoints", "Give two adapter folders, or omit --numerics."
            )
        with convert.as_folder(self.model) as base:
            changed = checkpoints.difference(base, pos, neg, target)
        if self.json:
            console.print_json(json.dumps({"changed": changed}))
            return
        console.say(f"{len(changed)} parameters differ\n\ndirection   {target}")
        console.say_next(console.command("export", target, *MERGED, "--model", self.model))

    def _numerics(self, rows: list[dict[str, Any]]) -> None:
        import polars as pl  # noqa: PLC0415

        from ws.report import terminal  # noqa: PLC0415

        if self.json:
            console.print_json(json.dumps(rows))
            return
        by_layer = (
            pl.DataFrame(rows).group_by("layer", maintain_order=True)
            .agg(pl.mean("relative_size", "cosine", "norm_ratio"), pl.min("cosine").alias("least cosine"))
            .sort("layer")
        )  # fmt: skip
        terminal.show(by_layer, "the direction after a bf16 merge and subtraction, compared with the exact one")


@dataclass(frozen=True)
class Eval(RunOptions):
    """Measure an existing run with a shipped probe, your own questions, or a task of lm-evaluation-harness. Continues
    after an interruption."""

    probe: Positional[str] = "sycophancy"
    """sycophancy (the run's own), dilemmas, feedback, side-effects, a FILE.jsonl of prompts with labels; or, with
    --data: truthfulqa, true-false, scenarios (questions with a user's belief)."""
    alphas: tuple[float, ...] = (-2.0, -1.0, 0.0, 1.0, 2.0)
    """Strengths of the direction. 0, the unedited model, is always included."""
    dilemmas: str = "own"
    """Where the dilemmas come from: own (shipped), a CSV, JSONL or parquet file, or a hub id."""
    data: str | None = None
    """Source of truthfulqa, true-false or scenarios: a CSV, JSONL or parquet file, a hub id, or for true-false a folder
    of files."""
    rows: int | None = None
    """Use only the first rows. With --data: this many questions or statements, spread over the whole set."""
    think: int = 0
    """Let the steered model write a thought of up to this many tokens before each choice."""
    answers: tuple[str, str] = ("Yes", "No")
    """The two answers for your own FILE.jsonl; label 1 means the first."""
    task: str | None = None
    """Run this task of lm-evaluation-harness instead of a probe: lm-eval:NAME."""
    task_folder: Path | None = None
    """Folder with your own task files for --task."""

    def run(self) -> None:
        """Score, write `scores-<probe>.parquet` or `lm-eval-<task>.json`, and print the table.

        For dilemmas and public data sets, `measures-<probe>.json` has the source and the counts, too.
        """
        from ws.report import data_sets, terminal  # noqa: PLC0415
        from ws.runs import evaluate  # noqa: PLC0415

        ask = evaluate.Ask(self.probe, self.dilemmas, self.rows, self.think, self.answers, self.data)
        with self.replication() as run:
            if self.task is not None:
                table = evaluate.harness_task(run, self.task, self.alphas, self.rows, self.task_folder)
            else:
                table = evaluate.existing_run(run, ask, self.alphas)
            if self.json:
                console.print_json(json.dumps(table.to_dicts()))
            else:
                shown = data_sets.brief(table) if ask.data and self.task is None else table
                terminal.show(shown, f"{self.task or self.probe}, {run.folder.path}")


@dataclass(frozen=True)
class Subspace(RunOptions):
    """Show how a run's direction aligns with the singular directions of the weights. With --bases: score a catalogue of
    subspaces on what existing runs change, against random subspaces and the best possible ones."""

    k: float = 0.1
    """Which share of the singular directions of each matrix counts as its top."""
    bases: tuple[str, ...] | None = None
    """Names of bases, or all. Left out: the alignment table of one run."""
    families: tuple[str, ...] = ()
    """With --bases: adapter families of the runs; --adapter alone if left out."""
    seeds: tuple[int, ...] = ()
    """With --bases: training seeds of the runs; --seed alone if left out. Intervals need at least two."""
    rank: int = 8
    """With --bases: rank of the subspaces."""

    def run(self) -> None:
        """Print the alignment table, or the ranking of the bases."""
        if self.bases is None:
            self._alignment()
        else:
            self._bases(self.bases or ("all",))

    def _bases(self, names: tuple[str, ...]) -> None:
        from ws.fitting.run_settings import command  # noqa: PLC0415
        from ws.report import subspaces as page  # noqa: PLC0415
        from ws.runs import subspaces  # noqa: PLC0415

        settings = run_settings(self, FitOptions(), EvalOptions())
        asked = subspaces.Asked(names, self.families or (self.adapter,), self.seeds or (self.seed,), self.rank)
        content = subspaces.run(settings, asked)
        if self.json:
            console.print_json(json.dumps(plain(content.as_json())))
            return
        page.show(content)
        console.say(f"\npage        {content.folder / page.PAGE}")
        console.say(f"tables      {content.folder / 'bases_summary.csv'}")
        if len(asked.seeds) == 1:
            wider = ("--bases", *names, "--families", *asked.families, "--seeds", 0, 1, 2)
            console.say_next(command(settings, "subspace", *wider))

    def _alignment(self) -> None:
        from ws.algebra.direction import Direction  # noqa: PLC0415
        from ws.fitting.run_settings import command  # noqa: PLC0415
        from ws.report import terminal  # noqa: PLC0415
        from ws.runs.evaluate import direction_of  # noqa: PLC0415

        with self.replication() as run:
            direction = direction_of(run).effect
            assert isinstance(direction, Direction)
            table = run.alignment(direction.bind(run.model), self.k)
            if self.json:
                console.print_json(json.dumps(table.to_dicts()))
            else:
                terminal.show(table, f"energy of dW over its null, {run.folder / 'subspace_per_layer.csv'}")
                console.say_next(command(run.settings, "subspace", "--bases", "all"))


@dataclass(frozen=True)
class Smoke:
    """Test the whole pipeline on a small random model. Takes under a minute; the numbers mean nothing."""

    architecture: Literal["qwen3", "llama", "gemma3", "gpt2"] = "qwen3"
    """Architecture of the random model."""
    out: Path | None = None
    """Keep the run here (default: a temporary folder that is removed)."""
    json: bool = False
    """Print the summary as JSON and nothing else."""

    def run(self) -> None:
        """Run it in a second process, because shape checks must be switched on before anything is imported."""
        if os.environ.get("BEARTYPE") != "1":
            os.environ["BEARTYPE"] = "1"
            os.execv(sys.executable, [sys.executable, "-m", "ws", *sys.argv[1:]])
        from ws.pocket import smoke  # noqa: PLC0415

        summary = smoke.run(self.architecture, self.out)
        if self.json:
            console.print_json(json.dumps(plain(summary)))
        else:
            console.say("\nsmoke run passed: the numbers above are of a random model and mean nothing", style="bold")
            console.say_next(console.command("replicate"))
