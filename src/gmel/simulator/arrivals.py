"""When requests come: how many in each slot, from whom, and when exactly."""

from typing import NamedTuple

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt32
from scipy import stats

from gmel.physics.random import hash_bits, uniform
from gmel.scenario.errors import InputError
from gmel.scenario.schema import Arrivals, Scenario

__all__ = ["ArrivalLaws", "Arrived", "arrival_laws", "draw_arrivals", "first_memory", "request_capacity"]

RNG_COUNT, RNG_MODULATION = 8, 15

# A count above this share of its law is cut off: below the resolution of a 23-bit uniform number.
_TAIL = 2.0**-23
_MOST_ROWS = 20_000
_QUANTILES = 4096


class ArrivalLaws(eqx.Module):
    """Constants of the arrivals; what the kind does not use has no entries."""

    count_cdf: Float[Array, "counts"]
    """P(count <= k), k = 0, 1, ...: of the whole plant in a slot (Poisson and MMPP, at the highest rate), or of one
    device (Bernoulli, uniform)."""
    interval_s: Float[Array, "quantiles"]
    """Quantiles of the time between requests at even steps of the probability (Gamma)."""
    burst_ratio: Float[Array, ""]
    quiet_ends: Float[Array, ""]
    burst_ends: Float[Array, ""]
    """Probability that a quiet time (a burst) is over at a slot start (MMPP)."""


class Arrived(NamedTuple):
    """The requests of a slot. `generated_s`: relative to the decision. `device` is None where it is drawn by weight."""

    present: Bool[Array, "requests"]
    generated_s: Float[Array, "requests"]
    device: Int[Array, "requests"] | None
    memory: Float[Array, ""] | None


def request_capacity(scenario: Scenario) -> int:
    """Rows of the request table: enough for all but one slot in eight million.

    Raises:
        InputError: the table would be unreasonably large.
    """
    arrivals, rate = scenario.arrivals, scenario.arrival_rate_per_s
    if arrivals.max_per_slot is not None:
        return arrivals.max_per_slot
    assert rate is not None  # Arrivals demands it where requests are drawn
    slot_s, devices = scenario.slot.length_s, scenario.devices.count
    mean = rate * slot_s * _peak(arrivals, slot_s)
    if mean > _MOST_ROWS:
        raise InputError(
            f"arrivals: {mean:.3g} requests per slot of {slot_s:g} s; at most {_MOST_ROWS:,}: "
            "lower arrivals.load or arrivals.rate_per_s, or shorten slot.length_s"
        )
    match arrivals.kind:
        case "bernoulli":
            most = stats.binom.isf(_TAIL, devices * (arrivals.places or 1), scenario.request_probability)
        case "uniform":
            assert arrivals.count is not None  # guaranteed by Arrivals
            low, high = arrivals.count
            spread = np.sqrt(devices * ((high - low + 1) ** 2 - 1) / 12.0)
            most = min(devices * high, np.ceil(mean + 6.0 * spread) + high)
        case "gamma":
            most = _most_renewals(arrivals.cv or 1.0, mean)
        case _:
            most = stats.poisson.isf(_TAIL, mean)
    return max(1, int(most))


def arrival_laws(scenario: Scenario, rows: int) -> ArrivalLaws:
    """Constants of the arrivals of a scenario with a table of `rows` requests."""
    arrivals, slot_s = scenario.arrivals, scenario.slot.length_s
    rate = scenario.arrival_rate_per_s or 0.0
    count_cdf, interval_s = np.zeros(0), np.zeros(0)
    match arrivals.kind:
        case "poisson" | "mmpp" | "trace":
            count_cdf = stats.poisson.cdf(np.arange(rows), rate * slot_s * _peak(arrivals, slot_s))
        case "bernoulli":
            places = arrivals.places or 1
            count_cdf = stats.binom.cdf(np.arange(places), places, scenario.request_probability)
        case "uniform":
            assert arrivals.count is not None  # guaranteed by Arrivals
            low, high = arrivals.count
            count_cdf = np.clip(np.arange(high) + 1 - low, 0, None) / (high - low + 1)
        case "gamma":
            interval_s = _gamma_quantiles(arrivals.cv or 1.0) / rate
    quiet_ends, burst_ends = _changes(arrivals, slot_s)

    def array(value: object) -> Float[Array, "..."]:
        return jnp.asarray(np.asarray(value, dtype=float))

    return ArrivalLaws(
        count_cdf=array(count_cdf),
        interval_s=array(interval_s),
        burst_ratio=array(arrivals.burst.ratio if arrivals.burst else 1.0),
        quiet_ends=array(quiet_ends),
        burst_ends=array(burst_ends),
    )


def first_memory(arrivals: Arrivals) -> Float[Array, ""] | None:
    """What the arrivals remember at the reset: MMPP begins quiet, Gamma with a request. None: nothing."""
    return jnp.zeros(()) if arrivals.kind in ("mmpp", "gamma") else None


def draw_arrivals(
    arrivals: Arrivals,
    laws: ArrivalLaws,
    seed: UInt32[Array, "2"],
    slot: Int[Array, ""],
    slot_s: Float[Array, ""],
    within: Float[Array, "requests"],
    devices: int,
    memory: Float[Array, ""] | None,
) -> Arrived:
    """The requests that are decided at the start of `slot`: those that came in the slot before.

    Args:
        arrivals: the law (static).
        laws: its constants.
        seed: of the environment.
        slot: number of the slot.
        slot_s: its length in seconds.
        within: a uniform number for each row of the table: where in the slot its request came, unless the law says.
        devices: how many (static).
        memory: what the law remembers: of MMPP 1 in a burst and 0 else, of Gamma the time from the start of the last
        slot
            to its first request.
    """
    rows = jnp.arange(within.shape[0], dtype=jnp.int32)
    generated_s = -within * slot_s
    if arrivals.per_device:
        words = hash_bits(seed, slot, RNG_COUNT, jnp.arange(devices, dtype=jnp.int32))
        counts = jnp.sum(uniform(words.x)[:, None] > laws.count_cdf[None, :], axis=1)
        up_to = jnp.cumsum(counts)
        device = jnp.searchsorted(up_to, rows, side="right").astype(jnp.int32)
        return Arrived(rows < up_to[-1], generated_s, jnp.minimum(device, devices - 1), None)
    if arrivals.kind == "gamma":
        assert memory is not None  # given with this kind
        return _renewals(laws, seed, slot, slot_s, rows, memory)
    count = jnp.sum(uniform(hash_bits(seed, slot, RNG_COUNT, jnp.zeros((), jnp.int32)).x) > laws.count_cdf)
    present = rows < count
    # Thinning (Lewis and Shedler 1979): requests drawn at the highest rate are kept in proportion to the rate.
    kept = jnp.ones_like(within)
    if arrivals.kind == "mmpp":
        assert memory is not None  # given with this kind
        turn = uniform(hash_bits(seed, slot, RNG_MODULATION, jnp.asarray(rows.shape[0], jnp.int32)).x)
        in_burst = jnp.where(memory > 0, turn >= laws.burst_ends, turn < laws.quiet_ends)
        memory = in_burst.astype(memory.dtype)
        kept = jnp.where(in_burst, kept, kept / laws.burst_ratio)
    if arrivals.day is not None:
        amplitude, period_s = arrivals.day.amplitude, arrivals.day.period_s
        # Whole periods go first: the sine of a large float32 number is noise.
        now = (slot.astype(slot_s.dtype) * (slot_s / period_s)) % 1.0 + generated_s / period_s
        kept = kept * (1.0 + amplitude * jnp.sin(2.0 * jnp.pi * now)) / (1.0 + amplitude)
    if arrivals.kind == "mmpp" or arrivals.day is not None:
        present = present & (uniform(hash_bits(seed, slot, RNG_MODULATION, rows).y) < kept)
    return Arrived(present, generated_s, None, memory)


def _renewals(
    laws: ArrivalLaws,
    seed: UInt32[Array, "2"],
    slot: Int[Array, ""],
    slot_s: Float[Array, ""],
    rows: Int[Array, "requests"],
    first_s: Float[Array, ""],
) -> Arrived:
    """Requests with independent Gamma intervals; what comes after the slot is the memory of the next."""
    u = uniform(hash_bits(seed, slot, RNG_COUNT, rows).x)
    # The quantile function, linear between its steps.
    place = u * (_QUANTILES - 1)
    low = jnp.floor(place).astype(jnp.int32)
    step = place - low
    interval_s = laws.interval_s[low] * (1.0 - step) + laws.interval_s[low + 1] * step
    after_s = first_s + jnp.cumsum(interval_s)
    at_s = jnp.concatenate([first_s[None], after_s[:-1]])
    present = at_s < slot_s
    count = jnp.sum(present)
    # A table that is full cuts the rest off.
    next_s = jnp.where(count > 0, after_s[jnp.maximum(count, 1) - 1], first_s)
    return Arrived(present, jnp.minimum(at_s - slot_s, 0.0), None, jnp.maximum(next_s - slot_s, 0.0))


def _gamma_quantiles(cv: float) -> Float[np.ndarray, "quantiles"]:
    """Quantiles of a Gamma law of mean 1 at even steps, so that linear interpolation between them has mean 1
    exactly."""
    shape = cv**-2
    quantile = stats.gamma.ppf(np.linspace(0.0, 1.0, _QUANTILES), shape, scale=1.0 / shape)
    # The last step ends at its conditional mean in place of infinity.
    tail = 1.0 / (_QUANTILES - 1)
    beyond = stats.gamma.sf(quantile[-2], shape + 1.0, scale=1.0 / shape) / tail
    quantile[-1] = 2.0 * beyond - quantile[-2]
    return quantile / np.mean(0.5 * (quantile[1:] + quantile[:-1]))


def _most_renewals(cv: float, mean: float) -> float:
    """Number of renewals that a slot with `mean` expected ones has at most, but for `_TAIL`."""
    # n requests leave n - 1 whole intervals in the slot.
    whole = np.arange(int(mean * 4 + 40 * max(1.0, cv) ** 2 + 40))
    shape = cv**-2
    probability = stats.gamma.cdf(mean, np.maximum(whole, 1) * shape, scale=1.0 / shape)
    return float(np.argmax((whole > 0) & (probability < _TAIL)) or whole[-1]) + 1


def _changes(arrivals: Arrivals, slot_s: float) -> tuple[float, float]:
    burst = arrivals.burst
    if burst is None:
        return 0.0, 0.0
    return -np.expm1(-slot_s / burst.mean_quiet_s), -np.expm1(-slot_s / burst.mean_burst_s)


def _peak(arrivals: Arrivals, slot_s: float) -> float:
    """The highest rate over the mean rate."""
    peak = 1.0 if arrivals.day is None else 1.0 + arrivals.day.amplitude
    if arrivals.burst is not None:
        quiet_ends, burst_ends = _changes(arrivals, slot_s)
        share = quiet_ends / (quiet_ends + burst_ends)
        peak *= arrivals.burst.ratio / (1.0 + (arrivals.burst.ratio - 1.0) * share)
    return peak
