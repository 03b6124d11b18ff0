"""Random models of known shapes: their results mean nothing, their cost is real. Nothing is downloaded.

All are Qwen3 with its 151,936 tokens, heads of 128 and tied embeddings. The 0.6B and 1.7B shapes are those of the
published models; the smaller ones shrink width and depth.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import flops
import torch

from ws.base import console, precision
from ws.model import attention
from ws.model.chat import Chat
from ws.model.loading import ChatModel
from ws.pocket import bpe, tiny


@dataclass(frozen=True)
class Shape:
    """Sizes of a decoder with grouped-query attention and a gated feed-forward; `weight_bytes` per weight.

    The defaults are Qwen3's.
    """

    layers: int
    width: int
    feed_forward: int
    heads: int
    kv_heads: int
    head_width: int = 128
    vocabulary: int = 151_936
    weight_bytes: int = 2

    @property
    def matrices(self) -> tuple[tuple[int, int], ...]:
        """(inputs, outputs) of the seven matrices of a layer: q, k, v, o, gate, up, down."""
        queries, keys = self.heads * self.head_width, self.kv_heads * self.head_width
        inner, width = self.feed_forward, self.width
        return ((width, queries), (width, keys), (width, keys), (queries, width), (width, inner), (width, inner),
                (inner, width))  # fmt: skip

    @property
    def layer_parameters(self) -> int:
        """sum of inputs * outputs over the matrices of a layer."""
        return sum(inputs * outputs for inputs, outputs in self.matrices)

    @property
    def parameters(self) -> int:
        """layers * layer_parameters + 2 * vocabulary * width (embedding, and a head of its own); norms are left out."""
        return self.layers * self.layer_parameters + 2 * self.vocabulary * self.width

    @property
    def kv_bytes_per_token(self) -> int:
        """2 (keys, values) * layers * kv_heads * head_width * weight_bytes."""
        return 2 * self.layers * self.kv_heads * self.head_width * self.weight_bytes

    def lora_parameters(self, rank: int, layers: int) -> int:
        """layers * sum of rank * (inputs + outputs) over the matrices of a layer."""
        return layers * sum(rank * (inputs + outputs) for inputs, outputs in self.matrices)

    def activation_bytes_per_token(self, layers: int, checkpointed: bool) -> int:
        """What the backward pass through `layers` layers keeps per token.

        checkpointed    weight_bytes * layers * width                       (the input of every layer)
        whole           weight_bytes * layers * (4 * width + (heads + 2 * kv_heads) * head_width
                        + heads * head_width + 3 * feed_forward)            (inputs of both norms and of the matrices
                        behind them, q, k, v, the attention's output, gate, up and their product; no scores)
        """
        if checkpointed:
            return self.weight_bytes * layers * self.width
        attention = (2 * self.heads + 2 * self.kv_heads) * self.head_width
        return self.weight_bytes * layers * (4 * self.width + attention + 3 * self.feed_forward)

    @property
    def flop_matrices(self) -> flops.Matrices:
        """Its matrices, as the formulas for operations take them."""
        return flops.Matrices((self.layer_parameters,) * self.layers, self.vocabulary * self.width)


SHAPES = {
    "qwen3-0.04b-shape": Shape(6, 256, 768, 4, 2),
    "qwen3-0.1b-shape": Shape(12, 512, 1536, 8, 4),
    "qwen3-0.6b-shape": Shape(28, 1024, 3072, 16, 8),
    "qwen3-1.7b-shape": Shape(28, 2048, 6144, 16, 8),
}


def fast_dtype() -> torch.dtype:
    """bf16, or fp32 on a CPU that only emulates bf16."""
    fast = torch.cuda.is_available() or precision.bfloat16_is_fast()
    return torch.bfloat16 if fast else torch.float32


def make(shape: Shape, folder: Path, dtype: torch.dtype) -> None:
    """Save the random model as an ordinary model folder."""
    folder.mkdir(parents=True)
    tokenizer = _tokenizer(shape, folder)
    with console.library_noise_muted():
        _network(shape, dtype, tokenizer).save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def in_memory(name: str, dtype: torch.dtype) -> ChatModel:
    """The random model, ready to use, without a folder."""
    with tempfile.TemporaryDirectory() as scratch:
        tokenizer = _tokenizer(SHAPES[name], Path(scratch))
    network = _network(SHAPES[name], dtype, tokenizer).eval().requires_grad_(False)
    if torch.cuda.is_available():
        network.to("cuda")
    else:  # as `models.load` does for a CPU
        network.set_attn_implementation(attention.EAGER)
        attention.use_grouped(network)
    return ChatModel(name, network, Chat(tokenizer, "off", name))


def _tokenizer(shape: Shape, folder: Path) -> Any:
    """A small tokenizer whose spare ids are named by words that it never splits text into."""
    path = folder / "tokenizer.json"
    bpe.train(tiny.training_texts(), 1024, path)
    content = json.loads(path.read_text())
    known = content["model"]["vocab"]
    known |= {f"word{number}": number for number in range(len(known), shape.vocabulary)}
    path.write_text(json.dumps(content))
    return bpe.load(path)


def _network(shape: Shape, dtype: torch.dtype, tokenizer: Any) -> Any:
    from transformers import Qwen3Config, Qwen3ForCausalLM  # noqa: PLC0415 - heavy import, late

    torch.manual_seed(0)
    return Qwen3ForCausalLM(Qwen3Config(
        vocab_size=shape.vocabulary, hidden_size=shape.width, intermediate_size=shape.feed_forward,
        num_hidden_layers=shape.layers, num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_width, max_position_embeddings=40_960, rope_theta=1_000_000, tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, bos_token_id=None,
    )).to(dtype)  # fmt: skip
