"""The aims of the lines of the table, and the lines that miss them.

A ratio is the peer's median over ours. Shares are of the measured GEMM peak over necessary operations. Memory may
exceed the peer's by the size of the caches. Aims are for full workloads of the two sizes; other lines have none.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

POCKET, REAL = "pocket", "smollm2"

RATIOS = {
    ("scoring", "in place", REAL): 3.0, ("scoring", "peft", REAL): 2.0,
    ("scoring", "in place", POCKET): 3.0, ("scoring", "peft", POCKET): 1.8,
    ("training", "trl", POCKET): 1.8, ("training", "trl", REAL): 1.3,
    ("sweeping", "all", POCKET): 1.8,
    ("generating", "generate", POCKET): 2.5, ("generating", "generate", REAL): 2.5,
    ("algebra", "factors", REAL): 50.0, ("algebra", "dense", REAL): 4.0,
    ("algebra", "checkpoint", REAL): 4.0,
    ("pipeline", "peers", REAL): 2.5,
}  # fmt: skip
"""Comparison, peer and size -> the ratio to reach."""
GEMM_SHARES = {("scoring", REAL): 0.65, ("training", REAL): 0.5}
"""Comparison and size -> the share of the GEMM peak to reach."""
REPLICATE_SECONDS = {POCKET: 45.0}
"""All of `ws replicate` after its start."""

RATIO, SHARE, PEAK, WHOLE = "ratio", "share of the GEMM peak", "peak MiB", "seconds of `ws replicate`"


@dataclass(frozen=True)
class Aim:
    """A bound on one quantity of a line, and what was found; `at_least`: it is a lower bound."""

    quantity: str
    bound: float
    found: float
    at_least: bool = True

    @property
    def is_reached(self) -> bool:
        """Whether the bound holds."""
        return self.found >= self.bound if self.at_least else self.found <= self.bound

    def as_record(self) -> dict[str, Any]:
        """Plain data for `results.json`."""
        return {**asdict(self), "reached": self.is_reached}


def ratio(comparison: str, peer: str, size: str, found: float) -> Iterator[Aim]:
    """The aim for a ratio, if there is one."""
    if (bound := RATIOS.get((comparison, peer, size))) is not None:
        yield Aim(RATIO, bound, found)


def share(comparison: str, size: str, found: float | None) -> Iterator[Aim]:
    """The aim for a share of the GEMM peak, if there is one."""
    if found is not None and (bound := GEMM_SHARES.get((comparison, size))) is not None:
        yield Aim(SHARE, bound, found)


def peak(ours: float | None, theirs: float | None, cache: float) -> Iterator[Aim]:
    """The aim for peak memory: the peer's plus the cache, MiB; none unless both were measured."""
    if ours is not None and theirs is not None:
        yield Aim(f"{PEAK} (peer + cache of {cache:.0f})", theirs + cache, ours, at_least=False)


def whole(size: str, found: float) -> Iterator[Aim]:
    """The aim for the seconds of all of `ws replicate`, if there is one."""
    if (bound := REPLICATE_SECONDS.get(size)) is not None:
        yield Aim(WHOLE, bound, found, at_least=False)


# -------------------------------------------------------------------- fast paths

PAYS = 1.2
"""Delete a fast path unless some work takes this many times longer without it."""


def unpaid(rows: Sequence[Mapping[str, Any]]) -> str:
    """One line for every fast path that pays on none of its works and sizes; empty if no path was measured."""
    best: dict[str, float] = {}
    for line in rows:
        if line["comparison"] == "paths":
            path = line["work"].partition(": ")[0]
            best[path] = max(best.get(path, 0.0), line["ratio"])
    unpaid = [f"- {path}: pays at most {ratio:.2f}, less than {PAYS:g}: to be deleted." for path, ratio in best.items()
              if ratio < PAYS]  # fmt: skip
    return "\n".join(unpaid) or (f"Every fast path pays {PAYS:g} or more somewhere." if best else "")


# -------------------------------------------------------------------- text


def verdicts(aims: Sequence[Mapping[str, Any]]) -> str:
    """Records of aims as a cell of the table."""
    return "; ".join(f"{_bound(one)} {'reached' if one['reached'] else '**missed**'}" for one in aims)


def misses(rows: Sequence[Mapping[str, Any]], profiles: Sequence[Mapping[str, Any]]) -> str:
    """One sentence for every aim that was missed, with the profile that shows where the time goes."""
    shares = {(one["work"], one["size"]): one for one in profiles}
    found: dict[str, None] = {}  # an ordered set: two lines with the same miss give one sentence
    for line in rows:
        for aim in line.get("aims", ()):
            if not aim["reached"]:
                against = f" against {line['peer']}" if aim["quantity"].startswith((RATIO, PEAK)) else ""
                said = f"{_bound(aim)} is missed, it is {_number(aim['found'])}.{_reason(aim, line, shares)}"
                found[f"- {line['work']}, {line['size']}{against}: {said}"] = None
    if not any(line.get("aims") for line in rows):
        return "Nothing here has an aim."
    return "\n".join(found) or "Every aim in the table is reached."


def _reason(
    aim: Mapping[str, Any], line: Mapping[str, Any], shares: Mapping[tuple[str, str], Mapping[str, Any]]
) -> str:
    """Where the time of the line goes; empty for memory and rounding, which a profile of time cannot explain."""
    if aim["quantity"] not in (RATIO, SHARE, WHOLE):
        return ""
    profile = shares.get((line.get("profile", ""), line["size"]))
    if profile is None:
        return " No profile of it was made."
    total = sum(profile["seconds"].values())
    parts = ", ".join(f"{kind} {100 * spent / total:.0f} %" for kind, spent in profile["seconds"].items())
    return f" Its profile ({profile['work']}): {parts}."


def _bound(aim: Mapping[str, Any]) -> str:
    return f"{aim['quantity']} {'>=' if aim['at_least'] else '<='} {_number(aim['bound'])}"


def _number(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
