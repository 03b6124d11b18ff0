"""Ours and the peers on the same work, in one run, on this machine.

    python benchmarks/run.py            # full table: benchmarks/results.json and docs/performance.md
    python benchmarks/run.py --quick    # less work and one repetition; prints the table, writes nothing else

Every row names what was compared. No number is a promise: ratios hold for the machine that is described above them.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import algebra
import generating
import machine
import scoring
import training
from timing import Row

from ws.data import Grid
from ws.replicate import Replication
from ws.run_settings import Settings
from ws.store import write_json

HERE = Path(__file__).parent
RESULTS, PAGE = HERE / "results.json", HERE.parent / "docs" / "performance.md"
MARK = "<!-- measured -->"


def measure(model: str, quick: bool, described: dict[str, Any]) -> list[Row]:
    """All lines for one model."""
    repeats = 1 if quick else 5
    with tempfile.TemporaryDirectory() as scratch:
        grid = Grid(topics=6, personas=2, samples=3) if quick else Grid(samples=10)
        with Replication(Settings(model=model, out=Path(scratch), grid=grid)) as run:
            direction, pairs = run.diff()[0], run.data()
    peak = described["gemm_gflops_float32"]
    rows = scoring.compare(model, direction, 48 if quick else 10_000, repeats, peak)
    rows += training.compare(model, pairs, repeats)
    rows += generating.compare(model, 10 if quick else 200, 4 if quick else 10, repeats)
    return rows + algebra.compare(model, repeats)


def as_table(rows: Sequence[Row]) -> str:
    """The lines as a Markdown table."""
    lines = ["| work | size | ours, s | peer | peer, s | ratio | share of GEMM peak |", "|---|---|---|---|---|---|---|"]
    for one in rows:
        share = "" if one.share_of_limit is None else f"{one.share_of_limit:.2f}"
        note = f" ({one.note})" if one.note else ""
        lines.append(
            f"| {one.work}{note} | {one.size} | {_seconds(one.ours, one.ours_range)} | {one.peer} | "
            f"{_seconds(one.theirs, one.theirs_range)} | {one.ratio:.2f} | {share} |"
        )
    return "\n".join(lines)


def _seconds(median: float, limits: tuple[float, float]) -> str:
    return f"{median:.3g} ({limits[0]:.3g}-{limits[1]:.3g})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="less work, one repetition, nothing written")
    parser.add_argument("--models", nargs="+", default=["pocket"], help="embedded models or model folders")
    given = parser.parse_args()
    described = machine.describe()
    rows = [one for model in given.models for one in measure(model, given.quick, described)]
    table = as_table(rows)
    sys.stdout.write(f"{json.dumps(described, indent=1)}\n\n{table}\n")
    if not given.quick:
        write_json(RESULTS, {"machine": described, "rows": [one.as_record() for one in rows]})
        page = PAGE.read_text(encoding="utf-8").split(MARK)
        facts = "\n".join(f"- {name.replace('_', ' ')}: {value}" for name, value in described.items())
        PAGE.write_text(f"{page[0]}{MARK}\n{facts}\n\n{table}\n{MARK}{page[2]}", encoding="utf-8")


if __name__ == "__main__":
    main()
