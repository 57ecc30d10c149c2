"""What the devices know at a slot start, as a table of requests (see `docs/model.md`, what a device sees)."""

import jax.numpy as jnp

from gmel.simulator.links import download_time_s, reachable, transfer_s
from gmel.simulator.plant import Plant
from gmel.simulator.state import Observation, State
from gmel.simulator.uploads import uploading

__all__ = ["observe"]


def observe(plant: Plant, state: State, fresh: bool = False) -> Observation:
    """What the devices know; with `fresh` (static), the servers' state of this instant including uploads in flight.

    Decentralised actors get the former. The latter is for critics during training and for central policies.
    """
    requests = state.requests
    sizes = plant.switches
    age = 0 if fresh else sizes.age
    wait_s = state.broadcasts.wait_s[age]
    if fresh:
        on_the_way = uploading(state.uploads)
        coming = on_the_way[:, None] & (state.uploads.server[:, None] == jnp.arange(sizes.servers))
        work_s = jnp.sum(jnp.where(coming, state.uploads.service_s[:, None], 0.0), axis=0)
        wait_s = wait_s + work_s / plant.server_gpus
    snr = state.links.uplink_snr[requests.device]
    users = 1.0 + state.broadcasts.uploads[age] if sizes.radio.sharing == "equal" else jnp.ones(sizes.servers)
    upload_s = requests.outage_s + transfer_s(plant, requests.size_bit[:, None], snr, requests.fade, users, "uplink")
    service_s = requests.work[:, None] / plant.server_speed
    zero = jnp.zeros_like(service_s)
    download_s = download_time_s(plant, requests, state.links) if sizes.radio.download else zero
    switch_s = zero
    if sizes.switching:
        held = state.broadcasts.resident[age][:, requests.model].T
        switch_s = jnp.where(held, 0.0, plant.catalogue.load_mean_s[requests.model][:, None])
    previous_s = state.broadcasts.wait_s[age + 1]
    # With a fresh view nothing of the device's own is unseen.
    own_s = zero if fresh else jnp.sum(state.own_unseen_s, axis=0)[requests.device]
    backlog_s = state.device_backlog_s[requests.device]
    own = requests.present[None, :] & (requests.device[None, :] == requests.device[:, None])
    one = jnp.ones_like(requests.work)
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
            one * plant.device_speed,
            one,
            0.0 * one,
            backlog_s,
            0.0 * one,
            0.0 * one,
            requests.work / plant.device_speed,
            0.0 * one,
            backlog_s,
            0.0 * one,
        ],
        axis=-1,
    )
    usable = reachable(sizes.radio, snr)
    if state.broadcasts.up is not None:
        usable = usable & state.broadcasts.up[age]
    fits = plant.catalogue.local[requests.model] > 0
    # A row must have an option: without any reachable server the device itself, whatever it takes.
    fits = fits | ~jnp.any(usable, axis=1) | ~requests.present
    mask = jnp.concatenate([fits[:, None], usable & requests.present[:, None]], axis=1)
    options = jnp.concatenate([itself[:, None, :], at_server], axis=1)
    return Observation(requests.present, requests.device, task, options, mask)
