"""How a GGUF file names and orders the weights of a model, for whole models and for LoRAs.

llama.cpp stores the rows of `q` and `k` of Llama-shaped models in another order, because its rotary embedding pairs
neighbouring numbers: row `h * d + 2 i + j` there is row `h * d + j * d / 2 + i` here (head h of width d, j in 0, 1).
Other architectures keep their order.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ws.base.errors import UnsupportedFeatureError, UserError

FAMILIES = {
    "qwen2": "qwen2", "qwen3": "qwen3", "llama": "llama", "mistral": "llama", "gemma3_text": "gemma3", "gpt2": "gpt2",
    "phi3": "phi3",
}  # fmt: skip
"""Model type of transformers -> architecture name of GGUF, for architectures with a known row order."""
_ROTATED_ROWS = ("llama", "mistral")


def namer(gguf: Any, config: Any, remedy: str) -> Callable[[str], str]:
    """A function from the name of a parameter to the name of its tensor in GGUF; raises if GGUF has none."""
    family = FAMILIES[config.model_type]
    kinds = {label: kind for kind, label in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(kinds[family], config.num_hidden_layers)

    def name_of(parameter: str) -> str:
        label, dot, leaf = parameter.rpartition(".")
        found = names.get_name(label)
        if found is None:
            raise UnsupportedFeatureError(f"GGUF has no tensor name for {parameter} in {family}", remedy)
        return f"{found}{dot}{leaf}"

    return name_of


def gguf_rows(rows: Tensor, module: str, config: Any) -> Tensor:
    """The rows (out x k) of a module in the order of outputs in GGUF."""
    if config.model_type not in _ROTATED_ROWS:
        return rows
    kind = module.rsplit(".", 1)[-1]
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(kind)
    if heads is None:
        return rows
    halves = rows.reshape(heads, 2, rows.shape[0] // heads // 2, rows.shape[1])
    return halves.swapaxes(1, 2).reshape(rows.shape)


def digest(array: Any) -> bytes:
    """Digest of the bytes of a numpy array."""
    return hashlib.blake2b(array.tobytes(), digest_size=16).digest()


def require_same(gguf: Any, path: Path, written: Mapping[str, bytes]) -> None:
    """Raise unless the file that is read back has the tensors with these digests, and no others."""
    found = {tensor.name: digest(tensor.data) for tensor in gguf.GGUFReader(path).tensors}
    for label in sorted(found.keys() | written.keys()):
        if found.get(label) != written.get(label):
            raise UserError(f"{path}: {label} is not what was written", "Check the disk and export again.")
