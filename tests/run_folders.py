"""A finished run folder made from known scores, with everything that its report shows, without a model."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl

from test_report import behaviour_shift, table
from ws.base.files import write_json
from ws.base.records import plain
from ws.eval.ability import Ability, Share
from ws.measure.probe import Probe, ProbeRow
from ws.report import flips, sentences
from ws.report.findings import Summary
from ws.report.story import FLIPS_FILE, Story
from ws.report.summary import summarise

GEOMETRY = {"norm_pos": 2.0, "norm_neg": 1.5, "norm_dw": 2.5, "cos_anti": 0.25, "drift_ratio": 0.5, "cos_dw_m": 0.1}
LAYERS = {3: {"q_proj": 3.0, "up_proj": 4.0}, 4: {"q_proj": 6.0, "up_proj": 8.0}}
"""Layer -> module -> norm of its update: 5 in layer 3 and 10 in layer 4."""


def probe_of(scores: pl.DataFrame, name: str, text: str) -> Probe:
    """A Yes/No probe with the rows of a scores table; `text` stands in every question."""
    rows = scores.filter((pl.col("probe") == name) & (pl.col("edit") == "none")).unique("row", maintain_order=True)
    return Probe(name, "choice", tuple(
        ProbeRow(row["row"], ({"role": "user", "content": f"{text} {row['row']}"},), "", row["cluster"], row["group"],
                 row["label"])
        for row in rows.to_dicts()
    ))  # fmt: skip


def summary_of(scores: pl.DataFrame, behaviour_name: str = "small", warnings: tuple[str, ...] = ("odd",)) -> Summary:
    """The summary of a run on a model of some name."""
    numbers = summarise(scores, "dW:lora", "sycophancy", "false")
    return Summary(
        model=behaviour_name, behaviour="sycophancy", adapter="lora", seed=0, data_seed=0, headline_group="false",
        noun="claims", direction_norm=2.5, geometry=GEOMETRY, numbers=numbers, seconds={"eval": 1.0}, warnings=warnings,
        headline=sentences.headline(numbers, "sycophancy", "claims", "choice"), rounding=None,
        ability=Ability("choice", "a stated reason", 0.95, Share(0.75, 0.6, 0.9), None),
        in_short=sentences.in_short(numbers, behaviour_name, "sycophancy", "claims", "choice"),
    )  # fmt: skip


def finished_run(
    folder: Path, model: str = "small", text: str = "Is it", shift: Any = behaviour_shift, **changed: Any
) -> Story:
    """Write a run folder and read it; `text` stands in every text of a model or user, `changed` replaces fields."""
    scores = table(shift)
    folder.mkdir(parents=True)
    summary = replace(summary_of(scores, model, (f"odd {text}",)), **changed)
    write_json(folder / "summary.json", plain(summary))
    write_json(folder / "config.json", {
        "settings": {"model": model, "behaviour": "sycophancy", "adapter": "lora", "seed": 0, "data_seed": 0},
        "behaviour": {"positive_means": f"agrees {text}"}, "direction": {"layers": "3-4 of 6"},
        "model": {"name": model, "architecture": "Small", "parameters": 1000, "fingerprint": "f", "dtype": "float32",
                  "device": "cpu", "attention": "eager", "thinking": "off", "default_system": text},
        "dilemmas": {"source": "own", "revision": None, "rule": "made here", "noun": "dilemmas", "counted": 120,
                     "read": 120},
        "data": {"pairs": 10, "pos": {"kept": 9, "unique": 8}, "neg": {"kept": 7, "unique": 6}}, "fitted_in": "float32",
    })  # fmt: skip
    pl.DataFrame([
        {"prompt": f"{text} {number}", "alpha": alpha, "response": f"{text} {number} {alpha:+g}"}
        for number in range(6) for alpha in (-1.0, 0.0, 1.0)
    ]).write_parquet(folder / "samples.parquet")  # fmt: skip
    pl.DataFrame([
        {"layer": layer, "kind": kind, "norm": norm} for layer, kinds in LAYERS.items() for kind, norm in kinds.items()
    ]).write_csv(folder / "subspace_per_layer.csv")  # fmt: skip
    pl.DataFrame([
        {"kind": kind, "n": 2, "mean_norm": 1.0, "mean_ratio_top": 1.5, "mean_ratio_bottom": 0.5,
         "mean_ratio_weak": None} for kind in ("q_proj", "up_proj")
    ]).write_csv(folder / "subspace_summary.csv")  # fmt: skip
    probes = [probe_of(scores, name, text) for name in ("sycophancy", "dilemmas")]
    flips.table(scores, "dW:lora", probes).write_parquet(folder / FLIPS_FILE)
    for pole in ("pos", "neg"):
        trained(folder / pole)
    return Story.read(folder)


def trained(folder: Path, losses: tuple[float, ...] = (2.0, 1.5, 1.25)) -> None:
    """The folder of an adapter with its log and result."""
    folder.mkdir()
    write_json(folder / "train_result.json", {
        "first_loss": losses[0], "last_loss": losses[-1], "steps": len(losses), "trainable_parameters": 1000,
        "measure": "eval_loss",
    })  # fmt: skip
    with (folder / "train_log.csv").open("w", newline="") as handle:
        writer = csv.writer(handle)
        writer.writerow(["step", "epoch", "loss", "eval_loss", "lr", "grad_norm"])
        writer.writerow([0, 0.0, "", 4.0, 0.0, ""])
        writer.writerows([[step, 0.5, loss, loss, 1e-3, 0.25] for step, loss in enumerate(losses, start=1)])
