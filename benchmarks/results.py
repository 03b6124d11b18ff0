"""What was measured, as one record: put together from several runs, and written as a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

IDENTITY = ("processor", "cores", "threads", "versions")
"""Facts of a machine that must be equal for two runs to stand in one table."""


def merged(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """The new record, with what only the old one has where both are of one machine.

    Rows belong together by comparison and size of model, so a comparison that was measured again replaces its rows; so
    do profiles, by work and size.
    """
    if any(old["machine"].get(fact) != new["machine"].get(fact) for fact in IDENTITY):
        return dict(new)
    lists = {"rows": ("comparison", "size"), "spending": ("work", "size")}
    return {**old, **new, **{
        name: _replaced(old.get(name, []), new.get(name, []), keys)
        for name, keys in lists.items() if name in old or name in new
    }}  # fmt: skip


def _replaced(
    old: Sequence[Mapping[str, Any]], new: Sequence[Mapping[str, Any]], keys: Sequence[str]
) -> list[Mapping[str, Any]]:
    """The old records that no new one has the keys of, then the new ones."""
    measured = {tuple(one[key] for key in keys) for one in new}
    return [*(one for one in old if tuple(one[key] for key in keys) not in measured), *new]


def as_text(record: Mapping[str, Any]) -> str:
    """The machine and the table of comparisons."""
    facts = "\n".join(f"- {name.replace('_', ' ')}: {_plain(value)}" for name, value in record["machine"].items())
    return f"{facts}\n\n{as_table(record['rows'])}"


def as_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The lines as a Markdown table."""
    head = ["work", "size", "ours, s", "peer", "peer, s", "ratio", "share of GEMM peak", "ours, peak MiB",
            "peer, peak MiB"]  # fmt: skip
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for one in rows:
        note = f" ({one['note']})" if one["note"] else ""
        share, peaks = one["share_of_limit"], (one["ours_peak"], one["theirs_peak"])
        cells = [
            one["work"] + note, one["size"], _seconds(one["ours"], one["ours_range"]), one["peer"],
            _seconds(one["theirs"], one["theirs_range"]), f"{one['ratio']:.2f}",
            "" if share is None else f"{share:.2f}", *("" if peak is None else f"{peak:.0f}" for peak in peaks),
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _seconds(median: float, limits: Sequence[float]) -> str:
    return f"{median:.3g} ({limits[0]:.3g}-{limits[1]:.3g})"


def _plain(value: Any) -> str:
    return ", ".join(f"{name} {part}" for name, part in value.items()) if isinstance(value, Mapping) else str(value)
