"""Methods and controls as lines of a table: at which strength each stands there, and what that cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ws.comparing.findings import SIDES, SIGNS, Reached, Spent, Strengths
from ws.comparing.methods import Control, Method
from ws.comparing.numbers import Line, Place
from ws.edit.condition import BASE, PLAIN, Condition, Context, Edit

Things = Mapping[str, Sequence[Edit] | Sequence[Context]]
"""The Edits or Contexts of every method and control, by name."""


def things_of(compared: Sequence[Method], further: Sequence[Control]) -> Things:
    """The Edits or Contexts behind the lines."""
    controls = [*(method.control for method in compared if method.control), *further]
    found: dict[str, Sequence[Edit] | Sequence[Context]] = {
        method.name: tuple(method.contexts.values()) if method.contexts else method.edits for method in compared
    }
    return found | {control.name: control.contexts or control.edits for control in controls}


def lines_of(
    compared: Sequence[Method], further: Sequence[Control], strengths: Strengths, budget: str | None
) -> list[Line]:
    """The lines of one table: at own strength (budget None), or at a KL budget. Prompts are the same in all."""
    lines = []
    for method in compared:
        lines.append(_line_of_method(method, strengths, budget))
        if method.control is not None:
            lines += _line_of_control(method.control, method.name, strengths, budget)
    for control in further:
        lines += _line_of_control(control, control.name, strengths, budget)
    return lines


def _line_of_method(method: Method, strengths: Strengths, budget: str | None) -> Line:
    if method.contexts is not None:
        at = {"+" if side > 0 else "-": Place(context.name, BASE, 0.0) for side, context in method.contexts.items()}
        known = strengths.prompts.get(method.name, {})
        spent = {sign: _mean_spent([known[SIDES[sign]]]) for sign in at if SIDES[sign] in known}
        return Line(method.name, method.kind, at, method.note, spent)
    return Line(method.name, method.kind, _places(method.name, strengths, budget, (1, -1)), method.note,
                _spent(method.name, strengths, budget))  # fmt: skip


def _line_of_control(control: Control, of: str, strengths: Strengths, budget: str | None) -> list[Line]:
    """The line of a control; none if it has no draws."""
    if control.contexts:
        place = Place(tuple(context.name for context in control.contexts), BASE, 0.0)
        return [Line(control.name, "controls", dict.fromkeys(SIGNS, place), control.note, control_of=of)]
    if not control.edits:
        return []
    at = _places(control.name, strengths, budget, control.sides)
    spent = _spent(control.name, strengths, budget)
    if not control.has_sides:
        at, spent = dict.fromkeys(SIGNS, at["+"]), dict.fromkeys(SIGNS, spent["+"]) if spent else {}
    return [Line(control.name, "controls", at, control.note, spent, control_of=of)]


def _places(name: str, strengths: Strengths, budget: str | None, sides: Sequence[int]) -> dict[str, Place]:
    """Per sign, the strength of every replicate: the side itself, or the calibrated one."""
    at = {}
    for sign, key in SIDES.items():
        if int(key) not in sides:
            continue
        if budget is None:
            at[sign] = Place(PLAIN.name, name, float(key))
        else:
            found = strengths.edits[budget][name][key]
            at[sign] = Place(PLAIN.name, name, {(one.seed, one.data_seed): one.alpha for one in found})
    return at


def _spent(name: str, strengths: Strengths, budget: str | None) -> dict[str, Spent]:
    """Per sign, the mean KL over replicates; at own strength only if every search measured there."""
    found = {}
    searches = strengths.edits[budget or strengths.budgets[-1]].get(name, {})
    for sign, key in SIDES.items():
        some = searches.get(key, ())
        seen: Sequence[Reached] = some if budget else [one.at_own_strength for one in some if one.at_own_strength]
        if some and len(seen) == len(some):
            found[sign] = _mean_spent(seen, all(one.converged for one in some) if budget else None)
    return found


def conditions_of(lines: Sequence[Line], things: Things) -> list[Condition]:
    """The Conditions behind lines, each once."""
    found: dict[str, Condition] = {}
    for line in lines:
        for thing in things[line.name]:
            for place in line.at.values():
                if isinstance(thing, Context):
                    condition = Condition(thing)
                else:
                    condition = Condition.of(thing, place.alpha_of((thing.seed, thing.data_seed)))
                found.setdefault(condition.content_key, condition)
    return list(found.values())


def _mean_spent(seen: Sequence[Reached], converged: bool | None = None) -> Spent:
    p95, mean, maximum = (
        sum(column) / len(seen) for column in zip(*((one.p95, one.mean, one.maximum) for one in seen), strict=True)
    )
    return Spent(p95, mean, maximum, converged)
