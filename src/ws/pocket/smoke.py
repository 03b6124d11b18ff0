"""The whole pipeline on a tiny random model, to see that every part runs. Its numbers mean nothing."""

from __future__ import annotations

import tempfile
from pathlib import Path

from ws.fitting.data import Grid
from ws.fitting.run_settings import Settings
from ws.pocket import tiny
from ws.report.findings import Summary
from ws.runs.replicate import Replication


def run(architecture: str, out: Path | None = None) -> Summary:
    """Make the model, replicate on it with a small grid, and return the summary."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / f"tiny-{architecture}"
        tiny.make(architecture, folder)
        settings = Settings(
            model=str(folder),
            out=out or Path(scratch) / "out",
            grid=Grid(topics=3, personas=2, samples=4),
            train={"rank": 4, "lora_alpha": 8, "lr": 5e-3, "epochs": 2, "batch_size": 8},
            alphas=(-1.0, 0.0, 1.0),
            control_seeds=2,
            rows=12,
            samples=2,
        )
        with Replication(settings) as replication:
            return replication.report()
