"""The table that docs/performance.md opens with: the main jobs, ours and the peer that a reader would use instead."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from aims import POCKET, REAL


class Job(NamedTuple):
    """A job and its peer in plain words, and the line of results.json that measures it.

    It is the first line of the comparison and size whose `work` and `peer` start with the given words.
    """

    said: str
    peer_said: str
    comparison: str
    size: str
    work: str
    peer: str


JOBS = (
    Job("sample, train, subtract and score", "transformers, TRL and PEFT", "pipeline", POCKET, "", ""),
    Job("sample, train, subtract and score", "transformers, TRL and PEFT", "pipeline", REAL, "", ""),
    Job("sample replies", "`generate` of transformers", "generating", POCKET, "", "generate"),
    Job("sample replies", "`generate` of transformers", "generating", REAL, "", "generate"),
    Job("train both adapters, LoRA", "TRL and PEFT", "training", POCKET, "", "TRL"),
    Job("train both adapters, LoRA", "TRL and PEFT", "training", REAL, "", "TRL"),
    Job("train six families, three seeds", "TRL and PEFT", "sweeping", POCKET, "pos + neg of all", "TRL"),
    Job("score the dilemmas at seven strengths", "PEFT", "scoring", POCKET, "", "PEFT"),
    Job("score the dilemmas at seven strengths", "PEFT", "scoring", REAL, "", "PEFT"),
    Job("subtract two adapters exactly", "PEFT: merge twice, subtract", "algebra", REAL, "exact dW", "PEFT"),
    Job("write a steered checkpoint", "mergekit", "algebra", REAL, "the checkpoint", "mergekit"),
)
MODELS = {POCKET: "pocket", REAL: "SmolLM2-135M"}


def as_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """A line for every job that was measured."""
    lines = ["| job | model | ws, seconds | alternative | alternative, seconds | alternative / ws |", "|---" * 6 + "|"]
    for job in JOBS:
        if line := next((one for one in rows if measures(one, job)), None):
            cells = [job.said, MODELS[job.size], seconds(line["ours"]), job.peer_said, seconds(line["theirs"]),
                     f"{line['ratio']:.1f}x"]  # fmt: skip
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def seconds(value: float) -> str:
    """Seconds in two digits, but never as a power of ten."""
    return f"{value:.0f}" if value >= 100 else f"{value:.2g}"


def measures(line: Mapping[str, Any], job: Job) -> bool:
    """Whether a line of results.json is of this job."""
    starts = line["work"].startswith(job.work) and line["peer"].startswith(job.peer)
    return bool(starts and (line["comparison"], line["size"]) == (job.comparison, job.size))
