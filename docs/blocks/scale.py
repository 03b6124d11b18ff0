"""The block on the cost of many runs, from the record that `benchmarks/scale.py` stores."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from blocks.table import table

MANY, WORKERS = 10_000, 100
"""The runs and workers of the sum on paper."""


def scale(stored: Mapping[str, Any] | None, minutes: float) -> str:
    """Fixed costs, traffic, the use of workers, and the sum on paper; `minutes`: of one run on SmolLM2, one thread."""
    if stored is None:
        return "Not measured yet."
    costs = [
        ["start Ray on this machine, first result", f"{stored['start']:.1f} s"],
        [f"schedule an empty run ({stored['empty_runs']} of them)", f"{1000 * stored['empty']:.0f} ms each"],
        *(
            [
                f"give a run its model: {name}",
                f"{one['bytes'] / 1e6:.0f} MB from the object store, {one['seconds']:.1f} s",
            ]
            for name, one in stored["models"].items()
        ),
    ]
    ways = [[way, f"{seconds:.0f} s", f"{stored['efficiency'][way]:.2f}"] for way, seconds in stored["sweeps"].items()]
    model = max(stored["models"].values(), key=lambda one: one["bytes"])
    fixed = stored["empty"] + model["seconds"]
    hours = MANY * (60 * minutes + fixed) / 3600
    return "\n".join([
        table(["what", "cost"], costs),
        "",
        table([f"a sweep of {stored['runs']} runs of pocket", "seconds", "throughput against two threads"], ways),
        "",
        f"On paper, {MANY:,} runs on SmolLM2 at {minutes:.0f} minutes of one thread each are {hours:,.0f} hours of one "
        f"worker, or {hours / WORKERS:,.0f} hours of {WORKERS} workers. Of that, scheduling and the model are "
        f"{100 * fixed / (60 * minutes + fixed):.1f} %. Through the object store go "
        f"{MANY * model['bytes'] / 1e12:.1f} TB in all, between nodes the model once per node.",
    ])  # fmt: skip
