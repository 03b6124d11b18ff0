"""The report of one run: warnings, the result in plain words with its evidence, samples, then everything measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import polars as pl

from ws.base.files import write_text
from ws.eval import feedback, instrument
from ws.report import beside, document, dose, effects, figures, origin
from ws.report.beside import tone
from ws.report.cells import signed
from ws.report.document import (
    Bar,
    BarChart,
    Block,
    Bullets,
    Details,
    Figure,
    Heading,
    Paragraph,
    Samples,
    Table,
    Tabs,
    Texts,
    Tile,
    Tiles,
)
from ws.report.findings import DILEMMAS, Numbers, Summary
from ws.report.sentences import facts_say_something, headline_strengths
from ws.report.story import Story

FIGURE_FILE = "dose_response.png"
UNITS = (
    "How to read this: a change of +1 nat makes the odds of an answer 2.7 times as high; -1 nat divides them by 2.7. "
    "Held out: the items were in no training prompt."
)
FLIPS_SHOWN = 4
"""Rows that flip, by probe, strength and way, which stand on the page; the others are folded away."""


def write(story: Story) -> None:
    """Write `dose_response.png`, `report.md` and `report.html` into the run folder."""
    folder, summary = story.folder, story.summary
    figures.dose_response(summary, folder / FIGURE_FILE)
    subtitle = (
        f"{summary.adapter} direction, training seed {summary.seed}, data seed {summary.data_seed}, "
        f"|dW| = {summary.direction_norm:.3g} over layers {story.config['direction']['layers']}"
    )
    drawn = Figure(
        folder / FIGURE_FILE,
        f"dose-response of {summary.behaviour} and of the {summary.numbers.title(DILEMMAS)}",
        f"{dose.CAPTION} Below: probability of the two answers, and KL to the base on neutral text.",
    )
    text = document.to_markdown(story.title, [Paragraph(subtitle, note=True), *blocks(story, drawn)])
    write_text(folder / "report.md", text)
    write_text(folder / "report.html", document.to_html(story.title, subtitle, blocks(story, dose.tabs(summary))))


def blocks(story: Story, dose_response: Block) -> list[Block]:
    """The report in order; `dose_response` is a picture for Markdown and charts for the web page."""
    summary, config = story.summary, story.config
    return [
        *([Bullets(summary.warnings, warning=True)] if summary.warnings else []),
        *_in_short(story),
        Heading("What it says"),
        Paragraph(
            f"At positive alpha the model {config['behaviour']['positive_means']}. All strengths use the same prompts "
            "and random numbers, without a system prompt.",
            note=True,
        ),
        *_default_system(config["model"].get("default_system")),
        *([] if story.samples is None else [_samples(story.samples)]),
        *effects.judged(summary),
        Heading("Dose-response"),
        dose_response,
        Heading("Answers that flip"),
        *_flips(story),
        Heading("Other methods"),
        *beside.blocks(story),
        Heading("All effects"),
        *effects.instruments(summary),
        *effects.by_probe(summary),
        Heading("Controls"),
        *effects.controls(summary),
        Heading("Side effects"),
        _side_effects(summary.numbers),
        *_other_behaviours(summary),
        Heading("Where it lies"),
        *origin.geometry(story),
        Heading("How it was made"),
        *origin.training(story),
        *origin.provenance(story),
    ]


def _in_short(story: Story) -> list[Block]:
    """The headline with its evidence: shares of answers, changes with intervals, and the sentence with all numbers."""
    summary = story.summary
    measured = summary.measured
    if not summary.in_short:
        return [Paragraph(summary.sentence, strong=True), Tiles(_tiles(summary))]
    by_choice = summary.ability.instrument == "choice"
    names = {1: "added, alpha ", -1: "subtracted, alpha ", 0: "unedited"}
    bars = [
        Bar(names[tone(key)] + ("" if key == "0" else signed(key)), share.mean, share.low, share.high, tone(key))
        for key in headline_strengths(measured.levels)
        if (share := measured.shares[key])
    ]
    what = "answers that show" if by_choice else "cases in which the likelier reply shows"
    evidence = BarChart(
        f"Share of {what} {summary.behaviour}", bars, (0.0, 1.0), ".0%",
        f"{measured.levels['0'].n} rows on held-out {summary.noun}: "
        f"{measured.meaning.removeprefix('balanced ') if by_choice else 'every wording of two opposite replies'}. "
        "Intervals: 95 % over clusters of rows.",
    )  # fmt: skip
    means = f"{summary.behaviour.capitalize()} here: the model {story.config['behaviour']['positive_means']}."
    return [
        Paragraph(summary.in_short, strong=True),
        Paragraph(means, note=True),
        evidence,
        Tiles(_tiles(summary)),
        Paragraph(UNITS, note=True),
        Details("The same with all numbers", [Paragraph(summary.sentence)]),
    ]


def _tiles(summary: Summary) -> list[Tile]:
    tiles = []
    numbers = summary.numbers
    for name, change in (
        (summary.behaviour, summary.measured.change),
        (f"{numbers.title(DILEMMAS)}, honest side", numbers.dd_delta),
    ):
        for key in ("1", "-1"):
            if key in change:
                entry = change[key]
                tiles.append(Tile(f"{entry.mean:+.2f} nats", f"{name} at {signed(key)}", f"95 % {entry.limits}"))
    side = numbers.side_effects
    if "1" in side and "-1" in side:
        minus, plus, base = side["-1"], side["1"], side["0"]
        if facts_say_something(numbers):
            kept = f"{100 * minus.facts:.1f} / {100 * plus.facts:.1f} %"
            tiles.append(Tile(kept, "facts right at -1 / +1", f"base {100 * base.facts:.1f} %"))
        else:
            cost = f"{minus.nll_delta:+.2f} / {plus.nll_delta:+.2f}"
            tiles.append(Tile(cost, "NLL of neutral text at -1 / +1", "change, nats per token"))
    return tiles


def _default_system(text: str | None) -> list[Block]:
    """What "plain" means for a model whose template opens a system turn by itself."""
    if text is None:
        return []
    return [
        Paragraph(
            f'If no system prompt is given, the template of this model opens with its own: "{text}". Plain means with '
            "that text; a persona prompt takes its place.",
            note=True,
        )
    ]


def _samples(samples: pl.DataFrame) -> Block:
    alphas = samples["alpha"].unique().sort().to_list()
    rows = []
    for prompt in samples["prompt"].unique(maintain_order=True):
        answers = {row["alpha"]: row["response"] for row in samples.filter(pl.col("prompt") == prompt).to_dicts()}
        rows.append((prompt, [answers.get(alpha, "") for alpha in alphas]))
    return Samples([_alpha_name(alpha) for alpha in alphas], rows)


def _alpha_name(alpha: float) -> str:
    return "alpha 0 (base)" if alpha == 0 else f"alpha {alpha:+g}"


# -------------------------------------------------------------------- rows that flip


def _flips(story: Story) -> list[Block]:
    """At the strengths of the headline, the rows that change side, both ways; the largest changes first."""
    flips, summary = story.flips, story.summary
    if flips is None:
        return [Paragraph("The texts of these rows are not stored in this run: write its report again.", note=True)]
    shown = [float(key) for key in headline_strengths(summary.measured.levels) if key != "0"]
    found: list[tuple[str, Sequence[Block]]] = []
    for probe in flips["probe"].unique(maintain_order=True):
        for alpha in shown:
            rows = flips.filter((pl.col("probe") == probe) & (pl.col("alpha") == alpha))
            by_replies = probe == instrument.replies_name(summary.behaviour)
            shown_as = f"{summary.behaviour}, replies," if by_replies else summary.numbers.title(probe)
            name = f"{shown_as} at {alpha:+g}"
            found += [(f"{name} ({len(rows)})", _flips_at(rows, name))] if len(rows) else []
    return [Tabs("Pick a probe and a strength", found)] if found else [Paragraph("No row changes side.")]


def _flips_at(rows: pl.DataFrame, name: str) -> list[Block]:
    gained = int(rows["gained"].sum())
    told = Paragraph(
        f"{gained} rows flip to the positive side, {len(rows) - gained} away from it. In brackets: log-ratio towards "
        "the positive side, nats. The largest changes come first.",
        note=True,
    )
    few = pl.concat([rows.filter(pl.col("gained") == way).head(FLIPS_SHOWN) for way in (True, False)])
    rest = [Details(f"All {len(rows)} rows of {name}", [_flip_table(rows)], long=True)] if len(few) < len(rows) else []
    return [told, _flip_table(few), *rest]


def _flip_table(rows: pl.DataFrame) -> Texts:
    return Texts(
        ["way", "question", "before", "after"],
        [
            [
                "gained" if row["gained"] else "lost",
                row["question"],
                f"{row['before']} ({row['base']:+.2f})",
                f"{row['after']} ({row['value']:+.2f})",
            ]
            for row in rows.to_dicts()
        ],
    )


# -------------------------------------------------------------------- side effects


def _side_effects(numbers: Numbers) -> Block:
    columns: dict[str, tuple[str, Callable[[float], str]]] = {
        "facts": ("facts right", lambda share: f"{100 * share:.1f} %"),
        "kl": ("KL, mean", lambda nats: f"{nats:.4f}"),
        "kl_p95": ("KL, p95", lambda nats: f"{nats:.3f}"),
        "kl_max": ("KL, max", lambda nats: f"{nats:.2f}"),
        "nll_delta": ("NLL change", lambda nats: f"{nats:+.4f}"),
        "true_claims": ("true claims", lambda nats: f"{nats:+.2f}"),
        "distinct3": ("distinct 3-grams", lambda share: f"{share:.3f}"),
        "reply_tokens": ("reply tokens", lambda count: f"{count:.1f}"),
        "json": ("JSON replies", lambda share: f"{100 * share:.0f} %"),
    }
    entries = {alpha: vars(entry) for alpha, entry in numbers.side_effects.items()}
    shown = {key: column for key, column in columns.items() if any(e[key] is not None for e in entries.values())}
    rows = [
        [signed(alpha), *("-" if entry[k] is None else write(entry[k]) for k, (_, write) in shown.items())]
        for alpha, entry in entries.items()
    ]
    return Table(
        ["alpha", *(title for title, _ in shown.values())], rows,
        "KL to the base and change of the negative log-likelihood (NLL): nats per token, on given answers to neutral "
        "requests. True claims: log-ratio of agreeing with true claims. Distinct 3-grams and reply tokens: of greedy "
        "replies to neutral requests.",
    )  # fmt: skip


def _other_behaviours(summary: Summary) -> list[Block]:
    others = summary.numbers.other_behaviours
    if not others:
        return []
    own = summary.numbers.change[summary.behaviour]
    rows = [
        [f"{summary.behaviour} itself", *(entry.text for entry in own.values()), "", ""],
        *(
            [name, *(other.change[key].text for key in own), other.base.text, str(other.base.n)]
            for name, other in others.items()
        ),
    ]
    return [
        Table(
            ["behaviour", *(f"change at {signed(key)}" for key in own), "base", "rows"],
            rows,
            "How far the direction moves behaviours that it was not made for: change of the log-ratio towards each "
            "behaviour on its own held-out probe, nats. All of them, also the first line, are Yes/No log-ratios "
            "in one polarity. "
            f"{feedback.MEANING}",
        )
    ]


__all__: Sequence[str] = ["FIGURE_FILE", "blocks", "write"]
