"""The fingerprint of a model: a digest of all parameters by name, rounded to bfloat16.

A checkpoint has the same fingerprint if it is loaded in fp32, in bf16, or read from its files tensor by tensor.
Different checkpoints have different fingerprints.
"""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import nn

_known: weakref.WeakKeyDictionary[nn.Module, str] = weakref.WeakKeyDictionary()


def fingerprint(network: nn.Module) -> str:
    """Digest of names, shapes and bf16-rounded values of all parameters.

    Cached per module object, so that edits made by `steer` do not change it. Call `forget_fingerprint` after a
    permanent change of the weights.
    """
    known = _known.get(network)
    if known is None:
        with ThreadPoolExecutor(max_workers=4) as pool:  # hashing releases the interpreter lock
            digests = dict(pool.map(lambda item: (item[0], _tensor_digest(*item)), network.named_parameters()))
        known = _known[network] = _joint(digests)
    return known


def fingerprint_of(named: Iterable[tuple[str, torch.Tensor]]) -> str:
    """The same digest from parameters that are read one by one and need not fit into memory together."""
    return _joint({name: _tensor_digest(name, tensor) for name, tensor in named})


def _joint(digests: Mapping[str, str]) -> str:
    ordered = "".join(digests[name] for name in sorted(digests))
    return hashlib.blake2b(ordered.encode(), digest_size=12).hexdigest()


def forget_fingerprint(network: nn.Module) -> None:
    """Drop the cached fingerprint after a permanent change of the weights."""
    _known.pop(network, None)


def _tensor_digest(name: str, tensor: torch.Tensor) -> str:
    hasher = hashlib.blake2b(f"{name}{tuple(tensor.shape)}".encode(), digest_size=16)
    values = tensor.detach().reshape(-1)
    for start in range(0, values.numel(), 1 << 24):  # bounded memory on large embeddings
        block = values[start : start + (1 << 24)].to("cpu", torch.bfloat16).view(torch.int16)
        hasher.update(block.numpy().data)
    return hasher.hexdigest()
