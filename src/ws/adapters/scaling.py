"""IA3 folders (Liu et al., 2205.05638) as exact deltas: outputs or inputs of a weight are scaled.

    attention       W' = diag(l) W,  b' = l b        dW = diag(l - 1) W,  db = (l - 1) b
    feed-forward    W' = W diag(l)                   dW = W diag(l - 1)

The shape of the vector shows which of the two a module is: (out, 1) or (1, in).
"""

from __future__ import annotations

from torch import nn

from ws.adapters.folder import AdapterFolder, adapted_modules
from ws.algebra.delta import Delta

_VECTOR = "ia3_l"
_HARMLESS = frozenset({"feedforward_modules", "init_ia3_weights"})


def deltas(folder: AdapterFolder, network: nn.Module) -> dict[str, Delta]:
    """The updates of a folder of type IA3."""
    folder.refuse_options(_HARMLESS)
    result = {}
    for adapted in adapted_modules(folder, network, (_VECTOR,)):
        (vector,) = adapted.take(_VECTOR)
        rows, columns = adapted.weight.shape
        gap = vector.double() - 1
        if tuple(vector.shape) == (1, columns):
            delta = Delta.scaling((rows, columns), mix=gap.flatten())
        elif tuple(vector.shape) == (rows, 1):
            delta = Delta.scaling((rows, columns), row=gap.flatten())
            if adapted.bias is not None:
                result[f"{adapted.name}.bias"] = Delta.scaling((rows, 1), row=gap.flatten())
        else:
            folder.fail(
                f"the vector of {adapted.name} has shape {tuple(vector.shape)}, but its weight has {(rows, columns)}",
                "Give the base model that the adapter was trained on.",
            )
        result[adapted.parameter] = adapted.as_stored(delta)
    return result
