"""How a task is done at its place: with how many denoising steps, at which transmit power, by which service.

An action is one number, place + (1 + servers) x level, with level = number of the steps + count of the steps x (number
of the power + count of the powers x number of the service). Where nothing can be chosen there is one level, and an
action is a place.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from gmel.simulator.plant import Plant
from gmel.simulator.state import Requests

__all__ = ["Chosen", "Manner", "chosen", "manner", "quality_of", "split_action"]

_Number = Int[Array, "requests"] | int


class Chosen(NamedTuple):
    """Numbers of what a level chooses, 0 where there is no choice."""

    steps: _Number
    power: _Number
    service: _Number


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


def chosen(plant: Plant, level: _Number) -> Chosen:
    """What a level chooses: its digits, those of the steps first."""
    steps, powers = (
        max(1, len(choices)) for choices in (plant.switches.step_options, plant.switches.power_options_dbm)
    )
    return Chosen(level % steps, level // steps % powers, level // (steps * powers))


def manner(plant: Plant, requests: Requests, level: _Number) -> Manner:
    """What `level` means for each request; static where it is a number."""
    sizes = plant.switches
    work, steps = requests.work, requests.steps
    number = chosen(plant, level)
    if sizes.step_options:
        assert steps is not None  # given with this switch
        assert requests.work_per_step is not None
        wanted = jnp.broadcast_to(jnp.asarray(sizes.step_options, work.dtype)[number.steps], steps.shape)
        work = work + (wanted - steps) * requests.work_per_step
        steps = wanted
    quality = None
    if sizes.quality:
        assert steps is not None  # given with this switch
        kind = requests.model
        if sizes.services > 1:
            kind = kind + number.service * plant.catalogue.memory_gb.shape[0]
        quality = quality_of(plant, kind, steps)
    if not sizes.power_options_dbm:
        return Manner(work, steps, quality, None, None)
    powers_w = 10 ** (0.1 * jnp.asarray(sizes.power_options_dbm, work.dtype) - 3)
    tx_power_w = jnp.broadcast_to(powers_w[number.power], work.shape)
    return Manner(work, steps, quality, tx_power_w, tx_power_w / plant.device_tx_power_w)


def quality_of(
    plant: Plant, kind: Int[Array, "requests"], steps: Float[Array, "requests"]
) -> Float[Array, "requests qualities"]:
    """Quality of a result (equation (13)) of a kind: its model and service; between whole numbers of steps linear."""
    table = plant.catalogue.quality
    low = jnp.clip(jnp.floor(steps).astype(jnp.int32), 0, table.shape[2] - 2)
    part = jnp.clip(steps - low, 0.0, 1.0)
    return (table[:, kind, low] * (1.0 - part) + table[:, kind, low + 1] * part).T
