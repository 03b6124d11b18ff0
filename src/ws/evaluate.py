"""Look at existing runs: score one more probe on them, print their tables."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import polars as pl
from rich.table import Table

from ws import console
from ws.condition import Condition, Edit
from ws.direction import Direction
from ws.errors import UserError
from ws.eval import dilemmas, side_effects, sycophancy
from ws.replicate import Replication
from ws.report.summary import Scores, signed_mean
from ws.score import score
from ws.store import atomic_file, read_json


def existing_run(
    run: Replication, probe: str, alphas: Sequence[float], source: str = "own", rows: int | None = None
) -> pl.DataFrame:
    """Score a kind of probe under the run's direction; write the rows, return means with intervals by group."""
    path = run.folder / "direction.safetensors"
    if not path.is_file():
        raise UserError(f"the run in {run.folder.path} has no direction yet", "Make it with: ws replicate, or ws diff.")
    direction = Direction.load(path)
    edit = Edit(run.edit_name, direction, run.settings.seed, run.settings.data_seed)
    probes = {
        "sycophancy": lambda: [sycophancy.probe(run.behaviour, rows)],
        "dilemmas": lambda: [dilemmas.probe(source, rows)],
        "side-effects": lambda: side_effects.probes(rows),
    }[probe]()
    strengths = sorted({0.0, *alphas})
    table = score(run.model, probes, [Condition.of(edit, alpha) for alpha in strengths])
    with atomic_file(run.folder / f"scores-{probe}.parquet") as temporary:
        table.write_parquet(temporary)
    return pl.concat([_means(table, run.edit_name, one.name, one.kind) for one in probes])


def _means(table: pl.DataFrame, edit: str, probe: str, kind: str) -> pl.DataFrame:
    """Mean of the probe's metric by group and strength; choices are signed by their label."""
    scores = Scores(table)
    metric = {"choice": "logratio", "likelihood": "nll", "divergence": "kl"}[kind]
    lines = []
    for alpha in scores.alphas(edit):
        rows = scores.rows(probe, metric, edit, alpha)
        if kind != "choice":
            rows = rows.with_columns(pl.lit(1, dtype=pl.Int8).alias("label"))
        for group in rows["group"].unique(maintain_order=True):
            part = signed_mean(rows.filter(pl.col("group") == group))
            lines.append({"probe": probe, "metric": metric, "group": group, "alpha": alpha, **part._asdict()})
    return pl.DataFrame(lines)


def show(table: pl.DataFrame, title: str) -> None:
    """Print a table for people: numbers to three digits."""
    shown = Table(title=title, title_justify="left", header_style="bold")
    for name, kind in table.schema.items():
        shown.add_column(name, justify="right" if kind.is_numeric() else "left")
    for row in table.iter_rows():
        shown.add_row(
            *(f"{cell:.3f}" if isinstance(cell, float) else "-" if cell is None else str(cell) for cell in row)
        )
    console.show(shown)


def show_run(path: Path) -> None:
    """Print headline, effects by strength, and samples of a finished run."""
    summary = read_json(path / "summary.json")
    name = summary["behaviour"]
    console.say(summary["headline"][0].upper() + summary["headline"][1:] + ".", style="bold")
    for warning in summary["warnings"]:
        console.warn(warning)
    lines = [
        {
            "alpha": key,
            name: entry["mean"],
            "dilemmas": summary["dilemmas"][key]["mean"],
            "answer mass": entry["pmass"],
            "facts": summary["side_effects"][key]["facts"],
            "KL": summary["side_effects"][key]["kl"],
        }
        for key, entry in summary[name].items()
    ]
    show(
        pl.DataFrame(lines),
        f"{summary['model']}, {summary['adapter']}, seed {summary['seed']}, |dW| {summary['direction_norm']:.3g}",
    )
    samples = pl.read_parquet(path / "samples.parquet")
    for prompt in samples["prompt"].unique(maintain_order=True):
        console.say(f"\n{prompt}", style="bold")
        for row in samples.filter(pl.col("prompt") == prompt).iter_rows(named=True):
            console.say(f"  {row['alpha']:+.0f}  {row['response']}")
    console.say(f"\nreport  {path / 'report.html'}")
