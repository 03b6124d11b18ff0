"""The machine that a benchmark ran on, and the two limits that matter: matrix products and memory traffic."""

from __future__ import annotations

import os
import platform
import time
from pathlib import Path
from typing import Any

import torch

from ws import precision


def describe() -> dict[str, Any]:
    """Processor, threads, memory, library versions and measured limits."""
    import peft  # noqa: PLC0415
    import transformers  # noqa: PLC0415

    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "bfloat16_is_fast": precision.bfloat16_is_fast(),
        "gemm_gflops": gemm_peaks(),
        "bandwidth_gb_per_s": round(bandwidth(), 1),
        "versions": {
            "python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__,
            "peft": peft.__version__,
        },
    }  # fmt: skip


def gemm_peaks() -> dict[str, float]:
    """The limit of matrix products by name of dtype, GFLOP/s; smaller ones where bf16 is only emulated."""
    emulated = {} if precision.bfloat16_is_fast() else {"size": 512, "repeats": 2}
    return {
        "float32": round(gemm_peak(torch.float32), 1),
        "bfloat16": round(gemm_peak(torch.bfloat16, **emulated), 1),
    }


def gemm_peak(dtype: torch.dtype, size: int = 1536, repeats: int = 7) -> float:
    """Best of several square matrix products, GFLOP/s."""
    one, other = (torch.randn(size, size).to(dtype) for _ in range(2))
    return 2 * size**3 / _fastest(lambda: one @ other, repeats) / 1e9


def bandwidth(megabytes: int = 256, repeats: int = 7) -> float:
    """Best of several copies of a large tensor, GB/s read and written."""
    source = torch.ones(megabytes * 2**18)
    target = torch.empty_like(source)
    return 2 * source.numel() * 4 / _fastest(lambda: target.copy_(source), repeats) / 1e9


def _fastest(work: Any, repeats: int) -> float:
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return min(times)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")
