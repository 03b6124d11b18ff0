"""A comparison, printed in a terminal: two short tables; the pages have the rest."""

from __future__ import annotations

from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from ws.base import console
from ws.comparing.findings import (
    LEAST_SEEDS,
    NOT_SEPARABLE,
    PROBES,
    Effect,
    Findings,
    Levels,
    Measured,
    Side,
    Spent,
    mostly_yes_bias,
)

_SIGNS = ("-", "+")
"""Order of the lines of a method."""


def show(found: Findings, folder: Path | None = None) -> None:
    """Print a line per method and sign; `folder` is the folder of the comparison, which has the figure.

    (a) all methods at the budget of the headline, (b) at own strength. The page has the other budgets and the controls.
    """
    equal, own, budget = found.equal_kl[found.headline_budget], found.own_strength, found.headline_budget
    _show_methods(f"(a) at equal divergence, p95 KL {budget} nats, * = missed", equal, found)
    _show_methods("(b) at own strength: alpha -1 and +1", own, found)
    console.say(
        f"Change against the base, nats, with 95 % intervals over rows. n: {NOT_SEPARABLE} controls of the method's "
        f"own kind, because this interval, or with {LEAST_SEEDS} seeds or more the interval over seeds, overlaps their "
        "band. pmass: least answer mass."
    )
    for name, probe in ((f"{found.behaviour} probe", PROBES[0]), (found.dilemma_noun, PROBES[1])):
        if lines := mostly_yes_bias(own.entries, probe):
            console.warn(f"mostly Yes-bias on the {name}: {', '.join(line.name for line in lines)}")
    if folder is not None:
        console.say(f"picture     {folder / 'pareto.png'}")


def _show_methods(title: str, measured: Measured, found: Findings) -> None:
    """One table: the levels of the base, then the methods.

    With one space between columns and names that may wrap, it fits 100 characters, or 80 if names are short.
    """
    base = found.base
    table = Table(title=title, title_justify="left", header_style="bold", box=SIMPLE_HEAD, padding=0, show_edge=False)
    table.add_column("method", overflow="fold")
    for name in ("", found.behaviour, found.dilemma_noun, "facts", "pmass", "seeds", "KL"):
        table.add_column(name, justify="right", no_wrap=True)
    levels = [escape(level.text) for level in (base.own, base.dilemmas)]
    table.add_row("base, level", "", *levels, _share(base), f"{base.pmass:.2f}", style="dim")
    for entry in measured.entries:
        signs = [sign for sign in _SIGNS if sign in entry.sides]
        sides = [entry.sides[sign] for sign in signs]
        columns = [
            signs,
            *([_brief(side.effect(probe)) for side in sides] for probe in PROBES),
            [_share(side) for side in sides],
            [f"{side.pmass:.2f}" for side in sides],
            [str(len(side.own.seeds)) for side in sides],
            [_spent(side.spent) for side in sides],
        ]
        table.add_row(entry.name, *("\n".join(lines) for lines in columns))
    console.show(table)


def _share(side: Side | Levels) -> str:
    return f"{100 * side.facts.mean:.1f} %"


def _brief(effect: Effect) -> str:
    """Mean, interval, and `n` if it is not separable from the control band."""
    return escape(effect.text + (" n" if effect.outside is False else ""))


def _spent(spent: Spent | None) -> str:
    return "-" if spent is None else f"{spent.p95:.2f}" + ("*" if spent.is_missed else "")
