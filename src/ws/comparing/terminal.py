"""A comparison, printed in a terminal: three short tables; the pages have the rest."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from ws.base import console
from ws.comparing.findings import (
    CONTROLS,
    NOT_SEPARABLE,
    PROBES,
    Effect,
    Entry,
    Findings,
    Levels,
    Side,
    Spent,
    control_bands,
    mostly_yes_bias,
)

_SIGNS = ("-", "+")
"""Order of the lines of a method."""


def show(found: Findings, folder: Path | None = None) -> None:
    """Print a line per method and sign; `folder` is the folder of the comparison, which has the figure.

    (a) adapters, (b) baselines and the best weight direction, both at own strength, (c) all at equal divergence.
    """
    own = found.own_strength
    adapters = [entry for entry in own if entry.kind in ("weights", "variants")]
    baselines = [e for e in own if e.kind in ("activations", "prompts") or e.name in found.best.values()]
    equal = [entry for entry in found.equal_kl if entry.kind != CONTROLS]
    budget = f"p95 KL {found.calibration.target:.2f} nats, * = missed"
    _show_methods("(a) adapters, alpha -1 and +1", adapters, found, own)
    _show_methods("(b) baselines and weight steering, own strength", baselines, found, own)
    _show_methods(f"(c) at equal divergence, {budget}", equal, found, found.equal_kl, spends=True)
    console.say(
        f"Change against the base, nats, with 95 % intervals over rows. n: {NOT_SEPARABLE}, because this interval or "
        "the interval over training seeds overlaps their band. pmass: least answer mass."
    )
    for name, probe in ((f"{found.behaviour} probe", PROBES[0]), (found.dilemma_noun, PROBES[1])):
        if lines := mostly_yes_bias(own, probe):
            console.warn(f"mostly Yes-bias on the {name}: {', '.join(line.name for line in lines)}")
    if folder is not None:
        console.say(f"picture     {folder / 'pareto.png'}")


def _show_methods(
    title: str, entries: Iterable[Entry], found: Findings, measured: tuple[Entry, ...], spends: bool = False
) -> None:
    """One table: the levels of the base, the methods, and the band of the random directions in `measured`.

    With one space between columns and names that may wrap, it fits 100 characters, or 80 if names are short.
    """
    base, bands = found.base, control_bands(measured)
    table = Table(title=title, title_justify="left", header_style="bold", box=SIMPLE_HEAD, padding=0, show_edge=False)
    table.add_column("method", overflow="fold")
    for name in ("", found.behaviour, found.dilemma_noun, "facts", "pmass", "seeds", *(["KL"] if spends else [])):
        table.add_column(name, justify="right", no_wrap=True)
    levels = [escape(level.text) for level in (base.own, base.dilemmas)]
    table.add_row("base, level", "", *levels, _share(base), f"{base.pmass:.2f}", style="dim")
    for entry in entries:
        signs = [sign for sign in _SIGNS if sign in entry.sides]
        sides = [entry.sides[sign] for sign in signs]
        columns = [
            signs,
            *([_brief(side.effect(probe)) for side in sides] for probe in PROBES),
            [_share(side) for side in sides],
            [f"{side.pmass:.2f}" for side in sides],
            [str(len(side.own.seeds)) for side in sides],
            *([[_spent(side.spent) for side in sides]] if spends else []),
        ]
        table.add_row(entry.name, *("\n".join(lines) for lines in columns))
    drawn = [[bands[sign][probe] for sign in _SIGNS] for probe in PROBES]
    cells = [escape("\n".join(f"[{band.limits}]" if band else "-" for band in pair)) for pair in drawn]
    table.add_row("random, 95 % band", "-\n+", *cells, style="dim")
    console.show(table)


def _share(side: Side | Levels) -> str:
    return f"{100 * side.facts:.1f} %"


def _brief(effect: Effect) -> str:
    """Mean, interval, and `n` if it is not separable from the control band."""
    return escape(effect.text + (" n" if effect.outside is False else ""))


def _spent(spent: Spent | None) -> str:
    return "-" if spent is None else f"{spent.p95:.2f}" + ("*" if spent.is_missed else "")
