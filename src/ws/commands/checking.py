"""Commands that check results: verify, reproduce."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from tyro.conf import Positional

from ws.base import console
from ws.base.errors import UserError


@dataclass(frozen=True)
class Verify:
    """Check a run, a direction, an adapter or a model: are the files as built, up to date, sound, and not empty?"""

    target: Positional[Path]
    """A run folder, a direction file, a PEFT adapter folder, a model folder, or a GGUF model."""
    model: str | None = None
    """Base model of a direction or an adapter, if the file does not name it, or names another place."""
    json: bool = False
    """Print the checks as JSON and nothing else."""

    def run(self) -> None:
        """Print one line per check; the first that fails ends the command with exit code 2."""
        from ws.runs import verify  # noqa: PLC0415

        if not self.target.exists():
            raise UserError(f"there is no {self.target}", "Give a run folder, or the path of a result.")
        checks = []
        for check in verify.verify(self.target, self.model):
            checks.append(check)
            console.say(f"{'ok' if check.passed else 'FAILED':<8}{check.name:<28}  {check.detail}")
        if self.json:
            console.print_json(json.dumps([asdict(check) for check in checks]))
        if not checks[-1].passed:
            raise UserError(f"{self.target} is not sound: {checks[-1].detail}", checks[-1].remedy)


@dataclass(frozen=True)
class Reproduce:
    """Run a finished run again in a new folder, with the settings that it stored, and compare both stage by stage."""

    path: Positional[Path]
    """Run folder."""
    out: Path | None = None
    """Folder for the new run. If left out: beside the folder of the run, with the ending -reproduced."""
    device: str | None = None
    """Where the model runs: auto, cpu, cuda or mps; the run's choice if left out."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. It holds for this command only and is never stored."""
    cache_memory: float = 1.0
    """Memory in GiB for hidden states that are reused; 0 recomputes them. It has no effect on results."""
    json: bool = False
    """Print the comparison as JSON and nothing else."""

    def run(self) -> None:
        """Run again and print one line per stage; a stage that differs makes the exit code 2."""
        from ws.runs import reproduce  # noqa: PLC0415

        device = {} if self.device is None else {"device": self.device}
        found = reproduce.reproduce(
            self.path, self.out, **device, trust_remote_code=self.trust_remote_code, cache_memory=self.cache_memory
        )
        if self.json:
            console.print_json(json.dumps({**asdict(found), "folder": str(found.folder)}))
        console.say()
        for stage in found.stages:
            inputs = f"   other inputs: {', '.join(stage.inputs)}" if stage.inputs else ""
            what = "identical" if stage.is_identical else f"DIFFERS   {', '.join(stage.outputs)}{inputs}"
            console.say(f"{stage.stage:<16}{what}")
        for stage_name in found.not_repeated:
            console.say(f"{stage_name:<16}not repeated: it is no part of a replication")
        for difference in found.environment:
            console.say(f"environment     {difference}")
        console.say(f"\nnew run     {found.folder}")
        if (first := found.first_difference) is not None:
            inputs = f", whose inputs {', '.join(first.inputs)} differ" if first.inputs else ""
            remedy = "Compare the environments above." if found.environment else ""
            raise UserError(f"the runs first differ at {first.stage}{inputs}: {', '.join(first.outputs)}", remedy)
        console.say(f"all {len(found.stages)} stages are bit-identical", style="bold")
