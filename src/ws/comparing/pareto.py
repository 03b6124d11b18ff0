"""The figure of a comparison: how far each method moves the behaviour, against what it costs in fluency.

A panel per sign. Every method is a line through its own strength and its strengths at equal KL, with 95 % intervals of
both axes. Grey lines are methods that the dev split did not choose as the best of their kind.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ws.base.files import atomic_file
from ws.comparing.findings import SIGNS, Entry, Findings, Side
from ws.report.findings import Estimate

CAPTION = (
    "One line per method, through all strengths at which it was measured: equal KL at several budgets, and its own "
    "strength (square). Height: how far it moves the behaviour in the intended direction. Horizontal: rise of the NLL "
    "of neutral text (beyond 1 nat, if any method is there, logarithmic); further right is worse. Bars: 95 % "
    "intervals, over rows and over texts. Coloured: the best method of each kind on the dev split, and the reference. "
    "A cross marks a search that missed its budget."
)
BROKEN = 1.0
"""Rise of the NLL, nats per token, beyond which the axis is logarithmic."""
_TICKS = (-0.5, 0.0, 0.5, 1.0, 3.0, 10.0)
_COLOURS = {
    "weights": "#0b5cad", "variants": "#7a4fb5", "untrained": "#b0892a", "activations": "#c2570c", "prompts": "#2f7d4f",
}  # fmt: skip
_OTHER = "#b9c0c8"


def draw(found: Findings, path: Path) -> None:
    """Write the figure as a PNG."""
    import matplotlib as mpl  # noqa: PLC0415 - slow import, only where something is drawn

    mpl.use("Agg")
    from matplotlib import pyplot as plt  # noqa: PLC0415

    style: dict[Any, Any] = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
    with plt.rc_context(style):
        figure, axes = plt.subplots(1, 2, figsize=(12, 5), sharey=True, constrained_layout=True)
        shown = {*found.best.values(), found.reference}
        for axis, sign in zip(axes, SIGNS, strict=True):
            axis.axhline(0, color="#8b949e", linewidth=0.8, zorder=0)
            axis.axvline(0, color="#8b949e", linewidth=0.8, zorder=0)
            for entry in found.own_strength.entries:
                _line(axis, found, entry, sign, is_shown=entry.name in shown)
            if _worst(found) > BROKEN:  # a method that breaks the text must not squeeze the others into a corner
                axis.set_xscale("symlog", linthresh=BROKEN, linscale=3)
                axis.set_xticks(_TICKS, [f"{tick:g}" for tick in _TICKS])
            axis.set_title(f"sign {sign}", loc="left", fontweight="bold", fontsize=10)
            axis.set_xlabel("rise of the NLL of neutral text, nats per token")
        axes[0].set_ylabel(f"{found.behaviour} moved in the intended direction, nats")
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=8)
        with atomic_file(path) as temporary:
            figure.savefig(temporary, dpi=150, format="png")
        plt.close(figure)


def _worst(found: Findings) -> float:
    """The largest rise of the NLL of any method."""
    sides = (side for entry in found.own_strength.entries for side in entry.sides.values())
    return max((side.nll_delta.mean for side in sides if side.nll_delta), default=0.0)


def _line(axis: Any, found: Findings, entry: Entry, sign: str, *, is_shown: bool) -> None:
    """The strengths of one method at one sign, in the order of their KL."""
    turn = 1 if sign == "+" else -1
    colour = _COLOURS[entry.kind] if is_shown else _OTHER
    layer = 3 if is_shown else 1
    calibrated = [] if entry.kind == "prompts" else [
        one.sides[sign] for measured in found.equal_kl.values()
        if (one := measured.entry(entry.name)) and sign in one.sides
    ]  # fmt: skip
    own = [entry.sides[sign]] if sign in entry.sides else []
    points = [(side.nll_delta.mean, turn * side.own.mean) for side in calibrated or own if side.nll_delta]
    if not points:
        return
    axis.plot(*zip(*points, strict=True), "-", color=colour, linewidth=1, zorder=layer,
              label=entry.name if is_shown else None)  # fmt: skip
    for side, is_own in [*((one, False) for one in calibrated), *((one, True) for one in own)]:
        if side.nll_delta is None:
            continue
        x, y = side.nll_delta.mean, turn * side.own.mean
        limits = _bars(side.nll_delta), _bars(side.own, turn)
        axis.errorbar(x, y, xerr=limits[0], yerr=limits[1], fmt="s" if is_own else "o", color=colour, markersize=4,
                      linewidth=0.8, zorder=layer)  # fmt: skip
        if _is_missed(side):
            axis.plot(x, y, "x", color="black", markersize=7, zorder=4)


def _bars(estimate: Estimate, turn: int = 1) -> list[list[float]] | None:
    """Lengths of the error bars below and above; None without limits."""
    if estimate.low is None or estimate.high is None:
        return None
    below, above = max(0.0, estimate.mean - estimate.low), max(0.0, estimate.high - estimate.mean)
    return [[below], [above]] if turn > 0 else [[above], [below]]


def _is_missed(side: Side) -> bool:
    return side.spent is not None and side.spent.is_missed
