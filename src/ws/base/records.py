"""Convert frozen dataclasses to plain JSON data and back.

    restore(type(record), plain(record)) == record

holds for records of numbers, text, tuples, mappings by name and further records. JSON has no NaN, so NaN
is written as null: a record that must survive the conversion holds None for a missing number.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from types import NoneType, UnionType
from typing import Any, TypeVar, Union, cast, get_args, get_origin, get_type_hints

T = TypeVar("T")
FLAT = {"flat": True}
"""Metadata of a mapping field whose items are stored among the record's own keys."""


def plain(value: Any) -> Any:
    """Dictionaries, lists, text, numbers and None; NaN and infinity become None."""
    if is_dataclass(value):
        found: dict[str, Any] = {}
        for one in fields(value):
            content = plain(getattr(value, one.name))
            found.update(content if one.metadata.get("flat") else {one.name: content})
        return found
    if isinstance(value, Mapping):
        return {name: plain(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [plain(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def restore(kind: type[T], data: Any) -> T:
    """The record from which `plain` made this data. Unknown keys are ignored; missing ones take the field's default."""
    return cast("T", _restore(kind, data))


def _restore(kind: Any, data: Any) -> Any:
    origin, inner = get_origin(kind), get_args(kind)
    if data is None or kind is Any:
        return data
    if origin in (Union, UnionType):
        return _restore(next(one for one in inner if one is not NoneType), data)
    if origin is tuple:
        return tuple(_restore(inner[0], part) for part in data)
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return {name: _restore(inner[1], part) for name, part in data.items()}
    if not (isinstance(kind, type) and is_dataclass(kind)):
        return data
    hints, names = get_type_hints(kind), {one.name for one in fields(kind)}
    found = {}
    for one in fields(kind):
        if one.metadata.get("flat"):
            found[one.name] = _restore(hints[one.name], {k: part for k, part in data.items() if k not in names})
        elif one.name in data:
            found[one.name] = _restore(hints[one.name], data[one.name])
    return kind(**found)
