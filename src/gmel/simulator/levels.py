"""How a task is done at its place: with how many denoising steps, at which transmit power, in how many parts.

An action is one number, place + (1 + servers) x level, with level = number of the steps + count of the steps x (number
of the power + count of the powers x number of the split). Where nothing can be chosen there is one level, and an action
is a place.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from gmel.simulator.plant import Plant
from gmel.simulator.state import Requests

__all__ = ["Manner", "manner", "parts_of_level", "quality_of", "split_action"]


class Manner(NamedTuple):
    """What a level means for each request."""

    work: Float[Array, "requests"]
    """Nominal work, without the noise."""
    steps: Float[Array, "requests"] | None
    """Denoising steps; None where nobody asks."""
    quality: Float[Array, "requests qualities"] | None
    """Of the result, one column where it is the same everywhere; None where it is not modelled."""
    tx_power_w: Float[Array, "requests"] | None
    """None where it cannot be chosen."""
    power_ratio: Float[Array, "requests"] | None
    """Transmit power over the nominal one, likewise."""


def split_action(plant: Plant, action: Int[Array, "requests"]) -> tuple[Int[Array, "requests"], Int[Array, "requests"]]:
    """Place and level of an action."""
    sizes = plant.switches
    if sizes.levels == 1:
        return action, jnp.zeros_like(action)
    places = 1 + sizes.servers
    return action % places, jnp.minimum(action // places, sizes.levels - 1)


def manner(plant: Plant, requests: Requests, level: Int[Array, "requests"] | int) -> Manner:
    """What `level` means for each request; static where it is a number."""
    sizes = plant.switches
    work, steps = requests.work, requests.steps
    choices = len(sizes.step_options)
    if choices:
        assert steps is not None  # given with this switch
        assert requests.work_per_step is not None
        chosen = jnp.broadcast_to(jnp.asarray(sizes.step_options, work.dtype)[level % choices], steps.shape)
        work = work + (chosen - steps) * requests.work_per_step
        steps = chosen
    quality = None
    if sizes.quality:
        assert steps is not None  # given with this switch
        quality = quality_of(plant, requests.model, steps)
    if not sizes.power_options_dbm:
        return Manner(work, steps, quality, None, None)
    powers_w = 10 ** (0.1 * jnp.asarray(sizes.power_options_dbm, work.dtype) - 3)
    tx_power_w = jnp.broadcast_to(powers_w[level // max(1, choices) % len(sizes.power_options_dbm)], work.shape)
    return Manner(work, steps, quality, tx_power_w, tx_power_w / plant.device_tx_power_w)


def parts_of_level(plant: Plant, level: Int[Array, "requests"] | int) -> Int[Array, "..."]:
    """Over how many servers a task of `level` is split."""
    sizes = plant.switches
    return jnp.asarray(sizes.split_options or (1,), jnp.int32)[level // sizes.manners]


def quality_of(
    plant: Plant, model: Int[Array, "requests"], steps: Float[Array, "requests"]
) -> Float[Array, "requests qualities"]:
    """Quality of a result (equation (13)); between whole numbers of steps linear."""
    table = plant.catalogue.quality
    low = jnp.clip(jnp.floor(steps).astype(jnp.int32), 0, table.shape[2] - 2)
    part = jnp.clip(steps - low, 0.0, 1.0)
    return (table[:, model, low] * (1.0 - part) + table[:, model, low + 1] * part).T
