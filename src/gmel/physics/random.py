"""Random numbers as a function of where they are used: a counter-based generator.

Every draw is a hash of (seed, slot, what, index), so a quantity does not depend on how many others were drawn before
it: traffic is common to all policies, nothing is drawn that nobody needs, and any number of environments run in
parallel with the same result. The hash is PCG4D (Jarzynski and Olano, "Hash Functions for GPU Rendering", JCGT 9(3),
2020): four 32-bit words in, four out, about thirty integer instructions (threefry needs about a hundred for two).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt32

__all__ = ["Bits", "hash_bits", "mix_seed", "normal", "seed_words", "uniform"]


class Bits(NamedTuple):
    """Four independent words of 32 random bits, each of the shape of the index."""

    x: UInt32[Array, "..."]
    y: UInt32[Array, "..."]
    z: UInt32[Array, "..."]
    w: UInt32[Array, "..."]


def seed_words(seed: int) -> UInt32[np.ndarray, "2"]:
    """The two words of a 64-bit seed."""
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed = {seed} must be in [0, 2**64)")
    return np.array([seed & 0xFFFFFFFF, seed >> 32], dtype=np.uint32)


def hash_bits(
    seed: UInt32[Array, "2"], slot: Int[Array, ""], what: int, index: Int[Array, "..."] | UInt32[Array, "..."]
) -> Bits:
    """128 random bits for each index.

    Args:
        seed: two words, mixed (:func:`mix_seed`).
        slot: slot number (any 32-bit counter).
        what: number of the quantity, in [0, 16).
        index: which one of them, in [0, 2**24).
    """
    tag = jnp.asarray(index).astype(jnp.uint32) + jnp.uint32(what << 24)
    x = jnp.broadcast_to(tag, jnp.shape(index))
    y = jnp.broadcast_to(slot.astype(jnp.uint32), x.shape)
    z = jnp.broadcast_to(seed[0], x.shape)
    w = jnp.broadcast_to(seed[1], x.shape)
    return _pcg4d(x, y, z, w)


def mix_seed(seed: UInt32[Array, "2"]) -> UInt32[Array, "2"]:
    """Seed words in which every bit depends on every bit given (the finaliser of MurmurHash3, crosswise).

    The hash below carries differences upward, from low bits to high ones: seeds that differ in high bits alone would
    give correlated streams. Done once for an environment.
    """
    first = _finalise(seed[0])
    second = _finalise(seed[1] ^ first)
    return jnp.stack([_finalise(first ^ second), second])


def uniform(bits: UInt32[Array, "..."]) -> Float[Array, "..."]:
    """Uniform on the open interval (0, 1): never 0 or 1, so that its logarithm is finite.

    23 bits, centred in their cells, are exact in float32 and in float64.
    """
    dtype = jnp.result_type(float)
    return ((bits >> 9).astype(dtype) + 0.5) * 2.0**-23


def normal(first: UInt32[Array, "..."], second: UInt32[Array, "..."]) -> Float[Array, "..."]:
    """Standard normal by the Box-Muller transform of two words."""
    radius = jnp.sqrt(-2.0 * jnp.log(uniform(first)))
    return radius * jnp.cos(2.0 * jnp.pi * uniform(second))


def _pcg4d(x: jax.Array, y: jax.Array, z: jax.Array, w: jax.Array) -> Bits:
    multiplier, increment = jnp.uint32(1664525), jnp.uint32(1013904223)
    x, y, z, w = (v * multiplier + increment for v in (x, y, z, w))
    x, y, z, w = _mix(x, y, z, w)
    x, y, z, w = (v ^ (v >> 16) for v in (x, y, z, w))
    return Bits(*_mix(x, y, z, w))


def _finalise(word: UInt32[Array, ""]) -> UInt32[Array, ""]:
    word = (word ^ (word >> 16)) * jnp.uint32(0x85EBCA6B)
    word = (word ^ (word >> 13)) * jnp.uint32(0xC2B2AE35)
    return word ^ (word >> 16)


def _mix(x: jax.Array, y: jax.Array, z: jax.Array, w: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    x = x + y * w
    y = y + z * x
    z = z + x * y
    w = w + y * z
    return x, y, z, w
