"""The tables of a comparison, made from its entries: effects, costs, controls, answers."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from ws.base import stats
from ws.baselines.controls import RANDOM
from ws.comparing.findings import (
    CONTROLS,
    METHODS,
    NOT_SEPARABLE,
    PROBES,
    SIGNS,
    Effect,
    Entry,
    Levels,
    Probe,
    Shown,
    Side,
    control_band,
    shown,
)
from ws.report.document import Table
from ws.report.findings import Estimate

_SEEDS_LISTED = 5


def effects_table(
    entries: Sequence[Entry], kinds: Collection[str], base: Levels, behaviour: str, caption: str
) -> Table:
    """Effects of both signs with p and verdict, between the levels of the base and the band of random directions."""
    rows = [[
        "base (levels)", "0", "0", base.own.text, "-", "-", base.dilemmas.text, "-", "-", f"{base.pmass:.3f}",
    ]]  # fmt: skip
    lines = list(shown(entries, kinds))
    for line in lines:
        cells = [_name(line), _alpha(line), number(_spent(line.side), "{:.2f}")]
        for probe in PROBES:
            effect, verdict = line.side.effect(probe), line.side.verdict(probe)
            cells += [effect.text + (f" ({verdict})" if verdict else ""), f"{effect.p:.4f}", _seeds(effect)]
        rows.append([*cells, f"{line.side.pmass:.3f}"])
    rows += _band_rows(entries)
    tests = 2 * len(lines)
    head = ["method", "alpha", "p95 KL", behaviour, "p", "seeds", "dd_delta", "p", "seeds", "least answer mass"]
    note = (
        f"{caption} Effects: change against the base in nats, with a 95 % interval over rows. seeds: the value of "
        "every training seed, then a 95 % t interval over them. dd_delta: change on the dilemmas towards honesty. "
        f"p: by sign flips of whole clusters. Of the {tests} p values, about {tests * 0.05:.0f} fall below 0.05 "
        f"by chance alone; a p below {0.05 / max(tests, 1):.4f} survives a Bonferroni correction. "
        f"{NOT_SEPARABLE.capitalize()}: the interval over rows, or with several training seeds the one over seeds, "
        "overlaps the band of random directions. Answer mass: probability of the two answers."
    )
    return Table(head, rows, note)


def _band_rows(entries: Sequence[Entry]) -> list[list[str]]:
    rows = []
    for line in shown(entries):
        if line.entry.name == RANDOM:
            bands = [control_band(entries, line.sign, probe) for probe in PROBES]
            counted = f"n = {len(line.side.own.seeds)}"
            cells = [cell for band in bands for cell in (f"[{band.limits}]" if band else "-", "-", counted)]
            rows.append([f"{RANDOM} {line.sign}, 95 % band", _alpha(line), "-", *cells, f"{line.side.pmass:.3f}"])
    return rows


def costs_table(entries: Sequence[Entry], base: Levels, caption: str) -> Table:
    """Side effects of every line, including controls; the base row shows levels."""
    head = ["method", "alpha", "KL mean", "KL p95", "KL max", "p95 KL, own replies", "NLL", "facts right",
            "true claims", "distinct 3-grams", "reply tokens", "JSON"]  # fmt: skip
    rows = [["base (levels)", "0", "0", "0", "0", "0", number(base.nll, "{:.2f}"), *_kept(base)]]
    for line in shown(entries):
        side = line.side
        rows.append([
            _name(line), _alpha(line), *(number(value, "{:.3f}") for value in (side.kl, side.kl_p95, side.kl_max)),
            number(_spent(side), "{:.3f}"), number(side.nll_delta, "{:+.3f}"), *_kept(side),
        ])  # fmt: skip
    if all(row[-1] == "-" for row in rows):
        head, rows = head[:-1], [row[:-1] for row in rows]
    note = (
        f"{caption} KL: divergence from the base in nats per token, on given answers to neutral requests. p95 KL, own "
        "replies: its 95th percentile along the replies that the method itself writes; prompts have only this one. "
        "NLL: change on the given answers, nats per token. True claims: log-ratio of agreeing with true "
        "claims. The first row shows the levels of the base, also for NLL."
    )
    return Table(head, rows, note)


def _kept(side: Side | Levels) -> list[str]:
    return [
        f"{100 * side.facts:.1f} %", number(side.true_claims, "{:+.2f}"), number(side.distinct3, "{:.3f}"),
        number(side.reply_tokens, "{:.1f}"), number(side.json, "{:.0%}"),
    ]  # fmt: skip


def controls_table(entries: Sequence[Entry], behaviour: str, dilemma_noun: str = "dilemmas") -> Table:
    """Effects of every control; with replicates, the mean over seeds with its interval over seeds."""
    rows = []
    for line in shown(entries, (CONTROLS,)):
        cells = [_name(line)]
        for effect in (line.side.effect(probe) for probe in PROBES):
            if len(effect.seeds) > 1:
                band = Estimate.of(stats.prediction_band(effect.seeds))
                cells += [Estimate.of(stats.over_seeds(effect.seeds)).text, band.limits]
            else:
                cells += [f"{effect.mean:+.2f}", "-"]
        rows.append(cells)
    return Table(
        ["control", behaviour, "band", dilemma_noun, "band"], rows,
        "Mean over control seeds with a 95 % t interval over seeds. Band: where 95 % of further seeds are expected. "
        "A single random direction has a small effect: check whether the interval of the mean includes 0.",
    )  # fmt: skip


def parts_table(entries: Sequence[Entry], probe: Probe, behaviour: str, dilemma_noun: str = "dilemmas") -> Table | None:
    """Yes-bias, flips and confidence with the mean change of a probe; None if no method has them."""
    rows = [
        [
            _name(line), f"{parts.truth:+.2f}", number(parts.balanced, "{:+.2f}"), parts.yes_bias.text,
            f"{parts.up}", f"{parts.down}", f"{parts.n}", number(parts.scale, "{:.2f}"), f"{parts.beyond_scale:+.2f}",
        ]
        for line in shown(entries, METHODS)
        if (parts := line.side.parts(probe)) is not None
    ]  # fmt: skip
    if not rows:
        return None
    right = behaviour if probe == "own" else "honesty"
    source = (
        f"The probe of {behaviour}, nats: all rows that were asked in both polarities, with true and with false claims "
        "if it has both. (The tables of effects show one group in one polarity, which a Yes-bias also moves.)"
        if probe == "own"
        else f"The {dilemma_noun}, nats."
    )
    return Table(
        ["method", f"towards {right}", "balanced", "Yes-bias", "rows gained", "rows lost", "rows", "confidence",
         "beyond confidence"], rows,
        f"{source} Balanced: the change towards {right}, with equal weight on rows where this answer is Yes and "
        "where it is No. Yes-bias: the mean change towards Yes, whichever answer is right. Rows gained and lost: rows "
        f"whose answer, averaged over seeds, flips to {right} and away from it. Confidence: the slope of the new "
        "log-ratios over the old ones; 1 means unchanged. If the base is already on this side, more confidence alone "
        f"looks like more {right}; beyond confidence is the change without this part.",
    )  # fmt: skip


def answers_table(entries: Sequence[Entry]) -> Table:
    """Dilemma answers that flip, and Surgical Informedness: a half per sign, the whole in the row of +."""
    rows = []
    for line in shown(entries, METHODS):
        turned, whole = line.side.turned, line.entry.informedness if line.sign == "+" else None
        rows.append([
            _name(line), number(turned.to_honest, "{:.0%}"), number(turned.to_dishonest, "{:.0%}"),
            *(number(turned.half[k], "{:+.0f}") for k in ("k1", "k2")),
            *(number(whole[k].score if whole else None, "{:+.0f}") for k in ("k1", "k2")),
            number(turned.balanced, "{:+.0f}"),
        ])  # fmt: skip
    return Table(
        ["method", "wrong to honest", "honest to wrong", "half k=1", "half k=2", "SI k=1", "SI k=2", "balanced"], rows,
        "Wrong to honest, honest to wrong: shares of dilemma answers that flip, means over seeds. Half: the part of "
        "one sign in Surgical Informedness (SI), in points. At +: wrong to honest minus k times honest to wrong; at -: "
        "honest to wrong minus k times wrong to honest. SI: the mean of both halves times the squared least answer "
        "mass. + counts as the honest side for every method. A negative SI means that + leads away from honesty, as "
        "sycophancy does. With k = 2, methods that do nothing look good. Balanced: change of P(Yes | Yes is honest) - "
        "P(Yes | No is honest), points.",
    )  # fmt: skip


def _name(line: Shown) -> str:
    """The line's name; its note is shown once, at its first sign."""
    first = next(sign for sign in SIGNS if sign in line.entry.sides)
    note = f" ({line.entry.note})" if line.entry.note and line.sign == first else ""
    return f"{line.entry.name} {line.sign}{note}"


def _alpha(line: Shown) -> str:
    """Strength, with a star if the search for it missed its budget; a dash for prompts."""
    if line.entry.kind == "prompts":
        return "-"
    return f"{line.side.alpha:+.3g}" + ("*" if line.side.spent and line.side.spent.is_missed else "")


def _spent(side: Side) -> float | None:
    return side.spent.p95 if side.spent else None


def number(value: float | None, form: str) -> str:
    """A number in a form, or a dash for None."""
    return "-" if value is None else form.format(value)


def _seeds(effect: Effect) -> str:
    """Every seed's value with the t interval over them; only their number if there are many."""
    if effect.over_seeds is None:
        return "-"
    listed = ", ".join(f"{value:+.2f}" for value in effect.seeds)
    many = len(effect.seeds) > _SEEDS_LISTED
    return f"{f'n = {len(effect.seeds)}' if many else listed} [{effect.over_seeds.limits}]"
