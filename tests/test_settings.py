"""Settings from JSON-like values take the declared form or are refused by name."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import pytest

from ws.base import settings
from ws.base.errors import UserError
from ws.fitting.data import Grid
from ws.fitting.judge import JudgeSettings
from ws.measure.generate import Sampling


@dataclass(frozen=True)
class Example:
    rate: float = 0.5
    steps: int = 3
    name: str = "x"
    fast: bool = False
    layers: tuple[int, ...] = (1,)
    limit: float | None = None
    words: tuple[str, ...] | None = None


@pytest.mark.parametrize(
    ("name", "given", "stored"),
    [
        ("rate", 1, 1.0),
        ("rate", 0.25, 0.25),
        ("limit", 2, 2.0),
        ("limit", None, None),
        ("steps", 7, 7),
        ("layers", [1, 2], (1, 2)),
        ("layers", (3,), (3,)),
        ("layers", [], ()),
        ("words", ["a"], ("a",)),
        ("words", None, None),
        ("name", "y", "y"),
        ("fast", True, True),
    ],
)
def test_a_value_takes_the_declared_form(name: str, given: Any, stored: Any) -> None:
    made = getattr(settings.make(Example, {name: given}, "here"), name)
    assert made == stored
    assert type(made) is type(stored)


def test_what_is_not_given_keeps_its_default() -> None:
    assert settings.make(Example, {}, "here") == Example()


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("rate", "0.5"),
        ("rate", True),
        ("rate", [0.5]),
        ("limit", "none"),
        ("steps", 1.0),
        ("steps", True),
        ("steps", "3"),
        ("name", 3),
        ("fast", 1),
        ("fast", "true"),
        ("layers", 3),
        ("layers", "12"),
        ("words", "ab"),
    ],
)
def test_an_ill_typed_value_names_source_setting_and_value(name: str, given: Any) -> None:
    with pytest.raises(UserError) as caught:
        settings.make(Example, {name: given}, "file.json")
    assert f"file.json: {name} is {given!r}" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["rate", "steps", "name", "fast", "layers"])
def test_nothing_is_no_value_for_a_setting_that_needs_one(name: str) -> None:
    with pytest.raises(UserError):
        settings.make(Example, {name: None}, "file.json")


@pytest.mark.parametrize(
    ("name", "hint"),
    [("step", "Did you mean 'steps'?"), ("ratee", "Did you mean 'rate'?"), ("zzz", "Known: fast, layers, limit")],
)
def test_an_unknown_name_suggests_known_ones(name: str, hint: str) -> None:
    with pytest.raises(UserError) as caught:
        settings.make(Example, {name: 1}, "file.json")
    assert f"file.json: unknown setting {name!r}" in str(caught.value)
    assert hint in str(caught.value)


@pytest.mark.parametrize("kind", [Sampling, Grid, JudgeSettings])
def test_the_defaults_of_real_settings_survive_the_round_trip(kind: type) -> None:
    default = kind()
    values = {field.name: getattr(default, field.name) for field in fields(kind)}
    assert settings.make(kind, values, "here") == default


def test_real_settings_check_their_values_after_conversion() -> None:
    assert settings.make(Sampling, {"temperature": 0, "max_new_tokens": 5}, "here") == Sampling(5, 0.0)
    with pytest.raises(UserError, match="is out of range"):
        settings.make(Sampling, {"temperature": -1}, "here")
