"""The page about bases: does a subspace made without a trained direction explain what a trained direction does?

Sentences are made from the summary table by these rules:

* The best candidate of a family on an axis is the basis built without a trained direction that comes furthest from
  random subspaces of its rank towards the oracle. Its verdict is that of `subspace.ranking.verdict`.
* The reading "mostly outside" is used for a family on an axis if the best candidate is mostly outside, at random level
  or below it; "mostly inside" if it is mostly inside; else "about half".
* The claim of the replicated work, 1 to 8 % of the oracle for all bases of the base model, is said to hold if every
  candidate is at most 8 %; else the number of candidates above 8 % is given, and of those above random.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl
from rich import table as rich_table

from ws.base import console
from ws.base.files import write_json, write_text
from ws.base.records import plain
from ws.report import document, subspace_figures
from ws.report.document import Block, Bullets, Figure, Heading, Paragraph, Table, Tile, Tiles
from ws.subspace import ranking
from ws.subspace.bases import BASES

PAGE = "subspace.html"
CLAIMED = 8.0
"""Percent of the oracle: the most that the replicated work found for any basis of the base model (rank 8 of 1024)."""
SHOWN, BRIEF = 12, 5
"""Candidates per table on the page and in the terminal; the CSV has all."""
AXES = {"block": "activations", "written": "written weights", "read": "read weights"}
"""Ranked axes and what they are called in tables."""


@dataclass(frozen=True, eq=False)
class Content:
    """What the page is made of. summary, between: tables of `subspace.ranking`; prompts: their counts, in words."""

    model: str
    behaviour: str
    width: int
    rank: int
    layers: tuple[int, ...]
    prompts: str
    summary: pl.DataFrame
    between: pl.DataFrame
    scope: pl.DataFrame
    unavailable: pl.DataFrame
    folder: Path

    @property
    def families(self) -> list[str]:
        """The adapter families, in order."""
        return list(self.summary["family"].unique(maintain_order=True))

    @property
    def runs(self) -> int:
        """Most runs of a family."""
        most: Any = self.summary["runs"].max()
        return int(most)

    def as_json(self) -> dict[str, Any]:
        """For `--json`: the headline, the sentences, the summary and what is unavailable."""
        return {
            "model": self.model, "behaviour": self.behaviour, "rank": self.rank, "layers": list(self.layers),
            "prompts": self.prompts, "headline": headline(self), "sentences": sentences(self),
            "summary": self.summary.to_dicts(), "unavailable": self.unavailable.to_dicts(),
        }  # fmt: skip


# -------------------------------------------------------------------- sentences


def best(content: Content, family: str, metric: str) -> dict[str, Any] | None:
    """The row of the best candidate of a family on an axis; None if it has none."""
    rows = ranking.candidates(content.summary, family, metric)
    return rows.row(0, named=True) if len(rows) else None


def reading(row: dict[str, Any]) -> str:
    """`mostly outside`, `mostly inside` or `about half`, from the verdict of the best candidate."""
    verdict = str(row["verdict"])
    return verdict if verdict in ("mostly inside", "about half") else "mostly outside"


def headline(content: Content) -> str:
    """For every family: is what it changes inside the best basis that needs no trained direction?"""
    parts = []
    for family in content.families:
        row = best(content, family, "block")
        if row is not None:
            parts.append(
                f"what {family} changes in the residual stream is {reading(row)} the best subspace made without a "
                f"trained direction ({row['basis']}: {percent(row)} of the oracle, random {row['null_percent']:.1f} %)"
            )
    said = "; ".join(parts) or "no basis was scored that is made without a trained direction"
    return f"{content.behaviour} in {content.model}, rank {content.rank} of {content.width}: {said}."


def sentences(content: Content) -> list[str]:
    """The findings in words, one per family and axis, then the claim of the replicated work, then the seeds."""
    said = []
    for family in content.families:
        for metric, name in AXES.items():
            rows = ranking.candidates(content.summary, family, metric)
            if not len(rows):
                continue
            row, counts = rows.row(0, named=True), Counter(rows["verdict"])
            listed = ", ".join(f"{count} {verdict}" for verdict, count in counts.most_common())
            said.append(
                f"{family}, {name}: best of {len(rows)} candidates {row['basis']}, {percent(row)} of the oracle, "
                f"{row['concentration']:.1f} times random. Verdicts: {listed}."
            )
    said += [line for say in (_stricter, _claim) for family in content.families if (line := say(content, family))]
    return [*said, *_agreement(content)]


def percent(row: dict[str, Any]) -> str:
    """`41.2 % [30.1, 52.3]`, or without limits if there is one run."""
    return f"{row['percent']:.1f} %{_limits(row)}"


def _limits(row: dict[str, Any]) -> str:
    return "" if row["percent_low"] is None else f" [{row['percent_low']:.1f}, {row['percent_high']:.1f}]"


def _stricter(content: Content, family: str) -> str:
    """How many candidates are above the stricter null of each axis, with all of their interval."""
    said = []
    for metric, null, what in (
        ("block", "null_activations", "with the covariance of clean states"),
        ("written", "null_in_dw", "inside the span of dW"),
    ):
        level = content.summary.filter(family=family, basis=null, metric=metric)["percent"]
        rows = ranking.candidates(content.summary, family, metric)
        if len(level) and len(rows):
            above = rows.filter(pl.coalesce("percent_low", "percent") > level[0])
            said.append(f"{AXES[metric]}: {what} {level[0]:.1f} %, {len(above)} of {len(rows)} candidates are above")
    return f"{family}, random subspaces of stricter kinds: {'; '.join(said)}." if said else ""


def _claim(content: Content, family: str) -> str:
    rows = pl.concat([ranking.candidates(content.summary, family, metric) for metric in ("block", "written")])
    if not len(rows):
        return ""
    above = rows.filter(pl.col("percent") > CLAIMED)
    start = f"{family}: the replicated work found at most {CLAIMED:.0f} % of the oracle for every basis"
    if not len(above):
        return f"{start}; that holds here for all {len(rows)} candidates (activations and written weights together)."
    better = above.filter(pl.col("verdict").is_in(["mostly outside", "about half", "mostly inside"]))
    return (
        f"{start}; here {len(above)} of {len(rows)} are above it (activations and written weights together), and "
        f"{len(better)} of these are also above random, which is {_mean(rows, 'null_percent'):.1f} % on average."
    )


def _agreement(content: Content) -> list[str]:
    """How far the runs' own subspaces agree: within a family over seeds, and between families."""
    said = []
    names = {"written": "what dW writes", "block": "what it changes in activations"}
    for axis, name in names.items():
        rows = content.between.filter(pl.col("axis") == axis, pl.col("first") < pl.col("second"))
        if not len(rows):
            continue
        same = pl.col("first").str.split(" ").list.first() == pl.col("second").str.split(" ").list.first()
        parts = [
            f"{label} {_mean(part, 'overlap'):.2f}"
            for label, part in (("seeds of one family", rows.filter(same)), ("different families", rows.filter(~same)))
            if len(part)
        ]
        said.append(f"Overlap of {name} (0 to 1, random {_mean(rows, 'null'):.2f}): {', '.join(parts)}.")
    return said


def _mean(rows: pl.DataFrame, column: str) -> float:
    return float(rows[column].to_numpy().mean())


# -------------------------------------------------------------------- terminal


def show(content: Content) -> None:
    """Print the best candidates per family and axis, the sentences, and the headline."""
    console.say()
    for family in content.families:
        for metric, name in AXES.items():
            rows = ranking.candidates(content.summary, family, metric).head(BRIEF)
            if not len(rows):
                continue
            shown = rich_table.Table(title=f"{family}: {name}", title_justify="left", header_style="bold", box=None)
            for column in BRIEF_COLUMNS:
                shown.add_column(column, justify="left" if column in ("basis", "verdict") else "right", no_wrap=True)
            for row in rows.to_dicts():
                line = dict(zip(COLUMNS, cells(row), strict=True))
                shown.add_row(*(line[column] for column in BRIEF_COLUMNS))
            console.show(shown)
    for sentence in sentences(content):
        console.say(sentence)
    console.say(f"\n{headline(content)}", style="bold")


# -------------------------------------------------------------------- page


def write(content: Content) -> None:
    """Write `subspace.html`, `.md`, `.json` and the figures into the folder of the runs."""
    ranking_file, overlap_file = content.folder / "subspace_ranking.png", content.folder / "subspace_overlap.png"
    subspace_figures.ranking(content.summary, content.families, ranking_file)
    blocks: list[Block] = [
        Paragraph(headline(content), strong=True),
        Tiles(_tiles(content)),
        Paragraph(
            f"Prompts: {content.prompts}. Layers {', '.join(map(str, content.layers))}. Means over the layers that a "
            f"direction changes; brackets: 95 % t interval over seeds ({content.runs} runs per family)."
        ),
        Heading("What the numbers say"),
        Bullets(sentences(content)),
        Figure(
            ranking_file, "bases ranked by their percentage of the oracle",
            "Percent of the oracle at equal rank, with 95 % intervals over seeds. Small bars: random subspaces of the "
            "same rank. Filled: candidates; hollow: built from a trained direction; grey: nulls. "
            "Bases of readers are not ranked on what is written, nor writers on what is read.",
        ),
    ]  # fmt: skip
    for metric, name in AXES.items():
        blocks += [Heading(f"Ranking: {name}"), Paragraph(f"Axis: {ranking.RANKED_ON[metric]}.", note=True)]
        blocks += [_table(content, family, metric) for family in content.families]
    if content.between["first"].n_unique() > 1:
        subspace_figures.overlap(content.between, overlap_file)
        blocks += [Heading("Do runs agree with each other?"), Figure(
            overlap_file, "overlap of the subspaces of the runs",
            "Mean squared cosine of the principal angles between the runs' own leading subspaces, mean over layers.",
        )]  # fmt: skip
    blocks += [
        Heading("Weights and activations by layer"),
        _scope(content),
        Heading("The bases"),
        _definitions(content),
    ]
    if len(content.unavailable):
        missing = [f"{row['basis']} ({row['family']}): {row['reason']}" for row in content.unavailable.to_dicts()]
        blocks += [Heading("Not available here"), Bullets(missing)]
    subtitle = f"{', '.join(content.families)}; rank {content.rank} of {content.width}; {content.runs} seeds"
    title = f"Where {content.behaviour} lives in {content.model}"
    page = content.folder / PAGE
    write_json(page.with_suffix(".json"), plain(content.as_json()))
    write_text(page.with_suffix(".md"), document.to_markdown(title, [Paragraph(subtitle, note=True), *blocks]))
    write_text(page, document.to_html(title, subtitle, blocks))


def _tiles(content: Content) -> list[Tile]:
    found = []
    for family in content.families:
        for metric in ("block", "written"):
            row = best(content, family, metric)
            if row is not None:
                detail = f"{row['basis']}, random {row['null_percent']:.1f} %"
                found.append(Tile(f"{row['percent']:.0f} %", f"{family}, {AXES[metric]}: best candidate", detail))
    return found


def table(content: Content, family: str, metric: str) -> pl.DataFrame:
    """The best candidates of a family on an axis, then what is built from trained directions, then the nulls."""
    rows = ranking.ranked(content.summary, family, metric)
    wanted = list(map(ranking.is_candidate, rows["basis"]))
    nulls = [BASES[name].is_null for name in rows["basis"]]
    others = [not candidate and not null for candidate, null in zip(wanted, nulls, strict=True)]
    return pl.concat([rows.filter(wanted).head(SHOWN), rows.filter(others), rows.filter(nulls)])


def cells(row: dict[str, Any]) -> list[str]:
    """One line of a ranking as text."""
    return [
        row["basis"], row["kind"], f"{row['rank']:.0f}", f"{row['percent']:.1f}{_limits(row)}",
        f"{row['null_percent']:.1f}",
        f"{row['concentration']:.2f}", f"{row['z']:+.1f}", row["verdict"],
    ]  # fmt: skip


COLUMNS = ("basis", "kind", "rank", "% of the oracle", "random", "times random", "z", "verdict")
BRIEF_COLUMNS = ("basis", "% of the oracle", "random", "z", "verdict")


def _table(content: Content, family: str, metric: str) -> Block:
    rows = table(content, family, metric).to_dicts()
    count = len(ranking.candidates(content.summary, family, metric))
    caption = (
        f"{family}: the best {min(count, SHOWN)} of {count} candidates, then bases from trained directions, then "
        "nulls. z: distance from random subspaces in their standard deviations, for the mean over layers."
    )
    return Table(COLUMNS, [cells(row) for row in rows], caption)


def _scope(content: Content) -> Block:
    columns = {
        "overlap_written_block": "written x block", "overlap_written_cumulative": "written x cumulative",
        "overlap_cumulative_block": "cumulative x block", "null": "random", "block_norm": "block norm",
        "cumulative_norm": "cumulative norm", "block_over_cumulative": "block / cumulative",
        "token_energy": "token energy",
    }  # fmt: skip
    means = content.scope.group_by("family", "layer", maintain_order=True).agg(pl.col(list(columns)).mean())
    rows = [
        [row["family"], str(row["layer"]), *("-" if row[name] is None else f"{row[name]:.3g}" for name in columns)]
        for row in means.sort("family", "layer").to_dicts()
    ]
    return Table(
        ["family", "layer", *columns.values()], rows,
        "Overlaps of the leading subspaces of one run. Block: what the layer itself adds to the difference between +1 "
        "and -1; cumulative: with all layers below. At the first changed layer both are the same. Token energy: 1 if "
        "the unembedding reads the difference like a random vector.",
    )  # fmt: skip


def _definitions(content: Content) -> Block:
    used = set(content.summary["basis"])
    lines = [
        f"{one.name} ({one.family}; {one.axis}{'; uses trained dW' * one.uses_trained_dW}): {one.formula}"
        for one in BASES.values() if one.name in used
    ]  # fmt: skip
    return Bullets(lines)
