"""Where our time goes: the share of every kind of operation in one run of a piece of work, from torch's profiler."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from timing import seconds
from torch.profiler import ProfilerActivity, profile

KINDS = {
    "matrix products": ("mm", "bmm", "addmm", "baddbmm", "addmm_", "linear", "mkldnn_linear"),
    "softmax": ("_softmax", "_log_softmax", "_softmax_backward_data", "_log_softmax_backward_data", "logsumexp"),
    "moving data": ("copy_", "cat", "index_select", "index", "gather", "clone", "_index_put_impl_", "index_put_",
                    "slice_backward", "fill_", "zero_"),
}  # fmt: skip
COMPILED = "## Call CompiledFxGraph"
"""Names of compiled kernels in the profiler; all of them are norms."""
ELEMENTWISE, OUTSIDE = "elementwise and reductions", "outside of operations"


@dataclass(frozen=True)
class Spending:
    """Seconds of one run by kind of operation; OUTSIDE is Python, launching, and what the profiler itself takes."""

    work: str
    size: str
    seconds: Mapping[str, float]

    def as_record(self) -> dict[str, Any]:
        """Plain data for `results.json`."""
        return asdict(self)


def measure(work: Callable[[], object], name: str, size: str) -> Spending:
    """Profile one run of what has been run before; on a CUDA device, time counts where the device works."""
    on_device = torch.cuda.is_available()
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_device else [])]
    with profile(activities=kinds) as found:
        wall = seconds(work)
    spent = dict.fromkeys([*KINDS, ELEMENTWISE], 0.0)
    for event in found.key_averages():
        microseconds = event.self_device_time_total if on_device else event.self_cpu_time_total
        if event.key.startswith("aten::"):
            spent[kind_of(event.key.removeprefix("aten::"))] += microseconds / 1e6
        elif event.key.startswith(COMPILED):
            spent[ELEMENTWISE] += microseconds / 1e6
    return Spending(name, size, {**spent, OUTSIDE: max(0.0, wall - sum(spent.values()))})


def together(parts: Sequence[Spending], work: str) -> Spending:
    """The sum of several parts of one work."""
    kinds = [*KINDS, ELEMENTWISE, OUTSIDE]
    return Spending(work, parts[0].size, {kind: sum(one.seconds[kind] for one in parts) for kind in kinds})


def kind_of(operation: str) -> str:
    """The kind of an operation of torch, by its name without `aten::`."""
    return next((kind for kind, names in KINDS.items() if operation in names), ELEMENTWISE)


def as_table(records: Sequence[Mapping[str, Any]]) -> str:
    """Shares as a Markdown table."""
    kinds = [*KINDS, ELEMENTWISE, OUTSIDE]
    lines = [f"| work | size | s, profiled | {' | '.join(kinds)} |", "|" + "---|" * (len(kinds) + 3)]
    for one in records:
        total = sum(one["seconds"].values())
        shares = " | ".join(f"{100 * one['seconds'][kind] / total:.0f} %" for kind in kinds)
        lines.append(f"| {one['work']} | {one['size']} | {total:.3g} | {shares} |")
    return "\n".join(lines)
