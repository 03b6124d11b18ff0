"""Several comparisons in one table: does a result hold for other models and behaviours?

`comparisons.json` holds the rows; `comparisons.md` and `comparisons.html` show them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ws.base.files import write_json, write_text
from ws.base.records import plain
from ws.comparing import caveats
from ws.comparing.findings import NOT_SEPARABLE, Entry, Findings, Probe
from ws.report import document
from ws.report.document import Table

TITLE = "The same comparison on other models and behaviours"
_ALWAYS = ("weights", "variants")
_IF_CHOSEN = ("untrained", "activations", "prompts")


@dataclass(frozen=True)
class Moved:
    """One effect: its 95 % interval over rows, its interval over training seeds (None: one seed), and its verdict."""

    mean: float
    low: float | None
    high: float | None
    seeds_low: float | None = None
    seeds_high: float | None = None
    verdict: str = ""

    @property
    def text(self) -> str:
        """`+4.26 [+4.12, +4.39]; seeds +3.91, +4.62`, with the verdict after the first interval."""
        rows = "" if self.low is None else f" [{self.low:+.2f}, {self.high:+.2f}]"
        verdict = f" ({self.verdict})" if self.verdict else ""
        seeds = "" if self.seeds_low is None else f"; seeds {self.seeds_low:+.2f}, {self.seeds_high:+.2f}"
        return f"{self.mean:+.2f}{rows}{verdict}{seeds}"


@dataclass(frozen=True)
class Row:
    """A method of one comparison at equal KL: effects by sign, and its lowest share of facts answered right."""

    model: str
    behaviour: str
    method: str
    own: Mapping[str, Moved]
    dilemmas: Mapping[str, Moved]
    facts: float


@dataclass(frozen=True)
class Across:
    """The rows of several comparisons, all at one strength."""

    rows: tuple[Row, ...]
    dilemma_noun: str = "dilemmas"
    strength: str = "each method's own strength"

    @property
    def table(self) -> Table:
        """The rows as text."""
        tuned = caveats.tuning((row.model, row.behaviour) for row in self.rows)
        readout = caveats.readout(row.model for row in self.rows)
        caption = (
            f"Change against each model's own base at {self.strength}, nats. In brackets: 95 % interval over rows "
            "(whole clusters). seeds: 95 % t interval over seeds. "
            f"{self.dilemma_noun.capitalize()}: towards the honest answer. "
            f"{NOT_SEPARABLE.capitalize()}: one of the two intervals overlaps the band of random controls. Of the "
            "other kinds of method, only the best on the dev split is shown."
        )
        return Table(
            ["model", "behaviour", "method", "own, -", "own, +",
             *(f"{self.dilemma_noun}, {sign}" for sign in ("-", "+")), "least facts right"],
            [
                [
                    row.model, row.behaviour, row.method,
                    *(effects[sign].text for effects in (row.own, row.dilemmas) for sign in ("-", "+")),
                    f"{100 * row.facts:.1f} %",
                ]
                for row in self.rows
            ],
            " ".join([caption, tuned, readout]).strip(),
        )  # fmt: skip


def of(found: Sequence[Findings]) -> Across:
    """Every weight direction, and the best activation steering and prompt of each comparison."""
    rows = tuple(
        Row(
            one.model, one.behaviour, entry.name, _moved(entry, "own"), _moved(entry, "dilemmas"),
            min(side.facts.mean for side in entry.sides.values()),
        )
        for one in found
        for entry in one.equal_kl[one.headline_budget].entries
        if entry.kind in _ALWAYS or (entry.kind in _IF_CHOSEN and one.best.get(entry.kind) == entry.name)
    )  # fmt: skip
    first = found[0]  # all comparisons of one call have the same dilemmas and budgets
    return Across(rows, first.dilemma_noun, f"equal KL ({first.headline_budget} nats, prompts at their own)")


def _moved(entry: Entry, probe: Probe) -> dict[str, Moved]:
    found = {}
    for sign, side in entry.sides.items():
        effect = side.effect(probe)
        limits = (effect.over_seeds.low, effect.over_seeds.high) if effect.over_seeds else (None, None)
        found[sign] = Moved(effect.mean, effect.low, effect.high, *limits, side.verdict(probe))
    return found


def write(out: Path, found: Sequence[Findings]) -> Path:
    """Write `comparisons.json`, `.md` and `.html` in `out`, replacing earlier files; returns the HTML page."""
    across, path = of(found), out / "comparisons.html"
    write_json(path.with_suffix(".json"), plain(across))
    write_text(path.with_suffix(".md"), document.to_markdown(TITLE, [across.table]))
    subtitle = "equal KL, identical test rows within a comparison"
    write_text(path, document.to_html(TITLE, subtitle, [across.table]))
    return path
