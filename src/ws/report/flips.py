"""The rows whose answer changes side under a direction, with their texts: what the counts of gained and lost rows are.

A row is gained if its answer flips to the positive side (the behaviour, or honesty), and lost if it flips away from it.
The table is stored in the run, because scores hold row ids but no texts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import polars as pl

from ws.eval import dilemmas
from ws.measure.probe import Probe
from ws.report.summary import Scores

SCHEMA: dict[str, Any] = {
    "probe": pl.String,
    "alpha": pl.Float64,
    "gained": pl.Boolean,
    "row": pl.String,
    "group": pl.String,
    "question": pl.String,
    "before": pl.String,
    "after": pl.String,
    "base": pl.Float64,
    "value": pl.Float64,
}
"""Columns. `before`, `after`: the likelier answer, or reply; a tie is not positive. `base`, `value`: signed log-ratios,
nats."""


def table(scores: pl.DataFrame, edit: str, probes: Sequence[Probe]) -> pl.DataFrame:
    """The flipped rows of some choice and contrast probes at every strength, largest changes first.

    Dilemma rows that no headline counts are left out.
    """
    known = Scores(dilemmas.counted(scores))
    found = [
        _flipped(known.rows(probe.name, "logratio", edit, alpha), probe, alpha)
        for probe in probes
        for alpha in known.alphas(edit)
        if alpha != 0
    ]
    return pl.concat(found) if found else pl.DataFrame(schema=SCHEMA)


def _flipped(rows: pl.DataFrame, probe: Probe, alpha: float) -> pl.DataFrame:
    asked = {row.row: row for row in probe.rows}
    signed = rows.with_columns(
        signed_base=pl.col("base") * pl.col("label"), signed_value=pl.col("value") * pl.col("label")
    )
    turned = signed.filter((pl.col("signed_base") > 0) != (pl.col("signed_value") > 0))
    turned = turned.sort((pl.col("signed_value") - pl.col("signed_base")).abs(), descending=True, maintain_order=True)
    records = []
    for row in turned.to_dicts():
        one = asked[row["row"]]
        positive, negative = (one.replies or probe.answers)[:: one.label]
        records.append({
            "probe": probe.name, "alpha": alpha, "gained": row["signed_value"] > 0, "row": row["row"],
            "group": row["group"], "question": dilemmas.without_instruction(one.messages[-1]["content"]),
            "before": positive if row["signed_base"] > 0 else negative,
            "after": positive if row["signed_value"] > 0 else negative,
            "base": row["signed_base"], "value": row["signed_value"],
        })  # fmt: skip
    return pl.DataFrame(records, schema=SCHEMA)
