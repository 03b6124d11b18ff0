"""Helpers that several test files share: random deltas, directions and adapters, dense oracles, exact digests."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ws.algebra.delta import Delta
from ws.algebra.direction import Direction
from ws.base.errors import UserError
from ws.model import architecture, loading
from ws.model.loading import ChatModel

RANK = 4
"""Rank of the adapters and directions in these tests."""


# -------------------------------------------------------------------- deltas


def generator(seed: int) -> torch.Generator:
    """A random generator of its own, so that no test depends on another one."""
    return torch.Generator().manual_seed(seed)


def gaussian(*shape: int, seed: int, scale: float = 1.0) -> Tensor:
    """Gaussian numbers, fp32."""
    return torch.randn(*shape, generator=generator(seed)) * scale


def thin(rows: int, columns: int, rank: int, seed: int, scale: float = 1.0) -> Delta:
    """A random low-rank delta."""
    return Delta.low_rank(gaussian(rows, rank, seed=seed, scale=scale), gaussian(rank, columns, seed=seed + 10_000))


def dense(rows: int, columns: int, seed: int, scale: float = 1.0) -> Delta:
    """A random dense delta."""
    return Delta.full(gaussian(rows, columns, seed=seed, scale=scale))


def in_fp64(delta: Delta) -> Tensor:
    """The dense oracle: the stored fp32 numbers multiplied and added in fp64."""
    product = delta.left.double() @ delta.right.double()
    return product if delta.dense is None else product + delta.dense.double()


def term_scale(delta: Delta) -> float:
    """Sum of the norms of all stored terms: what rounding errors are measured against."""
    terms = float((delta.left.double().norm(dim=0) * delta.right.double().norm(dim=1)).sum())
    return terms + (0.0 if delta.dense is None else float(delta.dense.double().norm()))


def relative_error(value: Tensor, reference: Tensor) -> float:
    """`|value - reference| / |reference|`, Frobenius, fp64."""
    return float((value.double() - reference.double()).norm() / reference.double().norm())


# -------------------------------------------------------------------- directions


def random_direction(
    model: ChatModel,
    rank: int = RANK,
    seed: int = 0,
    relative_norm: float = 1.0,
    layers: Iterable[int] | None = None,
) -> Direction:
    """A random direction on every site of the chosen layers (all but the outermost by default).

    Every delta has `relative_norm` times the norm of its weight.
    """
    chosen = range(1, model.layer_count - 1) if layers is None else layers
    parameters = dict(model.network.named_parameters())
    deltas, of_layer = {}, {}
    for number, site in enumerate(architecture.sites(model.network, chosen)):
        delta = thin(*site.shape, rank=rank, seed=1000 * seed + number)
        wanted = relative_norm * float(parameters[site.parameter].detach().double().norm())
        deltas[site.parameter] = delta * (wanted / float(in_fp64(delta).norm()))
        of_layer[site.parameter] = site.layer
    return Direction(deltas, model.fingerprint, of_layer, {"made": "random", "seed": seed})


def prompts(model: ChatModel, rows: int = 4, tokens: int = 9, seed: int = 0) -> Tensor:
    """Random token ids."""
    count = model.network.get_input_embeddings().weight.shape[0]
    return torch.randint(0, count, (rows, tokens), generator=generator(seed))


@torch.no_grad()
def logits(network: nn.Module, ids: Tensor) -> Tensor:
    """All logits of one forward pass."""
    found: Tensor = network(input_ids=ids, use_cache=False).logits
    return found


# -------------------------------------------------------------------- exact comparison


def weights_digest(network: nn.Module) -> str:
    """Digest of the exact bits of all parameters and buffers."""
    hasher = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted([*network.named_parameters(), *network.named_buffers()], key=lambda item: item[0]):
        hasher.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        hasher.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return hasher.hexdigest()


def hook_count(network: nn.Module) -> int:
    """How many forward hooks hang on the network."""
    return sum(len(module._forward_hooks) for module in network.modules())


def assert_one_line(error: UserError, *mentioned: str) -> None:
    """The message is one line and names the things given."""
    text = str(error)
    assert "\n" not in text and text.strip()
    for part in mentioned:
        assert part in text, f"{part!r} is not in {text!r}"


# -------------------------------------------------------------------- adapters


def randomise(wrapped: nn.Module, seed: int, scale: float = 0.1) -> None:
    """Fill both factors of every LoRA module with Gaussian numbers (fresh ones have B = 0)."""
    fresh = generator(seed)
    for name, parameter in wrapped.named_parameters():
        if "lora_A" in name or "lora_B" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=fresh) * scale)


def save_lora(
    base: Path, target: Path, seed: int = 0, scale: float = 0.1, save: dict[str, Any] | None = None, **options: Any
) -> Path:
    """A randomised LoRA on layers 1 and 2 of a fresh copy of `base`, saved by PEFT; options are `LoraConfig`'s.

    `save` holds options of PEFT's `save_pretrained`.
    """
    import peft  # noqa: PLC0415 - heavy import, late

    settings: dict[str, Any] = {
        "r": RANK,
        "lora_alpha": 6,
        "target_modules": ["q_proj", "o_proj", "up_proj", "down_proj"],
        "layers_to_transform": [1, 2],
        "layers_pattern": "layers",
        "task_type": "CAUSAL_LM",
        **options,
    }
    wrapped = peft.get_peft_model(loading.load(str(base)).network, peft.LoraConfig(**settings))
    randomise(wrapped, seed, scale)
    wrapped.save_pretrained(str(target), **(save or {}))
    return target


def merged_by_peft(base: Path, adapter: Path) -> dict[str, Tensor]:
    """What PEFT's own merge adds to every parameter of a fresh copy of `base`, as an fp64 difference."""
    import peft  # noqa: PLC0415 - heavy import, late

    network = loading.load(str(base)).network
    before = {name: parameter.detach().double().clone() for name, parameter in network.named_parameters()}
    merged = peft.PeftModel.from_pretrained(network, str(adapter)).merge_and_unload()
    return {name: parameter.detach().double() - before[name] for name, parameter in merged.named_parameters()}


def copy_changed(source: Path, target: Path, change: Callable[[Path], object]) -> Path:
    """A copy of a folder after `change(copy)`."""
    shutil.copytree(source, target)
    change(target)
    return target


def edit_json(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Read a JSON object, change it in place, write it back."""
    content = json.loads(path.read_text(encoding="utf-8"))
    change(content)
    path.write_text(json.dumps(content), encoding="utf-8")
