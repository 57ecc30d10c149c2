"""Running policies on episodes, and what is measured on them.

Every policy meets the same traffic: requests, links and noise are functions of the seed of an episode and do not depend
on what is decided.
"""

import itertools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray
from scipy import stats

from gmel.physics.presence import present
from gmel.policies.policy import CentralPolicy, Policy, decide, initial_memory
from gmel.scenario.errors import InputError
from gmel.simulator.environment import Environment, seeds
from gmel.simulator.presence import stays_at
from gmel.simulator.records import Records, task_records
from gmel.simulator.state import Outcome, Uploads

__all__ = ["AnyPolicy", "Episodes", "Measured", "run_episodes"]

AnyPolicy = Policy[Any] | CentralPolicy

DRAIN_SLOTS = 64
"""Slots after the counted ones, with traffic going on, in which the last counted tasks become final."""


@dataclass(frozen=True)
class Episodes:
    """Which traffic a policy is measured on: `count` episodes of `slots`, of which `warmup_slots` are left out.

    Episode k has the seed `first_seed` + k and starts a trace at `trace_slots[k]`.
    """

    count: int
    slots: int
    warmup_slots: int
    first_seed: int
    trace_slots: tuple[int, ...] = ()

    def starts(self) -> NDArray[np.int32]:
        """Slot of the trace at which each episode starts."""
        return np.array(self.trace_slots or (0,) * self.count, dtype=np.int32)


@dataclass(frozen=True)
class Measured:
    """One policy on all episodes.

    `records`: counted tasks of each episode (decided after the warm-up and before the drain). `wait_s`: time until a
    GPU is free per slot and server of each episode. `backlog_s`: all queues together. `unfinished`: counted tasks that
    were not final at the end of the drain, per episode; they count as missed. `cache_loads`, `cache_load_j`: models
    loaded by choice, not for a task, in the counted slots of each episode, and the energy of that (None: no choice).
    `steady`: the first slot and the one behind the last of the longest time in which no server comes or goes (None:
    they never do).
    """

    records: list[Records]
    wait_s: NDArray[np.float64]
    backlog_s: NDArray[np.float64]
    unfinished: NDArray[np.int64]
    cache_loads: NDArray[np.int64] | None = None
    cache_load_j: NDArray[np.float64] | None = None
    steady: tuple[int, int] | None = None

    def per_episode(self, statistic: Callable[[Records], float]) -> NDArray[np.float64]:
        """A statistic of each episode's records."""
        return np.array([statistic(records) for records in self.records])

    @property
    def unstable(self) -> bool:
        """Whether the backlog still grows: it has no mean then, only a horizon."""
        return _grows(self._steady_backlog_s)

    def overloaded(self, load: float) -> bool:
        """Whether a mean would say more about the horizon than about the policy, at this offered load.

        Where the servers are offered more than they can do (load >= 1), growth by a quarter is enough; elsewhere it
        must be significant (`unstable`), since a queue in balance wanders.
        """
        return self.unstable or (load >= 1.0 and _gains(self._steady_backlog_s))

    @property
    def _steady_backlog_s(self) -> NDArray[np.float64]:
        """The backlog while the same servers are there: that it grows when one leaves says nothing of the load."""
        return self.backlog_s if self.steady is None else self.backlog_s[:, slice(*self.steady)]


def run_episodes(environment: Environment, policy: AnyPolicy, episodes: Episodes, key: jax.Array) -> Measured:
    """Runs a policy on all episodes, in parallel where the policy allows it.

    Raises:
        InputError: the table of uploads in flight is too small for the scenario.
    """
    slots = episodes.slots + DRAIN_SLOTS
    starts = jnp.asarray(episodes.starts())
    words = seeds(episodes.first_seed, episodes.count)
    keys = jax.random.split(key, episodes.count)
    if isinstance(policy, CentralPolicy):
        # Their search branches at run time, so episodes run one after the other, on one thread per core.
        workers = max(1, min(episodes.count, os.cpu_count() or 1))
        parts = np.array_split(np.arange(episodes.count), workers)
        with ThreadPoolExecutor(workers) as pool:
            results = list(
                pool.map(
                    lambda part: jax.device_get(
                        _run_in_turn(environment, policy, words[part], starts[part], keys[part], slots)
                    ),
                    [part for part in parts if part.size],
                )
            )
        outcome, left, lost = jax.tree.map(lambda *leaves: np.concatenate(leaves), *results)
    else:
        outcome, left, lost = jax.device_get(_run_together(environment, policy, words, starts, keys, slots))
    if np.any(lost):
        rows = environment.plant.switches.uploads
        raise InputError(
            f"max_uploads = {rows}: {int(lost.sum())} uploads in flight did not fit a table of that many rows; "
            "raise max_uploads in the scenario, or lower arrivals.load"
        )
    return _measured(outcome, left, episodes, environment)


def _one_episode(
    environment: Environment, policy: AnyPolicy, seed: jax.Array, start: jax.Array, key: jax.Array, slots: int
) -> tuple[Outcome, Uploads, jax.Array]:
    memory_key, key = jax.random.split(key)
    first = (environment.reset(seed, start), initial_memory(policy, memory_key))

    def slot(carry: tuple[Any, Any], slot_key: jax.Array) -> tuple[tuple[Any, Any], Outcome]:
        state, memory = carry
        action, memory = decide(policy, environment, state, memory, slot_key)
        state, _, outcome = environment.step(state, action)
        return (state, memory), outcome

    (last, _), outcome = jax.lax.scan(slot, first, jax.random.split(key, slots))
    return outcome, last.uploads, last.lost


@eqx.filter_jit
def _run_together(
    environment: Environment, policy: AnyPolicy, words: jax.Array, starts: jax.Array, keys: jax.Array, slots: int
) -> tuple[Outcome, Uploads, jax.Array]:
    return jax.vmap(lambda seed, start, key: _one_episode(environment, policy, seed, start, key, slots))(
        words, starts, keys
    )


@eqx.filter_jit
def _run_in_turn(
    environment: Environment, policy: AnyPolicy, words: jax.Array, starts: jax.Array, keys: jax.Array, slots: int
) -> tuple[Outcome, Uploads, jax.Array]:
    return jax.lax.map(
        lambda each: _one_episode(environment, policy, each[0], each[1], each[2], slots), (words, starts, keys)
    )


def _measured(outcome: Outcome, left: Uploads, episodes: Episodes, environment: Environment) -> Measured:
    slot_s, steady = float(environment.plant.slot_s), _steady(environment, episodes.slots)
    records: list[Records] = []
    for episode in range(episodes.count):
        every = task_records(jax.tree.map(lambda field, at=episode: field[at], outcome), slot_s)
        counted = (every.decided_slot >= episodes.warmup_slots) & (every.decided_slot < episodes.slots)
        records.append(every.where(counted))
    wait_s = np.asarray(outcome.server_wait_s)[:, : episodes.slots]
    backlog_s = np.asarray(outcome.backlog_s)[:, : episodes.slots]
    decided = np.asarray(left.decided_slot)
    counted = (decided >= episodes.warmup_slots) & (decided < episodes.slots)
    unfinished = np.sum(np.asarray(left.present) & counted, axis=1)
    if outcome.cache is None:
        return Measured(records, wait_s, backlog_s, unfinished, steady=steady)
    chosen = slice(episodes.warmup_slots, episodes.slots)
    loads = np.asarray(outcome.cache.models)[:, chosen].sum(axis=(1, 2), dtype=np.int64)
    energy_j = np.asarray(outcome.cache.energy_j)[:, chosen].sum(axis=(1, 2), dtype=np.float64)
    return Measured(records, wait_s, backlog_s, unfinished, loads, energy_j, steady)


def _steady(environment: Environment, slots: int) -> tuple[int, int] | None:
    """The longest run of slots at whose starts the same servers are there, the later of two; None: they always are."""
    plant = environment.plant
    if plant.presence is None:
        return None

    def who_is_there(slot: jax.Array) -> jax.Array:
        stays = stays_at(plant.presence, slot, plant.slot_s)
        assert stays is not None  # with a schedule
        return present(stays, jnp.zeros_like(plant.server_speed))

    there = np.asarray(jax.vmap(who_is_there)(jnp.arange(slots)))
    changes = 1 + np.flatnonzero((there[1:] != there[:-1]).any(axis=1))
    ends = [0, *changes.tolist(), slots]
    return max(itertools.pairwise(ends), key=lambda run: (run[1] - run[0], run[1]))


def _grows(backlog_s: NDArray[np.float64]) -> bool:
    """Whether the mean backlog of the last third of the slots is far above that of the middle third.

    Far: a quarter more, and significant over the episodes (one-sided paired t-test at 0.1 %). A queue in balance
    passes; one that gains work in every slot does not.
    """
    if backlog_s.shape[0] < 2 or not _gains(backlog_s):
        return False
    middle, last = _thirds(backlog_s)
    gain = last - middle
    error = gain.std(ddof=1) / np.sqrt(len(gain))
    return bool(gain.mean() > stats.t.ppf(0.999, len(gain) - 1) * error)


def _gains(backlog_s: NDArray[np.float64]) -> bool:
    """Whether the last third of the slots holds a quarter more backlog than the middle third."""
    middle, last = _thirds(backlog_s)
    return bool(last.mean() >= 1.25 * middle.mean() + 1e-9)


def _thirds(backlog_s: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean backlog of each episode in the middle and in the last third of its slots."""
    third = backlog_s.shape[1] // 3
    # An episode of two slots has no thirds; its halves stand for them.
    middle = backlog_s[:, third : 2 * third] if third else backlog_s[:, :1]
    return middle.mean(axis=1), backlog_s[:, 2 * third if third else 1 :].mean(axis=1)
