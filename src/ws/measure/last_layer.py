"""Run the feed-forward of the last decoder layer only at scored positions.

After the last attention, positions do not depend on each other. A row that is scored at its last position needs the
last feed-forward at that position only. A prefix that only fills the attention cache does not need it at all. This
saves three quarters of the layer's arithmetic. At all other positions the output is zero and is never read. The result
is compared with the whole layer once per model.
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
    """Within the block, forward passes under `forward.scoring_at` take this short cut, if the model allows it."""
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
    """The module of the last layer that holds its `down` map; None if there is no single one (mixtures of experts)."""
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
    except (TypeError, ValueError, RuntimeError, IndexError):  # a feed-forward with a different signature
        return False
    return bool((found - whole).abs().max() <= tolerance * whole.abs().max().clamp(min=1e-6))


is_exact = OncePerNetwork(_matches_whole, "the last feed-forward does not run alone; running it at all positions")
"""Whether the short cut gives the logits of the whole layer."""
