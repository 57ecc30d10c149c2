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
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from gmel.learning.afterstate import AfterstateCritic, lambda_returns
from gmel.learning.algorithm import Algorithm, LearnedPolicy, Metrics, Task, Workers, refresh, start_workers
from gmel.learning.clipped import entropy, generalised_advantage, pack, row_capacity, standardise
from gmel.learning.networks import Actor, AttentionCritic, Values
from gmel.learning.rollout import Credit, Trajectory, collect, log_prob
from gmel.simulator.environment import Afterstate
from gmel.simulator.state import Observation

__all__ = ["Amarl", "AmarlState", "Critic"]


Critic = Callable[[Observation, int | None], Values]
"""Any pytree of weights that judges a batch of slots from the fresh observation, on so many packed rows."""


class AmarlState(NamedTuple):
    """Everything that training changes."""

    actor: Actor
    critic: Critic
    afterstate: AfterstateCritic
    optimiser: optax.OptState
    workers: Workers
    key: PRNGKeyArray
    updates: Int[Array, ""]


_Networks = tuple[Actor, Critic, AfterstateCritic]


class _Batch(NamedTuple):
    """Slots to learn from, leading axis [slots x environments]."""

    trajectory: Trajectory
    advantage: Float[Array, "slots requests"]
    team_target: Float[Array, "slots"]
    later_target: Float[Array, "slots"]
    later_known: Bool[Array, "slots"]
    """Whether `later_target` holds a reward (the last slot of a rollout has none yet)."""


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
    horizon: float = eqx.field(static=True, default=0.0)
    """Discount per slot of what a decision does to later requests (`afterstate.py`); 0: they are left out."""
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
        # A key of its own, so that the rest starts as it does without it.
        afterstate = AfterstateCritic(task.scale, jax.random.fold_in(critic_key, 1), self.critic_width)
        actor = Actor(task.scale, actor_key, self.width, communicating=self.communicating)
        critic = self.critic(task, critic_key)
        optimiser = self._optimiser().init(eqx.filter((actor, critic, afterstate), eqx.is_array))
        workers = start_workers(task, worker_key, self.environments)
        return AmarlState(actor, critic, afterstate, optimiser, workers, key, jnp.zeros((), jnp.int32))

    def critic(self, task: Task, key: PRNGKeyArray) -> Critic:
        """The critic before training; rivals replace this part alone (see `mappo.py`)."""
        own_waits = task.environment.plant.switches.own_waits
        return AttentionCritic(task.scale, key, self.critic_width, self.heads, own_waits)

    def policy(self, state: AmarlState) -> LearnedPolicy:
        """The actor alone."""
        return LearnedPolicy(state.actor, mode="communicating" if self.communicating else "decentralised")

    def decisions_per_update(self, task: Task) -> int:
        """Devices x slots x environments."""
        return task.environment.plant.switches.devices * self.slots * self.environments

    def update(self, task: Task, state: AmarlState) -> tuple[AmarlState, Metrics]:
        """One rollout, then a few epochs of minibatches on it."""
        rollout_key, learn_key, key = jax.random.split(state.key, 3)
        plant = task.environment.plant

        def later(after: Afterstate) -> jax.Array:
            return self.horizon * task.requests_per_slot * state.afterstate(after, plant)

        states, trajectory, last = collect(
            task,
            state.actor,
            state.workers.states,
            rollout_key,
            self.slots,
            self.credit,
            later if self.horizon else None,
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
        later_target = jnp.zeros_like(reward)
        if trajectory.after is not None:
            left = state.afterstate(trajectory.after, plant)
            later_target = lambda_returns(reward, left, self.horizon, self.trace_decay)
        known = jnp.broadcast_to((jnp.arange(self.slots) < self.slots - 1)[:, None], reward.shape)
        batch = _Batch(trajectory, advantage, team_advantage + values.team, later_target, known)
        flat = jax.tree.map(lambda leaf: leaf.reshape(leaf.shape[0] * leaf.shape[1], *leaf.shape[2:]), batch)
        (actor, critic, afterstate), optimiser, losses = self._learn(task, state, flat, learn_key)
        workers = refresh(task, state.workers._replace(states=states), max(1, self.environments // self.lifetime))
        count = jnp.maximum(jnp.sum(present), 1)
        unexplained = jnp.var(flat.team_target - values.team.reshape(-1))
        metrics: Metrics = {
            "own_reward": jnp.sum(jnp.where(present, trajectory.own, 0.0)) / count,
            "team_reward": jnp.mean(trajectory.team),
            "entropy": jnp.mean(losses[0]),
            "critic_loss": jnp.mean(losses[1]),
            "policy_change": jnp.mean(losses[2]),
            "later_value": jnp.mean(later_target),
            "later_loss": jnp.mean(losses[3]),
            "explained_variance": 1 - unexplained / jnp.maximum(jnp.var(flat.team_target), 1e-9),
        }
        return AmarlState(actor, critic, afterstate, optimiser, workers, key, state.updates + 1), metrics

    def _optimiser(self) -> optax.GradientTransformation:
        steps = self.updates * self.epochs * self.minibatches
        rate = optax.linear_schedule(self.learning_rate, 0.05 * self.learning_rate, steps)

        def one() -> optax.GradientTransformation:
            return optax.chain(optax.clip_by_global_norm(self.gradient_norm), optax.adam(rate, eps=1e-5))

        # Each network is clipped by its own norm: a burst of traffic that surprises a critic must not stop the actor.
        return optax.partition(
            {"actor": one(), "critic": one(), "afterstate": one()}, ("actor", "critic", "afterstate")
        )

    def _learn(
        self, task: Task, state: AmarlState, batch: _Batch, key: PRNGKeyArray
    ) -> tuple[_Networks, optax.OptState, tuple[jax.Array, ...]]:
        """Epochs of shuffled minibatches."""
        total = self.slots * self.environments
        size = total // self.minibatches
        optimiser = self._optimiser()
        networks, structure = eqx.partition((state.actor, state.critic, state.afterstate), eqx.is_array)
        rows = row_capacity(task, size)

        def loss(networks: _Networks, part: _Batch) -> tuple[jax.Array, tuple[jax.Array, ...]]:
            return self._loss(task, eqx.combine(networks, structure), part, rows)

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
        return eqx.combine(networks, structure), optimiser_state, losses

    def _loss(
        self, task: Task, networks: _Networks, part: _Batch, rows: int
    ) -> tuple[Float[Array, ""], tuple[jax.Array, ...]]:
        actor, critic, afterstate = networks
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
        later_loss = jnp.zeros(())
        if trajectory.after is not None:
            left = afterstate(trajectory.after, task.environment.plant)
            # Targets are discounted sums of about 1 / (1 - horizon) slots.
            error = (1 - self.horizon) * jnp.where(part.later_known, left - part.later_target, 0.0)
            later_loss = jnp.mean(error**2)
        change = jnp.sum(jnp.where(present, old - log, 0.0)) / count
        loss = policy_loss - self.entropy * spread + 0.5 * (critic_loss + later_loss)
        return loss, (spread, critic_loss, change, later_loss)
