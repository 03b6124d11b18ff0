"""Build a settings dataclass from JSON-like values. Files and flags may give 1 for 1.0, and lists for tuples."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from ws.base.errors import UserError

T = TypeVar("T")


def make(kind: type[T], values: Any, where: str, remedy: str = "") -> T:
    """`kind(**values)` with values converted to the declared types; unknown names and wrong types are errors.

    Numbers must be finite. `where` names the source of the values in error messages, `remedy` what to do about it. What
    `kind` itself refuses is told with both if there is a remedy.
    """
    if not isinstance(values, Mapping):
        raise UserError(f"{where} is {values!r}, not settings by name", remedy)
    resolved = get_type_hints(kind)
    hints = {one.name: resolved[one.name] for one in fields(kind)}  # type: ignore[arg-type]
    for name in values:
        if name not in hints:
            close = difflib.get_close_matches(str(name), hints, n=1)
            hint = f"Did you mean {close[0]!r}?" if close else f"Known: {', '.join(sorted(hints))}."
            raise UserError(f"{where}: unknown setting {name!r}", hint)
    found = {name: _converted(value, hints[name], f"{where}: {name}", remedy) for name, value in values.items()}
    try:
        return kind(**found)
    except UserError as error:
        if not remedy:
            raise
        raise UserError(f"{where}: {error}", remedy) from error


def _converted(value: Any, hint: Any, where: str, remedy: str) -> Any:
    """The value in the form of the type hint; other values are errors."""
    if is_dataclass(hint) and isinstance(hint, type):
        return value if isinstance(value, hint) else make(hint, value, where, remedy)
    try:
        return _as(value, hint)
    except ValueError:
        raise UserError(f"{where} is {value!r}, but must be {_told(hint)}", remedy) from None


def _as(value: Any, hint: Any) -> Any:
    """The value in the form of a type hint; `ValueError` if it has no such form."""
    origin, inner = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if origin in (Union, UnionType):
        if value is None and NoneType in inner:
            return None
        return _as(value, next(one for one in inner if one is not NoneType))
    if origin is Literal:
        return _only(value, value in inner)
    if origin is tuple:
        several = ... in inner
        _only(value, isinstance(value, list | tuple) and (several or len(value) == len(inner)))
        return tuple(_as(part, inner[0] if several else inner[place]) for place, part in enumerate(value))
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return _only(value, isinstance(value, Mapping))
    if hint is float:
        _only(value, isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value))
        return float(value)
    if hint is Path:
        return Path(_only(value, isinstance(value, str | Path)))
    return _only(value, type(value) is hint)


def _only(value: Any, fits: bool) -> Any:
    if not fits:
        raise ValueError
    return value


def _told(hint: Any) -> str:
    """What a type hint allows, in words."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return " or ".join(_told(one) for one in inner)
    if origin is Literal:
        return f"one of {', '.join(map(str, inner))}"
    if origin is tuple:
        return f"a list of {'' if ... in inner else f'{len(inner)} '}values, each {_told(inner[0])}"
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return "values by name"
    return _WORDS.get(hint, getattr(hint, "__name__", str(hint)))


_WORDS = {int: "a whole number", float: "a finite number", str: "text", bool: "true or false", Path: "a path",
          NoneType: "null"}  # fmt: skip
