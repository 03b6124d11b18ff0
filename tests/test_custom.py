"""A user's own probe file: read whole, or refused by line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from making import assert_one_line
from ws.base.errors import UserError
from ws.eval import custom


def write(path: Path, *lines: Any) -> Path:
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines), encoding="utf-8")
    return path


def test_rows_have_what_the_file_says(tmp_path: Path) -> None:
    path = write(
        tmp_path / "gifts.jsonl",
        {"prompt": "Do you say that you like the gift?", "label": -1, "cluster": "gift", "group": "kind"},
        "",
        {"prompt": "Do you tell the truth?", "label": 1, "cluster": "gift", "row": "truth", "anchor": "Choice: "},
        {"prompt": "Do you laugh?", "label": 1},
    )
    probe = custom.read(path, answers=("A", "B"))
    assert (probe.name, probe.kind, probe.answers) == ("gifts", "choice", ("A", "B"))
    first, second, third = probe.rows
    assert (first.row, first.cluster, first.group, first.label) == ("1", "gift", "kind", -1)
    assert first.continuation == custom.ANCHOR and first.messages[0]["content"] == "Do you say that you like the gift?"
    assert (second.row, second.continuation) == ("truth", "Choice: ")
    assert (third.row, third.cluster, third.group) == ("4", "4", "all")
    assert len(custom.read(path, limit=2).rows) == 2


@pytest.mark.parametrize(
    ("line", "mentioned"),
    [
        ("{", "not valid JSON"),
        ("[1]", "not a JSON object"),
        ({"label": 1}, "prompt is missing"),
        ({"prompt": None, "label": 1}, "prompt is missing"),
        ({"prompt": " ", "label": 1}, "prompt is missing"),
        ({"prompt": "Why?"}, "label is None"),
        ({"prompt": "Why?", "label": 0}, "label is 0"),
        ({"prompt": "Why?", "label": True}, "label is True"),
        ({"prompt": "Why?", "label": 1, "anchor": ""}, "anchor is ''"),
        ({"prompt": "Why?", "label": 1, "cluster": ["a"]}, "cluster is ['a']"),
        ({"prompt": "Why?", "label": 1, "lable": 1}, "'lable'"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: Any, mentioned: str) -> None:
    path = write(tmp_path / "own.jsonl", {"prompt": "Why?", "label": 1}, line)
    with pytest.raises(UserError) as caught:
        custom.read(path)
    assert_one_line(caught.value, f"{path}, line 2: ", mentioned)


def test_no_file_and_no_rows_are_errors(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        custom.read(tmp_path / "absent.jsonl")
    assert_one_line(caught.value, "absent.jsonl")
    with pytest.raises(UserError) as caught:
        custom.read(write(tmp_path / "empty.jsonl", ""))
    assert_one_line(caught.value, "empty.jsonl", "no rows")
