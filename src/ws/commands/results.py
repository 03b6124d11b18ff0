"""Commands for finished runs: export, report, show."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from tyro.conf import Positional

from ws.base import console
from ws.base.errors import UserError
from ws.commands.options import Attention, Dtype
from ws.commands.stages import finish

if TYPE_CHECKING:
    from ws.fitting.run_settings import Settings


@dataclass(frozen=True)
class Export:
    """Write a direction in a format that other programs can load, with a model card."""

    source: Positional[Path]
    """A run folder, or a direction file. With --format gguf also a model folder or an embedded model."""
    format: Literal["peft", "merged", "gguf-lora", "gguf"] = "peft"
    """peft: an adapter folder for PEFT. merged: a whole checkpoint. For llama.cpp: gguf-lora is a GGUF LoRA, gguf a
    whole model."""
    alpha: float = 1.0
    """Strength to export."""
    rank: int | None = None
    """Truncate every update to this rank. Needed for updates that are not low-rank. The kept energy is reported."""
    fold: bool = True
    """Multiply the strength into the weights of the adapter. With --no-fold it is stored as the adapter's scale."""
    gguf_type: Literal["f16", "f32"] = "f16"
    """Numbers of the matrices in a whole GGUF model."""
    model: str | None = None
    """Base model; the run's own if left out."""
    out: Path | None = None
    """Where to write. If left out: next to the source, named after format and strength."""
    json: bool = False
    """Print the record as JSON and nothing else."""

    def run(self) -> None:
        """Export, measure the error, and print the path."""
        from ws.export import command  # noqa: PLC0415

        record, target = command.export(
            self.source, self.format, alpha=self.alpha, rank=self.rank, fold=self.fold, gguf_type=self.gguf_type,
            model=self.model, out=self.out,
        )  # fmt: skip
        if self.json:
            console.print_json(json.dumps(record))
            return
        exact = "exact" if record.get("exact", True) else f"keeps {100 * record['energy_kept']:.2f} % of |dW|^2"
        error = f", largest logit error {record['logit_error']['max']:.2g}" if "logit_error" in record else ""
        console.say(f"{self.format} at alpha {record['alpha']:+g}: {exact}{error}\nwritten     {target}")


@dataclass(frozen=True)
class Report:
    """Write the summary and the report of existing runs again. Stages that are missing are run first. Several runs are
    also compared on one page."""

    runs: Positional[tuple[Path, ...]]
    """Run folders."""
    dtype: Dtype | None = None
    """Number format of the weights; the run's if left out."""
    device: str | None = None
    """Where the model runs: auto, cpu, cuda or mps; the run's choice if left out."""
    attention: Attention | None = None
    """How attention is computed; the run's choice if left out."""
    revision: str | None = None
    """Branch, tag or commit of a hub model; the run's if left out."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. It holds for this command only and is never stored."""
    cache_memory: float = 1.0
    """Memory in GiB for hidden states that are reused; 0 recomputes them. It has no effect on results."""
    json: bool = False
    """Print the summaries as JSON, one per line, and nothing else."""

    def run(self) -> None:
        """Rebuild what is missing, print each headline, and compare several runs."""
        from ws.report import several_runs, terminal  # noqa: PLC0415
        from ws.report.story import Story  # noqa: PLC0415
        from ws.runs.replicate import Replication  # noqa: PLC0415

        if not self.runs:
            raise UserError("no run folder is given", "Give one or more: ws report out/pocket/sycophancy/lora/seed0")
        for path in self.runs:
            with Replication(self._settings(path)) as run:
                finish(run, run.report(), self.json)
        if len(self.runs) > 1:
            stories = [Story.read(path) for path in self.runs]
            page = several_runs.write(stories)
            if not self.json:
                terminal.show_several(stories)
                console.say(f"\ntogether    {page}")

    def _settings(self, path: Path) -> Settings:
        """The settings of the run in a folder, overridden by the options."""
        from ws.fitting.run_settings import settings_of  # noqa: PLC0415

        chosen = {
            name: value for name in ("dtype", "device", "attention", "revision") if (value := getattr(self, name))
        }
        return settings_of(path, **chosen, trust_remote_code=self.trust_remote_code, cache_memory=self.cache_memory)


@dataclass(frozen=True)
class Show:
    """Print the results of a finished run."""

    path: Positional[Path]
    """Run folder."""
    json: bool = False
    """Print the summary as JSON and nothing else."""

    def run(self) -> None:
        """Print headline, strengths and samples."""
        from ws.base.files import read_json  # noqa: PLC0415
        from ws.report import terminal  # noqa: PLC0415

        if not (self.path / "config.json").is_file():
            raise UserError(
                f"{self.path} is not a run folder", "Give a folder such as out/pocket/sycophancy/lora/seed0."
            )
        if not (self.path / "summary.json").is_file():
            remedy = f"Continue it with: {console.command('report', self.path)}"
            raise UserError(f"the run in {self.path} is not finished", remedy)
        if self.json:
            read_json(self.path / "summary.json", f"Write it again with: {console.command('report', self.path)}")
            console.print_json((self.path / "summary.json").read_text(encoding="utf-8").strip())
        else:
            terminal.show_run(self.path)
