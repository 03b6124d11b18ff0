"""The feed-forward of the last decoder layer, run only where something is read.

Above the last attention no position looks at another one. Of a row whose last position is scored, the feed-forward of
the last layer is therefore needed at that position alone, and of a prefix that is computed for its attention cache
nowhere: three quarters of that layer's arithmetic. Elsewhere its output is zero, which nobody reads. Compared with the
whole layer once per model.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ws.model import architecture, forward
from ws.model.forward import OncePerNetwork
from ws.model.loading import ChatModel


@contextmanager
def only_scored(model: ChatModel) -> Iterator[None]:
    """Within the block, forward passes under `forward.scoring_at` take that short cut, where the model allows."""
    module = _feed_forward(model.network)
    if module is None or not is_exact(model):
        yield
        return
    with _narrowed(module):
        yield


@contextmanager
def _narrowed(module: nn.Module) -> Iterator[None]:
    whole = module.forward

    def narrowed(hidden: Tensor) -> Tensor:
        columns = forward.scored_positions()
        if columns is None or hidden.ndim != 3 or len(columns) != len(hidden):
            return whole(hidden)
        found = torch.zeros_like(hidden)
        rows = torch.nonzero(columns >= 0).flatten()
        if len(rows):
            found[rows, columns[rows]] = whole(hidden[rows, columns[rows]][:, None])[:, 0]
        return found

    with forward.replaced(module, narrowed):
        yield


def _feed_forward(network: nn.Module) -> nn.Module | None:
    """The module of the last layer that holds its `down` map; None where there is none, as in mixtures of experts."""
    prefix, blocks = architecture.decoder_layers(network)
    last = len(blocks) - 1
    names = [site.module for site in architecture.sites(network, [last]) if "down" in site.roles]
    inner = names[0].removeprefix(f"{prefix}.{last}.").rpartition(".")[0] if len(names) == 1 else ""
    return blocks[last].get_submodule(inner) if inner else None


@torch.no_grad()
def _matches_whole(model: ChatModel) -> bool:
    module = _feed_forward(model.network)
    if module is None:
        return False
    count = model.network.get_input_embeddings().weight.shape[0]
    ids = (11 * torch.arange(24, device=model.device) + 5).view(2, -1) % count
    rows, columns = torch.arange(2, device=model.device), torch.tensor([11, 6], device=model.device)
    tolerance = 1e-4 if model.dtype == torch.float32 else 5e-2
    try:
        with forward.scoring_at(columns):
            whole = model.split.logits_at(ids, rows, columns)
            with _narrowed(module):
                found = model.split.logits_at(ids, rows, columns)
    except (TypeError, ValueError, RuntimeError, IndexError):  # a feed-forward that is called in another way
        return False
    return bool((found - whole).abs().max() <= tolerance * whole.abs().max().clamp(min=1e-6))


is_exact = OncePerNetwork(_matches_whole, "the last feed-forward does not run alone; running it everywhere")
"""Whether the short cut gives the logits of the whole layer."""
