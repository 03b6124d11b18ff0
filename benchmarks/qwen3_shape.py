"""Run the pipeline on a random model of Qwen3-0.6B's exact shape with a tiny grid; write time and peak memory.

    python benchmarks/qwen3_shape.py docs/results/qwen3-0.6b-shape.json

The model is made here (nothing is downloaded): 28 layers, width 1024, 16 query and 8 key-value heads of 128,
feed-forward 3072, 151,936 tokens, tied embeddings. Its results mean nothing; its cost equals that of the real model.
"""

from __future__ import annotations

import json
import resource
import sys
import tempfile
import time
from pathlib import Path

import shapes
import torch

from ws.base import console
from ws.base.files import write_json
from ws.fitting.data import Grid
from ws.fitting.run_settings import Settings
from ws.runs.replicate import Replication

GRID = Grid(topics=2, personas=1, samples=4)
ROWS = 6


def main(target: Path) -> None:
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "qwen3-0.6b-shape"
        shapes.make(shapes.SHAPES["qwen3-0.6b-shape"], folder, torch.bfloat16)
        made = time.perf_counter()
        settings = Settings(
            model=str(folder), out=Path(scratch) / "out", grid=GRID, sampling={"max_new_tokens": 16},
            alphas=(-1.0, 0.0, 1.0), control_seeds=1, rows=ROWS, samples=1,
        )  # fmt: skip
        with Replication(settings) as run:
            summary = run.report()
            size = sum(file.stat().st_size for file in run.folder.path.rglob("*") if file.is_file())
            model = run.model
        write_json(target, {
            "parameters": model.parameter_count,
            "dtype": str(model.dtype).removeprefix("torch."),
            "grid": f"{GRID.topics} topics x {GRID.personas} persona x {GRID.samples} samples of 16 tokens, "
                    f"{ROWS} rows per probe, alphas -1 0 1, one random control",
            "seconds": {"make the model": made - started, **summary.seconds},
            "wall_seconds": time.perf_counter() - started,
            "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
            "folder_mib": size / 2**20,
        })  # fmt: skip
    console.say(json.dumps(json.loads(target.read_text()), indent=1))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
