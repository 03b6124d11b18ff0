"""A Direction as a GGUF LoRA, which llama.cpp and programs based on it apply at run time (`--lora`, `--lora-scaled`).

    tensors   <gguf name>.lora_a (k x in) and <gguf name>.lora_b (out x k), fp32;   scale = lora.alpha / k

The file has one `lora.alpha`: the largest rank. The factors of modules with a smaller rank k are rescaled to match.

llama.cpp stores the rows of `q` and `k` of Llama-shaped models in another order, because its rotary embedding pairs
neighbouring numbers: row `h * d + 2 i + j` there is row `h * d + j * d / 2 + i` here (head h of width d, j in 0, 1).
The rows of `lora_b` follow. Other architectures keep their order.

Other architectures are an error.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ws.algebra.direction import Direction
from ws.base.errors import UnsupportedFeatureError, UserError
from ws.base.store import atomic_file
from ws.export.lora import energy_kept, low_rank_form
from ws.model import architecture, gguf_file

_NAMES = {
    "qwen2": "qwen2", "qwen3": "qwen3", "llama": "llama", "mistral": "llama", "gemma3_text": "gemma3", "gpt2": "gpt2",
    "phi3": "phi3",
}  # fmt: skip
"""Model type of transformers -> architecture name of GGUF, for architectures with a known row order."""
_ROTATED_ROWS = ("llama", "mistral")


def write_gguf(
    direction: Direction, network: nn.Module, path: Path, *, alpha: float = 1.0, rank: int | None = None, name: str = ""
) -> dict[str, Any]:
    """Write `alpha * dW` as a GGUF LoRA with scale 1, read it back, and return what it keeps."""
    gguf = gguf_file.library("writing a GGUF LoRA")
    config = architecture.text_config(network)
    if config.model_type not in _NAMES:
        raise UnsupportedFeatureError(
            f"the row order of {config.model_type} in GGUF is not known",
            f"Use --format peft; GGUF works for {', '.join(sorted(_NAMES))}.",
        )
    family = _NAMES[config.model_type]
    kinds = {label: kind for kind, label in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(kinds[family], config.num_hidden_layers)
    forms = low_rank_form(direction, network, rank)
    largest = max(1, *(form.delta.rank for form in forms))
    tensors: dict[str, Tensor] = {}
    for form in forms:
        label = names.get_name(f"{form.module}.weight", try_suffixes=(".weight",))
        if label is None:
            raise UnsupportedFeatureError(
                f"GGUF has no tensor name for {form.module} in {family}", "Use --format peft."
            )
        tensors[f"{label}.lora_a"] = form.delta.right
        tensors[f"{label}.lora_b"] = gguf_rows(
            form.delta.left * (alpha * form.delta.rank / largest), form.module, config
        )
    with atomic_file(path) as temporary:
        writer = gguf.GGUFWriter(temporary, family)
        writer.add_type("adapter")
        writer.add_string("adapter.type", "lora")
        writer.add_string("general.name", name or "weight steering")
        writer.add_float32("adapter.lora.alpha", float(largest))
        for label, tensor in tensors.items():
            writer.add_tensor(label, tensor.contiguous().numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    _require_same(gguf, path, tensors)
    return {
        "format": "gguf-lora",
        "alpha": alpha,
        "architecture": family,
        "exact": all(form.energy == 1.0 for form in forms),
        "energy_kept": energy_kept(direction, forms),
    }


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


def _require_same(gguf: Any, path: Path, tensors: dict[str, Tensor]) -> None:
    """Raise unless the file that is read back has the same numbers in the same shapes."""
    found = {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in gguf.GGUFReader(path).tensors}
    for label, tensor in tensors.items():
        if label not in found or not torch.equal(found[label].reshape(tensor.shape), tensor):
            raise UserError(f"{path}: {label} is not what was written", "Check the disk and export again.")
