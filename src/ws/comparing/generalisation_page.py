"""The page about generalisation: effects of every direction on every probe, and how well they were predicted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ws.base.files import write_json, write_text
from ws.base.records import plain
from ws.comparing.generalisation import Agreement, Generalisation, Pair
from ws.eval import feedback
from ws.report import document
from ws.report.document import Block, Heading, Paragraph, Table

NAME = "generalisation"


def as_json(found: Generalisation) -> dict[str, Any]:
    """All pairs and agreements, as plain data."""
    record: dict[str, Any] = plain(found)
    return {**record, "agreements": [plain(one) for one in found.agreements()]}


def sentence(found: Generalisation) -> str:
    """The prediction with the highest rank correlation, and whether its interval excludes 0."""
    best = max(found.agreements()[:2], key=lambda one: one.rho)
    sure = best.low is not None and best.low > 0
    verdict = "" if sure else ", which so few pairs do not separate from 0"
    return (
        f"Of the predictions made before training, the {best.name} agrees best with what the directions do to other "
        f"probes: {_rho(best)} over {best.n} pairs{verdict}."
    )


def effects_table(found: Generalisation) -> Table:
    """One row per direction, one column per probe."""
    directions = list(dict.fromkeys(pair.direction for pair in found.pairs))
    probes = list(dict.fromkeys(pair.probe for pair in found.pairs))
    by_place = {(pair.direction, pair.probe): pair for pair in found.pairs}
    replicates = f"{found.replicates} replicate{'s' if found.replicates > 1 else ''}"
    return Table(
        ["direction", *probes],
        [[one, *(_effect(by_place[one, probe]) for probe in probes)] for one in directions],
        f"Half the difference between the changes at + and at -, nats, on test rows, at equal KL ({found.budget:g} "
        f"nats per token, 95th percentile); {replicates}, in brackets 95 % t intervals over them. The diagonal is "
        f"a direction's own behaviour. {feedback.MEANING}",
    )


def predictions_table(found: Generalisation) -> Table:
    """One row per pair that counts: its effect and the predictions."""
    return Table(
        ["direction", "probe", "effect", "personas", "gradient step", "cosine"],
        [
            [pair.direction, pair.probe, _effect(pair), f"{pair.persona:+.2f}", f"{pair.gradient:+.2f}",
             "-" if pair.cosine is None else f"{pair.cosine:+.3f}"]
            for pair in found.others
        ],
        "Predictions use dev rows and none of the measured effects. Personas: half the difference between the positive "
        "and the negative system prompts in the unedited model, nats. Gradient step: derivative along one step on the "
        "direction's pairs, nats per step of the direction's norm. Cosine: of the two trained directions.",
    )  # fmt: skip


def agreement_table(found: Generalisation) -> Table:
    """Rank correlations of the predictions with the effects."""
    return Table(
        ["prediction", "pairs", "Spearman"],
        [[one.name, str(one.n), _rho(one)] for one in found.agreements()],
        "Rank correlation with the effects over pairs of a direction and a probe that is not its own; in brackets 95 % "
        "intervals that treat pairs as independent. Behaviours only: probes that have a direction, so a cosine. "
        "Another replicate: mean correlation of the effects of two replicates, a ceiling for predictions of one.",
    )


def write(folder: Path, found: Generalisation) -> Path:
    """Write `generalisation.json`, `.md` and `.html`; returns the HTML page."""
    title, blocks = f"What directions do to other probes in {found.model}", _blocks(found)
    page = folder / f"{NAME}.html"
    write_json(page.with_suffix(".json"), as_json(found))
    write_text(page.with_suffix(".md"), document.to_markdown(title, blocks))
    write_text(page, document.to_html(title, f"{found.adapter} directions, identical test rows", blocks))
    return page


def _blocks(found: Generalisation) -> list[Block]:
    measured = {"choice": "answers", "replies": "replies"}
    how = ", ".join(f"{name} by {measured[one]}" for name, one in found.instruments.items())
    return [
        Paragraph(sentence(found), strong=True),
        Paragraph(f"Measured: {how}.", note=True),
        Heading("Effects"),
        effects_table(found),
        Heading("Predictions"),
        predictions_table(found),
        Heading("Agreement"),
        agreement_table(found),
    ]


def _effect(pair: Pair) -> str:
    return pair.effect.text


def _rho(one: Agreement) -> str:
    limits = "" if one.low is None else f" [{one.low:+.2f}, {one.high:+.2f}]"
    return f"{one.rho:+.2f}{limits}"
