"""Several adapters on one network at once: every row of a batch passes through the adapter of its own branch.

Both signs (and several seeds) are fitted in one pass over one frozen base: attention, norms, feed-forward, head and the
maps that are not adapted see one large batch, and only at an adapted map do the rows part:

    y = concat_k layer_k(x_k)             x_k: the rows of branch k;  layer_k: the map with the adapter of branch k
      = W x + concat_k s_k B_k A_k x_k    plain LoRA: one large product for all branches, then thin ones

The loss of a branch depends on its own rows alone, so its gradient is what it would be if it were fitted alone. The
first line holds for every family, because nothing is asked of the form of an adapter.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from ws.adapters.attach import AdapterSettings, Attached, attach
from ws.model import architecture


class NotByRowsError(RuntimeError):
    """An adapted map does not see the rows of the batch, as in mixtures of experts."""


class Together:
    """Adapters of several branches on a network; `rows` says how the present batch is divided."""

    def __init__(self, branches: Sequence[Attached]) -> None:
        self.branches = list(branches)
        self._slices: list[slice] = []

    def save(self, number: int, folder: Path) -> None:
        """Write the PEFT folder of one branch, outside of the block that trains them."""
        one = self.branches[number]
        one.resume()
        try:
            one.save(folder)
        finally:
            one.suspend()

    @property
    def parameters(self) -> list[list[nn.Parameter]]:
        """The trainable parameters of every branch."""
        return [one.trainable for one in self.branches]

    def first_layer(self, network: nn.Module) -> int:
        """The first decoder layer that carries an adapter."""
        prefix, _ = architecture.decoder_layers(network)
        return min(int(place.removeprefix(f"{prefix}.").split(".", 1)[0]) for place in self.branches[0].layers)

    @contextmanager
    def rows(self, counts: Sequence[int]) -> Iterator[None]:
        """Within the block, a batch holds `counts[k]` rows of branch k, in the order of the branches."""
        self._slices = [slice(start, stop) for start, stop in pairwise([0, *accumulate(counts)])]
        try:
            yield
        finally:
            self._slices = []

    def route(self, layers: Sequence[nn.Module], x: Tensor, plain: bool) -> Tensor:
        """`x` through the layers, each branch's rows through its own; `plain` if all are `W x + s B A x`."""
        if len(layers) == 1:
            return layers[0](x)
        if not self._slices or len(x) != self._slices[-1].stop:
            raise NotByRowsError("an adapted map does not see the rows of the batch")
        # split, not slices: the backward pass of a slice fills a tensor as large as the whole
        blocks = x.split([rows.stop - rows.start for rows in self._slices])
        parts = [(layer, rows) for layer, rows in zip(layers, blocks, strict=True) if len(rows)]
        if plain:
            whole = cast(Any, parts[0][0]).get_base_layer()(x)
            return whole + torch.cat([_low_rank(layer, rows) for layer, rows in parts]).to(whole.dtype)
        return torch.cat([layer(rows) for layer, rows in parts])


def _is_plain_lora(layer: Any) -> bool:
    """Whether the layer is `W x + s B A x` and nothing else: no other start, no dropout, nothing that hooks hang on."""
    from peft.tuners.lora import Linear  # noqa: PLC0415 - heavy import, late

    return (
        type(layer) is Linear
        and not layer._forward_hooks
        and len(layer.active_adapters) == 1
        and not layer.lora_variant
        and all(isinstance(dropout, nn.Identity) for dropout in layer.lora_dropout.values())
        and not layer.disable_adapters
    )


def _low_rank(layer: Any, x: Tensor) -> Tensor:
    """`s B A x` of the only adapter of a layer, in the dtype of its factors or that of autocast."""
    (name,) = layer.active_adapters
    down, up = layer.lora_A[name], layer.lora_B[name]
    # autocast would only turn a conversion back
    inputs = x if torch.is_autocast_enabled(x.device.type) else x.to(down.weight.dtype)
    return up(down(inputs)) * layer.scaling[name]


class _Routed(nn.Module):
    """Stands where an adapted map was."""

    def __init__(self, layers: Sequence[nn.Module], together: Together) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self._route = together.route
        self._plain = all(map(_is_plain_lora, layers))

    def forward(self, x: Tensor) -> Tensor:
        return self._route(list(self.layers), x, self._plain)


@contextmanager
def attach_together(network: Any, settings: AdapterSettings, name: str, seeds: Sequence[int]) -> Iterator[Together]:
    """Put one fresh adapter per seed on the network; within the block `Together.rows` divides its batches.

    Every adapter starts as it would alone under its seed. Leaving the block leaves the network as it was.
    """
    branches: list[Attached] = []
    for seed in seeds:
        torch.manual_seed(seed)
        branches.append(attach(network, settings, name))
        branches[-1].suspend()
    together = Together(branches)
    places = branches[0].layers
    try:
        for place in places:
            architecture.replace_module(network, place, _Routed([one.layers[place] for one in branches], together))
        yield together
    finally:
        for place, layer in places.items():
            architecture.replace_module(network, place, layer.get_base_layer())
