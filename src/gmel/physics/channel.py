"""The radio channel: Indoor Factory path loss, line of sight, shadowing, fading and noise (3GPP TR 38.901).

Every function is pure and broadcasts over all axes of its arguments; random quantities are made from uniforms that the
caller draws, by inverse transform, so the same draw gives the same channel whatever the actions were.
"""

import math
from typing import Literal, TypeAlias, assert_never

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

__all__ = [
    "RICIAN_K_MEAN_DB",
    "RICIAN_K_STD_DB",
    "SHADOWING_DISTANCE_M",
    "SubScenario",
    "ar1_step",
    "db_to_linear",
    "dbm_to_w",
    "distance_3d_m",
    "doppler_hz",
    "jakes_correlation",
    "linear_to_db",
    "los_probability",
    "noise_dbm",
    "path_loss_db",
    "rayleigh_power",
    "rician_power",
    "shadowing_correlation",
    "shadowing_sigma_db",
    "snr_db",
]

Real: TypeAlias = Float[Array, "..."] | float
SubScenario: TypeAlias = Literal["SL", "DL", "SH", "DH", "HH"]
"""Clutter sparse or dense, base station below (L) or above (H) it; HH: both ends above, always in line of sight."""

SHADOWING_DISTANCE_M = 10.0
"""Correlation distance of shadowing, InF (TR 38.901 Table 7.5-6)."""
RICIAN_K_MEAN_DB = 7.0
RICIAN_K_STD_DB = 8.0
"""Law of the Rician K factor in line of sight, InF: normal in dB (TR 38.901 Table 7.5-6)."""

_SPEED_OF_LIGHT_M_S = 299_792_458.0
_THERMAL_NOISE_DBM_HZ = -174.0
_LEAST_DISTANCE_M = 1.0  # the path loss rows of Table 7.4.1-1 begin here

_LOS_SIGMA_DB = 4.3
_NLOS_SIGMA_DB: dict[SubScenario, float] = {"SL": 5.7, "DL": 7.2, "SH": 5.9, "DH": 4.0, "HH": _LOS_SIGMA_DB}

_DB_PER_NEPER = 10.0 / math.log(10.0)

_BESSEL_SWITCH = 30.0
_BESSEL_NODES = 16
# a_k of the Hankel expansion of J0: (1 * 3^2 * 5^2 ... (2k - 1)^2) / (k! 8^k)
_HANKEL = [math.prod((2 * i - 1) ** 2 for i in range(1, k + 1)) / (math.factorial(k) * 8.0**k) for k in range(12)]


def db_to_linear(value_db: Real) -> Float[Array, "..."]:
    """Power ratio of a value in dB, or milliwatts of a value in dBm: 10^(x/10)."""
    # exp: XLA's power function costs about ten times as much on a CPU.
    return jnp.exp(jnp.asarray(value_db) / _DB_PER_NEPER)


def linear_to_db(ratio: Real) -> Float[Array, "..."]:
    """10 log10 of a power ratio; 0 gives -inf."""
    return _DB_PER_NEPER * jnp.log(jnp.asarray(ratio))


def dbm_to_w(power_dbm: Real) -> Float[Array, "..."]:
    """Watts of a power in dBm."""
    return 1e-3 * db_to_linear(power_dbm)


def distance_3d_m(distance_2d_m: Real, device_height_m: Real, base_height_m: Real) -> Float[Array, "..."]:
    """Length of a link in metres from its length on the floor and the two heights (TR 38.901 figure 7.4.1-1)."""
    return jnp.hypot(jnp.asarray(distance_2d_m), jnp.asarray(base_height_m) - device_height_m)


def path_loss_db(
    distance_3d_m: Real, frequency_ghz: Real, scenario: SubScenario, line_of_sight: Bool[Array, "..."] | bool
) -> Float[Array, "..."]:
    """Path loss in dB without shadowing, Indoor Factory (TR 38.901 Table 7.4.1-1).

    `distance_3d_m` is 1 to 600 m in the standard: a nearer device gets the loss at 1 m, a farther one the same line
    drawn on. `scenario` is static. HH has no row without line of sight, `line_of_sight` then changes nothing.
    """
    # One logarithm a link serves all rows.
    distance = jnp.log10(jnp.maximum(jnp.asarray(distance_3d_m), _LEAST_DISTANCE_M))
    frequency = jnp.log10(jnp.asarray(frequency_ghz))
    los = 31.84 + 21.50 * distance + 19.00 * frequency
    sparse_low = 33.0 + 25.5 * distance + 20.0 * frequency
    match scenario:
        case "HH":
            return los
        case "SL":
            nlos = sparse_low
        case "DL":
            nlos = jnp.maximum(18.6 + 35.7 * distance + 20.0 * frequency, sparse_low)
        case "SH":
            nlos = 32.4 + 23.0 * distance + 20.0 * frequency
        case "DH":
            nlos = 33.63 + 21.9 * distance + 20.0 * frequency
        case _:
            assert_never(scenario)
    return jnp.where(line_of_sight, los, jnp.maximum(nlos, los))


def shadowing_sigma_db(scenario: SubScenario, line_of_sight: Bool[Array, "..."] | bool) -> Float[Array, "..."]:
    """Standard deviation of shadowing in dB, Indoor Factory (TR 38.901 Table 7.4.1-1)."""
    return jnp.where(line_of_sight, _LOS_SIGMA_DB, _NLOS_SIGMA_DB[scenario])


def los_probability(
    distance_2d_m: Real,
    scenario: SubScenario,
    *,
    clutter_density: Real,
    clutter_size_m: Real,
    clutter_height_m: Real,
    device_height_m: Real,
    base_height_m: Real,
) -> Float[Array, "..."]:
    """Probability of line of sight, exp(-d2D / k), Indoor Factory (TR 38.901 Table 7.4.2-1).

    k = -clutter_size / ln(1 - clutter_density); SH and DH multiply it by the height of the base station over the
    height of the clutter, both above the device, and need both to be positive. HH is always in line of sight.
    """
    distance = jnp.asarray(distance_2d_m)
    if scenario == "HH":
        return jnp.ones_like(distance)
    decay_per_m = -jnp.log1p(-jnp.asarray(clutter_density)) / clutter_size_m
    if scenario in ("SH", "DH"):
        decay_per_m = decay_per_m * (clutter_height_m - device_height_m) / (base_height_m - device_height_m)
    return jnp.exp(-distance * decay_per_m)


def shadowing_correlation(displacement_m: Real) -> Float[Array, "..."]:
    """Correlation of the shadowing at two places `displacement_m` apart, exp(-|dx| / 10 m) (TR 38.901 eq. 7.4-5)."""
    return jnp.exp(-jnp.abs(jnp.asarray(displacement_m)) / SHADOWING_DISTANCE_M)


def doppler_hz(speed_m_s: Real, frequency_ghz: Real) -> Float[Array, "..."]:
    """Largest Doppler shift v f / c."""
    return jnp.asarray(speed_m_s) * (frequency_ghz * (1e9 / _SPEED_OF_LIGHT_M_S))


def jakes_correlation(doppler_hz: Real, interval_s: Real) -> Float[Array, "..."]:
    """Correlation of fading after `interval_s`: J0(2 pi f_d T), clipped to [0, 1) for an AR(1) process (Jakes).

    J0 oscillates below zero where an AR(1) process would alternate; there the fading counts as independent. A device
    that stands still gets the number just below 1.
    """
    argument = 2.0 * math.pi * jnp.asarray(doppler_hz) * interval_s
    return jnp.clip(_bessel_j0(argument), 0.0, 1.0 - jnp.finfo(argument.dtype).eps)


def ar1_step(value: Float[Array, "..."], correlation: Real, innovation: Float[Array, "..."]) -> Float[Array, "..."]:
    """Next value rho x + sqrt(1 - rho^2) w of a stationary AR(1) process with the variance of `innovation`."""
    correlation = jnp.asarray(correlation)
    return correlation * value + jnp.sqrt((1.0 - correlation) * (1.0 + correlation)) * innovation


def rayleigh_power(uniform: Float[Array, "..."]) -> Float[Array, "..."]:
    """Power gain |h|^2 of Rayleigh fading, exponential with mean 1, from a uniform on (0, 1)."""
    return -jnp.log(uniform)


def rician_power(
    uniform: Float[Array, "..."], phase_uniform: Float[Array, "..."], k_factor: Real
) -> Float[Array, "..."]:
    """Power gain |h|^2 of Rician fading with mean 1, from two uniforms on (0, 1).

    h = sqrt(K / (K + 1)) + sqrt(1 / (K + 1)) CN(0, 1); `k_factor` is the linear ratio K of the direct to the scattered
    power, 0 is Rayleigh.
    """
    scattered = rayleigh_power(uniform)
    phase = jnp.cos(2.0 * math.pi * phase_uniform)
    return (k_factor + scattered + 2.0 * jnp.sqrt(k_factor * scattered) * phase) / (k_factor + 1.0)


def noise_dbm(bandwidth_hz: Real, noise_figure_db: Real) -> Float[Array, "..."]:
    """Noise power in dBm of a receiver: thermal noise at -174 dBm/Hz over the band plus its noise figure."""
    return _THERMAL_NOISE_DBM_HZ + linear_to_db(bandwidth_hz) + noise_figure_db


def snr_db(tx_power_dbm: Real, loss_db: Real, noise_dbm: Real) -> Float[Array, "..."]:
    """Mean signal-to-noise ratio in dB of a link; `loss_db` is path loss plus shadowing."""
    return jnp.asarray(tx_power_dbm) - loss_db - noise_dbm


def _bessel_j0(argument: Float[Array, "..."]) -> Float[Array, "..."]:
    """Bessel function J0, to machine precision: jax.scipy.special has none that is accurate at every argument."""
    near = jnp.minimum(jnp.abs(argument), _BESSEL_SWITCH)
    # J0(x) = 1/pi int_0^pi cos(x sin t) dt. The integrand has period pi: the midpoint rule with 2 x 16 nodes (half of
    # them by symmetry) errs by J_64(x), 1e-14 at the switch.
    nodes = jnp.sin((jnp.arange(_BESSEL_NODES) + 0.5) * (0.5 * math.pi / _BESSEL_NODES)).astype(argument.dtype)
    integral = jnp.mean(jnp.cos(near[..., None] * nodes), axis=-1)
    far = jnp.maximum(jnp.abs(argument), _BESSEL_SWITCH)
    square = -1.0 / (far * far)
    even = _horner(_HANKEL[0::2], square)
    odd = _horner(_HANKEL[1::2], square) / far
    phase = far - 0.25 * math.pi
    hankel = jnp.sqrt(2.0 / (math.pi * far)) * (even * jnp.cos(phase) + odd * jnp.sin(phase))
    return jnp.where(jnp.abs(argument) < _BESSEL_SWITCH, integral, hankel)


def _horner(coefficients: list[float], x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Polynomial with the constant first."""
    result = jnp.full_like(x, coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        result = result * x + coefficient
    return result
