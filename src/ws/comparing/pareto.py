"""The figure of a comparison: how far each method moves the behaviour, against how many facts it loses.

A panel per sign and strength. Large marks are means over replicates, small ones single seeds; the grey band is where
95 % of further random directions would fall. Facts lost are on a symmetric log scale, because most methods lose almost
no facts and a broken one loses half. Marks are numbered; the legend has the names.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ws.base.store import atomic_file
from ws.comparing.findings import METHODS, SIGNS, Entry, control_band, shown

CAPTION = (
    "One numbered mark per method. Height: how far it moves the behaviour in the intended direction. Horizontal: how "
    "many facts it loses; further left is worse. Small marks are single seeds. The grey band is where 95 % of further "
    "random directions are expected. A cross marks a method whose search for equal divergence missed its budget."
)
_COLOURS = {
    "weights": "#0b5cad", "variants": "#7a4fb5", "activations": "#c2570c", "prompts": "#2f7d4f", "controls": "#8b949e",
}  # fmt: skip
_LINEAR = 1.0
"""Points of facts lost up to which the axis is linear."""
_OFFSETS = ((5, 3), (-13, 3), (5, -9), (-13, -9))
"""Offsets of a number from its mark, used in turn, so that the numbers of neighbours stay readable."""


def draw(
    own_strength: Sequence[Entry], equal_kl: Sequence[Entry], base_facts: float, behaviour: str, path: Path
) -> None:
    """Write the figure as a PNG."""
    import matplotlib as mpl  # noqa: PLC0415 - slow import, only where something is drawn

    mpl.use("Agg")
    from matplotlib import lines  # noqa: PLC0415
    from matplotlib import pyplot as plt  # noqa: PLC0415

    kinds = {entry.name: entry.kind for entry in (*own_strength, *equal_kl)}
    numbers = {name: number for number, name in enumerate(kinds, 1)}
    style: dict[Any, Any] = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
    with plt.rc_context(style):
        figure, axes = plt.subplots(
            2, 2, figsize=(12, 8), sharex=True, sharey="row", constrained_layout=True, squeeze=False
        )
        for row, (entries, strength) in zip(
            axes, ((own_strength, "own strength"), (equal_kl, "equal divergence")), strict=True
        ):
            for axis, sign in zip(row, SIGNS, strict=True):
                _panel(axis, entries, sign, base_facts, numbers)
                axis.set_title(f"{strength}, sign {sign}", loc="left", fontweight="bold", fontsize=10)
            row[0].set_ylabel(f"{behaviour} moved in the intended direction, nats")
        for axis in axes[1]:
            axis.set_xlabel("facts lost against the base, points")
        axes[0][0].set_xscale("symlog", linthresh=_LINEAR)
        axes[0][0].xaxis.set_major_formatter("{x:g}")
        axes[0][0].invert_xaxis()
        handles = [
            lines.Line2D([], [], color=_COLOURS[kind], marker="o", linestyle="", label=f"{numbers[name]}  {name}")
            for name, kind in kinds.items()
        ]
        figure.legend(handles=handles, loc="outside right upper", frameon=False, fontsize=8)
        with atomic_file(path) as temporary:
            figure.savefig(temporary, dpi=150, format="png")
        plt.close(figure)


def _panel(axis: Any, entries: Sequence[Entry], sign: str, base_facts: float, numbers: Mapping[str, int]) -> None:
    """The marks of one sign; effects at the negative sign are negated, so that up is the intended direction."""
    turn = 1 if sign == "+" else -1
    axis.axhline(0, color="#8b949e", linewidth=0.8, zorder=0)
    band = control_band(entries, sign, "own")
    if band is not None:
        axis.axhspan(
            *sorted(turn * limit for limit in (band.low, band.high) if limit is not None),
            color="#8b949e",
            alpha=0.35,
            linewidth=0,
        )
    for entry, _, side in (line for line in shown(entries) if line.sign == sign):
        colour = _COLOURS[entry.kind]
        lost, moved = 100 * (base_facts - side.facts), turn * side.own.mean
        if len(side.own.seeds) > 1:
            each = [100 * (base_facts - facts) for facts in side.facts_seeds]
            axis.plot(each, [turn * value for value in side.own.seeds], ".", color=colour, markersize=4, alpha=0.6)
        axis.plot(lost, moved, "o", color=colour, markersize=7, alpha=0.85, zorder=3)
        if side.spent and side.spent.is_missed:
            axis.plot(lost, moved, "x", color="black", markersize=9, zorder=4)
        if entry.kind in METHODS or abs(lost) > _LINEAR:
            number = numbers[entry.name]
            axis.annotate(str(number), (lost, moved), fontsize=7.5, color=colour, xytext=_OFFSETS[number % 4],
                          textcoords="offset points")  # fmt: skip
