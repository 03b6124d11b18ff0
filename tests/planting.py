"""Directions with a known truth: a rank-k write towards one answer in chosen matrices of a model, and noise elsewhere.

    dW = sum_i b_i a_i'     b_i = unit(readout + r_i)     a_i = unit(mean input at the anchor + n_i)

The readout is the unembedding of the first answer minus that of the second, so every b_i moves the log-ratio; r_i and
n_i are random, so that the k directions differ. Noise is a random direction on all matrices of the slice.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from making import random_direction
from ws.algebra.delta import Delta
from ws.algebra.direction import Direction
from ws.base import keyed_random
from ws.measure.choice import answers_of
from ws.measure.probe import Probe
from ws.model import architecture, forward
from ws.model.loading import ChatModel


def inputs_at_anchor(model: ChatModel, probe: Probe, modules: Sequence[str]) -> dict[str, Tensor]:
    """Mean input of each module at the answer anchor."""
    heard: dict[str, list[Tensor]] = {name: [] for name in modules}
    handles = [
        model.network.get_submodule(name).register_forward_pre_hook(
            lambda _module, args, name=name: heard[name].append(args[0][0, -1].double())
        )
        for name in modules
    ]
    with torch.no_grad():
        for row in probe.rows:
            ids = model.chat.prompt(list(row.messages), row.continuation)
            model.split.hidden(forward.pad_right([ids], model.device))
    for handle in handles:
        handle.remove()
    return {name: torch.stack(some).mean(0) for name, some in heard.items()}


def unit(vector: Tensor) -> Tensor:
    return vector / vector.norm()


def plant(
    model: ChatModel, probe: Probe, places: Iterable[tuple[int, str]], *, rank: int, size: float, noise: float = 0.0,
    seed: int = 0,
) -> tuple[Direction, dict[str, Tensor]]:  # fmt: skip
    """The direction, and the planted basis (width, rank) of every planted matrix.

    places: layer and role of the matrices. size: norm of each update relative to its weight. noise: norm of the noise
    relative to that of everything planted.
    """
    chosen = {site.parameter: site for site in architecture.sites(model.network)
              if any((site.layer, role) in set(places) for role in site.roles)}  # fmt: skip
    means = inputs_at_anchor(model, probe, [site.module for site in chosen.values()])
    first, second = (ids[0][0] for ids in answers_of(model, probe.answers))
    head = model.network.get_output_embeddings().weight.data.double()
    readout = unit(head[first] - head[second])
    deltas, bases, of_layer = {}, {}, {}
    for name, site in chosen.items():
        generator = keyed_random.generator(f"planted|{seed}|{name}")
        left = torch.stack([unit(readout + unit(torch.randn(len(readout), generator=generator).double()))
                            for _ in range(rank)], dim=1)  # fmt: skip
        mean = unit(means[site.module])
        right = torch.stack([unit(mean + 0.5 * unit(torch.randn(len(mean), generator=generator).double()))
                             for _ in range(rank)])  # fmt: skip
        wanted = size * float(model.network.get_parameter(name).double().norm())
        delta = Delta.low_rank(left, right)
        deltas[name] = delta * (wanted / float((left @ right).norm()))
        bases[name] = torch.linalg.qr(left)[0]
        of_layer[name] = site.layer
    direction = Direction(deltas, model.fingerprint, of_layer)
    if noise:
        around = random_direction(model, rank=8, seed=seed + 1, layers=sorted(set(of_layer.values())))
        direction = direction + around * (noise * direction.norm() / around.norm())
    return replace(direction, provenance={}), bases
