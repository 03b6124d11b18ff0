"""Tables and a finished run, printed in a terminal. This module imports nothing heavy, so `ws show` is quick."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import polars as pl
from rich.table import Table

from ws.base import console
from ws.base.errors import UserError
from ws.base.store import read_table
from ws.report import document
from ws.report.cells import signed
from ws.report.findings import SUMMARY_FILE, Summary, read_summary
from ws.report.story import Story


def show(table: pl.DataFrame, title: str) -> None:
    """Print a table; numbers have three digits.

    So that it fits 80 columns, a text that all rows share stands in the title, and limits beside their mean.
    """
    shared = [name for name, kind in table.schema.items()
              if kind == pl.String and len(table) > 1 and table[name].n_unique() == 1]  # fmt: skip
    title = ", ".join([title, *(f"{name} {table[name][0]}" for name in shared)])
    has_limits = {"mean", "low", "high"} <= set(table.columns)
    names = [name for name in table.columns if name not in (*shared, *(("low", "high") if has_limits else ()))]
    shown = Table(title=title, title_justify="left", header_style="bold")
    for name in names:
        is_mean = has_limits and name == "mean"
        head = f"{name} [low, high]" if is_mean else name
        shown.add_column(head, justify="right" if table.schema[name].is_numeric() else "left", no_wrap=is_mean)
    for row in table.iter_rows(named=True):
        cells = {name: _cell(row[name]) for name in table.columns}
        if has_limits and row["low"] is not None:
            cells["mean"] += f" [{cells['low']}, {cells['high']}]"
        shown.add_row(*(cells[name] for name in names))
    console.show(shown)


def _cell(value: object) -> str:
    return f"{value:.3f}" if isinstance(value, float) else "-" if value is None else str(value)


def show_cells(table: document.Table, title: str) -> None:
    """Print a table of a page; its caption stays on the page."""
    shown = Table(title=title, title_justify="left", header_style="bold")
    for number, name in enumerate(table.header):
        shown.add_column(name, justify="right" if number else "left")
    for row in table.rows:
        shown.add_row(*row)
    console.show(shown)


def show_run(path: Path) -> None:
    """Print what the report of a finished run tells: warnings, result, effects, flipped rows, training, replies."""
    story = Story.read(path)
    summary = story.summary
    for warning in summary.warnings:
        console.warn(warning)
    if summary.in_short:
        console.say(summary.in_short, style="bold")
        console.say()
    console.say(summary.sentence, style="" if summary.in_short else "bold")
    shares = summary.measured.shares
    lines = [
        {
            "alpha": key,
            summary.behaviour: level.mean,
            **({"share": f"{_bar(shares[key].mean)} {shares[key].mean:.0%}"} if key in shares else {}),
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
    _show_flips(story)
    _show_origin(story)
    console.say(f"\nreport  {path / 'report.html'}")


BAR_CELLS = 6
"""Width of a bar in a table."""
FLIPS_SHOWN = 3
"""Rows that flip, by probe, strength and way, in the terminal."""


def _bar(share: float) -> str:
    filled = round(share * BAR_CELLS)
    return "█" * filled + "·" * (BAR_CELLS - filled)


def sparkline(values: Sequence[float]) -> str:
    """Values as a line of blocks, from the smallest to the largest."""
    low, high = min(values), max(values)
    steps = "▁▂▃▄▅▆▇█"
    return "".join(steps[round((value - low) / ((high - low) or 1) * (len(steps) - 1))] for value in values)


def _show_flips(story: Story) -> None:
    """How many rows change side at -1 and +1, and the questions with the largest changes."""
    if story.flips is None or story.flips.is_empty():
        return
    console.say("\nanswers that flip", style="bold")
    near = story.flips.filter(pl.col("alpha").abs() == 1)
    for (probe, alpha), rows in near.group_by("probe", "alpha", maintain_order=True):
        gained = int(rows["gained"].sum())
        console.say(f"  {story.summary.numbers.title(str(probe))} at {alpha:+g}: {gained} to the positive side, "
                    f"{len(rows) - gained} away from it")  # fmt: skip
        for way in (True, False):
            for row in rows.filter(pl.col("gained") == way).head(FLIPS_SHOWN).iter_rows(named=True):
                question = " ".join(row["question"].split())
                console.say(f"    {'gained' if way else 'lost  '}  {question}  {row['before']} -> {row['after']}")


def _show_origin(story: Story) -> None:
    """The loss of both sides over training, and the size of the direction by layer."""
    console.say()
    for pole, one in story.training.items():
        losses = [value for _, value in one.curve("loss")]
        if losses:
            first, last = one.result["first_loss"], one.result["last_loss"]
            name = one.result["measure"].replace("eval_loss", "held-out loss")
            console.say(f"training {pole}  {sparkline(_thinned(losses))}  {name} {first:.3f} -> {last:.3f}")
    if by_layer := story.norms_by_layer:
        norms = list(by_layer.values())
        where = f"layers {min(by_layer)} to {max(by_layer)}, {min(norms):.3g} to {max(norms):.3g}"
        console.say(f"|dW| by layer  {sparkline([0.0, *norms])[1:]}  {where}")


def _thinned(values: Sequence[float], most: int = 60) -> Sequence[float]:
    """At most `most` values: means over equal pieces."""
    size = -(-len(values) // most)
    pieces = [values[start : start + size] for start in range(0, len(values), size)]
    return [sum(piece) / len(piece) for piece in pieces]


def show_several(stories: Sequence[Story]) -> None:
    """Print the table of several runs, and what of them cannot be compared."""
    from ws.report import several_runs  # noqa: PLC0415 - slow import

    found = several_runs.table(several_runs.names(stories), [story.summary for story in stories])
    for doubt in several_runs.not_comparable([story.summary for story in stories]):
        console.warn(doubt)
    whole = pl.DataFrame(found.rows, schema=list(found.header), orient="row")
    show(whole.select("run", "change at -1", "change at +1", "KL p95 at +1"), f"{len(stories)} runs side by side")


def show_samples(path: Path, count: int | None = None) -> None:
    """Print what the model says to the same prompts at every strength; `count` keeps the first prompts."""
    samples = read_table(path / "samples.parquet", path)
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
