"""Adapters name the base that they were made on: what is subtracted must have one, and it must be the model's."""

from __future__ import annotations

from pathlib import Path

import pytest

from making import assert_one_line, copy_changed, edit_json, save_lora
from ws.adapters import diff
from ws.base.errors import BaseMismatchError
from ws.model import loading
from ws.pocket import tiny

ONE, TWO, COPY, GONE, MISSING = "one", "two", "copy of one", "gone", "org/model"


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str | None, str | None]:
    """Names of bases: two models, a copy of the first, and two that are not on this machine."""
    root = tmp_path_factory.mktemp("bases")
    tiny.make("llama", root / ONE, layers=4)
    tiny.make("llama", root / TWO, layers=4, seed=1)
    copy_changed(root / ONE, root / COPY, lambda folder: None)
    save_lora(root / ONE, root / "adapter")
    return {None: None, MISSING: MISSING, **{name: str(root / name) for name in (ONE, TWO, COPY, GONE, "adapter")}}


def made_on(places: dict[str | None, str | None], folder: Path, base: str | None, revision: str | None = None) -> Path:
    def name(copy: Path) -> None:
        edit_json(
            copy / "adapter_config.json",
            lambda config: config.update(base_model_name_or_path=places[base], revision=revision),
        )

    return copy_changed(Path(str(places["adapter"])), folder, name)


@pytest.mark.parametrize(
    ("pos", "neg", "said"),
    [
        (ONE, ONE, ""),
        (None, None, ""),
        (None, ONE, ""),
        (COPY, ONE, "same weights"),
        (COPY, COPY, "same weights"),
        (GONE, GONE, "not on this machine"),
        (MISSING, MISSING, "not on this machine"),
    ],
)
def test_sides_of_one_base_are_subtracted_and_names_that_differ_in_form_are_told(
    places: dict[str | None, str | None], tmp_path: Path, capsys: pytest.CaptureFixture[str],
    pos: str | None, neg: str | None, said: str,
) -> None:  # fmt: skip
    model = loading.load(str(places[ONE]))
    capsys.readouterr()
    diff.direction(model, made_on(places, tmp_path / "pos", pos), made_on(places, tmp_path / "neg", neg))
    told = " ".join(capsys.readouterr().err.split())
    assert (said in told) if said else ("base" not in told)


@pytest.mark.parametrize(
    ("pos", "neg", "named"),
    [
        (ONE, TWO, TWO),
        (TWO, ONE, TWO),
        (TWO, TWO, TWO),
        (None, TWO, TWO),
        (ONE, MISSING, MISSING),
        (MISSING, ONE, MISSING),
        (GONE, MISSING, MISSING),
    ],
)
def test_sides_of_different_bases_and_of_another_base_than_the_model_are_refused(
    places: dict[str | None, str | None], tmp_path: Path, pos: str | None, neg: str | None, named: str
) -> None:
    model = loading.load(str(places[ONE]))
    sides = made_on(places, tmp_path / "pos", pos), made_on(places, tmp_path / "neg", neg)
    with pytest.raises(BaseMismatchError) as caught:
        diff.direction(model, *sides)
    assert_one_line(caught.value, str(places[named]))
    if named == TWO:
        with pytest.raises(BaseMismatchError, match="whose weights differ"):
            diff.task_vector(model, sides[(pos, neg).index(TWO)])


def test_sides_of_two_revisions_are_refused(places: dict[str | None, str | None], tmp_path: Path) -> None:
    model = loading.load(str(places[ONE]))
    first = made_on(places, tmp_path / "a", ONE, "r1")
    diff.direction(model, first, made_on(places, tmp_path / "b", ONE, "r1"))
    diff.direction(model, first, made_on(places, tmp_path / "c", ONE))
    with pytest.raises(BaseMismatchError, match=r"at revision r1, but .* at revision r2"):
        diff.direction(model, first, made_on(places, tmp_path / "d", ONE, "r2"))
