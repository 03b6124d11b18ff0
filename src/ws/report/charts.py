"""Charts as HTML and inline SVG. Colours and sizes of text come from the style sheet, so both themes and paper work.

Every value is in the page twice: drawn, and as text (in a table under the chart, or in its cells), so that a chart can
be read without seeing it and without scripts.
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from ws.report.blocks import Bar, BarChart, Heat, Line, LineChart, Point

TICKS = 5
"""About how many marks an axis has; an axis with at most `EXACT` different x marks each of them."""
EXACT = 9
HOVER_POINTS = 200
"""At most this many points of a line show their value under the pointer."""
COLOURS = 7


def escape(text: str) -> str:
    """A text for HTML, also inside quoted attributes."""
    return html.escape(text, quote=True)


def number(value: float, form: str) -> str:
    """A number with a real minus sign."""
    return f"{value:{form}}".replace("-", "\N{MINUS SIGN}")


# -------------------------------------------------------------------- lines


@dataclass(frozen=True)
class _Frame:
    """The drawing area: data limits on both axes and the size of the picture in its own units."""

    x: tuple[float, float]
    y: tuple[float, float]
    width: int
    height: int
    left: int
    bottom: int
    top: int = 10
    right: int = 14

    def across(self, value: float) -> float:
        low, high = self.x
        return self.left + (value - low) / ((high - low) or 1) * (self.width - self.left - self.right)

    def up(self, value: float) -> float:
        low, high = self.y
        return self.height - self.bottom - (value - low) / ((high - low) or 1) * (self.height - self.bottom - self.top)


def line_chart(chart: LineChart) -> str:
    """The legend and the picture of a line chart."""
    unit, below = f"<div class=unit>{escape(chart.y)}</div>", f"<div class=unit-x>{escape(chart.x)}</div>"
    return f"{_legend(chart)}{unit}{_svg(chart)}{below}"


def _svg(chart: LineChart) -> str:
    frame = _frame(chart)
    shown = "; ".join(f"{line.name} from {number(line.points[0].y, chart.form)} to "
                      f"{number(line.points[-1].y, chart.form)}" for line in chart.lines)  # fmt: skip
    parts = [
        f"<svg role=img class='{'lead' if chart.lead else 'plot'}' viewBox='0 0 {frame.width} {frame.height}' "
        f"aria-label='{escape(f'{chart.title}: {chart.y} over {chart.x}')}'><desc>{escape(shown)}</desc>",
        *_axes(frame, chart),
    ]
    if chart.band is not None:
        parts.append(f"<path class=band d='{_ribbon(frame, chart.band.points)}'/>")
    level_names = []
    for name, value in chart.levels:
        y = frame.up(value)
        parts.append(f"<path class=level d='M{frame.left} {y:.1f}H{frame.width - frame.right}'/>")
        level_names.append(f"<text class=end x={frame.width - frame.right} y={y - 5:.1f}>{escape(name)}</text>")
    parts += [f"<path class=seed d='M{frame.across(one.x) - 4:.1f} {frame.up(one.y):.1f}h8'/>" for one in chart.ticks]
    for number_, line in enumerate(chart.lines):
        parts += _line(frame, line, chart, colour_of(number_, line))
    return "".join([*parts, *level_names, "</svg>"])


def _frame(chart: LineChart) -> _Frame:
    lines = [*chart.lines, *([chart.band] if chart.band else [])]
    points = [point for line in lines for point in line.points] + list(chart.ticks)
    xs = [point.x for point in points]
    ys = [value for point in points for value in (point.y, point.low, point.high)] + [v for _, v in chart.levels]
    finite = [value for value in ys if value is not None and math.isfinite(value)] or [0.0]
    low, high = chart.limits or (min(finite), max(finite))
    if chart.limits is None:
        margin = 0.07 * (high - low) or 0.5
        low, high = (low if low == 0 else low - margin), high + margin
    sides = 0.02 * (max(xs) - min(xs)) or 0.5
    size = (720, 396, 58, 30) if chart.lead else (400, 232, 58, 26)
    return _Frame((min(xs) - sides, max(xs) + sides), (low, high), *size)


def _axes(frame: _Frame, chart: LineChart) -> Iterator[str]:
    heights = nice_ticks(*frame.y)
    form = ".0%" if chart.form.endswith("%") else _form(heights)
    for value in heights:
        y = frame.up(value)
        kind = "zero" if value == 0 else "grid"
        yield f"<path class={kind} d='M{frame.left} {y:.1f}H{frame.width - frame.right}'/>"
        label = number(value, form).replace("e\N{MINUS SIGN}0", "e\N{MINUS SIGN}") if value or form[-1] != "e" else "0"
        yield f"<text class=end x={frame.left - 7} y={y:.1f} dy=.35em>{label}</text>"
    xs = sorted({point.x for line in chart.lines for point in line.points})
    for value in xs if len(xs) <= EXACT else nice_ticks(*frame.x):
        label = number(value, "g") if value <= 0 or min(xs) >= 0 else f"+{value:g}"
        yield f"<text class=mid x={frame.across(value):.1f} y={frame.height - 6}>{label}</text>"


def _form(ticks: Sequence[float]) -> str:
    """The shortest form that tells the ticks exactly; tiny numbers with an exponent."""
    digits = next(count for count in range(13) if all(abs(round(value, count) - value) < 1e-12 for value in ticks))
    return f".{digits}f" if digits <= 3 else ".1e"


def nice_ticks(low: float, high: float) -> list[float]:
    """Round numbers inside the limits, about `TICKS` of them."""
    if not high > low:
        return [low]
    rough = (high - low) / TICKS
    size = 10 ** math.floor(math.log10(rough))
    step = next(factor * size for factor in (1, 2, 2.5, 5, 10) if factor * size >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(count * step, 12) for count in range(first, last + 1)]


def colour_of(number_: int, line: Line) -> str:
    """The class that gives a line its colour and its dashes."""
    return "ink" if line.strong else f"c{number_ % COLOURS}"


def _line(frame: _Frame, line: Line, chart: LineChart, colour: str) -> Iterator[str]:
    if any(point.low is not None for point in line.points):
        yield f"<path class='interval {colour}' d='{_ribbon(frame, line.points)}'/>"
    drawn = [point for point in line.points if math.isfinite(point.y)]
    yield f"<path class='line {colour}' d='M{_path(frame, ((point.x, point.y) for point in drawn))}'/>"
    kind, radius = ("dot", 4) if line.dots else ("hit", 5)
    for point in drawn[:: math.ceil(len(drawn) / HOVER_POINTS)]:
        limits = "" if point.low is None or point.high is None else (
            f" (95 % {number(point.low, chart.form)} to {number(point.high, chart.form)})"
        )  # fmt: skip
        told = f"{line.name}, {chart.x} {number(point.x, 'g')}: {number(point.y, chart.form)}{limits}"
        yield (f"<circle class='{kind} {colour}' cx={frame.across(point.x):.1f} cy={frame.up(point.y):.1f} r={radius}>"
               f"<title>{escape(told)}</title></circle>")  # fmt: skip


def _ribbon(frame: _Frame, points: Sequence[Point]) -> str:
    """The area between the limits of points; a point without limits is its own limit."""
    low = [(one.x, one.y if one.low is None else one.low) for one in points]
    high = [(one.x, one.y if one.high is None else one.high) for one in points]
    return f"M{_path(frame, low)}L{_path(frame, reversed(high))}Z"


def _path(frame: _Frame, points: Iterable[tuple[float, float]]) -> str:
    return "L".join(f"{frame.across(x):.1f} {frame.up(y):.1f}" for x, y in points)


def _legend(chart: LineChart) -> str:
    keys = [(f"line {colour_of(number_, line)}", line.name) for number_, line in enumerate(chart.lines)]
    swatches = [f"<li><svg viewBox='0 0 26 10' aria-hidden=true><path class='{kind}' d='M1 5H25'/></svg>"
                f"{escape(name)}</li>" for kind, name in keys]  # fmt: skip
    if chart.band is not None:
        swatches.append("<li><svg viewBox='0 0 26 10' aria-hidden=true><path class=band d='M1 1H25V9H1Z'/></svg>"
                        f"{escape(chart.band.name)}</li>")  # fmt: skip
    return f"<ul class=legend>{''.join(swatches)}</ul>" if len(swatches) > 1 else ""


# -------------------------------------------------------------------- bars and shades


def bar_chart(chart: BarChart) -> str:
    """A table with a drawn bar, its interval and its value in every row."""
    ends = [value for bar in chart.bars for value in (bar.value, bar.low, bar.high, 0.0) if value is not None]
    low, high = chart.limits or (min(ends), max(ends))
    rows = "".join(
        f"<tr><th scope=row>{escape(bar.name)}</th><td class=bar>{_bar(bar, low, (high - low) or 1)}</td>"
        f"<td class=value><b>{number(bar.value, chart.form)}</b>{_bar_limits(bar, chart.form)}</td></tr>"
        for bar in chart.bars
    )
    return f"<table class=bars><tbody>{rows}</tbody></table>"


def _bar(bar: Bar, low: float, span: float) -> str:
    def at(value: float) -> float:
        return min(100.0, max(0.0, 100 * (value - low) / span))

    left, right = sorted((at(0.0), at(bar.value)))
    tone = {-1: "minus", 0: "base", 1: "plus"}[bar.tone]
    whisker = "" if bar.low is None or bar.high is None else (
        f"<path class=whisker d='M{at(bar.low):.2f} 6V18M{at(bar.low):.2f} 12H{at(bar.high):.2f}"
        f"M{at(bar.high):.2f} 6V18'/>"
    )  # fmt: skip
    return (f"<svg viewBox='0 0 100 24' preserveAspectRatio=none aria-hidden=true><path class=track d='M0 12H100'/>"
            f"<path class='fill {tone}' d='M{left:.2f} 3H{right:.2f}V21H{left:.2f}Z'/>"
            f"<path class=axis d='M{at(0.0):.2f} 0V24'/>{whisker}</svg>")  # fmt: skip


def _bar_limits(bar: Bar, form: str) -> str:
    if bar.low is None or bar.high is None:
        return ""
    return f" <span>{number(bar.low, form)} to {number(bar.high, form)}</span>"


def heat(chart: Heat) -> str:
    """A table of shaded cells; the number of a cell shows under the pointer and is read to those who cannot see it."""
    largest = max((value for line in chart.values for value in line if value is not None), default=1.0) or 1.0
    every = math.ceil(len(chart.columns) / 12)
    head = "".join(
        f"<th scope=col><span{'' if place % every == 0 else ' class=unseen'}>{escape(name)}</span></th>"
        for place, name in enumerate(chart.columns)
    )
    rows = "".join(
        f"<tr><th scope=row>{escape(name)}</th>" + "".join(
            _shade(value, largest, f"{name}, {column}", chart.form)
            for column, value in zip(chart.columns, line, strict=True)
        ) + "</tr>"
        for name, line in zip(chart.rows, chart.values, strict=True)
    )  # fmt: skip
    return f"<table class=heat><thead><tr><td></td>{head}</tr></thead><tbody>{rows}</tbody></table>"


def _shade(value: float | None, largest: float, name: str, form: str) -> str:
    if value is None:
        return "<td></td>"
    text = number(value, form)
    told = escape(f"{name}: {text}")
    return f"<td style='--v:{value / largest:.3f}' title='{told}'><span class=unseen>{text}</span></td>"
