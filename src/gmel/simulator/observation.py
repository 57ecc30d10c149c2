"""What the devices know at a slot start, as a table of requests (see `docs/model.md`, what a device sees)."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from gmel.physics.energy import offload_energy_j, power_energy_j
from gmel.simulator.account import other_costs_s
from gmel.simulator.devices import device_speed, heard_age, sent_unseen_s
from gmel.simulator.gangs import Wanted, gang_of, gangs_free_s, gangs_warm
from gmel.simulator.levels import Manner, digits, manner
from gmel.simulator.links import Reach, backhaul_s, cells, download_time_s, reach, transfer_s, visible
from gmel.simulator.plant import Plant
from gmel.simulator.state import GangNews, Observation, Requests, State
from gmel.simulator.uploads import on_their_way

__all__ = ["observe"]


class _Queue(NamedTuple):
    """What is known of the tasks at each server."""

    wait_s: Float[Array, "*requests servers"]
    weight: Float[Array, "servers"] | None
    """Sum of their weights, where they have any."""


class _Seen(NamedTuple):
    """What is the same in whatever manner a task is done."""

    requests: Requests
    way: Reach
    cell: Int[Array, "requests servers"] | None
    users: Float[Array, "*requests servers"]
    """Sharers of the cell as last heard, the own upload included; with weights, the weight of the others."""
    interference: Float[Array, "*requests servers"] | float
    """What the cell hears of the others as last heard, over its noise."""
    gang: Wanted | None
    queues: tuple[_Queue, _Queue]
    """As last heard, and as heard before."""
    age: Int[Array, "servers"] | int
    switch_s: Float[Array, "requests servers"]
    download_s: Float[Array, "requests servers"]
    radio_backlog_s: Float[Array, "requests"] | None
    own_s: Float[Array, "requests servers"]
    """Own work at the server that no broadcast shows yet."""
    backlog_s: Float[Array, "requests"]
    speed: Float[Array, "requests"]
    usable: Bool[Array, "requests servers"]
    fits: Bool[Array, "requests"]


def observe(plant: Plant, state: State, fresh: bool = False) -> Observation:
    """What the devices know; with `fresh` (static), the servers' state of this instant including uploads in flight.

    Decentralised actors get the former. The latter is for critics during training and for central policies.
    """
    requests, sizes = state.requests, plant.switches
    seen = _look(plant, state, fresh)
    own = requests.present[None, :] & (requests.device[None, :] == requests.device[:, None])
    columns = [
        requests.work,
        requests.size_bit,
        requests.deadline_s + requests.generated_s,
        -requests.generated_s,
        jnp.sum(own, axis=1).astype(requests.work.dtype),
        seen.backlog_s,
    ]
    if sizes.identities is not None:
        columns.append(requests.model.astype(requests.work.dtype))
    task = jnp.stack(columns, axis=-1)
    levels = [_at_level(plant, seen, level) for level in range(sizes.levels)]
    options, mask = levels[0]
    if sizes.levels > 1:
        options = jnp.concatenate([places for places, _ in levels], axis=1)
        mask = jnp.concatenate([allowed for _, allowed in levels], axis=1)
    return Observation(requests.present, requests.device, task, options, mask)


def _look(plant: Plant, state: State, fresh: bool) -> _Seen:
    requests, sizes = state.requests, plant.switches
    age = 0 if fresh else heard_age(plant, state.seed, state.slot)
    gang = gang_of(plant, requests)
    queues = _queues(plant, state, fresh, age, gang)
    cell = cells(plant, state.links, requests.device)
    way = reach(requests, state.links, cell)
    users = jnp.ones(sizes.servers)
    if sizes.radio.sharing == "equal":
        # With weights the own upload counts with the weight that is chosen for it.
        users = _at_age(state.broadcasts.uploads, age) + (0.0 if sizes.band_weights else 1.0)
        users = users if cell is None else users[cell]
    hears = 0.0
    if state.broadcasts.interference is not None:
        hears = _at_age(state.broadcasts.interference, age)
        hears = hears if cell is None else hears[cell]
    zero = jnp.zeros_like(way.snr)
    switch_s = zero
    if gang is not None:
        assert state.broadcasts.gangs is not None
        warm = gangs_warm(_of_age(state.broadcasts.gangs, age), gang, requests.model)
        switch_s = jnp.where(warm, 0.0, gang.load_s[:, None])
    if sizes.switching:
        held = _at_age(state.broadcasts.resident, age)[:, requests.model].T
        switch_s = jnp.where(held, 0.0, plant.catalogue.load_mean_s[requests.model][:, None])
    usable = _usable(plant, state, age, cell, gang)
    download_s = zero
    if sizes.radio.download:
        back = reach(requests, state.links, cell, uplink=False)
        download_s = download_time_s(plant, requests.bits_out[:, None], back, cell, jnp.arange(sizes.servers))
    # A row must have an option: without any usable server the device itself, whatever it takes.
    stranded = ~jnp.any(usable, axis=1)
    if sizes.local:
        fits = (plant.catalogue.local[requests.model] > 0) | stranded | ~requests.present
    else:
        fits = ~requests.present
        usable = usable | stranded[:, None]
    return _Seen(
        requests=requests,
        way=way,
        cell=cell,
        users=users,
        interference=hears,
        gang=gang,
        queues=queues,
        age=age,
        switch_s=switch_s,
        download_s=download_s,
        radio_backlog_s=None if state.radio_backlog_s is None else state.radio_backlog_s[requests.device],
        # With a fresh view nothing of the device's own is unseen.
        own_s=zero if fresh else sent_unseen_s(plant, state.sent, requests.device, age),
        backlog_s=state.device_backlog_s[requests.device],
        speed=device_speed(plant, state.seed, requests.device),
        usable=usable & requests.present[:, None],
        fits=fits,
    )


def _usable(
    plant: Plant,
    state: State,
    age: Int[Array, "servers"] | int,
    cell: Int[Array, "requests servers"] | None,
    gang: Wanted | None,
) -> Bool[Array, "requests servers"]:
    """The servers that each request may be sent to."""
    sizes, requests = plant.switches, state.requests
    usable = visible(plant, state.links, requests.device)
    if cell is not None:
        # The way goes over the cell.
        usable = jnp.take_along_axis(usable, cell, axis=1)
    if gang is not None:
        usable = usable & (gang.gpus[:, None] <= plant.server_gpus)
    if state.broadcasts.up is not None:
        usable = usable & _at_age(state.broadcasts.up, age)
    if sizes.cache is not None:
        # To a server that holds its model; where nobody does, the device included, any may load it for the task alone.
        held = usable & _at_age(state.broadcasts.resident, age)[:, requests.model].T
        somewhere = jnp.any(held, axis=1)
        if sizes.local:
            somewhere = somewhere | (plant.catalogue.local[requests.model] > 0)
        usable = jnp.where(somewhere[:, None], held, usable)
    return usable


def _queues(
    plant: Plant, state: State, fresh: bool, age: Int[Array, "servers"] | int, gang: Wanted | None
) -> tuple[_Queue, _Queue]:
    said = state.broadcasts
    if gang is None:
        news, older = (
            _Queue(_at_age(said.wait_s, a), None if said.weight is None else _at_age(said.weight, a))
            for a in (age, age + 1)
        )
    else:
        assert said.gangs is not None  # with gangs
        news, older = (_Queue(gangs_free_s(_of_age(said.gangs, a), gang), None) for a in (age, age + 1))
    if fresh:
        tasks = state.uploads
        coming = on_their_way(tasks)[:, None] & (tasks.server[:, None] == jnp.arange(plant.switches.servers))
        work_s = jnp.sum(jnp.where(coming, tasks.service_s[:, None], 0.0), axis=0)
        weight = news.weight
        if weight is not None:
            assert tasks.cpu_weight is not None  # with this broadcast
            weight = weight + jnp.sum(jnp.where(coming, tasks.cpu_weight[:, None], 0.0), axis=0)
        news = _Queue(news.wait_s + work_s / plant.server_gpus, weight)
    return news, older


def _at_level(
    plant: Plant, seen: _Seen, level: int
) -> tuple[Float[Array, "requests places features"], Bool[Array, "requests places"]]:
    """The places, with the tasks done in one manner, and which of them may be chosen."""
    requests, way, sizes = seen.requests, seen.way, plant.switches
    how = manner(plant, requests, level)
    snr = way.snr if how.power_ratio is None else way.snr * how.power_ratio[:, None]
    if sizes.radio.interference:
        snr = snr / (1.0 + seen.interference)
    users = seen.users
    if how.band_weight is not None:
        users = 1.0 + users / how.band_weight[:, None]
    sending_s = transfer_s(plant, requests.size_bit[:, None], snr, way.fade, users, "uplink", way.rate_bps)
    upload_s = way.outage_s + sending_s
    if seen.radio_backlog_s is not None:
        upload_s = upload_s + seen.radio_backlog_s[:, None]
    if seen.cell is not None:
        upload_s = upload_s + backhaul_s(plant, seen.cell, jnp.arange(sizes.servers), requests.size_bit[:, None])
    service_s, own_service_s = _service_s(plant, seen, how), how.work / seen.speed
    wait_s, previous_s = (_held_up_s(plant, queue, how, service_s + seen.switch_s, upload_s) for queue in seen.queues)
    zero, one = jnp.zeros_like(service_s), jnp.ones_like(requests.work)
    none = 0.0 * one
    at_server = [
        zero,
        jnp.broadcast_to(plant.server_speed, zero.shape),
        jnp.broadcast_to(plant.server_gpus, zero.shape),
        upload_s,
        jnp.broadcast_to(wait_s, zero.shape),
        zero + seen.age * plant.slot_s,
        seen.switch_s,
        service_s,
        seen.download_s,
        jnp.broadcast_to(previous_s, zero.shape),
        seen.own_s,
    ]
    backlog_s = seen.backlog_s
    itself = [one, seen.speed, one, none, backlog_s, none, none, own_service_s, none, backlog_s, none]
    if sizes.other_costs:
        other_s = _other_costs_s(plant, seen, how, sending_s, jnp.maximum(upload_s, wait_s))
        itself.append(other_s[:, 0])
        at_server.append(other_s[:, 1:])
    service = digits(sizes, level)["service"]
    if sizes.identities is not None:
        itself += [none, none + service]
        at_server += [zero + jnp.arange(1, 1 + sizes.servers), zero + service]
    for name in sizes.share_weights:
        weight = how.band_weight if name == "band_weight" else how.cpu_weight
        assert weight is not None  # given with this name
        itself.append(one)
        at_server.append(jnp.broadcast_to(weight[:, None], zero.shape))
    places = jnp.concatenate([jnp.stack(itself, axis=-1)[:, None, :], jnp.stack(at_server, axis=-1)], axis=1)
    fits = seen.fits
    if level:
        # A row without a request has one option, and what is not sent has neither power nor service to choose.
        fits = fits & requests.present & (level < max(1, len(sizes.step_options)))
    usable = seen.usable & (service < plant.server_services) if service else seen.usable
    return places, jnp.concatenate([fits[:, None], usable], axis=1)


def _held_up_s(
    plant: Plant,
    queue: _Queue,
    how: Manner,
    run_s: Float[Array, "requests servers"],
    upload_s: Float[Array, "requests servers"],
) -> Float[Array, "*requests servers"]:
    """Until when the tasks at a server can hold up one that comes.

    They do so by no more than their own work; where tasks have weights, nor by more than they do beside it: it has at
    least weight x GPUs / all weights of a GPU. Where the number of tasks in service is limited, the weight does not say
    when one is let in.
    """
    if queue.weight is None or how.cpu_weight is None:
        return queue.wait_s
    weight = how.cpu_weight[:, None]
    slower = (queue.weight + weight) / (plant.server_gpus * weight)
    beside_s = upload_s + run_s * jnp.maximum(slower - 1.0, 0.0)
    return jnp.where(jnp.isfinite(plant.server_limit), queue.wait_s, jnp.minimum(queue.wait_s, beside_s))


def _service_s(plant: Plant, seen: _Seen, how: Manner) -> Float[Array, "requests servers"]:
    service_s = how.work[:, None] / plant.server_speed
    return service_s if seen.gang is None else service_s / seen.gang.speedup[:, None]


def _other_costs_s(
    plant: Plant,
    seen: _Seen,
    how: Manner,
    sending_s: Float[Array, "requests servers"],
    start_s: Float[Array, "requests servers"],
) -> Float[Array, "requests places"]:
    """What each place costs beside the expected latency."""
    service_s = _service_s(plant, seen, how)
    latency_s = start_s + seen.switch_s + service_s + seen.download_s
    energy_j = offload_energy_j(
        tx_power_w=plant.device_tx_power_w if how.tx_power_w is None else how.tx_power_w[:, None],
        idle_power_w=plant.device_idle_power_w,
        server_power_w=plant.server_power_w,
        switch_power_w=plant.server_switch_power_w,
        upload_s=sending_s,
        latency_s=latency_s,
        run_s=service_s,
        switch_s=seen.switch_s,
    )
    own_energy_j = power_energy_j(plant.device_power_w, how.work / seen.speed)
    paid = plant.server_price * plant.server_speed * service_s
    return other_costs_s(
        plant,
        seen.requests.deadline_s,
        how.quality if plant.switches.identities is None else None,
        jnp.concatenate([jnp.zeros_like(paid[:, :1]), paid], axis=1),
        jnp.concatenate([own_energy_j[:, None], energy_j], axis=1),
    )


def _of_age(news: GangNews, age: Int[Array, "servers"] | int) -> GangNews:
    return GangNews(*(_at_age(field, age) for field in news))


def _at_age(
    history: Shaped[Array, "ages servers ..."], age: Int[Array, "servers"] | int
) -> Shaped[Array, "servers ..."]:
    """What each server said `age` slots ago."""
    return history[age] if isinstance(age, int) else history[age, jnp.arange(history.shape[1])]
