"""What the servers say at every slot start; devices hear it later (`slot.broadcast_age_slots`)."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from gmel.physics.queueing import Servers
from gmel.simulator.plant import Plant
from gmel.simulator.sending import interference_in_flight
from gmel.simulator.state import Broadcasts, GangNews, Gangs, State, Uploads
from gmel.simulator.uploads import in_cells, on_their_way

__all__ = ["announce", "first_broadcasts"]


def first_broadcasts(plant: Plant, servers: Servers, ages: int) -> Broadcasts:
    """What has been said when an episode begins: everything is empty."""
    sizes, dtype = plant.switches, servers.free_s.dtype
    shape = (ages, sizes.servers)
    gangs = None
    if sizes.discipline == "gang":
        none = jnp.zeros((*shape, servers.free_s.shape[1]), jnp.int32)
        gangs = GangNews(jnp.broadcast_to(jnp.sort(servers.free_s, axis=1), none.shape), none, none - 1)
    return Broadcasts(
        wait_s=jnp.zeros(shape, dtype),
        uploads=jnp.zeros(shape, dtype),
        resident=jnp.broadcast_to(servers.resident, (ages, *servers.resident.shape)),
        up=jnp.ones(shape, bool) if sizes.failures is not None else None,
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
    news = None
    if gangs is not None:
        free_s = jnp.maximum(jnp.maximum(servers.free_s, gangs.head_s[:, None]), 0.0)
        news = GangNews(jnp.sort(free_s, axis=1), _group_size(gangs.group), gangs.group_model)
    heard = None
    if sizes.radio.interference:
        heard = interference_in_flight(plant, before._replace(uploads=uploads))
    fresh = Broadcasts(
        wait_s=jnp.maximum(jnp.min(servers.free_s, axis=1), 0.0),
        uploads=in_cells(uploads, sizes.servers).astype(old.uploads.dtype),
        resident=servers.resident,
        up=None if speed is None else speed > 0,
        gangs=news,
        weight=_weight_there(uploads, sizes.servers),
        interference=heard,
    )
    return jax.tree.map(lambda new, past: jnp.concatenate([new[None], past[:-1]]), fresh, old)


def _weight_there(tasks: Uploads, servers: int) -> Float[Array, "servers"] | None:
    """Sum of the weights of the tasks that each server works on."""
    if tasks.cpu_weight is None:
        return None
    arrived = tasks.present & ~on_their_way(tasks)
    return jnp.zeros(servers, tasks.cpu_weight.dtype).at[tasks.server].add(jnp.where(arrived, tasks.cpu_weight, 0.0))


def _group_size(group: Int[Array, "servers gpus"]) -> Int[Array, "servers gpus"]:
    together = (group[:, None, :] == group[:, :, None]) & (group >= 0)[:, :, None]
    return jnp.sum(together, axis=2, dtype=jnp.int32)
