"""What the devices are, what they have heard and what they remember."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt32

from gmel.physics.random import hash_bits, uniform
from gmel.simulator.plant import Plant
from gmel.simulator.state import Requests, Sent, Uploads

__all__ = ["device_speed", "discharge", "first_battery_j", "heard_age", "nothing_sent", "remember", "sent_unseen_s"]

RNG_DEVICES, RNG_BROADCASTS = 5, 6

_SMALL_TABLE = 2048


def device_speed(plant: Plant, seed: UInt32[Array, "2"], device: Int[Array, "rows"]) -> Float[Array, "rows"]:
    """Work units per second of each device, the same for a whole episode."""
    low = jnp.broadcast_to(plant.device_speed_low, device.shape)
    if not plant.switches.device_speed_varies:
        return low
    u = uniform(hash_bits(seed, jnp.zeros((), jnp.int32), RNG_DEVICES, device).x)
    return low + (plant.device_speed_high - low) * u


def first_battery_j(plant: Plant, seed: UInt32[Array, "2"]) -> Float[Array, "devices"] | None:
    """Energy in each battery at the reset; None where devices have a line."""
    law = plant.switches.battery_j
    if law is None:
        return None
    devices = jnp.arange(plant.switches.devices)
    u = uniform(hash_bits(seed, jnp.zeros((), jnp.int32), RNG_DEVICES, devices).y)
    return law.low + (law.high - law.low) * u


def discharge(
    plant: Plant, battery_j: Float[Array, "devices"], requests: Requests, spent_j: Float[Array, "requests"]
) -> Float[Array, "devices"]:
    """Batteries a slot later. What a task will take is taken when it is decided, as projected then."""
    taken_j = jnp.where(requests.present, spent_j, 0.0)
    after_j = battery_j.at[requests.device].add(-taken_j) - plant.switches.standby_power_w * plant.slot_s
    return jnp.maximum(after_j, 0.0)


def heard_age(plant: Plant, seed: UInt32[Array, "2"], slot: Int[Array, ""]) -> Int[Array, "servers"] | int:
    """Age in slots of the last broadcast of each server that was heard; static where none is lost.

    Whether one is lost depends on its slot and server alone. A server that was silent for as long as anybody looks
    back is known by the oldest broadcast.
    """
    sizes = plant.switches
    if not sizes.broadcast_loss:
        return sizes.age
    ages = sizes.age + jnp.arange(sizes.heard_ages)
    # Before the reset nothing was lost.
    said = jnp.maximum(slot - ages, 0)
    servers = jnp.arange(sizes.servers)
    number = said[:, None] * sizes.servers + servers[None, :]
    draw = hash_bits(seed, jnp.zeros((), jnp.int32), RNG_BROADCASTS, number % 2**24)
    heard = (uniform(draw.x) >= sizes.broadcast_loss) | (slot <= ages)[:, None]
    first = jnp.argmax(heard, axis=0)
    return sizes.age + jnp.where(jnp.any(heard, axis=0), first, sizes.heard_ages - 1)


def nothing_sent(ages: int, requests: int, servers: int, dtype: jnp.dtype) -> Sent:
    """The memory of devices that have sent nothing yet."""
    empty = jnp.zeros((ages, requests), jnp.int32)
    return Sent(empty, empty + servers, jnp.zeros((ages, requests), dtype))


def remember(
    plant: Plant, before: Sent, noise: Float[Array, "rows"], rows: Uploads, local: Bool[Array, "rows"]
) -> Sent:
    """What was sent in this slot, in front of what was sent before: tasks, or their parts. A device knows the nominal
    work, not the noise."""
    if not before.device.shape[0]:
        return before
    sent = rows.present & ~local
    now = Sent(
        rows.device,
        jnp.where(sent, rows.server, plant.switches.servers),
        jnp.where(sent, rows.service_s / noise, 0.0),
    )
    return Sent(*(jnp.concatenate([new[None], old[:-1]]) for new, old in zip(now, before, strict=True)))


def sent_unseen_s(
    plant: Plant, sent: Sent, device: Int[Array, "requests"], age: Int[Array, "servers"] | int
) -> Float[Array, "requests servers"]:
    """Service time that the device of each request sent to each server since its last broadcast that was heard."""
    sizes = plant.switches
    unseen_s = sent.nominal_s
    if not isinstance(age, int):
        ages = jnp.arange(unseen_s.shape[0])[:, None]
        unseen_s = jnp.where(ages < age[jnp.minimum(sent.server, sizes.servers - 1)], unseen_s, 0.0)
    if sizes.devices * sizes.servers <= _SMALL_TABLE:
        table = jnp.zeros((sizes.devices, sizes.servers), unseen_s.dtype)
        return table.at[sent.device, sent.server].add(unseen_s, mode="drop")[device]
    # The table of a large plant costs more than to compare all requests with each other.
    to = (sent.server.reshape(-1)[:, None] == jnp.arange(sizes.servers)) * unseen_s.reshape(-1)[:, None]
    own = sent.device.reshape(-1)[None, :] == device[:, None]
    return own.astype(to.dtype) @ to
