"""Read files that a user wrote or another tool exported: text, JSON lines, TOML, tables. The same rules for all:

* Text is UTF-8, with or without a byte order mark. Anything else is an error that names the file and the line.
* In JSON lines, only a line feed ends a line. U+2028 is an ordinary character.
* A key with the value null counts as absent.
"""

from __future__ import annotations

import codecs
import io
import json
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ws.base.errors import UserError

if TYPE_CHECKING:
    import polars as pl

TABLE_KINDS = (".csv", ".jsonl", ".parquet")
_OTHER_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_BE)  # UTF-32 LE begins like UTF-16 LE
_SAVE_AS_UTF8 = "Save the file as UTF-8."


class Line(NamedTuple):
    """One JSON object of a file; `where` names file and line in error messages."""

    where: str
    number: int
    content: dict[str, Any]


def given(record: Mapping[str, Any], key: str, default: Any) -> Any:
    """The value of a key, or the default if the key is absent or null."""
    value = record.get(key)
    return default if value is None else value


def is_sign(value: Any) -> bool:
    """Whether a label is the number 1 or -1 (True equals 1, but is not a label)."""
    return not isinstance(value, bool) and value in (1, -1)


def text(path: Path, what: str, remedy: str) -> str:
    """The text of a file; `what` and `remedy` are for the error message if it does not exist."""
    raw = _bytes(path, what, remedy)
    if raw.startswith(_OTHER_MARKS):
        raise UserError(f"{path}, line 1: UTF-16 or UTF-32 text, not UTF-8", _SAVE_AS_UTF8)
    body = raw.removeprefix(codecs.BOM_UTF8)
    try:
        decoded = body.decode("utf-8")
    except UnicodeDecodeError as error:
        line, byte = body.count(b"\n", 0, error.start) + 1, error.start + len(raw) - len(body)
        raise UserError(
            f"{path}, line {line}: not UTF-8 text ({error.reason} at byte {byte})", _SAVE_AS_UTF8
        ) from error
    if "\0" in decoded:
        line = decoded.count("\n", 0, decoded.index("\0")) + 1
        raise UserError(f"{path}, line {line}: not UTF-8 text (a zero byte; the file may be UTF-16)", _SAVE_AS_UTF8)
    return decoded


def json_lines(path: Path, what: str, remedy: str) -> list[Line]:
    """The JSON objects of a file, one per line, without their nulls; blank lines are skipped."""
    found = []
    for number, line in enumerate(text(path, what, remedy).split("\n"), start=1):
        if line.strip():
            where = f"{path}, line {number}"
            content = _object(where, line)
            found.append(Line(where, number, {key: value for key, value in content.items() if value is not None}))
    return found


def toml(path: Path, what: str, remedy: str) -> dict[str, Any]:
    """The content of a TOML file."""
    content = text(path, what, remedy)
    try:
        return tomllib.loads(content)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid TOML ({error})", "Correct the file.") from error


def table(path: Path, what: str, remedy: str) -> pl.DataFrame:
    """A CSV, JSONL or parquet file as a table."""
    import polars as pl  # noqa: PLC0415 - heavy import, late

    kind = path.suffix.casefold()
    if path.is_file() and kind not in TABLE_KINDS:
        raise UserError(f"{path} is not a CSV, JSONL or parquet file", "Convert it to one of these.")
    try:
        if kind == ".parquet":
            return pl.read_parquet(io.BytesIO(_bytes(path, what, remedy)))
        if kind == ".csv":
            return pl.read_csv(io.BytesIO(text(path, what, remedy).encode()), infer_schema_length=None)
        # infer from every line: a key may first appear late in the file
        return pl.DataFrame([line.content for line in json_lines(path, what, remedy)], infer_schema_length=None)
    except (pl.exceptions.PolarsError, TypeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{path} cannot be read as a table ({reason})", "Check its rows and columns.") from error


def _bytes(path: Path, what: str, remedy: str) -> bytes:
    if not path.is_file():
        raise UserError(f"there is no {what} {path}", remedy)
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})", "Check its permissions.") from error


def _object(where: str, line: str) -> dict[str, Any]:
    try:
        content = json.loads(line)
    except (ValueError, RecursionError) as error:  # also numbers that are too long, and nesting that is too deep
        reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
        raise UserError(f"{where}: not valid JSON ({reason})", "Write one object per line.") from error
    if not isinstance(content, dict):
        raise UserError(f"{where}: not a JSON object", 'Write one object per line, such as {"prompt": "..."}.')
    try:
        json.dumps(content, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:  # "\ud800" is valid JSON, but not text
        raise UserError(
            f"{where}: holds a lone surrogate (half of a character)", "Write the whole character."
        ) from error
    return content
