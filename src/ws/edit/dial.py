"""A Dial: directions on a model with a strength per row of the batch, which may change at every forward pass.

    y_r = W x_r  +  left (alpha_r * (right x_r))      left, right: the factors of all directions side by side

The factors of any number of directions are stacked once, so a pass costs two thin products per edited map, whatever mix
each row has. Updates without thin factors (dense ones, functions of the base weights) are applied one by one. Side
paths are in the dtype of the weights, summed in fp32 and rounded once. A pass whose rows all have strength 0 runs the
unedited model.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ws.algebra.delta import Delta
from ws.algebra.direction import Direction
from ws.base.errors import UnsupportedFeatureError
from ws.edit.steering import require_fits
from ws.model import architecture
from ws.model.loading import ChatModel


def require_turnable(model: ChatModel, direction: Direction) -> None:
    """Raise unless the direction belongs to the model and every parameter that it changes has a run-time side path."""
    require_fits(model.network, direction)
    modules = dict(model.network.named_modules())
    for name in direction.deltas:
        module, _, leaf = name.rpartition(".")
        if leaf not in ("weight", "bias") or not architecture.is_linear_map(modules[module]):
            raise UnsupportedFeatureError(
                f"{name} does not belong to a linear map, so its strength cannot differ between requests",
                "Leave it out with direction.drop(...), or export the model at one strength.",
            )


class Dial:
    """Directions on a model. `turn` sets the strengths of the rows of the next passes; `remove` takes them off."""

    def __init__(self, model: ChatModel, directions: Sequence[Direction]) -> None:
        for direction in directions:
            require_turnable(model, direction)
        self._strengths: Tensor | None = None
        self._hooks = ExitStack()
        terms: dict[str, list[tuple[int, Delta]]] = defaultdict(list)
        for number, direction in enumerate(directions):
            for name, delta in direction.deltas.items():
                terms[name].append((number, delta))
        modules = dict(model.network.named_modules())
        for name, updates in terms.items():
            module = modules[name.rpartition(".")[0]]
            hook = self._hook(module, model.network.get_parameter(name), updates, is_bias=name.endswith(".bias"))
            self._hooks.callback(module.register_forward_hook(hook).remove)

    def turn(self, strengths: Float[Tensor, "rows directions"] | None) -> None:
        """Set the strength of every direction for every row of the next passes. None, or only zeros: the base model."""
        self._strengths = None if strengths is None or not strengths.any() else strengths

    def remove(self) -> None:
        """Take the directions off. The weights were never changed."""
        self._hooks.close()

    def _by_row(self, output: Tensor) -> Float[Tensor, "rows ... directions"]:
        """The strengths, shaped to meet the rows of an output of a linear map."""
        assert self._strengths is not None
        if len(output) != len(self._strengths):
            raise UnsupportedFeatureError(
                f"a linear map gets {len(output)} rows of a batch of {len(self._strengths)}, so strengths per request "
                "cannot be told apart in it",
                "Leave the experts out with direction.drop(modules=...), or export the model at one strength.",
            )
        return self._strengths.view(len(output), *(1,) * (output.ndim - 2), -1)

    def _hook(
        self, module: nn.Module, weight: Tensor, updates: Sequence[tuple[int, Delta]], *, is_bias: bool
    ) -> Callable[..., Any]:
        placed = [(number, delta.to(weight.device)) for number, delta in updates]
        if is_bias:
            shifts = torch.stack([delta.materialise(weight.data[:, None])[:, 0] for _, delta in placed])
            return self._shift(shifts, [number for number, _ in placed])
        base = weight.data
        if architecture.is_conv1d(module):
            placed, base = [(number, delta.T) for number, delta in placed], base.T
        thin = [(number, delta) for number, delta in placed if delta.is_thin and delta.rank]
        others = [(number, delta) for number, delta in placed if not delta.is_thin]
        return self._side_path(thin, others, base)

    def _shift(self, shifts: Float[Tensor, "updates out"], numbers: list[int]) -> Callable[..., Any]:
        def hook(_module: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            if self._strengths is None:
                return output
            change = self._by_row(output)[..., numbers] @ shifts
            return (output.to(torch.float32) + change).to(output.dtype)

        return hook

    def _side_path(
        self, thin: Sequence[tuple[int, Delta]], others: Sequence[tuple[int, Delta]], base: Tensor
    ) -> Callable[..., Any]:
        # the number of the direction that each stacked factor belongs to
        owners = torch.tensor([number for number, delta in thin for _ in range(delta.rank)], device=base.device)
        left = torch.cat([delta.left for _, delta in thin], dim=1).to(base).contiguous() if thin else None
        right = torch.cat([delta.right for _, delta in thin]).to(base).contiguous() if thin else None

        def hook(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            if self._strengths is None:
                return output
            strengths, changed = self._by_row(output), output
            if left is not None and right is not None:
                reduced = nn.functional.linear(inputs[0], right)
                scaled = (reduced * strengths[..., owners]).to(output.dtype)
                flat = torch.addmm(output.flatten(0, -2), scaled.flatten(0, -2), left.mT)
                changed = flat.view_as(output)
            for number, delta in others:
                strength = strengths[..., number, None]
                side = changed.to(torch.float32) + strength * delta.apply(inputs[0], weight=base)
                changed = torch.where(strength != 0, side.to(output.dtype), changed)
            return changed

        return hook
