"""What a page is made of. Blocks hold text and numbers; `markdown` and `web_page` decide how they look."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple


@dataclass(frozen=True)
class Heading:
    """A section title."""

    text: str


@dataclass(frozen=True)
class Paragraph:
    """Plain text; `note` sets it as a remark, `strong` as the headline."""

    text: str
    note: bool = False
    strong: bool = False


@dataclass(frozen=True)
class Bullets:
    """A list of remarks; `warning` marks them."""

    items: Sequence[str]
    warning: bool = False


@dataclass(frozen=True)
class Table:
    """A header and rows of cells; the first column is text, the others are numbers."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""


@dataclass(frozen=True)
class Texts:
    """A table whose cells are texts that a model or a user wrote; the first column is short."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""


@dataclass(frozen=True)
class Figure:
    """A PNG file in the folder of the document."""

    file: Path
    alternative: str
    caption: str = ""


@dataclass(frozen=True)
class Tile:
    """One number at the top of the page."""

    value: str
    label: str
    detail: str = ""


@dataclass(frozen=True)
class Tiles:
    """A row of tiles."""

    tiles: Sequence[Tile]


@dataclass(frozen=True)
class Samples:
    """The same prompts answered under several strengths: `columns` name them, `rows` are (prompt, answers).

    `shown` prompts stand on the page; the others are folded away. `by_strength`: the columns are in the order of their
    strengths with the base in the middle, and coloured so.
    """

    columns: Sequence[str]
    rows: Sequence[tuple[str, Sequence[str]]]
    shown: int = 4
    by_strength: bool = True


# -------------------------------------------------------------------- charts


class Point(NamedTuple):
    """A value at x, with its limits if it has any."""

    x: float
    y: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Line:
    """A line through points; its interval is shaded. `dots` marks every point, `strong` draws it in the text colour."""

    name: str
    points: Sequence[Point]
    dots: bool = True
    strong: bool = False


@dataclass(frozen=True)
class LineChart:
    """Lines over x.

    band: where chance alone is expected, shaded grey; `low` and `high` of its points. ticks: single measured values,
    as short marks. levels: names and values of dashed horizontal lines. limits: fixed limits of y. form: how values are
    written. lead: the chart is large, the other charts of its grid stand beside it.
    """

    title: str
    x: str
    y: str
    lines: Sequence[Line]
    band: Line | None = None
    ticks: Sequence[Point] = ()
    levels: Sequence[tuple[str, float]] = ()
    limits: tuple[float, float] | None = None
    form: str = "+.2f"
    caption: str = ""
    lead: bool = False


class Bar(NamedTuple):
    """A named value with limits; `tone` is the sign of its colour: -1, 0 or 1."""

    name: str
    value: float
    low: float | None = None
    high: float | None = None
    tone: int = 0


@dataclass(frozen=True)
class BarChart:
    """Horizontal bars from zero. limits: fixed limits of the axis."""

    title: str
    bars: Sequence[Bar]
    limits: tuple[float, float] | None = None
    form: str = "+.2f"
    caption: str = ""


@dataclass(frozen=True)
class Heat:
    """A grid of numbers from 0 up, drawn as shades; None is an empty cell."""

    title: str
    rows: Sequence[str]
    columns: Sequence[str]
    values: Sequence[Sequence[float | None]]
    form: str = ".3g"
    caption: str = ""


# -------------------------------------------------------------------- arrangement


@dataclass(frozen=True)
class Grid:
    """Blocks side by side where the page is wide enough."""

    blocks: Sequence[Block]


@dataclass(frozen=True)
class Tabs:
    """Named groups of blocks of which the reader picks one; on paper all are shown. `label` says what is picked."""

    label: str
    tabs: Sequence[tuple[str, Sequence[Block]]]


@dataclass(frozen=True)
class Details:
    """Blocks that are folded away under a title; on paper they are shown, unless they are `long`."""

    title: str
    blocks: Sequence[Block]
    long: bool = False


Block = (
    Heading | Paragraph | Bullets | Table | Texts | Figure | Tiles | Samples | LineChart | BarChart | Heat | Grid | Tabs
    | Details
)  # fmt: skip


def values_of(chart: LineChart | BarChart | Heat) -> Table:
    """The numbers of a chart as a table."""
    match chart:
        case BarChart(bars=bars, form=form):
            return Table(["", "value", "95 % interval"], [[bar.name, f"{bar.value:{form}}", _limits(bar, form)]
                                                         for bar in bars])  # fmt: skip
        case Heat(rows=rows, columns=columns, values=values, form=form):
            cells = [["-" if value is None else f"{value:{form}}" for value in line] for line in values]
            return Table(["", *columns], [[name, *line] for name, line in zip(rows, cells, strict=True)])
        case LineChart(x=x, lines=lines, form=form):
            shown = [*lines, *([chart.band] if chart.band else [])]
            places = sorted({point.x for line in shown for point in line.points})
            at = [{point.x: _written(point, form) for point in line.points} for line in shown]
            return Table(
                [x, *(line.name for line in shown)],
                [[f"{place:g}", *(found.get(place, "-") for found in at)] for place in places],
            )


def _written(point: Point, form: str) -> str:
    limits = _limits(point, form)
    value = "" if point.y != point.y else f"{point.y:{form}}"
    return f"{value} [{limits}]".strip() if limits else value


def _limits(value: Point | Bar, form: str) -> str:
    return "" if value.low is None or value.high is None else f"{value.low:{form}}, {value.high:{form}}"
