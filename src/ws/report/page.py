"""The report of one run: effects and samples first, then side effects, then how the direction was made."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import polars as pl

from ws.base.poles import Pole
from ws.base.store import write_text
from ws.eval import feedback
from ws.fitting.train import FitResult
from ws.report import document, effects, figures
from ws.report.cells import signed
from ws.report.document import Block, Bullets, Figure, Heading, Paragraph, Samples, Table, Tile, Tiles
from ws.report.findings import DILEMMAS, Numbers, Summary
from ws.report.sentences import facts_say_something

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
        *effects.judged(summary),
        Heading("Effects on held-out probes"),
        *effects.instruments(summary),
        *effects.by_probe(summary),
        Heading("Controls and prompts"),
        *effects.controls(summary),
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
        minus, plus, base = side["-1"], side["1"], side["0"]
        if facts_say_something(numbers):
            kept = f"{100 * minus.facts:.1f} / {100 * plus.facts:.1f} %"
            tiles.append(Tile(kept, "facts right at -1 / +1", f"base {100 * base.facts:.1f} %"))
        else:
            cost = f"{minus.nll_delta:+.2f} / {plus.nll_delta:+.2f}"
            tiles.append(Tile(cost, "NLL of neutral text at -1 / +1", "change, nats per token"))
    return tiles


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
        "unembedding reads least. Random: directions with the singular values of dW, all modules.",
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
