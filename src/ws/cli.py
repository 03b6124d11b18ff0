"""The command line: one dataclass per command, thin; the work is in the modules.

Exit codes: 0 done, 2 bad input or environment (one line on stderr), 130 interrupted. Nothing heavy is imported before a
command runs, so `ws --help` is quick.
"""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from tyro.conf import OmitArgPrefixes, OmitSubcommandPrefixes, Positional, subcommand

from ws import __version__, console
from ws.cli_options import EvalOptions, FitOptions, RunOptions, Sign, StageOptions, run_settings
from ws.errors import UserError

if TYPE_CHECKING:
    from ws.replicate import Replication

# -------------------------------------------------------------------- the pipeline


@dataclass(frozen=True)
class Replicate(RunOptions):
    """The whole pipeline: data, train pos, train neg, diff, eval, alignment, samples, report."""

    fit: OmitArgPrefixes[FitOptions] = field(default_factory=FitOptions)
    evaluation: OmitArgPrefixes[EvalOptions] = field(default_factory=EvalOptions)

    def run(self) -> None:
        """Run it and print the headline."""
        from ws.replicate import Replication  # noqa: PLC0415

        with Replication(run_settings(self, self.fit, self.evaluation)) as replication:
            _finish(replication, replication.report(), self.json)


def _finish(replication: Replication, summary: dict[str, Any], as_json: bool) -> None:
    if as_json:
        console.print_json(json.dumps(summary))
        return
    folder = replication.folder.path
    console.say()
    console.say(summary["headline"][0].upper() + summary["headline"][1:] + ".", style="bold")
    for warning in summary["warnings"]:
        console.warn(warning)
    console.say()
    console.say(f"report      {folder / 'report.html'}")
    if replication.behaviours_page is not None:
        console.say(f"behaviours  {replication.behaviours_page}")
    console.say(f"direction   {folder / 'direction.safetensors'}")
    console.say(f"next        ws show {folder}   |   ws eval dilemmas --alphas -3 3 --out {replication.settings.out}")


@dataclass(frozen=True)
class Data(StageOptions):
    """Sample responses under opposed personas: D+ and D-, in pairs."""

    def run(self) -> None:
        """Make the pairs and say what they are like."""
        from ws import data  # noqa: PLC0415

        with self.replication(self.fit) as run:
            pairs = run.data()
            if self.json:
                console.print_json(json.dumps(data.describe(pairs)))
                return
            for by in ("persona", "topic"):
                rates = data.keep_rates(pairs, by)
                low = rates.filter((rates["keep_pos"] < 0.5) | (rates["keep_neg"] < 0.5))
                for row in low.to_dicts():
                    console.warn(f"{by} {row[by]}: kept {row['keep_pos']:.0%} + and {row['keep_neg']:.0%} -")
            first = pairs.to_dicts()[0]
            console.say(
                f"\nprompt  {first['prompt']}\n  pos   {first['response_pos']}\n  neg   {first['response_neg']}"
            )
            console.say(f"\nnext    ws train --sign pos   ({run.folder / 'pairs.parquet'})")


@dataclass(frozen=True)
class Train(StageOptions):
    """Fit the adapter of one sign on its responses, persona removed."""

    sign: Sign = "pos"
    """Which branch."""

    def run(self) -> None:
        """Fit it and say where it is."""
        with self.replication(self.fit) as run:
            record = run.train(self.sign)
            if self.json:
                console.print_json(json.dumps(record))
                return
            other = "ws train --sign neg" if self.sign == "pos" else "ws diff"
            console.say(f"\nadapter {run.folder / self.sign}\nnext    {other}")


@dataclass(frozen=True)
class Diff(StageOptions):
    """Subtract exactly: a run's two adapters, or any two PEFT adapter folders or checkpoints of one base."""

    pos: Path | None = None
    """PEFT folder or checkpoint of the positive side (with --neg; then --out is the file to write)."""
    neg: Path | None = None
    """PEFT folder or checkpoint of the negative side."""
    numerics: bool = False
    """Also tell what merging both adapters in bf16 and subtracting would have lost, by layer."""

    def run(self) -> None:
        """Write the direction and print its geometry."""
        from dataclasses import asdict  # noqa: PLC0415

        if (self.pos is None) != (self.neg is None):
            raise UserError("--pos and --neg go together", "Give both folders, or neither for the run's own.")
        from ws import diff  # noqa: PLC0415

        if self.pos is None or self.neg is None:
            with self.replication(self.fit) as run:
                direction, geometry = run.diff()
                target, model = run.folder / "direction.safetensors", run.model
                sides = run.folder / "pos", run.folder / "neg"
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
        console.say(f"\ndirection   {target}\nnext        ws eval sycophancy   |   ws export {target}")

    def _checkpoints(self, target: Path, pos: Path, neg: Path) -> None:
        from ws import checkpoints, models  # noqa: PLC0415

        if self.numerics:
            raise UserError("--numerics compares adapters", "Give two adapter folders.")
        changed = checkpoints.difference(models.folder_of(self.model), pos, neg, target)
        if self.json:
            console.print_json(json.dumps({"changed": changed}))
            return
        console.say(
            f"{len(changed)} parameters differ\n\ndirection   {target}\nnext        ws export {target} --format merged"
        )

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
        terminal.show(by_layer, "what a bf16 merge and subtraction would have made of the direction, mean by layer")


@dataclass(frozen=True)
class Eval(RunOptions):
    """Score one kind of probe on an existing run: a shipped one, a JSONL file of your own, or an lm-eval task."""

    probe: Positional[str] = "sycophancy"
    """sycophancy (the behaviour's own), dilemmas, side-effects, or FILE.jsonl with prompt and label per line."""
    alphas: tuple[float, ...] = (-2.0, -1.0, 0.0, 1.0, 2.0)
    """Strengths; 0 is always included."""
    dilemmas: str = "own"
    """own, a CSV/JSONL/parquet file, or a hub id."""
    rows: int | None = None
    """Use only the first rows."""
    think: int = 0
    """Let the steered model write a thought of so many tokens before each choice (guided chain of thought)."""
    answers: tuple[str, str] = ("Yes", "No")
    """The two answers of a probe of your own."""
    task: str | None = None
    """A task of lm-evaluation-harness instead of a probe: lm-eval:NAME."""
    task_folder: Path | None = None
    """Folder with task files of your own for --task."""

    def run(self) -> None:
        """Score, write `scores-<probe>.parquet` (or `lm-eval-<task>.json`), and print the table."""
        from ws import evaluate  # noqa: PLC0415
        from ws.report import terminal  # noqa: PLC0415

        ask = evaluate.Ask(self.probe, self.dilemmas, self.rows, self.think, self.answers)
        with self.replication() as run:
            if self.task is not None:
                table = evaluate.harness_task(run, self.task, self.alphas, self.rows, self.task_folder)
            else:
                table = evaluate.existing_run(run, ask, self.alphas)
            if self.json:
                console.print_json(json.dumps(table.to_dicts()))
            else:
                terminal.show(table, f"{self.task or self.probe}, {run.folder.path}")


@dataclass(frozen=True)
class Subspace(StageOptions):
    """Where a run's direction lies relative to the singular directions of the weights."""

    def run(self) -> None:
        """Print the alignment table."""
        from ws.report import terminal  # noqa: PLC0415

        with self.replication(self.fit) as run:
            table = run.alignment()
            if self.json:
                console.print_json(json.dumps(table.to_dicts()))
            else:
                terminal.show(table, f"energy of dW over its null, {run.folder / 'subspace_per_layer.csv'}")


@dataclass(frozen=True)
class Sweep(RunOptions):
    """Adapter families x training seeds x data seeds: a run each, and the table that compares them."""

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

    def run(self) -> None:
        """Run the cells that are missing and print the table; a failed cell is told and makes the exit code 2."""
        from ws import sweep  # noqa: PLC0415

        settings = run_settings(self, self.fit, self.evaluation)
        outcomes, place = sweep.run(settings, self.families, self.seeds, self.data_seeds)
        rows = [outcome.row for outcome in outcomes if outcome.row is not None]
        if self.json:
            console.print_json((place / "sweep.json").read_text(encoding="utf-8").strip())
        else:
            sweep.show(sweep.by_family(rows))
            console.say(f"\ntables      {place / 'sweep.md'}\nnext        ws show {outcomes[0].folder or place}")
        if failed := [outcome for outcome in outcomes if outcome.row is None]:
            raise UserError(f"{len(failed)} of {len(outcomes)} cells failed; the first, {failed[0].cell.name}: "
                            f"{failed[0].error}")  # fmt: skip


@dataclass(frozen=True)
class Compare(RunOptions):
    """Weight directions, activation steering, prompts and controls on identical rows, also at equal divergence."""

    models: tuple[str, ...] = ()
    """Several models (default: --model)."""
    behaviours: tuple[str, ...] = ()
    """Several behaviours (default: --behaviour)."""
    families: tuple[str, ...] = ("lora", "dora", "pissa", "delora", "oft", "ia3")
    """Adapter families."""
    seeds: tuple[int, ...] = (0,)
    """Training seeds."""
    activations: tuple[str, ...] = ("mean", "incremental", "pca-diff", "logistic", "single-layer")
    """Variants of activation steering; also pca-center, all-positions, response, residual-norm, and original: the
    replicated work's own, one layer at the last token."""
    random_seeds: int = 10
    """Norm-matched random directions, at least two: a verdict needs their band."""
    shuffles: int = 5
    """Directions trained on shuffled personas."""
    target: float | None = None
    """KL budget in nats per token, 95th percentile (default: that of the engineered prompt)."""
    dilemmas: str = "own"
    """own, a CSV/JSONL/parquet file, or a hub id; another source has a folder of its own, `compare-<source>`."""
    rows: int | None = None
    """Use only the first rows of every probe (for quick looks)."""
    fit: OmitArgPrefixes[FitOptions] = field(default_factory=FitOptions)

    def run(self) -> None:
        """Compare every model and behaviour; print the tables, each headline, and where the pages are."""
        from dataclasses import replace  # noqa: PLC0415

        from ws import compare  # noqa: PLC0415
        from ws.report import terminal  # noqa: PLC0415

        plan = compare.Plan(
            families=self.families, seeds=self.seeds, activations=self.activations, random_seeds=self.random_seeds,
            shuffles=self.shuffles, target=self.target,
        )  # fmt: skip
        settings = run_settings(self, self.fit, EvalOptions(rows=self.rows, dilemmas=self.dilemmas))
        found = [
            compare.run(replace(settings, model=model, behaviour=name), plan)
            for model in self.models or (self.model,)
            for name in self.behaviours or (self.behaviour,)
        ]
        if self.json:
            console.print_json(json.dumps([result.summary for result in found]))
            return
        for result in found:
            console.say(f"\n{result.behaviour} in {result.model}", style="bold")
            terminal.show_comparison(result.summary)
            console.say(f"\n{result.headline}.", style="bold")
            console.say(f"tables      {result.folder / 'comparison.html'}")
        if len(found) > 1:
            console.say(f"together    {compare.together(found, self.out)}")


@dataclass(frozen=True)
class Calibrate(RunOptions):
    """The strengths at which a run's direction spends a KL budget on neutral text, per sign."""

    target: float = 0.5
    """Budget: 95th percentile of KL to the base, nats per token."""
    prompts: int = 50
    """Neutral prompts, continued greedily under steering."""
    tokens: int = 50
    """Length of the continuations."""

    def run(self) -> None:
        """Search both signs, write `calibration.json` into the run, and print the strengths."""
        from ws import calibrate  # noqa: PLC0415
        from ws.direction import Direction  # noqa: PLC0415
        from ws.store import write_json  # noqa: PLC0415

        with self.replication() as run:
            path = run.folder / "direction.safetensors"
            if not path.is_file():
                raise UserError(f"the run in {run.folder.path} has no direction yet", "Make it with: ws replicate.")
            texts = calibrate.neutral_prompts(self.prompts)
            record = {
                name: calibrate.as_record(
                    calibrate.to_budget(
                        run.model, Direction.load(path), self.target, texts, sign=sign, tokens=self.tokens
                    )
                )
                for name, sign in (("1", 1), ("-1", -1))
            }
            write_json(run.folder / "calibration.json", {"target": self.target, **record})
            if self.json:
                console.print_json(json.dumps(record))
                return
            for name, found in record.items():
                sure = "" if found["converged"] else "   NOT CONVERGED: the closest strength that was seen"
                console.say(
                    f"sign {name:>2}   alpha {found['alpha']:+.4g}   KL p95 {found['p95']:.3f}   mean "
                    f"{found['mean']:.3f}   max {found['maximum']:.2f}{sure}"
                )
            console.say(
                f"\nnext        ws eval sycophancy --alphas {record['-1']['alpha']:.3g} {record['1']['alpha']:.3g}"
            )


@dataclass(frozen=True)
class Export:
    """Write a direction in a format that other programs load, with a model card."""

    source: Positional[Path]
    """Run folder, or a direction file."""
    format: Literal["peft", "merged", "gguf-lora"] = "peft"
    """PEFT adapter folder, merged checkpoint, or GGUF LoRA for llama.cpp."""
    alpha: float = 1.0
    """Strength that is exported."""
    rank: int | None = None
    """Cut every update to this rank by its singular values (needed where it is not low-rank)."""
    fold: bool = True
    """Multiply alpha into the factors; otherwise it stays the adapter's scale."""
    model: str | None = None
    """Base model (default: the run's)."""
    out: Path | None = None
    """Where to write (default: beside the run, named after format and alpha)."""
    json: bool = False
    """Print the record as JSON and nothing else."""

    def run(self) -> None:
        """Export, measure, and say where it is."""
        from ws.export import command  # noqa: PLC0415

        record, target = command.export(
            self.source, self.format, alpha=self.alpha, rank=self.rank, fold=self.fold, model=self.model, out=self.out
        )
        if self.json:
            console.print_json(json.dumps(record))
            return
        exact = "exact" if record.get("exact", True) else f"keeps {100 * record['energy_kept']:.2f} % of |dW|^2"
        error = f", largest logit error {record['logit_error']['max']:.2g}" if "logit_error" in record else ""
        console.say(f"{self.format} at alpha {self.alpha:+g}: {exact}{error}\nwritten     {target}")


@dataclass(frozen=True)
class Report:
    """Write summary and report of existing runs anew."""

    runs: Positional[tuple[Path, ...]]
    """Run folders."""
    json: bool = False
    """Print the summaries as JSON and nothing else."""

    def run(self) -> None:
        """Rebuild what is missing and print each headline."""
        from ws.replicate import Replication  # noqa: PLC0415
        from ws.run_settings import restore_settings  # noqa: PLC0415

        for path in self.runs:
            stored = _stored_config(path)
            # <out>/<model>/<behaviour>/<adapter>/seed<k>
            settings = restore_settings(stored["settings"], path.resolve().parents[3])
            with Replication(settings) as run:
                _finish(run, run.report(), self.json)


@dataclass(frozen=True)
class Show:
    """Print what a run found, from its summary."""

    path: Positional[Path]
    """Run folder."""
    json: bool = False
    """Print the summary as JSON and nothing else."""

    def run(self) -> None:
        """Print headline, strengths and samples."""
        from ws.report import terminal  # noqa: PLC0415

        _stored_config(self.path)
        if not (self.path / "summary.json").is_file():
            raise UserError(f"the run in {self.path} is not finished", f"Continue it with: ws report {self.path}")
        if self.json:
            console.print_json((self.path / "summary.json").read_text(encoding="utf-8").strip())
        else:
            terminal.show_run(self.path)


def _stored_config(path: Path) -> dict[str, Any]:
    from ws.store import read_json  # noqa: PLC0415

    if not (path / "config.json").is_file():
        raise UserError(f"{path} is not a run folder", "Give a folder such as out/pocket/sycophancy/lora/seed0.")
    return dict(read_json(path / "config.json"))


@dataclass(frozen=True)
class Smoke:
    """The whole pipeline on a random two-layer model that it makes, with run-time shape checks; under a minute."""

    architecture: Literal["qwen3", "llama", "gemma3", "gpt2"] = "qwen3"
    """Architecture of the random model."""
    out: Path | None = None
    """Keep the run here (default: a temporary folder that is removed)."""
    json: bool = False
    """Print the summary as JSON and nothing else."""

    def run(self) -> None:
        """Run it; the shape checks need their switch before anything is imported, hence the second process."""
        if os.environ.get("BEARTYPE") != "1":
            os.environ["BEARTYPE"] = "1"
            os.execv(sys.executable, [sys.executable, "-m", "ws", *sys.argv[1:]])
        from ws import smoke  # noqa: PLC0415

        summary = smoke.run(self.architecture, self.out)
        if self.json:
            console.print_json(json.dumps(summary))
        else:
            console.say("\nsmoke run passed: the numbers above are of a random model and mean nothing", style="bold")
            console.say("next        ws replicate")


# -------------------------------------------------------------------- the embedded model


@dataclass(frozen=True)
class PocketBuild:
    """Train the embedded model: one seeded run, resumable."""

    architecture: Literal["qwen3", "gemma3"] = "qwen3"
    """Architecture of the model: pocket is a qwen3, pocket-gemma a gemma3."""
    seed: int = 0
    """Seed of corpus, initialisation and order."""
    steps: int | None = None
    """Optimiser steps (default: the recipe's)."""
    out: Path = Path("pocket-build")
    """Model folder to write; the shipped weights are replaced by copying it there."""
    compile: bool = True
    """Fuse layers with torch.compile where a C++ compiler is installed."""

    def run(self) -> None:
        """Build, then check."""
        from dataclasses import replace  # noqa: PLC0415

        from ws.pocket import card  # noqa: PLC0415
        from ws.pocket.build import build, recipe_of  # noqa: PLC0415

        recipe = recipe_of(self.architecture, self.seed)
        recipe = recipe if self.steps is None else replace(recipe, steps=self.steps)
        build(recipe, self.out, workspace=self.out.with_name(self.out.name + ".unfinished"),
              compiled=None if self.compile else False)  # fmt: skip
        card.finish_build(self.out)
        console.say(f"model       {self.out}\nnext        ws pocket check --model {self.out}")


@dataclass(frozen=True)
class PocketCheck:
    """Measure the embedded model against its bars; exit code 2 if one is missed."""

    model: str = "pocket"
    """Embedded model or model folder."""
    json: bool = False
    """Print the metrics as JSON and nothing else."""

    def run(self) -> None:
        """Print the metrics."""
        from ws.pocket import card  # noqa: PLC0415

        card.report_check(self.model, self.json)


@dataclass(frozen=True)
class PocketCard:
    """Print the model card: what is planted, how it was trained, what it reaches, what it is not for."""

    model: str = "pocket"
    """Embedded model or model folder."""

    def run(self) -> None:
        """Print the card as Markdown."""
        from ws.pocket import card  # noqa: PLC0415

        console.say(card.text(self.model))


@dataclass(frozen=True)
class Pocket:
    """The embedded model: build, check, card."""

    action: OmitSubcommandPrefixes[
        Annotated[PocketBuild, subcommand("build")]
        | Annotated[PocketCheck, subcommand("check")]
        | Annotated[PocketCard, subcommand("card")]
    ]

    def run(self) -> None:
        """Run the action."""
        self.action.run()


# -------------------------------------------------------------------- behaviours


@dataclass(frozen=True)
class BehaviourNew:
    """Write a commented behaviour file to start from."""

    name: Positional[str]
    """Name of the behaviour; the file is NAME.toml in the current folder."""

    def run(self) -> None:
        """Write it; an existing file is left alone."""
        from ws import behaviour  # noqa: PLC0415
        from ws.store import write_text  # noqa: PLC0415

        path = Path(f"{self.name}.toml")
        if path.exists():
            raise UserError(f"{path} exists already", "Choose another name.")
        if not re.fullmatch(r"[\w-]+", self.name):
            raise UserError(f"{self.name!r} cannot be a behaviour's name", "Use letters, digits, - and _.")
        write_text(path, behaviour.TEMPLATE.format(name=self.name))
        console.say(f"wrote {path}\nnext  edit it, then: ws behaviour check {path}")


@dataclass(frozen=True)
class BehaviourCheck:
    """Check a behaviour file."""

    file: Positional[str]
    """Shipped behaviour, or a .toml file."""

    def run(self) -> None:
        """Say what it holds."""
        from ws import behaviour  # noqa: PLC0415

        found = behaviour.load(self.file)
        groups = {
            item.group: sum(other.group == item.group for other in found.probe.items) for item in found.probe.items
        }
        listed = ", ".join(f"{count} {name}" for name, count in groups.items())
        console.say(f"{found.name}: {found.summary}")
        console.say(
            f"{len(found.personas.positive)} persona pairs, {len(found.train)} training prompts, probe rows: {listed}"
        )
        console.say(f"next  ws replicate --behaviour {self.file}")


@dataclass(frozen=True)
class BehaviourList:
    """List the shipped behaviours."""

    def run(self) -> None:
        """Print name and summary of each."""
        from ws import behaviour  # noqa: PLC0415

        for name in behaviour.names():
            console.say(f"{name:<14} {behaviour.load(name).summary}")


@dataclass(frozen=True)
class BehaviourCommand:
    """Behaviour files: new, check, list."""

    action: OmitSubcommandPrefixes[
        Annotated[BehaviourNew, subcommand("new")]
        | Annotated[BehaviourCheck, subcommand("check")]
        | Annotated[BehaviourList, subcommand("list")]
    ]

    def run(self) -> None:
        """Run the action."""
        self.action.run()


# -------------------------------------------------------------------- entry

Command = (
    Annotated[Replicate, subcommand("replicate")]
    | Annotated[Smoke, subcommand("smoke")]
    | Annotated[Data, subcommand("data")]
    | Annotated[Train, subcommand("train")]
    | Annotated[Diff, subcommand("diff")]
    | Annotated[Eval, subcommand("eval")]
    | Annotated[Subspace, subcommand("subspace")]
    | Annotated[Sweep, subcommand("sweep")]
    | Annotated[Compare, subcommand("compare")]
    | Annotated[Calibrate, subcommand("calibrate")]
    | Annotated[Export, subcommand("export")]
    | Annotated[Report, subcommand("report")]
    | Annotated[Show, subcommand("show")]
    | Annotated[Pocket, subcommand("pocket")]
    | Annotated[BehaviourCommand, subcommand("behaviour")]
)

_DISK_PROBLEMS = {
    errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EIO,
    errno.ENAMETOOLONG,
}  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse, run, and turn every foreseen failure into one line and an exit code."""
    sys.exit(_main(list(sys.argv[1:] if arguments is None else arguments)))


def main_as(command: str) -> None:
    """`python -m ws.<module>` is an alias of the module's command."""
    main([command, *sys.argv[1:]])


def _main(arguments: list[str]) -> int:
    if arguments in (["--version"], ["-V"]):
        console.say(f"weight-steering {__version__}")
        return 0
    try:
        command: Any = _parse(arguments)
        with console.quiet(getattr(command, "json", False)):
            command.run()
    except UserError as error:
        console.fail(str(error))
        return 2
    except KeyboardInterrupt:
        console.fail("interrupted; run the same command again to continue")
        return 130
    except BrokenPipeError:
        sys.stderr.close()  # the reader of our output has gone; nothing more to say
        return 0
    except OSError as error:
        if error.errno not in _DISK_PROBLEMS:
            raise
        place = error.filename or "the output folder"
        console.fail(
            f"cannot write {place}: {error.strerror}. Free space or choose another --out; run again to continue"
        )
        return 2
    return 0


def _parse(arguments: list[str]) -> Any:
    """Parse the arguments; a complaint of the parser is told in one line."""
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            return tyro.cli(
                Command,
                prog="ws",
                description=(
                    "Contrastive weight steering: two opposite personas in, one signed, exact, evidenced weight "
                    "direction out."
                ),
                args=arguments,
                config=(tyro.conf.OmitSubcommandPrefixes, tyro.conf.CascadeSubcommandArgs),
            )
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        raise UserError(_one_line(complaint.getvalue()), f"See: {_help_for(arguments)}") from None


def _one_line(complaint: str) -> str:
    """The first paragraph of a framed complaint of the parser, with the option that was probably meant."""
    paragraphs: list[list[str]] = [[]]
    for line in complaint.splitlines():
        text = line.strip(" │|")
        if not text or text[0] in "╭╰+┌└":
            continue
        if set(text) <= set("─-"):
            paragraphs.append([])
        else:
            paragraphs[-1].append(text)
    if "╭" not in complaint and len(paragraphs) > 1:
        del paragraphs[0]  # without box characters the title is a paragraph of its own
    problem = " ".join(paragraphs[0]) or "the arguments cannot be read"
    for first, *rest in filter(None, paragraphs[1:]):
        if first.startswith("Perhaps you meant") and rest:
            return f"{problem.rstrip('.')}; did you mean {rest[0].split()[0]}?"
        if first.startswith("Available subcommands"):
            return f"{problem.rstrip('.')}. {' '.join([first, *rest])}"
    return problem


def _help_for(arguments: Sequence[str]) -> str:
    named = [word for word in arguments[:1] if not word.startswith("-")]
    return " ".join(["ws", *named, "--help"])


__all__ = ["main", "main_as"]
