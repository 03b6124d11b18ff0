"""The contrast with biases alone: one vector per MLP matrix instead of an update of the matrix.

    y = W x + b_pos  against  y = W x + b_neg;    the edit adds alpha * (b_pos - b_neg)

Biases are fitted like adapters, on the same data with the same loss (Fierro and Roger, 2511.05408, use this as a
baseline). Models without biases get them for the fit; the edit is a set of constant shifts of module outputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import polars as pl
import torch
from jaxtyping import Float
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ws.algebra.delta import Alpha, per_row
from ws.base.errors import UserError
from ws.base.files import atomic_file, content_key, tensors_key
from ws.base.poles import POLES, Pole
from ws.edit.condition import Undo
from ws.edit.steering import Hook
from ws.fitting import learning_rate, train
from ws.fitting.train import Examples, FitResult
from ws.fitting.train_settings import TrainSettings
from ws.model import architecture
from ws.model.loading import ChatModel
from ws.model.restore import restored

MLP_ROLES = ("gate", "up", "down")
LEARNING_RATES = (1e-3, 3e-3, 1e-2)
"""Rates that are tried; the lowest validation loss, averaged over both signs, decides. If nothing is held out, the
training loss decides. Vectors need higher rates than matrices."""


@dataclass(frozen=True, eq=False)
class OutputShift:
    """Constant vectors (out,) that are added to the outputs of linear maps, by module name; an Effect."""

    vectors: Mapping[str, Float[Tensor, " out"]]
    base: str

    @property
    def content_key(self) -> str:
        """Digest of base, modules and vectors."""
        return content_key("output shift", self.base, tensors_key(self.vectors))

    def attach(self, network: nn.Module, alpha: Alpha) -> Undo:
        """Add `alpha * vector` to every output, in fp32 with one rounding."""
        modules = dict(network.named_modules())
        if absent := sorted(self.vectors.keys() - modules.keys()):
            raise UserError(f"the model has no module {absent[0]}", "Load the base model of these biases.")
        handles = [modules[name].register_forward_hook(_shift(vector, alpha)) for name, vector in self.vectors.items()]

        def undo() -> None:
            for handle in handles:
                handle.remove()

        return undo

    def __sub__(self, other: OutputShift) -> OutputShift:
        return OutputShift({name: self.vectors[name] - other.vectors[name] for name in self.vectors}, self.base)

    def norm(self) -> float:
        """Euclidean norm over all vectors."""
        return float(torch.cat([v.flatten() for v in self.vectors.values()]).norm())

    def save(self, path: Path) -> None:
        """One safetensors file."""
        tensors = {name: vector.detach().cpu().contiguous() for name, vector in self.vectors.items()}
        with atomic_file(path) as temporary:
            save_file(tensors, temporary, metadata={"base": self.base})

    @classmethod
    def load(cls, path: Path) -> OutputShift:
        """Read what `save` wrote."""
        with safe_open(path, framework="pt") as file:
            return cls({name: file.get_tensor(name) for name in file.keys()}, file.metadata()["base"])  # noqa: SIM118


def _shift(vector: Tensor, alpha: Alpha) -> Hook:
    def hook(_module: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        by_row = torch.as_tensor(per_row(alpha, output))
        return (output.float() + by_row * vector.to(output.device)).to(output.dtype)

    return hook


def fit(model: ChatModel, pairs: pl.DataFrame, chosen: TrainSettings, *, seed: int, data_seed: int) -> OutputShift:
    """Fit the MLP biases of the slice for both signs at the best of `LEARNING_RATES`; return their difference.

    The model is unchanged afterwards.
    """
    fitted: dict[tuple[float, Pole], OutputShift] = {}

    def losses_at(rate: float) -> dict[Pole, float]:
        losses: dict[Pole, float] = {}
        for pole in POLES:
            data = train.examples(model, pairs, pole, chosen, data_seed)
            shift, result = _fit(model, data, replace(chosen, lr=rate), seed, f"training {pole}, biases")
            fitted[rate, pole], losses[pole] = shift, result.last_loss
        return losses

    best = learning_rate.choose(LEARNING_RATES, losses_at).chosen
    return fitted[best, "pos"] - fitted[best, "neg"]


def _fit(
    model: ChatModel, data: Examples, chosen: TrainSettings, seed: int, description: str
) -> tuple[OutputShift, FitResult]:
    layers = architecture.layer_slice(model.layer_count, *chosen.adapter.layers)
    sites = [site for site in architecture.sites(model.network, layers) if set(site.roles) & set(MLP_ROLES)]
    biases = {
        site.module: nn.Parameter(torch.zeros(site.shape[1 if site.transposed else 0], device=model.device))
        for site in sites
    }
    with restored(model.network), ExitStack() as stack:
        model.network.eval()
        _ = model.split  # its check makes forward passes, which must see the model without biases
        stack.callback(OutputShift(biases, model.fingerprint).attach(model.network, 1.0))
        _, result = train.optimise(
            model, data, list(biases.values()), chosen, seed=seed, first_layer=layers[0], description=description
        )
    return OutputShift({name: bias.detach() for name, bias in biases.items()}, model.fingerprint), result
