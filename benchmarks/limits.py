"""The roofline: the least operations and bytes of a piece of work, and the least seconds on this machine.

    least seconds = max(operations / GEMM peak, bytes / memory bandwidth)

The larger of the two is the limit that binds. Operations are counted in `flops.py`, bytes in `traffic.py`; both leave
out what depends on how the work is done, so a share of the limit is a lower bound.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

GEMM, MEMORY = "GEMM", "memory"


@dataclass(frozen=True)
class Need:
    """Floating-point operations in matrix products, and bytes read or written, that every implementation needs."""

    flops: float = 0.0
    bytes: float = 0.0


class Least(NamedTuple):
    """The least seconds, and the limit that binds."""

    seconds: float
    limit: str


@dataclass(frozen=True)
class Limits:
    """What was measured on this machine: GFLOP/s of large products in the dtype of the model, and GB/s."""

    gflops: float
    gb_per_s: float

    def least(self, need: Need) -> Least:
        """The least seconds of any implementation."""
        return max(Least(need.flops / self.gflops / 1e9, GEMM), Least(need.bytes / self.gb_per_s / 1e9, MEMORY))
