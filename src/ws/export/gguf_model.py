"""A whole model as one GGUF file for llama.cpp: the base, or the base with a Direction merged into it.

    weights   matrices in F16 or F32; norms, biases and the embedding of positions in F32
    order     rows of q and k of Llama as in `gguf_layout`; GPT-2's maps transposed; Gemma's norms with their 1 added

It works for llama, qwen3, gemma3 and gpt2, whose files the tests load in llama.cpp. A configuration that llama.cpp
would compute differently is an error. One parameter is in memory at a time, and the file is read back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ws.algebra.direction import Direction
from ws.base.errors import UnsupportedFeatureError, UserError
from ws.base.files import atomic_file
from ws.export.gguf_layout import FAMILIES, digest, gguf_rows, namer, require_same
from ws.export.gguf_tokenizer import add_tokenizer
from ws.export.merged import checked_edits, merged_parameter
from ws.model import architecture, gguf_file
from ws.model.weight_files import Checkpoint

NumberFormat = Literal["f16", "f32"]

_REMEDY = "Use --format merged, and convert that folder with convert_hf_to_gguf.py of llama.cpp."
_LARGEST_F16 = 65504.0
_GEMMA_PERIOD = 6
"""In llama.cpp every sixth layer of Gemma 3 sees the whole text; the others see a window."""


def write_gguf_model(
    edits: Mapping[Direction, float], base: Path, path: Path, *, number_format: NumberFormat = "f16", name: str = ""
) -> dict[str, Any]:
    """Write the model in folder `base` with all `edits` (direction -> alpha) added, and return its record."""
    gguf = gguf_file.library("writing a GGUF model")
    source = Checkpoint(base)
    config = architecture.text_config(source.network)
    if config.model_type not in _DESCRIPTIONS:
        raise UnsupportedFeatureError(
            f"whole models of type {config.model_type} are not written as GGUF ({', '.join(_DESCRIPTIONS)} are)",
            _REMEDY,
        )
    _require_same_arithmetic(config, base)
    family = FAMILIES[config.model_type]
    record = {"format": "gguf", **checked_edits(source, edits), "architecture": family, "number_format": number_format}
    model = _Model(source, edits, number_format)
    names = namer(gguf, config, _REMEDY)
    written = {}
    with atomic_file(path) as temporary:
        writer = gguf.GGUFWriter(temporary, family)
        writer.add_type("model")
        writer.add_name(name or base.name)
        writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16 if number_format == "f16" else gguf.LlamaFileType.ALL_F32)
        _DESCRIPTIONS[config.model_type](writer, config)
        writer.add_vocab_size(config.vocab_size)
        add_tokenizer(gguf, writer, base, config.vocab_size)
        for parameter in model.shapes:
            shape, dtype = model.stored_as(parameter)
            count = torch.Size(shape).numel()
            writer.add_tensor_info(names(parameter), shape, dtype, count * dtype.itemsize)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for parameter in model.shapes:
            array = model.array(parameter)
            written[names(parameter)] = digest(array)
            writer.write_tensor_data(array)
        writer.close()
        require_same(gguf, temporary, written)
    return record


class _Model:
    """The tensors of the file, by name of the parameter."""

    def __init__(self, source: Checkpoint, edits: Mapping[Direction, float], number_format: NumberFormat) -> None:
        self._source, self._edits, self._format = source, edits, number_format
        self._config = architecture.text_config(source.network)
        self._modules = dict(source.network.named_modules())
        self.shapes = source.parameters()

    def stored_as(self, parameter: str) -> tuple[tuple[int, ...], Any]:
        """Shape and numpy dtype of a tensor in the file."""
        import numpy as np  # noqa: PLC0415 - only here

        shape = self.shapes[parameter]
        halved = self._format == "f16" and len(shape) > 1 and not parameter.endswith("wpe.weight")
        return shape[::-1] if self._is_transposed(parameter) else shape, np.dtype(np.float16 if halved else np.float32)

    def array(self, parameter: str) -> Any:
        """The numbers of a tensor in the file."""
        value = self._in_gguf(merged_parameter(self._source, self._edits, parameter), parameter)
        _, dtype = self.stored_as(parameter)
        if dtype.itemsize == 2 and float(value.abs().max()) > _LARGEST_F16:
            raise UserError(f"{parameter} holds numbers that F16 cannot hold", "Write F32: --gguf-type f32.")
        return value.contiguous().numpy().astype(dtype)

    def _in_gguf(self, value: Tensor, parameter: str) -> Tensor:
        if self._is_transposed(parameter):
            return value.T
        if self._config.model_type == "gemma3_text" and parameter.endswith("norm.weight"):
            return value + 1
        return gguf_rows(value, parameter.removesuffix(".weight"), self._config)

    def _is_transposed(self, parameter: str) -> bool:
        module, _, leaf = parameter.rpartition(".")
        return leaf == "weight" and architecture.is_conv1d(self._modules[module])


# -------------------------------------------------------------------- what llama.cpp must know


def _describe_gpt2(writer: Any, config: Any) -> None:
    writer.add_context_length(config.n_positions)
    writer.add_embedding_length(config.n_embd)
    writer.add_feed_forward_length(config.n_inner or 4 * config.n_embd)
    writer.add_block_count(config.n_layer)
    writer.add_head_count(config.n_head)
    writer.add_layer_norm_eps(config.layer_norm_epsilon)


def _describe_llama(writer: Any, config: Any) -> None:
    width = _head_width(config)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_rope_dimension_count(width)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(_ropes(config)[-1]["rope_theta"])


def _describe_gemma3(writer: Any, config: Any) -> None:
    _describe_llama(writer, config)
    writer.add_sliding_window(config.sliding_window)
    writer.add_rope_freq_base_swa(config.rope_parameters["sliding_attention"]["rope_theta"])


_DESCRIPTIONS: dict[str, Callable[[Any, Any], None]] = {
    "llama": _describe_llama,
    "qwen3": _describe_llama,
    "gemma3_text": _describe_gemma3,
    "gpt2": _describe_gpt2,
}
"""Model type -> what writes its sizes."""


def _head_width(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _ropes(config: Any) -> list[dict[str, Any]]:
    """The settings of the rotary embedding; of several kinds of layers, those with full attention come last."""
    found = getattr(config, "rope_parameters", None) or {}
    if "full_attention" in found:
        return [found["sliding_attention"], found["full_attention"]]
    return [found] if found else []


def _require_same_arithmetic(config: Any, place: Path) -> None:
    """Raise for a setting under which llama.cpp would compute something else."""
    if difference := next(_differences(config), None):
        raise UnsupportedFeatureError(f"{place} has {difference}, which is not written as GGUF", _REMEDY)


def _differences(config: Any) -> Iterator[str]:
    kind = config.model_type
    key, usual = _ACTIVATIONS[kind]
    if getattr(config, key) not in usual:
        yield f"the activation {getattr(config, key)}"
    for rope in _ropes(config):
        if rope.get("rope_type", "default") != "default" or rope.get("partial_rotary_factor", 1.0) != 1.0:
            yield "scaled or partial rotary embeddings"
    if getattr(config, "attention_bias", False) or getattr(config, "mlp_bias", False):
        yield "biases"
    layers = getattr(config, "layer_types", None) or []
    if kind == "gemma3_text":
        windows = ["sliding_attention" if (n + 1) % _GEMMA_PERIOD else "full_attention" for n in range(len(layers))]
        if layers != windows or config.use_bidirectional_attention:
            yield "other windows of attention than Gemma 3"
        if config.query_pre_attn_scalar != config.head_dim:
            yield "another scale of attention than 1 / sqrt(head_dim)"
        if config.final_logit_softcapping or config.attn_logit_softcapping:
            yield "capped logits"
    elif any(layer != "full_attention" for layer in layers):
        yield "windows of attention"
    if kind == "gpt2" and (config.scale_attn_by_inverse_layer_idx or not config.scale_attn_weights):
        yield "another scale of attention than 1 / sqrt(head_dim)"


_ACTIVATIONS = {
    "llama": ("hidden_act", ("silu",)),
    "qwen3": ("hidden_act", ("silu",)),
    "gemma3_text": ("hidden_activation", ("gelu_pytorch_tanh",)),
    "gpt2": ("activation_function", ("gelu_new", "gelu_pytorch_tanh")),
}
"""Model type -> the key of its activation, and the names of the one that llama.cpp computes."""
