"""Dose-response charts, a tab for every probe: intervals, the band of random directions, prompts, answer mass."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from ws.eval import dilemmas
from ws.report.document import Block, Grid, Line, LineChart, Point, Tabs
from ws.report.findings import DILEMMAS, Band, Curve, Estimate, Instrument, Level, Numbers, Summary
from ws.report.sentences import facts_say_something

CHANCE = "random directions, 95 %"
_SHOWN_GROUPS = 3
CAPTION = (
    "Means with 95 % intervals over clusters of rows. Grey band: 95 % of random directions of this size are expected "
    "here; short marks are the measured ones. Dashed: persona prompts on the unedited model."
)


def tabs(summary: Summary) -> Tabs:
    """One tab for each: the headline's instrument, the other instrument, dilemmas, other behaviours, side effects."""
    found: list[tuple[str, Sequence[Block]]] = [(_own_title(summary), [_own(summary)])]
    if summary.ability.instrument == "replies":
        found.append((f"{summary.behaviour}, Yes/No", [_yes_no(summary)]))
    found.append((summary.numbers.title(DILEMMAS), [_dilemmas(summary)]))
    if summary.numbers.other_behaviours:
        found.append(("other behaviours", [_others(summary)]))
    found.append(("side effects", [_side_effects(summary.numbers)]))
    return Tabs("Pick a probe", found)


def _own_title(summary: Summary) -> str:
    return summary.behaviour if summary.ability.instrument == "choice" else f"{summary.behaviour}, replies"


def _own(summary: Summary) -> Grid:
    measured, by_choice = summary.measured, summary.ability.instrument == "choice"
    groups = [name for name in summary.numbers.groups if "/" not in name] if by_choice else []
    groups.sort(key=lambda name: name != summary.headline_group)
    chart = _levels(
        f"{summary.behaviour}, held out", measured.levels,
        {f"{name}, plain questions": summary.numbers.groups[name] for name in groups[:_SHOWN_GROUPS]},
        "balanced" if by_choice else "replies", measured.bands, measured.contexts,
    )  # fmt: skip
    beside: list[Block] = [_shares(summary, measured)] if measured.shares else []
    return Grid([chart, *beside, *([_mass(summary.own)] if by_choice else [])])


def _yes_no(summary: Summary) -> Grid:
    measured = summary.numbers.instruments["choice"]
    chart = _levels(f"{summary.behaviour}, Yes/No", measured.levels, {}, "balanced", measured.bands, measured.contexts)
    return Grid([chart, _mass(summary.own)])


def _dilemmas(summary: Summary) -> Grid:
    numbers = summary.numbers
    # if some rows are not counted, the group `stated` is the counted rows
    groups = {
        f"{name} (not counted)" if name == dilemmas.FILLER else name: curve
        for name, curve in numbers.dilemma_groups.items()
        if name != dilemmas.STATED
    }
    bands = {key: entry[DILEMMAS] for key, entry in numbers.bands.items() if DILEMMAS in entry}
    contexts = {name: effects[DILEMMAS] for name, effects in numbers.contexts.items()}
    title = f"everyday {numbers.title(DILEMMAS)}, held out"
    name = "counted rows" if numbers.dilemma_counts.not_counted else "all"
    chart = _levels(title, summary.dilemmas, groups, name, bands, contexts, towards="honesty")
    return Grid([chart, _mass(summary.dilemmas)])


def _levels(
    title: str, levels: Curve, groups: Mapping[str, Curve], name: str, bands: Mapping[str, Band], contexts: Curve,
    towards: str = "the behaviour",
) -> LineChart:  # fmt: skip
    base = levels["0"].mean
    return LineChart(
        title, "alpha", f"log-ratio towards {towards}, nats",
        [Line(name, points(levels), strong=True), *(Line(group, points(curve)) for group, curve in groups.items())],
        band=_band(base, bands),
        ticks=[Point(float(key), base + value) for key, band in bands.items() for value in band.seeds],
        levels=[(context, entry.mean) for context, entry in contexts.items()], caption=CAPTION, lead=True,
    )  # fmt: skip


def points(curve: Mapping[str, Estimate]) -> list[Point]:
    """The points of a curve over strengths, ascending."""
    return [
        Point(float(key), entry.mean, entry.low, entry.high)
        for key, entry in sorted(curve.items(), key=lambda one: float(one[0]))
    ]


def _band(base: float, bands: Mapping[str, Band]) -> Line | None:
    """The band of the random directions around the base; it has no width at 0, where nothing is edited."""
    found = [
        Point(float(key), math.nan, base + band.low, base + band.high)
        for key, band in bands.items()
        if band.low is not None and band.high is not None
    ]
    return Line(CHANCE, sorted([*found, Point(0.0, math.nan, base, base)])) if found else None


def _shares(summary: Summary, measured: Instrument) -> LineChart:
    what = "answers" if summary.ability.instrument == "choice" else "contrasts"
    return LineChart(
        f"share of {what} on this side", "alpha", f"share of the {what} to held-out {summary.noun}",
        [Line("share", points(measured.shares), strong=True)], limits=(0.0, 1.0), form=".0%",
    )  # fmt: skip


def _mass(levels: Mapping[str, Level]) -> LineChart:
    found = {key: Estimate(level.pmass, None, None, level.n) for key, level in levels.items()}
    return LineChart(
        "answer mass", "alpha", "probability on the two answers", [Line("mass", points(found), strong=True)],
        limits=(0.0, 1.0), form=".2f",
    )  # fmt: skip


def _others(summary: Summary) -> Grid:
    own = summary.numbers.change[summary.behaviour]
    unedited = {"0": Estimate(0.0, None, None, 0)}
    lines = [Line(f"{summary.behaviour} itself", points({**own, **unedited}), strong=True)]
    for name, other in summary.numbers.other_behaviours.items():
        lines.append(Line(name, points({**other.change, **unedited})))
    return Grid([LineChart(
        "what the direction does to other behaviours", "alpha", "change of the Yes/No log-ratio, nats", lines,
        caption="Plain Yes/No questions in one polarity, held out, with 95 % intervals.", lead=True,
    )])  # fmt: skip


def _side_effects(numbers: Numbers) -> Grid:
    costs = sorted(numbers.side_effects.items(), key=lambda one: float(one[0]))

    def line(name: str, attribute: str) -> Line:
        return Line(name, [Point(float(key), getattr(entry, attribute)) for key, entry in costs])

    facts = LineChart(
        "facts answered right", "alpha", "share" if facts_say_something(numbers) else "share; this model guesses",
        [line("facts", "facts")], limits=(0.0, 1.0), form=".1%",
    )  # fmt: skip
    return Grid([
        LineChart("KL to the base", "alpha", "nats per token of neutral text",
                  [line("mean", "kl"), line("95th percentile", "kl_p95")], form=".3f"),
        LineChart("likelihood of neutral text", "alpha", "change of NLL, nats per token",
                  [line("change", "nll_delta")], form="+.3f"),
        facts,
    ])  # fmt: skip
