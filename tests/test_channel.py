"""The channel against the 3GPP oracle values, scipy, and the laws that its random parts must follow."""

import itertools
import math
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from gmel.physics import channel

SCENARIOS = get_args(channel.SubScenario)
# 3.5 GHz, 3D distance 10 / 50 / 100 m, checked against Sionna's InFScenario to 3e-14 dB.
ORACLE_DB = {
    "LOS": (63.7, 78.7, 85.2),
    "SL": (69.4, 87.2, 94.9),
    "DL": (69.4, 90.1, 100.9),
    "SH": (66.3, 82.4, 89.3),
    "DH": (66.4, 81.7, 88.3),
}
HALL = {"clutter_density": 0.6, "clutter_size_m": 2.0, "clutter_height_m": 6.0, "device_height_m": 1.5}


def uniforms(count: int, seed: int) -> jax.Array:
    """On (0, 1): cells of 2^-23 at their centres, as physics/random.py draws them."""
    return jnp.asarray((np.random.default_rng(seed).integers(0, 2**23, count) + 0.5) * 2.0**-23, jnp.float32)


@pytest.mark.parametrize("scenario", ["SL", "DL", "SH", "DH"])
def test_path_loss_oracle(scenario):
    distance = jnp.array([10.0, 50.0, 100.0])
    nlos = channel.path_loss_db(distance, 3.5, scenario, False)
    los = channel.path_loss_db(distance, 3.5, scenario, True)
    np.testing.assert_allclose(nlos, ORACLE_DB[scenario], atol=0.051)
    np.testing.assert_allclose(los, ORACLE_DB["LOS"], atol=0.051)


def test_path_loss_in_double_precision_by_hand():
    with jax.enable_x64(True):
        loss = channel.path_loss_db(jnp.array(100.0), 28.0, "DL", False)
        expected = 18.6 + 35.7 * 2 + 20 * math.log10(28)
        assert loss.dtype == jnp.float64
        assert float(loss) == pytest.approx(expected, abs=1e-12)


def test_path_loss_chooses_by_link_and_ignores_sight_in_hh():
    distance = jnp.full((2, 3), 80.0)
    sight = jnp.array([[True, False, True], [False, True, False]])
    loss = channel.path_loss_db(distance, 3.5, "SH", sight)
    assert loss.shape == (2, 3)
    los, nlos = 31.84 + 21.5 * math.log10(80) + 19 * math.log10(3.5), 32.4 + 23 * math.log10(80) + 20 * math.log10(3.5)
    np.testing.assert_allclose(loss, np.where(sight, los, nlos), rtol=1e-6)
    np.testing.assert_allclose(channel.path_loss_db(distance, 3.5, "HH", sight), los, rtol=1e-6)


def test_path_loss_is_finite_down_to_no_distance():
    near = channel.path_loss_db(jnp.array([0.0, 0.5, 1.0]), 3.5, "DH", False)
    assert np.isfinite(near).all()
    np.testing.assert_array_equal(near, near[2])
    gradient = jax.grad(lambda d: channel.path_loss_db(d, 3.5, "DH", False))(jnp.array(0.0))
    assert float(gradient) == 0.0


@settings(max_examples=60, deadline=None)
@given(
    near=st.floats(1.0, 600.0), ratio=st.floats(1.01, 10.0), frequency=st.floats(0.5, 100.0),
    scenario=st.sampled_from(SCENARIOS),
)  # fmt: skip
def test_path_loss_grows_with_distance_and_without_sight(near, ratio, frequency, scenario):
    distance = jnp.array([near, near * ratio])
    los = channel.path_loss_db(distance, frequency, scenario, True)
    nlos = channel.path_loss_db(distance, frequency, scenario, False)
    assert los[1] > los[0]
    assert nlos[1] > nlos[0]
    assert (nlos >= los).all()
    assert channel.path_loss_db(distance, frequency * 1.1, scenario, False)[0] > nlos[0]


def test_dl_never_loses_less_than_sl():
    distance = jnp.logspace(0, 2.7, 50)
    dense, sparse = (channel.path_loss_db(distance, 3.5, s, False) for s in ("DL", "SL"))
    assert (dense >= sparse).all()
    assert (dense > sparse).any()
    assert (dense == sparse).any()


def test_shadowing_sigma():
    expected = {"SL": 5.7, "DL": 7.2, "SH": 5.9, "DH": 4.0, "HH": 4.3}
    for scenario, sigma in expected.items():
        result = channel.shadowing_sigma_db(scenario, jnp.array([True, False]))
        np.testing.assert_allclose(result, [4.3, sigma], rtol=1e-6)


def test_los_probability_by_hand():
    distance = jnp.array([0.0, 20.0, 60.0])
    low = -2.0 / math.log(0.4)
    high = low * (8.0 - 1.5) / (6.0 - 1.5)
    for scenario, k in {"SL": low, "DL": low, "SH": high, "DH": high}.items():
        p = channel.los_probability(distance, scenario, base_height_m=8.0, **HALL)
        np.testing.assert_allclose(p, np.exp(-np.asarray(distance) / k), rtol=2e-6)
    np.testing.assert_array_equal(channel.los_probability(distance, "HH", base_height_m=8.0, **HALL), 1.0)


@settings(max_examples=40, deadline=None)
@given(distance=st.floats(0.0, 500.0), density=st.floats(0.05, 0.9), scenario=st.sampled_from(["SL", "DL", "SH", "DH"]))
def test_los_probability_is_one_and_falls_with_distance_and_clutter(distance, density, scenario):
    def at(d, r):
        hall = HALL | {"clutter_density": r}
        return float(channel.los_probability(jnp.array(d), scenario, base_height_m=8.0, **hall))

    assert 0.0 <= at(distance, density) <= 1.0
    assert at(distance + 1.0, density) <= at(distance, density)
    assert at(distance, density + 0.05) <= at(distance, density)


def test_higher_base_sees_farther():
    low, high = (channel.los_probability(jnp.array(50.0), "DH", base_height_m=h, **HALL) for h in (7.0, 9.0))
    assert high > low


def test_distance_is_pythagoras_and_shadowing_falls_to_1_over_e():
    assert float(channel.distance_3d_m(jnp.array(12.0), 1.5, 6.5)) == pytest.approx(13.0)
    correlation = channel.shadowing_correlation(jnp.array([0.0, 10.0, -10.0, 23.0]))
    np.testing.assert_allclose(correlation, [1.0, math.exp(-1), math.exp(-1), math.exp(-2.3)], rtol=1e-6)


def test_decibels():
    np.testing.assert_allclose(
        channel.db_to_linear(jnp.array([-100.0, -3.0, 0.0, 10.0, 60.0])),
        [1e-10, 10**-0.3, 1.0, 10.0, 1e6],
        rtol=2e-6,
    )
    np.testing.assert_allclose(channel.linear_to_db(jnp.array([1e-10, 1.0, 2.0])), [-100.0, 0.0, 3.0103], rtol=1e-5)
    assert float(channel.dbm_to_w(23.0)) == pytest.approx(0.1995262, rel=1e-5)
    assert float(channel.linear_to_db(jnp.array(0.0))) == -math.inf


def test_noise_and_snr():
    # 20 MHz: 73.01 dB over 1 Hz
    assert float(channel.noise_dbm(20e6, 5.0)) == pytest.approx(-174 + 73.0103 + 5, abs=1e-3)
    # The worked case of the reference: 23 dBm, InF-DL, 100 m, 20 MHz, Shannon 121 Mbit/s.
    loss = channel.path_loss_db(jnp.array(100.0), 3.5, "DL", False)
    snr = channel.db_to_linear(channel.snr_db(23.0, loss, channel.noise_dbm(20e6, 5.0)))
    assert 20e6 * math.log2(1 + float(snr)) == pytest.approx(121e6, rel=0.005)


@pytest.mark.parametrize("x64", [False, True])
def test_jakes_is_the_clipped_bessel_function(x64):
    argument = np.concatenate([np.linspace(0.01, 29.99, 400), np.linspace(30.0, 300.0, 400)])
    with jax.enable_x64(x64):
        rho = channel.jakes_correlation(jnp.asarray(argument / (2 * np.pi)), 1.0)
        assert rho.dtype == (jnp.float64 if x64 else jnp.float32)
    expected = np.clip(scipy.special.j0(argument), 0.0, 1.0)
    # single precision: the argument itself is off by its rounding, some 1e-7 x 300
    np.testing.assert_allclose(rho, expected, atol=3e-14 if x64 else 4e-6)
    assert (expected == 0).any()


def test_jakes_ends():
    assert float(channel.jakes_correlation(channel.doppler_hz(0.0, 3.5), 1.0)) == 1.0 - np.finfo(np.float32).eps
    # an AGV at 0.83 m/s, 3.5 GHz: f_d = 9.7 Hz
    assert float(channel.doppler_hz(jnp.array(0.83), 3.5)) == pytest.approx(9.69, abs=0.01)
    assert float(channel.jakes_correlation(jnp.array(10.0), 0.005)) == pytest.approx(0.9754777, abs=1e-5)


def test_ar1_is_stationary_and_correlated():
    rng = np.random.default_rng(5)
    count, rho = 200_000, 0.9
    start = jnp.asarray(rng.standard_normal(count), jnp.float32)
    step = jax.jit(channel.ar1_step)
    value = start
    for _ in range(3):
        value = step(value, rho, jnp.asarray(rng.standard_normal(count), jnp.float32))
    sample = np.asarray(value, float)
    # Normal: the variance has standard error sqrt(2/n), the correlation (1 - r^2)/sqrt(n).
    assert abs(sample.var() - 1.0) / math.sqrt(2 / count) < 4
    correlation = np.corrcoef(sample, np.asarray(start, float))[0, 1]
    assert abs(correlation - rho**3) / ((1 - rho**6) / math.sqrt(count)) < 4


def test_rayleigh_power_is_exponential():
    sample = np.asarray(channel.rayleigh_power(uniforms(200_000, seed=1)), float)
    assert scipy.stats.kstest(sample, "expon").pvalue > 1e-3
    assert abs(sample.mean() - 1.0) * math.sqrt(sample.size) < 4
    assert np.isfinite(sample).all()


@pytest.mark.parametrize("k_db", [-10.0, 0.0, 7.0, 15.0])
def test_rician_power_has_the_law_of_its_k_factor(k_db):
    k = 10 ** (k_db / 10)
    sample = np.asarray(channel.rician_power(uniforms(200_000, 2), uniforms(200_000, 3), jnp.float32(k)), float)
    # 2 (K + 1) |h|^2 is noncentral chi-square with 2 degrees of freedom and noncentrality 2 K
    assert scipy.stats.kstest(2 * (k + 1) * sample, scipy.stats.ncx2(2, 2 * k).cdf).pvalue > 1e-3
    deviation = math.sqrt(1 + 2 * k) / (1 + k)
    assert abs(sample.mean() - 1.0) / (deviation / math.sqrt(sample.size)) < 4


def test_rician_without_direct_path_is_rayleigh():
    u, phase = uniforms(1000, 4), uniforms(1000, 5)
    np.testing.assert_allclose(channel.rician_power(u, phase, 0.0), channel.rayleigh_power(u), rtol=1e-6)


def test_vmap_and_jit_agree_with_broadcasting():
    distance = jnp.linspace(1.0, 300.0, 12).reshape(3, 4)
    sight = distance < 80.0
    for scenario, wrap in itertools.product(SCENARIOS, (jax.jit, lambda f: jax.vmap(jax.vmap(f)))):
        result = wrap(lambda d, s, name=scenario: channel.path_loss_db(d, 3.5, name, s))(distance, sight)
        np.testing.assert_allclose(result, channel.path_loss_db(distance, 3.5, scenario, sight), rtol=1e-6)
