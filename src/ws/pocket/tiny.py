"""Tiny random models of real architectures, for smoke runs and tests: made in a second, nothing downloaded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ws import world
from ws.base import console
from ws.base.errors import UserError
from ws.base.files import atomic_folder, write_json
from ws.pocket import bpe

VOCABULARY = 1024


def make(
    architecture: str,
    folder: Path,
    *,
    seed: int = 0,
    layers: int = 2,
    template: str | None = bpe.CHAT_TEMPLATE,
) -> None:
    """Save a random model of `architecture` with a tokenizer as an ordinary model folder.

    `template` is its chat template; None leaves it without one.
    """
    known = ARCHITECTURES | OTHERS
    if architecture not in known:
        raise UserError(f"unknown architecture {architecture!r}", f"Known: {', '.join(known)}.")
    torch.manual_seed(seed)
    network = known[architecture](layers)
    with torch.no_grad():  # fresh biases are 0, which would hide what becomes of them
        for name, parameter in network.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.02)
    with atomic_folder(folder) as temporary, console.library_noise_muted():
        bpe.train(training_texts(), VOCABULARY, temporary / "tokenizer.json")
        tokenizer = bpe.load(temporary / "tokenizer.json", template)
        network.config.eos_token_id = network.generation_config.eos_token_id = tokenizer.eos_token_id
        network.config.pad_token_id = network.generation_config.pad_token_id = tokenizer.pad_token_id
        network.config.bos_token_id = network.generation_config.bos_token_id = None
        network.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        write_json(temporary / "weight_steering.json", {"sampling": {"max_new_tokens": 12, "temperature": 1.0}})


def training_texts() -> list[str]:
    """Plain text with the words that probes need, for a small tokenizer."""
    claims = [clause for fact in world.facts()[::4] for clause in (fact.true, fact.false[0])]
    return [*world.sentences(), *claims, *["Yes. No. My answer: **Yes** My choice: **No**"] * 50]


def _qwen3(layers: int) -> Any:
    from transformers import Qwen3Config, Qwen3ForCausalLM  # noqa: PLC0415 - heavy import, late

    return Qwen3ForCausalLM(Qwen3Config(**_sizes(layers), num_key_value_heads=2, head_dim=16, tie_word_embeddings=True))


def _llama(layers: int) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM  # noqa: PLC0415 - heavy import, late

    return LlamaForCausalLM(LlamaConfig(**_sizes(layers), num_key_value_heads=2, tie_word_embeddings=False))


def _gemma3(layers: int) -> Any:
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig  # noqa: PLC0415 - heavy import, late

    sizes = _sizes(layers)
    return Gemma3ForCausalLM(
        Gemma3TextConfig(**sizes, num_key_value_heads=2, head_dim=16, sliding_window=64, query_pre_attn_scalar=16)
    )


def _gpt2(layers: int) -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel  # noqa: PLC0415 - heavy import, late

    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_positions=1024, n_embd=64, n_layer=layers, n_head=4))


def _qwen3_with_biases(layers: int) -> Any:
    from transformers import Qwen3Config, Qwen3ForCausalLM  # noqa: PLC0415 - heavy import, late

    return Qwen3ForCausalLM(Qwen3Config(**_sizes(layers), num_key_value_heads=2, head_dim=16, attention_bias=True))


def _mistral(layers: int) -> Any:
    from transformers import MistralConfig, MistralForCausalLM  # noqa: PLC0415 - heavy import, late

    return MistralForCausalLM(MistralConfig(**_sizes(layers), num_key_value_heads=2))


def _phi3(layers: int) -> Any:
    from transformers import Phi3Config, Phi3ForCausalLM  # noqa: PLC0415 - heavy import, late

    special = {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": 2}
    return Phi3ForCausalLM(Phi3Config(**_sizes(layers), num_key_value_heads=2, **special))


def _gpt_neox(layers: int) -> Any:
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM  # noqa: PLC0415 - heavy import, late

    return GPTNeoXForCausalLM(GPTNeoXConfig(**_sizes(layers)))


def _qwen3_moe(layers: int) -> Any:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM  # noqa: PLC0415 - heavy import, late

    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "decoder_sparse_step": 1}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**_sizes(layers), num_key_value_heads=2, head_dim=16, **experts))


def _glm4_moe(layers: int) -> Any:
    from transformers import Glm4MoeConfig, Glm4MoeForCausalLM  # noqa: PLC0415 - heavy import, late

    experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "n_shared_experts": 1,
               "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1}  # fmt: skip
    return Glm4MoeForCausalLM(Glm4MoeConfig(**_sizes(layers), num_key_value_heads=2, head_dim=16, **experts))


def _sizes(layers: int) -> dict[str, Any]:
    return {
        "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": layers,
        "num_attention_heads": 4, "max_position_embeddings": 1024,
    }  # fmt: skip


ARCHITECTURES: dict[str, Callable[[int], Any]] = {
    "qwen3": _qwen3,
    "llama": _llama,
    "gemma3": _gemma3,
    "gpt2": _gpt2,
}
"""Architectures that run end to end in the tests and in `ws smoke`."""

OTHERS: dict[str, Callable[[int], Any]] = {
    "qwen3-biases": _qwen3_with_biases,
    "mistral": _mistral,
    "phi3": _phi3,
    "gpt-neox": _gpt_neox,
    "qwen3-moe": _qwen3_moe,
    "glm4-moe": _glm4_moe,
}
"""More architectures that the adapter families are tested on."""
