"""Adapter families: make a PEFT configuration from a family name, and exact deltas from a PEFT folder.

PEFT is used for training, but not for arithmetic: its adapter arithmetic has cross terms or does not exist. The tensors
of a folder are read in fp32 and converted to the deltas that its forward pass applies. One module per kind of update:

    low_rank.py    LoRA, rsLoRA, DoRA, PiSSA       s B A;  diag(g - 1) W + diag(g) s B A
    delora.py      DeLoRA                          B diag(lambda / (r |A_i| |B_i|)) A diag(|W_j|)
    rotation.py    OFT, BOFT                       diag(s) W R^T - W
    scaling.py     IA3                             diag(l - 1) W,  W diag(l - 1),  (l - 1) b

A feature of a configuration that has no exact form here is an error that names the feature.
"""

from ws.adapters.attach import FAMILIES, AdapterSettings, attach, require_family, require_sites
from ws.adapters.folder import AdapterFolder, is_adapter_folder, read, sort_config
from ws.adapters.meaning import deltas

__all__ = [
    "FAMILIES",
    "AdapterFolder",
    "AdapterSettings",
    "attach",
    "deltas",
    "is_adapter_folder",
    "read",
    "require_family",
    "require_sites",
    "sort_config",
]
