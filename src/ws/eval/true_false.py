"""True and false statements: does the model tell them apart?

Every statement is asked twice, up to `My answer: **`, with "Answer Yes or No." and with "Answer No or Yes."; its score
is the mean of both values of log p(Yes) - log p(No). A weak model may say Yes to everything, so there are three
measures. Accuracy counts a score above 0 as Yes. Calibrated accuracy moves the threshold to the median score of the
dev half of the statements, which takes no label into account, and counts the other half. AUROC needs no threshold.

Source: a table with the columns statement and label (1 true, 0 false), or a folder of such files. Each file is a group,
named after it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import polars as pl

from ws.base import user_files
from ws.base.errors import UserError
from ws.base.files import content_key
from ws.eval import tables
from ws.eval.data_set import DataSet, Mean, Measured, Measures, Origin, Ranking, Readings
from ws.eval.side_effects import FACT_ANCHOR
from ws.measure.probe import Probe, ProbeRow
from ws.model.chat import ask

NAME = "true-false"
COLUMNS = ("statement", "label")
QUESTION = 'Is it true that "{statement}"? Answer {order}.'
ORDERS = ("Yes or No", "No or Yes")
MEANING = {
    "accuracy": "share of statements whose log p(Yes) - log p(No) has the sign of their label",
    "calibrated accuracy": "the same with the median of the dev half as threshold, on the other half",
    "AUROC": "share of pairs of a true and a false statement in which the true one has the larger log-ratio",
    "Yes-bias": "mean log p(Yes) - log p(No), nats",
    "answer mass": "mean p(Yes) + p(No)",
}


class Statement(NamedTuple):
    """A statement of a group; `label` is +1 if it is true, -1 if it is false."""

    number: int
    group: str
    text: str
    label: int

    @property
    def unit(self) -> str:
        """Name of the statement in intervals."""
        return str(self.number)

    @property
    def is_dev(self) -> bool:
        """Whether it belongs to the half that sets the threshold: by a digest of its text."""
        return int(content_key("true-false dev", self.text), 16) % 2 == 0

    def rows(self) -> Iterator[ProbeRow]:
        """One row for each order of the answers."""
        for position, order in enumerate(ORDERS):
            question = QUESTION.format(statement=self.text, order=order)
            yield ProbeRow(
                f"{self.unit}/{position}", tuple(ask(question)), FACT_ANCHOR, self.unit, self.group, self.label
            )


def load(source: str, limit: int | None = None) -> DataSet:
    """The statements of a file, folder or hub id; `limit` keeps this many, spread over all groups."""
    parts, commit = _tables(source)
    found: list[Statement] = []
    unusable = 0
    for group, table in parts.items():
        for entry in table.iter_rows(named=True):
            text, label = entry["statement"], _label(entry["label"])
            if isinstance(text, str) and text.strip() and label is not None:
                found.append(Statement(len(found), group, text.strip(), label))
            else:
                unusable += 1
    labels: dict[str, set[int]] = {}
    for one in found:
        labels.setdefault(one.text, set()).add(one.label)
    agreed = [one for one in found if len(labels[one.text]) == 1]
    kept = list({one.text: one for one in reversed(agreed)}.values())[::-1]
    asked = [kept[position] for position in tables.spread(len(kept), limit, NAME)]
    skipped = {
        "no statement, or a label other than 0 and 1": unusable,
        "the same statement is also given with the other label": len(found) - len(agreed),
        "repeated": len(agreed) - len(kept),
    }
    origin = Origin(
        source, commit, "statements with label 0 or 1", sum(map(len, parts.values())), skipped, "statements",
        len(kept), len(asked),
    )  # fmt: skip
    probe = Probe(NAME, "choice", tuple(row for one in asked for row in one.rows()))
    return DataSet(probe, origin, partial(measures, asked), MEANING).announced()


def _tables(source: str) -> tuple[dict[str, pl.DataFrame], str | None]:
    """Group -> table, and the commit of a hub data set."""
    folder = Path(source).expanduser()
    commit: str | None = None
    if folder.is_dir():
        files = sorted(path for path in folder.iterdir() if path.suffix.casefold() in user_files.TABLE_KINDS)
        if not files:
            raise UserError(f"{folder} holds no CSV, JSONL or parquet file", "Give a folder with files of statements.")
        found = {}
        for path in files:
            found[_group(path.stem)], _ = tables.read(str(path), "file of statements")
            tables.require(found[_group(path.stem)], str(path), COLUMNS)
        return found, None
    table, commit = tables.read(source, "file of statements")
    tables.require(table, source, COLUMNS)
    return {_group(folder.stem if tables.is_file(source) else source.partition("@")[0]): table}, commit


def _group(name: str) -> str:
    return name.removesuffix("_true_false")


def _label(value: Any) -> int | None:
    """+1 for true and -1 for false, from 1, 0 and booleans."""
    return None if value not in (0, 1) else 1 if value else -1


def measures(statements: Sequence[Statement], read: Readings) -> Measures:
    """The five measures over all statements, and over each group if there are several."""
    names = list(dict.fromkeys(one.group for one in statements))
    found = _of_group("all", statements, read)
    for name in names if len(names) > 1 else []:
        found |= _of_group(name, [one for one in statements if one.group == name], read)
    return found


def _of_group(group: str, statements: Sequence[Statement], read: Readings) -> dict[tuple[str, str], Measured]:
    scores, masses = (
        {one.unit: float(np.mean([read[metric][row.row] for row in one.rows()])) for one in statements}
        for metric in ("logratio", "pmass")
    )
    label = {one.unit: one.label for one in statements}
    dev = [scores[one.unit] for one in statements if one.is_dev]
    rest = [one.unit for one in statements if not one.is_dev]
    found: dict[str, Measured] = {"accuracy": Mean({unit: _right(scores[unit], label[unit]) for unit in scores})}
    if dev and rest:
        threshold = float(np.median(dev))
        found["calibrated accuracy"] = Mean({unit: _right(scores[unit] - threshold, label[unit]) for unit in rest})
    if len({*label.values()}) == 2:
        found["AUROC"] = Ranking(np.array([*scores.values()]), np.array([*label.values()]))
    found |= {"Yes-bias": Mean(scores), "answer mass": Mean(masses)}
    return {(group, name): value for name, value in found.items()}


def _right(score: float, label: int) -> float:
    return float(score * label > 0)
