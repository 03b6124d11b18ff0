"""The report of one run: effects and samples first, then side effects, then how the direction was made."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import polars as pl

from ws.base.poles import Pole
from ws.base.store import write_text
from ws.eval import dilemmas, feedback
from ws.fitting.train import FitResult
from ws.report import document, figures
from ws.report.cells import signed
from ws.report.document import Block, Bullets, Figure, Heading, Paragraph, Samples, Table, Tile, Tiles
from ws.report.findings import DILEMMAS, Curve, Instrument, Numbers, Summary, Wording

FIGURE_FILE = "dose_response.png"


def write(
    folder: Path,
    summary: Summary,
    config: Mapping[str, Any],
    samples: pl.DataFrame,
    alignment: pl.DataFrame,
    training: Mapping[Pole, FitResult],
) -> None:
    """Write `dose_response.png`, `report.md` and `report.html` into the run folder."""
    figures.dose_response(summary, folder / FIGURE_FILE)
    title = f"{summary.behaviour} in {summary.model}"
    subtitle = (
        f"{summary.adapter} direction, training seed {summary.seed}, data seed {summary.data_seed}, "
        f"|dW| = {summary.direction_norm:.3g} over layers {config['direction']['layers']}"
    )
    blocks = _blocks(folder, summary, config, samples, alignment, training)
    write_text(folder / "report.md", document.to_markdown(title, [Paragraph(subtitle, note=True), *blocks]))
    write_text(folder / "report.html", document.to_html(title, subtitle, blocks))


def _blocks(
    folder: Path,
    summary: Summary,
    config: Mapping[str, Any],
    samples: pl.DataFrame,
    alignment: pl.DataFrame,
    training: Mapping[Pole, FitResult],
) -> list[Block]:
    behaviour = summary.behaviour
    blocks: list[Block] = [
        Paragraph(summary.sentence, strong=True),
        Tiles(_tiles(summary)),
    ]
    if summary.warnings:
        blocks.append(Bullets(summary.warnings, warning=True))
    blocks += [
        Figure(
            folder / FIGURE_FILE,
            f"dose-response of {behaviour} and of the {summary.numbers.title(DILEMMAS)}",
            "Mean log-ratios with 95 % intervals over clusters of rows. Grey band: 95 % of random directions of this "
            "norm are expected here; ticks show the measured ones. Dashed: persona prompts on the unedited model. "
            "Below: probability of the two answers, and KL to the base on neutral text.",
        ),
        Heading("What it says"),
        Paragraph(
            f"At positive alpha the model {config['behaviour']['positive_means']}. All strengths use the same prompts "
            "and random numbers, without a system prompt.",
            note=True,
        ),
        *_default_system(config["model"].get("default_system")),
        _samples(samples),
        *_judged(summary),
        Heading("Effects on held-out probes"),
        *_instruments(summary),
        *_effect_tables(summary),
        Heading("Controls and prompts"),
        *_control_tables(summary),
        Heading("Side effects"),
        _side_effects(summary.numbers),
        *_other_behaviours(summary),
        Heading("Geometry of the direction"),
        *_geometry(summary, alignment),
        Heading("How it was made"),
        *_provenance(summary, config, training),
    ]
    return blocks


def _tiles(summary: Summary) -> list[Tile]:
    tiles = []
    numbers = summary.numbers
    for name, change in (
        (summary.behaviour, summary.measured.change),
        (f"{numbers.title(DILEMMAS)}, honest side", numbers.dd_delta),
    ):
        for key in ("1", "-1"):
            if key in change:
                entry = change[key]
                tiles.append(Tile(f"{entry.mean:+.2f} nats", f"{name} at {signed(key)}", f"95 % {entry.limits}"))
    side = numbers.side_effects
    if "1" in side and "-1" in side:
        kept = f"{100 * side['-1'].facts:.1f} / {100 * side['1'].facts:.1f} %"
        tiles.append(Tile(kept, "facts right at -1 / +1", f"base {100 * side['0'].facts:.1f} %"))
    return tiles


def _judged(summary: Summary) -> list[Block]:
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
        "Free replies to held-out prompts, one greedy and two sampled per prompt, without a system prompt. `persona`: "
        "the probability that a reply was written under the positive persona rather than the negative one, by the "
        "likelihoods of the unedited model. This is likeness to a persona, not agreement with a claim, and a model may "
        "find incoherent text more like one persona. If the recipe judges training pairs by persona, this is the same "
        "judge. `http`: an endpoint answers a rubric.",
    )]  # fmt: skip


def _instruments(summary: Summary) -> list[Block]:
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


def _default_system(text: str | None) -> list[Block]:
    """What "plain" means for a model whose template opens a system turn by itself."""
    if text is None:
        return []
    return [
        Paragraph(
            f'If no system prompt is given, the template of this model opens with its own: "{text}". Plain means with '
            "that text; a persona prompt takes its place.",
            note=True,
        )
    ]


def _samples(samples: pl.DataFrame) -> Block:
    alphas = samples["alpha"].unique().sort().to_list()
    rows = []
    for prompt in samples["prompt"].unique(maintain_order=True):
        answers = {row["alpha"]: row["response"] for row in samples.filter(pl.col("prompt") == prompt).to_dicts()}
        rows.append((prompt, [answers.get(alpha, "") for alpha in alphas]))
    return Samples([_alpha_name(alpha) for alpha in alphas], rows)


def _alpha_name(alpha: float) -> str:
    return "alpha 0 (base)" if alpha == 0 else f"alpha {alpha:+g}"


def _effect_tables(summary: Summary) -> list[Block]:
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
    moral = _dilemma_table(numbers)
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
    return [own, moral, decomposition, _dose_response(numbers)]


def _dilemma_table(numbers: Numbers) -> Table:
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


def _dose_response(numbers: Numbers) -> Table:
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


def _control_tables(summary: Summary) -> list[Block]:
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
        "one in every parameter. Band: 95 % prediction interval for one more seed. Strengths with a band: "
        f"{', '.join(signed(key) for key in summary.numbers.bands) or 'none'}.",
    )
    prompts = Table(
        ["system prompt, alpha 0", behaviour, numbers.title(DILEMMAS)],
        [[name, entry[behaviour].text, entry[DILEMMAS].text] for name, entry in numbers.contexts.items()],
        "Log-ratios of the unedited model with the first persona of each side as its system prompt, nats.",
    )
    return [table, *([prompts] if numbers.contexts else [])]


def _side_effects(numbers: Numbers) -> Block:
    columns: dict[str, tuple[str, Callable[[float], str]]] = {
        "facts": ("facts right", lambda share: f"{100 * share:.1f} %"),
        "kl": ("KL, mean", lambda nats: f"{nats:.4f}"),
        "kl_p95": ("KL, p95", lambda nats: f"{nats:.3f}"),
        "kl_max": ("KL, max", lambda nats: f"{nats:.2f}"),
        "nll_delta": ("NLL change", lambda nats: f"{nats:+.4f}"),
        "true_claims": ("true claims", lambda nats: f"{nats:+.2f}"),
        "distinct3": ("distinct 3-grams", lambda share: f"{share:.3f}"),
        "reply_tokens": ("reply tokens", lambda count: f"{count:.1f}"),
        "json": ("JSON replies", lambda share: f"{100 * share:.0f} %"),
    }
    entries = {alpha: vars(entry) for alpha, entry in numbers.side_effects.items()}
    shown = {key: column for key, column in columns.items() if any(e[key] is not None for e in entries.values())}
    rows = [
        [signed(alpha), *("-" if entry[k] is None else write(entry[k]) for k, (_, write) in shown.items())]
        for alpha, entry in entries.items()
    ]
    return Table(
        ["alpha", *(title for title, _ in shown.values())], rows,
        "KL to the base and change of the negative log-likelihood (NLL): nats per token, on given answers to neutral "
        "requests. True claims: log-ratio of agreeing with true claims. Distinct 3-grams and reply tokens: of greedy "
        "replies to neutral requests.",
    )  # fmt: skip


def _other_behaviours(summary: Summary) -> list[Block]:
    others = summary.numbers.other_behaviours
    if not others:
        return []
    own = summary.numbers.change[summary.behaviour]
    rows = [
        [f"{summary.behaviour} itself", *(entry.text for entry in own.values()), "", ""],
        *(
            [name, *(other.change[key].text for key in own), other.base.text, str(other.base.n)]
            for name, other in others.items()
        ),
    ]
    return [
        Table(
            ["behaviour", *(f"change at {signed(key)}" for key in own), "base", "rows"],
            rows,
            "How far the direction moves behaviours that it was not made for: change of the log-ratio towards each "
            "behaviour on its own held-out probe, nats. All of them, also the first line, are Yes/No log-ratios "
            "in one polarity. "
            f"{feedback.MEANING}",
        )
    ]


def _geometry(summary: Summary, alignment: pl.DataFrame) -> list[Block]:
    g = summary.geometry
    shape = Table(
        ["|tau pos|", "|tau neg|", "|dW|", "cos(tau pos, tau neg)", "drift ratio", "cos(dW, M)"],
        [
            [
                *(f"{g[n]:.3g}" for n in ("norm_pos", "norm_neg", "norm_dw")),
                f"{-g['cos_anti']:+.3f}",
                f"{g['drift_ratio']:.2f}",
                f"{g['cos_dw_m']:.3f}",
            ]
        ],
        "Frobenius norms. tau pos and tau neg: updates of the two fine-tunes. dW: their difference. M: the drift "
        "that both share. Drift ratio: |M| / (|dW| / 2).",
    )
    kinds = Table(
        ["module", "n", "mean |dW|", "top 10 %", "bottom 90 %", "weak readout"],
        [
            [
                row["kind"],
                str(row["n"]),
                f"{row['mean_norm']:.3g}",
                _ratio(row["mean_ratio_top"]),
                _ratio(row["mean_ratio_bottom"]),
                _ratio(row["mean_ratio_weak"]),
            ]
            for row in alignment.to_dicts()
        ],
        "Energy of dW in the top 10 % and in the other singular directions of the base weights, relative to a "
        "direction without structure (1 = no alignment). Weak readout: the 1 % of the residual stream that the "
        "unembedding reads least.",
    )
    return [shape, kinds]


def _provenance(summary: Summary, config: Mapping[str, Any], training: Mapping[Pole, FitResult]) -> list[Block]:
    data = config["data"]
    fitted = [
        [
            pole,
            str(data[pole]["kept"]),
            str(data[pole]["unique"]),
            f"{entry.first_loss:.3f}",
            f"{entry.last_loss:.3f}",
            str(entry.steps),
            f"{entry.trainable_parameters:,}",
        ]
        for pole, entry in training.items()
    ]
    held_out = all(entry.measure == "eval_loss" for entry in training.values())
    loss = "validation loss" if held_out else "training loss"
    measured = "The loss is on held-out topics." if held_out else "No topic was held out."
    seconds = ", ".join(f"{name} {value:.1f}" for name, value in summary.seconds.items())
    base, asked = config["model"], config["dilemmas"]
    pinned = f", commit {asked['revision']}" if asked["revision"] else ""
    return [
        Table(
            ["branch", "kept", "unique", f"{loss} before", "after", "steps", "trainable"],
            fitted,
            f"{data['pairs']} pairs were sampled. {measured}",
        ),
        Paragraph(
            f"Base {base['name']} ({base['architecture']}, {base['parameters']:,} parameters, fingerprint "
            f"{base['fingerprint']}, {base['dtype']} on {base['device']}, sampled and trained in "
            f"{config['fitted_in']}, {base['attention']} attention, thinking "
            f"{base['thinking']}). {asked['noun'].capitalize()}: {asked['source']}{pinned} ({asked['rule']}; "
            f"{asked['counted']} of {asked['read']} rows counted). Seconds per stage: {seconds}.",
            note=True,
        ),
        Paragraph(
            "This is one training seed: the intervals are over rows and do not show how another seed would come out. A "
            "log-ratio at a forced answer is not free behaviour: read the samples too.",
            note=True,
        ),
    ]


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


__all__: Sequence[str] = ["FIGURE_FILE", "write"]
