"""Tasks with names, what became of them, and what an engine is."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

Shared = Mapping[str, Callable[[], Any]]
"""Large values that many tasks need, such as a loaded model, by name; each is made when it is first needed."""


@dataclass(frozen=True)
class Task:
    """Calls `function(shared value, *arguments, *values of the tasks in after)`; the value of a failed task is None.

    `function` must be importable by its name where the task runs. `needs` names the shared value. Tasks in `after` end
    before this one starts, whether or not they succeed; they stand earlier in the list.
    """

    name: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...] = ()
    needs: str = ""
    after: tuple[str, ...] = ()


@dataclass(frozen=True)
class Done:
    """A finished task with its value, or with the error that ended its last attempt."""

    task: Task
    value: Any = None
    error: str = ""
    attempts: int = 1


@runtime_checkable
class Engine(Protocol):
    """Works through tasks."""

    def run(self, tasks: Sequence[Task], shared: Shared) -> Iterator[Done]:
        """The tasks in the order in which they end. Failed ones are reported, and the others go on."""
        ...


def ended(task: Task, done: Mapping[str, Done]) -> bool:
    """Whether everything that goes before a task has ended."""
    return all(name in done for name in task.after)


def values_before(task: Task, done: Mapping[str, Done]) -> list[Any]:
    """The values of the tasks that go before a task."""
    return [done[name].value for name in task.after]
