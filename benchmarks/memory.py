"""Peak memory of one way of a comparison, in a separate process: resident memory, or on a CUDA device its memory."""

from __future__ import annotations

import resource
import subprocess
import sys
from functools import cache
from pathlib import Path

LOADED = "loaded"
"""The way that only loads the model: the baseline of the others."""
_STATUS = Path("/proc/self/status")


def peak_of(inputs: Path, comparison: str, way: str) -> float:
    """Start `run.py --one comparison:way` on stored inputs and read the MiB that it prints last."""
    command = [sys.executable, str(Path(__file__).with_name("run.py")), "--one", f"{comparison}:{way}",
               "--inputs", str(inputs)]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{comparison}:{way} failed in its process:\n{done.stderr[-2000:]}")
    return float(done.stdout.split()[-1])


@cache
def loaded_peak(inputs: Path) -> float:
    """MiB of a process that only loads the model of these inputs."""
    return peak_of(inputs, "scoring", LOADED)


def own_peak() -> float:
    """The largest memory that this process has had, MiB: on a CUDA device its memory, else resident memory.

    torch is used only if already imported: its import takes memory. Linux counts the parent's pages at the
    time of the start in `ru_maxrss`, so a process's own high-water mark is read where that is left out.
    """
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    if _STATUS.is_file():
        line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
