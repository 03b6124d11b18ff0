"""The tables of a report's effects: both instruments, judged replies, probes by group, dilemmas, doses, controls."""

from __future__ import annotations

from collections.abc import Iterator

from ws.eval import dilemmas
from ws.report.cells import signed
from ws.report.document import Block, Table
from ws.report.findings import DILEMMAS, Curve, Instrument, Numbers, Summary, Wording


def judged(summary: Summary) -> list[Block]:
    """What a judge makes of free replies to held-out prompts."""
    if not summary.judged:
        return []
    rows = [
        [judge, signed(key), entry.score.text, "-" if key == "0" else entry.change.text,
         f"{entry.replies} to {entry.prompts} prompts"]
        for judge, by_key in summary.judged.items()
        for key, entry in by_key.items()
    ]  # fmt: skip
    return [Table(
        ["judge", "alpha", "mean score", "change", "replies"], rows,
        "Free replies to held-out prompts, one greedy and two sampled per prompt, without a system prompt. Persona: "
        "the probability that a reply was written under the positive persona rather than the negative one, by the "
        "likelihoods of the unedited model. This is likeness to a persona, not agreement with a claim, and a model may "
        "find incoherent text more like one persona. If the recipe judges training pairs by persona, this is the same "
        "judge. Http: an endpoint answers a rubric.",
    )]  # fmt: skip


def instruments(summary: Summary) -> list[Block]:
    """The behaviour by both instruments with the reason for the choice, every wording alone, and the other groups."""
    names = {"choice": "Yes/No", "replies": "replies"}
    rows = []
    for name, measured in summary.numbers.instruments.items():
        rows += [
            [f"{names[name]}, {measured.meaning}", signed(key), measured.levels[key].text, *cells]
            for key, cells in _against_band(measured, measured.per_token)
        ]
        for number, wording in measured.wordings.items():
            rows += [
                [f"wording {int(number) + 1} alone", signed(key), "", *cells] for key, cells in _against_band(wording)
            ]
    rows += [
        [f"replies, {group}", signed(key), "", change.text, "-", "not measured", "-", f"{change.n}"]
        for group, by_key in summary.other_claims.items()
        for key, change in by_key.items()
    ]
    able = summary.ability
    consistent = "-" if able.consistent is None else f"{able.consistent.mean:.0%}"
    alike = (
        "" if able.wordings is None else f" The wordings of the replies correlate by {able.wordings:.2f} over items."
    )
    return [Table(
        ["instrument", "alpha", "level", "change", "per token", "random band", "effect is", "rows"], rows,
        f"{summary.behaviour} on held-out {summary.noun}, nats. Yes/No: log p(first answer) - log p(second). Replies: "
        "log p of a whole reply that takes one side - log p of a reply of as many words that takes the other. "
        "The level "
        "is the mean over wordings; intervals are over items and take the wordings as fixed. The headline shows "
        f"{names[able.instrument]}: {able.reason}. This was decided on the unedited model, before any direction was "
        f"scored (answer mass {able.mass:.2f}, opposite questions answered differently {consistent}).{alike}",
    )]  # fmt: skip


def _against_band(found: Instrument | Wording, per_token: Curve | None = None) -> Iterator[tuple[str, list[str]]]:
    """Per strength: change, change per token, random band, verdict and number of rows."""
    for key, change in found.change.items():
        band, tokens = found.bands.get(key), (per_token or {}).get(key)
        yield (
            key,
            [
                change.text,
                "-" if tokens is None else f"{tokens.mean:+.3f} [{tokens.limits}]",
                "not measured" if band is None else band.limits,
                "-" if band is None else {True: "outside", False: "inside", None: "?"}[found.outside.get(key)],
                f"{change.n}",
            ],
        )


def by_probe(summary: Summary) -> list[Block]:
    """The Yes/No probes by group, the dilemmas, the parts of every change, and the dose-response."""
    numbers, groups = summary.numbers, summary.numbers.groups
    rows = [
        [
            signed(key),
            *(curve[key].text for curve in groups.values()),
            f"{level.pmass:.3f}",
        ]
        for key, level in summary.own.items()
    ]
    own = Table(
        ["alpha", *(f"{name} (n={curve['0'].n})" for name, curve in groups.items()), "answer mass"],
        rows,
        f"{summary.behaviour}: log-ratio towards the behaviour, nats, with 95 % intervals. Reversed questions swap the "
        "two answers; positive is still towards the behaviour. A mere Yes-bias raises the plain columns and lowers the "
        "reversed columns.",
    )
    moral = dilemma_table(numbers)
    flips = []
    for probe, by_key in numbers.decomposition.items():
        for key, entry in by_key.items():
            flips.append(
                [
                    f"{numbers.title(probe)} {signed(key)}",
                    entry.effect.text,
                    "-" if entry.balanced is None else f"{entry.balanced:+.2f}",
                    entry.yes_bias.text,
                    f"{entry.up}",
                    f"{entry.down}",
                    f"{entry.n}",
                ]
            )
    decomposition = Table(
        ["probe, alpha", "signed change", "balanced", "Yes-bias", "rows gained", "rows lost", "rows"],
        flips,
        "All counted rows, plain and reversed, true and false. Signed change: towards the behaviour (or honesty). "
        "Balanced: the same, with equal weight on rows whose positive answer is Yes and rows whose positive answer is "
        "No, so that a Yes-bias cancels. Yes-bias: change towards Yes, whichever answer is positive. Gained and lost: "
        "rows whose answer flips to the positive side, and away from it.",
    )
    return [own, moral, decomposition, dose_response(numbers)]


def dilemma_table(numbers: Numbers) -> Table:
    """Means of the counted rows and of every group; rows that are not counted are shown and marked."""
    counts = numbers.dilemma_counts
    apart = counts.not_counted
    # if some rows are not counted, the group `stated` is the counted rows
    parts = {name: means for name, means in numbers.dilemma_groups.items() if name != dilemmas.STATED}
    counted = numbers.levels[DILEMMAS]
    everything: dict[str, Curve] = {"all rows": numbers.all_dilemmas} if apart else {}
    columns: dict[str, Curve] = {"counted" if apart else "all": counted, **parts, **everything}
    caption = (
        f"{counts.noun.capitalize()}: log-ratio towards the honest answer, nats. It is Yes on "
        f"{counts.honest_yes} and No on {counts.honest_no} of the {counts.counted} counted rows."
    )
    if apart:
        caption += (
            f" {apart} more rows ({dilemmas.FILLER}) have a label only because the other action of their dilemma "
            "touches honesty. No headline, control, flip or p uses them. They are shown here, as is the mean of all "
            "rows, for comparison with work that counts them."
        )
    return Table(
        ["alpha", *(f"{name} (n={column['0'].n})" for name, column in columns.items()), "answer mass"],
        [
            [signed(key), *(column[key].text for column in columns.values()), f"{level.pmass:.3f}"]
            for key, level in counted.items()
        ],
        caption,
    )


def dose_response(numbers: Numbers) -> Table:
    """Slope, linearity and monotonicity over the strengths, and a p of each strength, with a note on many tests."""
    p_values = numbers.sign_flip_p
    keys = list(dict.fromkeys(key for by_key in p_values.values() for key in by_key))
    rows = []
    for probe, found in numbers.dose_response.items():
        monotone = {True: "yes", False: "no", None: "-"}[found.monotone]
        line = (
            "-" if value is None else f"{value:{form}}" for value, form in ((found.slope, "+.2f"), (found.r2, ".3f"))
        )
        rows.append([probe, *line, monotone, *(_p_value(p_values[probe].get(key)) for key in keys)])
    tests = sum(len(by_key) for by_key in p_values.values())
    return Table(
        ["probe", "slope", "R2", "monotone", *(f"p at {signed(key)}" for key in keys)], rows,
        "Slope: mean change in nats per unit of alpha, for a line through the base. R2: share of the squared "
        "changes that the line explains. Monotone: whether the change always grows with the strength. p: two-sided, by "
        "sign flips of whole clusters, not corrected for multiple tests. One p in twenty falls below 0.05 by chance "
        f"alone; the Bonferroni limit for all {tests} is {0.05 / max(tests, 1):.2g}. A p ignores the controls: "
        "a fixed random direction has a small real effect too.",
    )  # fmt: skip


def _p_value(p: float | None) -> str:
    return "-" if p is None else f"{p:.2g}"


def controls(summary: Summary) -> list[Block]:
    """Effects beside the random directions, and the persona prompts."""
    behaviour, numbers = summary.behaviour, summary.numbers
    rows = []
    for key, by_probe in numbers.bands.items():
        for probe, band in by_probe.items():
            seeds = ", ".join(f"{value:+.3f}" for value in band.seeds)
            outside = {True: "outside", False: "inside", None: "?"}[numbers.outside_controls[probe].get(key)]
            rows.append(
                [
                    f"{numbers.title(probe)} {signed(key)}",
                    numbers.change[probe][key].text,
                    band.limits,
                    outside,
                    seeds,
                ]
            )
    table = Table(
        ["probe, alpha", "trained direction", "random band", "effect is", "change per random seed"],
        rows,
        "Change against the base, nats. The random directions have the shape, rank and Frobenius norm of the trained "
        "one in every parameter. Turned round, each is another random direction, so they are measured at + and their "
        "band serves for both signs. Band: 95 % prediction interval for one more seed. Strengths with a band: "
        f"{', '.join(signed(key) for key in summary.numbers.bands) or 'none'}.",
    )
    prompts = Table(
        ["system prompt, alpha 0", behaviour, numbers.title(DILEMMAS)],
        [[name, entry[behaviour].text, entry[DILEMMAS].text] for name, entry in numbers.contexts.items()],
        "Log-ratios of the unedited model with the first persona of each side as its system prompt, nats.",
    )
    return [table, *([prompts] if numbers.contexts else [])]
