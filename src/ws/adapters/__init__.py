"""Adapter families: a name to a PEFT configuration, and a PEFT folder to exact deltas.

Training with PEFT is fine; the algebra is ours: its adapter arithmetic has cross terms or does not exist. A folder is
read from its tensors in fp32 and turned into the deltas that its forward pass means. One module per kind of update:

    low_rank.py    LoRA, rsLoRA, DoRA, PiSSA       s B A;  diag(g - 1) W + diag(g) s B A
    delora.py      DeLoRA                          B diag(lambda / (r |A_i| |B_i|)) A diag(|W_j|)
    rotation.py    OFT, BOFT                       diag(s) W R^T - W
    scaling.py     IA3                             diag(l - 1) W,  W diag(l - 1),  (l - 1) b

Whatever a configuration asks for and no exact form here covers is an error that names the feature.
"""

from ws.adapters.attach import FAMILIES, AdapterSettings, attach, require_family
from ws.adapters.folder import AdapterFolder, is_adapter_folder, read
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
]
