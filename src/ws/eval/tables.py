"""Tables of public data sets: a local CSV, JSONL or parquet file, or a data set of the hub (`id@revision` pins it)."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import polars as pl

from ws.base import console, extras, user_files
from ws.base.errors import UserError


def is_file(source: str) -> bool:
    """Whether a source is a local file or folder, and not a hub id."""
    path = Path(source).expanduser()
    return path.exists() or path.suffix.casefold() in user_files.TABLE_KINDS


def read(
    source: str, what: str, *, config: str | None = None, split: str | None = None, file: str | None = None
) -> tuple[pl.DataFrame, str | None]:
    """A table from a local file or from the hub, and its commit if known. A table without rows is an error.

    `what` names the table in messages. `config`, `split` and `file` choose a part of a hub data set, as in `from_hub`.
    """
    if is_file(source):
        remedy = "Give a CSV, JSONL or parquet file, or a hub id."
        table, commit = user_files.table(Path(source).expanduser(), what, remedy), None
    else:
        table, commit = from_hub(source, config, split, file)
    if not len(table):
        raise UserError(f"{source} has no rows", "Give a table with at least one row.")
    return table, commit


def from_hub(
    source: str, config: str | None, split: str | None, file: str | None = None
) -> tuple[pl.DataFrame, str | None]:
    """A data set by hub id, or `id@revision`, and its commit if known.

    `config` names one of its tables, `split` one of its splits (None: all of them in turn), `file` one of its files.
    """
    name, _, revision = source.partition("@")
    try:
        from datasets import load_dataset  # noqa: PLC0415 - optional extra, late
    except ImportError as error:
        raise extras.missing(f"the library datasets, which reads {name!r} from the hub,", "hub") from error
    files = {} if file is None else {"data_files": file}
    try:
        loaded = load_dataset(name, config, split=split, revision=revision or None, **files)
    except Exception as error:  # the library raises many kinds for an unreachable or unknown data set
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"data set {name!r} cannot be loaded ({reason})",
            "Check the id and the network. Without a network, give a local CSV, JSONL or parquet file.",
        ) from error
    parts = list(loaded.values()) if split is None else [loaded]
    found = commit(parts[0])
    if not revision:
        console.warn(f"{name} is not pinned and may change; pin it with {name}@{found or 'REVISION'}")
    return pl.DataFrame([row for part in parts for row in part.to_list()], infer_schema_length=None), found


def commit(loaded: Any) -> str | None:
    """The commit that a data set was loaded from: the library names the folder of its tables after it."""
    for entry in getattr(loaded, "cache_files", ()):
        if re.fullmatch("[0-9a-f]{40}", folder := Path(entry["filename"]).parent.name):
            return folder
    return None


def require(table: pl.DataFrame, source: str, columns: Sequence[str]) -> None:
    """Raise `UserError` if a column is missing."""
    if absent := [column for column in columns if column not in table.columns]:
        raise UserError(
            f"{source} has no column {absent[0]!r} (found: {', '.join(table.columns[:8]) or 'none'})",
            f"Give a table with the columns {', '.join(columns)}.",
        )


def spread(total: int, count: int | None, key: str) -> list[int]:
    """Positions of `count` of `total` rows in order: one from each of `count` equal stretches, drawn at random.

    So every part of an ordered file is represented. The draw depends only on the arguments; None keeps all rows.
    """
    if count is None or count >= total:
        return list(range(total))
    draw = random.Random(f"{key}/{count}")
    edges = [part * total // count for part in range(count + 1)] if count > 0 else []
    return [draw.randrange(start, end) for start, end in pairwise(edges)]
