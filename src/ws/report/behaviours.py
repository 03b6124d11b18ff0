"""One page per model with the directions of all its behaviours: what each says, and how far it moves the others.

For a reader who opens one page and stays a minute: the same prompts at alpha -1, 0 and +1 for every behaviour, then
the table of what each direction does to each behaviour. Made from the summaries and samples of finished runs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from ws.report import document
from ws.report.cells import signed, with_limits
from ws.report.document import Block, Heading, Paragraph, Samples, Table
from ws.store import read_json, write_text

PAGE = "behaviours.html"
_PROMPTS_SHOWN = 4
_KEYS = ("-1", "1")


@dataclass(frozen=True)
class FinishedRun:
    """What the page needs of one run."""

    behaviour: str
    positive_means: str
    summary: Mapping[str, Any]
    samples: pl.DataFrame

    @classmethod
    def read(cls, folder: Path) -> FinishedRun:
        """A run folder with a summary."""
        summary, config = read_json(folder / "summary.json"), read_json(folder / "config.json")
        return cls(
            summary["behaviour"], config["behaviour"]["positive_means"], summary,
            pl.read_parquet(folder / "samples.parquet"),
        )  # fmt: skip

    def change(self, behaviour: str, key: str) -> Mapping[str, Any] | None:
        """Change of a behaviour's probe at a strength, with its interval; None where the run did not measure it."""
        if behaviour == self.behaviour:
            found = self.summary["change"][behaviour]
        else:
            found = self.summary["other_behaviours"].get(behaviour, {}).get("change", {})
        return found.get(key)


def write(model_folder: Path, adapter: str, seed: str) -> Path | None:
    """Write `behaviours.html` and `.md` from the runs of one adapter and seed; fewer than two make no page."""
    folders = sorted(path.parent for path in model_folder.glob(f"*/{adapter}/{seed}/summary.json"))
    runs = [FinishedRun.read(folder) for folder in folders if (folder / "samples.parquet").is_file()]
    if len(runs) < 2:
        return None
    title = f"What {runs[0].summary['model']} says when it is steered"
    subtitle = f"{len(runs)} behaviours, {adapter} directions, {seed}; no system prompt anywhere"
    blocks = _blocks(runs)
    write_text(model_folder / "behaviours.md", document.to_markdown(title, [Paragraph(subtitle, note=True), *blocks]))
    write_text(model_folder / PAGE, document.to_html(title, subtitle, blocks))
    return model_folder / PAGE


def _blocks(runs: Sequence[FinishedRun]) -> list[Block]:
    blocks: list[Block] = []
    for run in runs:
        blocks += [
            Heading(run.behaviour),
            Paragraph(
                f"At alpha +1 it {run.positive_means}. At -1 the opposite. At 0 it is the unedited model. The same "
                "prompts and random numbers in every column."
            ),
            _samples(run),
        ]
    return [*blocks, Heading("How far each direction moves each behaviour"), _leak(runs), Heading("What it costs"),
            _costs(runs)]  # fmt: skip


def _samples(run: FinishedRun) -> Samples:
    alphas = [-1.0, 0.0, 1.0]
    prompts = run.samples["prompt"].unique(maintain_order=True).to_list()
    rows = []
    for prompt in [*prompts[:_PROMPTS_SHOWN], *prompts[-1:]]:
        answers = {row["alpha"]: row["response"] for row in run.samples.filter(pl.col("prompt") == prompt).to_dicts()}
        rows.append((prompt, [answers.get(alpha, "") for alpha in alphas]))
    return Samples(["alpha -1", "alpha 0 (base)", "alpha +1"], rows)


def _leak(runs: Sequence[FinishedRun]) -> Table:
    rows = [
        [
            f"{run.behaviour} at {signed(key)}",
            *(with_limits(run.change(other.behaviour, key)) for other in runs),
        ]
        for run in runs
        for key in _KEYS
        if run.change(run.behaviour, key) is not None
    ]
    return Table(
        ["direction", *(run.behaviour for run in runs)],
        rows,
        "Change of the log-ratio towards each behaviour on its own held-out probe against the base, nats, with 95 % "
        "intervals over clusters of rows. A direction's own behaviour stands on the diagonal; the rest is its leak.",
    )


def _costs(runs: Sequence[FinishedRun]) -> Table:
    rows = [
        [
            f"{run.behaviour} at {signed(key)}",
            f"{100 * entry['facts']:.1f} %",
            f"{100 * run.summary['side_effects']['0']['facts']:.1f} %",
            f"{entry['kl']:.3f}",
        ]
        for run in runs
        for key, entry in run.summary["side_effects"].items()
        if key in _KEYS
    ]
    return Table(["direction", "facts right", "base", "KL on neutral text, nats"], rows)
