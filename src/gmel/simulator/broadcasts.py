"""What the servers say at every slot start; devices hear it later (`slot.broadcast_age_slots`)."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from gmel.physics.presence import Stays, next_present_s, present
from gmel.physics.queueing import Servers
from gmel.simulator.plant import Plant
from gmel.simulator.presence import NEVER_S, stays_at
from gmel.simulator.sending import interference_in_flight
from gmel.simulator.state import Broadcasts, GangNews, Gangs, State, Uploads
from gmel.simulator.uploads import in_cells, on_their_way

__all__ = ["announce", "first_broadcasts"]


def first_broadcasts(plant: Plant, servers: Servers, ages: int) -> Broadcasts:
    """What has been said when an episode begins: everything is empty, and who is away has been."""
    sizes, dtype = plant.switches, servers.free_s.dtype
    shape = (ages, sizes.servers)
    stays = stays_at(plant.presence, jnp.zeros((), jnp.int32), plant.slot_s)
    wait_s = _next_start_s(stays, jnp.zeros(sizes.servers, dtype))
    up = None if sizes.failures is None else jnp.ones(sizes.servers, bool)
    gangs = None
    if sizes.discipline == "gang":
        none = jnp.zeros((*shape, servers.free_s.shape[1]), jnp.int32)
        free_s = _gpus_next_start_s(stays, jnp.sort(servers.free_s, axis=1))
        gangs = GangNews(jnp.broadcast_to(free_s, none.shape), none, none - 1)
    up = _and_present(up, stays)
    return Broadcasts(
        wait_s=jnp.broadcast_to(wait_s, shape),
        uploads=jnp.zeros(shape, dtype),
        resident=jnp.broadcast_to(servers.resident, (ages, *servers.resident.shape)),
        up=None if up is None else jnp.broadcast_to(up, shape),
        gangs=gangs,
        weight=jnp.zeros(shape, dtype) if sizes.cpu_weights else None,
        interference=jnp.zeros(shape, dtype) if sizes.radio.interference else None,
    )


def announce(
    plant: Plant,
    before: State,
    servers: Servers,
    uploads: Uploads,
    speed: Float[Array, "servers"] | None,
    gangs: Gangs | None,
) -> Broadcasts:
    """What the servers say at the new slot start, in front of what they said before."""
    old, sizes = before.broadcasts, plant.switches
    stays = stays_at(plant.presence, before.slot + 1, plant.slot_s)
    news = None
    if gangs is not None:
        free_s = jnp.maximum(jnp.maximum(servers.free_s, gangs.head_s[:, None]), 0.0)
        free_s = _gpus_next_start_s(stays, jnp.sort(free_s, axis=1))
        news = GangNews(free_s, _group_size(gangs.group), gangs.group_model)
    heard = None
    if sizes.radio.interference:
        heard = interference_in_flight(plant, before._replace(uploads=uploads))
    fresh = Broadcasts(
        wait_s=_next_start_s(stays, jnp.maximum(jnp.min(servers.free_s, axis=1), 0.0)),
        uploads=in_cells(uploads, sizes.servers).astype(old.uploads.dtype),
        resident=servers.resident,
        up=_and_present(None if speed is None else speed > 0, stays),
        gangs=news,
        weight=_weight_there(uploads, sizes.servers),
        interference=heard,
    )
    return jax.tree.map(lambda new, past: jnp.concatenate([new[None], past[:-1]]), fresh, old)


def _and_present(up: Bool[Array, "servers"] | None, stays: Stays | None) -> Bool[Array, "servers"] | None:
    """Who is up and there at the slot start; None where all always are."""
    if stays is None:
        return up
    there = present(stays, jnp.zeros(stays.from_s.shape[0]))
    return there if up is None else up & there


def _next_start_s(stays: Stays | None, free_s: Float[Array, "servers"]) -> Float[Array, "servers"]:
    """When a task could start that finds a GPU from `free_s` on."""
    return free_s if stays is None else jnp.minimum(next_present_s(stays, free_s), NEVER_S)


def _gpus_next_start_s(stays: Stays | None, free_s: Float[Array, "servers gpus"]) -> Float[Array, "servers gpus"]:
    """The same of each GPU (absent: infinite)."""
    if stays is None:
        return free_s
    return next_present_s(Stays(stays.from_s[:, None], stays.to_s[:, None]), free_s)


def _weight_there(tasks: Uploads, servers: int) -> Float[Array, "servers"] | None:
    """Sum of the weights of the tasks that each server works on."""
    if tasks.cpu_weight is None:
        return None
    arrived = tasks.present & ~on_their_way(tasks)
    return jnp.zeros(servers, tasks.cpu_weight.dtype).at[tasks.server].add(jnp.where(arrived, tasks.cpu_weight, 0.0))


def _group_size(group: Int[Array, "servers gpus"]) -> Int[Array, "servers gpus"]:
    together = (group[:, None, :] == group[:, :, None]) & (group >= 0)[:, :, None]
    return jnp.sum(together, axis=2, dtype=jnp.int32)
