"""Intervals that keep their promise, the gap closed, and the aggregates of Agarwal et al. against hand examples."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from gmel.evaluation.statistics import (
    bootstrap_t_interval,
    gap_closed,
    iqm,
    normalised_score,
    paired_t_interval,
    performance_profile,
    probability_of_improvement,
    stratified_bootstrap,
    t_interval,
)

# Two-sided 95 % points of Student's t, from printed tables.
T_2, T_3 = 4.302653, 3.182446


def test_t_interval_by_hand():
    # mean 3, standard deviation 1, so the half width is t / sqrt(3).
    interval = t_interval([2.0, 3.0, 4.0])
    assert interval.mean == pytest.approx(3.0)
    assert interval.high - 3.0 == pytest.approx(T_2 / math.sqrt(3.0), rel=1e-6)
    assert 3.0 - interval.low == pytest.approx(T_2 / math.sqrt(3.0), rel=1e-6)


def test_one_value_has_no_interval():
    for interval in (t_interval([2.5]), bootstrap_t_interval([2.5]), gap_closed([3.0], [2.0], [1.0])):
        assert math.isnan(interval.low) and math.isnan(interval.high)
    assert t_interval([2.5]).mean == 2.5


def test_confidence_widens_the_interval():
    narrow, wide = t_interval([1.0, 2.0, 4.0], 0.8), t_interval([1.0, 2.0, 4.0], 0.99)
    assert wide.low < narrow.low < narrow.high < wide.high


def test_pairing_removes_the_common_traffic():
    traffic = np.array([0.0, 10.0, 20.0, 30.0])
    interval = paired_t_interval(traffic + np.array([1.0, 2.0, 1.0, 2.0]), traffic)
    assert interval.mean == pytest.approx(1.5)
    assert interval.high - interval.low == pytest.approx(2 * T_3 * math.sqrt(1 / 3) / 2, rel=1e-6)


@pytest.mark.parametrize("bad", [[1.0, math.nan, 2.0], [1.0, math.inf, 2.0]])
def test_values_without_value_are_refused(bad: list[float]):
    good, table = [3.0, 4.0, 5.0], [bad, bad]
    calls = [
        lambda: t_interval(bad),
        lambda: paired_t_interval(good, bad),
        lambda: bootstrap_t_interval(bad),
        lambda: gap_closed(good, bad, [1.0, 1.0, 1.0]),
        lambda: gap_closed(good, table, [1.0, 1.0, 1.0]),
        lambda: iqm(bad),
        lambda: stratified_bootstrap(table),
        lambda: performance_profile(table, [0.0]),
        lambda: probability_of_improvement(table, table),
        lambda: normalised_score(good, bad, [1.0, 1.0, 1.0]),
    ]
    for call in calls:
        with pytest.raises(ValueError, match="NaN or infinite"):
            call()


def test_wrong_shapes_and_levels_are_refused():
    with pytest.raises(ValueError, match="2 entries and b 3"):
        paired_t_interval([1.0, 2.0], [1.0, 2.0, 3.0])
    with pytest.raises(ValueError, match="empty"):
        t_interval([])
    with pytest.raises(ValueError, match="axes"):
        t_interval([[1.0], [2.0]])
    with pytest.raises(ValueError, match=r"confidence is 95\b"):
        t_interval([1.0, 2.0], 95)
    with pytest.raises(ValueError, match="no gap to close"):
        gap_closed([1.0, 1.0], [1.0, 1.0], [1.0, 1.1])
    with pytest.raises(ValueError, match="no scale"):
        normalised_score([2.0, 1.0], [1.5, 1.5], [1.0, 1.0])


def test_bootstrap_t_covers_and_leans_with_the_data():
    rng = np.random.default_rng(0)
    hits = 0
    for index in range(300):
        interval = bootstrap_t_interval(rng.exponential(1.0, 12), seed=index, resamples=499)
        hits += interval.low <= 1.0 <= interval.high
    assert 0.91 <= hits / 300 <= 0.985
    # A long right tail means that the true mean may lie far above: the upper arm is the longer one.
    skewed = bootstrap_t_interval([1.0, 1.1, 1.2, 1.3, 1.4, 1.6, 2.0, 4.0])
    assert skewed.high - skewed.mean > 1.5 * (skewed.mean - skewed.low)
    assert bootstrap_t_interval([1.0, 2.0, 4.0, 8.0], seed=1) == bootstrap_t_interval([1.0, 2.0, 4.0, 8.0], seed=1)


def test_bootstrap_t_admits_that_two_values_are_too_few():
    interval = bootstrap_t_interval([1.0, 2.0])
    assert interval.low == -math.inf and interval.high == math.inf
    same = bootstrap_t_interval([2.0, 2.0, 2.0])
    assert (same.low, same.high) == (2.0, 2.0)


def test_gap_closed_is_the_ratio_of_means_not_the_mean_of_ratios():
    # Ratios of the pairs are 1/1 and 1/3 (mean 2/3); the means are 1 and 2.
    assert gap_closed([2.0, 4.0], [1.0, 3.0], [1.0, 1.0]).mean == pytest.approx(0.5)


def test_the_ends_of_the_ladder_close_none_and_all_of_the_gap():
    l3, l5 = np.array([1.4, 1.5, 1.45, 1.6]), np.array([0.9, 0.95, 0.92, 0.97])
    reference, optimum = gap_closed(l3, l3, l5), gap_closed(l3, l5, l5)
    assert (reference.mean, reference.low, reference.high) == pytest.approx((0.0, 0.0, 0.0), abs=1e-12)
    assert (optimum.mean, optimum.low, optimum.high) == pytest.approx((1.0, 1.0, 1.0))


def test_fieller_limits_are_where_the_t_test_turns():
    rng = np.random.default_rng(2)
    l5 = 0.9 + 0.02 * rng.normal(size=8)
    l3 = l5 + 0.5 + 0.1 * rng.normal(size=8)
    policy = l3 - 0.15 + 0.05 * rng.normal(size=8)
    interval = gap_closed(l3, policy, l5)
    for limit in (interval.low, interval.high):
        residual = t_interval((l3 - policy) - limit * (l3 - l5))
        assert min(abs(residual.low), abs(residual.high)) == pytest.approx(0.0, abs=1e-9)
    assert interval.low < interval.mean < interval.high


def test_an_unresolved_gap_gives_an_open_interval():
    interval = gap_closed([1.0, 2.0, 3.0], [1.0, 1.5, 3.0], [1.5, 1.2, 3.0])
    assert math.isfinite(interval.mean)
    assert (interval.low, interval.high) == (-math.inf, math.inf)


def test_fieller_covers_at_eight_pairs_even_where_the_gap_is_noisy():
    rng, truth, runs, hits = np.random.default_rng(1), 0.3, 2000, 0
    for _ in range(runs):
        gap = 0.5 + 0.25 * rng.normal(size=8)
        saved = truth * 0.5 + 0.1 * rng.normal(size=8) + 0.2 * (gap - 0.5)
        interval = gap_closed(1.0 + gap, 1.0 + gap - saved, np.ones(8))
        hits += interval.low <= truth <= interval.high
    # Binomial error at 2000 runs is 0.005.
    assert 0.935 <= hits / runs <= 0.965


def crossed(rng: np.random.Generator, seeds: int, episodes: int, traffic: float) -> tuple[np.ndarray, ...]:
    """L3, policies [seeds, episodes] and L5 with a true gap closed of 0.3; noise of seeds, traffic and both."""
    gap = 0.5 + traffic * rng.normal(size=episodes)
    share = 0.3 + 0.04 * rng.normal(size=(seeds, 1)) + 0.05 * rng.normal(size=(seeds, episodes))
    saved = share * 0.5 + traffic * rng.normal(size=episodes)
    return 1.0 + gap, 1.0 + gap - saved, np.ones(episodes)


def test_several_training_seeds_give_a_t_interval_over_them():
    l3, l5 = np.array([1.5, 1.7]), np.array([1.0, 1.0])  # gap 0.6 on average
    policy = np.array([[1.4, 1.5], [1.5, 1.7], [1.3, 1.3]])  # saves 0.15, 0, 0.3: closes 1/4, 0, 1/2
    interval = gap_closed(l3, policy, l5)
    assert interval.mean == pytest.approx(0.25)
    assert interval.high - 0.25 == pytest.approx(T_2 * 0.25 / math.sqrt(3.0), rel=1e-6)
    alone = gap_closed(l3, policy[:1], l5)
    assert alone.mean == pytest.approx(0.25) and math.isnan(alone.low)


def test_coverage_over_training_seeds():
    rng, runs = np.random.default_rng(4), 1500
    quiet = fixed = sampled = 0
    for _ in range(runs):
        interval = gap_closed(*_order(crossed(rng, 10, 8, 0.0)))
        quiet += interval.low <= 0.3 <= interval.high
        noisy = _order(crossed(rng, 10, 8, 0.03))
        interval = gap_closed(*noisy)
        fixed += interval.low <= 0.3 <= interval.high
        interval = gap_closed(*noisy, traffic="sampled")
        sampled += interval.low <= 0.3 <= interval.high
    assert 0.93 <= quiet / runs <= 0.97
    # With noisy traffic the interval on fixed traffic must not be read as one on all traffic; the other one may.
    assert fixed / runs < 0.85
    assert 0.93 <= sampled / runs <= 0.99


def _order(parts: tuple[np.ndarray, ...]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    reference, policy, optimum = parts
    return reference, policy, optimum


latencies = hnp.arrays(np.float64, 6, elements=st.floats(0.5, 5.0))


@given(latencies, latencies, latencies, st.floats(0.1, 100.0))
@settings(max_examples=60, deadline=None)
def test_gap_closed_does_not_depend_on_the_unit(a: np.ndarray, p: np.ndarray, o: np.ndarray, unit: float):
    o = a - 0.5 - 0.1 * o
    first, second = gap_closed(a, p, o), gap_closed(unit * a, unit * p, unit * o)
    assert second.mean == pytest.approx(first.mean, rel=1e-6, abs=1e-9)
    assert second.low == pytest.approx(first.low, rel=1e-4, abs=1e-6)
    assert first.low - 1e-9 <= first.mean <= first.high + 1e-9


@given(hnp.arrays(np.float64, st.integers(2, 12), elements=st.floats(-100, 100)), st.floats(-50, 50))
@settings(max_examples=60, deadline=None)
def test_t_interval_moves_with_its_values(values: np.ndarray, shift: float):
    first, second = t_interval(values), t_interval(values + shift)
    assert second.low == pytest.approx(first.low + shift, abs=1e-6)
    assert second.high == pytest.approx(first.high + shift, abs=1e-6)


def test_iqm_is_the_mean_of_the_middle_half():
    assert iqm([100.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, -100.0]) == pytest.approx(3.5)
    # Five scores: int(5 / 4) = 1 is cut at each end.
    assert iqm([[0.0, 1.0], [2.0, 3.0], [50.0, 2.0]]) == pytest.approx((1.0 + 2.0 + 2.0 + 3.0) / 4)


def test_stratified_bootstrap_resamples_within_scenarios():
    # Scenarios differ, runs do not: whoever mixes scenarios gets an interval, who keeps them apart a point.
    scores = np.tile([0.0, 1.0, 5.0, 9.0], (10, 1))
    interval = stratified_bootstrap(scores, resamples=200)
    assert (interval.mean, interval.low, interval.high) == (3.0, 3.0, 3.0)
    noisy = scores + np.random.default_rng(0).normal(size=scores.shape)
    interval = stratified_bootstrap(noisy, resamples=500)
    assert interval.low < interval.mean < interval.high
    mean = stratified_bootstrap(noisy, resamples=2000, statistic=lambda table: float(table.mean()))
    # The error of a stratified mean: variance within scenarios (divided by n) over runs and scenarios.
    error = math.sqrt(noisy.var(axis=0).mean() / noisy.size)
    assert (mean.high - mean.low) / 2 == pytest.approx(1.96 * error, rel=0.08)


def test_performance_profile_by_hand():
    scores = [[0.2, 0.9], [0.6, 0.9]]
    assert performance_profile(scores, [0.0, 0.2, 0.6, 0.9, 1.0]).tolist() == [1.0, 0.75, 0.5, 0.0, 0.0]


@given(hnp.arrays(np.float64, (4, 3), elements=st.floats(-1, 2)))
@settings(max_examples=40, deadline=None)
def test_performance_profile_falls(scores: np.ndarray):
    profile = performance_profile(scores, np.linspace(-1.5, 2.5, 30))
    assert profile[0] == 1.0 and profile[-1] == 0.0
    assert np.all(np.diff(profile) <= 0.0)


def test_probability_of_improvement_by_hand():
    # First scenario: pairs (1,0) (1,2) (3,0) (3,2) -> 3 of 4. Second: all ties -> 1/2.
    x, y = [[1.0, 7.0], [3.0, 7.0]], [[0.0, 7.0], [2.0, 7.0]]
    assert probability_of_improvement(x, y) == pytest.approx((0.75 + 0.5) / 2)
    assert probability_of_improvement(x, y) + probability_of_improvement(y, x) == pytest.approx(1.0)


def test_normalised_score_ends_and_middle():
    assert normalised_score([1.8, 1.8, 2.0, 1.8], [1.8, 0.9, 1.5, 2.7], [0.9, 0.9, 1.0, 0.9]).tolist() == pytest.approx(
        [0.0, 1.0, 0.5, -1.0]
    )
