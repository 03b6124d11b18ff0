"""Contrastive weight steering of language models.

    model = ws.load("pocket")
    direction = ws.Direction.load("out/pocket/sycophancy/lora/seed0/direction.safetensors")
    with ws.steer(model, direction, alpha=1.0):
        ...

The input is two opposite persona descriptions. The result is `dW = theta_pos - theta_neg`: signed, exact, exportable,
and measured (what it changes and what it damages). Modules are imported on first use, so `import ws` is fast.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

from ws.base.version import __version__

if os.environ.get("BEARTYPE") == "1":
    # check shapes and types of every annotated function at run time (smoke run and tests)
    from jaxtyping import install_import_hook

    from ws.base import shape_checks  # noqa: F401 - the hook looks it up by name

    install_import_hook("ws", "ws.base.shape_checks.check")

if TYPE_CHECKING:
    from ws.algebra.direction import Direction
    from ws.base.errors import UserError
    from ws.edit.condition import Condition, Context, Edit
    from ws.edit.steering import bake, steer
    from ws.fitting.stages import fit
    from ws.model.loading import ChatModel, load

_HOMES = {
    "ChatModel": "ws.model.loading",
    "Condition": "ws.edit.condition",
    "Context": "ws.edit.condition",
    "Direction": "ws.algebra.direction",
    "Edit": "ws.edit.condition",
    "UserError": "ws.base.errors",
    "bake": "ws.edit.steering",
    "fit": "ws.fitting.stages",
    "load": "ws.model.loading",
    "steer": "ws.edit.steering",
}

__all__ = [
    "ChatModel",
    "Condition",
    "Context",
    "Direction",
    "Edit",
    "UserError",
    "__version__",
    "bake",
    "fit",
    "load",
    "steer",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'ws' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
