"""Tables and a finished run, printed in a terminal. This module imports nothing heavy, so `ws show` is quick."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import polars as pl
from rich.table import Table

from ws.base import console
from ws.base.errors import UserError
from ws.report import document
from ws.report.cells import signed
from ws.report.findings import SUMMARY_FILE, Summary, read_summary


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


def show_cells(table: document.Table, title: str) -> None:
    """Print a table of a page; its caption stays on the page."""
    shown = Table(title=title, title_justify="left", header_style="bold")
    for number, name in enumerate(table.header):
        shown.add_column(name, justify="right" if number else "left")
    for row in table.rows:
        shown.add_row(*row)
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
            "answer mass": summary.own[key].pmass,
            "facts": summary.numbers.side_effects[key].facts,
            "KL": summary.numbers.side_effects[key].kl,
        }
        for key, level in summary.measured.levels.items()
    ]
    show(
        pl.DataFrame(lines),
        f"{summary.model}, {summary.adapter}, seed {summary.seed}, |dW| {summary.direction_norm:.3g}",
    )
    console.say(seeds_line(path, summary))
    show_samples(path)
    console.say(f"\nreport  {path / 'report.html'}")


def show_samples(path: Path, count: int | None = None) -> None:
    """Print what the model says to the same prompts at every strength; `count` keeps the first prompts."""
    samples = pl.read_parquet(path / "samples.parquet")
    for prompt in samples["prompt"].unique(maintain_order=True)[:count]:
        console.say(f"\n{prompt}", style="bold")
        for row in samples.filter(pl.col("prompt") == prompt).iter_rows(named=True):
            console.say(f"  {row['alpha']:+.0f}  {row['response']}")


def seeds_line(path: Path, summary: Summary) -> str:
    """The change at -1 and +1 over all comparable runs (all strengths without them), or that there is only one run.

    Comparable: the runs with other seeds or data seeds beside this one that have its instrument and its
    strengths. The mean over several runs has a t interval.
    """
    own = summary.measured.change
    shown = [key for key in own if key in ("-1", "1")] or list(own)
    runs = [summary]
    for one in _runs_beside(path.resolve()):
        if one.ability.instrument == summary.ability.instrument and one.measured.change.keys() >= set(shown):
            runs.append(one)
    if len(runs) == 1:
        return "One seed: the intervals are over rows and do not show how another seed would come out."
    from ws.base import stats  # noqa: PLC0415 - slow import

    said = []
    for key in shown:
        found = stats.over_seeds([one.measured.change[key].mean for one in runs])
        said.append(f"{signed(key)} {found.mean:+.2f} (95 % {found.low:+.2f} to {found.high:+.2f})")
    return f"Change of {summary.behaviour} over {len(runs)} runs with different seeds: {', '.join(said)}."


def _runs_beside(path: Path) -> Iterator[Summary]:
    """The finished runs beside a run; one that another version wrote is left out with a warning."""
    for folder in sorted(file.parent for file in path.parent.glob(f"seed*/{SUMMARY_FILE}")):
        if folder != path:
            try:
                yield read_summary(folder)
            except UserError as error:
                console.warn(f"the mean over seeds leaves out {folder}: {error}")
