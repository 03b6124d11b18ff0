"""How numbers are written in tables and sentences."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def signed(key: str) -> str:
    """A strength's key with its sign: `1` -> `+1`."""
    return key if key == "0" or key.startswith("-") else f"+{key}"


def limits(entry: Mapping[str, Any]) -> str:
    """`-0.20, +0.40`; empty if there is no interval."""
    return "" if entry["low"] is None else f"{entry['low']:+.2f}, {entry['high']:+.2f}"


def with_limits(entry: Mapping[str, Any] | None) -> str:
    """`+0.10 [-0.20, +0.40]`; a dash for None."""
    if entry is None:
        return "-"
    interval = limits(entry)
    return f"{entry['mean']:+.2f} [{interval}]" if interval else f"{entry['mean']:+.2f}"
