"""The rate of a link: spectral efficiency, its mean under Rayleigh fading, outage, and the sharing of a band.

rate_bps = bandwidth_hz x efficiency_factor x spectral efficiency, the latter in bit/s/Hz from a *linear* SNR by one of
three models: `shannon` (what papers use), `truncated-shannon` (TR 36.942) and `nr-mcs` (TS 38.214, what a modem can
do). The `ergodic_` functions are their exact means under Rayleigh fading, where the SNR is exponential around
`mean_snr`: what an upload that lasts over many fades sees.

Every model takes a `floor`, a linear SNR below which nothing is decoded (on top of the floor of the model itself).
"""

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple, TypeAlias, assert_never

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from scipy.special import roots_laguerre

from gmel.physics.channel import rayleigh_power

__all__ = [
    "DOWNLINK_OVERHEAD",
    "DOWNLINK_TRUNCATION",
    "MAX_WAIT_SLOTS",
    "MCS_EFFICIENCIES",
    "MCS_SNR_THRESHOLDS",
    "UPLINK_OVERHEAD",
    "UPLINK_TRUNCATION",
    "BlockStart",
    "RateModel",
    "Truncation",
    "block_outage_wait",
    "ergodic_nr_mcs",
    "ergodic_shannon",
    "ergodic_spectral_efficiency",
    "ergodic_truncated_shannon",
    "lowest_snr",
    "mean_log1p_exponential",
    "narrow_band_snr",
    "nr_efficiency_factor",
    "nr_mcs",
    "nr_rate_bps",
    "outage_probability",
    "rate_bps",
    "shannon",
    "shared_bandwidth_hz",
    "spectral_efficiency",
    "truncated_shannon",
]

Real: TypeAlias = Float[Array, "..."] | float
RateModel: TypeAlias = Literal["shannon", "truncated-shannon", "nr-mcs"]


class Truncation(NamedTuple):
    """Constants of the attenuated and truncated Shannon bound (TR 36.942 annex A.1), static numbers."""

    attenuation: float
    snr_min_db: float
    snr_max_db: float


UPLINK_TRUNCATION = Truncation(attenuation=0.4, snr_min_db=-10.0, snr_max_db=22.0)
DOWNLINK_TRUNCATION = Truncation(attenuation=0.6, snr_min_db=-10.0, snr_max_db=30.0)
UPLINK_OVERHEAD = 0.08
DOWNLINK_OVERHEAD = 0.14
"""Share of the NR resource elements that carry no data, FR1 (TS 38.306 section 4.1.2)."""

MCS_EFFICIENCIES: tuple[float, ...] = (
    *(0.2344, 0.377, 0.6016, 0.877, 1.1758, 1.4766, 1.6953, 1.9141, 2.1602, 2.4062, 2.5703, 2.7305, 3.0293, 3.3223),
    *(3.6094, 3.9023, 4.2129, 4.5234, 4.8164, 5.1152, 5.332, 5.5547, 5.8906, 6.2266, 6.5703, 6.9141, 7.1602, 7.4062),
)
"""Spectral efficiency of MCS 0-27, 256QAM, in bit/s/Hz (TS 38.214 Table 5.1.3.1-2)."""
_MCS_BIT_ERROR_RATE = 5e-5
_MCS_GAP = -math.log(5.0 * _MCS_BIT_ERROR_RATE) / 1.5
MCS_SNR_THRESHOLDS: tuple[float, ...] = tuple(_MCS_GAP * (2.0**se - 1.0) for se in MCS_EFFICIENCIES)
"""Lowest linear SNR of every MCS: its efficiency is at most log2(1 + SNR / G), G = -ln(5 BER) / 1.5 = 7.4 dB."""

MAX_WAIT_SLOTS = 10_000
"""Where `block_outage_wait` cuts the number of slots a link waits for a usable fade."""

# Below this mean SNR (-120 dB) nothing passes a positive threshold, and exp(-threshold / mean) and its gradient are 0;
# a mean of 0 itself would make the gradient 0 / 0.
_LEAST_MEAN_SNR = 1e-12

_PRB_SUBCARRIERS = 12
_SLOT_SYMBOLS = 14
_SLOTS_PER_S = 1000.0  # at numerology 0 (15 kHz); doubles with every step


class _ExponentialIntegral(NamedTuple):
    """Coefficients of exp(x) E1(x): a power series for x < 1, a Gauss-Laguerre rule beyond."""

    series: list[float]
    nodes: list[float]
    weights: list[float]


def _exponential_integral(terms: int, points: int, least_weight: float) -> _ExponentialIntegral:
    harmonic = np.concatenate([[0.0], np.cumsum(1.0 / np.arange(1, terms))])
    series = [float(h - np.euler_gamma) / math.factorial(k) for k, h in enumerate(harmonic)]
    # scipy, because numpy's rule is good to 1e-13 only at this size.
    nodes, weights = roots_laguerre(points)
    counted = weights > least_weight  # most nodes of a large rule weigh nothing
    return _ExponentialIntegral(series, nodes[counted].tolist(), weights[counted].tolist())


# Orders that reach the rounding error of each precision.
_SINGLE = _exponential_integral(terms=12, points=24, least_weight=1e-9)
_DOUBLE = _exponential_integral(terms=20, points=100, least_weight=1e-18)


def mean_log1p_exponential(mean: Float[Array, "..."]) -> Float[Array, "..."]:
    """E[ln(1 + g X)] = exp(1/g) E1(1/g) with X exponential of mean 1, for g = `mean` >= 0.

    Exact to a few units in the last place for every g, without overflow, and differentiable: 0 at g = 0 (slope 1),
    ln g - 0.577 for large g. One exponential and one logarithm; jax.scipy.special.exp1 costs some thousand times as
    much, and underflows from x = 88 on.
    """
    coefficients = _DOUBLE if mean.dtype == jnp.float64 else _SINGLE
    large = mean > 1.0
    # Each branch gets a harmless argument where the other one holds, so that no gradient is 0 x inf.
    mean_large = jnp.where(large, mean, 1.0)
    mean_small = jnp.where(large, 1.0, mean)
    # exp(x) E1(x) = sum_k x^k / k! (H_k - gamma - ln x), x = 1/g  (DLMF 6.6.3 with 5.4.14)
    x = 1.0 / mean_large
    series = jnp.log(mean_large) * jnp.exp(x) + _horner(coefficients.series, x)
    # exp(x) E1(x) = int_0^inf exp(-t) / (x + t) dt = sum_i w_i g / (1 + g t_i): all terms positive, nothing cancels.
    rule = jnp.zeros_like(mean_small)
    for node, weight in zip(reversed(coefficients.nodes), reversed(coefficients.weights), strict=True):
        rule = rule + weight / (1.0 + node * mean_small)
    return jnp.where(large, series, mean_small * rule)


def shannon(snr: Float[Array, "..."], *, floor: Real = 0.0, cap: float | None = None) -> Float[Array, "..."]:
    """Shannon bound log2(1 + snr) in bit/s/Hz, at most `cap` bit/s/Hz, 0 below `floor`."""
    efficiency = jnp.log1p(snr) / math.log(2.0)
    if cap is not None:
        efficiency = jnp.minimum(efficiency, cap)
    return _above(floor, snr, efficiency)


def truncated_shannon(
    snr: Float[Array, "..."], *, floor: Real = 0.0, truncation: Truncation = UPLINK_TRUNCATION
) -> Float[Array, "..."]:
    """Attenuated and truncated Shannon bound in bit/s/Hz (TR 36.942 annex A.1), 0 below its least SNR or `floor`."""
    efficiency = jnp.log1p(jnp.minimum(snr, _ratio(truncation.snr_max_db))) * (truncation.attenuation / math.log(2.0))
    return _above(_larger(_ratio(truncation.snr_min_db), floor), snr, efficiency)


def nr_mcs(snr: Float[Array, "..."], *, floor: Real = 0.0) -> Float[Array, "..."]:
    """Spectral efficiency in bit/s/Hz of the best NR modulation and coding that `snr` carries (`MCS_SNR_THRESHOLDS`).

    0 below the lowest one and below `floor`. A step function: its gradient is 0.
    """
    efficiency = jnp.zeros_like(snr)
    for threshold, step in zip(MCS_SNR_THRESHOLDS, MCS_EFFICIENCIES, strict=True):
        # Selects, not sums of increments: the values stay those of the table, and no logarithm is needed.
        efficiency = jnp.where(snr >= threshold, step, efficiency)
    return _above(floor, snr, efficiency)


def ergodic_shannon(
    mean_snr: Float[Array, "..."], *, floor: Real = 0.0, cap: float | None = None
) -> Float[Array, "..."]:
    """Mean of `shannon` under Rayleigh fading, exp(1/g) E1(1/g) / ln 2 without floor and cap."""
    top = math.inf if cap is None else 2.0**cap - 1.0
    return _ergodic_log1p(mean_snr, floor, top) / math.log(2.0)


def ergodic_truncated_shannon(
    mean_snr: Float[Array, "..."], *, floor: Real = 0.0, truncation: Truncation = UPLINK_TRUNCATION
) -> Float[Array, "..."]:
    """Mean of `truncated_shannon` under Rayleigh fading."""
    low = _larger(_ratio(truncation.snr_min_db), floor)
    return _ergodic_log1p(mean_snr, low, _ratio(truncation.snr_max_db)) * (truncation.attenuation / math.log(2.0))


def ergodic_nr_mcs(mean_snr: Float[Array, "..."], *, floor: Real = 0.0) -> Float[Array, "..."]:
    """Mean of `nr_mcs` under Rayleigh fading: sum over k of (SE_k - SE_{k-1}) P(SNR >= threshold_k)."""
    minus_inverse = -1.0 / jnp.maximum(mean_snr, _LEAST_MEAN_SNR)
    mean = jnp.zeros_like(mean_snr)
    steps = np.diff(MCS_EFFICIENCIES, prepend=0.0).tolist()
    # The smallest terms first: less rounding.
    for threshold, step in zip(reversed(MCS_SNR_THRESHOLDS), reversed(steps), strict=True):
        mean = mean + step * jnp.exp(_larger(threshold, floor) * minus_inverse)
    return mean


def spectral_efficiency(
    model: RateModel,
    snr: Float[Array, "..."],
    *,
    floor: Real = 0.0,
    cap: float | None = None,
    truncation: Truncation = UPLINK_TRUNCATION,
) -> Float[Array, "..."]:
    """Spectral efficiency in bit/s/Hz at the linear SNR `snr` by a (static) model.

    `cap` is for `shannon`, `truncation` for `truncated-shannon` only.
    """
    match model:
        case "shannon":
            return shannon(snr, floor=floor, cap=cap)
        case "truncated-shannon":
            return truncated_shannon(snr, floor=floor, truncation=truncation)
        case "nr-mcs":
            return nr_mcs(snr, floor=floor)
        case _:
            assert_never(model)


def ergodic_spectral_efficiency(
    model: RateModel,
    mean_snr: Float[Array, "..."],
    *,
    floor: Real = 0.0,
    cap: float | None = None,
    truncation: Truncation = UPLINK_TRUNCATION,
) -> Float[Array, "..."]:
    """Mean of `spectral_efficiency` under Rayleigh fading around the linear SNR `mean_snr`, in closed form."""
    match model:
        case "shannon":
            return ergodic_shannon(mean_snr, floor=floor, cap=cap)
        case "truncated-shannon":
            return ergodic_truncated_shannon(mean_snr, floor=floor, truncation=truncation)
        case "nr-mcs":
            return ergodic_nr_mcs(mean_snr, floor=floor)
        case _:
            assert_never(model)


def lowest_snr(model: RateModel, *, truncation: Truncation = UPLINK_TRUNCATION) -> float:
    """Lowest linear SNR that a model decodes; 0 for Shannon. The floor of a link is the larger of this and `floor`."""
    match model:
        case "shannon":
            return 0.0
        case "truncated-shannon":
            return _ratio(truncation.snr_min_db)
        case "nr-mcs":
            return MCS_SNR_THRESHOLDS[0]
        case _:
            assert_never(model)


def outage_probability(mean_snr: Float[Array, "..."], floor: Real) -> Float[Array, "..."]:
    """Share of the Rayleigh fades below the linear SNR `floor`: 1 - exp(-floor / mean_snr)."""
    return -jnp.expm1(-floor / jnp.maximum(mean_snr, _LEAST_MEAN_SNR))


class BlockStart(NamedTuple):
    """When an upload on a block fading link can start, and the linear SNR of the fade it then meets."""

    wait_slots: Float[Array, "..."]
    snr: Float[Array, "..."]


def block_outage_wait(
    wait_uniform: Float[Array, "..."],
    fade_uniform: Float[Array, "..."],
    mean_snr: Float[Array, "..."],
    floor: Real,
    max_wait_slots: int = MAX_WAIT_SLOTS,
) -> BlockStart:
    """Exact start of an upload under Rayleigh fading that is independent from slot to slot; uniforms on (0, 1).

    Slots in outage are skipped: their number is geometric, P(wait >= n) = p^n with p = `outage_probability`, its mean
    exp(floor / mean_snr) - 1. It is a whole number, cut at `max_wait_slots` (a link so weak that it waits longer is
    dead; the cut keeps times finite, and matters from floor / mean_snr = 7 on). By memorylessness the SNR in the
    starting slot is floor + mean_snr x Exp(1), whatever the wait was. The wait carries no gradient.
    """
    margin = floor / jnp.maximum(mean_snr, _LEAST_MEAN_SNR)
    near = margin < math.log(2.0)
    # ln(1 - exp(-m)) without loss at either end: p is close to 0 on good links, to 1 on bad ones.
    log_outage = jnp.where(near, jnp.log(-jnp.expm1(-margin)), jnp.log1p(-jnp.exp(-margin)))
    log_outage = jnp.minimum(log_outage, -jnp.finfo(margin.dtype).tiny)
    wait = jnp.minimum(jnp.floor(jnp.log(wait_uniform) / log_outage), max_wait_slots)
    return BlockStart(jax.lax.stop_gradient(wait), floor + mean_snr * rayleigh_power(fade_uniform))


def rate_bps(bandwidth_hz: Real, efficiency: Float[Array, "..."], efficiency_factor: Real = 1.0) -> Float[Array, "..."]:
    """Bits per second over a band at a spectral efficiency in bit/s/Hz.

    `efficiency_factor` is the share of the band and the time that carries data (`nr_efficiency_factor`, a TDD share).
    """
    return (bandwidth_hz * efficiency_factor) * efficiency


def nr_efficiency_factor(
    prbs: int, bandwidth_hz: float, *, overhead: float, tdd_share: float = 1.0, numerology: int = 1
) -> float:
    """Share of an NR carrier that carries data: resource elements per second and hertz, less the overhead.

    At 30 kHz spacing (numerology 1) 20 MHz have 51 and 100 MHz 273 resource blocks `prbs` (TS 38.101-1 Table 5.3.2-1).
    """
    return nr_rate_bps(prbs, 1.0, overhead=overhead, tdd_share=tdd_share, numerology=numerology) / bandwidth_hz


def nr_rate_bps(
    prbs: int, efficiency: float, *, overhead: float, tdd_share: float = 1.0, numerology: int = 1, layers: int = 1
) -> float:
    """NR data rate of a carrier of `prbs` resource blocks at a spectral efficiency in bit/s/Hz (TS 38.306 4.1.2)."""
    elements_per_s = _PRB_SUBCARRIERS * _SLOT_SYMBOLS * _SLOTS_PER_S * 2**numerology
    return layers * efficiency * prbs * elements_per_s * (1.0 - overhead) * tdd_share


def shared_bandwidth_hz(total_hz: Real, users: Float[Array, "..."]) -> Float[Array, "..."]:
    """Band of each of `users` that share a cell equally (OFDMA, equation (3)); the whole band where there is none."""
    return total_hz / jnp.maximum(users, 1.0)


def narrow_band_snr(full_band_snr: Float[Array, "..."], share: Real) -> Float[Array, "..."]:
    """Linear SNR when all the power goes on the share `share` of the band: it holds less noise.

    The SNR of an uplink so rises as 1/share. A server that serves all shares at once divides its power with the band,
    and its SNR stays.
    """
    return full_band_snr / share


def _ergodic_log1p(mean_snr: Float[Array, "..."], low: Real, top: float) -> Float[Array, "..."]:
    """E[ln(1 + min(Y, top)); Y >= low], Y exponential with mean `mean_snr`.

    By parts: P(Y >= low) ln(1 + low) + int_low^top P(Y > y) / (1 + y) dy, and by memorylessness
    int_a^inf exp(-y/g) / (1 + y) dy = exp(-a/g) mean_log1p_exponential(g / (1 + a)).
    """
    if isinstance(low, float) and low == 0.0:
        mean = mean_log1p_exponential(mean_snr)
    else:
        mean = _tail(mean_snr, low, jnp.log1p(jnp.minimum(low, top)))
    if top == math.inf:
        return mean
    # A floor above the cap leaves ln(1 + top) P(Y >= low): both integrals then start at the floor.
    return mean - _tail(mean_snr, _larger(top, low), 0.0)


def _tail(mean_snr: Float[Array, "..."], start: Real, offset: Real) -> Float[Array, "..."]:
    """P(Y >= start) offset + int_start^inf P(Y > y) / (1 + y) dy."""
    passing = jnp.exp(-start / jnp.maximum(mean_snr, _LEAST_MEAN_SNR))
    return passing * (offset + mean_log1p_exponential(mean_snr / (1.0 + start)))


def _above(floor: Real, snr: Float[Array, "..."], efficiency: Float[Array, "..."]) -> Float[Array, "..."]:
    """`efficiency` where `snr` reaches the floor, else 0."""
    if isinstance(floor, float) and floor == 0.0:
        return efficiency
    return jnp.where(snr >= floor, efficiency, 0.0)


def _ratio(value_db: float) -> float:
    """Static dB to a static ratio, exactly as numpy would."""
    return 10.0 ** (value_db / 10.0)


def _larger(static: float, value: Real) -> Real:
    """Maximum that stays a Python number where it can: a constant then costs nothing in the traced program."""
    return max(static, value) if isinstance(value, float) else jnp.maximum(static, value)


def _horner(coefficients: Sequence[float], x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Polynomial with the constant first."""
    result = jnp.full_like(x, coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        result = result * x + coefficient
    return result
