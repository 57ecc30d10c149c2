"""What the devices know at a slot start, as a table of requests (see `docs/model.md`, what a device sees)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from gmel.physics.energy import offload_energy_j, power_energy_j
from gmel.physics.splitting import Way
from gmel.simulator.account import other_costs_s, parts_energy_j
from gmel.simulator.devices import device_speed, heard_age, sent_unseen_s
from gmel.simulator.gangs import Wanted, gang_of, gangs_free_s, gangs_warm
from gmel.simulator.levels import Manner, digits, manner, parts_of_level
from gmel.simulator.links import Reach, backhaul_s, cells, download_time_s, reach, transfer_s, visible
from gmel.simulator.parts import Split, at_members, split_over, unique_split
from gmel.simulator.plant import Plant
from gmel.simulator.state import GangNews, Observation, Requests, State
from gmel.simulator.uploads import on_their_way, under_way

__all__ = ["observe", "split_of"]


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
    # How a task is split follows from what its device knows, whoever looks.
    known = _look(plant, state, False) if fresh and sizes.parts > 1 else seen
    levels = [_at_level(plant, seen, known, level) for level in range(sizes.levels)]
    options, mask, parts_s = levels[0]
    if sizes.levels > 1:
        options, mask, parts_s = jax.tree.map(lambda *each: jnp.concatenate(each, axis=1), *levels)
    return Observation(requests.present, requests.device, task, options, mask, parts_s)


def split_of(plant: Plant, state: State, place: Int[Array, "requests"], level: Int[Array, "requests"]) -> Split:
    """How each request is split if its device chooses this: by what it knows at the slot start."""
    seen = _look(plant, state, fresh=False)
    way = _way(plant, seen, manner(plant, state.requests, level))
    server = jnp.clip(place - 1, 0, plant.switches.servers - 1)
    parts = jnp.where(place > 0, parts_of_level(plant, level), 1)
    return split_over(way, seen.usable, server, parts, plant.switches.parts)


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
        tasks = under_way(state.uploads)
        coming = on_their_way(tasks)[:, None] & (tasks.server[:, None] == jnp.arange(plant.switches.servers))
        work_s = jnp.sum(jnp.where(coming, tasks.service_s[:, None], 0.0), axis=0)
        weight = news.weight
        if weight is not None:
            assert tasks.cpu_weight is not None  # with this broadcast
            weight = weight + jnp.sum(jnp.where(coming, tasks.cpu_weight[:, None], 0.0), axis=0)
        news = _Queue(news.wait_s + work_s / plant.server_gpus, weight)
    return news, older


class _Expected(NamedTuple):
    """What is expected of each server in one manner, if it is chosen."""

    upload_s: Float[Array, "requests servers"]
    service_s: Float[Array, "requests servers"]
    download_s: Float[Array, "requests servers"]
    wait_s: Float[Array, "*requests servers"]
    previous_s: Float[Array, "*requests servers"]
    """As heard before."""
    energy_j: Float[Array, "requests servers"] | None
    paid: Float[Array, "requests servers"] | None
    """Only where the scenario counts more than latency."""
    usable: Bool[Array, "requests servers"]
    parts_s: Float[Array, "requests places servers"] | None
    """Service time of the parts at each server, by the server that was chosen; only where tasks can be split."""


def _at_level(
    plant: Plant, seen: _Seen, known: _Seen, level: int
) -> tuple[
    Float[Array, "requests places features"],
    Bool[Array, "requests places"],
    Float[Array, "requests places servers"] | None,
]:
    """The places, with the tasks done in one manner, which of them may be chosen, and what each puts on the servers.

    `known` is what the device itself has seen: by that it splits its task.
    """
    requests, sizes = seen.requests, plant.switches
    how = manner(plant, requests, level)
    parts = sizes.split_options[int(digits(sizes, level)["split"])] if sizes.split_options else 1
    there = _whole(plant, seen, how) if parts == 1 else _in_parts(plant, seen, known, how, parts)
    own_service_s = how.work / seen.speed
    zero, one = jnp.zeros_like(there.service_s), jnp.ones_like(requests.work)
    none = 0.0 * one
    at_server = [
        zero,
        jnp.broadcast_to(plant.server_speed, zero.shape),
        jnp.broadcast_to(plant.server_gpus, zero.shape),
        there.upload_s,
        jnp.broadcast_to(there.wait_s, zero.shape),
        zero + seen.age * plant.slot_s,
        seen.switch_s,
        there.service_s,
        there.download_s,
        jnp.broadcast_to(there.previous_s, zero.shape),
        seen.own_s,
    ]
    backlog_s = seen.backlog_s
    itself = [one, seen.speed, one, none, backlog_s, none, none, own_service_s, none, backlog_s, none]
    if sizes.other_costs:
        other_s = _other_costs_s(plant, seen, how, there)
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
        # A row without a request has one option, and what is not sent has nothing to choose but its steps.
        fits = fits & requests.present & (level < max(1, len(sizes.step_options)))
    parts_s = None if there.parts_s is None else jnp.pad(there.parts_s, ((0, 0), (1, 0), (0, 0)))
    usable = there.usable & (service < plant.server_services) if service else there.usable
    return places, jnp.concatenate([fits[:, None], usable], axis=1), parts_s


def _whole(plant: Plant, seen: _Seen, how: Manner) -> _Expected:
    """A task at one server."""
    sending_s = _sending_s(plant, seen, how)
    upload_s = seen.way.outage_s + sending_s
    if seen.radio_backlog_s is not None:
        upload_s = upload_s + seen.radio_backlog_s[:, None]
    if seen.cell is not None:
        servers = jnp.arange(plant.switches.servers)
        upload_s = upload_s + backhaul_s(plant, seen.cell, servers, seen.requests.size_bit[:, None])
    service_s, energy_j, paid = _service_s(plant, seen, how), None, None
    wait_s, previous_s = (
        _held_up_s(plant, seen.requests.present, queue, how, service_s + seen.switch_s, upload_s)
        for queue in seen.queues
    )
    if plant.switches.other_costs:
        latency_s = jnp.maximum(upload_s, wait_s) + seen.switch_s + service_s + seen.download_s
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
        paid = plant.server_price * plant.server_speed * service_s
    parts_s = None
    if plant.switches.parts > 1:
        parts_s = service_s[:, :, None] * jnp.eye(plant.switches.servers)
    return _Expected(upload_s, service_s, seen.download_s, wait_s, previous_s, energy_j, paid, seen.usable, parts_s)


def _in_parts(plant: Plant, seen: _Seen, known: _Seen, how: Manner, parts: int) -> _Expected:
    """A task over `parts` servers: each place with its own part, and with the end of the part that ends last.

    The time from the end of its own part to that counts as download, so that the parts of the latency add up.
    """
    sizes = plant.switches
    by_device = _way(plant, known, how)
    places = jnp.broadcast_to(jnp.arange(sizes.servers), known.usable.shape)
    counts = [count for count in sizes.split_options if count <= parts]
    *over_fewer, split = (split_over(by_device, known.usable, places, count, count) for count in counts)
    way = _way(plant, seen, how)
    member, share = split.server, split.share
    active, own = share > 0, share[..., 0]
    end_s = Way(*(at_members(field, member) for field in way)).end_s(share)
    last_s = jnp.max(jnp.where(active, end_s, -jnp.inf), axis=-1)
    whole_s = _service_s(plant, seen, how)
    service_s = own * whole_s
    download_s = way.after_s - seen.switch_s + own * (way.serve_s - whole_s)
    upload_s = way.before_s + own * way.send_s
    own_end_s = jnp.maximum(upload_s, way.wait_s) + seen.switch_s + service_s + download_s
    download_s = download_s + jnp.maximum(last_s - own_end_s, 0.0)
    run_s = share * at_members(whole_s, member)
    energy_j, paid = None, None
    if sizes.other_costs:
        start_s = at_members(seen.way.outage_s, member)
        energy_j = parts_energy_j(
            plant,
            present=active,
            server=member,
            start_s=start_s,
            sent_s=start_s + share * at_members(_sending_s(plant, seen, how), member),
            run_s=run_s,
            switch_s=at_members(seen.switch_s, member),
            latency_s=last_s,
            tx_power_w=None if how.tx_power_w is None else how.tx_power_w[:, None, None],
        )
        paid = jnp.sum(at_members(plant.server_price * plant.server_speed, member) * run_s, axis=-1)
    # Which splits there are is what the device knows, however fresh the look at them is.
    unique = unique_split(split, over_fewer, sizes.servers)
    parts_s = jnp.sum(run_s[..., None] * (member[..., None] == places[0]), axis=2)
    wait_s, previous_s = (queue.wait_s for queue in seen.queues)
    return _Expected(
        upload_s, service_s, download_s, wait_s, previous_s, energy_j, paid, known.usable & unique, parts_s
    )


def _way(plant: Plant, seen: _Seen, how: Manner) -> Way:
    """What a task meets at each server, split into what its size matters to and what not."""
    service_s = _service_s(plant, seen, how)
    zero = jnp.zeros_like(service_s)
    before_s, send_s = seen.way.outage_s, _sending_s(plant, seen, how)
    after_s, back_s = seen.switch_s, seen.download_s
    if seen.cell is not None:
        servers = jnp.arange(plant.switches.servers)
        fixed_s = backhaul_s(plant, seen.cell, servers, zero)
        before_s = before_s + fixed_s
        send_s = send_s + (backhaul_s(plant, seen.cell, servers, seen.requests.size_bit[:, None]) - fixed_s)
        if plant.switches.radio.download:
            after_s, back_s = after_s + fixed_s, back_s - fixed_s
    return Way(before_s, send_s, jnp.broadcast_to(seen.queues[0].wait_s, zero.shape), service_s + back_s, after_s)


def _sending_s(plant: Plant, seen: _Seen, how: Manner) -> Float[Array, "requests servers"]:
    way = seen.way
    snr = way.snr if how.power_ratio is None else way.snr * how.power_ratio[:, None]
    if plant.switches.radio.interference:
        snr = snr / (1.0 + seen.interference)
    users = seen.users
    if how.band_weight is not None:
        users = 1.0 + users / how.band_weight[:, None]
    size_bit = seen.requests.size_bit[:, None]
    return transfer_s(plant, size_bit, snr, way.fade, users, "uplink", way.rate_bps)


def _held_up_s(
    plant: Plant,
    present: Bool[Array, "requests"],
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
    unbounded = jnp.isfinite(plant.server_limit) | ~present[:, None]
    return jnp.where(unbounded, queue.wait_s, jnp.minimum(queue.wait_s, beside_s))


def _service_s(plant: Plant, seen: _Seen, how: Manner) -> Float[Array, "requests servers"]:
    service_s = how.work[:, None] / plant.server_speed
    return service_s if seen.gang is None else service_s / seen.gang.speedup[:, None]


def _other_costs_s(plant: Plant, seen: _Seen, how: Manner, there: _Expected) -> Float[Array, "requests places"]:
    """What each place costs beside the expected latency."""
    assert there.paid is not None  # with this switch
    assert there.energy_j is not None
    own_energy_j = power_energy_j(plant.device_power_w, how.work / seen.speed)
    return other_costs_s(
        plant,
        seen.requests.deadline_s,
        how.quality if plant.switches.identities is None else None,
        jnp.concatenate([jnp.zeros_like(there.paid[:, :1]), there.paid], axis=1),
        jnp.concatenate([own_energy_j[:, None], there.energy_j], axis=1),
    )


def _of_age(news: GangNews, age: Int[Array, "servers"] | int) -> GangNews:
    return GangNews(*(_at_age(field, age) for field in news))


def _at_age(
    history: Shaped[Array, "ages servers ..."], age: Int[Array, "servers"] | int
) -> Shaped[Array, "servers ..."]:
    """What each server said `age` slots ago."""
    return history[age] if isinstance(age, int) else history[age, jnp.arange(history.shape[1])]
