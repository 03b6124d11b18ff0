"""Muon: updates with singular values near one, and the same steps as PyTorch's own up to its rounding."""

import pytest
import torch
from torch import nn

from ws.pocket.muon import Muon, orthogonalised


@pytest.mark.parametrize("shape", [(24, 24), (16, 48), (48, 16)])
def test_singular_values_come_near_one_and_vectors_stay(shape: tuple[int, int]) -> None:
    matrices = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0)).double()
    result = orthogonalised(matrices)
    assert result.shape == matrices.shape
    for before, after in zip(matrices, result, strict=True):
        left, values, right = torch.linalg.svd(before, full_matrices=False)
        inner = left.T @ after @ right.T
        assert float((inner - torch.diag(inner.diagonal())).abs().max()) < 1e-8
        strong = values > 0.02 * values.norm()
        assert bool(((inner.diagonal() > 0.6) & (inner.diagonal() < 1.3))[strong].all())


def test_stacked_matrices_do_not_influence_each_other() -> None:
    matrices = torch.randn(4, 8, 12, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(orthogonalised(matrices)[2], orthogonalised(matrices[2:3])[0], atol=1e-6)


def test_steps_agree_with_the_library_up_to_its_bfloat16() -> None:
    torch.manual_seed(0)
    mine = [nn.Parameter(torch.randn(shape)) for shape in ((16, 32), (32, 16), (16, 32))]
    theirs = [nn.Parameter(p.detach().clone()) for p in mine]
    ours, library = Muon(mine, lr=0.1), torch.optim.Muon(theirs, lr=0.1, weight_decay=0.0)
    start = [p.detach().clone() for p in mine]
    for _ in range(3):
        for one, other in zip(mine, theirs, strict=True):
            one.grad = torch.randn(one.shape)
            other.grad = one.grad.clone()
        ours.step()
        library.step()
    for one, other, first in zip(mine, theirs, start, strict=True):
        moved = float((one - first).norm())
        assert float((one - other).norm()) < 0.03 * moved


def test_parameters_without_gradient_stay() -> None:
    parameter = nn.Parameter(torch.ones(3, 4))
    Muon([parameter], lr=1.0).step()
    assert torch.equal(parameter, torch.ones(3, 4))
