"""Find out whether bfloat16 is fast on this machine.

A CPU without bfloat16 instructions emulates them, ten to a thousand times slower than float32, without a warning from
the library. CPU names and flags are not reliable, so one small product is timed, once per process.
"""

from __future__ import annotations

import time
from functools import cache

import torch

_SIZE = 192
_SLOWER = 2.0
"""bfloat16 counts as emulated if a product takes at least this many times as long as in float32."""


@cache
def bfloat16_is_fast(device_type: str = "cpu") -> bool:
    """Whether a matrix product in bfloat16 takes less than twice the time of float32; accelerators count as fast."""
    if device_type != "cpu":
        return True
    return _seconds(torch.bfloat16) < _SLOWER * _seconds(torch.float32)


def _seconds(dtype: torch.dtype) -> float:
    """The shortest time of a few products, after a first one that sets up the kernels."""
    factor = torch.ones(_SIZE, _SIZE, dtype=dtype)
    times = []
    for _ in range(4):
        started = time.perf_counter()
        torch.mm(factor, factor)
        times.append(time.perf_counter() - started)
    return min(times[1:])
