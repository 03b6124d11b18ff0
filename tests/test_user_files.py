"""Files that users bring, whatever reads them: one set of rules for encodings, line ends, nulls and answers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from making import assert_one_line
from ws.base import user_files
from ws.base.errors import UserError
from ws.eval import custom, dilemmas
from ws.fitting import behaviour, data
from ws.measure import choice
from ws.measure.probe import Probe, ProbeRow
from ws.model.chat import ask
from ws.model.loading import ChatModel

ODD = "schön \u2028 \x85 日本"
"""A text with letters beyond ASCII and with characters that `str.splitlines` takes for ends of lines."""
_BEHAVIOUR = behaviour.load("sycophancy")


def as_jsonl(*rows: dict[str, Any]) -> str:
    return "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)


READERS: dict[str, tuple[str, str, Callable[[Path], str]]] = {
    "probe": (
        "own.jsonl",
        as_jsonl({"prompt": f"{ODD}?", "label": 1}, {"prompt": "Why?", "label": -1}),
        lambda path: custom.read(path).rows[0].messages[0]["content"],
    ),
    "pairs": (
        "pairs.jsonl",
        as_jsonl(*({"prompt": f"{ODD}?", "response_pos": f"a{n}", "response_neg": f"b{n}"} for n in range(3))),
        lambda path: str(data.read_pairs(path, _BEHAVIOUR)["prompt"][0]),
    ),
    "dilemmas as JSON lines": (
        "set.jsonl",
        as_jsonl({"situation": f"{ODD}?", "action": "b", "label": 1}),
        lambda path: dilemmas.read(str(path))[0].situation,
    ),
    "dilemmas as CSV": (
        "set.csv",
        f"situation,action,label\n{ODD}?,b,1\n",
        lambda path: dilemmas.read(str(path))[0].situation,
    ),
    "behaviour": (
        "x.toml",
        (behaviour.SHIPPED / "sycophancy.toml").read_text(encoding="utf-8").replace(
            'positive_means = "', f'positive_means = "{ODD}? ', 1
        ),
        lambda path: behaviour.load(str(path)).positive_means.partition("?")[0] + "?",
    ),
}  # fmt: skip


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("kind", READERS)
def test_utf8_is_read_whole_with_or_without_a_byte_order_mark(tmp_path: Path, kind: str, encoding: str) -> None:
    name, content, read = READERS[kind]
    (tmp_path / name).write_bytes(content.encode(encoding))
    assert read(tmp_path / name) == f"{ODD}?"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("kind", [name for name in READERS if name != "behaviour"])
def test_only_a_line_feed_ends_a_line(tmp_path: Path, kind: str, encoding: str) -> None:
    name, content, read = READERS[kind]
    (tmp_path / name).write_bytes(content.replace("\n", "\r\n").encode(encoding))
    assert read(tmp_path / name) == f"{ODD}?"


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("kind", READERS)
def test_any_other_encoding_is_one_line_that_names_the_file_and_the_line(
    tmp_path: Path, kind: str, encoding: str
) -> None:
    name, content, read = READERS[kind]
    if encoding == "latin-1":
        content = content.replace("日本", "").replace("\u2028", "")
        content = "".join(letter for letter in content if ord(letter) < 256)
    (tmp_path / name).write_bytes(content.encode(encoding))
    with pytest.raises(UserError) as caught:
        read(tmp_path / name)
    assert_one_line(caught.value, str(tmp_path / name), ", line ", "Save the file as UTF-8")


def test_the_line_and_the_byte_of_a_wrong_encoding_are_those_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    for mark in (b"", b"\xef\xbb\xbf"):
        path.write_bytes(mark + b"{}\n\n{}\n" + "{ö".encode("latin-1"))
        with pytest.raises(UserError, match=rf"x\.jsonl, line 4: .* at byte {8 + len(mark)}\)"):
            user_files.text(path, "file", "")


# -------------------------------------------------------------------- nulls


@pytest.mark.parametrize("key", ["anchor", "cluster", "group", "row"])
def test_a_null_in_a_probe_file_is_a_key_that_is_not_there(tmp_path: Path, key: str) -> None:
    without, with_null = [{"prompt": "Why?", "label": 1}, {"prompt": "When?", "label": -1}], []
    for row in without:
        with_null.append({**row, key: None})
    for name, rows in (("a", without), ("b", with_null)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "own.jsonl").write_text(as_jsonl(*rows))
    assert custom.read(tmp_path / "b" / "own.jsonl") == custom.read(tmp_path / "a" / "own.jsonl")


TABLES: dict[str, Callable[[pl.DataFrame, Path], object]] = {
    "csv": lambda table, path: table.write_csv(path),
    "parquet": lambda table, path: table.write_parquet(path),
    "jsonl": lambda table, path: path.write_text(as_jsonl(*table.to_dicts())),
}


@pytest.mark.parametrize("kind", TABLES)
def test_a_null_in_a_table_of_dilemmas_is_a_value_that_is_not_there(tmp_path: Path, kind: str) -> None:
    """Neither the row's name, nor its cluster, nor a text in a prompt is ever `None`."""
    labelled = pl.DataFrame({
        "situation": ["S0", "S1", None, "S3"], "action": ["a0", "a1", "a2", None], "label": [1, -1, 1, 1],
        "cluster": ["c", None, "c", "c"], "row": [None, "r1", "r2", "r3"],
    })  # fmt: skip
    TABLES[kind](labelled, tmp_path / f"own.{kind}")
    assert [(r.row, r.cluster) for r in dilemmas.read(str(tmp_path / f"own.{kind}"))] == [("0", "c"), ("r1", "1")]
    pairs = pl.DataFrame({
        "idx": [None, 1, 2, 3, 4, 5], "dilemma_idx": [0, 0, 1, 1, None, None],
        "dilemma_situation": ["You A", "You A", "You B", None, "You C", "You C"],
        "action_type": ["to_do", "not_to_do"] * 3, "action": ["a", "b", "c", "d", "e", "f"],
        "values_aggregated": ["['honesty']", "['care']"] * 3,
    })  # fmt: skip
    TABLES[kind](pairs, tmp_path / f"all.{kind}")
    assert [(r.row, r.cluster, r.action) for r in dilemmas.read(str(tmp_path / f"all.{kind}"))] == [
        ("0/to_do", "0", "a"), ("1", "0", "b"),
    ]  # fmt: skip


def test_a_key_that_begins_late_is_read(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"situation": f"S{n}", "action": "a", "label": 1} for n in range(150)]
    rows[-1]["cluster"] = "late"
    (tmp_path / "set.jsonl").write_text(as_jsonl(*rows))
    assert dilemmas.read(str(tmp_path / "set.jsonl"))[-1].cluster == "late"


@pytest.mark.parametrize(
    "line", ['{"prompt": "\\ud800", "label": 1}', '{"prompt": "a", "label": 1, "anchor": "\\udc00"}']
)
def test_half_a_character_is_refused_where_it_stands(tmp_path: Path, line: str) -> None:
    (tmp_path / "own.jsonl").write_text(as_jsonl({"prompt": "Why?", "label": 1}) + f"\n{line}\n")
    with pytest.raises(UserError, match=r"own\.jsonl, line 2: .*surrogate"):
        custom.read(tmp_path / "own.jsonl")


def test_a_table_without_a_column_is_refused_by_its_name() -> None:
    values = pl.DataFrame({"dilemma_idx": [1], "action_type": ["to_do"], "value": ["honesty"]})
    situations = pl.DataFrame({"dilemma_idx": [1], "action_type": ["to_do"], "dilemma_situation": "a", "action": "b"})
    with pytest.raises(UserError, match="has no column party"):
        dilemmas.by_own_values(situations, values)


# -------------------------------------------------------------------- answers


@pytest.mark.parametrize("answers", [("Yes", "Yes"), ("Yes", "YES"), ("Yes", " yes "), ("", "No"), ("Yes", " ")])
def test_two_answers_that_are_no_choice_are_refused(answers: tuple[str, str]) -> None:
    with pytest.raises(UserError, match="needs two different answers"):
        Probe("own", "choice", (ProbeRow("1", tuple(ask("Why?")), "My answer: **"),), answers)


@pytest.mark.parametrize("answers", [("Perhaps so", "Perhaps so indeed"), ("Perhaps so indeed", "Perhaps so")])
def test_an_answer_that_begins_the_other_is_refused(qwen: ChatModel, answers: tuple[str, str]) -> None:
    with pytest.raises(UserError) as caught:
        choice.answers_of(qwen, answers)
    assert_one_line(caught.value, *map(repr, answers))
    assert choice.answers_of(qwen, ("Perhaps so", "Never again"))


@pytest.mark.parametrize("line", ["[" * 5000, '{"prompt": ' + "9" * 5000 + "}"], ids=["too deep", "a number too long"])
def test_json_that_the_parser_gives_up_on_is_one_line(tmp_path: Path, line: str) -> None:
    file = tmp_path / "pairs.jsonl"
    file.write_text(line + "\n")
    with pytest.raises(UserError, match="line 1: not valid JSON"):
        data.read_pairs(file, behaviour.load("sycophancy"))
