"""The tables of a comparison, made from its entries: effects, the contrast, costs, controls, answers."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

from ws.base import stats
from ws.comparing.findings import (
    METHODS,
    NOT_SEPARABLE,
    PROBES,
    SIGNS,
    Effect,
    Entry,
    Findings,
    Levels,
    Measured,
    Probe,
    Shown,
    Side,
    shown,
)
from ws.report.document import Table
from ws.report.findings import Estimate


def effects_table(
    measured: Measured, kinds: Collection[str], base: Levels, behaviour: str, dilemma_noun: str, caption: str
) -> Table:
    """Effects of both signs beside the band of the method's own random controls, after the levels of the base."""
    rows = [["base (levels)", "0", "0", base.own.text, "-", "-", base.dilemmas.text, "-", "-", f"{base.pmass:.3f}"]]
    lines = list(shown(measured.entries, kinds))
    for line in lines:
        cells = [_name(line), _alpha(line), number(_spent(line.side), "{:.2f}")]
        for probe in PROBES:
            effect, verdict = line.side.effect(probe), line.side.verdict(probe)
            cells += [effect_text(effect) + (f" ({verdict})" if verdict else ""), _band(effect.band), f"{effect.p:.4f}"]
        rows.append([*cells, f"{line.side.pmass:.3f}"])
    tests = 2 * len(lines)
    head = ["method", "alpha", "p95 KL", behaviour, "random", "p", dilemma_noun, "random", "p", "least answer mass"]
    note = (
        f"{caption} Effects: change against the base in nats; on the {dilemma_noun}, towards honesty. Intervals: 95 %, "
        "over training seeds and data seeds (s) and over rows (r); at equal KL, r also holds the uncertainty of the "
        "strength over the prompts of the calibration. Random: where 95 % of the method's own random "
        "controls are expected. p: by sign flips of whole clusters. Of the "
        f"{tests} p values, about {tests * 0.05:.0f} fall below 0.05 by chance alone; a p below "
        f"{0.05 / max(tests, 1):.4f} survives a Bonferroni correction. {NOT_SEPARABLE.capitalize()}: the interval over "
        "rows, or with three seeds or more the one over seeds, overlaps that band. Answer mass: probability of the two "
        "answers."
    )
    return Table(head, rows, note)


def effect_text(effect: Effect) -> str:
    """Mean with its intervals, over seeds first: `+4.26 s [+3.91, +4.61] r [+4.12, +4.39]`."""
    seeds = f" s [{effect.over_seeds.limits}]" if effect.over_seeds else ""
    rows = f" r [{effect.limits}]" if effect.low is not None else ""
    return f"{effect.mean:+.2f}{seeds}{rows}"


def _band(band: Estimate | None) -> str:
    return band.limits if band else "-"


def contrast_table(found: Findings) -> Table:
    """The direction against its parts and against gradient steps at equal KL: differences of the same replicates."""
    rows = []
    for name in (found.reference, *_compared_with_reference(found)):
        for sign in SIGNS:
            cells = [f"{name} {sign}"]
            for measured in found.equal_kl.values():
                entry, reference = measured.entry(name), measured.entry(found.reference)
                if entry is None or reference is None or sign not in entry.sides:
                    cells += ["-", "-"]
                    continue
                mine, theirs = entry.sides[sign].own, reference.sides[sign].own
                cells += [f"{mine.mean:+.2f}", "-" if name == found.reference else paired(mine, theirs)]
            rows.append(cells)
    heads = [head for budget in found.equal_kl for head in (f"at KL {budget}", f"minus {found.reference}")]
    return Table(
        ["method", *heads], rows,
        f"Is the contrast needed, and is training? {found.behaviour.capitalize()}, nats, at equal KL (95th percentile, "
        f"nats per token). Differences are taken within each training seed and data seed; in brackets a 95 % t "
        "interval over them. At +, a positive difference means that the method moves further; at -, a negative one.",
    )  # fmt: skip


def _compared_with_reference(found: Findings) -> Iterator[str]:
    """Methods with the replicates of the reference: its parts, and gradient steps."""
    for measured in list(found.equal_kl.values())[:1]:
        reference = measured.entry(found.reference)
        for entry in measured.entries:
            if reference and entry.kind in ("variants", "untrained") and _replicates(entry) == _replicates(reference):
                yield entry.name


def _replicates(entry: Entry) -> int:
    return len(next(iter(entry.sides.values())).own.seeds)


def paired(one: Effect, other: Effect) -> str:
    """The mean difference of two effects over the same replicates, with its t interval."""
    differences = [a - b for a, b in zip(one.seeds, other.seeds, strict=True)]
    return Estimate.of(stats.over_seeds(differences)).text


def costs_table(measured: Measured, base: Levels, caption: str) -> Table:
    """Side effects of every method; the base row shows levels."""
    head = ["method", "alpha", "KL mean", "KL p95", "KL max", "p95 KL, own replies", "NLL", "facts right",
            "facts moved", "selectivity", "true claims", "distinct 3-grams", "reply tokens", "JSON"]  # fmt: skip
    level = number(base.nll, "{:.2f}")
    rows = [["base (levels)", "0", "0", "0", "0", "0", level, _facts(base), "0", "0", *_kept(base)]]
    for line in shown(measured.entries):
        side = line.side
        rows.append([
            _name(line), _alpha(line), *(_small(value) for value in (side.kl, side.kl_p95)),
            number(side.kl_max, "{:.3f}"), number(_spent(side), "{:.3f}"), _small(side.nll_delta), _facts(side),
            f"{side.facts_moved:.2f}", f"{side.selectivity:.2f}", *_kept(side),
        ])  # fmt: skip
    if all(row[-1] == "-" for row in rows):
        head, rows = head[:-1], [row[:-1] for row in rows]
    note = (
        f"{caption} KL: divergence from the base in nats per token, on given answers to neutral requests. p95 KL, own "
        "replies: its 95th percentile along the replies that the method itself writes; prompts have only this one. "
        "NLL: change on the given answers, nats per token. Facts moved: mean absolute change of their log-ratios, "
        "nats. Selectivity: the change of the behaviour minus a tenth of facts moved. True claims: log-ratio of "
        "agreeing with true claims. Intervals, 95 %: KL and NLL by bootstrap over texts, facts by Wilson. The first "
        "row shows the levels of the base, also for NLL."
    )
    return Table(head, rows, note)


def _small(value: Estimate | None) -> str:
    if value is None:
        return "-"
    limits = "" if value.low is None else f" [{value.low:.3f}, {value.high:.3f}]"
    return f"{value.mean:.3f}{limits}"


def _facts(side: Side | Levels) -> str:
    found = side.facts
    limits = "" if found.low is None or found.high is None else f" [{100 * found.low:.1f}, {100 * found.high:.1f}]"
    return f"{100 * found.mean:.1f} %{limits}"


def _kept(side: Side | Levels) -> list[str]:
    return [
        number(side.true_claims, "{:+.2f}"), number(side.distinct3, "{:.3f}"),
        number(side.reply_tokens, "{:.1f}"), number(side.json, "{:.0%}"),
    ]  # fmt: skip


def controls_table(measured: Measured, behaviour: str, dilemma_noun: str) -> Table:
    """Effects of every control: the mean over draws with its interval, and the band for one more draw."""
    rows = []
    for control in measured.controls:
        for sign in control.effects:
            draws = len(control.effects[sign]["own"].seeds)
            cells = [f"{control.name} {sign}" + (f" ({control.note})" if control.note and sign == "+" else ""),
                     f"{draws}", number(control.p95.get(sign), "{:.2f}")]  # fmt: skip
            for probe in PROBES:
                mean, band = control.mean(sign, probe), control.band(sign, probe)
                alone = f"{control.effects[sign][probe].mean:+.2f}"
                cells += [mean.text if mean else alone, _band(band)]
            rows.append(cells)
    return Table(
        ["control", "draws", "p95 KL", behaviour, "band", dilemma_noun, "band"], rows,
        "Mean over draws with a 95 % t interval over them. Band: where 95 % of further draws are expected. Random "
        "directions have the singular values (activation steering: the norms) of their method; turned round they are "
        "other random directions, so the same draws serve for both signs. A single draw has a small effect: check "
        "whether the interval of the mean includes 0.",
    )  # fmt: skip


def parts_table(entries: Sequence[Entry], probe: Probe, behaviour: str, dilemma_noun: str) -> Table | None:
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
