"""Sweeps and comparisons on a real Ray cluster: two nodes on this machine, killed, starved and interrupted."""

from __future__ import annotations

import csv
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch

from ws.base.errors import UserError
from ws.comparing import compare, many
from ws.comparing.compare import Plan
from ws.engines import Task, ray_cluster
from ws.engines.ray_cluster import RayCluster
from ws.fitting.data import Grid
from ws.fitting.run_settings import Settings
from ws.runs import sweep
from ws.runs.cells import Workplace

ray = pytest.importorskip("ray", reason="the extra ray is not installed")
pytestmark = pytest.mark.slow

from ray import cloudpickle  # noqa: E402
from ray.cluster_utils import Cluster  # noqa: E402

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import this file
os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112 - on a busy machine the default makes workers wait for everything else
STORE = 120 * 2**20


def started(nodes: int = 2, **options: Any) -> Cluster:
    """A running cluster of nodes with one CPU each."""
    node = {"num_cpus": 1, "object_store_memory": STORE}
    cluster = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False, **options})
    for _ in range(nodes - 1):
        cluster.add_node(**node)
    cluster.wait_for_nodes()
    return cluster


def squared(_: None, number: int, *before: int) -> int:
    return number**2 + sum(before)


# these two come before the cluster of the others: the client server of a second one on a machine does not start


def test_a_client_address_works_like_a_cluster_address() -> None:
    start = [str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", "--port=6398", "--num-cpus=1",
             "--ray-client-server-port=6399", "--runtime-env-agent-port=6397", "--node-ip-address=127.0.0.1",
             "--include-dashboard=false",
             "--disable-usage-stats"]  # fmt: skip
    open_to_all = {**os.environ, "RAY_AUTH_MODE": "disabled"}
    head = subprocess.Popen(start, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=open_to_all)
    try:
        wait_for(lambda: socket.socket().connect_ex(("127.0.0.1", 6399)) == 0, 60)
        (done,) = RayCluster("ray://127.0.0.1:6399").run([Task("one", squared, (3,))], {})
        assert done.value == 9
    finally:
        head.terminate()
        head.wait(timeout=60)


def test_a_cluster_is_started_on_this_machine_if_none_is_named() -> None:
    found: Sequence[Any] = list(RayCluster().run([Task(f"{i}", squared, (i,)) for i in range(3)], {}))
    assert sorted(one.value for one in found) == [0, 1, 4] and not ray.is_initialized()


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """Two nodes that no test harms."""
    found = started()
    yield found
    found.shutdown()


def test_values_go_from_task_to_task_and_errors_stay_with_theirs(cluster: Cluster) -> None:
    def weigh(shared: dict[str, torch.Tensor], name: str) -> float:
        shared[name] += 1  # every task has a copy of its own
        return float(shared[name].sum())

    def fail(_: None) -> None:
        raise UserError("no such thing")

    def bug(*_: None) -> None:
        raise KeyError("missing")

    weights = {"w": torch.ones(1000)}
    tasks = [
        Task("two", squared, (2,)), Task("three", squared, (3,), after=("two",)), Task("fail", fail),
        Task("bug", bug, after=("fail",)), *(Task(f"weigh {i}", weigh, ("w",), "weights") for i in range(2)),
    ]  # fmt: skip
    done = {
        one.task.name: one for one in RayCluster(cluster.address, retries=1).run(tasks, {"weights": lambda: weights})
    }
    assert (done["two"].value, done["three"].value) == (4, 13)
    assert (done["fail"].error, done["fail"].attempts) == ("no such thing", 2)
    assert done["bug"].error.startswith("a bug: KeyError: 'missing'")
    assert [done[f"weigh {i}"].value for i in range(2)] == [2000.0, 2000.0]


# -------------------------------------------------------------------- what is asked for


def refused(engine: RayCluster) -> str:
    asked = time.monotonic()
    with pytest.raises(UserError) as found:
        list(engine.run([Task("one", squared, (1,))], {}))
    assert time.monotonic() - asked < 60, "nothing waits for what cannot come"
    return str(found.value)


def test_what_the_cluster_lacks_is_named(cluster: Cluster, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert "no node of the cluster has 8 CPUs: the largest of 2 has 1" in refused(RayCluster(cluster.address, cpus=8))
    assert re.search("has 1 GPUs: .* has 0. Lower --gpus-per-run", refused(RayCluster(cluster.address, gpus=1)))
    absent = str(tmp_path / "none.toml")
    assert f"has no {absent}" in refused(RayCluster(cluster.address, files=(absent,)))
    assert "does not see it" in refused(RayCluster(cluster.address, check=lambda: "does not see it"))
    monkeypatch.setattr(ray_cluster, "__version__", "9.9")
    told = refused(RayCluster(cluster.address))
    assert "this machine 9.9" in told and "Install the same version everywhere" in told


@pytest.mark.parametrize("address", ["127.0.0.1:1", "ray://127.0.0.1:1", "127.0.0.1:none"])
def test_an_address_without_a_cluster_is_told(address: str) -> None:
    assert "Ray cluster" in refused(RayCluster(address))


def test_a_port_of_something_else_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_cluster, "HEALTH_PATIENCE", 15.0)
    with socket.create_server(("127.0.0.1", 0)) as other:
        assert "is not a Ray cluster" in refused(RayCluster(f"127.0.0.1:{other.getsockname()[1]}"))


def test_tasks_that_wait_for_each_other_are_a_bug_and_no_endless_wait(cluster: Cluster) -> None:
    with pytest.raises(ValueError, match="never ends: one"):
        list(RayCluster(cluster.address).run([Task("one", squared, (1,), after=("one",))], {}))


def test_a_cluster_of_another_version_is_told(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    def other_version(**_: object) -> None:
        raise RuntimeError("Version mismatch: The cluster was started with:\n    Ray: 2.1\n    Python: 3.9")

    monkeypatch.setattr(ray, "init", other_version)
    assert "Version mismatch: The cluster was started with" in refused(RayCluster(cluster.address))


# -------------------------------------------------------------------- whole sweeps

SMALL: dict[str, Any] = {
    "grid": Grid(topics=3, personas=2, samples=2), "sampling": {"max_new_tokens": 6}, "alphas": (-1.0, 0.0, 1.0),
    "train": {"rank": 2, "lora_alpha": 4, "lr": 5e-3, "batch_size": 8}, "control_seeds": 1, "rows": 4, "samples": 1,
}  # fmt: skip
WORDS = ["--topics", "3", "--personas", "2", "--samples", "2", "--max-new-tokens", "6", "--rank", "2", "--lora-alpha",
         "4", "--lr", "5e-3", "--batch-size", "8", "--control-seeds", "1", "--rows", "4", "--shown", "1",
         "--judged", "0"]  # fmt: skip
FAMILIES, SEEDS, FEWER = ("lora", "pissa"), (0, 1, 2), (0, 1)
"""The sweeps that something happens to have FEWER seeds."""


@contextmanager
def one_thread() -> Iterator[None]:
    """As on the cluster: sums over more threads round differently."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def alone(tiny_folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the same sweep on this machine alone."""
    settings = Settings(model=str(tiny_folders["qwen3"]), out=tmp_path_factory.mktemp("alone"), judged=0, **SMALL)
    with one_thread():
        _, place = sweep.run(settings, FAMILIES, SEEDS, (0,))
    return place


def table(place: Path, seeds: Sequence[int]) -> list[dict[str, str]]:
    rows = csv.DictReader((place / "sweep_per_run.csv").open())
    return [{**row, "seconds": ""} for row in rows if int(row["seed"]) in seeds]


def assert_same(place: Path, other: Path, seeds: Sequence[int] = FEWER) -> None:
    """Two finished sweeps are equal to the last bit."""
    assert table(place, seeds) == table(other, seeds)
    for family in FAMILIES:
        for seed in seeds:
            runs = [one / family / f"seed{seed}" for one in (place, other)]
            for name in ("direction.safetensors", "scores.parquet"):
                one, two = (run / name for run in runs)
                assert one.read_bytes() == two.read_bytes() or (
                    name.endswith("parquet") and pl.read_parquet(one).equals(pl.read_parquet(two))
                ), (family, seed, name)


def words(model: Path, out: Path, address: str, *more: str) -> list[str]:
    return [sys.executable, "-m", "ws", "sweep", "--model", str(model), "--out", str(out), "--families", *FAMILIES,
            "--seeds", *map(str, FEWER), *WORDS, "--engine", "ray", "--address", address, *more]  # fmt: skip


def begun(command: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


def place_of(out: Path) -> Path:
    return out / "tiny-qwen3" / "sycophancy"


def finished(out: Path) -> list[Path]:
    return list(out.rglob("summary.json"))


def wait_for(condition: Any, seconds: float = 240) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.2)


def test_a_sweep_on_two_nodes_gives_the_table_of_the_local_engine(
    cluster: Cluster, tiny_folders: dict[str, Path], tmp_path: Path, alone: Path
) -> None:
    settings = Settings(model=str(tiny_folders["qwen3"]), out=tmp_path, judged=0, **SMALL)
    outcomes, place = sweep.run(settings, FAMILIES, SEEDS, (0,), Workplace("ray", cluster.address))
    assert all(outcome.error == "" for outcome in outcomes) and len(outcomes) == 6
    assert_same(place, alone, SEEDS)
    assert "different environment" not in (place / "sweep.md").read_text()
    stamps = {path: path.stat().st_mtime_ns for path in place.rglob("stages/*.json")}
    sweep.run(settings, FAMILIES, SEEDS, (0,))  # goes on here from what the cluster has done
    assert {path: path.stat().st_mtime_ns for path in place.rglob("stages/*.json")} == stamps


def test_a_node_that_is_killed_in_the_middle_loses_nothing(
    tiny_folders: dict[str, Path], tmp_path: Path, alone: Path
) -> None:
    cluster = started()
    try:
        out = tmp_path / "out"
        running = subprocess.Popen(
            words(tiny_folders["qwen3"], out, cluster.address), stderr=subprocess.PIPE, text=True
        )
        wait_for(lambda: len(finished(out)) >= 1)
        cluster.remove_node(sorted(cluster.worker_nodes, key=id)[0], allow_graceful=False)
        _, told = running.communicate(timeout=300)
        assert running.returncode == 0, told
        assert_same(place_of(out), alone)
    finally:
        cluster.shutdown()


def test_after_the_head_is_killed_a_rerun_on_a_new_cluster_finishes(
    tiny_folders: dict[str, Path], tmp_path: Path, alone: Path
) -> None:
    out, cluster = tmp_path / "out", started()
    try:
        running = subprocess.Popen(
            words(tiny_folders["qwen3"], out, cluster.address), stderr=subprocess.PIPE, text=True
        )
        wait_for(lambda: len(finished(out)) >= 1)
    finally:
        cluster.shutdown()
    done = finished(out)
    records = [record for run in done for record in (run.parent / "stages").glob("*.json")]
    stamps = [record.stat().st_mtime_ns for record in records]
    running.communicate(timeout=200)
    assert running.returncode != 0
    cluster = started()
    try:
        subprocess.run(words(tiny_folders["qwen3"], out, cluster.address), check=True, timeout=400)
    finally:
        cluster.shutdown()
    assert [record.stat().st_mtime_ns for record in records] == stamps and len(records) > 5
    assert_same(place_of(out), alone)


def test_two_sweeps_of_one_folder_at_once_do_not_clash(
    cluster: Cluster, tiny_folders: dict[str, Path], tmp_path: Path, alone: Path
) -> None:
    out = tmp_path / "out"
    both = [subprocess.Popen(words(tiny_folders["qwen3"], out, cluster.address)) for _ in range(2)]
    assert [one.wait(timeout=500) for one in both] == [0, 0]
    assert_same(place_of(out), alone)


def test_ctrl_c_cancels_and_says_how_to_continue(
    cluster: Cluster, tiny_folders: dict[str, Path], tmp_path: Path, alone: Path
) -> None:
    out = tmp_path / "out"
    running = begun(words(tiny_folders["qwen3"], out, cluster.address))
    wait_for(lambda: len(finished(out)) >= 1)
    sent = time.monotonic()
    running.send_signal(signal.SIGINT)
    _, told = running.communicate(timeout=60)
    assert running.returncode == 130 and "run the same command again to continue" in told and "Traceback" not in told
    assert time.monotonic() - sent < 30
    known = len(list(out.rglob("stages/*.json")))
    time.sleep(5)
    assert len(list(out.rglob("stages/*.json"))) == known, "no task goes on after its sweep"
    subprocess.run(words(tiny_folders["qwen3"], out, cluster.address), check=True, timeout=400)
    assert_same(place_of(out), alone)


def test_a_comparison_on_two_nodes_is_one_that_this_machine_would_have_made(
    cluster: Cluster, tiny_folders: dict[str, Path], tmp_path: Path
) -> None:
    plan = Plan(families=("lora",), seeds=(0, 1), activations=("mean",), steps=(1,), draws=2, permutations=0,
                shuffles=0, budgets=(0.5,), calibration_prompts=2, calibration_tokens=4)  # fmt: skip
    small = {**SMALL, "rows": 12, "judged": 0}
    settings = Settings(model=str(tiny_folders["qwen3"]), out=tmp_path, **small)
    (found,) = many.run([settings], plan, Workplace("ray", cluster.address))
    assert (found.folder / "comparison.html").is_file()
    stamps = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("stages/*.json")}
    with one_thread():
        assert compare.run(settings, plan).found == found.found
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("stages/*.json")} == stamps, "nothing is new"


# -------------------------------------------------------------------- a store


def test_a_store_on_s3_keeps_a_sweep_that_continues_anywhere(
    tiny_folders: dict[str, Path], tmp_path: Path, alone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moto = pytest.importorskip("moto.server", reason="moto is not installed")
    pytest.importorskip("s3fs", reason="the extra s3 is not installed")
    server = moto.ThreadedMotoServer(port=0)
    server.start()
    host, port = server.get_host_and_port()
    monkeypatch.setenv("RAY_TMPDIR", tempfile.gettempdir())  # Ray's sockets need short paths
    settings_of_aws = {"AWS_ENDPOINT_URL": f"http://{host}:{port}", "AWS_ACCESS_KEY_ID": "a",
                       "AWS_SECRET_ACCESS_KEY": "b", "AWS_DEFAULT_REGION": "us-east-1",
                       "TMPDIR": str(tmp_path / "scratch")}  # fmt: skip
    (tmp_path / "scratch").mkdir()
    for name, value in settings_of_aws.items():
        monkeypatch.setenv(name, value)
    import boto3  # noqa: PLC0415

    boto3.client("s3").create_bucket(Bucket="sweeps")
    cluster = started()
    try:
        out, more = tmp_path / "out", ("--store", "s3://sweeps/first")
        subprocess.run(words(tiny_folders["qwen3"], out, cluster.address, *more), check=True, timeout=400)
        assert_same(place_of(out), alone)
    finally:
        cluster.shutdown()
    keys = [one["Key"] for one in boto3.client("s3").list_objects_v2(Bucket="sweeps")["Contents"]]
    assert "first/tiny-qwen3/sycophancy/sweep.json" in keys
    assert sum(key.endswith("/summary.json") for key in keys) == len(FAMILIES) * len(FEWER)
    assert not [key for key in keys if key.endswith((".lock", ".tmp"))]
    elsewhere = tmp_path / "elsewhere"
    local = words(tiny_folders["qwen3"], elsewhere, "", *more)
    local = [word for number, word in enumerate(local) if word not in ("--engine", "ray", "--address", "")]
    subprocess.run(local, check=True, timeout=400)
    assert_same(place_of(elsewhere), alone)
    for run in finished(elsewhere):
        records = [json.loads(file.read_text()) for file in (run.parent / "stages").glob("train-*.json")]
        theirs = [json.loads((place_of(out) / run.parent.relative_to(place_of(elsewhere)) / "stages"
                              / f"{record['stage']}.json").read_text()) for record in records]  # fmt: skip
        assert records == theirs and len(records) == 2, "no adapter was trained again"
    server.stop()


# -------------------------------------------------------------------- how a task can end


def ends(address: str, function: Any, retries: int = 0) -> str:
    (done,) = RayCluster(address, retries=retries).run([Task("one", function)], {})
    return done.error


def test_a_killed_process_is_told_apart_from_a_bug(cluster: Cluster) -> None:
    def die(_: None) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def bug(_: None) -> float:
        return 1 / 0

    assert "its process or node died" in ends(cluster.address, die)
    assert ends(cluster.address, bug) == "a bug: ZeroDivisionError: division by zero"


def test_a_task_that_needs_too_much_memory_is_told_apart_from_a_bug() -> None:
    used, total = memory()
    limit = (used + 2**30) / total

    def eat(_: None) -> None:
        held = []
        for _ in range(60):
            held.append(bytearray(os.urandom(1) * (100 * 2**20)))
            time.sleep(0.1)

    cluster = started(1, _system_config={"memory_usage_threshold": limit, "memory_monitor_refresh_ms": 100})
    try:
        assert ends(cluster.address, eat).startswith("its node ran out of memory")
    finally:
        cluster.shutdown()


def memory() -> tuple[float, float]:
    """Memory in use and in all, in bytes."""
    read = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    total, available = (int(read[name].split()[0]) * 1024 for name in ("MemTotal", "MemAvailable"))
    return total - available, total
