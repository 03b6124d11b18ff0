"""Where the direction lies and how it was made: norms by layer and module, training curves, data, settings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import polars as pl

from ws.report.document import Block, Grid, Heat, Line, LineChart, Paragraph, Point, Table
from ws.report.story import Story

_SIDES = {"pos": "positive side", "neg": "negative side"}


def geometry(story: Story) -> list[Block]:
    """Norms by layer and by matrix, the shape of the direction, and its alignment with the weights."""
    found: list[Block] = []
    if by_layer := story.norms_by_layer:
        chart = LineChart(
            "size of the change by layer", "layer", "Frobenius norm of dW in the layer",
            [Line("|dW|", [Point(float(layer), norm) for layer, norm in by_layer.items()], strong=True)],
            limits=(0.0, 1.08 * max(by_layer.values())), form=".3g",
        )  # fmt: skip
        found.append(Grid([chart, *([] if story.matrices is None else [_by_matrix(story.matrices)])]))
    found.append(_shape(story.summary.geometry))
    if story.alignment is not None:
        found.append(_alignment(story.alignment))
    return found


def _by_matrix(matrices: pl.DataFrame) -> Heat:
    norms = matrices.drop_nulls("layer").group_by("layer", "kind").agg((pl.col("norm") ** 2).sum().sqrt())
    layers = sorted(norms["layer"].unique().to_list())
    known = {(layer, kind): norm for layer, kind, norm in norms.iter_rows()}
    kinds = list(dict.fromkeys(matrices["kind"]))
    return Heat(
        "size of the change by module and layer", kinds, [str(layer) for layer in layers],
        [[known.get((layer, kind)) for layer in layers] for kind in kinds],
        caption="Frobenius norm of dW in every matrix; columns are layers.",
    )  # fmt: skip


def _shape(g: Mapping[str, float]) -> Table:
    return Table(
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


def _alignment(table: pl.DataFrame) -> Table:
    return Table(
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
            for row in table.to_dicts()
        ],
        "Energy of dW in the top 10 % and in the other singular directions of the base weights, relative to a "
        "direction without structure (1 = no alignment). Weak readout: the 1 % of the residual stream that the "
        "unembedding reads least. Random: directions with the singular values of dW, all modules.",
    )


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


# -------------------------------------------------------------------- training


def training(story: Story) -> list[Block]:
    """Loss, gradient norm and learning rate of both sides by step, and a table of both."""
    if not story.training:
        return []
    loss = [
        Line(f"{_SIDES[pole]}, {name}", _points(one.curve(column)), dots=column == "eval_loss")
        for column, name in (("loss", "training"), ("eval_loss", "held out"))
        for pole, one in story.training.items()
        if one.curve(column)
    ]
    charts: list[Block] = [LineChart("loss", "step", "nats per response token", loss, form=".3f")]
    for column, title, unit in (("grad_norm", "gradient norm", "before clipping"), ("lr", "learning rate", "per step")):
        lines = [Line(_SIDES[pole], _points(one.curve(column)), dots=False) for pole, one in story.training.items()]
        charts.append(LineChart(title, "step", unit, lines, form=".3g"))
    data = story.config["data"]
    fitted = [
        [
            pole,
            str(data[pole]["kept"]),
            str(data[pole]["unique"]),
            f"{one.result['first_loss']:.3f}",
            f"{one.result['last_loss']:.3f}",
            str(one.result["steps"]),
            f"{one.result['trainable_parameters']:,}",
        ]
        for pole, one in story.training.items()
    ]
    held_out = all(one.result["measure"] == "eval_loss" for one in story.training.values())
    measured = "The loss is on held-out topics." if held_out else "No topic was held out."
    table = Table(
        ["branch", "kept", "unique", f"{'validation' if held_out else 'training'} loss before", "after", "steps",
         "trainable"],
        fitted,
        f"{data['pairs']} pairs were sampled. {measured}",
    )  # fmt: skip
    return [Grid(charts), table]


def _points(curve: list[tuple[int, float]]) -> list[Point]:
    return [Point(float(step), value) for step, value in curve]


def provenance(story: Story) -> list[Block]:
    """Base model, sources and times, and what one run cannot say."""
    config: Mapping[str, Any] = story.config
    seconds = ", ".join(f"{name} {value:.1f}" for name, value in story.summary.seconds.items())
    base, asked = config["model"], config["dilemmas"]
    pinned = f", commit {asked['revision']}" if asked["revision"] else ""
    return [
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
