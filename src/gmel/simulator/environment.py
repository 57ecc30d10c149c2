"""The environment: reset, observe, step. One slot is one step; see `docs/architecture.md` for its order."""

from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt32

from gmel.physics.queueing import Queued, Served, Servers, fifo_many_gpus, fifo_one_gpu, local_queue
from gmel.physics.random import mix_seed
from gmel.physics.sharing import SharedServers, Sharing, share
from gmel.scenario.schema import Scenario
from gmel.simulator.account import accounts, costs
from gmel.simulator.arrivals import first_memory
from gmel.simulator.devices import device_speed, nothing_sent, remember
from gmel.simulator.failures import next_speed
from gmel.simulator.levels import manner, split_action
from gmel.simulator.links import backhaul_s, cells, download_time_s, draw_links, reach, transfer_s
from gmel.simulator.observation import observe
from gmel.simulator.plant import Plant, build_plant
from gmel.simulator.state import (
    Account,
    Broadcasts,
    Observation,
    Outcome,
    Requests,
    Reward,
    Sent,
    SharedTask,
    State,
    Uploads,
)
from gmel.simulator.traffic import TraceArrays, next_requests
from gmel.simulator.uploads import in_cells, interrupt, keep, no_uploads

__all__ = ["Afterstate", "Counterfactual", "Environment", "Projection", "seeds"]


class Projection(NamedTuple):
    """What a joint action would do if nobody decided after it."""

    latency_s: Float[Array, "requests"]
    """Projected latency of each request."""
    delay_s: Float[Array, ""]
    """Change of the latency of all uploads already in flight."""
    cost: Float[Array, "requests"]
    delay_cost: Float[Array, ""]


class Afterstate(NamedTuple):
    """What the servers are left with at the end of a slot, before the next requests are known."""

    wait_s: Float[Array, "*rows servers"]
    """Mean over the GPUs of the time until each is free."""
    first_s: Float[Array, "*rows servers"]
    """Time until the first GPU is free."""
    coming_s: Float[Array, "*rows servers"]
    """Service time of the uploads in flight, over the number of GPUs."""
    resident: Bool[Array, "*rows servers models"]


class Counterfactual(NamedTuple):
    """What each request of a slot changes."""

    difference: Float[Array, "requests"]
    """Difference reward: minus what all tasks together would cost less without the request (0 where absent)."""
    after: Afterstate
    """With all requests."""
    without: Afterstate
    """Without each request in turn, leading axis requests."""


class _Decided(NamedTuple):
    """The tasks of a slot on their way: rows are uploads in flight first, then the requests."""

    uploads: Uploads
    local: Bool[Array, "rows"]
    served: Served
    final: Bool[Array, "rows"]
    """Whether nothing that is decided later can change what becomes of the task."""
    servers: Servers
    account: Account
    latency_s: Float[Array, "rows"]
    cost: Float[Array, "rows"]
    local_end_s: Float[Array, "requests"]


class Environment(eqx.Module):
    """A plant with its traffic. Functions are pure: `jax.vmap` over states gives parallel environments.

    Example:
        >>> from gmel.scenario.load import load_scenario
        >>> environment = Environment.from_scenario(load_scenario("hall-20x5"))
        >>> state = environment.reset(jnp.array([1, 0], jnp.uint32))
        >>> action = jnp.ones(environment.requests, jnp.int32)
        >>> state, reward, outcome = environment.step(state, action)
    """

    plant: Plant
    trace: TraceArrays | None = None

    @classmethod
    def from_scenario(cls, scenario: Scenario, trace: TraceArrays | None = None) -> "Environment":
        """The environment of a scenario; with a trace, its requests replace the drawn ones."""
        rows = None if trace is None else int(trace.present.shape[1])
        return cls(build_plant(scenario, rows), trace)

    @property
    def requests(self) -> int:
        """Rows of the request table."""
        return self.plant.switches.requests

    @property
    def servers(self) -> int:
        """Number of servers; places are 0 (the device itself) and 1 + server."""
        return self.plant.switches.servers

    @property
    def options(self) -> int:
        """Number of options of a request: places x levels (`gmel.simulator.levels`)."""
        return (1 + self.servers) * self.plant.switches.levels

    def reset(self, seed: UInt32[Array, "2"], trace_slot: int | Int[Array, ""] = 0) -> State:
        """An empty plant with its first requests. `trace_slot` is where a trace starts."""
        sizes = self.plant.switches
        seed = mix_seed(seed)
        links = draw_links(self.plant, seed)
        slot = jnp.zeros((), jnp.int32)
        trace_slot = jnp.asarray(trace_slot, jnp.int32)
        absent = jnp.arange(sizes.gpus)[None, :] >= self.plant.server_gpus[:, None]
        free_s = jnp.where(absent, jnp.inf, 0.0).astype(self.plant.slot_s.dtype)
        servers = Servers(
            free_s=free_s,
            resident=self._first_residents(),
            used_s=jnp.zeros((sizes.servers, sizes.models), free_s.dtype),
        )
        ages = (sizes.age + sizes.heard_ages + 1, sizes.servers)
        requests, arrivals = next_requests(
            self.plant,
            self.trace,
            seed,
            slot,
            trace_slot,
            links,
            first_memory(sizes.arrivals) if self.trace is None else None,
        )
        return State(
            seed=seed,
            slot=slot,
            trace_slot=trace_slot,
            links=links,
            requests=requests,
            device_backlog_s=jnp.zeros(sizes.devices, free_s.dtype),
            servers=servers,
            uploads=no_uploads(sizes.uploads, free_s.dtype, sizes),
            broadcasts=Broadcasts(
                wait_s=jnp.zeros(ages, free_s.dtype),
                uploads=jnp.zeros(ages, free_s.dtype),
                resident=jnp.broadcast_to(servers.resident, (ages[0], *servers.resident.shape)),
                up=jnp.ones(ages, bool) if sizes.failures is not None else None,
            ),
            sent=nothing_sent(ages[0] - 2, sizes.requests, sizes.servers, free_s.dtype),
            lost=jnp.zeros((), jnp.int32),
            speed=jnp.ones(sizes.servers, free_s.dtype) if sizes.failures is not None else None,
            arrivals=arrivals,
        )

    def observe(self, state: State, fresh: bool = False) -> Observation:
        """What the devices know; with `fresh` (static), the servers' state of this instant including uploads in flight.

        Decentralised actors get the former. The latter is for critics during training and for central policies.
        """
        return observe(self.plant, state, fresh)

    def project(self, state: State, action: Int[Array, "requests"]) -> Projection:
        """Projected latency and cost of a joint action, with everything known. For central policies and tests."""
        decided = self._decide(state, action)
        rows = self.plant.switches.uploads
        before = state.uploads
        delay_s = jnp.where(before.present, decided.latency_s[:rows] - before.latency_s, 0.0)
        delay_cost = jnp.where(before.present, decided.cost[:rows] - before.cost, 0.0)
        present = state.requests.present
        return Projection(
            jnp.where(present, decided.latency_s[rows:], 0.0),
            jnp.sum(delay_s),
            jnp.where(present, decided.cost[rows:], 0.0),
            jnp.sum(delay_cost),
        )

    def difference(self, state: State, action: Int[Array, "requests"]) -> Float[Array, "requests"]:
        """Difference reward of each request: minus what all tasks together would cost less without it."""
        return self.counterfactual(state, action).difference

    def counterfactual(self, state: State, action: Int[Array, "requests"]) -> Counterfactual:
        """What the slot does with a joint action, and what it would do without each request in turn."""
        rows = jnp.arange(self.requests)

        def total(present: Bool[Array, "requests"]) -> tuple[Float[Array, ""], Afterstate]:
            known = state._replace(requests=state.requests._replace(present=present))
            decided = self._decide(known, action)
            first = self.plant.switches.uploads
            cost = jnp.sum(jnp.where(present, decided.cost[first:], 0.0))
            delay = jnp.sum(jnp.where(state.uploads.present, decided.cost[:first] - state.uploads.cost, 0.0))
            return cost + delay, self._afterstate(decided)

        present = state.requests.present
        with_all, after = total(present)
        without, after_without = jax.vmap(lambda row: total(present & (rows != row)))(rows)
        return Counterfactual(jnp.where(present, without - with_all, 0.0), after, after_without)

    def step(
        self, state: State, action: Int[Array, "requests"], requests: Requests | None = None
    ) -> tuple[State, Reward, Outcome]:
        """One slot: decide, transmit, serve, account, advance.

        Args:
            state: at a slot start.
            action: option of each request; rows that are absent are ignored.
            requests: those of the next slot, in place of the drawn ones.
        """
        plant = self.plant
        decided = self._decide(state, action)
        uploads = decided.uploads
        final = decided.final
        reward = self._reward(state, decided)
        outcome = self._outcome(state, decided, final)
        in_flight, lost = keep(uploads, uploads.present & ~final, plant.switches.uploads, plant.slot_s)
        servers = Servers(
            free_s=jnp.maximum(decided.servers.free_s - plant.slot_s, 0.0),
            resident=decided.servers.resident,
            # Only the order of use matters; the bound keeps float32 exact for it however long an episode lasts.
            used_s=jnp.maximum(decided.servers.used_s - plant.slot_s, -1e4),
        )
        backlog_s = jnp.maximum(self._device_backlog(state, decided) - plant.slot_s, 0.0)
        slot, trace_slot = state.slot + 1, state.trace_slot + 1
        speed = None
        if state.speed is not None:
            speed = next_speed(plant, state.seed, slot, state.speed)
            in_flight = interrupt(in_flight, speed, plant.switches.failures)
        arrivals = state.arrivals
        if requests is None:
            requests, arrivals = next_requests(
                plant, self.trace, state.seed, slot, trace_slot, state.links, state.arrivals
            )
        after = State(
            seed=state.seed,
            slot=slot,
            trace_slot=trace_slot,
            links=state.links,
            requests=requests,
            device_backlog_s=backlog_s,
            servers=servers,
            uploads=in_flight,
            broadcasts=_announce(state.broadcasts, servers, in_flight, speed),
            sent=self._remember(state, decided),
            lost=state.lost + lost,
            speed=speed,
            arrivals=arrivals,
        )
        return after, reward, outcome

    def _decide(self, state: State, action: Int[Array, "requests"]) -> _Decided:
        plant, requests = self.plant, state.requests
        sizes = plant.switches
        place, level = split_action(plant, action)
        how = manner(plant, requests, level)
        local = requests.present & (place == 0)
        remote = requests.present & (place > 0)
        server = jnp.clip(place - 1, 0, sizes.servers - 1)
        at_server = jnp.arange(sizes.servers)[None, :] == server[:, None]
        cells_of = cells(plant, state.links, requests.device)
        way = reach(requests, state.links, cells_of)
        cell = server

        def of_server(table: Float[Array, "requests servers"]) -> Float[Array, "requests"]:
            return jnp.sum(jnp.where(at_server, table, 0.0), axis=1)

        if cells_of is not None:
            cell = jnp.take_along_axis(cells_of, server[:, None], axis=1)[:, 0]
        users = jnp.ones(())
        if sizes.radio.sharing == "equal":
            at_cell = jnp.arange(sizes.servers)[None, :] == cell[:, None]
            in_cell = jnp.sum(at_cell & remote[:, None], axis=0) + jnp.sum(
                in_cells(state.uploads, sizes.servers), axis=0
            )
            users = jnp.sum(jnp.where(at_cell, in_cell[None, :], 0), axis=1).astype(way.snr.dtype)
            users = jnp.maximum(users, 1.0)
        link_bps = None if way.rate_bps is None else of_server(way.rate_bps)
        outage_s, snr = of_server(way.outage_s), of_server(way.snr)
        if how.power_ratio is not None:
            snr = snr * how.power_ratio
        active_s = transfer_s(
            plant,
            requests.size_bit,
            snr,
            of_server(way.fade),
            users,
            "uplink",
            link_bps,
        )
        sent_s = active_s + outage_s
        upload_s = sent_s if cells_of is None else sent_s + of_server(backhaul_s(plant, cells_of, requests.size_bit))
        zero = jnp.zeros_like(upload_s)
        work = how.work * requests.noise
        speed = of_server(jnp.broadcast_to(plant.server_speed, at_server.shape))
        own_speed = device_speed(plant, state.seed, requests.device)
        rows = Uploads(
            present=requests.present,
            device=requests.device.astype(jnp.int32),
            server=server.astype(jnp.int32),
            decided_slot=jnp.broadcast_to(state.slot, server.shape),
            row=jnp.arange(sizes.requests, dtype=jnp.int32),
            decided_s=zero,
            generated_s=requests.generated_s,
            upload_start_s=jnp.where(local, 0.0, outage_s),
            ready_s=jnp.where(local, 0.0, upload_s),
            service_s=jnp.where(local, work / own_speed, work / speed),
            model=requests.model.astype(jnp.int32),
            load_s=requests.load_s,
            download_s=jnp.where(local, 0.0, of_server(download_time_s(plant, requests, state.links, cells_of)))
            if sizes.radio.download
            else zero,
            deadline_s=requests.deadline_s,
            latency_s=zero,
            cost=zero,
            shared=None,
            cell=None if cells_of is None else cell,
            sent_s=None if cells_of is None else jnp.where(local, 0.0, sent_s),
            quality=how.quality,
            tx_power_w=how.tx_power_w,
        )
        if state.uploads.shared is not None:
            rows = rows._replace(shared=SharedTask(rows.service_s, jnp.zeros_like(local), zero, zero))
        merged = jax.tree.map(lambda old, new: jnp.concatenate([old, new]), state.uploads, rows)
        none_in_flight = jnp.zeros(sizes.uploads, bool)
        is_local = jnp.concatenate([none_in_flight, local])
        latest_start_s = (
            merged.generated_s + merged.deadline_s if sizes.drop else jnp.full_like(merged.ready_s, jnp.inf)
        )
        served, servers, merged = self._serve(state, merged, merged.present & ~is_local, latest_start_s)
        own = local_queue(
            local,
            requests.device,
            state.device_backlog_s[requests.device],
            rows.service_s,
            latest_start_s[sizes.uploads :] if sizes.drop else None,
        )
        served = jax.tree.map(
            lambda remote_field, local_field: jnp.where(
                is_local, jnp.concatenate([jnp.zeros(sizes.uploads, local_field.dtype), local_field]), remote_field
            ),
            served,
            own,
        )
        account = accounts(plant, merged, is_local, served)
        latency_s, cost = account.latency_s, costs(plant, merged, is_local, served, account)
        # First in, first out, a task that has reached its queue is out of the reach of later ones; where servers share
        # their time it is not until it ends.
        settled_s = merged.ready_s if merged.shared is None else served.end_s
        return _Decided(
            uploads=merged._replace(latency_s=latency_s, cost=cost),
            local=is_local,
            served=served,
            final=merged.present & (is_local | (settled_s < plant.slot_s)),
            servers=servers,
            account=account,
            latency_s=latency_s,
            cost=cost,
            local_end_s=jnp.where(local & ~own.dropped, own.end_s, 0.0),
        )

    def _serve(
        self, state: State, tasks: Uploads, offloaded: Bool[Array, "rows"], latest_start_s: Float[Array, "rows"]
    ) -> tuple[Served, Servers, Uploads]:
        """Passes the offloaded tasks through the servers, by the discipline of the plant."""
        plant, sizes = self.plant, self.plant.switches
        memory_gb = plant.catalogue.memory_gb[: sizes.models]
        if tasks.shared is None:
            queued = Queued(
                present=offloaded,
                server=tasks.server,
                ready_s=tasks.ready_s,
                service_s=tasks.service_s,
                model=tasks.model,
                load_s=tasks.load_s,
                latest_start_s=latest_start_s,
            )
            if sizes.gpus == 1 and not sizes.switching and not sizes.drop:
                served, free_s = fifo_one_gpu(state.servers.free_s[:, 0], queued, plant.slot_s)
                return served, state.servers._replace(free_s=free_s[:, None]), tasks
            served, servers = fifo_many_gpus(state.servers, queued, plant.slot_s, memory_gb, plant.server_memory_gb)
            return served, servers, tasks
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
        )
        at_work = SharedServers(
            gpus=plant.server_gpus,
            limit=plant.server_limit,
            beta=plant.server_beta,
            speed=jnp.ones_like(plant.server_speed) if state.speed is None else state.speed,
            resident=state.servers.resident,
            used_s=state.servers.used_s,
        )
        done = share(sharing, at_work, plant.slot_s, memory_gb, plant.server_memory_gb)
        # What the servers announce: seconds until the work that has arrived is done, at their best rate.
        arrived = offloaded & (tasks.ready_s < plant.slot_s) & ~(done.end_s < plant.slot_s)
        at_server = arrived[:, None] & (tasks.server[:, None] == jnp.arange(sizes.servers)[None, :])
        left_s = jnp.sum(jnp.where(at_server, done.left_s[:, None], 0.0), axis=0) / plant.server_best_rate
        servers = Servers((plant.slot_s + left_s)[:, None], done.resident, done.used_s)
        shared = SharedTask(done.left_s, done.serving, done.start_s, done.switch_s)
        return Served(done.start_s, done.switch_s, done.end_s, done.dropped), servers, tasks._replace(shared=shared)

    def _afterstate(self, decided: _Decided) -> Afterstate:
        """What the servers are left with when the slot ends."""
        plant, uploads = self.plant, decided.uploads
        left_s = jnp.maximum(decided.servers.free_s - plant.slot_s, 0.0)
        there = jnp.isfinite(left_s)
        coming = uploads.present & ~decided.local & (uploads.ready_s >= plant.slot_s)
        at_server = coming[:, None] & (uploads.server[:, None] == jnp.arange(plant.switches.servers)[None, :])
        return Afterstate(
            wait_s=jnp.sum(jnp.where(there, left_s, 0.0), axis=1) / jnp.sum(there, axis=1),
            first_s=jnp.min(left_s, axis=1),
            coming_s=jnp.sum(jnp.where(at_server, uploads.service_s[:, None], 0.0), axis=0) / plant.server_gpus,
            resident=decided.servers.resident,
        )

    def _reward(self, state: State, decided: _Decided) -> Reward:
        rows = self.plant.switches.uploads
        mu = self.plant.switches.reward.cooperation
        own = -jnp.where(state.requests.present, decided.cost[rows:], 0.0)
        changes = jnp.where(state.uploads.present, decided.cost[:rows] - state.uploads.cost, 0.0)
        team = jnp.sum(own) - jnp.sum(changes)
        return Reward(own, team, (1 - mu) * own + mu * team)

    def _device_backlog(self, state: State, decided: _Decided) -> Float[Array, "devices"]:
        """Backlog of the devices at the start of the slot with what they took on in it."""
        return state.device_backlog_s.at[state.requests.device].max(decided.local_end_s)

    def _remember(self, state: State, decided: _Decided) -> Sent:
        """What the devices remember of this slot and those before."""
        first = self.plant.switches.uploads
        rows = jax.tree.map(lambda field: field[first:], decided.uploads)
        return remember(self.plant, state.sent, state.requests, rows, decided.local[first:])

    def _outcome(self, state: State, decided: _Decided, final: Bool[Array, "rows"]) -> Outcome:
        rows, served = decided.uploads, decided.served
        return Outcome(
            final=final,
            decided_slot=rows.decided_slot,
            row=rows.row,
            device=rows.device,
            option=jnp.where(decided.local, 0, rows.server + 1),
            model=rows.model,
            generated_s=rows.generated_s,
            decided_s=rows.decided_s,
            upload_start_s=rows.upload_start_s,
            upload_end_s=rows.ready_s,
            start_s=served.start_s,
            end_s=served.end_s,
            deadline_s=rows.deadline_s,
            dropped=served.dropped,
            account=decided.account,
            server_wait_s=state.broadcasts.wait_s[0],
            backlog_s=jnp.sum(jnp.where(jnp.isfinite(state.servers.free_s), state.servers.free_s, 0.0))
            + jnp.sum(state.device_backlog_s),
            quality=rows.quality,
        )

    def _first_residents(self) -> Bool[Array, "servers models"]:
        """Models that a server holds at the start: the most popular ones that fit its memory together."""
        models = self.plant.switches.models
        cdf = self.plant.catalogue.model_cdf
        popularity = jnp.diff(cdf, prepend=jnp.zeros(1, cdf.dtype))
        order = jnp.argsort(-popularity)[:models]
        filled = jnp.cumsum(self.plant.catalogue.memory_gb[order])
        fits = filled[None, :] <= self.plant.server_memory_gb[:, None]
        return jnp.zeros((self.plant.switches.servers, models), bool).at[:, order].set(fits)


def _announce(old: Broadcasts, servers: Servers, uploads: Uploads, speed: Float[Array, "servers"] | None) -> Broadcasts:
    """What the servers say at the new slot start, in front of what they said before."""
    at_server = in_cells(uploads, servers.free_s.shape[0])
    fresh = Broadcasts(
        wait_s=jnp.min(servers.free_s, axis=1),
        uploads=jnp.sum(at_server, axis=0).astype(old.uploads.dtype),
        resident=servers.resident,
        up=None if speed is None else speed > 0,
    )
    return jax.tree.map(lambda new, before: jnp.concatenate([new[None], before[:-1]]), fresh, old)


def seeds(first: int, count: int) -> UInt32[Array, "count 2"]:
    """Seeds of `count` environments: first, first + 1, ..."""
    numbers = [first + offset for offset in range(count)]
    return jnp.array([[number & 0xFFFFFFFF, number >> 32] for number in numbers], jnp.uint32)
