"""The direction beside other methods: prompts and chance of the same run, then the tables of a sweep or comparison."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import polars as pl

from ws.base import console
from ws.report import cells
from ws.report.cells import signed
from ws.report.document import Bar, BarChart, Block, Details, Grid, Paragraph, Table
from ws.report.findings import Estimate, Summary
from ws.report.sentences import headline_strengths
from ws.report.story import Story

SHOWN = 14
"""Methods in the chart of a comparison; the table has all."""


def blocks(story: Story) -> list[Block]:
    """Prompts and chance; adapter families and other methods where they were measured, else how to measure them."""
    found: list[Block] = [_prompts_and_chance(story.summary)]
    if story.families is not None:
        found += _families(story.families)
    if story.methods is not None:
        found += _methods(story.methods)
    summary = story.summary
    naming = ("--model", summary.model, "--behaviour", summary.behaviour)
    missing = {
        "other adapter families": (story.families, console.command("sweep", *naming)),
        "other methods at equal cost": (story.methods, console.command("compare", "--quick", *naming)),
    }
    told = [f"{name} with `{line}`" for name, (table, line) in missing.items() if table is None]
    if told:
        found.append(Paragraph(f"Not measured beside this run: {' and '.join(told)}.", note=True))
    return found


def _prompts_and_chance(summary: Summary) -> Block:
    measured = summary.measured
    shown = headline_strengths(measured.levels)
    base = measured.levels["0"].mean
    bars = [
        _bar("unedited model" if key == "0" else f"direction at {signed(key)}", measured.levels[key], tone(key))
        for key in shown
    ]
    for name, level in measured.contexts.items():
        bars.append(_bar(f"system prompt {name.removeprefix('prompt ')}", level))
    for key in shown:
        if (band := measured.bands.get(key)) is not None:
            low, high = (None if limit is None else base + limit for limit in (band.low, band.high))
            bars.append(Bar(f"random directions at {signed(key)}", base + band.mean, low, high))
    return BarChart(
        f"{summary.behaviour}: this direction, prompts and chance", bars,
        caption=f"{measured.meaning}, nats. Intervals: 95 % over clusters of rows; for random directions, 95 % of "
        "further ones are expected there. The system prompts are the first persona of each side.",
    )  # fmt: skip


def _bar(name: str, level: Estimate, turn: int = 0) -> Bar:
    return Bar(name, level.mean, level.low, level.high, turn)


def tone(key: str) -> int:
    """The sign of a strength."""
    return 0 if key == "0" else -1 if key.startswith("-") else 1


def _families(table: pl.DataFrame) -> list[Block]:
    rows = table.to_dicts()
    charts = [
        BarChart(title, [Bar(row["family"], row[name], row[f"{name}_low"], row[f"{name}_high"], turn) for row in rows])
        for title, name, turn in (("change at +1, by adapter family", "delta", 1),
                                  ("change at -1, by adapter family", "delta_minus", -1))
    ]  # fmt: skip
    columns = {
        "delta": "change at +1", "delta_minus": "change at -1", "dd_delta": "dilemmas at +1", "facts_1": "facts at +1",
        "kl_1": "KL at +1", "norm": "|dW|", "trainable": "trainable",
    }  # fmt: skip
    lines = [
        [row["family"], f"{row['runs']}", *(_over_seeds(row, name) for name in columns)]
        for row in rows
    ]  # fmt: skip
    caption = (
        "Adapter families on the same data (the sweep beside this run): means over runs with 95 % t intervals over "
        "seeds, nats. Families at alpha +1 differ in cost, so compare them at equal KL too."
    )
    return [Grid(charts), Table(["family", "runs", *columns.values()], lines, caption)]


def _over_seeds(row: Mapping[str, Any], name: str) -> str:
    value, low, high = row[name], row[f"{name}_low"], row[f"{name}_high"]
    if name == "trainable":
        return f"{value:,.0f}"
    if name in ("facts_1", "kl_1", "norm"):
        return {"facts_1": f"{100 * value:.1f} %", "kl_1": f"{value:.3f}", "norm": f"{value:.3g}"}[name]
    return cells.with_limits({"mean": value, "low": low, "high": high})


def _methods(table: pl.DataFrame) -> list[Block]:
    budgets = [name for name in table["strength"].unique(maintain_order=True) if name != "own"]
    if not budgets:
        return []
    budget = budgets[len(budgets) // 2]
    rows = table.filter(pl.col("strength") == budget).to_dicts()
    found: list[Block] = []
    charts = []
    for sign, turn in (("+", 1), ("-", -1)):
        side = sorted((row for row in rows if row["sign"] == sign), key=lambda row: -turn * row["own"])[:SHOWN]
        charts.append(BarChart(
            f"change at {sign}, at equal KL of {budget} nats",
            [Bar(row["method"], row["own"], row["own_low"], row["own_high"], turn) for row in side],
        ))  # fmt: skip
    found.append(Grid(charts))
    lines = [
        [f"{row['method']} {row['sign']}", row["kind"], _or_dash(row["alpha"], ".3g"), _interval(row, "own"),
         _interval(row, "dd"), _or_dash(row["reached_p95"], ".2f"), _or_dash(row["pmass"], ".3f"),
         _or_dash(row["facts"], ".1%"), _or_dash(row["nll_delta"], "+.3f")]
        for row in rows
    ]  # fmt: skip
    header = ["method, sign", "kind", "alpha", "behaviour", "dilemmas", "KL p95", "answer mass", "facts", "NLL change"]
    caption = (
        f"Every method at the strength where it costs {budget} nats of KL (95th percentile); prompts at their own. "
        "Changes against the base on the test rows of the comparison beside this run, nats, with 95 % intervals."
    )
    return [*found, Details(f"All {len(lines)} lines of the comparison", [Table(header, lines, caption)], long=True)]


def _interval(row: Mapping[str, Any], name: str) -> str:
    return cells.with_limits({"mean": row[name], "low": row[f"{name}_low"], "high": row[f"{name}_high"]})


def _or_dash(value: float | None, form: str) -> str:
    return "-" if value is None else f"{value:{form}}"
