"""Build a settings dataclass from JSON-like values. Files and flags may give 1 for 1.0, and lists for tuples."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, TypeVar

from ws.base.errors import UserError

T = TypeVar("T")


def make(kind: type[T], values: Mapping[str, Any], where: str) -> T:
    """`kind(**values)` with values converted to the declared types; unknown names and wrong types are errors.

    `where` names the source of the values in error messages.
    """
    declared = {f.name: str(f.type) for f in fields(kind)}  # type: ignore[arg-type]
    for name in values:
        if name not in declared:
            close = difflib.get_close_matches(name, declared, n=1)
            hint = f"Did you mean {close[0]!r}?" if close else f"Known: {', '.join(sorted(declared))}."
            raise UserError(f"{where}: unknown setting {name!r}", hint)
    return kind(**{name: _as_declared(value, declared[name], f"{where}: {name}") for name, value in values.items()})


def _as_declared(value: Any, declared: str, where: str) -> Any:
    base = declared.removesuffix(" | None")
    if value is None and base != declared:
        return None
    if base not in ("int", "float", "str", "bool") and not base.startswith("tuple"):
        return value
    if base.startswith("tuple") and isinstance(value, list | tuple):
        return tuple(value)
    if base == "float" and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if base == "int" and isinstance(value, int) and not isinstance(value, bool):
        return value
    if base in ("str", "bool") and type(value).__name__ == base:
        return value
    raise UserError(f"{where} is {value!r}, but must be of type {declared}")
