"""The tasks pass through their servers, by the discipline of the plant."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from gmel.physics.capacity import Hosting, host
from gmel.physics.gang import GangQueued, GangServers, fifo_gangs
from gmel.physics.presence import Stays, present
from gmel.physics.queueing import Queued, Served, Servers, fifo_many_gpus, fifo_one_gpu
from gmel.physics.sharing import SharedServers, Sharing, share
from gmel.simulator.plant import Plant
from gmel.simulator.presence import stays_at
from gmel.simulator.state import Gangs, SharedTask, State, Uploads
from gmel.simulator.uploads import each_part, for_each_part

__all__ = ["Service", "serve"]


class Service(NamedTuple):
    """What became of the tasks if nobody decides later, and the servers at the end of the slot."""

    served: Served
    servers: Servers
    tasks: Uploads
    """With what is known of those that are not done."""
    gangs: Gangs | None


def serve(
    plant: Plant,
    state: State,
    tasks: Uploads,
    offloaded: Bool[Array, "rows"],
    latest_start_s: Float[Array, "rows"],
) -> Service:
    """Passes the offloaded tasks through the servers (equations (6)-(8))."""
    stays = stays_at(plant.presence, state.slot, plant.slot_s)
    match plant.switches.discipline:
        case "capacity":
            return _host(plant, tasks, offloaded, stays)
        case "gang":
            return _gangs(plant, state, tasks, offloaded, latest_start_s, stays)
        case _ if tasks.parts is not None:
            return _parts(plant, state, tasks, offloaded, stays)
        case _ if tasks.shared is None:
            return _first_in_first_out(plant, state, tasks, offloaded, latest_start_s, stays)
        case _:
            return _share(plant, state, tasks, offloaded, latest_start_s, stays)


def _first_in_first_out(
    plant: Plant,
    state: State,
    tasks: Uploads,
    offloaded: Bool[Array, "rows"],
    latest_start_s: Float[Array, "rows"],
    stays: Stays | None,
) -> Service:
    sizes = plant.switches
    queued = Queued(
        present=offloaded,
        server=tasks.server,
        ready_s=tasks.ready_s,
        service_s=tasks.service_s,
        model=tasks.model,
        load_s=tasks.load_s,
        latest_start_s=latest_start_s,
    )
    if sizes.gpus == 1 and not sizes.switching and not sizes.drop and sizes.max_wait_s is None and stays is None:
        served, free_s = fifo_one_gpu(state.servers.free_s[:, 0], queued, plant.slot_s)
        return Service(served, state.servers._replace(free_s=free_s[:, None]), tasks, None)
    memory_gb = plant.catalogue.memory_gb[: sizes.models]
    served, servers = fifo_many_gpus(state.servers, queued, plant.slot_s, memory_gb, plant.server_memory_gb, stays)
    return Service(served, servers, tasks, None)


def _parts(plant: Plant, state: State, tasks: Uploads, offloaded: Bool[Array, "rows"], stays: Stays | None) -> Service:
    """The parts of the tasks, first in, first out; a task is done when its last part is."""
    parts = tasks.parts
    assert parts is not None  # where tasks are split
    shape = parts.present.shape
    flat = each_part(tasks)
    # What reached its queue before this slot is in the state of the servers, and its times are final.
    queued = flat.present & for_each_part(offloaded, tasks) & (flat.ready_s >= 0)
    service = _first_in_first_out(plant, state, flat, queued, jnp.full_like(flat.ready_s, jnp.inf), stays)
    new = queued.reshape(shape)
    start_s, switch_s, end_s, _ = (field.reshape(shape) for field in service.served)
    parts = parts._replace(
        start_s=jnp.where(new, start_s, parts.start_s),
        switch_s=jnp.where(new, switch_s, parts.switch_s),
        end_s=jnp.where(new, end_s, parts.end_s),
    )
    last = jnp.argmax(jnp.where(parts.present, parts.end_s + parts.download_s, -jnp.inf), axis=1)[:, None]
    final = jax.tree.map(lambda field: jnp.take_along_axis(field, last, axis=1)[:, 0], parts)
    tasks = tasks._replace(
        upload_start_s=final.upload_start_s,
        ready_s=final.ready_s,
        service_s=final.service_s,
        download_s=final.download_s,
        cell=final.cell,
        sent_s=final.sent_s,
        parts=parts,
    )
    served = Served(final.start_s, final.switch_s, final.end_s, jnp.zeros_like(offloaded))
    return Service(served, service.servers, tasks, None)


def _share(
    plant: Plant,
    state: State,
    tasks: Uploads,
    offloaded: Bool[Array, "rows"],
    latest_start_s: Float[Array, "rows"],
    stays: Stays | None,
) -> Service:
    assert tasks.shared is not None  # with this discipline
    sizes = plant.switches
    sharing = Sharing(
        present=offloaded,
        server=tasks.server,
        ready_s=tasks.ready_s,
        left_s=tasks.shared.left_s,
        serving=tasks.shared.serving,
        start_s=tasks.shared.start_s,
        switch_s=tasks.shared.switch_s,
        model=tasks.model,
        load_s=tasks.load_s,
        latest_start_s=latest_start_s,
        weight=tasks.cpu_weight,
    )
    at_work = SharedServers(
        gpus=plant.server_gpus,
        limit=plant.server_limit,
        beta=plant.server_beta,
        speed=jnp.ones_like(plant.server_speed) if state.speed is None else state.speed,
        resident=state.servers.resident,
        used_s=state.servers.used_s,
        places=plant.server_places if sizes.places else None,
        stays=stays,
    )
    memory_gb = plant.catalogue.memory_gb[: sizes.models]
    done = share(sharing, at_work, plant.slot_s, memory_gb, plant.server_memory_gb, sizes.share_passes)
    # What the servers announce: seconds until the work that has arrived is done, at their best rate.
    arrived = offloaded & (tasks.ready_s < plant.slot_s) & ~(done.end_s < plant.slot_s)
    at_server = arrived[:, None] & (tasks.server[:, None] == jnp.arange(sizes.servers)[None, :])
    left_s = jnp.sum(jnp.where(at_server, done.left_s[:, None], 0.0), axis=0) / plant.server_best_rate
    return Service(
        Served(done.start_s, done.switch_s, done.end_s, done.dropped),
        Servers((plant.slot_s + left_s)[:, None], done.resident, done.used_s),
        tasks._replace(shared=SharedTask(done.left_s, done.serving, done.start_s, done.switch_s)),
        None,
    )


def _host(plant: Plant, tasks: Uploads, offloaded: Bool[Array, "rows"], stays: Stays | None) -> Service:
    """Servers with a capacity in place of a queue: what does not fit crashes them, or is rejected."""
    assert tasks.shared is not None  # with this discipline
    assert tasks.units is not None
    sizes = plant.switches
    hosting = Hosting(
        present=offloaded,
        server=tasks.server,
        ready_s=tasks.ready_s,
        units=tasks.units,
        service_s=tasks.service_s,
        running=tasks.shared.serving,
        start_s=tasks.shared.start_s,
    )
    there = None if stays is None else present(stays.of(tasks.server), tasks.ready_s)
    done = host(hosting, plant.server_capacity, plant.slot_s, sizes.on_overload, there)
    # What the servers announce: the part of their capacity in use, as so many seconds of mean service.
    at_server = done.running[:, None] & (tasks.server[:, None] == jnp.arange(sizes.servers)[None, :])
    used = jnp.sum(jnp.where(at_server, tasks.units[:, None], 0.0), axis=0) / plant.server_capacity
    busy_s = used * plant.mean_service_s
    left_s = jnp.maximum(done.start_s + tasks.service_s - plant.slot_s, 0.0)
    none = jnp.zeros((sizes.servers, 0), busy_s.dtype)
    return Service(
        Served(done.start_s, jnp.zeros_like(done.start_s), done.end_s, done.lost),
        Servers((plant.slot_s + busy_s)[:, None], none > 0, none),
        tasks._replace(shared=SharedTask(left_s, done.running, done.start_s, jnp.zeros_like(done.start_s))),
        None,
    )


def _gangs(
    plant: Plant,
    state: State,
    tasks: Uploads,
    offloaded: Bool[Array, "rows"],
    latest_start_s: Float[Array, "rows"],
    stays: Stays | None,
) -> Service:
    """Tasks that need several GPUs at once, with warm and cold starts."""
    assert state.gangs is not None  # with this discipline
    assert tasks.gpus is not None
    queued = GangQueued(
        present=offloaded,
        server=tasks.server,
        ready_s=tasks.ready_s,
        service_s=tasks.service_s,
        gpus=tasks.gpus,
        model=tasks.model,
        load_s=tasks.load_s,
        latest_start_s=latest_start_s,
    )
    before = GangServers(state.servers.free_s, *state.gangs)
    served, after = fifo_gangs(before, queued, plant.slot_s, stays)
    servers = state.servers._replace(free_s=after.free_s)
    return Service(served, servers, tasks, Gangs(after.head_s, after.group, after.group_model))
