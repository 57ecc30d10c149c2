"""What the devices know at a slot start, as a table of requests (see `docs/model.md`, what a device sees)."""

import jax.numpy as jnp
from jaxtyping import Array, Int, Shaped

from gmel.simulator.devices import device_speed, heard_age, sent_unseen_s
from gmel.simulator.links import backhaul_s, cells, download_time_s, reach, transfer_s, visible
from gmel.simulator.plant import Plant
from gmel.simulator.state import Observation, State
from gmel.simulator.uploads import on_their_way

__all__ = ["observe"]


def observe(plant: Plant, state: State, fresh: bool = False) -> Observation:
    """What the devices know; with `fresh` (static), the servers' state of this instant including uploads in flight.

    Decentralised actors get the former. The latter is for critics during training and for central policies.
    """
    requests = state.requests
    sizes = plant.switches
    age = 0 if fresh else heard_age(plant, state.seed, state.slot)
    wait_s = at_age(state.broadcasts.wait_s, age)
    if fresh:
        on_the_way = on_their_way(state.uploads)
        coming = on_the_way[:, None] & (state.uploads.server[:, None] == jnp.arange(sizes.servers))
        work_s = jnp.sum(jnp.where(coming, state.uploads.service_s[:, None], 0.0), axis=0)
        wait_s = wait_s + work_s / plant.server_gpus
    cell = cells(plant, state.links, requests.device)
    way = reach(requests, state.links, cell)
    users = jnp.ones(sizes.servers)
    if sizes.radio.sharing == "equal":
        users = 1.0 + at_age(state.broadcasts.uploads, age)
        users = users if cell is None else users[cell]
    upload_s = way.outage_s + transfer_s(
        plant, requests.size_bit[:, None], way.snr, way.fade, users, "uplink", way.rate_bps
    )
    if cell is not None:
        upload_s = upload_s + backhaul_s(plant, cell, requests.size_bit)
    service_s = requests.work[:, None] / plant.server_speed
    zero = jnp.zeros_like(service_s)
    download_s = download_time_s(plant, requests, state.links, cell) if sizes.radio.download else zero
    switch_s = zero
    if sizes.switching:
        held = at_age(state.broadcasts.resident, age)[:, requests.model].T
        switch_s = jnp.where(held, 0.0, plant.catalogue.load_mean_s[requests.model][:, None])
    previous_s = at_age(state.broadcasts.wait_s, age + 1)
    # With a fresh view nothing of the device's own is unseen.
    own_s = zero if fresh else sent_unseen_s(plant, state.sent, requests.device, age)
    backlog_s = state.device_backlog_s[requests.device]
    own = requests.present[None, :] & (requests.device[None, :] == requests.device[:, None])
    one = jnp.ones_like(requests.work)
    speed = device_speed(plant, state.seed, requests.device)
    task = jnp.stack(
        [
            requests.work,
            requests.size_bit,
            requests.deadline_s + requests.generated_s,
            -requests.generated_s,
            jnp.sum(own, axis=1).astype(one.dtype),
            backlog_s,
        ],
        axis=-1,
    )
    at_server = jnp.stack(
        [
            zero,
            jnp.broadcast_to(plant.server_speed, zero.shape),
            jnp.broadcast_to(plant.server_gpus, zero.shape),
            upload_s,
            jnp.broadcast_to(wait_s, zero.shape),
            zero + age * plant.slot_s,
            switch_s,
            service_s,
            download_s,
            jnp.broadcast_to(previous_s, zero.shape),
            own_s,
        ],
        axis=-1,
    )
    itself = jnp.stack(
        [
            one,
            speed,
            one,
            0.0 * one,
            backlog_s,
            0.0 * one,
            0.0 * one,
            requests.work / speed,
            0.0 * one,
            backlog_s,
            0.0 * one,
        ],
        axis=-1,
    )
    usable = visible(plant, state.links, requests.device)
    if cell is not None:
        # The way goes over the cell.
        usable = jnp.take_along_axis(usable, cell, axis=1)
    if state.broadcasts.up is not None:
        usable = usable & at_age(state.broadcasts.up, age)
    # A row must have an option: without any usable server the device itself, whatever it takes.
    stranded = ~jnp.any(usable, axis=1)
    if sizes.local:
        fits = (plant.catalogue.local[requests.model] > 0) | stranded | ~requests.present
    else:
        fits = ~requests.present
        usable = usable | stranded[:, None]
    mask = jnp.concatenate([fits[:, None], usable & requests.present[:, None]], axis=1)
    options = jnp.concatenate([itself[:, None, :], at_server], axis=1)
    return Observation(requests.present, requests.device, task, options, mask)


def at_age(
    history: Shaped[Array, "ages servers ..."], age: Int[Array, "servers"] | int
) -> Shaped[Array, "servers ..."]:
    """What each server said `age` slots ago."""
    return history[age] if isinstance(age, int) else history[age, jnp.arange(history.shape[1])]
