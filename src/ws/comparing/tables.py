"""The tables of a comparison, made from the entries of `comparison.measure`: effects, costs, controls, answers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ws.base import stats
from ws.baselines.controls import RANDOM
from ws.comparing.numbers import DECOMPOSED, METHODS, SIGNS, control_band, is_yes_biased
from ws.report.cells import limits, with_limits
from ws.report.document import Table
from ws.report.summary import as_dict

Entry = Mapping[str, Any]
"""One method's numbers, as `comparison.measure` gives them."""
_SEEDS_LISTED = 5


def effects_table(
    entries: Sequence[Entry], kinds: Sequence[str], base: Mapping[str, Any], behaviour: str, caption: str
) -> Table:
    """Effects of both signs with p and the verdict of the control band, below the base and above the band itself."""
    shown = [(entry, sign) for entry in entries if entry["kind"] in kinds for sign in SIGNS if sign in entry]
    rows = [[
        "base (levels)", "0", "0", with_limits(base["own"]), "-", "-", with_limits(base["dilemmas"]), "-", "-",
        f"{base['pmass']:.3f}",
    ]]  # fmt: skip
    for entry, sign in shown:
        side = entry[sign]
        cells = [_name(entry, sign), _alpha(entry, sign), number(_spent(side), "{:.2f}")]
        for probe in ("own", "dilemmas"):
            cells += [with_limits(side[probe]) + verdict(side, probe), f"{side[probe]['p']:.4f}", _seeds(side[probe])]
        rows.append([*cells, f"{side['pmass']:.3f}"])
    rows += _band_rows(entries)
    tests = 2 * len(shown)
    head = ["method", "alpha", "p95 KL", behaviour, "p", "seeds", "dd_delta", "p", "seeds", "least answer mass"]
    note = (
        f"{caption} p: sign flips of whole clusters of rows, one test each. The table makes {tests} tests, so about "
        f"{tests * 0.05:.0f} fall below 0.05 by chance alone; below {0.05 / max(tests, 1):.4f} one survives a "
        "Bonferroni correction. No effect: the interval over rows, or with several training seeds the one over seeds, "
        "reaches into the band of random directions."
    )
    return Table(head, rows, note)


def verdict(side: Mapping[str, Any], probe: str) -> str:
    """What stands behind an effect: that random directions reach as far, or that it is mostly a change towards Yes."""
    if side[probe]["outside"] is False:
        return " (no effect)"
    return " (mostly Yes-bias)" if is_yes_biased(side, probe) else ""


def _band_rows(entries: Sequence[Entry]) -> list[list[str]]:
    rows = []
    for entry in entries:
        for sign in SIGNS if entry["name"] == RANDOM else ():
            bands = [control_band(entries, sign, probe) for probe in ("own", "dilemmas")]
            counted = f"n = {len(entry[sign]['own']['seeds'])}"
            cells = [cell for band in bands for cell in (f"[{limits(band)}]" if band else "-", "-", counted)]
            rows.append([
                f"{RANDOM} {sign}, 95 % band", _alpha(entry, sign), "-", *cells, f"{entry[sign]['pmass']:.3f}"
            ])  # fmt: skip
    return rows


def costs_table(entries: Sequence[Entry], base: Mapping[str, Any], caption: str) -> Table:
    """Side effects of every line, controls included; the base row shows levels."""
    head = ["method", "alpha", "KL mean", "KL p95", "KL max", "p95 KL, own replies", "NLL", "facts right",
            "true claims", "distinct 3-grams", "reply tokens", "JSON"]  # fmt: skip
    rows = [["base (levels)", "0", "0", "0", "0", "0", number(base["nll"], "{:.2f}"), *_kept(base)]]
    for entry in entries:
        for sign in SIGNS:
            if sign in entry:
                side = entry[sign]
                rows.append([
                    _name(entry, sign), _alpha(entry, sign),
                    *(number(side[name], "{:.3f}") for name in ("kl", "kl_p95", "kl_max")),
                    number(_spent(side), "{:.3f}"), number(side["nll_delta"], "{:+.3f}"), *_kept(side),
                ])  # fmt: skip
    if all(row[-1] == "-" for row in rows):
        head, rows = head[:-1], [row[:-1] for row in rows]
    note = (
        f"{caption} KL to the base, nats per token, on given answers to neutral requests; beside it the 95th "
        "percentile along the method's own replies, the only one that a prompt has. NLL: change on the given answers, "
        "nats per token. True claims: log-ratio of agreeing with true claims. The first row shows levels, NLL too."
    )
    return Table(head, rows, note)


def _kept(side: Mapping[str, Any]) -> list[str]:
    return [
        f"{100 * side['facts']:.1f} %", number(side["true_claims"], "{:+.2f}"), number(side["distinct3"], "{:.3f}"),
        number(side["reply_tokens"], "{:.1f}"), number(side["json"], "{:.0%}"),
    ]  # fmt: skip


def controls_table(entries: Sequence[Entry], behaviour: str) -> Table:
    """Every control: effects, and where it has replicates the mean over seeds with its interval over seeds."""
    rows = []
    for entry in entries:
        for sign in SIGNS if entry["kind"] == "controls" else ():
            cells = [_name(entry, sign)]
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


def parts_table(entries: Sequence[Entry], probe: str, behaviour: str) -> Table | None:
    """Yes-bias, flips and confidence beside the mean change of a probe; None where no row says anything of them."""
    rows = []
    for entry in entries:
        for sign in SIGNS if entry["kind"] in METHODS else ():
            parts = entry[sign][DECOMPOSED[probe]] if sign in entry else None
            if parts is not None:
                rows.append([
                    _name(entry, sign), f"{parts['truth']:+.2f}", number(parts["balanced"], "{:+.2f}"),
                    with_limits(parts["yes_bias"]), f"{parts['up']}", f"{parts['down']}", f"{parts['n']}",
                    number(parts["scale"], "{:.2f}"), f"{parts['beyond_scale']:+.2f}",
                ])  # fmt: skip
    if not rows:
        return None
    right = behaviour if probe == "own" else "honesty"
    source = (
        f"Own probe of {behaviour}, nats: all rows that were asked in both polarities, true and false ones where it "
        "has both; the tables of effects show its headline group in one polarity, which a Yes-bias moves too."
        if probe == "own"
        else "Dilemmas, nats."
    )
    return Table(
        ["method", f"towards {right}", "balanced", "Yes-bias", "rows gained", "rows lost", "rows", "confidence",
         "beyond confidence"], rows,
        f"{source} Balanced: towards {right} with equal weight on rows whose {right} answer is Yes and No. Yes-bias: "
        "mean change towards Yes, whatever Yes means. Gained and lost: rows whose answer, averaged over seeds, turns "
        "to and from that side. Confidence: slope of the new log-ratios on the old, 1 is unchanged; a mere gain in "
        f"confidence looks like {right} where the base is on that side.",
    )  # fmt: skip


def answers_table(entries: Sequence[Entry]) -> Table:
    """Dilemma answers that turn, and Surgical Informedness: both halves by sign, the whole beside the + half."""
    rows = []
    for entry in entries:
        for sign in SIGNS if entry["kind"] in METHODS else ():
            if sign not in entry:
                continue
            turned = entry[sign]["turned"]
            whole = entry.get("informedness") if sign == "+" else None
            rows.append([
                _name(entry, sign), number(turned["to_honest"], "{:.0%}"), number(turned["to_dishonest"], "{:.0%}"),
                *(number(turned["half"][k], "{:+.0f}") for k in ("k1", "k2")),
                *(number(whole[k]["score"] if whole else None, "{:+.0f}") for k in ("k1", "k2")),
                number(turned["balanced"], "{:+.0f}"),
            ])  # fmt: skip
    return Table(
        ["method", "wrong to honest", "honest to wrong", "half k=1", "half k=2", "SI k=1", "SI k=2", "balanced"], rows,
        "Shares of the dilemma answers that turn, means over seeds. Halves, in points: at + forward = fixed - k "
        "broken, at - reverse = flipped - k countered; SI: their mean times the squared least answer mass. + counts as "
        "the honest side for every method and nothing is turned round: a negative SI says that + leads away from "
        "honesty, as sycophancy does. k = 2 flatters methods that do nothing. Balanced: change of P(Yes | Yes is "
        "honest) - P(Yes | No is honest), points.",
    )  # fmt: skip


def _name(entry: Entry, sign: str) -> str:
    """The line's name; its note stands once, at the first sign that it has."""
    first = next(known for known in SIGNS if known in entry)
    return f"{entry['name']} {sign}" + (f" ({entry['note']})" if entry["note"] and sign == first else "")


def _alpha(entry: Entry, sign: str) -> str:
    """Strength, with a star where the search for it missed its budget; prompts have none."""
    if entry["kind"] == "prompts":
        return "-"
    spent = entry[sign]["spent"]
    return f"{entry[sign]['alpha']:+.3g}" + ("*" if spent and spent["converged"] is False else "")


def _spent(side: Mapping[str, Any]) -> float | None:
    return side["spent"]["p95"] if side["spent"] else None


def number(value: float | None, form: str) -> str:
    """A number in a form, or a dash where there is none."""
    return "-" if value is None or math.isnan(value) else form.format(value)


def _seeds(effect: Mapping[str, Any]) -> str:
    """Every seed's value with the t interval over them; only their number where there are many."""
    seeds, spread = effect["seeds"], effect["over_seeds"]
    if spread is None:
        return "-"
    listed = ", ".join(f"{v:+.2f}" for v in seeds) if len(seeds) <= _SEEDS_LISTED else f"n = {len(seeds)}"
    return f"{listed} [{limits(spread)}]"
