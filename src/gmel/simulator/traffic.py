"""Requests: drawn at random, read from a trace, or given as arrays."""

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt32

from gmel.physics.random import Bits, hash_bits, normal, uniform
from gmel.simulator.arrivals import Arrived, draw_arrivals
from gmel.simulator.links import draw_fading
from gmel.simulator.plant import Plant, pick
from gmel.simulator.state import Links, Requests

__all__ = ["TraceArrays", "load_time_s", "next_requests"]

RNG_REQUEST, RNG_CONTENT, RNG_DEADLINE, RNG_NOISE, RNG_LOAD = 9, 10, 11, 12, 13


class TraceArrays(eqx.Module):
    """A request trace cut into slots (see `gmel.scenario.slots.slot_table`)."""

    present: Bool[Array, "*slots requests"]
    device: Int[Array, "*slots requests"]
    generated_s: Float[Array, "*slots requests"]
    size_bit: Float[Array, "*slots requests"]
    bits_out: Float[Array, "*slots requests"]
    work: Float[Array, "*slots requests"]
    model: Int[Array, "*slots requests"]
    deadline_s: Float[Array, "*slots requests"]
    steps: Float[Array, "*slots requests"] | None = None
    work_per_step: Float[Array, "*slots requests"] | None = None
    gang: Int[Array, "*slots requests"] | None = None


def next_requests(
    plant: Plant,
    trace: TraceArrays | None,
    seed: UInt32[Array, "2"],
    slot: Int[Array, ""],
    trace_slot: Int[Array, ""],
    links: Links,
    memory: Float[Array, ""] | None,
) -> tuple[Requests, Float[Array, ""] | None]:
    """The requests that are decided at the start of `slot`, and what the arrivals then remember.

    They came in the slot before, or at the slot start itself where the scenario counts latency from the decision. A
    trace starts again at its end.
    """
    sizes = plant.switches
    rows = jnp.arange(sizes.requests, dtype=jnp.int32)
    if trace is None:
        drawn, memory = _draw(plant, seed, slot, rows, memory)
    else:
        at = trace_slot % trace.present.shape[0]
        drawn = TraceArrays(
            present=trace.present[at],
            device=trace.device[at],
            generated_s=trace.generated_s[at],
            size_bit=trace.size_bit[at],
            bits_out=trace.bits_out[at],
            work=trace.work[at],
            model=trace.model[at],
            deadline_s=trace.deadline_s[at],
            steps=None if trace.steps is None else trace.steps[at],
            work_per_step=None if trace.work_per_step is None else trace.work_per_step[at],
            gang=None if trace.gang is None else trace.gang[at],
        )
    fade, outage_s = draw_fading(plant, seed, slot, drawn.device, links.uplink_snr[drawn.device], links.fading)
    one = jnp.ones_like(drawn.work)
    noise = one
    if sizes.noise:
        bits = hash_bits(seed, slot, RNG_NOISE, rows)
        noise = jnp.exp(plant.noise_sigma * normal(bits.x, bits.y))
    load_s = 0.0 * one
    if sizes.switching:
        load_s = load_time_s(plant, hash_bits(seed, slot, RNG_LOAD, rows), drawn.model)
    requests = Requests(
        present=drawn.present,
        device=drawn.device,
        generated_s=0.0 * one if sizes.at_slot_start else drawn.generated_s,
        size_bit=drawn.size_bit,
        bits_out=drawn.bits_out,
        work=drawn.work,
        noise=noise,
        model=drawn.model,
        load_s=load_s,
        deadline_s=drawn.deadline_s,
        fade=fade,
        outage_s=outage_s,
        steps=drawn.steps,
        work_per_step=drawn.work_per_step,
        gang=drawn.gang,
    )
    return requests, memory


def _draw(
    plant: Plant,
    seed: UInt32[Array, "2"],
    slot: Int[Array, ""],
    rows: Int[Array, "requests"],
    memory: Float[Array, ""] | None,
) -> tuple[TraceArrays, Float[Array, ""] | None]:
    """Drawn requests: when they come (`gmel.simulator.arrivals`), from whom, and what they ask for.

    Poisson arrivals of the whole plant, each from a device drawn by its weight, have the same law as an independent
    Poisson process per device (splitting), at the cost of the requests alone.
    """
    sizes, catalogue = plant.switches, plant.catalogue
    bits = hash_bits(seed, slot, RNG_REQUEST, rows)
    asked, work_per_step, gang = None, None, None
    arrived: Arrived = draw_arrivals(
        sizes.arrivals, plant.arrivals, seed, slot, plant.slot_s, uniform(bits.y), sizes.devices, memory
    )
    if sizes.catalogue:
        content = hash_bits(seed, slot, RNG_CONTENT, rows)
        model = pick(catalogue.model_cdf, uniform(content.x))
        steps = _entry(catalogue.steps, catalogue.steps_cdf, model, uniform(content.y))
        images = _entry(catalogue.images, catalogue.images_cdf, model, uniform(content.z))
        step_work = catalogue.step_work_low[model]
        if sizes.step_work_varies:
            step_work = step_work + (catalogue.step_work_high[model] - step_work) * uniform(content.w)
        work = images * (catalogue.fixed_work[model] + steps * (step_work + steps * catalogue.square_work[model]))
        asked = steps if sizes.asks_steps else None
        if sizes.discipline == "gang":
            gang = pick(catalogue.gang_cdf[model], uniform(hash_bits(seed, slot, RNG_DEADLINE, rows).y))
        work_per_step = images * step_work if sizes.step_options else None
        low, high = catalogue.bits_low[model], catalogue.bits_high[model]
        bits_out = images * catalogue.bits_out[model]
    else:
        model = jnp.zeros_like(rows)
        work = plant.work_low + (plant.work_high - plant.work_low) * uniform(bits.z)
        low, high = catalogue.bits_low[0], catalogue.bits_high[0]
        bits_out = jnp.broadcast_to(catalogue.bits_out[0], work.shape)
    size_bit = low + (high - low) * uniform(bits.w)
    if sizes.bit_work:
        density = catalogue.bit_work_low[model]
        density = density + (catalogue.bit_work_high[model] - density) * uniform(bits.z)
        work = work + size_bit * density
    deadline_s = jnp.broadcast_to(plant.deadline_low_s, work.shape)
    if sizes.deadline_varies:
        u = uniform(hash_bits(seed, slot, RNG_DEADLINE, rows).x)
        deadline_s = plant.deadline_low_s + (plant.deadline_high_s - plant.deadline_low_s) * u
    drawn = TraceArrays(
        present=arrived.present,
        device=pick(plant.device_cdf, uniform(bits.x)) if arrived.device is None else arrived.device,
        generated_s=arrived.generated_s,
        size_bit=size_bit,
        bits_out=bits_out,
        work=work,
        model=model,
        deadline_s=deadline_s,
        steps=asked,
        work_per_step=work_per_step,
        gang=gang,
    )
    return drawn, arrived.memory


def load_time_s(plant: Plant, bits: Bits, model: Int[Array, "..."]) -> Float[Array, "..."]:
    """Bimodal log-normal load time of a model (warm or cold)."""
    catalogue = plant.catalogue
    warm = uniform(bits.x) < catalogue.load_warm_share[model]
    median_s = jnp.where(warm, catalogue.load_warm_s[model], catalogue.load_cold_s[model])
    return median_s * jnp.exp(catalogue.load_sigma[model] * normal(bits.y, bits.z))


def _entry(
    values: Float[Array, "models choices"],
    cdf: Float[Array, "models choices"],
    model: Int[Array, "requests"],
    u: Float[Array, "requests"],
) -> Float[Array, "requests"]:
    return jnp.take_along_axis(values[model], pick(cdf[model], u)[:, None], axis=1)[:, 0]
