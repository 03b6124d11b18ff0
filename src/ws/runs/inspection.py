"""A finished run that is looked at and never built: which stages are out of date, and whether its files are sound.

The same code that builds a stage says what the stage depends on, so nothing has to be listed twice.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property, partial
from typing import Any

from ws.base.poles import POLES
from ws.base.store import StageResult, digest
from ws.eval.ability import Ability
from ws.report.findings import SUMMARY_FILE, read_summary
from ws.runs.replicate import Replication


class Inspection(Replication):
    """A run whose stages report what changed since they were built."""

    def changed(self, recorded: Mapping[str, Mapping[str, Any]]) -> dict[str, list[str]]:
        """Recorded stage -> names of its inputs that are not what they were when it was built."""
        self._changed: dict[str, list[str]] = {}
        ways: dict[str, Callable[[], object]] = {
            "personas": self.personas,
            "data": self.data,
            **{f"train-{pole}": partial(self.train, pole) for pole in POLES},
            "diff": self.diff,
            "eval": self.eval,
            "alignment": self.alignment,
            "samples": self.samples,
            "rounding": self.rounding,
            "replies": self.free_replies,
            "other-replies": self.other_claims,
        }
        for stage, ask in ways.items():
            if stage in recorded:
                ask()
        direction = self.folder / "direction.safetensors"
        for stage, record in recorded.items():
            if stage not in self._changed:  # a further measurement: only its direction is known here
                used = record["inputs"].get("direction")
                self._changed[stage] = ["direction"] if used is not None and used != digest(direction) else []
        return {stage: self._changed[stage] for stage in recorded}

    @cached_property
    def ability(self) -> Ability:
        """As stored in the summary, so that nothing is scored."""
        stored = self.folder / SUMMARY_FILE
        return read_summary(stored.parent).ability if stored.is_file() else super().ability

    def _build(self, stage: str, inputs: Mapping[str, Any], *_: object) -> StageResult:
        self._changed[stage] = self.folder.changed_inputs(stage, inputs)
        return StageResult(False, 0.0)

    def _record_settings(self) -> None:
        """Nothing is written."""

    def _say(self, stage: str, result: StageResult, text: str) -> None:
        """Nothing was done, so nothing is said."""

    def _warn(self, text: str) -> None:
        """The run has told its warnings."""
