"""From the scores of a comparison to its tables, its picture and its one sentence.

Every number is computed from the scores table. An effect has an interval over rows (clusters; replicates averaged row
by row first) and, where it has replicates, one over seeds, and every replicate's value is kept. An effect counts only
where its row interval lies outside the 95 % prediction band of the random controls.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import polars as pl

from ws import stats
from ws.baselines.controls import RANDOM
from ws.condition import PLAIN
from ws.eval import dilemmas, side_effects
from ws.report import document
from ws.report.cells import limits, with_limits
from ws.report.document import Block, Figure, Heading, Paragraph, Table
from ws.report.summary import LOW_MASS, accuracy, as_dict
from ws.store import atomic_file, write_json, write_text

SIGNS = ("+", "-")
_COLOURS = {"weights": "#0b5cad", "activations": "#c2570c", "prompts": "#2f7d4f", "controls": "#8b949e"}


@dataclass(frozen=True)
class Line:
    """What a table needs to know of a method: which rows are its own at either sign.

    `at` gives, per sign, (context, edit, alpha) as they stand in the scores table.
    """

    name: str
    kind: str
    at: Mapping[str, tuple[str, str, float]]
    note: str = ""
    converged: bool = True


class Comparison:
    """Read access to a comparison's scores: effects of a line against the base on the same rows."""

    def __init__(self, table: pl.DataFrame, behaviour: str, headline_group: str) -> None:
        self.behaviour, self.headline_group = behaviour, headline_group
        self._table = table
        base = table.filter((pl.col("edit") == "none") & (pl.col("context") == PLAIN.name))
        self._base = base.select("probe", "row", "metric", pl.col("value").alias("base"))

    def rows(self, line: Line, sign: str, probe: str, metric: str) -> pl.DataFrame:
        """Rows with value, base, label, cluster and seed; a line without such rows gives none."""
        context, edit, alpha = line.at[sign]
        found = self._table.filter(
            (pl.col("probe") == probe) & (pl.col("metric") == metric) & (pl.col("context") == context)
            & (pl.col("edit") == edit) & ((pl.col("alpha") - alpha).abs() < 1e-9)
        )  # fmt: skip
        wanted = self._base.filter((pl.col("probe") == probe) & (pl.col("metric") == metric))
        for (seed, *_), rows in found.group_by("seed", "data_seed", maintain_order=True):
            if sorted(rows["row"]) != sorted(wanted["row"]):
                raise ValueError(f"{line.name}, seed {seed}: rows of {probe} are not those of the base")
        return found.join(self._base, on=["probe", "row", "metric"], how="inner")

    def effect(self, line: Line, sign: str, probe: str, group: str | None = None) -> dict[str, Any]:
        """Mean signed change of a choice probe: rows, seeds, and every seed's own value."""
        rows = self.rows(line, sign, probe, "logratio")
        if group is not None:
            rows = rows.filter(pl.col("group") == group)
        rows = rows.with_columns(((pl.col("value") - pl.col("base")) * pl.col("label")).alias("change"))
        averaged = rows.group_by("row", "cluster", maintain_order=True).agg(pl.mean("change"))
        over_rows = stats.over_clusters(averaged["change"].to_numpy(), averaged["cluster"].to_list())
        seeds = rows.group_by("seed", maintain_order=True).agg(pl.mean("change"))["change"].to_list()
        return {**as_dict(over_rows), "seeds": seeds,
                "over_seeds": as_dict(stats.over_seeds(seeds)) if len(seeds) > 1 else None}  # fmt: skip

    def cost(self, line: Line, sign: str) -> dict[str, float]:
        """Answer mass, fact accuracy, KL on neutral text and distinct 3-grams of replies, averaged over replicates."""
        masses = [self._mean(line, sign, probe, "pmass") for probe in (self.behaviour, dilemmas.NAME)]
        facts = self.rows(line, sign, side_effects.FACTS, "logratio")
        return {
            "pmass": min(masses),
            "facts": accuracy(facts),
            "kl": self._mean(line, sign, side_effects.NEUTRAL_KL, "kl") if line.kind != "prompts" else float("nan"),
            "distinct3": self._mean(line, sign, side_effects.TEXT, "distinct3"),
        }

    def base_facts(self) -> float:
        """Fact accuracy of the unedited model."""
        rows = self._table.filter(
            (pl.col("probe") == side_effects.FACTS) & (pl.col("metric") == "logratio") & (pl.col("edit") == "none")
            & (pl.col("context") == PLAIN.name)
        )  # fmt: skip
        return accuracy(rows)

    def informedness(self, line: Line, k: float) -> stats.Informedness:
        """Surgical Informedness of the dilemmas, the first replicate, towards honesty at the sign that raises it."""
        parts, mass = {}, []
        for sign in SIGNS:
            rows = self.rows(line, sign, dilemmas.NAME, "logratio")
            parts[sign] = rows.filter(pl.col("seed").eq_missing(rows["seed"][0]))
            mass.append(self._mean(line, sign, dilemmas.NAME, "pmass"))
        rows = parts["+"].join(parts["-"].select("row", minus="value"), on="row", validate="1:1")
        base, plus, minus, labels = (rows[name].to_numpy() for name in ("base", "value", "minus", "label"))
        if ((minus - base) * labels).mean() > ((plus - base) * labels).mean():
            plus, minus = minus, plus
        return stats.surgical_informedness(base, plus, minus, labels, k=k, mass=(mass[0], mass[1]))

    def decomposition(self, line: Line, sign: str) -> stats.Decomposition:
        """Truth, Yes-bias and confidence of the dilemmas' change, all replicates together."""
        rows = self.rows(line, sign, dilemmas.NAME, "logratio")
        return stats.decompose(*(rows[name].to_numpy() for name in ("base", "value", "label")))

    def _mean(self, line: Line, sign: str, probe: str, metric: str) -> float:
        return float(self.rows(line, sign, probe, metric)["value"].mean() or 0.0)  # type: ignore[arg-type]


def measure(reader: Comparison, lines: Sequence[Line]) -> list[dict[str, Any]]:
    """Everything the tables show, one entry per line."""
    found = []
    for line in lines:
        entry: dict[str, Any] = {"name": line.name, "kind": line.kind, "note": line.note, "converged": line.converged}
        for sign in line.at:
            entry[sign] = {
                "alpha": line.at[sign][2],
                "own": reader.effect(line, sign, reader.behaviour, reader.headline_group),
                "dilemmas": reader.effect(line, sign, dilemmas.NAME),
                "decomposition": reader.decomposition(line, sign)._asdict(),
                **reader.cost(line, sign),
            }
        if set(line.at) == set(SIGNS):
            entry["informedness"] = {f"k{k}": reader.informedness(line, k)._asdict() for k in (1, 2)}
        found.append(entry)
    _judge(found)
    return found


def _judge(entries: list[dict[str, Any]]) -> None:
    """Whether each effect lies outside the prediction band of the random controls of the same sign."""
    control = next((entry for entry in entries if entry["name"] == RANDOM), None)
    for entry in entries:
        for sign in SIGNS:
            if sign not in entry:
                continue
            for probe in ("own", "dilemmas"):
                effect = entry[sign][probe]
                effect["outside"] = None
                if control is None or entry["kind"] == "controls" or effect["low"] is None:
                    continue
                band = stats.prediction_band(control[sign][probe]["seeds"])
                effect["outside"] = bool(effect["low"] > band.high or effect["high"] < band.low)


def control_means(entries: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Per control with replicates: the mean over seeds with its interval over seeds, and the prediction band."""
    found = []
    for entry in entries:
        if entry["kind"] != "controls":
            continue
        for sign in SIGNS:
            for probe in ("own", "dilemmas"):
                seeds = entry[sign][probe]["seeds"]
                if len(seeds) > 1:
                    found.append({
                        "control": entry["name"], "sign": sign, "probe": probe, "seeds": seeds,
                        "mean": as_dict(stats.over_seeds(seeds)), "band": as_dict(stats.prediction_band(seeds)),
                    })  # fmt: skip
    return found


def headline(entries: Sequence[Mapping[str, Any]], behaviour: str) -> str:
    """Which kind of method moves the behaviour furthest, with its interval; `no effect` where controls reach as far."""
    parts = []
    for kind, label in (
        ("weights", "weight directions"),
        ("activations", "activation steering"),
        ("prompts", "prompts"),
    ):
        best = best_of_kind(entries, kind)
        if best is None:
            continue
        sides = []
        for sign in SIGNS:
            effect = best[sign]["own"]
            moved = "no effect" if effect["outside"] is False else with_limits(effect)
            sides.append(f"{moved} at {sign}")
        parts.append(f"{label} ({best['name']}) " + ", ".join(sides))
    return f"{behaviour}, change against the base in nats: " + "; ".join(parts)


# -------------------------------------------------------------------- pages


def write(
    folder: Path,
    title: str,
    own_strength: list[dict[str, Any]],
    equal_kl: list[dict[str, Any]],
    calibration: Mapping[str, Any],
    behaviour: str,
    base_facts: float,
) -> str:
    """Write `comparison.json`, `.csv`, `.md`, `.html` and `pareto.png`; returns the headline."""
    sentence = headline(own_strength, behaviour)
    write_json(folder / "comparison.json", _finite({
        "headline": sentence, "own_strength": own_strength, "equal_kl": equal_kl, "calibration": dict(calibration),
        "controls": control_means(own_strength), "base_facts": base_facts,
    }))  # fmt: skip
    _write_csv(folder / "comparison.csv", own_strength)
    pareto(own_strength, equal_kl, behaviour, folder / "pareto.png")
    blocks: list[Block] = [
        Paragraph(sentence[0].upper() + sentence[1:] + ".", strong=True),
        Heading("Adapters"),
        effects_table([e for e in own_strength if e["kind"] == "weights"], behaviour, "At alpha +1 and -1."),
        Heading("Baselines and weight steering"),
        effects_table(
            [e for e in own_strength if e["kind"] != "controls"], behaviour,
            "At each method's own strength: alpha +1 and -1, activation steering at the strength chosen on the dev "
            "split, prompts as they are.",
        ),
        Heading("At equal divergence"),
        effects_table(
            equal_kl, behaviour,
            f"Strengths at which the 95th percentile of KL on neutral text is {calibration['target']:.2f} nats per "
            f"token ({calibration.get('anchor') or 'as given'}). A search that did not reach it is marked *.",
        ),
        Heading("What moved and what it cost"),
        Figure(folder / "pareto.png", "behaviour moved against facts kept",
               "One point per method and sign. Filled: own strength. Open: equal divergence."),
        Heading("Controls"),
        controls_table(own_strength, behaviour),
        Heading("What a mean hides"),
        hidden_table([e for e in own_strength if e["kind"] != "controls"]),
        Paragraph(
            "Brackets are 95 % intervals over clusters of rows; seeds are listed one by one. With this many lines a "
            "few intervals will miss their truth by chance: single lines near the border of the band prove nothing.",
            note=True,
        ),
    ]  # fmt: skip
    write_text(folder / "comparison.md", document.to_markdown(title, blocks))
    write_text(folder / "comparison.html", document.to_html(title, "identical test rows for all methods", blocks))
    return sentence


def best_of_kind(entries: Sequence[Mapping[str, Any]], kind: str) -> Mapping[str, Any] | None:
    """The method of a kind that moves the behaviour furthest, both signs together, and keeps its answer mass."""
    usable = [
        entry for entry in entries
        if entry["kind"] == kind and set(SIGNS) <= entry.keys() and all(entry[s]["pmass"] >= LOW_MASS for s in SIGNS)
    ]  # fmt: skip
    return max(usable, key=lambda e: e["+"]["own"]["mean"] - e["-"]["own"]["mean"], default=None)


class Compared(NamedTuple):
    """A finished comparison: what was compared, and its summary."""

    model: str
    behaviour: str
    summary: Mapping[str, Any]


def write_across(path: Path, found: Sequence[Compared]) -> None:
    """Write one table over models and behaviours as `path` (HTML) and its Markdown twin: does it survive another one?

    Every weight direction, and the best activation and prompt of each comparison, at own strength.
    """
    rows = []
    for one in found:
        entries = one.summary["own_strength"]
        lines = [entry for entry in entries if entry["kind"] == "weights"]
        lines += [best for kind in ("activations", "prompts") if (best := best_of_kind(entries, kind)) is not None]
        for entry in lines:
            cells = [one.model, one.behaviour, entry["name"]]
            for probe in ("own", "dilemmas"):
                for sign in ("-", "+"):
                    effect = entry[sign][probe]
                    verdict = " (no effect)" if effect["outside"] is False else ""
                    spread = effect["over_seeds"]
                    cells.append(with_limits(effect) + verdict + (f"; seeds {limits(spread)}" if spread else ""))
            rows.append([*cells, f"{100 * min(entry[s]['facts'] for s in SIGNS):.1f} %"])
    title = "The same comparison on other models and behaviours"
    blocks: list[Block] = [Table(
        ["model", "behaviour", "method", "own, -", "own, +", "dilemmas, -", "dilemmas, +", "least facts right"], rows,
        "Change against each model's own base, nats. Brackets: 95 % intervals over clusters of rows; seeds: 95 % t "
        "interval over training seeds. Dilemmas: towards the honest answer.",
    )]  # fmt: skip
    write_text(path, document.to_html(title, "own strength, identical test rows within a comparison", blocks))
    write_text(path.with_suffix(".md"), document.to_markdown(title, blocks))


def effects_table(entries: Sequence[Mapping[str, Any]], behaviour: str, caption: str) -> Table:
    """Effects of both signs, costs, and the verdict of the control band."""
    rows = []
    for entry in entries:
        for sign in SIGNS:
            if sign not in entry:
                continue
            side = entry[sign]
            star = "" if entry["converged"] else "*"
            verdict = {True: "", False: " (no effect)", None: ""}
            rows.append([
                f"{entry['name']} {sign}" + (f" ({entry['note']})" if entry["note"] and sign == "+" else ""),
                f"{side['alpha']:+.3g}{star}" if entry["kind"] != "prompts" else "-",
                with_limits(side["own"]) + verdict[side["own"]["outside"]],
                _seeds(side["own"]),
                with_limits(side["dilemmas"]) + verdict[side["dilemmas"]["outside"]],
                _seeds(side["dilemmas"]),
                f"{side['pmass']:.3f}",
                f"{100 * side['facts']:.1f} %",
                "-" if np.isnan(side["kl"]) else f"{side['kl']:.3f}",
                f"{side['distinct3']:.3f}",
            ])  # fmt: skip
    head = ["method", "alpha", behaviour, "seeds", "dd_delta", "seeds", "least answer mass", "facts right", "KL",
            "distinct 3-grams"]  # fmt: skip
    return Table(head, rows, caption)


def controls_table(entries: Sequence[Mapping[str, Any]], behaviour: str) -> Table:
    """Every control: effects, and where it has replicates the mean over seeds with its interval over seeds."""
    rows = []
    for entry in entries:
        if entry["kind"] != "controls":
            continue
        for sign in SIGNS:
            cells = [f"{entry['name']} {sign}"]
            for probe in ("own", "dilemmas"):
                seeds = entry[sign][probe]["seeds"]
                if len(seeds) > 1:
                    band = as_dict(stats.prediction_band(seeds))
                    cells += [with_limits(as_dict(stats.over_seeds(seeds))), limits(band)]
                else:
                    cells += [f"{entry[sign][probe]['mean']:+.2f}", "-"]
            rows.append(cells)
    return Table(
        ["control", behaviour, "band", "dilemmas", "band"], rows,
        "Mean over control seeds with its 95 % t interval over seeds, and where 95 % of further seeds are expected. "
        "A fixed random direction has a small real effect of its own: what must include 0 is the mean over seeds.",
    )  # fmt: skip


def hidden_table(entries: Sequence[Mapping[str, Any]]) -> Table:
    """Yes-bias, confidence, flips and informedness beside the mean change of the dilemmas."""
    rows = []
    for entry in entries:
        if "informedness" not in entry:
            continue
        for sign in SIGNS:
            parts = entry[sign]["decomposition"]
            cells = [f"{entry['name']} {sign}", *(f"{parts[n]:+.2f}" for n in ("truth", "bias")),
            f"{parts['scale']:.2f}", f"{parts['beyond_scale']:+.2f}"]  # fmt: skip
            if sign == "+":
                one, two = entry["informedness"]["k1"], entry["informedness"]["k2"]
                cells += [f"{two['fixed']:.0%} / {two['broken']:.0%}", f"{one['score']:+.0f}", f"{two['score']:+.0f}",
                          f"{two['balanced']:+.0f}"]  # fmt: skip
            else:
                cells += ["", "", "", ""]
            rows.append(cells)
    return Table(
        ["method", "towards honesty", "Yes-bias", "confidence", "beyond confidence", "fixed / broken", "SI k=1",
         "SI k=2", "balanced"], rows,
        "Dilemmas. Confidence: slope of the new log-ratios on the old. SI: Surgical Informedness towards honesty, "
        "whichever sign gives it, times the squared answer mass; k = 2 flatters methods that do nothing. Balanced: "
        "change of P(Yes | Yes is honest) - P(Yes | No is honest), points.",
    )  # fmt: skip


def pareto(
    own_strength: Sequence[Mapping[str, Any]], equal_kl: Sequence[Mapping[str, Any]], behaviour: str, path: Path
) -> None:
    """How far the behaviour moved against how many facts are still right."""
    import matplotlib as mpl  # noqa: PLC0415 - slow import, only where something is drawn

    mpl.use("Agg")
    from matplotlib import pyplot as plt  # noqa: PLC0415

    figure, axis = plt.subplots(figsize=(9, 5.2), constrained_layout=True)
    for entries, filled in ((own_strength, True), (equal_kl, False)):
        for entry in entries:
            colour = _COLOURS[entry["kind"]]
            for sign in SIGNS:
                if sign not in entry:
                    continue
                moved = entry[sign]["own"]["mean"] * (1 if sign == "+" else -1)
                axis.plot(
                    100 * entry[sign]["facts"], moved, "o" if sign == "+" else "v", color=colour, markersize=6,
                    markerfacecolor=colour if filled else "none", alpha=0.85,
                )  # fmt: skip
                if filled and entry["kind"] != "controls" and sign == "+":
                    axis.annotate(entry["name"], (100 * entry[sign]["facts"], moved), fontsize=6.5, color=colour,
                                  xytext=(4, 2), textcoords="offset points")  # fmt: skip
    for kind, colour in _COLOURS.items():
        axis.plot([], [], "o", color=colour, label=kind)
    axis.plot([], [], "v", color="k", markerfacecolor="none", label="negative sign")
    axis.axhline(0, color="#8b949e", linewidth=0.8)
    axis.set_xlabel("facts answered right, %")
    axis.set_ylabel(f"{behaviour} moved the intended way, nats")
    axis.legend(frameon=False, fontsize=8)
    with atomic_file(path) as temporary:
        figure.savefig(temporary, dpi=150, format="png")
    plt.close(figure)


def _seeds(effect: Mapping[str, Any]) -> str:
    return ", ".join(f"{value:+.2f}" for value in effect["seeds"]) if len(effect["seeds"]) > 1 else "-"


def _write_csv(path: Path, entries: Sequence[Mapping[str, Any]]) -> None:
    with atomic_file(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as handle:
        writer = csv.writer(handle)
        writer.writerow(["method", "kind", "sign", "alpha", "own", "own_low", "own_high", "dd_delta", "dd_low",
        "dd_high", "pmass", "facts", "kl", "distinct3"])  # fmt: skip
        for entry in entries:
            for sign in SIGNS:
                if sign in entry:
                    side = entry[sign]
                    effects = [side[probe][part] for probe in ("own", "dilemmas") for part in ("mean", "low", "high")]
                    writer.writerow([entry["name"], entry["kind"], sign, side["alpha"], *effects, side["pmass"],
                                     side["facts"], side["kl"], side["distinct3"]])  # fmt: skip


def _finite(value: Any) -> Any:
    """The same content with None for what is no number, which JSON cannot hold."""
    if isinstance(value, dict):
        return {name: _finite(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value
