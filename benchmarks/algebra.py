"""The exact difference of two rank-32 LoRA adapters, as factors and dense, against merging twice and subtracting."""

from __future__ import annotations

import tempfile
from pathlib import Path

import peft
import torch
from timing import Row, in_turn, row

from ws import diff, models


def compare(name: str, repeats: int) -> list[Row]:
    """Two lines; both ways start from a loaded base and two adapter folders on disk."""
    model = models.load(name)
    with tempfile.TemporaryDirectory() as scratch:
        folders = [_adapter(name, Path(scratch) / sign, seed) for seed, sign in enumerate(("pos", "neg"))]

        def factors() -> object:
            return diff.direction(model, *folders)[0]

        def dense() -> object:
            direction = diff.direction(model, *folders)[0]
            return {parameter: direction.materialise(parameter) for parameter in direction.deltas}

        def merged() -> object:
            sides = []
            for folder in folders:
                wrapped = peft.PeftModel.from_pretrained(model.network, str(folder))
                wrapped.merge_adapter()
                sides.append({n: p.detach().clone() for n, p in wrapped.named_parameters() if "base_layer.weight" in n})
                wrapped.unmerge_adapter()
                wrapped.unload()
            return {n: sides[0][n] - sides[1][n] for n in sides[0]}

        times = in_turn({"factors": factors, "dense": dense, "merged": merged}, repeats)
    work, peer = "exact dW of two rank-32 LoRAs", "PEFT: merge twice, subtract (inexact)"
    return [
        row(f"{work}, as factors", peer, name, times["factors"], times["merged"]),
        row(f"{work}, dense", peer, name, times["dense"], times["merged"]),
    ]


def _adapter(name: str, folder: Path, seed: int) -> Path:
    torch.manual_seed(seed)
    wrapped = peft.get_peft_model(models.load(name).network, peft.LoraConfig(
        r=32, lora_alpha=64, target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj",
                                             "down_proj"], task_type="CAUSAL_LM",
    ))  # fmt: skip
    for parameter_name, parameter in wrapped.named_parameters():
        if "lora_B" in parameter_name:
            torch.nn.init.normal_(parameter, std=0.02)
    wrapped.save_pretrained(str(folder))
    return folder
