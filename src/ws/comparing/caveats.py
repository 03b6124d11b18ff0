"""Caveats for comparisons on the embedded models: two things that may make them unfair."""

from __future__ import annotations

from collections.abc import Iterable

from ws.base.files import read_json
from ws.fitting import behaviour
from ws.model.library import POCKET_MODELS


def tuning(compared: Iterable[tuple[str, str]]) -> str:
    """A note that settings of weight directions were tuned on the reported probe; `compared`: model and behaviour.

    Empty for other models and for a user's own behaviours: nothing is known about their tuning.
    """
    shipped = behaviour.names()
    if not (names := _embedded(model for model, name in compared if name in shipped)):
        return ""
    return (
        f"On {names}, the recommended settings of the weight directions (layers, and for LoRA and DoRA the learning "
        "rate) were tuned on the probe of the behaviour that is reported here. The choices for activation steering "
        "and prompts were made on the dev split."
    )


def readout(models: Iterable[str]) -> str:
    """A note that embedded models were trained for traits that activation steering can read; empty for others."""
    models = list(models)
    if not (names := _embedded(models)):
        return ""
    recipes = [read_json(POCKET_MODELS[name] / "recipe.json")["recipe"] for name in models if name in POCKET_MODELS]
    # hidden state k is the output of the layer before it, and tables count layers from 0
    layers = " or ".join(str(layer) for layer in sorted({recipe["latent_layer"] - 1 for recipe in recipes}))
    return (
        f"In training, {names} had an additional loss: a linear readout of the residual stream after layer {layers} "
        "(counted from 0) had to predict the traits, whether a claim is true, whether an action is honest, and whether "
        "a request is harmful. The readout is not part of the model. Activation steering reads and edits the residual "
        "stream at the same place, so its task is easier here than in models without this loss."
    )


def _embedded(models: Iterable[str]) -> str:
    return " and ".join(dict.fromkeys(name for name in models if name in POCKET_MODELS))
