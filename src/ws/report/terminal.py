"""Tables and a finished run, printed in a terminal. This module imports nothing heavy, so `ws show` is quick."""

from __future__ import annotations

from pathlib import Path

import polars as pl
from rich.table import Table

from ws.base import console
from ws.report.findings import read_summary


def show(table: pl.DataFrame, title: str) -> None:
    """Print a table; numbers have three digits."""
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
    summary = read_summary(path)
    console.say(summary.sentence, style="bold")
    for warning in summary.warnings:
        console.warn(warning)
    lines = [
        {
            "alpha": key,
            summary.behaviour: level.mean,
            summary.numbers.dilemma_counts.noun: summary.dilemmas[key].mean,
            "answer mass": level.pmass,
            "facts": summary.numbers.side_effects[key].facts,
            "KL": summary.numbers.side_effects[key].kl,
        }
        for key, level in summary.own.items()
    ]
    show(
        pl.DataFrame(lines),
        f"{summary.model}, {summary.adapter}, seed {summary.seed}, |dW| {summary.direction_norm:.3g}",
    )
    samples = pl.read_parquet(path / "samples.parquet")
    for prompt in samples["prompt"].unique(maintain_order=True):
        console.say(f"\n{prompt}", style="bold")
        for row in samples.filter(pl.col("prompt") == prompt).iter_rows(named=True):
            console.say(f"  {row['alpha']:+.0f}  {row['response']}")
    console.say(f"\nreport  {path / 'report.html'}")
