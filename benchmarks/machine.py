"""The machine that a benchmark ran on, and the two limits that matter: matrix products and memory traffic.

Both are measured where models are loaded: on the CUDA device if there is one, else on the CPU.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from limits import Limits
from timing import seconds

from ws.base import precision

LIBRARIES = ("torch", "transformers", "peft", "trl", "mergekit", "repeng", "steering-vectors")
"""Libraries whose versions are recorded, if they are installed."""


def describe() -> dict[str, Any]:
    """Processor, device, threads, memory, library versions and measured limits."""
    return {
        "processor": _processor(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "bfloat16_is_fast": precision.bfloat16_is_fast(_device()),
        "gemm_gflops": gemm_peaks(),
        "bandwidth_gb_per_s": round(bandwidth(), 1),
        "versions": {"python": platform.python_version(), **dict(_versions())},
    }


def limits(described: Mapping[str, Any]) -> dict[str, Limits]:
    """The limits of a described machine by dtype."""
    return {
        dtype: Limits(gflops, described["bandwidth_gb_per_s"]) for dtype, gflops in described["gemm_gflops"].items()
    }


def gemm_peaks() -> dict[str, float]:
    """The limit of matrix products by name of dtype, GFLOP/s; smaller ones where bf16 is only emulated."""
    emulated = {} if precision.bfloat16_is_fast(_device()) else {"size": 512, "repeats": 2}
    return {
        "float32": round(gemm_peak(torch.float32), 1),
        "bfloat16": round(gemm_peak(torch.bfloat16, **emulated), 1),
    }


def gemm_peak(dtype: torch.dtype, size: int | None = None, repeats: int = 7) -> float:
    """Best of several square matrix products, GFLOP/s; larger ones where a device needs them to be busy."""
    size = size or (8192 if _device() == "cuda" else 1536)
    one, other = (torch.randn(size, size, device=_device()).to(dtype) for _ in range(2))
    return 2 * size**3 / _fastest(lambda: one @ other, repeats) / 1e9


def bandwidth(megabytes: int = 256, repeats: int = 7) -> float:
    """Best of several copies of a large tensor, GB/s read and written."""
    source = torch.ones(megabytes * 2**18, device=_device())
    target = torch.empty_like(source)
    return 2 * source.numel() * 4 / _fastest(lambda: target.copy_(source), repeats) / 1e9


def _fastest(work: Any, repeats: int) -> float:
    return min(seconds(work) for _ in range(repeats))


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _versions() -> Iterator[tuple[str, str]]:
    for name in LIBRARIES:
        with suppress(importlib.metadata.PackageNotFoundError):
            yield name, importlib.metadata.version(name)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")
