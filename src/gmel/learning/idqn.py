"""IDQN, a rival: independent double deep Q-learning, one network for all devices.

Each device learns from its own observation and its own reward; the others are part of its world (Tan 1993; deep, with a
target network: Mnih et al. 2015; the double target: van Hasselt et al. 2016, arXiv 1509.06461). The deployed policy is
the arg-max, as published: devices that see the same broadcast run to the same server.

A decision is a request, and the state that follows it is the *same device's next request*, `gap` slots later (a
semi-Markov decision process: discount^gap). Requests without a next one in the rollout are not learned from, unless
`discount = 0`, which makes every request a world of its own. The network is AMARL's actor; its scores, which start from
minus the expected latency, are the Q-values.
"""

from typing import ClassVar, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from gmel.learning import replay
from gmel.learning.algorithm import Algorithm, LearnedPolicy, Metrics, Task, Workers, refresh, start_workers
from gmel.learning.networks import Actor
from gmel.learning.replay import Replay
from gmel.learning.rollout import collect
from gmel.simulator.state import Observation

__all__ = ["Idqn", "IdqnState", "Transition", "next_request"]


class Transition(NamedTuple):
    """An entry of the replay: the rows of a slot, and for each the same device's next request, `gap` slots later."""

    observation: Observation
    action: Int[Array, "slots requests"]
    own: Float[Array, "slots requests"]
    following: Observation
    gap: Int[Array, "slots requests"]
    known: Bool[Array, "slots requests"]


class IdqnState(NamedTuple):
    """Everything that training changes."""

    network: Actor
    target: Actor
    optimiser: optax.OptState
    replay: Replay[Transition]
    workers: Workers
    key: PRNGKeyArray
    updates: Int[Array, ""]


class Idqn(Algorithm[IdqnState]):
    """One update: a few slots of all environments, then `steps` gradient steps on the replay."""

    name: ClassVar[str] = "idqn"
    title: ClassVar[str] = "IDQN"

    updates: int = eqx.field(static=True, default=120)
    """Updates of the schedules of learning rate and exploration; training may go on with the last values."""
    environments: int = eqx.field(static=True, default=64)
    slots: int = eqx.field(static=True, default=16)
    """Slots of a rollout; the next request of a device is looked for in it."""
    capacity: int = eqx.field(static=True, default=20_000)
    """Slots in the replay."""
    steps: int = eqx.field(static=True, default=16)
    """Gradient steps per update."""
    batch: int = eqx.field(static=True, default=256)
    """Slots per gradient step."""
    learning_rate: float = eqx.field(static=True, default=1e-3)
    discount: float = eqx.field(static=True, default=0.8)
    """Per slot."""
    target_rate: float = eqx.field(static=True, default=0.02)
    """Share of the network that enters the target at each gradient step."""
    first_exploration: float = eqx.field(static=True, default=1.0)
    """Probability of a uniformly random option at the start, and at the end of the schedule (its first half)."""
    last_exploration: float = eqx.field(static=True, default=0.05)
    huber: float = eqx.field(static=True, default=5.0)
    """Errors beyond this count linearly: latency has a heavy tail. Units of the reward."""
    gradient_norm: float = eqx.field(static=True, default=5.0)
    reward_scale: float = eqx.field(static=True, default=1.0)
    """Multiplies all rewards."""
    width: int = eqx.field(static=True, default=32)
    lifetime: int = eqx.field(static=True, default=128)
    """Updates after which an environment starts anew with other links and empty queues."""

    def init(self, task: Task, key: PRNGKeyArray) -> IdqnState:
        """Network and target, optimiser, environments, an empty replay."""
        network_key, worker_key, key = jax.random.split(key, 3)
        network = Actor(task.scale, network_key, self.width)
        optimiser = self._optimiser().init(eqx.filter(network, eqx.is_array))
        workers = start_workers(task, worker_key, self.environments)
        entries = jax.eval_shape(lambda: self._collect(task, network, workers, key, jnp.ones(()))[1])
        ring = replay.empty(entries, self.capacity)
        target = jax.tree.map(jnp.copy, network)
        return IdqnState(network, target, optimiser, ring, workers, key, jnp.zeros((), jnp.int32))

    def policy(self, state: IdqnState) -> LearnedPolicy:
        """The best option by the network."""
        return LearnedPolicy(state.network, greedy=True)

    def decisions_per_update(self, task: Task) -> int:
        """Devices x slots x environments."""
        return task.environment.plant.switches.devices * self.slots * self.environments

    def update(self, task: Task, state: IdqnState) -> tuple[IdqnState, Metrics]:
        """A rollout into the replay, then gradient steps on samples of it."""
        rollout_key, learn_key, key = jax.random.split(state.key, 3)
        progress = jnp.minimum(2.0 * state.updates / self.updates, 1.0)
        chance = self.first_exploration + progress * (self.last_exploration - self.first_exploration)
        workers, seen = self._collect(task, state.network, state.workers, rollout_key, chance)
        ring = replay.add(state.replay, seen)
        rule = self._optimiser()

        def step(
            learned: tuple[Actor, Actor, optax.OptState], step_key: PRNGKeyArray
        ) -> tuple[tuple[Actor, Actor, optax.OptState], jax.Array]:
            network, target, memory = learned
            part, _ = replay.sample(ring, step_key, self.batch, 0)
            loss, gradient = jax.value_and_grad(self._loss)(network, target, part)
            change, memory = rule.update(gradient, memory)
            network = eqx.apply_updates(network, change)
            target = jax.tree.map(lambda old, new: old + self.target_rate * (new - old), target, network)
            return (network, target, memory), loss

        learned, losses = jax.lax.scan(
            step, (state.network, state.target, state.optimiser), jax.random.split(learn_key, self.steps)
        )
        workers = refresh(task, workers, max(1, self.environments // self.lifetime))
        present = seen.observation.present
        metrics: Metrics = {
            "own_reward": jnp.sum(jnp.where(present, seen.own, 0.0)) / jnp.maximum(jnp.sum(present), 1),
            "exploration": chance,
            "loss": jnp.mean(losses),
        }
        return IdqnState(*learned, ring, workers, key, state.updates + 1), metrics

    def _optimiser(self) -> optax.GradientTransformation:
        steps = self.updates * self.steps
        rate = optax.linear_schedule(self.learning_rate, 0.05 * self.learning_rate, steps)
        return optax.chain(optax.clip_by_global_norm(self.gradient_norm), optax.adam(rate, eps=1e-5))

    def _collect(
        self, task: Task, network: Actor, workers: Workers, key: PRNGKeyArray, chance: Float[Array, ""]
    ) -> tuple[Workers, Transition]:
        """Epsilon-greedy slots; every allowed option, the device itself too, is explored."""

        def explore(observation: Observation) -> Float[Array, "environments requests options"]:
            best = jax.nn.one_hot(jnp.argmax(network(observation), axis=-1), observation.mask.shape[-1])
            uniform = observation.mask / jnp.sum(observation.mask, axis=-1, keepdims=True)
            return jnp.log((1 - chance) * best + chance * uniform)

        states, seen, _ = collect(task, explore, workers.states, key, self.slots)
        devices = task.environment.plant.switches.devices
        slot, row = jax.vmap(lambda o: next_request(o, devices), in_axes=1, out_axes=1)(seen.observation)
        known = seen.observation.present & (slot < self.slots)
        here = jnp.arange(self.environments)[None, :, None]
        where = (jnp.minimum(slot, self.slots - 1), here, row)
        following = jax.tree.map(lambda leaf: leaf[where], seen.observation)
        gap = slot - jnp.arange(self.slots)[:, None, None]
        entries = Transition(seen.observation, seen.action, seen.own, following, gap, known)
        flat = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), entries)
        return workers._replace(states=states), flat

    def _loss(self, network: Actor, target: Actor, part: Transition) -> Float[Array, ""]:
        """Huber loss to the double target; masked options are minus infinity, so no maximum picks them."""
        goal = self.reward_scale * part.own
        known = part.observation.present
        if self.discount > 0:
            best = jnp.argmax(network(part.following), axis=-1)
            value = jnp.take_along_axis(target(part.following), best[..., None], axis=-1)[..., 0]
            known = part.known
            goal = goal + self.discount ** part.gap.astype(goal.dtype) * jnp.where(known, value, 0.0)
        goal = jax.lax.stop_gradient(goal)
        taken = jnp.take_along_axis(network(part.observation), part.action[..., None], axis=-1)[..., 0]
        error = optax.losses.huber_loss(taken, goal, delta=self.huber)
        return jnp.sum(jnp.where(known, error, 0.0)) / jnp.maximum(jnp.sum(known), 1)


def next_request(
    observation: Observation, devices: int
) -> tuple[Int[Array, "slots requests"], Int[Array, "slots requests"]]:
    """Slot and row of the same device's next request, for the rows of consecutive slots; slot = their number if none.

    Of several requests in the next slot it is the last row.
    """
    slots, rows = observation.present.shape

    def back(
        after: tuple[jax.Array, jax.Array], now: tuple[jax.Array, jax.Array, jax.Array]
    ) -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]:
        slot, present, device = now
        last = jnp.full(devices, -1).at[device].max(jnp.where(present, jnp.arange(rows), -1))
        mine = after[0][device], after[1][device]
        return (jnp.where(last >= 0, slot, after[0]), jnp.where(last >= 0, last, after[1])), mine

    nobody = jnp.full(devices, slots), jnp.zeros(devices, jnp.int32)
    return jax.lax.scan(back, nobody, (jnp.arange(slots), observation.present, observation.device), reverse=True)[1]
