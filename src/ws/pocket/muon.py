"""The Muon optimiser in float32, for matrices (Jordan et al. 2024, "Muon: an optimizer for hidden layers").

    m <- beta m + (1 - beta) g        u = (1 - beta) g + beta m        W <- W - lr sqrt(max(1, out / in)) orth(u)

`orth` brings all singular values near one with five quintic Newton-Schulz steps. PyTorch's own Muon takes these steps
in bfloat16, one matrix at a time; on a CPU that emulates bfloat16 they then cost three times the rest of a training
step. Here matrices of one shape are stacked and stay in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

_QUINTIC = (3.4445, -4.7750, 2.0315)
_STEPS = 5


def orthogonalised(matrices: Float[Tensor, "n out in"]) -> Float[Tensor, "n out in"]:
    """Every matrix with its singular values brought into about (0.7, 1.2) and its singular vectors kept."""
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    a, b, c = _QUINTIC
    for _ in range(_STEPS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Momentum with orthogonalised updates, for parameters of two dimensions; no weight decay."""

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float, momentum: float = 0.95) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """One update of all matrices that have a gradient."""
        assert closure is None
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[nn.Parameter]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape.setdefault(parameter.shape, []).append(parameter)
            for shape, parameters in by_shape.items():
                updates = torch.stack([self._momentum(parameter, group["momentum"]) for parameter in parameters])
                scale = -group["lr"] * max(1.0, shape[0] / shape[1]) ** 0.5
                for parameter, update in zip(parameters, orthogonalised(updates), strict=True):
                    parameter.add_(update, alpha=scale)

    def _momentum(self, parameter: nn.Parameter, beta: float) -> Tensor:
        state = self.state[parameter]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(parameter)
        assert parameter.grad is not None
        average: Tensor = state["momentum"].lerp_(parameter.grad, 1 - beta)
        return parameter.grad.lerp(average, beta)
