"""Contrastive weight steering of language models.

    model = ws.load("pocket")
    direction = ws.Direction.load("out/pocket/sycophancy/lora/seed0/direction.safetensors")
    with ws.steer(model, direction, alpha=1.0):
        ...

Two opposite persona descriptions go in; `dW = theta_pos - theta_neg` comes out: signed, exact and exportable, with
evidence of what it moves and what it breaks. Everything is imported on first use, so `import ws` is instant.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if os.environ.get("BEARTYPE") == "1":
    # shapes and types of every annotated function are checked at run time (smoke run and tests)
    from jaxtyping import install_import_hook

    from ws import shape_checks  # noqa: F401 - the hook looks it up by name

    install_import_hook("ws", "ws.shape_checks.check")

if TYPE_CHECKING:
    from ws.condition import Condition, Context, Edit
    from ws.direction import Direction
    from ws.errors import UserError
    from ws.fitting import fit
    from ws.models import ChatModel, load
    from ws.steering import bake, steer

_HOMES = {
    "ChatModel": "ws.models",
    "Condition": "ws.condition",
    "Context": "ws.condition",
    "Direction": "ws.direction",
    "Edit": "ws.condition",
    "UserError": "ws.errors",
    "bake": "ws.steering",
    "fit": "ws.fitting",
    "load": "ws.models",
    "steer": "ws.steering",
}

__all__ = [
    "ChatModel",
    "Condition",
    "Context",
    "Direction",
    "Edit",
    "UserError",
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
