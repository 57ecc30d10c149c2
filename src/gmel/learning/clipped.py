"""Parts that policy-gradient learners share: advantages over slots, standardising, entropy, packing of the rows in use.

Pure functions on masked tables; rows that are absent count nothing, in the value and in the gradient.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from gmel.learning.algorithm import Task
from gmel.learning.networks import packing
from gmel.simulator.state import Observation

__all__ = ["entropy", "generalised_advantage", "pack", "row_capacity", "standardise"]


def generalised_advantage(
    reward: Float[Array, "slots environments"],
    value: Float[Array, "slots environments"],
    last: Float[Array, "environments"],
    discount: float,
    decay: float,
) -> Float[Array, "slots environments"]:
    """Generalised advantage estimation over the slots (Schulman et al. 2015, arXiv 1506.02438, equation (16))."""

    def back(
        carry: tuple[jax.Array, jax.Array], slot: tuple[jax.Array, jax.Array]
    ) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
        advantage, following = carry
        now, here = slot
        advantage = now + discount * following - here + discount * decay * advantage
        return (advantage, here), advantage

    return jax.lax.scan(back, (jnp.zeros_like(last), last), (reward, value), reverse=True)[1]


def standardise(values: Float[Array, "*batch"], present: Bool[Array, "*batch"]) -> Float[Array, "*batch"]:
    """Zero mean and unit variance over the rows that are present."""
    count = jnp.maximum(jnp.sum(present), 1)
    mean = jnp.sum(jnp.where(present, values, 0.0)) / count
    variance = jnp.sum(jnp.where(present, (values - mean) ** 2, 0.0)) / count
    return (values - mean) / (jnp.sqrt(variance) + 1e-6)


def entropy(logits: Float[Array, "*batch options"]) -> Float[Array, "*batch"]:
    """Entropy of the softmax; masked options (minus infinity) count nothing, also in the gradient."""
    allowed = jnp.isfinite(logits)
    log = jnp.where(allowed, jax.nn.log_softmax(logits), 0.0)
    return -jnp.sum(jnp.where(allowed, jnp.exp(log) * log, 0.0), axis=-1)


def row_capacity(task: Task, slots: int) -> int:
    """Rows that hold the requests of so many slots but for rare peaks (six standard deviations of a Poisson count)."""
    mean = task.requests_per_slot * slots
    table = slots * task.environment.requests
    return (
        int(min(table, mean + 6 * mean**0.5 + 8))
        if task.environment.trace is None
        else int(min(table, 1.5 * mean + 64))
    )


def pack(
    rows: tuple[Observation, jax.Array, jax.Array, jax.Array], present: Bool[Array, "slots requests"], capacity: int
) -> tuple[Observation, jax.Array, jax.Array, jax.Array, Bool[Array, "rows"]]:
    """The rows that are present, packed to the front of a table of `capacity` rows."""
    packed = jax.tree.map(packing(present, capacity).pack, rows)
    return (*packed, jnp.arange(capacity) < jnp.sum(present))
