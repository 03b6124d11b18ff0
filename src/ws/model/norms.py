"""Root-mean-square norms in few passes over memory. On a CPU the library's norms cost a third of the matrix products.

    y = x / sqrt(mean(x^2) + eps) * scale         scale: the weight, or 1 + weight (Gemma)

The library converts, squares, averages, multiplies and converts back, with one pass for each. Here the sum of squares
is one reduction; the products are in fp32 and rounded once. In half precision one compiled kernel does all of it if
a C++ compiler is installed. The backward pass needs the input and one number per row. Each norm is compared with the
library's form before it is replaced. A norm that computes something else stays as it is.
"""

from __future__ import annotations

import inspect
import shutil
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ws.base import console

COMPILE_FROM = 50_000_000
"""Parameters from which a half-precision network is worth the seconds that compiling takes."""
_MARK = "Lean"


Kernel = Callable[..., Any]


def normalised(
    rows: Float[Tensor, "n width"], scale: Float[Tensor, " width"], eps: float
) -> tuple[Float[Tensor, "n width"], Float[Tensor, "n 1"]]:
    """The norm of every row, rounded once to the dtype of `rows`, and its factor 1 / sqrt(mean(x^2) + eps).

    Sums are in fp32, or in fp64 for fp64 rows.
    """
    wide = torch.promote_types(rows.dtype, torch.float32)
    length = torch.linalg.vector_norm(rows, dim=-1, keepdim=True, dtype=wide)
    inverse = (length * length / rows.shape[-1] + eps).rsqrt()
    return (rows * inverse).mul_(scale).to(rows.dtype), inverse


def gradient_of_rows(
    gradient: Float[Tensor, "n width"], rows: Float[Tensor, "n width"], scale: Float[Tensor, " width"],
    inverse: Float[Tensor, "n 1"],
) -> Float[Tensor, "n width"]:  # fmt: skip
    """The gradient of `normalised` to its rows: (g - u mean(g u)) / sqrt(...), u the normalised row, g = dy * scale."""
    unit = rows * inverse
    scaled = gradient * scale.to(inverse.dtype)
    return (inverse * (scaled - unit * (scaled * unit).mean(-1, keepdim=True))).to(rows.dtype)


class _Normalise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, scale: Tensor, eps: float, forward: Kernel, backward: Kernel) -> Tensor:
        found, inverse = forward(rows, scale, eps)
        ctx.save_for_backward(rows, scale, inverse)
        ctx.backward_kernel = backward
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        rows, scale, inverse = ctx.saved_tensors
        (gradient,) = gradients
        of_rows = ctx.backward_kernel(gradient, rows, scale, inverse) if ctx.needs_input_grad[0] else None
        of_scale = (gradient * (rows * inverse)).sum(0).to(scale.dtype) if ctx.needs_input_grad[1] else None
        return of_rows, of_scale, None, None, None


def norm(
    x: Float[Tensor, "*rows width"], scale: Float[Tensor, " width"], eps: float, *, compiled: bool = False
) -> Float[Tensor, "*rows width"]:
    """The norm over the last dimension; with `compiled`, one kernel each way."""
    rows = x.reshape(-1, x.shape[-1])
    # a single row would be compiled separately
    forward, backward = _kernels() if compiled and len(rows) > 1 else (normalised, gradient_of_rows)
    if torch.is_grad_enabled() and (rows.requires_grad or scale.requires_grad):
        return _Normalise.apply(rows, scale, eps, forward, backward).view(x.shape)
    return forward(rows, scale, eps)[0].view(x.shape)


# -------------------------------------------------------------------- compiled


@cache
def _kernels() -> tuple[Kernel, Kernel]:
    return _compiled(normalised), _compiled(gradient_of_rows)


def _compiled(function: Kernel) -> Kernel:
    """One compiled kernel for every state. Otherwise each gradient mode and autocast mode would get its own."""
    kernel = torch.compile(inspect.unwrap(function), dynamic=True)  # a compiler cannot read shape checks

    def call(*given: Tensor | float) -> Any:
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            return kernel(*(one.detach() if isinstance(one, Tensor) else one for one in given))

    return call


@cache
def can_compile() -> bool:
    """Whether the kernels compile here and give the right values. Tried once; a failed compilation gives a warning."""
    if shutil.which("g++") is None and shutil.which("clang++") is None:
        return False
    rows = torch.linspace(-3, 3, 64 * 7).view(7, 64).to(torch.bfloat16)
    scale = torch.linspace(0.5, 2, 64).to(torch.bfloat16)
    forward, backward = _kernels()
    try:
        found, inverse = forward(rows, scale, 1e-6)
        moved = backward(rows, rows, scale, inverse)
    except (RuntimeError, OSError, ImportError, AttributeError) as error:  # compilers fail in many ways
        console.warn(f"norms cannot be compiled here ({type(error).__name__}); half precision will be slower")
        return False
    exact, inverse = normalised(rows, scale, 1e-6)
    wanted = gradient_of_rows(rows, rows, scale, inverse)
    return torch.allclose(found, exact, rtol=2**-7) and torch.allclose(moved, wanted, rtol=2**-5, atol=2**-5)


# -------------------------------------------------------------------- on a network


@torch.no_grad()
def use_lean(network: nn.Module) -> None:
    """Replace the forward pass of the network's root-mean-square norms if the result stays the same."""
    half = any(p.dtype in (torch.bfloat16, torch.float16) for p in network.parameters())
    compiled = half and sum(p.numel() for p in network.parameters()) >= COMPILE_FROM and can_compile()
    for module in network.modules():
        if type(module).__name__.endswith("RMSNorm") and not is_lean(module):
            _replace(module, compiled)


def use_library(network: nn.Module) -> None:
    """Restore the network's own norms."""
    for module in network.modules():
        if is_lean(module):
            module.__class__ = type(module).__mro__[1]


def is_lean(module: nn.Module) -> bool:
    """Whether this module uses the norm above."""
    return type(module).__name__.startswith(_MARK)


def _replace(module: nn.Module, compiled: bool) -> None:
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim != 1 or not isinstance(_epsilon(module), float):
        return
    width, kind = len(weight), type(module)
    rows = torch.linspace(-2, 3, 5 * width, device=weight.device).view(5, width).sin().to(weight.dtype)
    before = module(rows)
    tolerance = 1e-5 if weight.dtype == torch.float32 else 2e-2
    for offset in (0.0, 1.0):
        module.__class__ = _lean(kind, offset, compiled)  # type: ignore[arg-type]
        found = module(rows)
        if found.dtype == before.dtype and (found - before).abs().max() <= tolerance * before.abs().max():
            return
    module.__class__ = kind


def _epsilon(module: nn.Module) -> Any:
    return getattr(module, "variance_epsilon", getattr(module, "eps", None))


@cache
def _lean(kind: type[nn.Module], offset: float, compiled: bool) -> type[nn.Module]:
    """A subclass with a different forward. An instance keeps everything else, also in copies."""

    def forward(self: Any, hidden_states: Tensor) -> Tensor:
        scale = self.weight.float() + offset if offset else self.weight
        return norm(hidden_states, scale, _epsilon(self), compiled=compiled)

    return type(_MARK + kind.__name__, (kind,), {"forward": forward})
