"""What is done with a finished run: export, report, show."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tyro.conf import Positional

from ws.base import console
from ws.base.errors import UserError
from ws.commands.stages import finish


@dataclass(frozen=True)
class Export:
    """Write a direction in a format that other programs load, with a model card."""

    source: Positional[Path]
    """Run folder, or a direction file."""
    format: Literal["peft", "merged", "gguf-lora"] = "peft"
    """PEFT adapter folder, merged checkpoint, or GGUF LoRA for llama.cpp."""
    alpha: float = 1.0
    """Strength that is exported."""
    rank: int | None = None
    """Cut every update to this rank by its singular values (needed where it is not low-rank)."""
    fold: bool = True
    """Multiply alpha into the factors; otherwise it stays the adapter's scale."""
    model: str | None = None
    """Base model (default: the run's)."""
    out: Path | None = None
    """Where to write (default: beside the run, named after format and alpha)."""
    json: bool = False
    """Print the record as JSON and nothing else."""

    def run(self) -> None:
        """Export, measure, and say where it is."""
        from ws.export import command  # noqa: PLC0415

        record, target = command.export(
            self.source, self.format, alpha=self.alpha, rank=self.rank, fold=self.fold, model=self.model, out=self.out
        )
        if self.json:
            console.print_json(json.dumps(record))
            return
        exact = "exact" if record.get("exact", True) else f"keeps {100 * record['energy_kept']:.2f} % of |dW|^2"
        error = f", largest logit error {record['logit_error']['max']:.2g}" if "logit_error" in record else ""
        console.say(f"{self.format} at alpha {self.alpha:+g}: {exact}{error}\nwritten     {target}")


@dataclass(frozen=True)
class Report:
    """Write summary and report of existing runs anew."""

    runs: Positional[tuple[Path, ...]]
    """Run folders."""
    json: bool = False
    """Print the summaries as JSON, one per line, and nothing else."""

    def run(self) -> None:
        """Rebuild what is missing and print each headline."""
        from ws.fitting.run_settings import restore_settings  # noqa: PLC0415
        from ws.runs.replicate import Replication  # noqa: PLC0415

        for path in self.runs:
            stored = _stored_config(path)
            # <out>/<model>/<behaviour>/<adapter>/seed<k>
            settings = restore_settings(stored["settings"], path.resolve().parents[3])
            with Replication(settings) as run:
                finish(run, run.report(), self.json)


@dataclass(frozen=True)
class Show:
    """Print what a run found, from its summary."""

    path: Positional[Path]
    """Run folder."""
    json: bool = False
    """Print the summary as JSON and nothing else."""

    def run(self) -> None:
        """Print headline, strengths and samples."""
        from ws.report import terminal  # noqa: PLC0415

        _stored_config(self.path)
        if not (self.path / "summary.json").is_file():
            raise UserError(f"the run in {self.path} is not finished", f"Continue it with: ws report {self.path}")
        if self.json:
            console.print_json((self.path / "summary.json").read_text(encoding="utf-8").strip())
        else:
            terminal.show_run(self.path)


def _stored_config(path: Path) -> dict[str, Any]:
    from ws.base.store import read_json  # noqa: PLC0415

    if not (path / "config.json").is_file():
        raise UserError(f"{path} is not a run folder", "Give a folder such as out/pocket/sycophancy/lora/seed0.")
    return dict(read_json(path / "config.json"))
