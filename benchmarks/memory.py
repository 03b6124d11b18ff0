"""Peak resident memory of one way of a comparison, in a process of its own."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

LOADED = "loaded"
"""The way that only loads the model: what the others are measured above."""
_STATUS = Path("/proc/self/status")


def peak_of(inputs: Path, comparison: str, way: str) -> float:
    """Start `run.py --one comparison:way` on stored inputs and read the MiB that it prints last."""
    command = [sys.executable, str(Path(__file__).with_name("run.py")), "--one", f"{comparison}:{way}",
               "--inputs", str(inputs)]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{comparison}:{way} failed in a process of its own:\n{done.stderr[-2000:]}")
    return float(done.stdout.split()[-1])


def own_peak() -> float:
    """The largest resident memory that this process has had, MiB.

    Linux counts the parent's pages at the time of the start in `ru_maxrss`, so its own high-water mark is read there.
    """
    if _STATUS.is_file():
        line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
