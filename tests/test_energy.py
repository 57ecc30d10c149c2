"""Energy of a task, equation (12)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gmel.physics import energy

SECONDS = st.floats(0.0, 1e3, width=32)


def test_local_energy_by_hand_in_single_precision():
    # 1e-27 x (2 GHz)^2 x 6.14 Gcycle = 24.56 J; f^2 C = 2.5e28 is near the end of float32
    result = energy.local_energy_j(1e-27, jnp.float32(2e9), jnp.array([6.14e9, 0.0, 6.14e15]))
    assert result.dtype == jnp.float32
    np.testing.assert_allclose(result, [24.56, 0.0, 24.56e6], rtol=1e-6)


def test_local_energy_is_quadratic_in_speed_and_linear_in_work():
    base = energy.local_energy_j(1e-27, jnp.array(1e9), jnp.array(5e9))
    assert float(energy.local_energy_j(1e-27, jnp.array(3e9), jnp.array(5e9)) / base) == pytest.approx(9.0, rel=1e-6)
    assert float(energy.local_energy_j(1e-27, jnp.array(1e9), jnp.array(20e9)) / base) == pytest.approx(4.0, rel=1e-6)


def test_offload_energy_by_hand():
    result = energy.offload_energy_j(
        tx_power_w=0.2, idle_power_w=0.1, server_power_w=5.0, switch_power_w=7.0,
        upload_s=jnp.array([2.0, 0.0]), latency_s=jnp.array([10.0, 4.0]), run_s=jnp.array([3.0, 4.0]),
        switch_s=jnp.array([1.5, 0.0]),
    )  # fmt: skip
    np.testing.assert_allclose(result, [0.4 + 0.8 + 15.0 + 10.5, 0.4 + 20.0], rtol=1e-6)


@settings(deadline=None)
@given(upload=SECONDS, wait=SECONDS, run=SECONDS, switch=SECONDS)
def test_every_second_counts_once(upload, wait, run, switch):
    """With equal powers: every second of latency on the device, and of run and switch on the server, costs once."""
    power = 3.0
    latency = upload + wait + run + switch
    whole = energy.offload_energy_j(
        tx_power_w=power, idle_power_w=power, server_power_w=power, switch_power_w=power,
        upload_s=jnp.float32(upload), latency_s=jnp.float32(latency), run_s=jnp.float32(run),
        switch_s=jnp.float32(switch),
    )  # fmt: skip
    assert float(whole) == pytest.approx(power * (latency + run + switch), rel=1e-5, abs=1e-30)


def test_idling_is_never_negative():
    upload = jnp.float32(1.0000001)
    assert float(energy.idle_energy_j(5.0, jnp.float32(1.0), upload)) == 0.0


def test_broadcast_and_double_precision():
    with jax.enable_x64(True):
        result = jax.jit(energy.power_energy_j)(jnp.array([[1.0], [2.0]]), jnp.array([1.0, 3.0]))
        assert result.dtype == jnp.float64
        np.testing.assert_array_equal(result, [[1.0, 3.0], [2.0, 6.0]])
    np.testing.assert_array_equal(energy.switch_energy_j(5.0, jnp.array([0.0, 2.0])), [0.0, 10.0])
