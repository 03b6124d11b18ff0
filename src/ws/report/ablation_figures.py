"""Figures of ablations, drawn from the summary over seeds: `retained` against energy, by layer, and by module."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import polars as pl

from ws.base.files import atomic_file

COLOURS = ("#0b5cad", "#c2570c", "#2f7d4f", "#8b3fa0", "#b0902a", "#3f8f9c", "#a33a4a", "#5c6773")
_GREY, _INK = "#8b949e", "#1b1f24"


@contextmanager
def _axes(path: Path, count: int, width: float, height: float = 4.2) -> Iterator[Sequence[Any]]:
    """A row of axes that is saved as a picture at the end of the block."""
    import matplotlib as mpl  # noqa: PLC0415 - slow import, only where something is drawn

    mpl.use("Agg")
    from matplotlib import pyplot as plt  # noqa: PLC0415

    style: dict[Any, Any] = {
        "font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 11.5,
        "axes.titleweight": "bold", "axes.titlelocation": "left", "axes.edgecolor": _GREY,
    }  # fmt: skip
    with plt.rc_context(style):
        figure, axes = plt.subplots(1, count, figsize=(width, height), constrained_layout=True, squeeze=False)
        yield axes[0]
        with atomic_file(path) as temporary:
            figure.savefig(temporary, dpi=150, format="png")
        plt.close(figure)


def retained_against_energy(rows: pl.DataFrame, path: Path) -> bool:
    """All parts that are kept, and their random twins: share of the effect over share of |dW|^2. False without any."""
    rows = rows.filter(pl.col("retained").is_not_null() & pl.col("operation").is_in(["keep", "random"]))
    rows = rows.filter(pl.col("lens") != "whole")
    families = rows["family"].unique(maintain_order=True).to_list()
    if not families:
        return False
    with _axes(path, len(families), 5.2 * len(families) + 1.2) as axes:
        for axis, family in zip(axes, families, strict=True):
            own = rows.filter(pl.col("family") == family)
            twins = own.filter(pl.col("operation") == "random")
            axis.plot(twins["frobenius"].to_numpy() ** 2, twins["retained"], "x", color=_GREY, markersize=4,
                      label="random twins of equal norm")  # fmt: skip
            kept = own.filter(pl.col("operation") == "keep")
            for number, ((lens,), part) in enumerate(kept.group_by("lens", maintain_order=True)):
                axis.plot(part["energy"], part["retained"], "o", color=COLOURS[number % len(COLOURS)], markersize=5,
                          alpha=0.85, label=lens)  # fmt: skip
            axis.plot([0, 1], [0, 1], color=_GREY, linewidth=0.8, linestyle=(0, (4, 3)), zorder=0)
            axis.set_title(family)
            axis.set_xlabel("share of |dW|^2 that is kept")
            axis.set_ylabel("share of the effect that is retained")
            axis.axhline(0, color=_GREY, linewidth=0.8, zorder=0)
        axes[-1].legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return True


def by_layer(rows: pl.DataFrame, path: Path) -> bool:
    """Each layer alone, and the direction without it. False if the lens was not measured."""
    rows = rows.filter((pl.col("lens") == "layers") & pl.col("layer").is_not_null() & pl.col("retained").is_not_null())
    families = rows["family"].unique(maintain_order=True).to_list()
    if not families:
        return False
    with _axes(path, 2, 11) as axes:
        for axis, operation, title in zip(
            axes, ("keep", "drop"), ("one layer alone", "without one layer"), strict=True
        ):
            for family, colour in zip(families, COLOURS, strict=False):
                part = rows.filter((pl.col("family") == family) & (pl.col("operation") == operation)).sort("layer")
                _with_limits(axis, part, colour, family)
                twins = rows.filter((pl.col("family") == family) & (pl.col("operation") == "random")).sort("layer")
                if operation == "keep":
                    axis.plot(twins["layer"], twins["retained"], "x", color=colour, markersize=5, alpha=0.6)
            axis.axhline(0 if operation == "keep" else 1, color=_GREY, linewidth=0.8, zorder=0)
            axis.set_xticks(sorted(rows["layer"].unique().to_list()))
            axis.set_title(title)
            axis.set_xlabel("layer")
            axis.set_ylabel("share of the effect that is retained")
        axes[0].legend(frameon=False, fontsize=9)
    return True


def _with_limits(axis: Any, part: pl.DataFrame, colour: str, label: str) -> None:
    known = part.filter(pl.col("retained_low").is_not_null())
    axis.vlines(known["layer"], known["retained_low"], known["retained_high"], color=colour, alpha=0.5)
    axis.plot(part["layer"], part["retained"], "o-", color=colour, markersize=5, label=label)


def by_module(rows: pl.DataFrame, path: Path) -> bool:
    """Bars of every kind of module alone, beside its random twin. False if the lens was not measured."""
    rows = rows.filter((pl.col("lens") == "modules") & pl.col("retained").is_not_null())
    families = rows["family"].unique(maintain_order=True).to_list()
    if not families:
        return False
    modules = rows["part"].unique(maintain_order=True).to_list()
    with _axes(path, 1, 11) as (axis,):
        wide = 0.8 / len(families)
        for number, family in enumerate(families):
            own = rows.filter(pl.col("family") == family)
            for operation, colour, shrink in (("keep", COLOURS[number], 1.0), ("random", _INK, 0.35)):
                part = {line["part"]: line for line in own.filter(pl.col("operation") == operation).to_dicts()}
                places = [modules.index(name) + number * wide for name in part]
                heights = [line["retained"] for line in part.values()]
                errors = [[abs(line["retained"] - _known(line, limit)) for line in part.values()]
                          for limit in ("retained_low", "retained_high")]  # fmt: skip
                axis.bar(places, heights, wide * shrink, color=colour, alpha=0.85 if operation == "keep" else 0.6,
                         yerr=errors if operation == "keep" else None, ecolor=_GREY,
                         label=family if operation == "keep" else ("random twin" if not number else None))  # fmt: skip
        axis.set_xticks([place + 0.4 - wide / 2 for place in range(len(modules))], modules, rotation=30, ha="right")
        axis.axhline(0, color=_GREY, linewidth=0.8)
        axis.set_ylabel("share of the effect that is retained")
        axis.set_title("one kind of module alone")
        axis.legend(frameon=False, fontsize=9)
    return True


def _known(line: Mapping[str, Any], limit: str) -> float:
    """A limit, or the value itself if it has no interval."""
    return float(line["retained"] if line[limit] is None else line[limit])
