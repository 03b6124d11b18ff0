"""Finished runs side by side: one table, one chart for each probe, and what of them cannot be compared."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from ws.base.errors import UserError
from ws.base.files import write_text
from ws.report import cells, document
from ws.report.beside import tone
from ws.report.cells import signed
from ws.report.document import (
    Bar,
    BarChart,
    Block,
    Bullets,
    Grid,
    Heading,
    Line,
    LineChart,
    Paragraph,
    Samples,
    Table,
    Tabs,
)
from ws.report.dose import points
from ws.report.findings import Curve, Estimate, Summary
from ws.report.sentences import facts_say_something
from ws.report.story import Story

PAGE = "runs.html"
KEYS = ("-1", "1")


def write(stories: Sequence[Story]) -> Path:
    """Write `runs.html` and `runs.md` into the folder that all runs have in common; return the page."""
    folders = [story.folder.resolve() for story in stories]
    if len(set(folders)) < len(folders):
        raise UserError("the same run is given twice", "Give different run folders.")
    place = Path(os.path.commonpath(folders))
    title = f"{len(stories)} runs side by side"
    subtitle = "; ".join(names(stories))
    found = blocks(stories)
    write_text(place / "runs.md", document.to_markdown(title, [Paragraph(subtitle, note=True), *found]))
    write_text(place / PAGE, document.to_html(title, subtitle, found))
    return place / PAGE


def names(stories: Sequence[Story]) -> list[str]:
    """A name for each run: the parts of its identity in which the runs differ; its folder if these do not tell it."""
    parts = [
        (one.model, one.behaviour, one.adapter, f"seed {one.seed}", f"data seed {one.data_seed}")
        for one in (story.summary for story in stories)
    ]
    differing = [place for place, values in enumerate(zip(*parts, strict=True)) if len(set(values)) > 1]
    if len({tuple(one[place] for place in differing) for one in parts}) < len(parts):
        return [str(story.folder) for story in stories]
    return [", ".join(one[place] for place in differing) for one in parts]


def blocks(stories: Sequence[Story]) -> list[Block]:
    """What cannot be compared first; then effects as bars, all numbers, dose-response, and replies."""
    labels = names(stories)
    summaries = [story.summary for story in stories]
    doubts = not_comparable(summaries)
    return [
        *([Bullets(doubts, warning=True)] if doubts else []),
        Paragraph(_furthest(labels, summaries), strong=True),
        Grid([_bars(labels, summaries, key) for key in KEYS]),
        table(labels, summaries),
        Heading("Dose-response"),
        Tabs("Pick a probe", [
            ("behaviour", [_doses(labels, [one.measured.change for one in summaries], "each run's own behaviour")]),
            ("dilemmas", [_doses(labels, [one.numbers.dd_delta for one in summaries], "honesty in dilemmas")]),
        ]),
        *_replies(labels, stories),
    ]  # fmt: skip


def not_comparable(summaries: Sequence[Summary]) -> list[str]:
    """One sentence for each reason why numbers of these runs do not measure the same."""
    reasons: list[tuple[str, Callable[[Summary], object], str]] = [
        ("behaviours", lambda one: one.behaviour, "each has its own probe: compare signs and verdicts, not sizes"),
        ("instruments", lambda one: one.ability.instrument,
         "a log-ratio of two words and one of two whole replies have different scales"),
        ("models", lambda one: one.model, "a nat is not the same change of behaviour in both"),
        ("held-out rows", lambda one: one.measured.levels["0"].n, "the means are over different questions"),
        ("dilemmas", lambda one: (one.numbers.dilemma_counts.noun, one.numbers.dilemma_counts.counted),
         "their means are over different dilemmas"),
        ("recipes", lambda one: one.recipe, "settings differ in more than the adapter"),
    ]  # fmt: skip
    found = [
        f"different {what} ({', '.join(dict.fromkeys(str(_shown(of(one))) for one in summaries))}): {why}"
        for what, of, why in reasons
        if len({of(one) for one in summaries}) > 1
    ]
    found.append(
        "alpha +1 costs a different amount in each run: see KL in the table; ws compare measures at equal cost"
    )
    return found


def _shown(value: object) -> object:
    return " ".join(map(str, reversed(value))) if isinstance(value, tuple) else value


def _furthest(labels: Sequence[str], summaries: Sequence[Summary]) -> str:
    """Which run moves the behaviour furthest, if all runs measure the same thing in the same model."""
    if len({(one.model, one.behaviour, one.ability.instrument) for one in summaries}) > 1:
        return "These runs do not measure the same thing: read each line by itself."
    said = []
    for key in reversed(KEYS):
        if known := _changes(labels, summaries, key):
            label, change = max(known, key=lambda pair: abs(pair[1].mean))
            said.append(f"at alpha {signed(key)}, {label} moves {summaries[0].behaviour} furthest ({change.text} nats)")
    text = "; ".join(said) or "none of the runs was measured at -1 or +1"
    return f"{text[0].upper()}{text[1:]}."


def _changes(labels: Sequence[str], summaries: Sequence[Summary], key: str) -> list[tuple[str, Estimate]]:
    """Run -> change of its behaviour at a strength, where it was measured."""
    pairs = zip(labels, summaries, strict=True)
    return [(label, one.measured.change[key]) for label, one in pairs if key in one.measured.change]


def _bars(labels: Sequence[str], summaries: Sequence[Summary], key: str) -> BarChart:
    bars = [Bar(label, one.mean, one.low, one.high, tone(key)) for label, one in _changes(labels, summaries, key)]
    return BarChart(f"change of the behaviour at {signed(key)}, nats", bars)


def table(labels: Sequence[str], summaries: Sequence[Summary]) -> Table:
    """All numbers that runs share, a line for each run."""
    rows = []
    for label, one in zip(labels, summaries, strict=True):
        changes = [one.measured.change.get(key) for key in KEYS]
        costs = one.numbers.side_effects.get("1")
        rows.append([
            label, one.ability.instrument, *("-" if change is None else change.text for change in changes),
            _verdict(one), cells.with_limits(_plain(one.numbers.dd_delta.get("1"))),
            *(("-",) * 3 if costs is None else (
                f"{costs.kl_p95:.3f}", f"{costs.nll_delta:+.3f}",
                f"{100 * costs.facts:.1f} %" if facts_say_something(one.numbers) else "guesses",
            )),
            f"{one.direction_norm:.3g}", str(len(one.warnings)),
        ])  # fmt: skip
    return Table(
        ["run", "measured by", "change at -1", "change at +1", "against chance", "dilemmas at +1", "KL p95 at +1",
         "NLL change at +1", "facts at +1", "|dW|", "warnings"],
        rows,
        "Changes against each run's own unedited model, nats, with 95 % intervals over clusters of rows. Against "
        "chance: whether the change is outside the band of random directions of the same size, at -1 and +1.",
    )  # fmt: skip


def _plain(entry: Estimate | None) -> dict[str, object] | None:
    return None if entry is None else vars(entry)


def _verdict(one: Summary) -> str:
    words = {True: "outside", False: "inside", None: "?"}
    return " / ".join(words[one.measured.outside.get(key)] for key in KEYS)


def _doses(labels: Sequence[str], changes: Sequence[Curve], towards: str) -> Grid:
    unedited = {"0": Estimate(0.0, None, None, 0)}
    lines = [Line(label, points({**curve, **unedited})) for label, curve in zip(labels, changes, strict=True)]
    return Grid([LineChart(
        f"change towards {towards}", "alpha", "change against the unedited model, nats", lines, lead=True,
        caption="95 % intervals over clusters of rows.",
    )])  # fmt: skip


def _replies(labels: Sequence[str], stories: Sequence[Story]) -> list[Block]:
    """What the runs say at +1 to the prompts that they have in common."""
    said = [
        {row["prompt"]: row["response"] for row in story.samples.to_dicts() if row["alpha"] == 1.0}
        for story in stories
        if story.samples is not None
    ]
    shared = [prompt for prompt in (said[0] if said else {}) if all(prompt in one for one in said)]
    if len(said) < len(stories) or not shared:
        return []
    rows = [(prompt, [one[prompt] for one in said]) for prompt in shared]
    return [Heading("What they say at alpha +1"), Samples(labels, rows, by_strength=False)]
