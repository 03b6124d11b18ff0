"""Figures of the page about bases."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import polars as pl

from ws.base.files import atomic_file
from ws.subspace import ranking as ranks
from ws.subspace.bases import BASES

_COLOURS = ("#0b5cad", "#c2570c", "#2f7d4f", "#7a3e9d", "#a12d2d", "#4f6d7a")
_GREY = "#8b949e"
_PANELS = {"block": "what changes in activations", "written": "what dW writes", "read": "what dW reads"}


def ranking(summary: pl.DataFrame, families: Sequence[str], path: Path) -> None:
    """A panel per axis; a row per basis, ordered by its mean over families; a dot with its interval per family."""
    with _plots() as plt:
        orders = {metric: _order(summary, families, metric) for metric in _PANELS}
        tallest = max(len(order) for order in orders.values())
        figure, axes = plt.subplots(1, 3, figsize=(14.5, 1.6 + 0.19 * tallest), constrained_layout=True)
        for axis, (metric, title) in zip(axes, _PANELS.items(), strict=True):
            _panel(axis, summary, families, metric, orders[metric])
            axis.set_title(title)
            axis.set_xlabel("% of the oracle at equal rank")
        axes[0].legend(frameon=False, fontsize=9, loc="lower right")
        with atomic_file(path) as temporary:
            figure.savefig(temporary, dpi=130, format="png")
        plt.close(figure)


def overlap(between: pl.DataFrame, path: Path) -> None:
    """A heat map per axis: overlap of the leading subspaces of every pair of runs."""
    with _plots() as plt:
        axes_names = [name for name in ("written", "block") if name in between["axis"]]
        runs = list(between["first"].unique(maintain_order=True))
        size = 1.6 + 0.42 * len(runs)
        figure, axes = plt.subplots(1, len(axes_names), figsize=(len(axes_names) * (size + 1.8), size + 0.6),
                                    squeeze=False, constrained_layout=True)  # fmt: skip
        for axis, name in zip(axes[0], axes_names, strict=True):
            rows = between.filter(pl.col("axis") == name)
            known = {(row["first"], row["second"]): row["overlap"] for row in rows.to_dicts()}
            grid = [[known.get((a, b), float("nan")) for b in runs] for a in runs]
            drawn = axis.imshow(grid, vmin=0, vmax=1, cmap="Blues")
            for y, line in enumerate(grid):
                for x, value in enumerate(line):
                    colour = "white" if value > 0.6 else "black"
                    axis.text(x, y, f"{value:.2f}", ha="center", va="center", fontsize=7.5, color=colour)
            axis.set_xticks(range(len(runs)), runs, rotation=45, ha="right", fontsize=8)
            axis.set_yticks(range(len(runs)), runs, fontsize=8)
            axis.set_title(f"{_PANELS[name]} (random {float(rows['null'].to_numpy().mean()):.2f})")
            figure.colorbar(drawn, ax=axis, shrink=0.8)
        with atomic_file(path) as temporary:
            figure.savefig(temporary, dpi=130, format="png")
        plt.close(figure)


def _order(summary: pl.DataFrame, families: Sequence[str], metric: str) -> list[str]:
    rows = pl.concat([ranks.ranked(summary, family, metric) for family in families])
    means = rows.group_by("basis").agg(pl.col("percent").mean()).sort("percent", "basis")
    return list(means["basis"])


def _panel(axis: Any, summary: pl.DataFrame, families: Sequence[str], metric: str, order: Sequence[str]) -> None:
    places = {name: place for place, name in enumerate(order)}
    step = 0.5 / max(1, len(families))
    for number, (family, colour) in enumerate(zip(families, _COLOURS * 3, strict=False)):
        rows = ranks.ranked(summary, family, metric).to_dicts()
        shift = (number - (len(families) - 1) / 2) * step
        for row in rows:
            basis, place = BASES[row["basis"]], places[row["basis"]] + shift
            shown = _GREY if basis.is_null else colour
            if row["percent_low"] is not None:
                axis.plot([row["percent_low"], row["percent_high"]], [place] * 2, color=shown, linewidth=1, alpha=0.6)
            face = "white" if basis.uses_trained_dW and not basis.is_null else shown
            axis.plot(row["percent"], place, "o", color=shown, markerfacecolor=face, markersize=4)
            axis.plot(row["null_percent"], place, "|", color=_GREY, markersize=6)
        axis.plot([], [], "o", color=colour, label=family, markersize=4)
    axis.set_yticks(range(len(order)), order, fontsize=7.5)
    axis.set_ylim(-0.8, len(order) - 0.2)
    axis.set_xlim(-2, 102)
    axis.grid(axis="y", color="#e6e8eb", linewidth=0.6)


@contextmanager
def _plots() -> Iterator[Any]:
    import matplotlib as mpl  # noqa: PLC0415 - slow import, only where something is drawn

    mpl.use("Agg")
    from matplotlib import pyplot as plt  # noqa: PLC0415

    style: dict[Any, Any] = {
        "font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 11.5,
        "axes.titleweight": "bold", "axes.titlelocation": "left", "axes.edgecolor": _GREY,
    }  # fmt: skip
    with plt.rc_context(style):
        yield plt
