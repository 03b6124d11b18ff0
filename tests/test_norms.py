"""Lean norms are the library's norms in fewer passes; a norm that computes something else stays as it is."""

from __future__ import annotations

import copy
import shutil

import pytest
import torch
from torch import Tensor, nn

from making import relative_error
from ws.model import loading, norms
from ws.model.loading import ChatModel

NORMALISED = ("qwen3", "llama", "gemma3", "mistral", "phi3", "qwen3_moe")
COMPILER = pytest.mark.skipif(
    shutil.which("g++") is None and shutil.which("clang++") is None, reason="needs a C++ compiler"
)


def by_formula(rows: Tensor, scale: Tensor, eps: float) -> Tensor:
    """The definition, fp64."""
    wide = rows.double()
    return wide / (wide.square().mean(-1, keepdim=True) + eps).sqrt() * scale.double()


def some_rows(width: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(width)
    sizes = torch.tensor([1e-4, 1e-2, 1.0, 30.0, 1e3])[:, None, None]
    return (torch.randn(5, 3, width, generator=generator) * sizes).to(dtype)


@pytest.mark.parametrize("width", [1, 7, 32, 128])
@pytest.mark.parametrize("eps", [1e-6, 1e-5])
def test_the_norm_is_its_formula(width: int, eps: float) -> None:
    rows, scale = some_rows(width), torch.linspace(-1, 2, width)
    found = norms.norm(rows, scale, eps)
    assert found.shape == rows.shape and found.dtype == rows.dtype
    assert relative_error(found.double(), by_formula(rows, scale, eps)) < 1e-6


def test_half_precision_is_rounded_once() -> None:
    rows, scale = some_rows(64, torch.bfloat16), torch.linspace(0.5, 2, 64).to(torch.bfloat16)
    exact = by_formula(rows, scale, 1e-6)
    # half a unit in the last place of bf16 is at most 2^-8 of the value, and nothing else is lost
    assert bool(((norms.norm(rows, scale, 1e-6).double() - exact).abs() <= exact.abs() * (2**-8 + 1e-5)).all())


def test_gradients_are_those_of_the_formula() -> None:
    rows = some_rows(16)[1:4].double().requires_grad_()
    scale = torch.linspace(-1, 2, 16).double().requires_grad_()
    wanted = torch.autograd.grad(by_formula(rows, scale, 1e-5).sin().sum(), (rows, scale))
    single = [one.detach().float().requires_grad_() for one in (rows, scale)]
    found = torch.autograd.grad(norms.norm(*single, 1e-5).sin().sum(), single)
    for one, other in zip(found, wanted, strict=True):
        assert relative_error(one.double(), other) < 1e-5


def test_a_frozen_weight_gets_no_gradient() -> None:
    rows, scale = some_rows(8).requires_grad_(), torch.ones(8)
    norms.norm(rows, scale, 1e-6).sum().backward()
    assert rows.grad is not None and scale.grad is None


def test_the_norms_of_every_architecture_become_lean_and_compute_the_same(any_model: ChatModel) -> None:
    network = copy.deepcopy(any_model.network)
    lean = [name for name, module in network.named_modules() if norms.is_lean(module)]
    known = [name for name, module in network.named_modules() if type(module).__name__.endswith("RMSNorm")]
    assert lean == known
    ids = torch.arange(30).view(2, 15) * 11 % network.get_input_embeddings().weight.shape[0]
    with torch.no_grad():
        found = network(input_ids=ids, use_cache=False).logits
        norms.use_library(network)
        assert not any(norms.is_lean(module) for module in network.modules())
        assert relative_error(found, network(input_ids=ids, use_cache=False).logits) < 1e-5


def test_the_tiny_models_have_such_norms(tiny_folders: dict[str, object]) -> None:
    for architecture in NORMALISED:
        if architecture in tiny_folders:
            network = loading.load(str(tiny_folders[architecture])).network
            assert any(norms.is_lean(module) for module in network.modules()), architecture


def test_a_copy_uses_its_own_weights(qwen: ChatModel) -> None:
    network = copy.deepcopy(qwen.network)
    mine = next(module for module in network.modules() if norms.is_lean(module))
    other = next(module for module in qwen.network.modules() if norms.is_lean(module))
    rows = some_rows(len(mine.weight))
    before = other(rows)
    mine.weight.data.mul_(3)
    assert torch.equal(other(rows), before) and relative_error(mine(rows), 3 * before) < 1e-6


def test_a_norm_that_computes_something_else_is_left_alone() -> None:
    class CentredRMSNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.eps = nn.Parameter(torch.ones(8)), 1e-6

        def forward(self, rows: Tensor) -> Tensor:
            rows = rows - rows.mean(-1, keepdim=True)
            return rows * (rows.square().mean(-1, keepdim=True) + self.eps).rsqrt() * self.weight

    class BareRMSNorm(nn.Module):
        def forward(self, rows: Tensor) -> Tensor:
            return rows

    network = nn.Sequential(CentredRMSNorm(), BareRMSNorm())
    norms.use_lean(network)
    assert [type(module) for module in network] == [CentredRMSNorm, BareRMSNorm]


@COMPILER
@pytest.mark.slow
def test_compiled_kernels_are_the_plain_form() -> None:
    assert norms.can_compile()
    for width in (32, 128):
        for rows in (some_rows(width, torch.bfloat16), some_rows(width, torch.bfloat16)[:1, :1]):
            scale = torch.linspace(0.5, 2, width).to(torch.bfloat16)
            found = [one.detach().requires_grad_() for one in (rows, rows)]
            outputs = [
                norms.norm(one, scale, 1e-6, compiled=state) for one, state in zip(found, (True, False), strict=True)
            ]
            assert torch.allclose(*outputs, rtol=2**-7)
            for output in outputs:
                output.float().sin().sum().backward()
            assert torch.allclose(
                found[0].grad, found[1].grad, rtol=2**-5, atol=2**-7 * float(found[1].grad.abs().max())
            )


def test_a_compiler_that_fails_is_told_and_done_without(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: object) -> tuple[Tensor, Tensor]:
        raise RuntimeError("no headers")

    monkeypatch.setattr(norms, "_kernels", lambda: (broken, broken))
    monkeypatch.setattr(shutil, "which", lambda _name: "/usr/bin/g++")
    norms.can_compile.cache_clear()
    assert not norms.can_compile()
    assert "norms cannot be compiled here" in capsys.readouterr().err
    norms.can_compile.cache_clear()
