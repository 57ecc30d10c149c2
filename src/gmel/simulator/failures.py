"""Failures of servers: which are up, and how fast each is, slot by slot."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt32

from gmel.physics.random import hash_bits, uniform
from gmel.simulator.plant import Plant

__all__ = ["next_speed"]

RNG_FAILURES = 14


def next_speed(
    plant: Plant, seed: UInt32[Array, "2"], slot: Int[Array, ""], speed: Float[Array, "servers"]
) -> Float[Array, "servers"]:
    """Relative speed of each server in `slot` from that in the slot before (0: down).

    A two-state Markov chain: a server that is up fails with probability 1 - exp(-slot / mean up time), one that is down
    is repaired likewise, so both times are geometric with at least one slot. Independent of what the servers do.
    """
    failures = plant.switches.failures
    if failures is None:
        return jnp.ones_like(speed)
    bits = hash_bits(seed, slot, RNG_FAILURES, jnp.arange(plant.switches.servers))
    up = speed > 0
    if failures.mean_up_s is not None:
        fails = 1.0 - jnp.exp(-plant.slot_s / failures.mean_up_s)
        repaired = 1.0 - jnp.exp(-plant.slot_s / failures.mean_down_s)
        up = uniform(bits.x) < jnp.where(up, 1.0 - fails, repaired)
    slow = uniform(bits.y) < failures.straggle
    return jnp.where(up, jnp.where(slow, failures.straggle_speed, 1.0), 0.0).astype(speed.dtype)
