"""What every command costs before it does anything: seconds of processes of their own."""

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

from ws.data import Grid
from ws.replicate import Replication
from ws.run_settings import Settings


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
    """Bare interpreter, imports, help, the tables of a finished run, and loading the model."""
    with tempfile.TemporaryDirectory() as scratch:
        settings = Settings(
            model=model, out=Path(scratch), grid=Grid(topics=4, personas=1, samples=4), rows=4, samples=1,
            control_seeds=1, alphas=(-1.0, 0.0, 1.0),
        )  # fmt: skip
        with Replication(settings) as run:
            run.report()
            folder = str(run.folder.path)
        commands = {
            "bare interpreter": ["-c", "pass"],
            "import ws.cli": ["-c", "import ws.cli"],
            "ws --help": ["-m", "ws", "--help"],
            "ws show, a finished run": ["-m", "ws", "show", folder],
            f"import and load {model}": ["-c", f"from ws import models; models.load({model!r})"],
        }
        return [_cost(what, arguments, repeats) for what, arguments in commands.items()]


def as_table(records: Sequence[Mapping[str, Any]]) -> str:
    """Records of costs as a Markdown table."""
    lines = ["| fixed cost | s |", "|---|---|"]
    for one in records:
        low, high = one["range"]
        lines.append(f"| {one['what']} | {one['seconds']:.2f} ({low:.2f}-{high:.2f}) |")
    return "\n".join(lines)


def _cost(what: str, arguments: Sequence[str], repeats: int) -> Cost:
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        subprocess.run([sys.executable, *arguments], capture_output=True, check=True)
        times.append(time.perf_counter() - started)
    return Cost(what, statistics.median(times), (min(times), max(times)))
