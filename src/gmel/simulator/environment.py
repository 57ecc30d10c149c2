"""The environment: reset, observe, step. One slot is one step; see `docs/architecture.md` for its order."""

from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt32

from gmel.physics.queueing import Served, Servers, local_queue
from gmel.physics.random import mix_seed
from gmel.scenario.schema import Scenario
from gmel.simulator.account import accounts, costs, device_energy_j
from gmel.simulator.arrivals import first_memory
from gmel.simulator.broadcasts import announce, first_broadcasts
from gmel.simulator.caching import count_asked, first_cache, first_residents, next_cache, refuse_useless, statistics_of
from gmel.simulator.devices import device_speed, discharge, first_battery_j, nothing_sent, remember
from gmel.simulator.failures import next_speed
from gmel.simulator.gangs import gang_of, no_gangs
from gmel.simulator.levels import manner, split_action
from gmel.simulator.motion import first_scene, next_scene
from gmel.simulator.observation import observe, split_of
from gmel.simulator.parts import parts_on_their_way, send_parts
from gmel.simulator.plant import Plant, build_plant
from gmel.simulator.sending import send
from gmel.simulator.service import serve
from gmel.simulator.state import (
    Account,
    CacheLoads,
    CacheStatistics,
    Gangs,
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
from gmel.simulator.uploads import each_part, for_each_part, interrupt, keep, no_uploads

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
    radio_end_s: Float[Array, "requests"]
    device_energy_j: Float[Array, "requests"] | None
    """What each request takes from the battery of its device, as projected; only with batteries."""
    gangs: Gangs | None


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

    def reset(
        self,
        seed: UInt32[Array, "2"],
        trace_slot: int | Int[Array, ""] = 0,
        cache: Bool[Array, "servers models"] | None = None,
    ) -> State:
        """An empty plant with its first requests. `trace_slot` is where a trace starts, `cache` as in `step`."""
        sizes = self.plant.switches
        refuse_useless(cache, sizes)
        seed = mix_seed(seed)
        links, motion = first_scene(self.plant, seed)
        slot = jnp.zeros((), jnp.int32)
        trace_slot = jnp.asarray(trace_slot, jnp.int32)
        absent = jnp.arange(sizes.gpus)[None, :] >= self.plant.server_gpus[:, None]
        free_s = jnp.where(absent, jnp.inf, 0.0).astype(self.plant.slot_s.dtype)
        servers = Servers(
            free_s=free_s,
            resident=first_residents(self.plant) if sizes.cache is None else first_cache(self.plant, seed, cache),
            used_s=jnp.zeros((sizes.servers, sizes.models), free_s.dtype),
            loaded_s=None if sizes.cache is None else jnp.zeros((sizes.servers, sizes.models), free_s.dtype),
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
            broadcasts=first_broadcasts(self.plant, servers, ages[0]),
            sent=nothing_sent(ages[0] - 2, sizes.requests * sizes.parts, sizes.servers, free_s.dtype),
            lost=jnp.zeros((), jnp.int32),
            speed=jnp.ones(sizes.servers, free_s.dtype) if sizes.failures is not None else None,
            arrivals=arrivals,
            gangs=no_gangs(self.plant) if sizes.discipline == "gang" else None,
            radio_backlog_s=jnp.zeros(sizes.devices, free_s.dtype) if sizes.radio.one_at_a_time else None,
            motion=motion,
            battery_j=first_battery_j(self.plant, seed),
            asked=None if sizes.cache is None else jnp.zeros((sizes.servers, sizes.models), jnp.int32),
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

    def cache_is_due(self, state: State) -> Bool[Array, ""]:
        """Whether `step` from this state ends where the models that servers hold are chosen anew."""
        cache = self.plant.switches.cache
        return jnp.zeros((), bool) if cache is None else (state.slot + 1) % cache.decision_slots == 0

    def cache_statistics(self, state: State) -> CacheStatistics:
        """What a choice of the models to hold may look at; only with `cache` in the scenario."""
        assert state.asked is not None
        asked = count_asked(self.plant, state.asked, state.requests, state.links)
        return statistics_of(self.plant, asked, state.servers.resident)

    def step(
        self,
        state: State,
        action: Int[Array, "requests"],
        requests: Requests | None = None,
        cache: Bool[Array, "servers models"] | None = None,
    ) -> tuple[State, Reward, Outcome]:
        """One slot: decide, transmit, serve, account, advance.

        Args:
            state: at a slot start.
            action: option of each request; rows that are absent are ignored.
            requests: those of the next slot, in place of the drawn ones.
            cache: models to hold from the next slot on, in place of the choice by `cache.policy` of the scenario. It
                counts where it is time to choose (`cache_is_due`); what does not fit a server is left out.
        """
        plant = self.plant
        refuse_useless(cache, plant.switches)
        decided = self._decide(state, action)
        uploads = decided.uploads
        final = decided.final
        reward = self._reward(state, decided)
        outcome = self._outcome(state, decided, final)
        in_flight, lost = keep(uploads, uploads.present & ~final, plant.switches.uploads, plant.slot_s)
        # Which GPU is free for longest matters to gangs: there the time goes on, bounded so that float32 tells them
        # apart.
        least_s = 0.0 if decided.gangs is None else -1e4
        servers = Servers(
            free_s=jnp.maximum(decided.servers.free_s - plant.slot_s, least_s),
            resident=decided.servers.resident,
            # Only the order of use matters; the bound keeps float32 exact for it however long an episode lasts.
            used_s=jnp.maximum(decided.servers.used_s - plant.slot_s, -1e4),
            loaded_s=None if decided.servers.loaded_s is None else decided.servers.loaded_s - plant.slot_s,
        )
        backlog_s = jnp.maximum(self._device_backlog(state, decided) - plant.slot_s, 0.0)
        gangs, radio_backlog_s = decided.gangs, state.radio_backlog_s
        if gangs is not None:
            gangs = gangs._replace(head_s=jnp.maximum(gangs.head_s - plant.slot_s, -1e4))
        if radio_backlog_s is not None:
            busy_s = radio_backlog_s.at[state.requests.device].max(decided.radio_end_s)
            radio_backlog_s = jnp.maximum(busy_s - plant.slot_s, 0.0)
        slot, trace_slot = state.slot + 1, state.trace_slot + 1
        asked = state.asked
        if asked is not None:
            asked = count_asked(plant, asked, state.requests, state.links)
            servers, asked, loads = next_cache(plant, state.seed, slot, servers, asked, cache)
            outcome, reward = outcome._replace(cache=loads), self._less_loads(reward, loads)
        speed = None
        if state.speed is not None:
            speed = next_speed(plant, state.seed, slot, state.speed)
            in_flight = interrupt(in_flight, speed, plant.switches.failures)
        links, motion = next_scene(plant, state.seed, slot, state.links, state.motion)
        arrivals = state.arrivals
        if requests is None:
            requests, arrivals = next_requests(plant, self.trace, state.seed, slot, trace_slot, links, arrivals)
        battery_j = None
        if state.battery_j is not None and decided.device_energy_j is not None:
            battery_j = discharge(plant, state.battery_j, state.requests, decided.device_energy_j)
            requests = requests._replace(present=requests.present & (battery_j[requests.device] > 0))
        after = State(
            seed=state.seed,
            slot=slot,
            trace_slot=trace_slot,
            links=links,
            requests=requests,
            device_backlog_s=backlog_s,
            servers=servers,
            uploads=in_flight,
            broadcasts=announce(plant, state, servers, in_flight, speed, gangs),
            sent=self._remember(state, decided),
            lost=state.lost + lost,
            speed=speed,
            arrivals=arrivals,
            gangs=gangs,
            radio_backlog_s=radio_backlog_s,
            motion=motion,
            battery_j=battery_j,
            asked=asked,
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
        split = split_of(plant, state, place, level) if sizes.parts > 1 else None
        if split is None:
            every = way = send(plant, state, remote, server, how)
        else:
            every = send_parts(plant, state, remote, split, how)
            way = jax.tree.map(lambda field: field[:: sizes.parts], every)
        zero = jnp.zeros_like(way.ready_s)
        work = how.work * requests.noise
        speed = plant.server_speed[server]
        own_speed = device_speed(plant, state.seed, requests.device)
        gang = gang_of(plant, requests)
        quality = how.quality
        if quality is not None:
            quality = (
                quality[:, 0] if quality.shape[1] == 1 else jnp.take_along_axis(quality, place[:, None], axis=1)[:, 0]
            )
        rows = Uploads(
            present=requests.present,
            device=requests.device.astype(jnp.int32),
            server=server.astype(jnp.int32),
            decided_slot=jnp.broadcast_to(state.slot, server.shape),
            row=jnp.arange(sizes.requests, dtype=jnp.int32),
            decided_s=zero,
            generated_s=requests.generated_s,
            upload_start_s=jnp.where(local, 0.0, way.start_s),
            ready_s=jnp.where(local, 0.0, way.ready_s),
            service_s=jnp.where(local, work / own_speed, work / (speed if gang is None else speed * gang.speedup)),
            model=requests.model.astype(jnp.int32),
            load_s=requests.load_s if gang is None else gang.load_s,
            download_s=jnp.where(local, 0.0, way.download_s),
            deadline_s=requests.deadline_s,
            latency_s=zero,
            cost=zero,
            shared=None,
            cell=way.cell,
            sent_s=None if way.cell is None else jnp.where(local, 0.0, way.sent_s),
            quality=quality,
            tx_power_w=how.tx_power_w,
            units=how.steps if sizes.discipline == "capacity" else None,
            gpus=None if gang is None else gang.gpus,
            band_weight=how.band_weight,
            cpu_weight=how.cpu_weight,
        )
        if split is not None:
            rows = rows._replace(parts=parts_on_their_way(plant, split, every, local, rows.service_s, work))
        if state.uploads.shared is not None:
            rows = rows._replace(shared=SharedTask(rows.service_s, jnp.zeros_like(local), zero, zero))
        merged = jax.tree.map(lambda old, new: jnp.concatenate([old, new]), state.uploads, rows)
        none_in_flight = jnp.zeros(sizes.uploads, bool)
        is_local = jnp.concatenate([none_in_flight, local])
        latest_start_s = (
            merged.generated_s + merged.deadline_s if sizes.drop else jnp.full_like(merged.ready_s, jnp.inf)
        )
        if sizes.max_wait_s is not None:
            latest_start_s = jnp.where(
                is_local, latest_start_s, jnp.minimum(latest_start_s, merged.ready_s + sizes.max_wait_s)
            )
        served, servers, merged, gangs = serve(plant, state, merged, merged.present & ~is_local, latest_start_s)
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
        if merged.parts is not None:
            settled_s = jnp.max(jnp.where(merged.parts.present, merged.parts.ready_s, -jnp.inf), axis=1)
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
            radio_end_s=jnp.where(remote, way.sent_s, 0.0),
            gangs=gangs,
            device_energy_j=None
            if state.battery_j is None
            else device_energy_j(plant, merged, is_local, account)[sizes.uploads :],
        )

    def _afterstate(self, decided: _Decided) -> Afterstate:
        """What the servers are left with when the slot ends."""
        plant, uploads = self.plant, each_part(decided.uploads)
        local = for_each_part(decided.local, decided.uploads)
        left_s = jnp.maximum(decided.servers.free_s - plant.slot_s, 0.0)
        there = jnp.isfinite(left_s)
        coming = uploads.present & ~local & (uploads.ready_s >= plant.slot_s)
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

    def _less_loads(self, reward: Reward, loads: CacheLoads) -> Reward:
        """Models that are loaded by choice cost their energy, which no task bears."""
        weights = self.plant.switches.reward
        if not weights.energy:
            return reward
        cost = weights.energy * jnp.sum(loads.energy_j) / weights.energy_scale_j
        return reward._replace(team=reward.team - cost, mixed=reward.mixed - weights.cooperation * cost)

    def _device_backlog(self, state: State, decided: _Decided) -> Float[Array, "devices"]:
        """Backlog of the devices at the start of the slot with what they took on in it."""
        return state.device_backlog_s.at[state.requests.device].max(decided.local_end_s)

    def _remember(self, state: State, decided: _Decided) -> Sent:
        """What the devices remember of this slot and those before."""
        first = self.plant.switches.uploads
        rows = jax.tree.map(lambda field: field[first:], decided.uploads)
        noise, local = (for_each_part(field, rows) for field in (state.requests.noise, decided.local[first:]))
        return remember(self.plant, state.sent, noise, each_part(rows), local)

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
            backlog_s=jnp.sum(
                jnp.where(jnp.isfinite(state.servers.free_s), jnp.maximum(state.servers.free_s, 0.0), 0.0)
            )
            + jnp.sum(state.device_backlog_s),
            quality=rows.quality,
            parts=None if rows.parts is None else jnp.sum(rows.parts.present, axis=1, dtype=jnp.int32),
        )


def seeds(first: int, count: int) -> UInt32[Array, "count 2"]:
    """Seeds of `count` environments: first, first + 1, ..."""
    numbers = [first + offset for offset in range(count)]
    return jnp.array([[number & 0xFFFFFFFF, number >> 32] for number in numbers], jnp.uint32)
