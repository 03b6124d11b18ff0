"""`--lr auto`: the lowest loss wins, a rate that diverges is out, and without held-out topics it is refused."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from making import assert_one_line
from test_train import SMALL, pairs
from ws.base.errors import UserError
from ws.base.files import write_json
from ws.base.poles import Pole
from ws.fitting import learning_rate, train
from ws.fitting.data import Grid
from ws.fitting.learning_rate import RateChoice
from ws.fitting.run_settings import Settings
from ws.fitting.stages import Fitting
from ws.fitting.train import DivergedError
from ws.model.loading import ChatModel

INF, NAN = float("inf"), float("nan")


def fits(table: Mapping[float, tuple[float, float] | None]) -> Any:
    """Stands for the fits of both signs: their losses by rate; None diverges."""

    def losses_at(rate: float) -> dict[Pole, float]:
        found = table[rate]
        if found is None:
            raise DivergedError("the training loss is nan at step 3", "Lower --lr.")
        return {"pos": found[0], "neg": found[1]}

    return losses_at


@pytest.mark.parametrize(
    ("table", "chosen", "is_at_an_end"),
    [
        ({0.1: (2.0, 2.0), 0.2: (1.0, 1.5), 0.3: (1.4, 1.4)}, 0.2, False),
        ({0.1: (0.5, 3.0), 0.2: (1.5, 1.5), 0.3: (2.0, 2.0)}, 0.2, False),
        ({0.1: (3.0, 3.0), 0.2: (2.0, 2.0), 0.3: None}, 0.2, False),
        ({0.1: (9.0, 9.0)}, 0.1, True),
    ],
)
def test_the_lowest_mean_loss_of_the_rates_that_do_not_diverge_decides(
    table: dict[float, tuple[float, float] | None], chosen: float, is_at_an_end: bool, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    found = learning_rate.choose(list(table), fits(table))
    assert (found.chosen, found.is_at_an_end) == (chosen, is_at_an_end)
    assert [one.mean is None for one in found.tried] == [losses is None for losses in table.values()]
    told = capsys.readouterr().err
    assert [f"learning rate {rate:g} is ruled out" in told for rate in table] == [v is None for v in table.values()]
    write_json(tmp_path / "lr_sweep.json", found)
    assert RateChoice.of_record(json.loads((tmp_path / "lr_sweep.json").read_text())) == found


@pytest.mark.parametrize(
    ("given", "table", "chosen", "tried"),
    [
        ([2.0, 4.0], {1.0: (1.0, 1.0), 2.0: (0.5, 0.5), 4.0: (1.0, 1.0)}, 2.0, [1, 2, 4]),
        ([2.0, 4.0], {2.0: (3.0, 3.0), 4.0: (2.0, 2.0), 8.0: (1.0, 1.0), 16.0: (2.0, 2.0)}, 8.0, [2, 4, 8, 16]),
        ([2.0, 4.0], {2.0: (3.0, 3.0), 4.0: (2.0, 2.0), 8.0: None}, 4.0, [2, 4, 8]),
        ([1.0, 5.0, 20.0], {20.0: (9.0, 9.0), 5.0: (5.0, 5.0), 1.0: (3.0, 3.0), 0.2: (1.0, 1.0), 0.04: (2.0, 2.0)},
         0.2, [0.04, 0.2, 1, 5, 20]),
        ([1.0, 2.0], {2.0**n: (-float(n), -float(n)) for n in range(8)}, 16.0, [1, 2, 4, 8, 16]),  # three further
    ],
)  # fmt: skip
def test_the_range_grows_where_its_end_is_best(
    given: list[float], table: dict[float, tuple[float, float] | None], chosen: float, tried: list[float]
) -> None:
    found = learning_rate.choose(given, fits(table))
    assert found.chosen == chosen and [one.lr for one in found.tried] == tried
    assert found.is_at_an_end == (chosen in (tried[0], tried[-1]))


def test_rates_that_all_diverge_are_one_error() -> None:
    with pytest.raises(UserError) as caught:
        learning_rate.choose([0.1, 0.2], fits({0.1: None, 0.2: None}))
    assert not isinstance(caught.value, DivergedError)
    assert_one_line(caught.value, "0.1, 0.2", "--lr")


def run(folder: Path, out: Path, **training: Any) -> Fitting:
    given = {"rank": 2, "lora_alpha": 4, "batch_size": 4, "lr": "auto", **training}
    return Fitting(Settings(
        model=str(folder), out=out, train=given, grid=Grid(topics=4, personas=1, samples=4),
        sampling={"max_new_tokens": 6},
    ))  # fmt: skip


def test_a_diverging_rate_does_not_end_the_command(
    tiny_folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with run(tiny_folders["qwen3"], tmp_path, lr_candidates=(1e-3, 5e-3, 1e30)) as fitting:
        found = fitting.choose_lr()
        assert [one.mean is None for one in found.tried] == [False, False, True]
        assert fitting.training.lr == found.chosen == min(found.tried[:2], key=lambda one: one.mean or INF).lr
        assert "learning rate 1e+30 is ruled out" in capsys.readouterr().err
        assert fitting.train("pos").settings.lr == found.chosen


def test_without_held_out_topics_a_rate_cannot_be_chosen(tiny_folders: dict[str, Path], tmp_path: Path) -> None:
    with run(tiny_folders["qwen3"], tmp_path, validation=0.0) as fitting, pytest.raises(UserError) as caught:
        fitting.choose_lr()
    assert_one_line(caught.value, "--lr auto", "validation")
    assert not list(tmp_path.rglob("pairs.parquet")), "said before anything is sampled"
    with pytest.raises(UserError) as caught:
        learning_rate.require_validation(SMALL, pairs(topics=1))
    assert_one_line(caught.value, "--lr auto", "fewer than two")
    learning_rate.require_validation(SMALL, pairs(topics=2))


def test_a_fit_that_diverges_is_one_line_and_leaves_nothing(qwen: ChatModel, tmp_path: Path) -> None:
    cases = {"training loss": {"epochs": 2}, "validation loss": {"epochs": 1, "batch_size": 100}}
    for what, given in cases.items():
        chosen = train.TrainSettings(adapter=SMALL.adapter, lr=1e30, warmup_steps=0, **given)
        with pytest.raises(DivergedError) as caught:
            train.fit(qwen, pairs(), "pos", chosen, seed=0, data_seed=0, folder=tmp_path / "pos")
        assert_one_line(caught.value, what, "--lr")
    assert not list(tmp_path.iterdir())
