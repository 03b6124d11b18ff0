"""Seconds that every command takes before its work starts, measured in separate processes."""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ws.fitting.data import Grid
from ws.fitting.run_settings import Settings
from ws.runs.replicate import Replication

LEAST = "`ws replicate` with 4 pairs and 4 rows a probe, in a running process, once"
"""The main job with almost no work."""
HELP, SHOW = "ws --help", "ws show, a finished run"
MOST_SECONDS = {HELP: 0.5, SHOW: 2.0}


@dataclass(frozen=True)
class Cost:
    """Median seconds of one kind of process with (min, max)."""

    what: str
    seconds: float
    range: tuple[float, float]

    def as_record(self) -> dict[str, Any]:
        """Plain data for `results.json`."""
        return asdict(self)


def measure(model: str, repeats: int) -> list[Cost]:
    """Bare interpreter, imports, help, the tables of a finished run, loading the model, and the least replication."""
    with tempfile.TemporaryDirectory() as scratch:
        settings = Settings(
            model=model, out=Path(scratch), grid=Grid(topics=4, personas=1, samples=4), rows=4, samples=1,
            control_seeds=1, alphas=(-1.0, 0.0, 1.0),
        )  # fmt: skip
        started = time.perf_counter()
        with Replication(settings) as run:
            stages = run.report().seconds
            folder = str(run.folder.path)
        almost_empty = {LEAST: time.perf_counter() - started} | {f"of that: {name}": s for name, s in stages.items()}
        commands = {
            "bare interpreter": ["-c", "pass"],
            "import ws.commands.cli": ["-c", "import ws.commands.cli"],
            HELP: ["-m", "ws", "--help"],
            SHOW: ["-m", "ws", "show", folder],
            f"import and load {model}": ["-c", f"import ws; ws.load({model!r})"],
        }
        costs = [_cost(what, arguments, repeats) for what, arguments in commands.items()]
        return [*costs, *(Cost(what, spent, (spent, spent)) for what, spent in almost_empty.items())]


def as_table(records: Sequence[Mapping[str, Any]]) -> str:
    """Records of costs as a Markdown table."""
    lines = ["| fixed cost | s | aim |", "|---|---|---|"]
    for one in records:
        (low, high), most = one["range"], MOST_SECONDS.get(one["what"])
        aim = "" if most is None else f"<= {most:g} {'reached' if one['seconds'] <= most else '**missed**'}"
        lines.append(f"| {one['what']} | {one['seconds']:.2f} ({low:.2f}-{high:.2f}) | {aim} |")
    return "\n".join(lines)


def _cost(what: str, arguments: Sequence[str], repeats: int) -> Cost:
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        subprocess.run([sys.executable, *arguments], capture_output=True, check=True)
        times.append(time.perf_counter() - started)
    return Cost(what, statistics.median(times), (min(times), max(times)))
