"""What goes to experiment trackers: the curves and numbers of a run, through the clients themselves, offline."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from test_report import behaviour_shift, summed, table
from ws.base.errors import UserError
from ws.base.files import write_json
from ws.base.records import plain
from ws.commands import cli
from ws.report.findings import Summary
from ws.runs import tracking

LOSSES = {"pos": [2.0, 1.5, 1.25], "neg": [3.0, 2.5]}


def run_folder(folder: Path, finished: bool = True) -> Summary:
    """A run with two training logs and, if finished, a summary."""
    found = summed(table(behaviour_shift))
    folder.mkdir(parents=True)
    naming = {"model": "small", "behaviour": "sycophancy", "adapter": "lora", "seed": 0, "data_seed": 0}
    write_json(folder / "config.json", {"settings": naming})
    if finished:
        write_json(folder / "summary.json", plain(found))
    for pole, losses in LOSSES.items():
        (folder / pole).mkdir()
        write_json(folder / pole / "train_result.json", {})
        with (folder / pole / "train_log.csv").open("w", newline="") as handle:
            writer = csv.writer(handle)
            writer.writerow(["step", "epoch", "loss", "eval_loss", "lr", "grad_norm"])
            writer.writerow([0, 0.0, "", 4.0, 0.0, ""])
            writer.writerows([[step, 0.5, loss, "", 1e-3, 0.25] for step, loss in enumerate(losses, start=1)])
    return found


def test_curves_hold_both_sides_by_step_and_nothing_that_was_not_measured(tmp_path: Path) -> None:
    run_folder(tmp_path / "run")
    found = dict(tracking.curves(tmp_path / "run"))
    assert list(found) == [0, 1, 2, 3]
    assert found[0] == {f"{pole}/{name}": value for pole in LOSSES for name, value in (("eval_loss", 4.0), ("lr", 0.0))}
    assert (found[2]["pos/loss"], found[2]["neg/loss"]) == (1.5, 2.5)
    assert "neg/loss" not in found[3]


def test_final_numbers_are_those_of_the_summary(tmp_path: Path) -> None:
    summary = run_folder(tmp_path / "run")
    found = tracking.final(summary)
    assert found["sycophancy/change/-1"] == summary.measured.change["-1"].mean
    assert found["dilemmas/low/1"] == summary.numbers.dd_delta["1"].low
    assert found["side_effects/kl_p95/1"] == summary.numbers.side_effects["1"].kl_p95
    assert all(isinstance(value, float) for value in found.values())


def test_a_missing_library_is_told_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                   capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert cli._main(["replicate", "--track", "wandb", "--out", str(tmp_path / "out")]) == 2
    told = capsys.readouterr().err
    assert "--track wandb needs the package wandb" in told and "pip install wandb" in told
    assert not (tmp_path / "out").exists()


class Refusing:
    """A tracker that cannot be reached."""

    def __init__(self, *_: Any) -> None:
        raise ConnectionError("no route\nto host")


def test_a_tracker_out_of_reach_is_one_line_and_leaves_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_folder(tmp_path / "run")
    monkeypatch.setattr(tracking, "TRACKERS", {"wandb": Refusing})
    with pytest.raises(UserError, match=r"wandb took no more data: ConnectionError: no route to host\. The run is"):
        tracking.send("wandb", tmp_path / "run")


# -------------------------------------------------------------------- the clients themselves


def sent(tracker: str, folder: Path, tmp_path: Path, **variables: str) -> None:
    """Send a run in a process of its own, as a user's command does, without a network."""
    program = (
        f"from pathlib import Path; from ws.runs import tracking; tracking.send({tracker!r}, Path({str(folder)!r}))"
    )
    offline = {"HF_HUB_OFFLINE": "1", "no_proxy": "*", **variables}
    subprocess.run([sys.executable, "-c", program], check=True, cwd=tmp_path, env={**os.environ, **offline},
                   capture_output=True, text=True)  # fmt: skip


def test_trackio_stores_the_run_in_its_local_database(tmp_path: Path) -> None:
    pytest.importorskip("trackio", reason="the track extra is not installed: no trackio")
    summary = run_folder(tmp_path / "run")
    sent("trackio", tmp_path / "run", tmp_path, TRACKIO_DIR=str(tmp_path / "trackio"))
    program = (
        "import json; from trackio.sqlite_storage import SQLiteStorage; "
        "print(json.dumps(SQLiteStorage.get_logs('weight-steering', 'small-sycophancy-lora-0-0')))"
    )
    told = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True,
                          env={**os.environ, "TRACKIO_DIR": str(tmp_path / "trackio")})  # fmt: skip
    logs = json.loads(told.stdout.splitlines()[-1])
    assert [one["pos/loss"] for one in logs if "pos/loss" in one] == LOSSES["pos"]
    assert logs[-1]["sycophancy/change/1"] == pytest.approx(summary.measured.change["1"].mean)


def test_tensorboard_event_files_hold_what_was_sent(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="the track extra is not installed: no tensorboard")
    summary = run_folder(tmp_path / "run")
    sent("tensorboard", tmp_path / "run", tmp_path)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # noqa: PLC0415 - slow

    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    losses = [(one.step, one.value) for one in events.Scalars("neg/loss")]
    assert losses == list(enumerate(LOSSES["neg"], start=1))
    (change,) = events.Scalars("sycophancy/change/1")
    assert change.value == pytest.approx(summary.measured.change["1"].mean)


def test_mlflow_stores_the_run_in_a_local_file(tmp_path: Path) -> None:
    mlflow = pytest.importorskip("mlflow", reason="mlflow is not installed; it is large and in no extra")
    run_folder(tmp_path / "run", finished=False)
    place = f"sqlite:///{tmp_path / 'mlflow.db'}"
    sent("mlflow", tmp_path / "run", tmp_path, MLFLOW_TRACKING_URI=place)
    client = mlflow.MlflowClient(place)
    (found,) = client.search_runs([client.get_experiment_by_name("weight-steering").experiment_id])
    assert [one.value for one in client.get_metric_history(found.info.run_id, "pos/loss")] == LOSSES["pos"]


def test_wandb_writes_a_local_run_without_a_network(tmp_path: Path) -> None:
    pytest.importorskip("wandb", reason="wandb is not installed; it is large and in no extra")
    run_folder(tmp_path / "run", finished=False)
    sent("wandb", tmp_path / "run", tmp_path, WANDB_MODE="offline", WANDB_DIR=str(tmp_path))
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))
