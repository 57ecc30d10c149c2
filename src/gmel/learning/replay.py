"""Replay of past slots: a ring of fixed size in the training state, pure functions on it.

Entries are slots of environments, in the order in which they were collected: one slot of all environments after the
other. So the slot that follows an entry stands a fixed distance ahead, and nothing is stored twice: on `hall-20x5` an
entry with both observations is 12 kB, a ring of 20,000 is 240 MB.
"""

from collections.abc import Callable
from typing import Generic, NamedTuple, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from gmel.learning.algorithm import Task, Workers
from gmel.learning.rollout import Credit, collect
from gmel.simulator.state import Observation

__all__ = ["Replay", "Slot", "add", "collect_slots", "empty", "sample"]

Entry = TypeVar("Entry")
"""A pytree of arrays; within a ring, and in a batch, all leaves have one leading axis more."""


class Replay(eqx.Module, Generic[Entry]):
    """A ring of entries: `place` is where the next one goes, `filled` how many there are."""

    entries: Entry
    place: Int[Array, ""]
    filled: Int[Array, ""]


def empty(batch: Entry, capacity: int) -> Replay[Entry]:
    """A ring for entries like those of `batch` (arrays or their shapes; only shapes and types are read).

    Raises:
        ValueError: the ring could not hold one batch.
    """
    size = jax.tree.leaves(batch)[0].shape[0]
    if size > capacity:
        raise ValueError(f"replay capacity = {capacity} is below one batch of {size} slots; raise it")
    # A whole number of batches: a batch never wraps around the end of the ring.
    capacity -= capacity % size
    entries = jax.tree.map(lambda leaf: jnp.zeros((capacity, *leaf.shape[1:]), leaf.dtype), batch)
    return Replay(entries, jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32))


def add(replay: Replay[Entry], batch: Entry) -> Replay[Entry]:
    """The ring with a batch in it, in the place of the oldest entries."""
    size = jax.tree.leaves(batch)[0].shape[0]
    capacity = jax.tree.leaves(replay.entries)[0].shape[0]
    entries = jax.tree.map(
        lambda ring, new: jax.lax.dynamic_update_slice_in_dim(ring, new.astype(ring.dtype), replay.place, 0),
        replay.entries,
        batch,
    )
    return Replay(entries, (replay.place + size) % capacity, jnp.minimum(replay.filled + size, capacity))


def sample(replay: Replay[Entry], key: PRNGKeyArray, count: int, ahead: int) -> tuple[Entry, Entry]:
    """Entries drawn uniformly with replacement, and the entries `ahead` places after them.

    The newest `ahead` entries have nobody after them yet and are not drawn.
    """
    capacity = jax.tree.leaves(replay.entries)[0].shape[0]
    oldest = replay.place - replay.filled
    drawn = jax.random.randint(key, (count,), 0, jnp.maximum(replay.filled - ahead, 1))

    def at(index: Int[Array, "count"]) -> Entry:
        return jax.tree.map(lambda ring: ring[index % capacity], replay.entries)

    return at(oldest + drawn), at(oldest + drawn + ahead)


class Slot(NamedTuple):
    """What off-policy learners with a centralised critic keep of a slot.

    `number` counts the slots of an environment: an entry is followed by its next slot if that has one more.
    """

    observation: Observation
    fresh: Observation
    action: Int[Array, "slots requests"]
    own: Float[Array, "slots requests"]
    team: Float[Array, "slots"]
    number: Int[Array, "slots"]


def collect_slots(
    task: Task,
    logits: Callable[[Observation], Float[Array, "environments requests options"]],
    workers: Workers,
    key: PRNGKeyArray,
    slots: int,
    credit: Credit = "own",
) -> tuple[Workers, Slot]:
    """Runs the policy of `logits` for some slots in all environments: entries for the replay, in its order."""
    states, seen, _ = collect(task, logits, workers.states, key, slots, credit)
    number = workers.states.slot + jnp.arange(slots)[:, None]
    entries = Slot(seen.observation, seen.fresh, seen.action, seen.own, seen.team, number)
    return workers._replace(states=states), jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), entries)
