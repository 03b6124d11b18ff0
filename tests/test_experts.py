"""Mixtures of experts: what has no exact form is refused with a way out that works, and nothing is left behind."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import save_file

from making import assert_one_line, hook_count, logits, prompts, relative_error, weights_digest
from ws import adapters
from ws.adapters import checkpoints, diff
from ws.algebra.direction import Direction
from ws.base.errors import UnsupportedFeatureError, UserError
from ws.edit.steering import steer
from ws.model import loading
from ws.model.loading import ChatModel
from ws.pocket import tiny

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def mixture(root: Path, name: str) -> ChatModel:
    tiny.make(name, root / name, layers=4)
    return loading.load(str(root / name))


def everything_about(network: Any) -> tuple[Any, ...]:
    """Weights, kinds and names of modules, what is trained, hooks, attributes."""
    modules = [(name, type(module).__name__) for name, module in network.named_modules()]
    trained = [parameter.requires_grad for parameter in network.parameters()]
    return weights_digest(network), modules, trained, hook_count(network), sorted(vars(network))


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("family", ["lora", "dora", "pissa"])
def test_where_peft_would_move_an_adapter_to_the_experts_it_is_refused_with_a_way_out(
    tmp_path: Path, family: str, trained: bool
) -> None:
    network = mixture(tmp_path, "glm4-moe").network.requires_grad_(trained)
    before = everything_about(network)
    with pytest.raises(UnsupportedFeatureError) as caught:
        adapters.attach(network, adapters.AdapterSettings(family, rank=2, layers=(0.0, 1.0)), "the-base")
    assert_one_line(caught.value, "PEFT", "--roles q k v o")
    assert everything_about(network) == before
    attention = adapters.AdapterSettings(family, rank=2, layers=(0.0, 1.0), roles=("q", "k", "v", "o"))
    attached = adapters.attach(network, attention, "the-base")
    assert {name.rsplit(".", 1)[-1] for name in attached.layers} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    attached.detach()
    for other in ("delora", "oft", "boft", "ia3"):
        assert other in str(caught.value)
        attached = adapters.attach(network, adapters.AdapterSettings(other, rank=2, layers=(0.0, 1.0)), "the-base")
        assert any("shared_experts" in name for name in attached.layers)
        attached.detach()


def test_a_failure_after_wrapping_leaves_the_network_as_it_was(qwen: ChatModel) -> None:
    before = everything_about(qwen.network)
    with pytest.raises(UserError, match="Give --rank 64 or less"):
        adapters.attach(qwen.network, adapters.AdapterSettings("pissa", rank=4096), "the-base")
    assert everything_about(qwen.network) == before


def per_expert_lora(model: ChatModel, folder: Path, seed: int) -> Path:
    """A folder as it was trained under transformers 4: one pair of factors for every expert."""
    config, fresh, tensors = model.network.config, torch.Generator().manual_seed(seed), {}
    sizes = {"gate_proj": (64, 32), "up_proj": (64, 32), "down_proj": (32, 64)}
    for layer in range(config.num_hidden_layers):
        for expert in range(config.num_experts):
            for name, (inputs, outputs) in sizes.items():
                stem = f"base_model.model.model.layers.{layer}.mlp.experts.{expert}.{name}"
                tensors[f"{stem}.lora_A.weight"] = 0.1 * torch.randn(2, inputs, generator=fresh)
                tensors[f"{stem}.lora_B.weight"] = 0.1 * torch.randn(outputs, 2, generator=fresh)
    folder.mkdir()
    save_file(tensors, folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps({
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 4, "bias": "none",
        "target_modules": [*sizes], "base_model_name_or_path": model.name,
    }))  # fmt: skip
    return folder


def test_an_adapter_on_single_experts_is_refused_and_the_way_out_works(tmp_path: Path) -> None:
    model = mixture(tmp_path, "qwen3-moe")
    sides = [per_expert_lora(model, tmp_path / f"a{seed}", seed) for seed in (1, 2)]
    with pytest.raises(UnsupportedFeatureError) as caught:
        diff.direction(model, *sides)
    assert_one_line(caught.value, "model.layers.0.mlp.experts", "fused", "merge_and_unload")
    merged = []
    for side in sides:
        wrapped = peft.PeftModel.from_pretrained(loading.load(model.name).network, str(side))
        wrapped.merge_and_unload().save_pretrained(tmp_path / f"m{len(merged)}")
        merged.append(tmp_path / f"m{len(merged)}")
        for file in Path(model.name).glob("*token*"):
            shutil.copy(file, merged[-1])
    checkpoints.difference(model.name, *merged, tmp_path / "d.safetensors")
    direction, ids = Direction.load(tmp_path / "d.safetensors"), prompts(model)
    checkpoints.difference(model.name, merged[0], model.name, tmp_path / "tau.safetensors")
    with steer(model, Direction.load(tmp_path / "tau.safetensors"), 1.0, mode="baked"):
        steered = logits(model.network, ids)
    assert relative_error(steered, logits(loading.load(str(merged[0])).network, ids)) < 1e-5
    assert {name.rsplit(".", 1)[-1] for name in direction.deltas} == {"gate_up_proj", "down_proj"}
