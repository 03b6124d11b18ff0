"""Blocks of checks and timings: the support matrix, and a pipeline at the shape of a real model."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

from ws.model import loading

TESTS = Path(__file__).parents[2] / "tests"


def families() -> str:
    """The support matrix, from the check of small random models in the tests."""
    sys.path.insert(0, str(TESTS))
    from families import support_matrix  # noqa: PLC0415 - lives with the tests
    from ws.pocket import tiny  # noqa: PLC0415

    networks = {}
    with tempfile.TemporaryDirectory() as scratch:
        for name in (*tiny.ARCHITECTURES, "mistral", "phi3", "gpt-neox", "qwen3-moe"):
            tiny.make(name, Path(scratch) / name, layers=4)
            networks[name] = loading.load(str(Path(scratch) / name)).network
    return support_matrix(networks)


def shape_table(result: dict[str, Any]) -> str:
    stages = "\n".join(f"| {name} | {seconds:.0f} |" for name, seconds in result["seconds"].items())
    return (
        f"{result['parameters']:,} random parameters in {result['dtype']}, {result['grid']}. Whole process "
        f"{result['wall_seconds']:.0f} s, peak memory {result['peak_gib']:.1f} GiB, run folder "
        f"{result['folder_mib']:.0f} MiB.\n\n| stage | seconds |\n|---|---|\n{stages}"
    )
