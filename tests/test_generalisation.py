"""Generalisation: effects and predictions are what the scores say, and agreement is a rank correlation."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import scipy.stats

from test_compare import SMALL
from ws.base import rankings
from ws.base.errors import UserError
from ws.comparing import generalisation, generalisation_page
from ws.comparing.generalisation import Generalisation, Pair, Study
from ws.fitting.run_settings import Settings
from ws.measure.probe import is_dev


def _pair(direction: str, probe: str, *replicates: float, told: float = 0.0, cosine: float | None = None) -> Pair:
    return Pair(direction, probe, replicates, persona=told, gradient=-told, cosine=cosine)


def _found(*pairs: Pair) -> Generalisation:
    return Generalisation("model", "lora", 0.5, len(pairs[0].replicates), {"a": "choice"}, {"a": (1.0, -1.0)}, pairs)


PAIRS = (
    _pair("a", "a", 9.0, 9.0, told=-9.0),
    _pair("a", "b", 1.0, 3.0, told=0.5, cosine=-0.2),
    _pair("b", "a", 3.0, 1.0, told=0.4, cosine=-0.2),
    _pair("a", "c", -1.0, -1.0, told=0.1),
    _pair("b", "c", -4.0, -2.0, told=0.2),
    _pair("b", "b", 9.0, 9.0, told=-9.0),
)


@pytest.mark.parametrize("count", [5, 12, 40])
def test_rank_correlation_is_that_of_scipy_with_the_interval_of_bonett_and_wright(count: int) -> None:
    rng = np.random.default_rng(count)
    x = rng.normal(size=count).round(1)  # rounded, so that there are ties
    y = x + rng.normal(size=count)
    found = rankings.spearman(x, y)
    assert found.mean == pytest.approx(scipy.stats.spearmanr(x, y).statistic)
    error = math.sqrt((1 + found.mean**2 / 2) / (count - 3))
    assert math.atanh(found.high) - math.atanh(found.low) == pytest.approx(2 * scipy.stats.norm.ppf(0.975) * error)


def test_rank_correlations_without_an_interval_have_none() -> None:
    assert math.isnan(rankings.spearman([1, 2, 3], [1, 3, 2]).low)
    assert rankings.spearman([1, 2, 3, 4], [1, 2, 3, 4]).mean == pytest.approx(1)
    assert math.isnan(rankings.spearman([1, 2, 3, 4], [1, 2, 3, 4]).high)
    assert math.isnan(rankings.spearman([1, 1, 1, 1], [1, 2, 3, 4]).mean)


def test_the_interval_of_a_rank_correlation_covers_the_truth() -> None:
    """Bivariate normal with r = .6, whose population Spearman is 6/pi asin(r/2); 12 pairs, 2,000 draws."""
    rng, truth = np.random.default_rng(0), 6 / math.pi * math.asin(0.3)
    drawn = rng.multivariate_normal([0, 0], [[1, 0.6], [0.6, 1]], size=(2000, 12))
    found = [rankings.spearman(one[:, 0], one[:, 1]) for one in drawn]
    assert 0.92 <= np.mean([one.low <= truth <= one.high for one in found]) <= 0.98


def test_a_directions_own_probe_does_not_count() -> None:
    persona, gradient, *_ = _found(*PAIRS).agreements()
    assert persona.n == 4
    expected = scipy.stats.spearmanr([0.5, 0.4, 0.1, 0.2], [2, 2, -1, -3]).statistic
    assert persona.rho == pytest.approx(expected)
    assert gradient.rho == pytest.approx(-expected)


def test_cosines_are_compared_on_the_pairs_that_have_one() -> None:
    by_name = {one.name: one for one in _found(*PAIRS).agreements()}
    assert by_name["cosine, behaviours only"].n == by_name["persona, behaviours only"].n == 2


def test_the_ceiling_is_what_one_replicate_says_of_another() -> None:
    (ceiling,) = _found(*PAIRS).ceiling()
    assert ceiling.rho == pytest.approx(scipy.stats.spearmanr([1, 3, -1, -4], [3, 1, -1, -2]).statistic)
    assert not _found(*(_pair(one.direction, one.probe, 1.0) for one in PAIRS)).ceiling()


def test_the_page_says_when_pairs_are_too_few() -> None:
    assert "do not separate from 0" in generalisation_page.sentence(_found(*PAIRS))


def test_one_behaviour_is_refused_before_anything_is_fitted(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="two names or more"):
        Study(Settings(out=tmp_path), ["sycophancy", "sycophancy"], [0], [0], 0.5)


@pytest.mark.slow
def test_a_study_measures_effects_on_test_rows_and_predictions_on_dev_rows(
    tiny_folders: dict[str, Path], tmp_path: Path
) -> None:
    settings = Settings(model=str(tiny_folders["qwen3"]), out=tmp_path, **SMALL)
    with Study(settings, ["sycophancy", "honesty"], [0, 1], [0], 0.002) as study:
        found = study.result()
        effects, predictions = study.effects(), study.predictions()
        strengths = study.strengths()
        page = generalisation_page.write(study.folder.path, found)
    assert not any(is_dev(cluster) for cluster in effects["cluster"].drop_nulls().unique())
    assert all(is_dev(cluster) for cluster in predictions["cluster"].drop_nulls().unique())
    assert {(pair.direction, pair.probe) for pair in found.pairs} == {
        (one, probe) for one in ("sycophancy", "honesty") for probe in study.probes
    }
    pair = next(one for one in found.others if (one.direction, one.probe) == ("honesty", "sycophancy"))
    probe = study.probes["sycophancy"].name
    rows = effects.filter((pl.col("probe") == probe) & (pl.col("metric") == "logratio"))
    mean = {
        alpha: float((part["value"] * part["label"]).mean())  # type: ignore[arg-type]
        for (edit, alpha), part in rows.group_by("edit", "alpha") if edit == "dW:honesty, seed 1, data seed 0"
    }  # fmt: skip
    plus, minus = strengths["honesty"]["1"][1], strengths["honesty"]["-1"][1]
    assert pair.replicates[1] == pytest.approx((mean[plus] - mean[minus]) / 2, abs=1e-6)
    assert json.loads(page.with_suffix(".json").read_text())["replicates"] == 2

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("measured again")

    with pytest.MonkeyPatch.context() as patch, Study(settings, ["sycophancy", "honesty"], [0, 1], [0], 0.002) as again:
        patch.setattr(generalisation, "score", refuse)
        patch.setattr(generalisation.gradient, "steps", refuse)
        assert again.result() == found
