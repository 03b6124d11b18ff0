"""One task after the other, in this process."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ws.base import console
from ws.base.errors import UserError
from ws.engines.tasks import Done, Shared, Task, values_before


@dataclass(frozen=True)
class Local:
    """Runs tasks in their order. A `UserError` is a failed task; anything else is a bug and ends the run."""

    def run(self, tasks: Sequence[Task], shared: Shared) -> Iterator[Done]:
        """See `Engine.run`. One shared value is kept at a time."""
        done: dict[str, Done] = {}
        name, value = "", None
        for number, task in enumerate(tasks):
            console.say(f"\n[{number + 1}/{len(tasks)}] {task.name}", style="bold")
            if task.needs != name:
                value = None  # free the old one before the next is made
                name, value = task.needs, shared[task.needs]()
            try:
                done[task.name] = Done(task, task.function(value, *task.arguments, *values_before(task, done)))
            except UserError as error:
                done[task.name] = Done(task, error=str(error))
            yield done[task.name]
