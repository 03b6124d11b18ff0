"""What a comparison will resolve and cost, said before anything runs (`ws compare --plan`).

The smallest effect that it can find with 80 % power depends on how much effects vary between rows and between seeds.
These spreads are taken from an earlier comparison in the same place, or else from one on the embedded model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from scipy import stats as scipy_stats

from ws.base import power
from ws.base.errors import UserError
from ws.base.files import read_json
from ws.base.records import restore
from ws.comparing.compare import Plan
from ws.comparing.findings import KINDS, Effect, Findings
from ws.eval import sycophancy
from ws.fitting import behaviour
from ws.fitting.run_settings import Settings, run_path
from ws.measure.probe import split

UNTRAINED = 6
"""Constructions without data, and biases alone, that every comparison has."""
PARTS = 3
"""tau_pos, tau_neg and bisector."""


@dataclass(frozen=True)
class Spread:
    """Standard deviations of an effect in nats: over clusters of rows, and over replicates; `source` says where from.

    minutes: what the comparison took that they are from; None if unknown.
    """

    rows: float
    seeds: float
    source: str
    minutes: float | None = None


TYPICAL = Spread(0.67, 0.26, "LoRA on pocket, sycophancy, 0.5 nats of KL")
"""As `spread_of` reads them from the published comparison; a test compares the two."""


@dataclass(frozen=True)
class Outlook:
    """The size of a comparison, and the smallest effects that it finds with 80 % power at 95 %, in nats.

    fits: runs that are missing. searches: strengths to calibrate. conditions: Conditions to score. clusters: of test
    rows. alone: an effect of one method against nothing. apart: a difference of two methods on the same rows; only
    seeds matter for it.
    """

    fits: int
    searches: int
    conditions: int
    clusters: int
    replicates: int
    alone: float
    apart: float
    spread: Spread


def outlook(settings: Settings, plan: Plan) -> Outlook:
    """The outlook of a comparison with these settings; nothing is loaded, trained or scored."""
    subject = behaviour.load(settings.behaviour)
    pairs = [(seed, data_seed) for data_seed in plan.data_seeds for seed in plan.seeds]
    runs = [
        run_path(replace(settings, adapter=family, seed=seed, data_seed=data_seed), subject)
        for family in plan.families for seed, data_seed in pairs
    ]  # fmt: skip
    missing = sum(not (run / "direction.safetensors").is_file() for run in runs)
    asked = {kind: int(kind in plan.kinds) for kind in KINDS}
    steered = asked["activations"] * len(plan.activations)
    fitted = len(plan.families) + asked["variants"] * PARTS + asked["untrained"] * len(plan.steps)
    alone = asked["untrained"] * UNTRAINED + len(plan.peers)  # they have no replicates
    edits = fitted * len(pairs) + steered * len(plan.seeds) + alone
    lines = fitted + steered + alone - asked["untrained"]  # biases alone have no random controls
    draws = lines * plan.draws
    shuffled = plan.shuffles * len(plan.families)
    searches = 2 * (edits + shuffled) + draws
    conditions = searches * (1 + len(plan.budgets))
    probe = split(sycophancy.headline_probe(subject, settings.rows), dev=False)
    clusters = len({row.cluster for row in probe.rows})
    known = spread_of(runs[0].parents[1] / "compare" / "comparison.json")
    return Outlook(
        missing + 2 * shuffled, searches, conditions, clusters, len(pairs),
        power.detectable(known.rows, clusters, known.seeds, len(pairs)) if len(pairs) > 1 else math.inf,
        _apart(known.seeds, len(pairs)), known,
    )  # fmt: skip


def _apart(sd: float, seeds: int) -> float:
    """The smallest difference of two means over seeds that a t test finds; infinite with one seed."""
    if seeds < 2:
        return math.inf
    low, high = 0.0, 1.0
    while power.seeds_needed(high, sd) > seeds:
        high *= 2
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (low, middle) if power.seeds_needed(middle, sd) <= seeds else (middle, high)
    return high


def spread_of(file: Path) -> Spread:
    """The spreads of the reference in a stored comparison at the budget of its headline; typical ones without it."""
    if not file.is_file():
        return TYPICAL
    try:
        found = restore(Findings, read_json(file))
    except (TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{file} was written by another version of ws", "Delete it, or compare again.") from error
    entry = found.equal_kl[found.headline_budget].entry(found.reference)
    if entry is None or any(len(side.own.seeds) < 2 for side in entry.sides.values()):
        return TYPICAL
    effects = [side.own for side in entry.sides.values()]
    return Spread(
        float(np.mean([_over_clusters(one) for one in effects])),
        float(np.mean([np.std(one.seeds, ddof=1) for one in effects])), str(file), found.seconds["total"] / 60,
    )  # fmt: skip


def _over_clusters(effect: Effect) -> float:
    """The standard deviation over rows behind an interval."""
    rows = effect.rows_alone or effect
    if rows.low is None or rows.high is None:
        return 0.0
    return (rows.high - rows.low) / 2 / float(scipy_stats.norm.ppf(0.975)) * math.sqrt(effect.n)


def told(found: Outlook) -> Sequence[str]:
    """The outlook in sentences."""
    unknown = "cannot be said with one replicate"
    small, gap = (unknown if math.isinf(one) else f"{one:.2f} nats" for one in (found.alone, found.apart))
    replicates = "one replicate" if found.replicates == 1 else f"{found.replicates} replicates"
    return (
        f"It fits {found.fits} missing runs, calibrates about {found.searches} strengths, and scores about "
        f"{found.conditions} conditions.",
        f"With {replicates} and {found.clusters} clusters of test rows, the smallest effect that it finds with 80 % "
        f"power: {small}; the smallest difference between two methods: {gap}.",
        f"Standard deviations used: {found.spread.rows:.2f} nats over rows, {found.spread.seeds:.2f} over replicates "
        f"({found.spread.source}).",
        *([f"That comparison took {found.spread.minutes:.0f} minutes."] if found.spread.minutes is not None else []),
    )
