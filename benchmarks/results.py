"""All measurements as one record, merged from several runs and machines, and written as tables.

{"machine": {...}, "rows": [...], "spending": [...], "growth": [...], "fixed": [...], "other_machines": [{...}, ...]}

The top level is the machine that ran last; the others have the same form, without others of their own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import aims

MACHINE = ("processor", "device", "cores", "threads")
"""Facts that identify a machine."""
OTHERS = "other_machines"


def merged(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """The new record, with the parts that only the old record has.

    Of one machine and the same versions (of the packages that both name), rows belong together by comparison and size
    of model, so a comparison that was measured again replaces its rows; so do profiles, by work and size. A record of
    the machine with other versions is dropped; those of other machines are kept.
    """
    known = {_key(one): one for one in _apart(old)}
    own = known.pop(_key(new), None)
    found = dict(new) if own is None or not _same_versions(own, new) else _replaced(own, new)
    others = list(known.values())
    return {**found, OTHERS: others} if others else found


def _apart(record: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The records of all machines, each on its own."""
    yield {name: part for name, part in record.items() if name != OTHERS}
    yield from record.get(OTHERS, [])


def _key(record: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(record["machine"].get(fact) for fact in MACHINE)


def _same_versions(old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    one, other = (record["machine"].get("versions", {}) for record in (old, new))
    shared = one.keys() & other.keys()
    return bool(shared) and all(one[name] == other[name] for name in shared)


def _replaced(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    lists = {"rows": ("comparison", "size"), "spending": ("work", "size")}
    return {**old, **new, **{
        name: _without(old.get(name, []), new.get(name, []), keys)
        for name, keys in lists.items() if name in old or name in new
    }}  # fmt: skip


def _without(
    old: Sequence[Mapping[str, Any]], new: Sequence[Mapping[str, Any]], keys: Sequence[str]
) -> list[Mapping[str, Any]]:
    """The old records that no new one has the keys of, then the new ones."""
    measured = {tuple(one[key] for key in keys) for one in new}
    return [*(one for one in old if tuple(one[key] for key in keys) not in measured), *new]


# -------------------------------------------------------------------- text


def as_text(record: Mapping[str, Any]) -> str:
    """Every machine with its table of comparisons and the aims that it misses, the one that ran last first."""
    return "\n\n".join(_of_machine(one) for one in _apart(record))


def _of_machine(record: Mapping[str, Any]) -> str:
    facts = "\n".join(f"- {name.replace('_', ' ')}: {_plain(value)}" for name, value in record["machine"].items())
    missed = aims.misses(record["rows"], record.get("spending", []))
    return "\n\n".join(part for part in (facts, as_table(record["rows"]), missed, aims.unpaid(record["rows"])) if part)


def as_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The lines as a Markdown table."""
    head = ["work", "size", "ours, s", "peer", "peer, s", "ratio", "share of limit", "ours, peak MiB", "peer, peak MiB",
            "aims"]  # fmt: skip
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for one in rows:
        note = f" ({one['note']})" if one["note"] else ""
        share, peaks, repeated = one["share_of_limit"], (one["ours_peak"], one["theirs_peak"]), one["repetitions"]
        cells = [
            one["work"] + note, one["size"], _seconds(one["ours"], one["ours_range"], repeated[0]), one["peer"],
            _seconds(one["theirs"], one["theirs_range"], repeated[1]), f"{one['ratio']:.2f}",
            "" if share is None else f"{share:.2f} {one['limit']}",
            *("" if peak is None else f"{peak:.0f}" for peak in peaks), aims.verdicts(one["aims"]),
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _seconds(median: float, limits: Sequence[float], repetitions: int) -> str:
    return f"{median:.3g} ({limits[0]:.3g}-{limits[1]:.3g}, n={repetitions})"


def _plain(value: Any) -> str:
    return ", ".join(f"{name} {part}" for name, part in value.items()) if isinstance(value, Mapping) else str(value)
