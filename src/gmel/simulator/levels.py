"""How a task is done at its place: with how many denoising steps, at which transmit power, with what share, by which
service, in how many parts.

An action is one number, place + (1 + servers) x level. A level is a number of mixed radix: its digits are the numbers
of what is chosen of each factor (`Switches.factors`), the first factor is the fastest digit. Where nothing can be
chosen there is one level, and an action is a place.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from gmel.simulator.plant import Plant, Switches
from gmel.simulator.state import Requests

__all__ = ["Manner", "digits", "manner", "parts_of_level", "quality_of", "split_action"]

_Number = Int[Array, "requests"] | int


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
    band_weight: Float[Array, "requests"] | None = None
    """Weight of the upload in its cell; None where it cannot be chosen."""
    cpu_weight: Float[Array, "requests"] | None = None
    """Weight of the task where the server shares its time, likewise."""


def split_action(plant: Plant, action: Int[Array, "requests"]) -> tuple[Int[Array, "requests"], Int[Array, "requests"]]:
    """Place and level of an action."""
    sizes = plant.switches
    if sizes.levels == 1:
        return action, jnp.zeros_like(action)
    places = 1 + sizes.servers
    return action % places, jnp.minimum(action // places, sizes.levels - 1)


def manner(plant: Plant, requests: Requests, level: _Number) -> Manner:
    """What `level` means for each request; static where it is a number."""
    sizes = plant.switches
    work, steps = requests.work, requests.steps
    at = digits(sizes, level)

    def of(name: str, values: Float[Array, "choices"]) -> Float[Array, "requests"]:
        return jnp.broadcast_to(values[at[name]], work.shape)

    if sizes.step_options:
        assert steps is not None  # given with this switch
        assert requests.work_per_step is not None
        chosen = of("steps", jnp.asarray(sizes.step_options, work.dtype))
        work = work + (chosen - steps) * requests.work_per_step
        steps = chosen
    quality = None
    if sizes.quality:
        assert steps is not None  # given with this switch
        kind = requests.model
        if sizes.services > 1:
            kind = kind + at["service"] * plant.catalogue.memory_gb.shape[0]
        quality = quality_of(plant, kind, steps)
    tx_power_w = band_weight = cpu_weight = None
    if sizes.power_options_dbm:
        tx_power_w = of("power_dbm", 10 ** (0.1 * jnp.asarray(sizes.power_options_dbm, work.dtype) - 3))
    if sizes.band_weights:
        band_weight = of("band_weight", jnp.asarray(sizes.band_weights, work.dtype))
    if sizes.cpu_weights:
        cpu_weight = of("cpu_weight", jnp.asarray(sizes.cpu_weights, work.dtype))
    power_ratio = None if tx_power_w is None else tx_power_w / plant.device_tx_power_w
    return Manner(work, steps, quality, tx_power_w, power_ratio, band_weight, cpu_weight)


def digits(sizes: Switches, level: _Number) -> dict[str, _Number]:
    """Number of what is chosen of each factor; 0 of one that offers no choice."""
    found: dict[str, _Number] = {}
    for name, count in sizes.factors:
        found[name] = level % count
        level = level // count
    return found


def parts_of_level(plant: Plant, level: _Number) -> Int[Array, "..."]:
    """Over how many servers a task of `level` is split."""
    sizes = plant.switches
    return jnp.asarray(sizes.split_options or (1,), jnp.int32)[digits(sizes, level)["split"]]


def quality_of(
    plant: Plant, kind: Int[Array, "requests"], steps: Float[Array, "requests"]
) -> Float[Array, "requests qualities"]:
    """Quality of a result (equation (13)) of a kind: its model and service; between whole numbers of steps linear."""
    table = plant.catalogue.quality
    low = jnp.clip(jnp.floor(steps).astype(jnp.int32), 0, table.shape[2] - 2)
    part = jnp.clip(steps - low, 0.0, 1.0)
    return (table[:, kind, low] * (1.0 - part) + table[:, kind, low + 1] * part).T
