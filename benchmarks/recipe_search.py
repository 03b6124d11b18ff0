"""Choose a recipe on dev items alone: fit a Direction per setting and measure it on dev rows.

    python benchmarks/recipe_search.py smollm2 sycophancy LOG.jsonl SETTING.json...

A setting is a JSON object with any of `train`, `sampling`, `judge`, `grid`, as in `weight_steering.json`, and a `name`;
also `family`, `seed` and `data_seed`. `strengths`: sizes of alpha to measure at, 1 if left out.
`measured_by`: `replies` (the default) takes the reply log-ratio on the `[dev]` rows of the behaviour file; `choice`
takes the Yes/No log-ratio on the dev split of the probe (docs/protocol.md). `budget`: the direction is measured at the
strengths at which it costs this KL, as in `ws compare`; without it at alpha -1 and +1.

Every line of the log has the setting, the pairs that were kept, and per sign the strength, the change on the dev rows
(nats, with its 95 % interval over items; also by wording), the KL to the base on neutral text that no report shows,
and distinct 3-grams of greedy replies. No test row of a reported probe is read. Settings that are in the log are
skipped, so a search can go on after an interruption.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl

from ws.algebra.direction import Direction
from ws.edit.condition import Condition, Edit
from ws.eval import instrument, side_effects
from ws.fitting.behaviour import Behaviour
from ws.fitting.data import Grid
from ws.fitting.judge import JudgeSettings
from ws.fitting.run_settings import Settings
from ws.fitting.stages import Fitting
from ws.measure import calibrate
from ws.measure.probe import Probe, split
from ws.measure.score import score
from ws.model import loading
from ws.model.loading import ChatModel
from ws.report.summary import Scores, reply_state, signed_change


def tried(model: ChatModel, behaviour: str, setting: dict[str, Any], out: Path) -> dict[str, Any]:
    started = time.perf_counter()
    chosen = replace(model, settings={"fit_dtype": setting.get("fit_dtype", "bfloat16")})
    settings = Settings(
        model=model.name, behaviour=behaviour, out=out / setting.get("data", setting["name"]),
        adapter=setting.get("family", "lora"), seed=setting.get("seed", 0), data_seed=setting.get("data_seed", 0),
        train=setting.get("train", {}), sampling=setting.get("sampling", {}),
        judge=JudgeSettings(**setting.get("judge", {"backend": "persona"})),
        grid=Grid(**setting.get("grid", {})),
    )  # fmt: skip
    with Fitting(settings, chosen) as run:
        run.settings = replace(run.settings, alphas=(-1.0, 0.0, 1.0))
        direction = run.fitted.direction
        counts = {pole: run.fitted.data[pole]["kept"] for pole in ("pos", "neg")}
        losses = {pole: [one.first_loss, one.last_loss, one.steps] for pole, one in run.fitted.records.items()}
        subject = run.behaviour
    probe = dev_probe(subject, setting.get("measured_by", "replies"))
    edit = Edit("dW", direction)
    probes = [probe, side_effects.neutral(20, held_out=False)[0], side_effects.text(8, held_out=False)]
    strengths = strengths_of(model, direction, setting.get("budget"), setting.get("strengths", (1,)))
    conditions = [Condition.of(edit, alpha) for alpha in strengths.values()]
    scores = Scores(table := score(model, probes, conditions, description="dev"))
    found: dict[str, Any] = {}
    for sign, alpha in strengths.items():
        change = signed_change(scores.rows(probe.name, "logratio", "dW", alpha))
        kl = scores.rows(side_effects.NEUTRAL_KL, "kl", "dW", alpha)["value"]
        found[sign] = {
            "alpha": alpha, "change": change.mean, "low": change.low, "high": change.high,
            "wordings": by_wording(scores, probe, alpha),
            "kl": kl.mean(),
            "kl_p95": kl.quantile(0.95), "distinct3": reply_state(table, "dW", alpha)["distinct3"],
        }  # fmt: skip
    return {
        "setting": setting, "behaviour": behaviour, "kept": counts, "losses": losses, "norm": direction.norm(),
        "dev": found, "seconds": round(time.perf_counter() - started, 1),
    }  # fmt: skip


def dev_probe(subject: Behaviour, measured_by: str) -> Probe:
    """The dev rows of an instrument."""
    if measured_by == "choice":
        return split(instrument.headline_probe("choice", subject), dev=True)
    probe = instrument.replies(subject, items=subject.probe.dev)
    assert probe is not None
    return probe


def strengths_of(
    model: ChatModel, direction: Direction, budget: float | None, sizes: Sequence[float]
) -> dict[str, float]:
    """Strengths by their names in the log: of these sizes at both signs, or by sign the one that costs the budget."""
    if budget is None:
        return {f"{alpha:+g}": alpha for size in sizes for alpha in (-float(size), float(size))}
    texts = calibrate.neutral_prompts(16)
    return {
        name: calibrate.to_budget(model, direction, budget, texts, sign=sign, tokens=30).alpha
        for name, sign in (("-1", -1), ("+1", 1))
    }


def by_wording(scores: Scores, probe: Probe, alpha: float) -> dict[str, float]:
    """The change of every wording alone, nats per reply; empty for choices."""
    if probe.kind == "choice":
        return {}
    rows = scores.rows(probe.name, "logratio", "dW", alpha)
    rows = rows.with_columns(wording=pl.col("row").str.extract(r"/(\d+)$"))
    return {
        str(key[0]): signed_change(part).mean for key, part in sorted(rows.group_by("wording"), key=lambda one: one[0])
    }


def main() -> None:
    name, behaviour, log, *files = sys.argv[1:]
    path, model = Path(log), loading.load(name)
    done = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    known = {(one["behaviour"], json.dumps(one["setting"], sort_keys=True)) for one in done}
    for file in files:
        for setting in json.loads(Path(file).read_text()):
            if (behaviour, json.dumps(setting, sort_keys=True)) in known:
                continue
            line = tried(model, behaviour, setting, path.parent / "runs")
            with path.open("a") as handle:
                handle.write(json.dumps(line) + "\n")
            dev = {sign: f"{one['change']:+.2f} (KL {one['kl']:.3f})" for sign, one in line["dev"].items()}
            print(setting["name"], line["kept"], dev, f"{line['seconds']:.0f} s", flush=True)


if __name__ == "__main__":
    main()
