"""What Inspect finds at its entry point: the provider `ws`, whose heavy imports wait until a model is asked for."""

from __future__ import annotations

from inspect_ai.model import ModelAPI, modelapi


@modelapi(name="ws")
def ws() -> type[ModelAPI]:
    """The class of the models `ws/RUN`."""
    from ws.serving.inspect_model import SteeredModel  # noqa: PLC0415 - imports torch

    return SteeredModel
