"""References that see everything: sequential earliest finish, best response, the per-slot optimum (L4 and L5).

They ask the environment what a joint action would do (`Environment.project`), so they are right for every feature the
simulator has. The number of requests in a slot is usually far below the table's capacity: the search runs on the
smallest of a few truncated tables that holds them, chosen at run time (so do not `vmap` them; map them).
"""

import dataclasses
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from gmel.policies.policy import CentralPolicy, StatelessPolicy
from gmel.simulator.environment import Environment
from gmel.simulator.state import Observation, State, option, other_cost_s

__all__ = ["BestResponse", "Coordinated", "EarliestFinish", "SlotOptimum"]

Search = Callable[[Environment, State], Int[Array, "requests"]]


class Coordinated(StatelessPolicy):
    """Requests reserve servers one after the other in row order: one round of messages in the slot.

    Each takes the option with the earliest finish given the reservations before it, as if its upload and service were
    queued behind them. Of a task that is split each part reserves its server.
    """

    def choose(self, observation: Observation, key: PRNGKeyArray) -> Int[Array, "requests"]:
        """Sequential reservation."""
        del key
        if observation.parts_s is not None:
            return _reserve_parts(observation, observation.parts_s)
        gpus = option(observation, "gpus")
        # Level after level, the places come again in the same order, the device itself first.
        places = gpus.shape[-1] // jnp.sum(option(observation, "local")[0] > 0).astype(jnp.int32)
        run_s = option(observation, "switch_s") + option(observation, "service_s")

        def reserve(
            booked_s: Float[Array, "options"], row: tuple[jax.Array, ...]
        ) -> tuple[Float[Array, "options"], Int[Array, ""]]:
            upload_s, backlog_s, run, download_s, mask, count, present, local = row
            # A reservation on a device binds that device alone; others never see it.
            waiting_s = jnp.where(local > 0, backlog_s, backlog_s + booked_s)
            start_s = jnp.maximum(upload_s, waiting_s)
            choice = jnp.argmin(jnp.where(mask, start_s + run + download_s, jnp.inf))
            # The levels of a place share its queue.
            same = jnp.arange(booked_s.shape[0]) % places == choice % places
            taken = same & present & (local == 0)
            # On several GPUs a task holds one of them: the next wait grows by its share.
            finish_s = jnp.where(count > 1, waiting_s + run / count, start_s + run)[choice]
            return jnp.where(taken, finish_s - backlog_s, booked_s), choice

        rows = (
            option(observation, "upload_s"),
            option(observation, "backlog_s"),
            run_s,
            option(observation, "download_s") + other_cost_s(observation),
            observation.mask,
            gpus,
            observation.present,
            option(observation, "local"),
        )
        return jax.lax.scan(reserve, jnp.zeros(gpus.shape[-1], gpus.dtype), rows)[1]


def _reserve_parts(
    observation: Observation, parts_s: Float[Array, "requests options servers"]
) -> Int[Array, "requests"]:
    """As :class:`Coordinated`, with reservations by server in place of reservations by option."""
    servers = parts_s.shape[-1]
    # The place of each option: the device itself first, then the servers, level after level.
    place = jnp.arange(parts_s.shape[1]) % (1 + servers)
    at = place[:, None] == 1 + jnp.arange(servers)
    download_s = option(observation, "download_s")

    def reserve(
        booked_s: Float[Array, "servers"], row: tuple[jax.Array, ...]
    ) -> tuple[Float[Array, "servers"], Int[Array, ""]]:
        upload_s, backlog_s, switch_s, service_s, download_s, other_s, mask, gpus, present, parts = row
        # What was booked here before, and when a part of the option at each server ends behind that.
        waiting_s = backlog_s + jnp.where(place > 0, booked_s[place - 1], 0.0)
        end_s = jnp.maximum(upload_s, waiting_s) + switch_s + service_s
        wait_s, count = backlog_s[1 : 1 + servers] + booked_s, gpus[1 : 1 + servers]
        others_s = jnp.max(jnp.where((parts > 0) & ~at, wait_s + parts, -jnp.inf), axis=1)
        choice = jnp.argmin(jnp.where(mask, jnp.maximum(end_s + download_s, others_s) + other_s, jnp.inf))
        # On several GPUs a task holds one of them: the next wait grows by its share.
        run_s = parts[choice] + jnp.where(at[choice], switch_s[choice], 0.0)
        until_s = jnp.where(count > 1, wait_s + run_s / count, jnp.where(at[choice], end_s[choice], wait_s + run_s))
        taken = present & (parts[choice] > 0)
        return jnp.where(taken, until_s - backlog_s[1 : 1 + servers], booked_s), choice

    rows = (
        option(observation, "upload_s"),
        option(observation, "backlog_s"),
        option(observation, "switch_s"),
        option(observation, "service_s"),
        download_s,
        jnp.zeros_like(download_s) + other_cost_s(observation),
        observation.mask,
        option(observation, "gpus"),
        observation.present,
        parts_s,
    )
    return jax.lax.scan(reserve, jnp.zeros(servers, parts_s.dtype), rows)[1]


class EarliestFinish(CentralPolicy):
    """Each request in row order takes the option that finishes it earliest, exactly predicted, overtaking included."""

    def assign(self, environment: Environment, state: State, key: PRNGKeyArray) -> Int[Array, "requests"]:
        """Sequential greedy assignment."""
        del key
        return _on_smallest_table(environment, state, _earliest_finish)


class BestResponse(CentralPolicy):
    """L4: rounds of selfish best responses from the sequential assignment until nobody gains (a Nash equilibrium)."""

    rounds: int = eqx.field(static=True, default=12)

    def assign(self, environment: Environment, state: State, key: PRNGKeyArray) -> Int[Array, "requests"]:
        """Best-response dynamics; after `rounds` rounds the last assignment stands."""
        del key

        def search(environment: Environment, state: State) -> Int[Array, "requests"]:
            return _best_response(environment, state, self.rounds)

        return _on_smallest_table(environment, state, search)


class SlotOptimum(CentralPolicy):
    """L5: local search (moves of one request, swaps of two) for the least total latency of the slot.

    Counts the delay that it causes to uploads in flight. Against brute force on small slots the gap is tested.
    """

    rounds: int = eqx.field(static=True, default=64)

    def assign(self, environment: Environment, state: State, key: PRNGKeyArray) -> Int[Array, "requests"]:
        """Steepest descent from the better of the sequential and the best-response assignment."""
        del key

        def search(environment: Environment, state: State) -> Int[Array, "requests"]:
            start = _best_response(environment, state, 12)
            return _local_search(environment, state, start, self.rounds)

        return _on_smallest_table(environment, state, search)


def _on_smallest_table(environment: Environment, state: State, search: Search) -> Int[Array, "requests"]:
    """Runs the search on the smallest truncated table that holds all requests and uploads in flight."""
    sizes = environment.plant.switches
    tables = [(r, u) for r, u in ((4, 2), (8, 4), (12, 8)) if r < sizes.requests and u < sizes.uploads]
    tables.append((sizes.requests, sizes.uploads))
    # Rows up to the last one that is present; drawn requests come first in their table, given ones may not.
    requests, uploads = _used(state.requests.present), _used(state.uploads.present)
    fits = jnp.array([(requests <= r) & (uploads <= u) for r, u in tables])

    def on_table(table: tuple[int, int]) -> Callable[[State], Int[Array, "requests"]]:
        def run(whole: State) -> Int[Array, "requests"]:
            small = _truncate(environment, *table)
            part = whole._replace(
                requests=jax.tree.map(lambda field: field[: table[0]], whole.requests),
                uploads=jax.tree.map(lambda field: field[: table[1]], whole.uploads),
            )
            action = search(small, part)
            return jnp.zeros(sizes.requests, action.dtype).at[: table[0]].set(action)

        return run

    return jax.lax.switch(jnp.argmax(fits), [on_table(table) for table in tables], state)


def _used(present: Bool[Array, "rows"]) -> Int[Array, ""]:
    return jnp.max(jnp.where(present, jnp.arange(1, present.shape[0] + 1), 0))


def _truncate(environment: Environment, requests: int, uploads: int) -> Environment:
    plant = environment.plant
    switches = dataclasses.replace(plant.switches, requests=requests, uploads=uploads)
    return Environment(dataclasses.replace(plant, switches=switches), None)


def _options(environment: Environment, state: State) -> tuple[Int[Array, "options"], jax.Array]:
    return jnp.arange(environment.options), environment.observe(state, fresh=True).mask


def _value_of(environment: Environment, state: State, action: jax.Array, row: jax.Array) -> jax.Array:
    """What a request wants little of: its latency, or its cost where more than latency counts."""
    projection = environment.project(state, action)
    return (projection.cost if environment.plant.switches.other_costs else projection.latency_s)[row]


def _total(environment: Environment, state: State, action: jax.Array) -> jax.Array:
    projection = environment.project(state, action)
    if environment.plant.switches.other_costs:
        return jnp.sum(projection.cost) + projection.delay_cost
    return jnp.sum(projection.latency_s) + projection.delay_s


def _earliest_finish(environment: Environment, state: State) -> Int[Array, "requests"]:
    choices, mask = _options(environment, state)
    rows = jnp.arange(environment.requests)

    def place(action: jax.Array, row: jax.Array) -> tuple[jax.Array, None]:
        known = state._replace(requests=state.requests._replace(present=state.requests.present & (rows <= row)))
        tried = jnp.where(rows[None, :] == row, choices[:, None], action[None, :])
        latency_s = jax.vmap(lambda a: _value_of(environment, known, a, row))(tried)
        return tried[jnp.argmin(jnp.where(mask[row], latency_s, jnp.inf))], None

    return jax.lax.scan(place, jnp.zeros(environment.requests, jnp.int32), rows)[0]


def _best_response(environment: Environment, state: State, rounds: int) -> Int[Array, "requests"]:
    choices, mask = _options(environment, state)
    rows = jnp.arange(environment.requests)

    def respond(action: jax.Array, row: jax.Array) -> tuple[jax.Array, jax.Array]:
        tried = jnp.where(rows[None, :] == row, choices[:, None], action[None, :])
        latency_s = jnp.where(mask[row], jax.vmap(lambda a: _value_of(environment, state, a, row))(tried), jnp.inf)
        best = jnp.argmin(latency_s)
        # A tie or a rounding error is no reason to move: the dynamics must come to rest.
        gains = state.requests.present[row] & (latency_s[best] < latency_s[action[row]] - 1e-6)
        return jnp.where(gains, tried[best], action), gains

    def one_round(carry: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        action, _, count = carry
        action, moved = jax.lax.scan(respond, action, rows)
        return action, jnp.any(moved), count + 1

    start = (_earliest_finish(environment, state), jnp.array(True), jnp.array(0))
    return jax.lax.while_loop(lambda carry: carry[1] & (carry[2] < rounds), one_round, start)[0]


def _local_search(environment: Environment, state: State, start: jax.Array, rounds: int) -> Int[Array, "requests"]:
    choices, mask = _options(environment, state)
    count = environment.requests
    rows = jnp.arange(count)
    moved_row, moved_to = (grid.reshape(-1) for grid in jnp.meshgrid(rows, choices, indexing="ij"))
    first, second = jnp.triu_indices(count, 1)
    present = state.requests.present
    move_allowed = mask[moved_row, moved_to] & present[moved_row]

    def improve(
        carry: tuple[jax.Array, jax.Array, jax.Array, jax.Array],
    ) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        action, value, _, done = carry
        moves = jnp.where(rows[None, :] == moved_row[:, None], moved_to[:, None], action[None, :])
        swaps = jnp.where(rows[None, :] == first[:, None], action[second][:, None], action[None, :])
        swaps = jnp.where(rows[None, :] == second[:, None], action[first][:, None], swaps)
        swap_allowed = present[first] & present[second] & mask[first, action[second]] & mask[second, action[first]]
        tried = jnp.concatenate([moves, swaps])
        allowed = jnp.concatenate([move_allowed, swap_allowed])
        values = jnp.where(allowed, jax.vmap(lambda a: _total(environment, state, a))(tried), jnp.inf)
        best = jnp.argmin(values)
        better = values[best] < value - 1e-5
        return jnp.where(better, tried[best], action), jnp.where(better, values[best], value), better, done + 1

    first_value = _total(environment, state, start)
    loop = (start, first_value, jnp.array(True), jnp.array(0))
    return jax.lax.while_loop(lambda carry: carry[2] & (carry[3] < rounds), improve, loop)[0]
