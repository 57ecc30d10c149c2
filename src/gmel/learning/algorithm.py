"""What an algorithm is: `init`, `update`, `policy`. All that changes is in the training state, a plain pytree.

So a checkpoint is the state, a resumed run is bitwise the uninterrupted one, and `jax.vmap` trains several seeds.
"""

from abc import abstractmethod
from typing import Any, ClassVar, Generic, NamedTuple, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray, UInt32

from gmel.learning.networks import Actor
from gmel.policies.policy import Policy, StatelessPolicy, sample
from gmel.scenario.schema import Scenario
from gmel.simulator.environment import Environment
from gmel.simulator.scale import Scale, scale_of
from gmel.simulator.state import Observation, State

__all__ = ["Algorithm", "LearnedPolicy", "Metrics", "Task", "Workers", "make_task", "refresh", "start_workers"]

Metrics = dict[str, Float[Array, ""]]
TrainState = TypeVar("TrainState")


class Task(NamedTuple):
    """What is learned: an environment, the scale of its quantities, and how many requests a slot has on average."""

    environment: Environment
    scale: Scale
    requests_per_slot: float


class LearnedPolicy(StatelessPolicy):
    """The decentralised (or communicating) policy of an actor: a draw by its logits, or its best option."""

    actor: Actor
    greedy: bool = eqx.field(static=True, default=False)

    def choose(self, observation: Observation, key: PRNGKeyArray) -> Int[Array, "requests"]:
        """A draw; simultaneous decisions need a mixed strategy, an arg-max herds."""
        logits = self.actor(observation)
        return jnp.argmax(logits, axis=-1) if self.greedy else sample(logits, key)


class Algorithm(eqx.Module, Generic[TrainState]):
    """A learner. Its fields are its hyper-parameters (static); `update` is pure and compiled by the training loop."""

    name: ClassVar[str]
    title: ClassVar[str]
    updates: eqx.AbstractVar[int]
    """Updates of a training of the usual length; schedules end there."""

    @abstractmethod
    def init(self, task: Task, key: PRNGKeyArray) -> TrainState:
        """Training state before the first update: networks, optimiser, environments, buffers, random key."""

    @abstractmethod
    def update(self, task: Task, state: TrainState) -> tuple[TrainState, Metrics]:
        """Collects experience and learns from it; metrics are scalars."""

    @abstractmethod
    def policy(self, state: TrainState) -> Policy[Any]:
        """The policy as it would be deployed now."""

    @abstractmethod
    def decisions_per_update(self, task: Task) -> int:
        """Agent decisions (devices x slots x environments) that one update collects."""


def make_task(environment: Environment, scenario: Scenario) -> Task:
    """The environment with the scale of its networks and its mean number of requests a slot."""
    trace = environment.trace
    if trace is None:
        rate = scenario.arrival_rate_per_s
        assert rate is not None  # Arrivals demands it for Poisson
        per_slot = rate * scenario.slot.length_s
    else:
        per_slot = float(jnp.mean(jnp.sum(trace.present, axis=1)))
    scale = scale_of(scenario)
    # Twice the mean service: the scale of a latency, not of a service.
    return Task(environment, scale._replace(time_s=2.0 * scale.time_s), per_slot)


class Workers(NamedTuple):
    """Parallel environments: their states, and how many have been started so far (each start is a new seed)."""

    states: State
    started: Int[Array, ""]
    seed: UInt32[Array, "2"]


def start_workers(task: Task, key: PRNGKeyArray, count: int) -> Workers:
    """Environments with seeds of their own; traces start at random places."""
    seed = jax.random.bits(key, (2,), jnp.uint32)
    states = jax.vmap(lambda number: _start(task, seed, number))(jnp.arange(count))
    return Workers(states, jnp.asarray(count, jnp.int32), seed)


def refresh(task: Task, workers: Workers, count: int) -> Workers:
    """Starts the next `count` environments anew, the oldest first: new places, new links, empty queues."""
    total = workers.states.slot.shape[0]
    where = (workers.started + jnp.arange(count)) % total
    fresh = jax.vmap(lambda number: _start(task, workers.seed, number))(workers.started + jnp.arange(count))
    states = jax.tree.map(lambda old, new: old.at[where].set(new), workers.states, fresh)
    return Workers(states, workers.started + count, workers.seed)


def _start(task: Task, seed: UInt32[Array, "2"], number: Int[Array, ""]) -> State:
    words = jnp.stack([seed[0] + number.astype(jnp.uint32), seed[1] | jnp.uint32(0x80000000)])
    trace = task.environment.trace
    length = 1 if trace is None else trace.present.shape[0]
    # A fixed odd stride scatters the starts of consecutive numbers over the trace.
    place = (number * 7919 + (seed[0] & 0xFFFF).astype(jnp.int32)) % length
    return task.environment.reset(words, place)
