"""Controls: directions that hold no information about the behaviour.

A random direction has, parameter by parameter, the same shape, the same Frobenius norm and the same rank as the trained
one, with Gaussian factors. Equal rank matters: a dense Gaussian of equal norm spreads its energy over all singular
values and is a weaker disturbance, hence too easy a control.
"""

from __future__ import annotations

import hashlib

import torch

from ws import spectrum
from ws.condition import Edit
from ws.delta import Delta
from ws.direction import Direction

RANDOM = "random"


def random_like(direction: Direction, seed: int) -> Direction:
    """Gaussian factors with the rank and the Frobenius norm of every delta; a function of (names, shapes, seed).

    A delta of full rank, also one that is a function of the base weights, has a dense Gaussian beside it.
    """
    deltas = {}
    norms = direction.norms()
    for name, delta in direction.deltas.items():
        digest = hashlib.blake2b(f"{seed}|{name}".encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
        *experts, rows, columns = delta.shape
        rank = delta.rank if delta.is_thin else min(rows, columns)
        if rank < min(rows, columns):
            drawn = Delta.low_rank(
                torch.randn(*experts, rows, rank, generator=generator),
                torch.randn(*experts, rank, columns, generator=generator),
            )
        else:
            drawn = Delta.full(torch.randn(*experts, rows, columns, generator=generator))
        scale = norms[name] / spectrum.norm(drawn) if rank else 0.0
        deltas[name] = (drawn * scale).to(delta.device)
    provenance = {"control": RANDOM, "seed": seed, "like": dict(direction.provenance)}
    return Direction(deltas, direction.base, direction.layers, provenance)


def random_edits(direction: Direction, seeds: int) -> list[Edit]:
    """Norm-matched random directions for seeds 0, 1, ... as Edits named `random`."""
    return [Edit(RANDOM, random_like(direction, seed), seed=seed) for seed in range(seeds)]
