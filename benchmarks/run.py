"""Ours and the peers on the same work, in one run, on this machine.

    python benchmarks/run.py            # pocket and SmolLM2-135M: benchmarks/results.json and docs/performance.md
    python benchmarks/run.py --quick    # pocket, less work and one repetition; prints the tables, writes nothing else
    python benchmarks/run.py --models pocket qwen3-1.7b-shape --skip sweeping pipeline growth
    python benchmarks/run.py --models out/pocket/sycophancy/lora/seed0   # a run: algebra and activation steering

Every row names what was compared and what it should reach. No number is a promise: ratios hold for the machine that is
described above them. What is skipped keeps its earlier numbers where they are of the same machine and versions; numbers
of other machines stay beside those of this one.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import aims
import fixed_costs
import growth
import machine
import memory
import opening
import page
import plan
import results
import spending
import workload
from activations import Activations
from algebra import Algebra
from comparison import Comparison
from fast_paths import FastPaths
from generating import Generating
from inputs import Inputs, is_run
from pipeline import EndToEnd
from scoring import Scoring
from sweeping import Sweeping
from training import Training

from ws.base import console
from ws.base.files import read_json, write_json

RESULTS = Path(__file__).parent / "results.json"
COMPARISONS: dict[str, type[Comparison]] = {
    kind.name: kind for kind in (Scoring, Training, Sweeping, Generating, Algebra, Activations, EndToEnd, FastPaths)
}
OTHER_PARTS = ("spending", "growth", "fixed")
MODELS = (aims.POCKET, aims.REAL)


def default_models(quick: bool) -> Sequence[str]:
    """Both sizes that have aims; the small one to see whether the harness runs."""
    return MODELS[:1] if quick else MODELS


def measure(name: str, quick: bool, skipped: list[str], described: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The numbers for one model, part by part, each as `results.json` holds it."""
    chosen = workload.choose(name, quick, is_run(name))
    limits = machine.limits(described)
    with tempfile.TemporaryDirectory() as scratch:
        inputs = Inputs.make(name, chosen, Path(scratch))
        for kind in workload.without(chosen.comparisons, skipped):
            started = time.perf_counter()
            rows = COMPARISONS[kind](inputs, limits).rows()
            sys.stderr.write(f"{kind}, {name}: {time.perf_counter() - started:.0f} s in all\n")
            yield {"machine": described, "rows": [{"comparison": kind, **one.as_record()} for one in rows]}
        if "spending" not in skipped:
            for kind in workload.without(chosen.comparisons, skipped):
                found = [one.as_record() for one in COMPARISONS[kind](inputs).spending()]
                yield {"machine": described, "rows": [], "spending": found}
        if chosen.growth and "growth" not in skipped:
            yield {"machine": described, "rows": [], "growth": [one.as_record() for one in growth.measure(inputs)]}
        if chosen.fixed_repeats and "fixed" not in skipped:
            costs = fixed_costs.measure(inputs.model, chosen.fixed_repeats)
            yield {"machine": described, "rows": [], "fixed": [one.as_record() for one in costs]}


def tables(record: Mapping[str, Any]) -> dict[str, str]:
    """Every generated part of the page, by the name of its mark."""
    parts = {
        "opening": opening.as_table(record["rows"]),
        "measured": results.as_text(record),
        "plan": plan.as_table(),
    }
    for name, table in (("spending", spending.as_table), ("fixed", fixed_costs.as_table), ("growth", growth.as_table)):
        if name in record:
            parts[name] = table(record[name])
    return parts


def run_one(name: str, inputs: Path) -> None:
    """One way in this process: `comparison:way`; its peak memory is printed.

    The libraries of all ways are loaded first, so that their code does not count.
    """
    import datasets  # noqa: F401, PLC0415 - only here
    import trl  # noqa: F401, PLC0415

    kind, way = name.split(":", 1)
    chosen = COMPARISONS[kind](Inputs.read(inputs)).way(way)
    (chosen.for_peak or chosen.work)()
    sys.stdout.write(f"\n{memory.own_peak():.1f}\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="less work, one repetition, nothing written")
    parser.add_argument("--models", nargs="+", help="embedded models, shapes, model folders, or runs (default: "
                        f"{' '.join(MODELS)}; with --quick {MODELS[0]})")  # fmt: skip
    parser.add_argument("--skip", nargs="+", default=[], choices=[*COMPARISONS, *OTHER_PARTS], metavar="NAME",
                        help=f"leave out some of: {', '.join([*COMPARISONS, *OTHER_PARTS])}")  # fmt: skip
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--inputs", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    with console.quiet():
        if given.one:
            run_one(given.one, given.inputs)
        else:
            run_all(given)


def run_all(given: argparse.Namespace) -> None:
    """Every part for every model; what is finished is written after each."""
    described = machine.describe()
    record: dict[str, Any] = {"machine": described, "rows": []}
    if not given.quick and RESULTS.is_file():
        record = results.merged(read_json(RESULTS), record)
    for name in given.models or default_models(given.quick):
        for part in measure(name, given.quick, given.skip, described):
            record = results.merged(record, part)
            if not given.quick:  # after every part: a full run takes long
                write_json(RESULTS, record)
    parts = tables(record)
    sys.stdout.write("\n\n".join(parts.values()) + "\n")
    if not given.quick:
        for mark, content in parts.items():
            page.write(mark, content)


if __name__ == "__main__":
    main()
