"""One page per model for all its behaviours: samples, and how far each direction moves each behaviour.

The page shows the same prompts at alpha -1, 0 and +1 for every behaviour. Tables then show how far each direction, and
each persona prompt, moves each behaviour. It is made from the summaries, scores and samples of finished runs. The
report of each of these runs gets a link to the page.
"""

from __future__ import annotations

import html
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import polars as pl

from ws.base import console
from ws.base.errors import UserError
from ws.base.files import write_text
from ws.base.store import read_config, read_table
from ws.eval import dilemmas, feedback, instrument, side_effects
from ws.report import document
from ws.report.cells import signed
from ws.report.document import Block, Heading, Paragraph, Samples, Table
from ws.report.findings import Curve, Estimate, Summary, read_summary
from ws.report.summary import BASE, Scores, signed_change

PAGE = "behaviours.html"
KEYS = ("-1", "1")
CROSSED = 0.25
"""Share of a direction's own effect above which the text names its effect on another behaviour."""
_PROMPTS_SHOWN = 4
_LINK = "What this model says when it is steered, for all its behaviours"


@dataclass(frozen=True)
class FinishedRun:
    """A finished run, read from its folder; `personas` is the result of `persona_changes` on its scores."""

    folder: Path
    positive_means: str
    summary: Summary
    samples: pl.DataFrame
    personas: Mapping[str, Curve]

    @classmethod
    def read(cls, folder: Path) -> FinishedRun:
        """Read a run folder that has a summary."""
        summary, config = read_summary(folder), read_config(folder)
        scores = read_table(folder / "scores.parquet", folder)
        return cls(
            folder, config["behaviour"]["positive_means"], summary, read_table(folder / "samples.parquet", folder),
            persona_changes(scores, summary.behaviour, summary.headline_group),
        )  # fmt: skip

    @property
    def behaviour(self) -> str:
        """The behaviour of the run."""
        return self.summary.behaviour


def persona_changes(scores: pl.DataFrame, behaviour: str, headline_group: str) -> dict[str, dict[str, Estimate]]:
    """System prompt of a run -> behaviour -> change of its probe in the unedited model, nats, with its interval."""
    table = Scores(scores)
    apart = (dilemmas.NAME, *side_effects.NAMES, instrument.orders_name(behaviour), instrument.replies_name(behaviour))
    probes = [name for name in scores["probe"].unique(maintain_order=True) if name not in apart]
    found: dict[str, dict[str, Estimate]] = {}
    for context in table.contexts():
        found[context] = {}
        for probe in probes:
            rows = table.rows(probe, "logratio", BASE, 0.0, context=context)
            if probe == behaviour:
                rows = rows.filter(pl.col("group") == headline_group)
            found[context][probe] = Estimate.of(signed_change(rows))
    return found


def crossings(summary: Summary, others: Collection[str]) -> list[str]:
    """One text for each of `others` that a direction moves by more than `CROSSED` of its own effect."""
    found = []
    for key in KEYS:
        own = summary.change_of(summary.behaviour, key)
        for other in others:
            entry = summary.change_of(other, key)
            if own and entry and abs(entry.mean) > CROSSED * abs(own.mean):
                found.append(
                    f"{summary.behaviour} at {signed(key)} moves {other} by {entry.mean:+.2f} nats "
                    f"({100 * abs(entry.mean / own.mean):.0f} % of its own {own.mean:+.2f})"
                )
    return found


def write(model_folder: Path, adapter: str, seed: str) -> Path | None:
    """Write `behaviours.html` and `.md` from the runs of one adapter and seed; None if there are fewer than two.

    Each of these runs gets a link to the page at the top of its report, even if the report is older than the page.
    """
    folders = sorted(path.parent for path in model_folder.glob(f"*/{adapter}/{seed}/summary.json"))
    runs = []
    for folder in folders:
        if (folder / "samples.parquet").is_file():
            try:
                runs.append(FinishedRun.read(folder))
            except UserError as error:
                console.warn(f"the page of all behaviours leaves out {folder}: {error}")
    if len(runs) < 2:
        return None
    title = f"What {runs[0].summary.model} says when it is steered"
    subtitle = f"{len(runs)} behaviours, {adapter} directions, {seed}; no system prompt"
    blocks = _blocks(runs)
    write_text(model_folder / "behaviours.md", document.to_markdown(title, [Paragraph(subtitle, note=True), *blocks]))
    write_text(model_folder / PAGE, document.to_html(title, subtitle, blocks))
    for run in runs:
        _link(run.folder, model_folder)
    return model_folder / PAGE


def _link(folder: Path, model_folder: Path) -> None:
    """Put a relative link to the page under the title of a run's report, unless it is there."""
    up = "/".join([".."] * len(folder.relative_to(model_folder).parts))
    page = f"{up}/{PAGE}"
    links = {
        "report.html": ("</header>\n", f"<p class=note><a href='{page}'>{html.escape(_LINK)}</a></p>\n"),
        "report.md": ("\n\n", f"[{_LINK}]({page.replace('.html', '.md')})\n\n"),
    }
    for name, (title_end, link) in links.items():
        report = folder / name
        text = report.read_text(encoding="utf-8") if report.is_file() else ""
        if text and link not in text:
            title, end, rest = text.partition(title_end)
            write_text(report, f"{title}{end}{link}{rest}")


def _blocks(runs: Sequence[FinishedRun]) -> list[Block]:
    blocks: list[Block] = []
    for run in runs:
        blocks += [
            Heading(run.behaviour),
            Paragraph(
                f"At alpha +1 the model {run.positive_means}. At -1 it does the opposite. At 0 it is unedited. Every "
                "column uses the same prompts and random numbers."
            ),
            _samples(run),
        ]
    return [
        *blocks,
        Heading("How far each direction moves each behaviour"),
        _leak(runs),
        Paragraph(_crossed(runs)),
        Heading("How far each persona prompt moves each behaviour"),
        _persona_leak(runs),
        Heading("What it costs"),
        _costs(runs),
    ]


def _samples(run: FinishedRun) -> Samples:
    alphas = [-1.0, 0.0, 1.0]
    prompts = run.samples["prompt"].unique(maintain_order=True).to_list()
    rows = []
    for prompt in [*prompts[:_PROMPTS_SHOWN], *prompts[-1:]]:
        answers = {row["alpha"]: row["response"] for row in run.samples.filter(pl.col("prompt") == prompt).to_dicts()}
        rows.append((prompt, [answers.get(alpha, "") for alpha in alphas]))
    return Samples(["alpha -1", "alpha 0 (base)", "alpha +1"], rows)


def _leak(runs: Sequence[FinishedRun]) -> Table:
    measured = _measured(runs)
    rows = [
        [
            f"{run.behaviour} at {signed(key)}",
            *(_text(run.summary.change_of(name, key)) for name in measured),
        ]
        for run in runs
        for key in KEYS
        if run.summary.change_of(run.behaviour, key) is not None
    ]
    return Table(
        ["direction", *measured],
        rows,
        "Change of the log-ratio towards each behaviour on its own held-out probe against the base, nats, with 95 % "
        "intervals over clusters of rows. The diagonal shows a direction's own behaviour; the other cells are leaks. "
        f"{feedback.MEANING}",
    )


def _text(entry: Estimate | None) -> str:
    return "-" if entry is None else entry.text


def _measured(runs: Sequence[FinishedRun]) -> list[str]:
    """The columns of the leak tables: the behaviours of the runs, and feedback."""
    return [*(run.behaviour for run in runs), feedback.NAME]


def _crossed(runs: Sequence[FinishedRun]) -> str:
    names = [run.behaviour for run in runs]
    found = [text for run in runs for text in crossings(run.summary, [name for name in names if name != run.behaviour])]
    limit = f"more than {100 * CROSSED:.0f} % of a direction's own effect"
    return f"Leaks of {limit}: {'; '.join(found)}." if found else f"No leak is {limit}."


def _persona_leak(runs: Sequence[FinishedRun]) -> Table:
    measured = _measured(runs)
    rows = [
        [f"{run.behaviour}, {context}", *(_text(moved.get(name)) for name in measured)]
        for run in runs
        for context, moved in run.personas.items()
    ]
    return Table(
        ["persona", *measured],
        rows,
        "The unedited model with the first persona of each side as its system prompt: change of the log-ratios against "
        "no system prompt, nats, with 95 % intervals over clusters of rows.",
    )


def _costs(runs: Sequence[FinishedRun]) -> Table:
    rows = [
        [
            f"{run.behaviour} at {signed(key)}",
            f"{100 * entry.facts:.1f} %",
            f"{100 * run.summary.numbers.side_effects['0'].facts:.1f} %",
            f"{entry.kl:.3f}",
        ]
        for run in runs
        for key, entry in run.summary.numbers.side_effects.items()
        if key in KEYS
    ]
    return Table(["direction", "facts right", "base", "KL on neutral text, nats"], rows)
