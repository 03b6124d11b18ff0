"""A Direction as one plain LoRA folder of PEFT.

    dW = s B A with s = lora_alpha / r;   either s = 1 and alpha is folded into B, or s = alpha and B A = dW

Exact if the delta is low-rank (LoRA, rsLoRA, PiSSA, DeLoRA and sums of them). Every other delta (DoRA, OFT, BOFT, IA3,
dense) is cut to a given rank by its singular values; the share of the squared norm that remains is returned and stored.
A plain LoRA cannot hold a bias, so a bias is an error.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ws import adapters, world
from ws.algebra import spectrum
from ws.algebra.delta import Delta
from ws.algebra.direction import Direction
from ws.base import console
from ws.base.errors import UnsupportedFeatureError, UserError
from ws.base.files import atomic_folder
from ws.edit.steering import steer
from ws.export.target import require_free, write_record
from ws.measure.divergence import kl
from ws.model import architecture, forward
from ws.model.chat import ask
from ws.model.loading import ChatModel

_PREFIX = "base_model.model."
_PROMPTS = 8
_ROUNDING = 1e-5


class LowRankForm(NamedTuple):
    """One module's update as out x in factors; `energy` is the share of its squared norm that they keep."""

    module: str
    delta: Delta
    energy: float


def low_rank_form(direction: Direction, network: nn.Module, rank: int | None = None) -> list[LowRankForm]:
    """Thin factors of every delta, as out x in maps; `rank` cuts them, and is needed for deltas that are not low-rank.

    Raises for a parameter that is not the weight of a linear map, and if a rank is needed but not given.
    """
    modules = dict(network.named_modules())
    forms = []
    parameters = dict(network.named_parameters())
    for name, delta in direction.deltas.items():
        if name not in parameters:
            raise architecture.no_own_parameter(network, name)
        module_name, _, leaf = name.rpartition(".")
        module = modules.get(module_name)
        if leaf != "weight" or module is None or not architecture.is_linear_map(module):
            raise UnsupportedFeatureError(
                f"{name} is not the weight of a linear map, so a LoRA cannot hold it", "Use --format merged."
            )
        if delta.is_thin and (rank is None or delta.rank <= rank):
            kept, energy = delta, 1.0
        elif rank is None:
            raise UnsupportedFeatureError(
                f"the update of {name} is not low-rank",
                "Give the rank to cut it to: --rank 64, or use --format merged.",
            )
        else:
            kept, energy = spectrum.truncate(delta, rank, direction.weights.get(name))
        forms.append(LowRankForm(module_name, kept.T if architecture.is_conv1d(module) else kept, energy))
    return forms


def energy_kept(direction: Direction, forms: list[LowRankForm]) -> float:
    """Share of the squared Frobenius norm of the whole direction that the forms keep."""
    squares = [value**2 for value in direction.norms().values()]
    total = sum(squares)
    return sum(square * form.energy for square, form in zip(squares, forms, strict=True)) / total if total else 1.0


def write_peft(
    direction: Direction,
    network: nn.Module,
    folder: Path,
    *,
    alpha: float = 1.0,
    rank: int | None = None,
    fold: bool = True,
    base_name: str = "",
) -> dict[str, Any]:
    """Write a PEFT adapter folder that adds `alpha * dW`, and return what it keeps.

    fold: alpha is multiplied into B and the adapter has scale 1; else the scale is alpha and can be changed in the
    configuration.
    """
    import peft  # noqa: PLC0415 - heavy import, late
    from safetensors.torch import save_file  # noqa: PLC0415

    if alpha == 0:
        raise UserError("alpha 0 exports no change", "Give the strength that the adapter should have: --alpha 1.")
    require_free(folder)
    forms = low_rank_form(direction, network, rank)
    ranks = {form.module: max(1, form.delta.rank) for form in forms}
    largest = max(ranks.values())
    scale = 1.0 if fold else alpha
    tensors: dict[str, Tensor] = {}
    for form in forms:
        up, down = _at_least_rank_one(form.delta)
        tensors[f"{_PREFIX}{form.module}.lora_A.weight"] = down.contiguous()
        tensors[f"{_PREFIX}{form.module}.lora_B.weight"] = (up * (alpha if fold else 1.0)).contiguous()
    others = {module: value for module, value in ranks.items() if value != largest}
    config = peft.LoraConfig(
        r=largest,
        lora_alpha=scale * largest,
        rank_pattern=others,
        alpha_pattern={module: scale * value for module, value in others.items()},
        target_modules=[form.module for form in forms],
        lora_dropout=0.0,
        bias="none",
        task_type="CAUSAL_LM",
        fan_in_fan_out=any(architecture.is_conv1d(network.get_submodule(form.module)) for form in forms),
        inference_mode=True,
        base_model_name_or_path=base_name or None,
    )
    record = {
        "format": "peft",
        "alpha": alpha,
        "alpha_folded": fold,
        "rank": largest,
        "exact": all(form.energy == 1.0 for form in forms),
        "energy_kept": energy_kept(direction, forms),
        "least_energy_kept": min(form.energy for form in forms),
    }
    with atomic_folder(folder) as temporary, console.library_noise_muted():
        config.save_pretrained(temporary)
        adapters.sort_config(temporary)
        save_file(tensors, temporary / "adapter_model.safetensors", metadata={"format": "pt"})
        _require_same(temporary, network, {form.module: form.delta * alpha for form in forms})
        write_record(temporary, record)
    return record


def _require_same(folder: Path, network: nn.Module, meant: Mapping[str, Delta]) -> None:
    """Raise unless the folder, read back as any PEFT folder, gives the intended update."""
    found = adapters.deltas(adapters.read(folder), network)
    for module, delta in meant.items():
        read = found.pop(f"{module}.weight", Delta.zero(delta.shape))
        read = read.T if architecture.is_conv1d(network.get_submodule(module)) else read
        gap = spectrum.norm(read - delta.to(read.device))
        if gap > _ROUNDING * spectrum.norm(delta):
            raise UserError(f"{folder}: the update of {module} is not what was written", "Export again.")
    if found:
        raise UserError(f"{folder} also changes {min(found)}, which it should not", "Export again.")


@torch.no_grad()
def logit_error(model: ChatModel, direction: Direction, alpha: float, folder: Path) -> dict[str, float]:
    """How far the exported adapter, loaded by plain PEFT, is from the exact direction on a few plain prompts.

    `max` is the largest difference of a logit, `kl` the mean KL of the exact to the exported distribution in nats, over
    all `positions`. The model is unchanged afterwards.
    """
    import peft  # noqa: PLC0415 - heavy import, late

    rows = [model.chat.prompt(ask(entry.user)) for entry in world.talk()[:_PROMPTS]]
    ids = forward.pad_right(rows, model.device)
    real = torch.cat([torch.arange(ids.shape[1]) < len(row) for row in rows]).to(model.device)

    def log_probabilities(network: Any) -> Tensor:
        logits: Tensor = network(input_ids=ids, use_cache=False).logits.float()
        return logits.flatten(0, 1)[real]

    with steer(model, direction, alpha):
        exact = log_probabilities(model.network)
    with console.library_noise_muted():
        wrapped = peft.PeftModel.from_pretrained(model.network, str(folder))
    try:
        exported = log_probabilities(wrapped)
    finally:
        wrapped.unload()
    spent = kl(exact.log_softmax(-1), exported.log_softmax(-1)).mean()
    return {"max": float((exact - exported).abs().max()), "kl": float(spent), "positions": float(len(exact))}


def _at_least_rank_one(delta: Delta) -> tuple[Tensor, Tensor]:
    """The factors; an update of rank 0 becomes a zero of rank 1, because PEFT allows no rank 0."""
    if delta.rank:
        return delta.left, delta.right
    rows, columns = delta.shape
    return torch.zeros(rows, 1), torch.zeros(1, columns)
