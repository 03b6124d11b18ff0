"""Several runs and methods beside each other: sweep, compare, calibrate."""

from __future__ import annotations

import json
from dataclasses import dataclass, field

from tyro.conf import OmitArgPrefixes

from ws.base import console
from ws.base.errors import UserError
from ws.commands.options import EvalOptions, FitOptions, RunOptions, run_settings


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
        from ws.runs import sweep, sweep_tables  # noqa: PLC0415

        settings = run_settings(self, self.fit, self.evaluation)
        outcomes, place = sweep.run(settings, self.families, self.seeds, self.data_seeds)
        if self.json:
            console.print_json((place / "sweep.json").read_text(encoding="utf-8").strip())
        else:
            sweep_tables.show(sweep.tables_of(outcomes))
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
    """own, a CSV/JSONL/parquet file, or a hub id; others than own have a folder each, `compare-<source>-<digest>`."""
    rows: int | None = None
    """Use only the first rows of every probe (for quick looks)."""
    fit: OmitArgPrefixes[FitOptions] = field(default_factory=FitOptions)

    def run(self) -> None:
        """Compare every model and behaviour; print the tables, each headline, and where the pages are."""
        from dataclasses import replace  # noqa: PLC0415

        from ws.comparing import across, compare, page, terminal  # noqa: PLC0415

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


@dataclass(frozen=True)
class Calibrate(RunOptions):
    """The strengths at which a run's direction spends a KL budget on neutral text, per sign."""

    target: float = 0.5
    """Budget: 95th percentile of KL to the base, nats per token."""
    prompts: int | None = None
    """How many neutral prompts are continued greedily under steering (default: all that there are)."""
    tokens: int = 50
    """Length of the continuations."""

    def run(self) -> None:
        """Search both signs, write `calibration.json` into the run, and print the strengths."""
        from ws.algebra.direction import Direction  # noqa: PLC0415
        from ws.base.store import write_json  # noqa: PLC0415
        from ws.measure import calibrate  # noqa: PLC0415

        calibrate.require_budget(self.target)
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
