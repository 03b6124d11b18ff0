"""Blocks of a comparison, of several comparisons, and of studies of generalisation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from blocks.table import table
from ws.comparing import generalisation_page, page
from ws.comparing.across import Across
from ws.comparing.findings import KINDS, SIGNS, Findings
from ws.comparing.generalisation import Generalisation
from ws.comparing.tables import contrast_table, effect_text
from ws.report import document
from ws.report.cells import with_limits


def compared(found: Findings) -> str:
    """The replicates of a comparison and its headline."""
    return f"{replicates_told(found)}\n\n> {page.sentence(found)}"


def null(found: Findings) -> str:
    """Whether the controls move nothing on average."""
    return page.null_sentence(found)


def replicates_told(found: Findings) -> str:
    """How often weight directions were trained, and how many random controls a method has."""
    measured = found.equal_kl[found.headline_budget]
    trained = max((len(side.own.seeds) for entry in measured.entries if entry.kind == "weights"
                   for side in entry.sides.values()), default=0)  # fmt: skip
    drawn = max(
        (len(one.effects["+"]["own"].seeds) for one in measured.controls if one.of == found.reference), default=0
    )
    return f"On {found.model}, runs per weight direction: {trained}, random controls per method: {drawn}."


def contrast(found: Findings) -> str:
    """Whether the contrast and the training are needed: the table of differences at equal KL."""
    return document.to_markdown("", [contrast_table(found)]).split("\n", 2)[2].strip()


def short(found: Findings) -> str:
    """The best method of every kind at the budget of the headline, for the first page."""
    budget = found.headline_budget
    won = {sign: page.winner(found, sign, budget) for sign in SIGNS}
    rows = []
    for kind, name in found.best.items():
        entry = found.equal_kl[budget].entry(name)
        cells = [f"{KINDS[kind]}: {name}"]
        for sign in SIGNS[::-1]:
            side = entry.sides.get(sign) if entry else None
            first = won[sign]
            effect = "-" if side is None else with_limits(vars(side.own))
            cells.append(f"**{effect}**" if first is not None and first.name == name else effect)
        rows.append(cells)
    note = (
        f"{found.behaviour.capitalize()} on {found.model}, change in nats at equal KL ({budget} nats per token; "
        "prompts at their own); 95 % over rows and calibration. Bold: moves furthest. The best of each kind was chosen "
        "on dev rows."
    )
    return f"{table(['best of its kind', 'away from it', 'towards it'], rows)}\n\n*{note}*"


def winners(found: Findings) -> str:
    """The best method of every kind at every budget, with the winner of each column in bold."""
    return _at_every_budget(found, list(dict.fromkeys(found.best.values())))


def trained(found: Findings) -> str:
    """Every trained direction at every budget, with the winner of each column in bold where it is one of them."""
    measured = found.equal_kl[found.headline_budget]
    return _at_every_budget(found, [entry.name for entry in measured.entries if entry.kind == "weights"])


def steered(found: Findings) -> str:
    """Weight directions and every form of activation steering, at every budget."""
    measured = found.equal_kl[found.headline_budget]
    return _at_every_budget(
        found, [entry.name for entry in measured.entries if entry.kind in ("weights", "activations")]
    )


def _at_every_budget(found: Findings, names: Sequence[str]) -> str:
    columns = [(budget, sign) for budget in found.equal_kl for sign in ("+", "-")]
    won = {(budget, sign): page.winner(found, sign, budget) for budget, sign in columns}
    rows = []
    for name in names:
        cells = [name]
        for budget, sign in columns:
            entry, first = found.equal_kl[budget].entry(name), won[budget, sign]
            text = effect_text(entry.sides[sign].own) if entry and sign in entry.sides else "-"
            verdict = entry.sides[sign].verdict("own") if entry and sign in entry.sides else ""
            text += f" ({verdict})" if verdict else ""
            cells.append(f"**{text}**" if first is not None and first.name == name else text)
        rows.append(cells)
    return table(["method", *(f"{sign}, KL {budget}" for budget, sign in columns)], rows)


BLOCKS: Mapping[str, Callable[[Findings], str]] = {
    "compare": compared, "compare-short": short, "contrast": contrast, "null": null, "steered": steered,
    "trained": trained, "winners": winners,
}  # fmt: skip
"""The blocks of one comparison by name."""


def across(found: Across) -> str:
    """The table over several comparisons."""
    return document.to_markdown("", [found.table]).split("\n", 2)[2].strip()


def generalisation(found: Sequence[Generalisation]) -> str:
    """Effects on other probes and the agreement of the predictions, model by model."""
    parts = []
    for one in found:
        tables = [generalisation_page.effects_table(one), generalisation_page.agreement_table(one)]
        parts += [f"**{one.model}**, {one.adapter}. {generalisation_page.sentence(one)}",
                  document.to_markdown("", tables).split("\n", 2)[2].strip()]  # fmt: skip
    return "\n\n".join(parts)


def dev_search(log: Sequence[Mapping[str, Any]]) -> str:
    """The settings of a search on dev rows at equal KL, the one with the largest movement first."""
    rows = sorted(log, key=lambda one: -_moved(one))
    cells = [
        [
            f"{line['setting']['train']['layers'][0]:g} to {line['setting']['train']['layers'][1]:g}",
            f"{line['setting']['train']['lr']:g}",
            *(with_limits({**line["dev"][sign], "mean": line["dev"][sign]["change"]}) for sign in ("-1", "+1")),
            f"{_moved(line):.2f}",
        ]
        for line in rows
    ]  # fmt: skip
    return table(["layers, of the depth", "rate", "dev rows at -", "dev rows at +", "half the difference"], cells)


def _moved(line: Mapping[str, Any]) -> float:
    return float(line["dev"]["+1"]["change"] - line["dev"]["-1"]["change"]) / 2
