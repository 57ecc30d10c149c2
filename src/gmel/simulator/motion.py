"""Devices that move, and what changes with them and with time: places, large-scale links, small-scale fading."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt32

from gmel.physics import mobility
from gmel.physics.channel import doppler_hz, jakes_correlation
from gmel.physics.random import hash_bits, normal, uniform
from gmel.scenario.schema import Mobility
from gmel.simulator.links import draw_links, draw_positions_m, links_from, pair_numbers
from gmel.simulator.plant import Plant
from gmel.simulator.state import Links, Motion

__all__ = ["Scene", "first_scene", "next_scene", "positions_m"]

# What is drawn at slot 0 for links (`gmel.simulator.links`) is drawn here anew for every slot after it.
RNG_POSITIONS, RNG_SHADOWING, RNG_SMALL_SCALE = 2, 3, 7


class Scene(NamedTuple):
    """The links of a slot, and what the next ones follow from (None where nothing changes)."""

    links: Links
    motion: Motion | None


def first_scene(plant: Plant, seed: UInt32[Array, "2"]) -> Scene:
    """Places and links at the reset."""
    law, origin = plant.switches.mobility, jnp.zeros((), jnp.int32)
    if law is None:
        return Scene(_first_fading(plant, seed, draw_links(plant, seed)), None)
    numbers = jnp.arange(plant.switches.devices)
    walk, travelled_m, speed_m_s = None, None, None
    if law.kind == "waypoint":
        words = [hash_bits(seed, origin, RNG_POSITIONS, numbers + part * numbers.shape[0]) for part in (0, 1)]
        uniforms = jnp.stack([uniform(word) for bits in words for word in bits], axis=-1)
        walk = mobility.first_walk(uniforms, plant.switches.radio.hall_m, *_ranges(law))
        position_m = walk.position_m
    else:
        bits = hash_bits(seed, origin, RNG_POSITIONS, numbers)
        route = numbers % plant.route_m.shape[0]
        travelled_m = uniform(bits.x) * mobility.route_length_m(plant.route_m)[route]
        speed_m_s = law.speed_m_s.low + (law.speed_m_s.high - law.speed_m_s.low) * uniform(bits.y)
        position_m = mobility.route_position_m(plant.route_m, route, travelled_m)
    draw = hash_bits(seed, origin, RNG_SHADOWING, pair_numbers(plant))
    motion = Motion(position_m, normal(draw.x, draw.w), normal(draw.y, draw.z), walk, travelled_m, speed_m_s)
    return Scene(_first_fading(plant, seed, _links(plant, motion)), motion)


def next_scene(
    plant: Plant, seed: UInt32[Array, "2"], slot: Int[Array, ""], links: Links, motion: Motion | None
) -> Scene:
    """Places and links at the start of `slot`, a slot length after those given."""
    law = plant.switches.mobility
    after = links
    if law is not None and motion is not None:
        motion = _move(plant, law, seed, slot, motion)
        after = _links(plant, motion)
    if links.fading is None:
        return Scene(after, motion)
    spec = plant.switches.radio
    rho = jakes_correlation(doppler_hz(spec.fading_speed_m_s, spec.carrier_ghz), plant.slot_s)
    draw = hash_bits(seed, slot, RNG_SMALL_SCALE, pair_numbers(plant))
    parts = mobility.fading_step(*links.fading, rho, normal(draw.x, draw.y), normal(draw.z, draw.w))
    return Scene(after._replace(fading=parts), motion)


def _move(plant: Plant, law: Mobility, seed: UInt32[Array, "2"], slot: Int[Array, ""], before: Motion) -> Motion:
    numbers = jnp.arange(plant.switches.devices)
    walk, travelled_m = before.walk, before.travelled_m
    if walk is not None:
        uniforms = jnp.stack([uniform(word) for word in hash_bits(seed, slot, RNG_POSITIONS, numbers)], axis=-1)
        walk = mobility.walk(walk, plant.slot_s, uniforms, plant.switches.radio.hall_m, *_ranges(law))
        position_m = walk.position_m
    else:
        assert travelled_m is not None  # on a route
        assert before.speed_m_s is not None
        route = numbers % plant.route_m.shape[0]
        length_m = mobility.route_length_m(plant.route_m)[route]
        travelled_m = (travelled_m + before.speed_m_s * plant.slot_s) % jnp.maximum(length_m, 1e-6)
        position_m = mobility.route_position_m(plant.route_m, route, travelled_m)
    moved_m = jnp.sqrt(jnp.sum((position_m - before.position_m) ** 2, axis=-1))[:, None]
    draw = hash_bits(seed, slot, RNG_SHADOWING, pair_numbers(plant))
    # TR 38.901 Table 7.6.3.1-2: the state of sight is correlated over half the size of the clutter.
    sight_m = 0.5 * plant.switches.radio.clutter_size_m
    return Motion(
        position_m=position_m,
        sight=mobility.correlated_normal(before.sight, moved_m, normal(draw.x, draw.w), sight_m),
        shadow=mobility.correlated_normal(before.shadow, moved_m, normal(draw.y, draw.z)),
        walk=walk,
        travelled_m=travelled_m,
        speed_m_s=before.speed_m_s,
    )


def _links(plant: Plant, motion: Motion) -> Links:
    return links_from(plant, motion.position_m, mobility.normal_to_uniform(motion.sight), motion.shadow)


def _first_fading(plant: Plant, seed: UInt32[Array, "2"], links: Links) -> Links:
    if plant.switches.radio.fading != "ar1":
        return links
    draw = hash_bits(seed, jnp.zeros((), jnp.int32), RNG_SMALL_SCALE, pair_numbers(plant))
    return links._replace(fading=(normal(draw.x, draw.y), normal(draw.z, draw.w)))


def _ranges(law: Mobility) -> tuple[float, float, float, float]:
    return law.speed_m_s.low, law.speed_m_s.high, law.pause_s.low, law.pause_s.high


def positions_m(plant: Plant, seed: UInt32[Array, "2"]) -> Float[Array, "devices 2"]:
    """Where the devices are at the reset."""
    motion = first_scene(plant, seed).motion
    return draw_positions_m(plant, seed) if motion is None else motion.position_m
