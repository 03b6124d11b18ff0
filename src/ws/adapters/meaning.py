"""The exact update of every parameter that a PEFT folder changes."""

from __future__ import annotations

from torch import nn

from ws.adapters import delora, low_rank, rotation, scaling
from ws.adapters.folder import AdapterFolder, saved_modules
from ws.algebra.delta import Delta

_READERS = {
    "LORA": low_rank.deltas,
    "DELORA": delora.deltas,
    "OFT": rotation.oft_deltas,
    "BOFT": rotation.boft_deltas,
    "IA3": scaling.deltas,
}


def deltas(folder: AdapterFolder, network: nn.Module) -> dict[str, Delta]:
    """The exact updates that the adapter makes to this network: {full parameter name: Delta}.

    Deltas of DoRA, OFT, BOFT and IA3 are functions of the base weights; a bias is a matrix of one column.
    """
    kind = folder.config.get("peft_type")
    if kind not in _READERS:
        folder.unsupported(f"an adapter of type {kind}", f"Supported: {', '.join(_READERS)}.")
    return {**_READERS[kind](folder, network), **saved_modules(folder, network)}
