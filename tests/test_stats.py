"""Intervals agree with their closed forms, and cover what they promise."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats as scipy_stats

from ws.base import changes, power, stats

FEW, MANY = 12, 60


def values_of(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0.3, 2.0, count)


# ---------------------------------------------------------------- over_clusters


@pytest.mark.parametrize("count", [2, 5, 12, 49])
@pytest.mark.parametrize("confidence", [0.8, 0.95])
def test_rows_that_are_their_own_clusters_give_the_t_interval(count: int, confidence: float) -> None:
    values = values_of(count)
    found = stats.over_clusters(values, range(count), confidence=confidence)
    expected = scipy_stats.t.interval(confidence, count - 1, values.mean(), scipy_stats.sem(values))
    assert (found.low, found.high) == pytest.approx(expected, rel=1e-10)
    assert found.mean == pytest.approx(values.mean())
    assert (found.n, found.clusters, found.method) == (count, count, "cluster t")


@given(
    st.lists(st.tuples(st.floats(-10, 10), st.integers(0, 5)), min_size=3, max_size=30).filter(
        lambda rows: len({cluster for _, cluster in rows}) > 1
    )
)
@settings(max_examples=60, deadline=None)
def test_few_clusters_follow_the_cluster_robust_formula(rows: list[tuple[float, int]]) -> None:
    values, clusters = [value for value, _ in rows], [f"c{cluster}" for _, cluster in rows]
    mean, names = sum(values) / len(values), sorted(set(clusters))
    squares = sum(
        sum(value - mean for value, cluster in zip(values, clusters, strict=True) if cluster == name) ** 2
        for name in names
    )
    error = math.sqrt(len(names) / (len(names) - 1) * squares) / len(values)
    margin = scipy_stats.t.ppf(0.975, len(names) - 1) * error
    found = stats.over_clusters(values, clusters)
    assert found.mean == pytest.approx(mean, abs=1e-9)
    assert found.high - found.mean == pytest.approx(margin, rel=1e-6, abs=1e-9)
    assert found.mean - found.low == pytest.approx(margin, rel=1e-6, abs=1e-9)
    assert (found.n, found.clusters) == (len(rows), len(names))


def test_repeating_a_row_within_its_cluster_adds_no_certainty() -> None:
    values = values_of(FEW)
    once = stats.over_clusters(values, range(FEW))
    thrice = stats.over_clusters(np.repeat(values, 3), np.repeat(np.arange(FEW), 3))
    assert thrice.high - thrice.low == pytest.approx(once.high - once.low)
    apart = stats.over_clusters(np.repeat(values, 3), range(3 * FEW))
    assert apart.high - apart.low < 0.7 * (once.high - once.low)


@pytest.mark.parametrize(
    ("clusters", "method"), [(49, "cluster t"), (50, "cluster bootstrap"), (51, "cluster bootstrap")]
)
def test_the_bootstrap_begins_at_fifty_clusters(clusters: int, method: str) -> None:
    assert stats.over_clusters(values_of(2 * clusters), np.repeat(np.arange(clusters), 2)).method == method


def test_the_bootstrap_is_near_the_t_interval_and_repeats_with_its_seed() -> None:
    values = values_of(2 * MANY)
    clusters = np.repeat(np.arange(MANY), 2)
    found = stats.over_clusters(values, clusters)
    sums = values.reshape(MANY, 2).mean(axis=1)
    low, high = scipy_stats.t.interval(0.95, MANY - 1, sums.mean(), scipy_stats.sem(sums))
    assert found.low == pytest.approx(low, abs=0.15 * (high - low))
    assert found.high == pytest.approx(high, abs=0.15 * (high - low))
    assert found == stats.over_clusters(values, clusters)
    assert found != stats.over_clusters(values, clusters, seed=1)


def test_a_higher_confidence_widens_the_bootstrap() -> None:
    values, clusters = values_of(MANY), range(MANY)
    narrow = stats.over_clusters(values, clusters, confidence=0.5)
    wide = stats.over_clusters(values, clusters, confidence=0.99)
    assert wide.low < narrow.low < narrow.mean < narrow.high < wide.high


def test_the_bootstrap_weighs_clusters_by_their_rows() -> None:
    # cluster 0 has half of the rows: leaving it out or drawing it twice moves the mean far
    clusters = [0] * 59 + list(range(1, 60))
    values = [1.0] * 59 + [0.0] * 59
    found = stats.over_clusters(values, clusters)
    assert found.mean == 0.5
    assert found.low == 0.0
    assert 0.6 < found.high < 1.0
    same = stats.over_clusters([2.5] * 118, clusters)
    assert (same.low, same.high) == pytest.approx((2.5, 2.5))


@pytest.mark.parametrize("count", [FEW, MANY])
def test_neither_row_order_nor_cluster_names_matter(count: int) -> None:
    values, clusters = values_of(2 * count), np.repeat(np.arange(count), 2)
    order = np.random.default_rng(1).permutation(2 * count)
    found = stats.over_clusters(values, clusters)
    assert stats.over_clusters(values[order], clusters[order]) == pytest.approx(found)
    assert stats.over_clusters(values, [f"row {name:03d}" for name in clusters]) == pytest.approx(found)


def test_one_cluster_has_a_mean_and_no_limits() -> None:
    found = stats.over_clusters([1.0, 3.0], ["a", "a"])
    assert (found.mean, found.n, found.clusters, found.method) == (2.0, 2, 1, "one cluster")
    assert math.isnan(found.low)
    assert math.isnan(found.high)


@pytest.mark.parametrize(
    ("values", "clusters", "message"),
    [([], [], "at least one row"), ([1.0, 2.0], ["a"], "2 values but 1"), ([1.0], ["a", "b"], "1 values but 2")],
)
def test_wrong_lengths_are_refused(values: list[float], clusters: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        stats.over_clusters(values, clusters)


def test_a_cluster_name_may_be_any_hashable() -> None:
    found = stats.over_clusters([1.0, 2.0, 3.0, 4.0], [("a", 1), ("a", 1), ("b", 2), ("b", 2)])
    assert found.clusters == 2


# ---------------------------------------------------------------- seeds


@pytest.mark.parametrize("count", [2, 3, 8])
@pytest.mark.parametrize("confidence", [0.9, 0.95])
def test_the_interval_over_seeds_is_the_t_interval(count: int, confidence: float) -> None:
    values = values_of(count)
    found = stats.over_seeds(values, confidence=confidence)
    expected = scipy_stats.t.interval(confidence, count - 1, values.mean(), scipy_stats.sem(values))
    assert (found.low, found.high) == pytest.approx(expected)
    assert (found.n, found.method) == (count, "t over seeds")


@pytest.mark.parametrize("count", [2, 5])
def test_the_prediction_band_is_the_t_interval_of_one_more_seed(count: int) -> None:
    values = values_of(count)
    found = stats.prediction_band(values)
    scale = values.std(ddof=1) * math.sqrt(1 + 1 / count)
    expected = scipy_stats.t.interval(0.95, count - 1, values.mean(), scale)
    assert (found.low, found.high) == pytest.approx(expected)


def test_the_prediction_band_holds_a_further_draw_as_often_as_it_says() -> None:
    draws = np.random.default_rng(0).normal(size=(2000, 6))
    bands = [stats.prediction_band(row[:5]) for row in draws]
    inside = np.mean([band.low <= row[5] <= band.high for band, row in zip(bands, draws, strict=True)])
    assert 0.935 <= inside <= 0.965


@pytest.mark.parametrize("function", [stats.over_seeds, stats.prediction_band])
def test_one_seed_has_a_mean_and_no_limits(function: Callable[[list[float]], stats.Interval]) -> None:
    found = function([1.5])
    assert found.mean == 1.5
    assert math.isnan(found.low)
    assert math.isnan(found.high)
    assert found.method == "one seed"


# ---------------------------------------------------------------- coverage


def coverage(clusters: int, *, simulations: int = 1000, know_clusters: bool = True) -> float:
    """Share of intervals that hold the true mean 0, for clusters of two rows with correlation 0.8."""
    generator = np.random.default_rng(clusters)
    shared = generator.normal(size=(simulations, clusters, 1)) * math.sqrt(0.8)
    rows = (shared + generator.normal(size=(simulations, clusters, 2)) * math.sqrt(0.2)).reshape(simulations, -1)
    names = np.repeat(np.arange(clusters), 2) if know_clusters else np.arange(2 * clusters)
    found = [stats.over_clusters(row, names, resamples=300, seed=number) for number, row in enumerate(rows)]
    return sum(interval.low <= 0 <= interval.high for interval in found) / simulations


@pytest.mark.parametrize("clusters", [12, 50, 219])
def test_intervals_cover_the_truth_as_often_as_they_say(clusters: int) -> None:
    assert 0.92 <= coverage(clusters) <= 0.98


@pytest.mark.parametrize("clusters", [12, 50])
def test_ignoring_clusters_would_cover_too_little(clusters: int) -> None:
    assert coverage(clusters, simulations=400, know_clusters=False) < 0.90


# -------------------------------------------------------------------- tests and decompositions


def test_sign_flips_of_few_clusters_are_enumerated() -> None:
    assert changes.sign_flip_p([1.0, 1.0, 1.0], ["a", "b", "c"]) == pytest.approx(2 / 8)
    assert changes.sign_flip_p([1.0, -1.0], ["a", "b"]) == 1.0
    # rows of one cluster flip together
    assert changes.sign_flip_p([1.0, 1.0, 1.0, 1.0], ["a", "a", "b", "b"]) == pytest.approx(2 / 4)


def test_sign_flips_agree_with_scipy_on_single_rows() -> None:
    values = np.random.default_rng(1).normal(0.4, 1.0, size=40)
    ours = changes.sign_flip_p(values, np.arange(40), resamples=20_000)
    theirs = scipy_stats.permutation_test(
        (values,), np.mean, permutation_type="samples", n_resamples=20_000, rng=np.random.default_rng(2)
    ).pvalue
    assert ours == pytest.approx(theirs, abs=0.01)


def test_p_values_of_no_effect_are_uniform() -> None:
    generator = np.random.default_rng(0)
    found = [changes.sign_flip_p(generator.normal(size=30), np.arange(30), resamples=500) for _ in range(300)]
    assert 0.02 <= np.mean(np.array(found) < 0.05) <= 0.09


LABELS = np.array([1, 1, 1, -1, -1, -1])


@pytest.mark.parametrize(
    ("base", "plus", "minus", "score"),
    [
        ([1, 1, -1, -1, -1, 1], [1, 1, 1, -1, -1, -1], [-1, -1, -1, 1, 1, 1], 100.0),  # fixes all, flips all
        ([1, 1, -1, -1, -1, 1], [1, 1, -1, -1, -1, 1], [1, 1, -1, -1, -1, 1], 0.0),  # a no-op
    ],
)
def test_informedness_in_closed_form(base: list[int], plus: list[int], minus: list[int], score: float) -> None:
    found = changes.surgical_informedness(*(np.array(v, dtype=float) for v in (base, plus, minus)), LABELS)
    assert found.score == pytest.approx(score)
    assert (found.rows_right, found.rows_wrong) == (4, 2)


def test_informedness_where_everything_breaks() -> None:
    base = LABELS.astype(float)
    found = changes.surgical_informedness(base, -base, None, LABELS)
    assert np.isnan(found.fixed) and found.broken == 1.0 and found.rows_wrong == 0
    mixed = np.array([1.0, 1.0, -1.0, -1.0, -1.0, 1.0])
    found = changes.surgical_informedness(mixed, -np.abs(mixed) * LABELS, None, LABELS)
    assert found.forward == pytest.approx(-200) and np.isnan(found.score)
    once = changes.surgical_informedness(mixed, -np.abs(mixed) * LABELS, None, LABELS, k=1)
    assert once.forward == pytest.approx(-100)


def test_answer_mass_scales_the_score_and_a_yes_bias_has_no_balanced_informedness() -> None:
    base = np.array([1.0, 1.0, -1.0, -1.0, -1.0, 1.0])
    plus, minus = LABELS.astype(float), -LABELS.astype(float)
    assert changes.surgical_informedness(base, plus, minus, LABELS, mass=(0.5, 0.9)).score == pytest.approx(25.0)
    biased = base + 10
    found = changes.surgical_informedness(base, biased, minus, LABELS)
    assert found.balanced == pytest.approx(-100 * (2 / 3 - 1 / 3)), "all say Yes: nothing is told apart any more"
    even = np.array([1.0, -1.0, 1.0, -1.0])
    found = changes.surgical_informedness(even, even + 10, None, np.array([1, 1, -1, -1]))
    assert found.balanced == 0.0


def test_decomposition_tells_truth_bias_and_confidence_apart() -> None:
    generator = np.random.default_rng(0)
    labels = np.tile([1, -1], 50)
    base = 1.5 * labels + generator.normal(size=100)
    truth = changes.decompose(base, base + 0.8 * labels, labels)
    assert truth.truth == pytest.approx(0.8) and truth.bias == pytest.approx(0.0)
    assert truth.scale == pytest.approx(1.0) and truth.beyond_scale == pytest.approx(0.8), "the base is right mostly"
    bias = changes.decompose(base, base + 0.8, labels)
    assert bias.truth == pytest.approx(0.0) and bias.bias == pytest.approx(0.8) and bias.scale == pytest.approx(1.0)
    louder = changes.decompose(base, 1.4 * base, labels)
    assert louder.scale == pytest.approx(1.4) and louder.truth > 0.5
    assert louder.beyond_scale == pytest.approx(0.0, abs=1e-9)
    both = changes.decompose(base, 1.4 * base + 0.8 * labels + 0.3, labels)
    assert both.scale == pytest.approx(1.4) and both.beyond_scale == pytest.approx(0.8)
    one_label = changes.decompose(base, 1.4 * base + 0.8, np.ones(100))
    assert one_label.scale == pytest.approx(1.4) and one_label.beyond_scale == pytest.approx(0.8)
    assert np.isnan(changes.decompose(1.5 * labels, base, labels).scale), "the label says it all"


@pytest.mark.parametrize(
    ("moved", "slope", "r2", "monotone"),
    [
        ([-2.0, -1.0, 1.0, 2.0], 1.0, 1.0, True),
        ([2.0, 1.0, -1.0, -2.0], -1.0, 1.0, True),
        ([-2.0, -1.5, 1.5, 1.0], 0.9, 0.853, False),
        ([2.0, 1.0, 1.0, 2.0], 0.0, 0.0, False),
    ],
)
def test_dose_response_in_closed_form(moved: list[float], slope: float, r2: float, monotone: bool) -> None:
    found = changes.dose_response([-2.0, -1.0, 1.0, 2.0], moved)
    assert found.slope == pytest.approx(slope) and found.r2 == pytest.approx(r2, abs=1e-3)
    assert found.monotone is monotone


@pytest.mark.slow
@pytest.mark.parametrize("clusters", [12, 50, 219])
def test_row_intervals_cover_the_truth(clusters: int) -> None:
    generator = np.random.default_rng(clusters)
    names = np.repeat(np.arange(clusters), 2)
    hits = 0
    for trial in range(600):
        common = generator.normal(size=clusters)[names]
        values = 0.3 + common + 0.5 * generator.normal(size=2 * clusters)
        found = stats.over_clusters(values, names, resamples=600, seed=trial)
        hits += found.low <= 0.3 <= found.high
    assert 0.92 <= hits / 600 <= 0.98


@pytest.mark.parametrize("seeds", [3, 5])
def test_seed_intervals_and_bands_cover(seeds: int) -> None:
    generator = np.random.default_rng(seeds)
    inside = predicted = 0
    for _ in range(2000):
        values = generator.normal(1.0, 0.4, size=seeds)
        found = stats.over_seeds(values)
        inside += found.low <= 1.0 <= found.high
        band = stats.prediction_band(values)
        predicted += band.low <= generator.normal(1.0, 0.4) <= band.high
    assert 0.93 <= inside / 2000 <= 0.97 and 0.93 <= predicted / 2000 <= 0.97


# -------------------------------------------------------------------- shares, skewed values and percentiles


@pytest.mark.parametrize(("successes", "n"), [(0, 10), (10, 10), (1, 1), (7, 20), (113, 200)])
@pytest.mark.parametrize("confidence", [0.8, 0.95])
def test_the_interval_of_a_share_is_scipys(successes: int, n: int, confidence: float) -> None:
    found = stats.wilson(successes, n, confidence=confidence)
    theirs = scipy_stats.binomtest(successes, n).proportion_ci(confidence, method="wilson")
    assert (found.low, found.high) == pytest.approx((theirs.low, theirs.high), abs=1e-12)
    assert found[0] == successes / n and 0 <= found.low <= found.mean <= found.high <= 1


@pytest.mark.parametrize(("successes", "n"), [(0, 0), (-1, 3), (4, 3)])
def test_shares_that_cannot_be_are_refused(successes: int, n: int) -> None:
    with pytest.raises(ValueError, match="are no share"):
        stats.wilson(successes, n)


@pytest.mark.parametrize("share", [0.1, 0.3, 0.5, 0.8])
@pytest.mark.parametrize("n", [20, 60, 200])
def test_wilson_intervals_cover_the_true_share(n: int, share: float) -> None:
    counts = np.random.default_rng(n).binomial(n, share, size=4000)
    holds = [found.low <= share <= found.high for found in (stats.wilson(k, n) for k in range(n + 1))]
    assert 0.92 <= np.take(holds, counts).mean() <= 0.98


@pytest.mark.parametrize("share", [0.5, 0.95, 1.0])
def test_percentiles_of_draws_are_those_of_the_repeated_rows(share: float) -> None:
    values, codes = np.round(values_of(40), 1), np.random.default_rng(1).integers(0, 7, 40)
    draws = stats._draws(7, 50, seed=2)
    twin = [np.quantile(np.repeat(values, draw[codes]), share) for draw in draws]
    assert stats.percentiles(values, codes, draws, share) == pytest.approx(twin, abs=1e-12)


def test_many_rows_are_resampled_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    values, clusters = values_of(60) ** 2, np.repeat(np.arange(20), 3)
    whole = stats.bootstrap(values, clusters, "p95")
    monkeypatch.setattr(stats, "_AT_ONCE", 60 * 7)
    assert stats.bootstrap(values, clusters, "p95") == whole
    assert whole.mean == pytest.approx(np.quantile(values, 0.95)) and whole.method == "cluster bootstrap of p95"


def test_the_bootstrap_of_a_mean_is_that_of_over_clusters_but_for_its_width() -> None:
    values, clusters = values_of(4 * MANY), np.repeat(np.arange(2 * MANY), 2)
    found, other = stats.bootstrap(values, clusters), stats.over_clusters(values, clusters)
    assert found[0] == pytest.approx(other.mean) and (found.n, found.clusters) == (other.n, other.clusters)
    assert 1.0 < (found.high - found.low) / (other.high - other.low) < 1.06
    assert stats.bootstrap(values, clusters, seed=1) != found == stats.bootstrap(values, clusters)
    one = stats.bootstrap([1.0, 3.0], ["a", "a"], "p95")
    assert one.mean == pytest.approx(2.9) and math.isnan(one.low) and one.method == "one cluster"


@pytest.mark.parametrize("statistic", ["mean", "p95"])
def test_bootstrap_intervals_of_skewed_values_cover_the_truth(statistic: stats.Statistic) -> None:
    def texts(count: int, generator: np.random.Generator) -> np.ndarray:
        """Values like KL: 10 tokens per text, right-skewed, alike within a text."""
        return np.exp(0.3 * generator.normal(size=(count, 1))) * generator.gamma(0.7, size=(count, 10))

    many = texts(400_000, np.random.default_rng(0))
    truth = many.mean() if statistic == "mean" else np.quantile(many, 0.95)
    names, hits = np.repeat(np.arange(48), 10), []
    for trial in range(500):
        values = texts(48, np.random.default_rng([1, trial])).ravel()
        found = stats.bootstrap(values, names, statistic, resamples=400, seed=trial)
        hits.append(found.low <= truth <= found.high)
    assert 0.92 <= np.mean(hits) <= 0.98


# -------------------------------------------------------------------- what a number of seeds or rows can show


@pytest.mark.parametrize(("difference", "seeds"), [(2.0, 6), (1.0, 17), (0.8, 26), (0.5, 64), (-0.2, 394), (100.0, 2)])
def test_the_seeds_needed_are_those_of_published_tables(difference: float, seeds: int) -> None:
    assert power.seeds_needed(difference, 1.0) == power.seeds_needed(3 * difference, 3.0) == seeds  # G*Power 3.1


def test_as_many_seeds_as_needed_find_the_difference_four_times_in_five() -> None:
    count, generator = power.seeds_needed(1.6, 1.0), np.random.default_rng(0)

    def found(seeds: int) -> float:
        one, other = generator.normal(0.0, 1.0, (20_000, seeds)), generator.normal(1.6, 1.0, (20_000, seeds))
        return float(np.mean(scipy_stats.ttest_ind(one, other, axis=1).pvalue < 0.05))

    assert found(count - 1) < 0.8 <= found(count) + 0.01


@pytest.mark.parametrize(("difference", "sd"), [(0.0, 1.0), (math.nan, 1.0), (1.0, -1.0), (1.0, math.inf)])
def test_differences_that_no_number_of_seeds_shows_are_refused(difference: float, sd: float) -> None:
    with pytest.raises(ValueError, match="no number of seeds"):
        power.seeds_needed(difference, sd)
    assert power.seeds_needed(0.1, 0.0) == 2


@pytest.mark.parametrize(("rows", "seeds"), [((2.0, 112), (0.3, 3)), ((2.0, 20), (0.4, 6)), ((1.0, 50), (0.0, 1))])
def test_the_detectable_effect_is_found_four_times_in_five(rows: tuple[float, int], seeds: tuple[float, int]) -> None:
    (sd_rows, n_rows), (sd_seeds, n_seeds) = rows, seeds
    effect, generator, trials = power.detectable(*rows, *seeds), np.random.default_rng(0), 40_000
    parts = [(sd_rows**2 / n_rows, n_rows - 1)] + [(sd_seeds**2 / n_seeds, n_seeds - 1)] * (sd_seeds > 0)
    mean = effect + sum(generator.normal(0, math.sqrt(part), trials) for part, _ in parts)
    seen = [part * generator.chisquare(freedom, trials) / freedom for part, freedom in parts]
    freedom = sum(seen) ** 2 / sum(one**2 / own for one, (_, own) in zip(seen, parts, strict=True))
    found = np.abs(mean) > scipy_stats.t.ppf(0.975, freedom) * np.sqrt(sum(seen))
    assert np.mean(found) == pytest.approx(0.8, abs=0.03)


def test_detectable_effects_have_a_floor_that_only_seeds_lower() -> None:
    floor = power.detectable(2.0, 10**9, 0.3, 5)
    assert floor == pytest.approx(power.detectable(0.0, 1, 0.3, 5), rel=1e-3)
    assert power.detectable(2.0, 100, 0.3, 5) > floor > power.detectable(2.0, 10**9, 0.3, 10)
    assert power.detectable(2.0, 100, 0.3, 1) == math.inf and power.detectable(0.0, 5, 0.0, 1) == 0.0
    with pytest.raises(ValueError, match="no standard error"):
        power.detectable(1.0, 0, 1.0, 3)
