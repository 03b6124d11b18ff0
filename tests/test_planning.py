"""What a comparison will resolve and cost, said before it runs."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from test_compare import LINES, found_of, reader, seeds_of
from ws.base import power
from ws.base.errors import UserError
from ws.base.files import write_json
from ws.base.records import plain
from ws.commands import cli
from ws.comparing import numbers, planning
from ws.comparing.compare import Plan
from ws.comparing.planning import TYPICAL
from ws.fitting.run_settings import Settings


def test_more_seeds_find_smaller_effects_and_one_seed_says_nothing(tmp_path: Path) -> None:
    settings = Settings(out=tmp_path)
    one, two, six = (
        planning.outlook(settings, Plan(seeds=seeds, data_seeds=data))
        for seeds, data in (((0,), (0,)), ((0, 1), (0,)), ((0, 1, 2), (0, 1)))
    )
    assert math.isinf(one.alone) and math.isinf(one.apart) and "cannot be said" in " ".join(planning.told(one))
    assert two.alone > six.alone > 0 and two.apart > six.apart > 0 and six.replicates == 6
    assert six.alone == power.detectable(TYPICAL.rows, six.clusters, TYPICAL.seeds, 6)
    assert power.seeds_needed(six.apart, TYPICAL.seeds) <= 6 < power.seeds_needed(0.99 * six.apart, TYPICAL.seeds)


def test_the_cost_counts_runs_that_are_there(tmp_path: Path) -> None:
    settings, plan = Settings(out=tmp_path), Plan(families=("lora", "ia3"), seeds=(0, 1), shuffles=0)
    before = planning.outlook(settings, plan)
    (tmp_path / "pocket" / "sycophancy" / "lora" / "seed1").mkdir(parents=True)
    (tmp_path / "pocket" / "sycophancy" / "lora" / "seed1" / "direction.safetensors").touch()
    assert (before.fits, planning.outlook(settings, plan).fits) == (4, 3)
    assert before.conditions == before.searches * (1 + len(plan.budgets))
    assert planning.outlook(settings, replace(plan, draws=20)).searches > before.searches


def test_an_earlier_comparison_gives_the_spreads(tmp_path: Path) -> None:
    found = found_of(numbers.measure(reader(seeds_of(1.0, 1.2, 1.7)), LINES))
    file = tmp_path / "comparison.json"
    write_json(file, plain(found))
    known = planning.spread_of(file)
    assert known.source == str(file) and known.minutes == pytest.approx(62 / 60)
    assert known.seeds == pytest.approx(np.std([1.0, 1.2, 1.7], ddof=1))
    write_json(file, {"model": "pocket"})
    with pytest.raises(UserError, match="another version"):
        planning.spread_of(file)


def test_the_command_says_it_and_runs_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cli._main(["compare", "--plan", "--seeds", "0", "1", "2", "--out", str(tmp_path)])
    said = " ".join(capsys.readouterr().out.split())
    assert "It fits 54 missing runs" in said and "80 % power" in said and TYPICAL.source in said
    assert not list(tmp_path.iterdir())
