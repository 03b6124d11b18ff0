"""A Direction as a GGUF LoRA, which llama.cpp and programs based on it apply at run time (`--lora`, `--lora-scaled`).

    tensors   <gguf name>.lora_a (k x in) and <gguf name>.lora_b (out x k), fp32;   scale = lora.alpha / k

The file has one `lora.alpha`: the largest rank. The factors of modules with a smaller rank k are rescaled to match.

The rows of `lora_b` follow the order of rows in llama.cpp (`gguf_layout`).

Other architectures are an error.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ws.algebra.direction import Direction
from ws.base.errors import UnsupportedFeatureError
from ws.base.files import atomic_file
from ws.export.gguf_layout import FAMILIES, digest, gguf_rows, namer, require_same
from ws.export.lora import energy_kept, low_rank_form
from ws.model import architecture, gguf_file


def write_gguf(
    direction: Direction, network: nn.Module, path: Path, *, alpha: float = 1.0, rank: int | None = None, name: str = ""
) -> dict[str, Any]:
    """Write `alpha * dW` as a GGUF LoRA with scale 1, read it back, and return what it keeps."""
    gguf = gguf_file.library("writing a GGUF LoRA")
    config = architecture.text_config(network)
    if config.model_type not in FAMILIES:
        raise UnsupportedFeatureError(
            f"the row order of {config.model_type} in GGUF is not known",
            f"Use --format peft; GGUF works for {', '.join(sorted(FAMILIES))}.",
        )
    family = FAMILIES[config.model_type]
    names = namer(gguf, config, "Use --format peft.")
    forms = low_rank_form(direction, network, rank)
    largest = max(1, *(form.delta.rank for form in forms))
    tensors: dict[str, Tensor] = {}
    for form in forms:
        label = names(f"{form.module}.weight")
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
    require_same(gguf, path, {label: digest(tensor.contiguous().numpy()) for label, tensor in tensors.items()})
    return {
        "format": "gguf-lora",
        "alpha": alpha,
        "architecture": family,
        "exact": all(form.energy == 1.0 for form in forms),
        "energy_kept": energy_kept(direction, forms),
    }
