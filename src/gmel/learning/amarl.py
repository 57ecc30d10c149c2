"""AMARL, on-policy: clipped policy updates with a centralised attention critic (the default learner).

Centralised training: the critic attends over all requests of a slot and sees the queues as they are. Decentralised
execution: one permutation-equivariant actor, shared by all devices, on what a device knows.

A request is credited with its difference reward: its own cost and the delay it causes to the others of its slot, exact
because the environment can be asked (`rollout.collect`). It needs no bootstrap, for it is known when the request is
decided; the critic's expectation of it is the baseline. A share of the team's advantage (generalised advantage
estimation on the reward of all requests together, delays to later slots included) can be mixed in with `cooperation`;
it is noisy, and off by default.

Sources: PPO (Schulman et al. 2017, arXiv 1707.06347), GAE (1506.02438), attention critic in the line of MAAC (Iqbal and
Sha 2019, 1810.02912) and of AMARL (2405.02972, which gives no equations).
"""

from collections.abc import Callable
from typing import ClassVar, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray

from gmel.learning.algorithm import Algorithm, LearnedPolicy, Metrics, Task, Workers, refresh, start_workers
from gmel.learning.clipped import entropy, generalised_advantage, pack, row_capacity, standardise
from gmel.learning.networks import Actor, AttentionCritic, Values
from gmel.learning.rollout import Credit, Trajectory, collect, log_prob
from gmel.simulator.state import Observation

__all__ = ["Amarl", "AmarlState", "Critic"]


Critic = Callable[[Observation, int | None], Values]
"""Any pytree of weights that judges a batch of slots from the fresh observation, on so many packed rows."""


class AmarlState(NamedTuple):
    """Everything that training changes."""

    actor: Actor
    critic: Critic
    optimiser: optax.OptState
    workers: Workers
    key: PRNGKeyArray
    updates: Int[Array, ""]


_Networks = tuple[Actor, Critic]


class _Batch(NamedTuple):
    """Slots to learn from, leading axis [slots x environments]."""

    trajectory: Trajectory
    advantage: Float[Array, "slots requests"]
    team_target: Float[Array, "slots"]


class Amarl(Algorithm[AmarlState]):
    """The clipped on-policy rule. Defaults are for `hall-20x5` and `factory`; see `docs/learning.md` for their
    effect."""

    name: ClassVar[str] = "amarl"
    title: ClassVar[str] = "AMARL"

    updates: int = eqx.field(static=True, default=120)
    """Updates of the learning-rate schedule; training may go on with the last rate."""
    environments: int = eqx.field(static=True, default=128)
    slots: int = eqx.field(static=True, default=16)
    epochs: int = eqx.field(static=True, default=3)
    minibatches: int = eqx.field(static=True, default=4)
    learning_rate: float = eqx.field(static=True, default=2e-3)
    discount: float = eqx.field(static=True, default=0.8)
    trace_decay: float = eqx.field(static=True, default=0.9)
    clip: float = eqx.field(static=True, default=0.2)
    entropy: float = eqx.field(static=True, default=0.003)
    gradient_norm: float = eqx.field(static=True, default=0.5)
    credit: Credit = eqx.field(static=True, default="difference")
    """What a request is credited with: its own reward, or its difference reward (see `rollout.collect`)."""
    cooperation: float | None = eqx.field(static=True, default=0.0)
    """Share of the team in the advantage; None: the scenario's `reward.cooperation`."""
    width: int = eqx.field(static=True, default=32)
    critic_width: int = eqx.field(static=True, default=32)
    heads: int = eqx.field(static=True, default=4)
    lifetime: int = eqx.field(static=True, default=64)
    """Updates after which an environment starts anew with other links and empty queues."""
    communicating: bool = eqx.field(static=True, default=False)

    def init(self, task: Task, key: PRNGKeyArray) -> AmarlState:
        """Networks, optimiser, environments."""
        actor_key, critic_key, worker_key, key = jax.random.split(key, 4)
        actor = Actor(task.scale, actor_key, self.width, communicating=self.communicating)
        critic = self.critic(task, critic_key)
        optimiser = self._optimiser().init(eqx.filter((actor, critic), eqx.is_array))
        workers = start_workers(task, worker_key, self.environments)
        return AmarlState(actor, critic, optimiser, workers, key, jnp.zeros((), jnp.int32))

    def critic(self, task: Task, key: PRNGKeyArray) -> Critic:
        """The critic before training; rivals replace this part alone (see `mappo.py`)."""
        return AttentionCritic(task.scale, key, self.critic_width, self.heads)

    def policy(self, state: AmarlState) -> LearnedPolicy:
        """The actor alone."""
        return LearnedPolicy(state.actor, mode="communicating" if self.communicating else "decentralised")

    def decisions_per_update(self, task: Task) -> int:
        """Devices x slots x environments."""
        return task.environment.plant.switches.devices * self.slots * self.environments

    def update(self, task: Task, state: AmarlState) -> tuple[AmarlState, Metrics]:
        """One rollout, then a few epochs of minibatches on it."""
        rollout_key, learn_key, key = jax.random.split(state.key, 3)
        states, trajectory, last = collect(
            task, state.actor, state.workers.states, rollout_key, self.slots, self.credit
        )
        rows = row_capacity(task, self.slots * self.environments)
        values = state.critic(trajectory.fresh, rows)
        reward = trajectory.team / task.requests_per_slot
        team_advantage = generalised_advantage(
            reward, values.team, state.critic(last, None).team, self.discount, self.trace_decay
        )
        present = trajectory.observation.present
        share = task.environment.plant.switches.reward.cooperation if self.cooperation is None else self.cooperation
        mixed = (1 - share) * (trajectory.own - values.own)
        mixed = mixed + share * task.requests_per_slot * team_advantage[..., None]
        advantage = standardise(mixed, present)
        batch = _Batch(trajectory, advantage, team_advantage + values.team)
        flat = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), batch)
        actor, critic, optimiser, losses = self._learn(task, state, flat, learn_key)
        workers = refresh(task, state.workers._replace(states=states), max(1, self.environments // self.lifetime))
        count = jnp.maximum(jnp.sum(present), 1)
        unexplained = jnp.var(flat.team_target - values.team.reshape(-1))
        metrics: Metrics = {
            "own_reward": jnp.sum(jnp.where(present, trajectory.own, 0.0)) / count,
            "team_reward": jnp.mean(trajectory.team),
            "entropy": jnp.mean(losses[0]),
            "critic_loss": jnp.mean(losses[1]),
            "policy_change": jnp.mean(losses[2]),
            "explained_variance": 1 - unexplained / jnp.maximum(jnp.var(flat.team_target), 1e-9),
        }
        return AmarlState(actor, critic, optimiser, workers, key, state.updates + 1), metrics

    def _optimiser(self) -> optax.GradientTransformation:
        steps = self.updates * self.epochs * self.minibatches
        rate = optax.linear_schedule(self.learning_rate, 0.05 * self.learning_rate, steps)
        return optax.chain(optax.clip_by_global_norm(self.gradient_norm), optax.adam(rate, eps=1e-5))

    def _learn(
        self, task: Task, state: AmarlState, batch: _Batch, key: PRNGKeyArray
    ) -> tuple[Actor, Critic, optax.OptState, tuple[jax.Array, ...]]:
        """Epochs of shuffled minibatches."""
        total = self.slots * self.environments
        size = total // self.minibatches
        optimiser = self._optimiser()
        networks, structure = eqx.partition((state.actor, state.critic), eqx.is_array)
        rows = row_capacity(task, size)

        def loss(networks: _Networks, part: _Batch) -> tuple[jax.Array, tuple[jax.Array, ...]]:
            actor, critic = eqx.combine(networks, structure)
            return self._loss(actor, critic, part, rows)

        def minibatch(
            carry: tuple[_Networks, optax.OptState], chosen: Int[Array, "slots"]
        ) -> tuple[tuple[_Networks, optax.OptState], tuple[jax.Array, ...]]:
            networks, optimiser_state = carry
            part = jax.tree.map(lambda leaf: leaf[chosen], batch)
            gradient, losses = jax.grad(loss, has_aux=True)(networks, part)
            change, optimiser_state = optimiser.update(gradient, optimiser_state)
            return (eqx.apply_updates(networks, change), optimiser_state), losses

        def epoch(
            carry: tuple[_Networks, optax.OptState], epoch_key: PRNGKeyArray
        ) -> tuple[tuple[_Networks, optax.OptState], tuple[jax.Array, ...]]:
            order = jax.random.permutation(epoch_key, total)[: size * self.minibatches]
            return jax.lax.scan(minibatch, carry, order.reshape(self.minibatches, size))

        keys = jax.random.split(key, self.epochs)
        (networks, optimiser_state), losses = jax.lax.scan(epoch, (networks, state.optimiser), keys)
        actor, critic = eqx.combine(networks, structure)
        return actor, critic, optimiser_state, losses

    def _loss(
        self, actor: Actor, critic: Critic, part: _Batch, rows: int
    ) -> tuple[Float[Array, ""], tuple[jax.Array, ...]]:
        trajectory = part.trajectory
        observation, action, old, advantage = (
            trajectory.observation,
            trajectory.action,
            trajectory.log_prob,
            part.advantage,
        )
        present = observation.present
        if not self.communicating:
            # Most rows of the table are empty: work on those that are not.
            observation, action, old, advantage, present = pack((observation, action, old, advantage), present, rows)
        logits = actor(observation)
        count = jnp.maximum(jnp.sum(present), 1)
        log = log_prob(logits, action)
        ratio = jnp.exp(log - old)
        gain = jnp.minimum(ratio * advantage, jnp.clip(ratio, 1 - self.clip, 1 + self.clip) * advantage)
        policy_loss = -jnp.sum(jnp.where(present, gain, 0.0)) / count
        spread = jnp.sum(jnp.where(present, entropy(logits), 0.0)) / count
        values = critic(trajectory.fresh, rows)
        here = trajectory.fresh.present
        own_error = jnp.where(here, (values.own - trajectory.own) ** 2, 0.0)
        critic_loss = jnp.sum(own_error) / jnp.maximum(jnp.sum(here), 1)
        critic_loss = critic_loss + jnp.mean((values.team - part.team_target) ** 2)
        change = jnp.sum(jnp.where(present, old - log, 0.0)) / count
        return policy_loss - self.entropy * spread + 0.5 * critic_loss, (spread, critic_loss, change)
