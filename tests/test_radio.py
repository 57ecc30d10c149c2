"""Rates: closed forms against quadrature and Monte Carlo, the tables against the standard, outage against its law."""

import itertools
import math
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
import scipy.special
from hypothesis import given, settings
from hypothesis import strategies as st

from gmel.physics import radio

MODELS = get_args(radio.RateModel)
MEANS_DB = np.arange(-20.0, 61.0, 10.0)
# Single precision: a few units in the last place, plus that of the exponent floor / mean.
RTOL = {False: 2e-6, True: 1e-12}


def scaled_exp1(x):
    """exp(x) E1(x) in double precision; its asymptotic series where scipy's exp would overflow."""
    x = np.asarray(x, float)
    bounded = np.minimum(x, 60.0)
    large = np.maximum(x, 60.0)
    terms = [(-1.0) ** k * math.factorial(k) / large / large**k for k in range(34)]
    return np.where(x < 60.0, np.exp(bounded) * scipy.special.exp1(bounded), np.sum(terms, axis=0))


def quadrature(efficiency, mean, breaks=()):
    """Mean of a function of an exponential SNR, by adaptive integration between the breaks of the function."""
    # Decades as well: at a large mean the logarithm bends close to 0.
    inner = [*breaks, *(mean * 10.0**k for k in range(-8, 2))]
    edges = [0.0, *sorted(b for b in inner if 0.0 < b < 60.0 * mean), 60.0 * mean]
    # In units of the mean the weight is exp(-h), whatever the mean.
    pieces = [
        scipy.integrate.quad(lambda h: math.exp(-h) * efficiency(h * mean), low / mean, high / mean, epsrel=1e-12)[0]
        for low, high in itertools.pairwise(edges)
    ]
    return sum(pieces)


def truncated_by_hand(snr, attenuation, low_db, high_db):
    low, high = 10 ** (low_db / 10), 10 ** (high_db / 10)
    return attenuation * math.log2(1 + min(snr, high)) if snr >= low else 0.0


def mcs_by_hand(snr):
    gap = -math.log(5 * 5e-5) / 1.5
    return max((se for se in radio.MCS_EFFICIENCIES if se <= math.log2(1 + snr / gap)), default=0.0)


def uniforms(count: int, seed: int) -> jax.Array:
    """On (0, 1): cells of 2^-23 at their centres, as physics/random.py draws them."""
    return jnp.asarray((np.random.default_rng(seed).integers(0, 2**23, count) + 0.5) * 2.0**-23, jnp.float32)


class TestExponentialIntegral:
    @pytest.mark.parametrize(("x64", "rtol"), [(False, 6e-7), (True, 5e-15)])
    def test_against_scipy_over_eighteen_decades(self, x64, rtol):
        with jax.enable_x64(x64):
            mean = np.concatenate([np.logspace(-8, 10, 3001), np.linspace(0.9, 1.1, 501)])
            mean = np.asarray(mean, np.float64 if x64 else np.float32)
            result = jax.jit(radio.mean_log1p_exponential)(jnp.asarray(mean))
            assert result.dtype == mean.dtype
        np.testing.assert_allclose(np.asarray(result, float), scaled_exp1(1 / mean.astype(float)), rtol=rtol)

    def test_ends(self):
        mean = jnp.array([0.0, 2e-38, 1e-30, 1e30])
        expected = [0.0, 2e-38, 1e-30, math.log(1e30) - np.euler_gamma]
        np.testing.assert_allclose(radio.mean_log1p_exponential(mean), expected, rtol=1e-6)

    @pytest.mark.parametrize(("x64", "rtol"), [(False, 2e-5), (True, 1e-12)])
    def test_gradient(self, x64, rtol):
        # d/dg E ln(1 + g X) = E[X / (1 + g X)], by quadrature
        with jax.enable_x64(x64):
            mean = jnp.asarray([1e-6, 0.03, 0.5, 0.999, 1.0, 1.001, 20.0, 1e4])
            gradient = jax.jit(jax.vmap(jax.grad(radio.mean_log1p_exponential)))(mean)
        expected = [
            sum(
                scipy.integrate.quad(lambda h, g=g: math.exp(-h) * h / (1 + g * h), a, b, epsrel=1e-13, epsabs=0)[0]
                for a, b in ((0.0, 1e-3), (1e-3, 1.0), (1.0, 60.0))
            )
            for g in np.asarray(mean, float)
        ]
        np.testing.assert_allclose(gradient, expected, rtol=rtol)
        assert float(jax.grad(radio.mean_log1p_exponential)(jnp.array(0.0))) == pytest.approx(1.0)

    def test_bounds_hold(self):
        # Jensen, and E1's own bracket: ln(1 + 2 g) / 2 < exp(1/g) E1(1/g) < ln(1 + g)   (DLMF 6.8.1)
        mean = np.logspace(-2, 6, 200).astype(np.float32)
        value = np.asarray(radio.mean_log1p_exponential(jnp.asarray(mean)), float)
        assert (value < np.log1p(mean.astype(float))).all()
        assert (value > 0.5 * np.log1p(2 * mean.astype(float))).all()


class TestModels:
    def test_shannon(self):
        snr = jnp.array([0.0, 1e-6, 1.0, 3.0, 1023.0, 1e9])
        np.testing.assert_allclose(radio.shannon(snr), np.log1p(np.asarray(snr, float)) / math.log(2), rtol=1e-6)
        np.testing.assert_allclose(radio.shannon(snr, cap=7.4, floor=2.0), [0.0, 0.0, 0.0, 2.0, 7.4, 7.4], rtol=1e-6)

    @pytest.mark.parametrize("truncation", [radio.UPLINK_TRUNCATION, radio.DOWNLINK_TRUNCATION])
    def test_truncated_shannon(self, truncation):
        snr_db = np.array([-30.0, -10.1, -9.9, 0.0, 15.0, 21.9, 22.1, 29.9, 30.1, 60.0])
        snr = 10 ** (snr_db / 10)
        expected = [truncated_by_hand(s, *truncation) for s in snr]
        np.testing.assert_allclose(
            radio.truncated_shannon(jnp.asarray(snr), truncation=truncation), expected, rtol=1e-6
        )

    def test_truncated_shannon_caps_at_the_published_value(self):
        # Uplink: 22 dB and alpha 0.4 cap at 2.93 bit/s/Hz
        assert float(radio.truncated_shannon(jnp.array(1e6))) == pytest.approx(2.93, abs=0.005)

    def test_mcs_table(self):
        assert len(radio.MCS_EFFICIENCIES) == 28
        # TS 38.214 Table 5.1.3.1-2: modulation order x code rate / 1024
        for index, order, rate in ((0, 2, 120), (4, 2, 602), (5, 4, 378), (11, 6, 466), (20, 8, 682.5), (27, 8, 948)):
            assert radio.MCS_EFFICIENCIES[index] == pytest.approx(order * rate / 1024, abs=6e-5)
        assert 10 * math.log10(radio.MCS_SNR_THRESHOLDS[5] / (2 ** radio.MCS_EFFICIENCIES[5] - 1)) == pytest.approx(
            7.4, abs=0.05
        )

    def test_mcs_is_the_largest_step_below_the_gapped_capacity(self):
        snr = np.logspace(-2, 5, 997)
        result = radio.nr_mcs(jnp.asarray(snr))
        np.testing.assert_array_equal(result, np.asarray([mcs_by_hand(s) for s in snr], np.float32))
        assert set(np.asarray(result).tolist()) == {0.0, *np.asarray(radio.MCS_EFFICIENCIES, np.float32).tolist()}

    def test_mcs_at_its_thresholds(self):
        threshold = np.asarray(radio.MCS_SNR_THRESHOLDS)
        np.testing.assert_allclose(radio.nr_mcs(jnp.asarray(threshold * 1.0001)), radio.MCS_EFFICIENCIES)
        np.testing.assert_allclose(radio.nr_mcs(jnp.asarray(threshold * 0.9999)), (0.0, *radio.MCS_EFFICIENCIES[:-1]))

    @pytest.mark.parametrize("model", MODELS)
    def test_lowest_snr_is_where_the_model_begins(self, model):
        lowest = radio.lowest_snr(model)
        efficiency = radio.spectral_efficiency(model, jnp.array([0.999 * lowest, 1.001 * lowest + 1e-9]))
        assert float(efficiency[0]) == 0.0
        assert float(efficiency[1]) > 0.0

    @pytest.mark.parametrize("model", MODELS)
    def test_floor_cuts(self, model):
        snr = jnp.array([9.99, 10.01])
        without = radio.spectral_efficiency(model, snr)
        result = radio.spectral_efficiency(model, snr, floor=10.0)
        np.testing.assert_array_equal(result, [0.0, without[1]])
        assert without[0] > 0.0
        # a traced floor is the same floor
        traced = jax.jit(lambda f: radio.spectral_efficiency(model, snr, floor=f))(jnp.array(10.0))
        np.testing.assert_allclose(traced, result, rtol=1e-6)

    @settings(max_examples=80, deadline=None)
    @given(
        model=st.sampled_from(MODELS), snr_db=st.floats(-40.0, 80.0), more_db=st.floats(0.0, 30.0),
        floor_db=st.floats(-30.0, 30.0), ergodic=st.booleans(),
    )  # fmt: skip
    def test_monotone_bounded_and_not_better_with_a_floor(self, model, snr_db, more_db, floor_db, ergodic):
        function = radio.ergodic_spectral_efficiency if ergodic else radio.spectral_efficiency
        snr = 10 ** (jnp.array([snr_db, snr_db + more_db]) / 10)
        low, high = (float(v) for v in function(model, snr))
        capacity = np.log2(1 + np.asarray(snr, float))
        assert 0.0 <= low <= high * (1 + 1e-6)
        assert high <= capacity[1] * (1 + 1e-6)  # no model, and by Jensen no mean, beats the bound
        floored = function(model, snr, floor=float(10 ** (floor_db / 10)))
        assert (np.asarray(floored) <= np.array([low, high]) * (1 + 1e-6) + 1e-30).all()
        assert (np.asarray(floored) >= 0.0).all()

    def test_worked_case_of_the_reference(self):
        # The worked case of the reference, 23 dBm, InF-DL, 100 m, 20 MHz: 18.1 dB; Shannon 121, NR MCS 57 Mbit/s.
        snr = jnp.array(10**1.81)
        shannon, mcs = radio.shannon(snr), radio.nr_mcs(snr)
        assert 20e6 * float(shannon) == pytest.approx(121e6, rel=0.01)
        rate = radio.nr_rate_bps(51, float(mcs), overhead=radio.UPLINK_OVERHEAD)
        assert rate == pytest.approx(57e6, rel=0.01)


class TestErgodic:
    def test_known_value_at_ten_db(self):
        assert float(radio.ergodic_shannon(jnp.array(10.0))) == pytest.approx(2.9065, abs=5e-5)

    @pytest.mark.parametrize("x64", [False, True])
    @pytest.mark.parametrize(("floor", "cap"), [(0.0, None), (0.0, 7.4), (0.5, None), (0.5, 7.4), (300.0, 7.4)])
    def test_shannon_against_quadrature(self, x64, floor, cap):
        means = 10 ** (MEANS_DB / 10)
        top = 2.0 ** (cap or 1e3) - 1
        expected = [
            quadrature(lambda s: min(math.log2(1 + s), cap or 1e3) if s >= floor else 0.0, g, (floor, top))
            for g in means
        ]
        with jax.enable_x64(x64):
            result = radio.ergodic_shannon(jnp.asarray(means), floor=floor, cap=cap)
        # Where the floor is tens of means up, the rounding of its exponent shows.
        np.testing.assert_allclose(result, expected, rtol=RTOL[x64] * 20 if floor else RTOL[x64], atol=1e-9)

    @pytest.mark.parametrize("x64", [False, True])
    @pytest.mark.parametrize("truncation", [radio.UPLINK_TRUNCATION, radio.DOWNLINK_TRUNCATION])
    def test_truncated_against_quadrature(self, x64, truncation):
        means = 10 ** (MEANS_DB / 10)
        breaks = (10 ** (truncation.snr_min_db / 10), 10 ** (truncation.snr_max_db / 10))
        expected = [quadrature(lambda s: truncated_by_hand(s, *truncation), g, breaks) for g in means]
        with jax.enable_x64(x64):
            result = radio.ergodic_truncated_shannon(jnp.asarray(means), truncation=truncation)
        np.testing.assert_allclose(result, expected, rtol=5 * RTOL[x64])

    @pytest.mark.parametrize("x64", [False, True])
    @pytest.mark.parametrize("floor", [0.0, 5.0])
    def test_mcs_against_quadrature(self, x64, floor):
        means = 10 ** (MEANS_DB[1:] / 10)
        expected = [
            quadrature(lambda s: mcs_by_hand(s) if s >= floor else 0.0, g, (floor, *radio.MCS_SNR_THRESHOLDS))
            for g in means
        ]
        with jax.enable_x64(x64):
            result = radio.ergodic_nr_mcs(jnp.asarray(means), floor=floor)
        np.testing.assert_allclose(result, expected, rtol=20 * RTOL[x64], atol=1e-9)

    @pytest.mark.parametrize("model", MODELS)
    @pytest.mark.parametrize("mean_db", [-5.0, 10.0, 25.0])
    def test_against_monte_carlo(self, model, mean_db):
        mean, floor = 10 ** (mean_db / 10), 10**-0.5
        snr = jnp.asarray(np.random.default_rng(11).exponential(mean, 400_000), jnp.float32)
        sample = np.asarray(radio.spectral_efficiency(model, snr, floor=floor), float)
        closed = float(radio.ergodic_spectral_efficiency(model, jnp.float32(mean), floor=floor))
        assert abs(sample.mean() - closed) / (sample.std() / math.sqrt(sample.size)) < 4

    @pytest.mark.parametrize("model", MODELS)
    @pytest.mark.parametrize("floor", [0.0, 0.3])
    @pytest.mark.parametrize("x64", [False, True])
    def test_no_nan_in_value_or_gradient_at_any_mean(self, model, floor, x64):
        with jax.enable_x64(x64):
            mean = jnp.asarray([0.0, 1e-38, 1e-20, 1e-12, 1e-6, 1e-3, 0.3, 1.0, 1e3, 1e6, 1e12, 1e20, 1e38])

            def function(g):
                return radio.ergodic_spectral_efficiency(model, g, floor=floor, cap=7.4)

            value, gradient = jax.jit(jax.vmap(jax.value_and_grad(function)))(mean)
        assert np.isfinite(value).all()
        assert np.isfinite(gradient).all()
        assert (np.asarray(value) >= 0).all()
        top = float(radio.spectral_efficiency(model, jnp.array(1e30), cap=7.4))
        assert float(value[-1]) == pytest.approx(top, rel=1e-5)
        assert float(value[0]) == 0.0

    @pytest.mark.parametrize("model", MODELS)
    def test_gradient_against_finite_differences(self, model):
        with jax.enable_x64(True):
            mean = jnp.array([0.5, 3.0, 40.0, 900.0])

            def function(g):
                return radio.ergodic_spectral_efficiency(model, g, floor=0.3, cap=7.4)

            gradient = jax.jit(jax.vmap(jax.grad(function)))(mean)
            step = 1e-5 * mean
            difference = (function(mean + step) - function(mean - step)) / (2 * step)
            np.testing.assert_allclose(gradient, difference, rtol=1e-7)
            assert (gradient > 0).all()

    def test_a_traced_floor_is_the_static_floor(self):
        mean = jnp.logspace(-1, 4, 20)
        for model in MODELS:
            static = radio.ergodic_spectral_efficiency(model, mean, floor=0.7)
            traced = jax.jit(lambda f, m=model: radio.ergodic_spectral_efficiency(m, mean, floor=f))(jnp.array(0.7))
            np.testing.assert_allclose(traced, static, rtol=2e-6)

    def test_precision_follows_the_input(self):
        with jax.enable_x64(True):
            for model, dtype in ((m, d) for m in MODELS for d in (jnp.float32, jnp.float64)):
                mean = jnp.ones((2, 3), dtype)
                for function in (radio.spectral_efficiency, radio.ergodic_spectral_efficiency):
                    result = function(model, mean, floor=0.1)
                    assert result.dtype == dtype
                    assert result.shape == (2, 3)


class TestOutage:
    def test_probability(self):
        mean = jnp.array([0.0, 0.1, 1.0, 100.0, 1e7])
        expected = -np.expm1(-1.0 / np.array([1e-12, 0.1, 1.0, 100.0, 1e7]))
        np.testing.assert_allclose(radio.outage_probability(mean, 1.0), expected, rtol=1e-6)

    @pytest.mark.parametrize("margin", [1e-3, 0.1, 0.5, 0.69, 0.7, 1.5, 4.0])
    def test_wait_is_geometric(self, margin):
        count, p = 300_000, -math.expm1(-margin)
        result = radio.block_outage_wait(uniforms(count, 1), uniforms(count, 2), jnp.float32(2.0 / margin), 2.0)
        wait = np.asarray(result.wait_slots, float)
        np.testing.assert_array_equal(wait, np.floor(wait))
        mean, deviation = p / (1 - p), math.sqrt(p) / (1 - p)
        assert abs(wait.mean() - mean) / (deviation / math.sqrt(count)) < 4
        for n in (1, 2, 5):
            share = p**n
            spread = max(math.sqrt(share * (1 - share) / count), 1 / count)
            assert abs((wait >= n).mean() - share) / spread < 4

    def test_waiting_by_inverse_transform_is_waiting_slot_by_slot(self):
        """The same law as drawing a fade every slot until one is above the floor: wait, and the SNR it starts with."""
        rng, count, mean, floor = np.random.default_rng(3), 100_000, 3.0, 2.0
        wait, start = np.zeros(count), np.zeros(count)
        pending = np.arange(count)
        while pending.size:
            fade = rng.exponential(mean, pending.size)
            done = fade >= floor
            start[pending[done]] = fade[done]
            pending = pending[~done]
            wait[pending] += 1
        result = radio.block_outage_wait(uniforms(count, 4), uniforms(count, 5), jnp.float32(mean), floor)
        for simulated, drawn in ((wait, result.wait_slots), (start, result.snr)):
            for power in (1, 2):
                a, b = simulated**power, np.asarray(drawn, float) ** power
                assert abs(a.mean() - b.mean()) / math.sqrt((a.var() + b.var()) / count) < 4
        assert float(result.snr.min()) >= floor
        # the rate a transfer starts with does not depend on how long it waited
        correlation = np.corrcoef(np.asarray(result.wait_slots), np.asarray(result.snr))[0, 1]
        assert abs(correlation) * math.sqrt(count) < 4

    @pytest.mark.parametrize("x64", [False, True])
    def test_finite_at_the_ends(self, x64):
        with jax.enable_x64(x64):
            u = jnp.asarray([2.0**-24, 0.5, 1 - 2.0**-24])[:, None]
            mean = jnp.asarray([0.0, 1e-9, 1e-2, 1.0, 1e9])
            result = radio.block_outage_wait(u, u, mean, 1.0, max_wait_slots=500)
            free = radio.block_outage_wait(u, u, mean, 0.0)
        assert np.isfinite(result.wait_slots).all()
        assert np.isfinite(result.snr).all()
        np.testing.assert_array_equal(result.wait_slots[:2, :3], 500)  # dead links reach the cut
        np.testing.assert_array_equal(result.wait_slots[1:, 4], 0)
        np.testing.assert_array_equal(free.wait_slots, 0)

    def test_gradient_is_finite_and_that_of_the_fade(self):
        def start_snr(mean):
            result = radio.block_outage_wait(jnp.float32(0.3), jnp.float32(0.25), mean, 1.0)
            return result.snr + result.wait_slots

        for mean in (0.05, 1.0, 1e6):
            assert float(jax.grad(start_snr)(jnp.float32(mean))) == pytest.approx(math.log(4.0), rel=1e-6)


class TestBand:
    def test_nr_peak_rates(self):
        # one layer at the top MCS: 117 Mbit/s in 20 MHz, 625 Mbit/s in 100 MHz
        top = radio.MCS_EFFICIENCIES[-1]
        assert radio.nr_rate_bps(51, top, overhead=0.08) == pytest.approx(117e6, rel=0.005)
        assert radio.nr_rate_bps(273, top, overhead=0.08) == pytest.approx(625e6, rel=0.005)
        assert radio.nr_rate_bps(51, top, overhead=0.08, layers=2, tdd_share=0.25) == pytest.approx(58.4e6, rel=0.005)

    def test_the_factor_gives_the_same_rate(self):
        factor = radio.nr_efficiency_factor(51, 20e6, overhead=radio.DOWNLINK_OVERHEAD, tdd_share=0.7)
        assert 0.0 < factor < 0.7
        rate = radio.rate_bps(20e6, jnp.array([3.0]), factor)
        expected = radio.nr_rate_bps(51, 3.0, overhead=radio.DOWNLINK_OVERHEAD, tdd_share=0.7)
        np.testing.assert_allclose(rate, [expected], rtol=1e-6)

    def test_shares_add_up_to_the_band(self):
        users = jnp.array([0.0, 1.0, 4.0, 40.0])
        share = radio.shared_bandwidth_hz(20e6, users)
        np.testing.assert_allclose(share * jnp.maximum(users, 1.0), 20e6, rtol=1e-6)

    @settings(max_examples=50, deadline=None)
    @given(snr_db=st.floats(-20.0, 50.0), users=st.integers(1, 100))
    def test_power_is_conserved_and_crowds_do_not_lose_rate(self, snr_db, users):
        """Full power on a narrower band: n uploads together carry at least what one does, never n times as much."""
        snr = jnp.asarray(10 ** (snr_db / 10))
        narrow = radio.narrow_band_snr(snr, 1.0 / users)
        assert float(narrow) == pytest.approx(users * float(snr), rel=1e-5)
        alone = float(radio.rate_bps(20e6, radio.shannon(snr)))
        band = radio.shared_bandwidth_hz(20e6, jnp.asarray(float(users)))
        together = users * float(radio.rate_bps(band, radio.shannon(narrow)))
        assert alone * (1 - 1e-5) <= together <= users * alone * (1 + 1e-5)
