"""Engines that work through a list of tasks: one after the other here, or on a Ray cluster.

A task is a function and its arguments, so both engines run the same code. Nothing here knows models or runs.
"""

from ws.engines.local import Local
from ws.engines.tasks import Done, Engine, Task

__all__ = ["Done", "Engine", "Local", "Task"]
