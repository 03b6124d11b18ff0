"""Mix expressions: what they mean, and that each mistake is one clear line."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from making import assert_one_line
from ws.base.errors import UserError
from ws.serving import mix


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0.3 honesty - 0.2 sycophancy", {"honesty": 0.3, "sycophancy": -0.2}),
        ("honesty", {"honesty": 1.0}),
        ("-honesty", {"honesty": -1.0}),
        ("+2*honesty", {"honesty": 2.0}),
        ("  1e-1 a+.5 b", {"a": 0.1, "b": 0.5}),
        ("a - a", {"a": 0.0}),
        ("a + 2 a", {"a": 3.0}),
        ("co-operation - 2 red.team", {"co-operation": 1.0, "red.team": -2.0}),
        ("0.5 out/pocket/honesty/lora/seed0 - ./x.safetensors", {"out/pocket/honesty/lora/seed0": 0.5,
                                                                 "./x.safetensors": -1.0}),
        ("2 'my run' + \"other one\"", {"my run": 2.0, "other one": 1.0}),
        ("2nd", {"2nd": 1.0}),
        ("", {}),
        ("0", {}),
    ],
)  # fmt: skip
def test_an_expression_names_directions_and_their_strengths(text: str, expected: dict[str, float]) -> None:
    assert mix.parse(text) == expected


@pytest.mark.parametrize(
    ("text", "mentioned"),
    [
        ("0.3", "lacks a name after '0.3'"),
        ("0.3 honesty sycophancy", "no + or - before 'sycophancy'"),
        ("honesty 0.2 sycophancy", "no + or - before '0.2'"),
        ("honesty -", "lacks a name after '-'"),
        ("honesty - - sycophancy", "lacks a name after '-'"),
        ("* honesty", "lacks a name"),
        ("0.3 * * honesty", "lacks a name after '*'"),
        ("honesty & x", "cannot be read from '& x' on"),
        ("'honesty", "cannot be read"),
        ("1e999 honesty", "is inf"),
        ("1e999 a - 1e999 a", "is nan"),
    ],
)
def test_a_mistake_is_one_line_that_says_where(text: str, mentioned: str) -> None:
    with pytest.raises(UserError) as caught:
        mix.parse(text)
    assert_one_line(caught.value, mentioned, repr(text))


@given(st.dictionaries(st.from_regex(r"[a-z][a-z0-9_.-]{0,8}[a-z]", fullmatch=True), st.floats(-9, 9), min_size=1))
def test_what_is_written_reads_back_the_same(strengths: dict[str, float]) -> None:
    assert mix.parse(mix.written(strengths)) == strengths


@given(st.text(max_size=40))
def test_any_text_is_a_mix_or_a_user_error(text: str) -> None:
    try:
        assert isinstance(mix.parse(text), dict)
    except UserError as error:
        assert "\n" not in str(error)
