"""Random streams by name: the numbers drawn under one name do not depend on other draws or on their order."""

from __future__ import annotations

import hashlib

import torch


def generator(key: str) -> torch.Generator:
    """A CPU generator seeded by a digest of `key`: the same stream for the same key, everywhere."""
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
