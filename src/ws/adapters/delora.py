"""DeLoRA folders (Bini et al., 2503.18225) as exact deltas.

    dW = B diag( (lambda / r) / (max(|A_i|, 1e-4) max(|B_i|, 1e-4)) ) A diag(w_norm)

One scalar lambda per module bounds the norm of the factor before `diag(w_norm)`. `w_norm` holds the column norms of the
base weight at the time of training. It is read from the folder, not recomputed, because the base may have been in half
precision. lambda is saved as trained, so `lambda_pattern` and `rank_pattern` are not needed.
"""

from __future__ import annotations

from torch import nn

from ws.adapters.folder import AdapterFolder, adapted_modules
from ws.algebra.delta import Delta

_NAMES = ("delora_A", "delora_B", "delora_lambda", "delora_w_norm")
_HARMLESS = frozenset({"r", "delora_lambda", "module_dropout", "init_weights", "rank_pattern", "lambda_pattern"})
_SMALLEST_NORM = 1e-4


def deltas(folder: AdapterFolder, network: nn.Module) -> dict[str, Delta]:
    """The updates of a folder of type DELORA."""
    folder.refuse_options(_HARMLESS)
    result = {}
    for adapted in adapted_modules(folder, network, _NAMES):
        down, up, bound, column_norms = (tensor.double() for tensor in adapted.take(*_NAMES))
        if adapted.transposed:
            folder.unsupported(f"DELORA on the transposed weight of {adapted.name}")
        if down.ndim != 2 or up.ndim != 2 or up.shape[1] != down.shape[0] or column_norms.shape != down.shape[1:]:
            folder.fail(f"the factors of {adapted.name} do not match ({tuple(down.shape)} and {tuple(up.shape)})")
        norms = down.norm(dim=1).clamp(min=_SMALLEST_NORM) * up.norm(dim=0).clamp(min=_SMALLEST_NORM)
        gain = bound / down.shape[0] / norms
        result[adapted.parameter] = adapted.as_stored(Delta.low_rank(up * gain, down * column_norms))
    return result
