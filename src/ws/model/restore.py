"""Restore a network and the global random state after a fit.

A fit switches modules to training mode, freezes parameters and seeds the global generators, because PEFT draws its
initial values from them. A fit must not change the caller's model or the caller's random numbers.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn


@contextmanager
def restored(network: nn.Module) -> Iterator[None]:
    """Undo at the end of the block, also after an exception: modes, `requires_grad` flags, global random states.

    Modes are restored per module, flags per parameter. Values of parameters are not restored. Within the block all
    existing parameters are frozen.
    """
    modes = [(module, module.training) for module in network.modules()]
    flags = [(parameter, parameter.requires_grad) for parameter in network.parameters()]
    with _random_state_restored():
        network.requires_grad_(False)
        try:
            yield
        finally:
            for module, was_training in modes:
                module.training = was_training
            for parameter, required in flags:
                parameter.requires_grad_(required)


@contextmanager
def _random_state_restored() -> Iterator[None]:
    """Restore the global random states of torch on every device in use, of `random` and of numpy."""
    has_cuda, has_mps = torch.cuda.is_initialized(), torch.backends.mps.is_available()
    of_torch = torch.get_rng_state()
    of_cuda = torch.cuda.get_rng_state_all() if has_cuda else []
    of_mps = torch.mps.get_rng_state() if has_mps else None
    of_python, of_numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        yield
    finally:
        torch.set_rng_state(of_torch)
        if has_cuda:
            torch.cuda.set_rng_state_all(of_cuda)
        if of_mps is not None:
            torch.mps.set_rng_state(of_mps)
        random.setstate(of_python)
        np.random.set_state(of_numpy)  # noqa: NPY002 - the global state is the caller's
