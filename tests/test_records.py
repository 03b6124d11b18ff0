"""Records to plain data and back."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import pytest

from ws.base.records import FLAT, plain, restore


@dataclass(frozen=True)
class Point:
    x: float
    y: float | None = None


@dataclass(frozen=True)
class Named(Point):
    name: str = ""


@dataclass(frozen=True)
class Whole:
    name: str
    points: tuple[Point, ...]
    by_name: Mapping[str, tuple[Named, ...]]
    maybe: Named | None
    sides: Mapping[str, Point] = field(metadata=FLAT)


WHOLE = Whole(
    "w", (Point(1.0), Point(2.0, 3.0)), {"a": (Named(0.5, name="n"),)}, None, {"+": Point(1.0), "-": Point(2)}
)


@pytest.mark.parametrize("record", [WHOLE, Named(0.1, None, "n"), Whole("empty", (), {}, Named(1.0), {})])
def test_what_json_holds_is_the_record_again(record: object) -> None:
    assert restore(type(record), json.loads(json.dumps(plain(record)))) == record


def test_items_of_a_flat_field_stand_among_the_keys() -> None:
    data = plain(WHOLE)
    assert data["+"] == {"x": 1.0, "y": None} and "sides" not in data
    assert restore(Whole, data).sides.keys() == {"+", "-"}


def test_what_is_no_number_is_null_and_unknown_keys_are_ignored() -> None:
    assert plain([math.nan, math.inf, {"a": (1, -math.inf)}]) == [None, None, {"a": [1, None]}]
    assert restore(Point, {"x": 1.0, "later": 2}) == Point(1.0)
    with pytest.raises(TypeError, match="x"):
        restore(Point, {"y": 1.0})
