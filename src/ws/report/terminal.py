"""Tables, a finished run and a comparison as a terminal shows them. Nothing heavy is imported: `ws show` is quick."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import polars as pl
from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from ws.base import console
from ws.report.cells import limits, with_limits
from ws.report.findings import read_summary


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
    summary = read_summary(path)
    console.say(summary.sentence, style="bold")
    for warning in summary.warnings:
        console.warn(warning)
    lines = [
        {
            "alpha": key,
            summary.behaviour: level.mean,
            "dilemmas": summary.dilemmas[key].mean,
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


# -------------------------------------------------------------------- a comparison


def show_comparison(summary: Mapping[str, Any], folder: Path | None = None) -> None:
    """Print the tables of a comparison briefly, a line per method and sign; the pages hold the rest.

    `summary` is the content of `comparison.json`: (a) adapters, (b) baselines beside the chosen weight direction, both
    at own strength, (c) everything at equal divergence. `folder`, where it was written, is where the picture is.
    """
    own, equal = summary["own_strength"], summary["equal_kl"]
    adapters = [entry for entry in own if entry["kind"] in ("weights", "variants")]
    baselines = [e for e in own if e["kind"] in ("activations", "prompts") or e["name"] in summary["best"].values()]
    budget = f"p95 KL {summary['calibration']['target']:.2f} nats, * missed"
    _show_methods("(a) adapters, alpha -1 and +1", adapters, summary, "own_strength")
    _show_methods("(b) baselines and weight steering, own strength", baselines, summary, "own_strength")
    _show_methods(
        f"(c) at equal divergence, {budget}", [e for e in equal if e["kind"] != "controls"], summary, "equal_kl"
    )
    console.say(
        "Change against the base, nats, with 95 % intervals over clusters of rows; n: no effect, that interval or "
        "the one over seeds reaches into the band of random directions. pmass: least answer mass."
    )
    for probe, methods in (
        (f"{summary['behaviour']} probe", summary["own_yes_bias"]),
        ("dilemmas", summary["yes_bias"]),
    ):
        if methods:
            console.warn(f"on the {probe} mostly Yes-bias: {', '.join(methods)}")
    if folder is not None:
        console.say(f"picture     {folder / 'pareto.png'}")


def _show_methods(title: str, entries: Sequence[Mapping[str, Any]], summary: Mapping[str, Any], which: str) -> None:
    """One table: the base's levels, the methods, and the band of the random directions.

    One space between columns and names that may wrap: that fits 100 characters, and 80 where names are short.
    """
    base, bands = summary["base"], summary["bands"][which]
    spends = which == "equal_kl"
    shown = Table(title=title, title_justify="left", header_style="bold", box=SIMPLE_HEAD, padding=0, show_edge=False)
    shown.add_column("method", overflow="fold")
    for name in ("", summary["behaviour"], "dilemmas", "facts", "pmass", "seeds", *(["KL"] if spends else [])):
        shown.add_column(name, justify="right", no_wrap=True)
    levels = [escape(with_limits(base[probe])) for probe in ("own", "dilemmas")]
    shown.add_row("base, level", "", *levels, _share(base["facts"]), f"{base['pmass']:.2f}", style="dim")
    for entry in entries:
        signs = [sign for sign in ("-", "+") if sign in entry]
        sides = [entry[sign] for sign in signs]
        columns = [
            signs,
            *([_brief(side[probe]) for side in sides] for probe in ("own", "dilemmas")),
            [_share(side["facts"]) for side in sides],
            [f"{side['pmass']:.2f}" for side in sides],
            [str(len(side["own"]["seeds"])) for side in sides],
            *([[_spent(side["spent"]) for side in sides]] if spends else []),
        ]
        shown.add_row(entry["name"], *("\n".join(lines) for lines in columns))
    drawn = [[bands[sign][probe] for sign in ("-", "+")] for probe in ("own", "dilemmas")]
    cells = [escape("\n".join(f"[{limits(band)}]" if band else "-" for band in pair)) for pair in drawn]
    shown.add_row("random, 95 % band", "-\n+", *cells, style="dim")
    console.show(shown)


def _share(facts: float) -> str:
    return f"{100 * facts:.1f} %"


def _brief(effect: Mapping[str, Any]) -> str:
    """Mean, interval, and `n` where the control band reaches as far."""
    return escape(with_limits(effect) + (" n" if effect["outside"] is False else ""))


def _spent(spent: Mapping[str, Any] | None) -> str:
    return "-" if spent is None else f"{spent['p95']:.2f}" + ("*" if spent["converged"] is False else "")
