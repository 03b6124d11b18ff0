"""Figures of a run, drawn from its summary."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ws.base.files import atomic_file
from ws.eval import dilemmas
from ws.report.findings import DILEMMAS, Band, Curve, Numbers, Summary
from ws.report.sentences import facts_say_something

_BLUE, _ORANGE, _GREEN, _GREY, _INK = "#0b5cad", "#c2570c", "#2f7d4f", "#8b949e", "#1b1f24"


def dose_response(summary: Summary, path: Path) -> None:
    """Log-ratios over alpha with intervals, control band and prompts; answer mass below; side effects on the right."""
    import matplotlib as mpl  # noqa: PLC0415 - slow import, only where something is drawn

    mpl.use("Agg")
    from matplotlib import pyplot as plt  # noqa: PLC0415

    behaviour, numbers = summary.behaviour, summary.numbers
    style: dict[Any, Any] = {
        "font.size": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titlesize": 11.5,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.edgecolor": _GREY,
    }
    with plt.rc_context(style):
        figure, axes = plt.subplots(
            2, 3, figsize=(12.5, 5.6), sharex=True, height_ratios=(3.4, 1), constrained_layout=True
        )
        own, moral, cost = axes[0]
        measured, by_choice = summary.measured, summary.ability.instrument == "choice"
        _curve(own, measured.levels, _INK, "balanced" if by_choice else "replies")
        groups = [name for name in numbers.groups if "/" not in name] if by_choice else []
        groups.sort(key=lambda name: name != summary.headline_group)
        for name, colour in zip(groups, (_BLUE, _GREEN, _ORANGE), strict=False):
            label = f"{name} claims" if behaviour == "sycophancy" else name
            _curve(own, numbers.groups[name], colour, f"{label}, plain")
        _band(own, measured.levels, measured.bands)
        _prompts(own, measured.contexts)
        own.set_title(f"{behaviour}, held out")
        own.set_ylabel("log-ratio towards the behaviour, nats")
        apart = numbers.dilemma_counts.not_counted
        _curve(moral, summary.dilemmas, _INK, "counted rows" if apart else "all")
        # if some rows are not counted, the group `stated` is the counted rows, which are drawn already
        groups_shown = {name: c for name, c in numbers.dilemma_groups.items() if name != dilemmas.STATED}
        for (group, curve), colour in zip(groups_shown.items(), (_BLUE, _ORANGE, _GREEN), strict=False):
            _curve(moral, curve, colour, f"{group} (not counted)" if group == dilemmas.FILLER else group)
        of_dilemmas = {key: entry[DILEMMAS] for key, entry in numbers.bands.items() if DILEMMAS in entry}
        _band(moral, summary.dilemmas, of_dilemmas)
        _prompts(moral, {name: effects[DILEMMAS] for name, effects in numbers.contexts.items()})
        moral.set_title(f"everyday {numbers.title(DILEMMAS)}, held out")
        moral.set_ylabel("log-ratio towards honesty, nats")
        alphas = _alphas(numbers.side_effects)
        _cost(cost, numbers)
        for axis, name in ((axes[1][0], behaviour), (axes[1][1], DILEMMAS)):
            curve = numbers.levels[name]
            axis.fill_between(_alphas(curve), [entry.pmass for entry in curve.values()], color=_GREY, alpha=0.35)
            axis.set_ylim(0, 1.02)
            axis.set_ylabel("answer\nmass")
        kl = [entry.kl for entry in numbers.side_effects.values()]
        axes[1][2].fill_between(alphas, kl, color=_ORANGE, alpha=0.35)
        axes[1][2].set_ylim(0, max(0.1, 1.1 * max(kl)))
        axes[1][2].set_ylabel("KL, nats")
        for axis in axes[1]:
            axis.set_xlabel("alpha")
        for axis in axes[0][:2]:
            axis.axhline(0, color=_GREY, linewidth=0.8, zorder=0)
            axis.legend(frameon=False, fontsize=9)
        with atomic_file(path) as temporary:
            figure.savefig(temporary, dpi=150, format="png")
        plt.close(figure)


def _alphas(curve: Mapping[str, Any]) -> list[float]:
    return [float(key) for key in curve]


def _cost(axis: Any, numbers: Numbers) -> None:
    """Facts answered right; for a model that guesses them, the likelihood of neutral text."""
    costs = numbers.side_effects
    if facts_say_something(numbers):
        kept = [100 * entry.facts for entry in costs.values()]
        axis.plot(_alphas(costs), kept, "o-", color=_GREEN)
        axis.set_ylabel("facts answered right, %")
        axis.set_ylim(min(45, min(kept) - 3), 101)
    else:
        axis.plot(_alphas(costs), [entry.nll_delta for entry in costs.values()], "o-", color=_GREEN)
        axis.set_ylabel("change of NLL on neutral text, nats per token")
    axis.set_title("what it costs")


def _curve(axis: Any, curve: Curve, colour: str, label: str) -> None:
    alphas = _alphas(curve)
    means = [entry.mean for entry in curve.values()]
    low = [entry.mean if entry.low is None else entry.low for entry in curve.values()]
    high = [entry.mean if entry.high is None else entry.high for entry in curve.values()]
    axis.fill_between(alphas, low, high, color=colour, alpha=0.18, linewidth=0)
    axis.plot(alphas, means, "o-", color=colour, label=label, markersize=4.5)


def _band(axis: Any, levels: Curve, by_strength: Mapping[str, Band]) -> None:
    """The prediction band of the random controls around the base, and every control seed as a tick."""
    base = levels["0"].mean
    bands = {float(key): band for key, band in by_strength.items()}
    if not bands:
        return
    points = sorted([*((alpha, band.low, band.high) for alpha, band in bands.items()), (0.0, 0.0, 0.0)])
    drawn = [(a, low, high) for a, low, high in points if low is not None and high is not None]
    alphas, lows, highs = zip(*drawn, strict=True)
    axis.fill_between(
        alphas, [base + v for v in lows], [base + v for v in highs], color=_GREY, alpha=0.4, linewidth=0,
        label="random directions, 95 %",
    )  # fmt: skip
    for alpha, band in bands.items():
        axis.plot([alpha] * len(band.seeds), [base + v for v in band.seeds], "_", color=_INK, markersize=7, alpha=0.6)


def _prompts(axis: Any, contexts: Curve) -> None:
    """Persona prompts on the unedited model, as dashed lines."""
    for name, effect in contexts.items():
        value = effect.mean
        axis.axhline(value, color=_GREY, linestyle=(0, (4, 3)), linewidth=1)
        axis.annotate(
            name,
            (0.99, value),
            xycoords=("axes fraction", "data"),
            ha="right",
            va="bottom",
            fontsize=8,
            color=_GREY,
        )
