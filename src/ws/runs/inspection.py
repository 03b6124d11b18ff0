"""A finished run that is looked at and never built: which stages are out of date, and whether its files are sound.

The same code that builds a stage says what the stage depends on, so nothing has to be listed twice.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

from ws.base import console
from ws.base.errors import UserError
from ws.base.files import digest
from ws.base.store import StageResult
from ws.eval.ability import Ability
from ws.report.findings import SUMMARY_FILE, read_summary
from ws.runs.replicate import Replication


class Inspection(Replication):
    """A run whose stages report what changed since they were built."""

    def changed(self, recorded: Mapping[str, Mapping[str, Any]]) -> dict[str, list[str]]:
        """Recorded stage -> names of its inputs that are not what they were when it was built.

        Raises `UserError` for a stage that the run needs and does not have.
        """
        self._changed: dict[str, list[str]] = {}
        self._recorded = recorded
        self.fitted  # noqa: B018 - asks every stage up to the direction
        for ask in (self.eval, self.alignment, self.samples, self.rounding, self.free_replies, self.other_claims):
            ask()
        direction = self.folder / "direction.safetensors"
        for stage, record in recorded.items():
            if stage not in self._changed:  # a further measurement: only its direction is known here
                used = record["inputs"].get("direction")
                self._changed[stage] = ["direction"] if used is not None and used != digest(direction) else []
        return {stage: self._changed[stage] for stage in recorded}

    def personas(self) -> Mapping[str, float]:
        """Not asked in a run that is older than this stage."""
        return super().personas() if "personas" in self._recorded else {}

    @cached_property
    def ability(self) -> Ability:
        """As stored in the summary, so that nothing is scored."""
        if not (self.folder / SUMMARY_FILE).is_file():
            raise self._unfinished(f"{self.folder / SUMMARY_FILE} is missing")
        return read_summary(self.folder.path).ability

    def _unfinished(self, problem: str) -> UserError:
        return UserError(problem, f"Continue with: {console.command('report', self.folder.path)}")

    def _build(self, stage: str, inputs: Mapping[str, Any], *_: object) -> StageResult:
        if stage not in self._recorded:
            raise self._unfinished(f"{stage} is not finished")
        self._changed[stage] = self.folder.changed_inputs(stage, inputs)
        return StageResult(False, 0.0)

    def _record_settings(self) -> None:
        """Nothing is written."""

    def _say(self, stage: str, result: StageResult, text: str) -> None:
        """Nothing was done, so nothing is said."""

    def _warn(self, text: str) -> None:
        """The run has told its warnings."""
