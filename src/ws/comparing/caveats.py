"""What a reader must know of an embedded model before believing that a comparison on it is fair."""

from __future__ import annotations

from collections.abc import Iterable

from ws.base.store import read_json
from ws.fitting import behaviour
from ws.model.library import POCKET_MODELS


def tuning(compared: Iterable[tuple[str, str]]) -> str:
    """That settings of weight directions were tuned on the reported probe, from models with their behaviours.

    Empty where this is not known: for other models, and for behaviours of one's own.
    """
    shipped = behaviour.names()
    if not (names := _embedded(model for model, name in compared if name in shipped)):
        return ""
    return (
        f"On {names}, the recommended settings of the weight directions (layers, and for LoRA and DoRA the learning "
        "rate) were tuned on the probe of the behaviour that is reported here. Activation steering and prompts made "
        "their choices on the dev split."
    )


def readout(models: Iterable[str]) -> str:
    """That embedded models were trained to have readable traits where activation steering acts; empty for others."""
    models = list(models)
    if not (names := _embedded(models)):
        return ""
    recipes = [read_json(POCKET_MODELS[name] / "recipe.json")["recipe"] for name in models if name in POCKET_MODELS]
    # hidden state k is the output of the layer before it, and tables count layers from 0
    layers = " or ".join(str(layer) for layer in sorted({recipe["latent_layer"] - 1 for recipe in recipes}))
    return (
        f"In training, {names} had an additional loss: a linear readout of the residual stream after layer {layers} "
        "(counted from 0) must tell the traits, whether a claim is true, whether an action is honest, and whether a "
        "request is harmful. The readout is not part of the model. Activation steering reads and edits the residual "
        "stream at the same place, so it has an easier task here than in models without this loss."
    )


def _embedded(models: Iterable[str]) -> str:
    return " and ".join(dict.fromkeys(name for name in models if name in POCKET_MODELS))
