"""MADDPG, a rival: centralised critics of joint actions, actors moved by the gradient through the action.

Discrete options by the straight-through Gumbel-softmax (Jang et al. 2017, arXiv 1611.01144), as usual where MADDPG
(Lowe et al. 2017, 1706.02275) meets discrete actions. The critic is flat, on all rows' observations and actions; it
gives the reward of each request (credited at once, so a regression without bootstrap) and the team's value
(bootstrapped with a target critic and a target actor: the next slot belongs to other requests). The actor is AMARL's.

An agent's gradient passes through its own action alone, those of the others are as in the replay; one agent a slot,
drawn at random, so that this costs one pass of the critic and not one per agent.
"""

from typing import ClassVar, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray

from gmel.learning import replay
from gmel.learning.algorithm import Algorithm, LearnedPolicy, Metrics, Task, Workers, refresh, start_workers
from gmel.learning.clipped import entropy
from gmel.learning.mappo import FlatCritic
from gmel.learning.networks import Actor
from gmel.learning.replay import Replay, Slot

__all__ = ["Maddpg", "MaddpgState", "relaxed"]


def relaxed(
    logits: Float[Array, "*batch options"], key: PRNGKeyArray, temperature: float
) -> Float[Array, "*batch options"]:
    """A draw by the logits as a one-hot row, with the gradient of the Gumbel-softmax at `temperature`."""
    allowed = jnp.isfinite(logits)
    # Masked options get a score that is finite: minus infinity has no gradient.
    scores = jnp.where(allowed, logits, -1e9) + jax.random.gumbel(key, logits.shape)
    soft = jax.nn.softmax(scores / temperature)
    hard = jax.nn.one_hot(jnp.argmax(scores, axis=-1), logits.shape[-1])
    return hard + soft - jax.lax.stop_gradient(soft)


class MaddpgState(NamedTuple):
    """Everything that training changes."""

    actor: Actor
    critic: FlatCritic
    target_actor: Actor
    target_critic: FlatCritic
    optimisers: tuple[optax.OptState, optax.OptState]
    replay: Replay[Slot]
    workers: Workers
    key: PRNGKeyArray
    updates: Int[Array, ""]


_Learned = tuple[Actor, FlatCritic, Actor, FlatCritic, tuple[optax.OptState, optax.OptState]]


class Maddpg(Algorithm[MaddpgState]):
    """One update: a few slots of all environments, then `steps` gradient steps on the replay."""

    name: ClassVar[str] = "maddpg"
    title: ClassVar[str] = "MADDPG"

    updates: int = eqx.field(static=True, default=240)
    """Updates of the learning-rate schedules; training may go on with the last rates."""
    environments: int = eqx.field(static=True, default=64)
    slots: int = eqx.field(static=True, default=8)
    capacity: int = eqx.field(static=True, default=20_000)
    """Slots in the replay."""
    steps: int = eqx.field(static=True, default=8)
    """Gradient steps per update."""
    batch: int = eqx.field(static=True, default=256)
    """Slots per gradient step."""
    learning_rate: float = eqx.field(static=True, default=3e-4)
    critic_rate: float = eqx.field(static=True, default=1e-3)
    discount: float = eqx.field(static=True, default=0.8)
    target_rate: float = eqx.field(static=True, default=0.02)
    """Share of the networks that enters their targets at each gradient step."""
    relaxation: float = eqx.field(static=True, default=1.0)
    """Temperature of the Gumbel-softmax."""
    logit_penalty: float = eqx.field(static=True, default=1e-3)
    """Of the squared learned logits (centred), as in the published code: keeps the relaxation alive."""
    huber: float = eqx.field(static=True, default=5.0)
    """Errors of the critic beyond this count linearly: latency has a heavy tail. Units of the reward."""
    gradient_norm: float = eqx.field(static=True, default=0.5)
    cooperation: float | None = eqx.field(static=True, default=None)
    """Share of the team in what an actor climbs; None: the scenario's."""
    reward_scale: float = eqx.field(static=True, default=1.0)
    """Multiplies all rewards."""
    width: int = eqx.field(static=True, default=32)
    critic_width: int = eqx.field(static=True, default=64)
    lifetime: int = eqx.field(static=True, default=256)
    """Updates after which an environment starts anew with other links and empty queues."""

    def init(self, task: Task, key: PRNGKeyArray) -> MaddpgState:
        """Networks and their targets, optimisers, environments, an empty replay."""
        actor_key, critic_key, worker_key, key = jax.random.split(key, 4)
        environment = task.environment
        rows, options = environment.requests, environment.options
        actor = Actor(task.scale, actor_key, self.width)
        critic = FlatCritic(task.scale, rows, options, critic_key, self.critic_width, actions=True)
        rules = self._optimisers()
        optimisers = (rules[0].init(eqx.filter(actor, eqx.is_array)), rules[1].init(eqx.filter(critic, eqx.is_array)))
        workers = start_workers(task, worker_key, self.environments)
        entries = jax.eval_shape(lambda: replay.collect_slots(task, actor, workers, key, self.slots)[1])
        ring = replay.empty(entries, self.capacity)
        old_actor, old_critic = jax.tree.map(jnp.copy, (actor, critic))
        count = jnp.zeros((), jnp.int32)
        return MaddpgState(actor, critic, old_actor, old_critic, optimisers, ring, workers, key, count)

    def policy(self, state: MaddpgState) -> LearnedPolicy:
        """The actor alone; its draw is the forward pass of the relaxation it was trained with."""
        return LearnedPolicy(state.actor)

    def decisions_per_update(self, task: Task) -> int:
        """Devices x slots x environments."""
        return task.environment.plant.switches.devices * self.slots * self.environments

    def update(self, task: Task, state: MaddpgState) -> tuple[MaddpgState, Metrics]:
        """A few slots into the replay, then gradient steps on samples of it."""
        rollout_key, learn_key, key = jax.random.split(state.key, 3)
        workers, seen = replay.collect_slots(task, state.actor, state.workers, rollout_key, self.slots)
        ring = replay.add(state.replay, seen)

        def step(learned: _Learned, step_key: PRNGKeyArray) -> tuple[_Learned, Metrics]:
            sample_key, step_key = jax.random.split(step_key)
            now, following = replay.sample(ring, sample_key, self.batch, self.environments)
            return self._step(task, learned, now, following, step_key)

        learned: _Learned = (state.actor, state.critic, state.target_actor, state.target_critic, state.optimisers)
        learned, losses = jax.lax.scan(step, learned, jax.random.split(learn_key, self.steps))
        workers = refresh(task, workers, max(1, self.environments // self.lifetime))
        count = jnp.maximum(jnp.sum(seen.observation.present), 1)
        metrics: Metrics = {
            "own_reward": jnp.sum(jnp.where(seen.observation.present, seen.own, 0.0)) / count,
            "team_reward": jnp.mean(seen.team),
            **jax.tree.map(jnp.mean, losses),
        }
        return MaddpgState(*learned, ring, workers, key, state.updates + 1), metrics

    def _optimisers(self) -> tuple[optax.GradientTransformation, optax.GradientTransformation]:
        def rule(rate: float) -> optax.GradientTransformation:
            schedule = optax.linear_schedule(rate, 0.05 * rate, self.updates * self.steps)
            return optax.chain(optax.clip_by_global_norm(self.gradient_norm), optax.adam(schedule, eps=1e-5))

        return rule(self.learning_rate), rule(self.critic_rate)

    def _step(
        self, task: Task, learned: _Learned, now: Slot, following: Slot, key: PRNGKeyArray
    ) -> tuple[_Learned, Metrics]:
        """One step of the critic, then of the actor."""
        actor, critic, target_actor, target_critic, (actor_memory, critic_memory) = learned
        actor_rule, critic_rule = self._optimisers()
        next_key, draw_key, agent_key = jax.random.split(key, 3)
        here = now.observation.present
        count = jnp.maximum(jnp.sum(here), 1)
        options = here.shape[-1], now.observation.mask.shape[-1]
        then = relaxed(target_actor(following.observation), next_key, self.relaxation)
        goal = self.reward_scale * now.team / task.requests_per_slot
        goal = goal + self.discount * target_critic(following.fresh, chosen=then).team
        # After a fresh start of an environment the next entry is another life.
        known = following.number == now.number + 1
        taken = jax.nn.one_hot(now.action, options[1])

        def critic_loss(critic: FlatCritic) -> jax.Array:
            values = critic(now.fresh, chosen=taken)
            own = optax.losses.huber_loss(values.own, self.reward_scale * now.own, delta=self.huber)
            team = optax.losses.huber_loss(values.team, goal, delta=self.huber)
            team = jnp.sum(jnp.where(known, team, 0.0)) / jnp.maximum(jnp.sum(known), 1)
            return jnp.sum(jnp.where(here, own, 0.0)) / count + team

        loss, gradient = jax.value_and_grad(critic_loss)(critic)
        change, critic_memory = critic_rule.update(gradient, critic_memory)
        critic = eqx.apply_updates(critic, change)
        share = task.environment.plant.switches.reward.cooperation if self.cooperation is None else self.cooperation
        agent = jax.random.categorical(agent_key, jnp.where(here, 0.0, -1e9))
        mine = (jnp.arange(options[0]) == agent[:, None]) & here

        def actor_loss(actor: Actor) -> tuple[jax.Array, jax.Array]:
            logits = actor(now.observation)
            joint = jnp.where(mine[..., None], relaxed(logits, draw_key, self.relaxation), taken)
            values = critic(now.fresh, chosen=joint)
            own = jnp.sum(jnp.where(mine, values.own, 0.0), axis=-1)
            gain = (1 - share) * own + share * task.requests_per_slot * values.team
            some = jnp.any(here, axis=-1)
            allowed = jnp.isfinite(logits)
            level = jnp.sum(jnp.where(allowed, logits, 0.0), axis=-1, keepdims=True) / jnp.sum(
                allowed, axis=-1, keepdims=True
            )
            size = jnp.sum(jnp.where(allowed & here[..., None], (jnp.where(allowed, logits, 0.0) - level) ** 2, 0.0))
            penalty = self.logit_penalty * size / count
            return penalty - jnp.sum(jnp.where(some, gain, 0.0)) / jnp.maximum(jnp.sum(some), 1), logits

        gradient, logits = jax.grad(actor_loss, has_aux=True)(actor)
        change, actor_memory = actor_rule.update(gradient, actor_memory)
        actor = eqx.apply_updates(actor, change)
        target_actor, target_critic = jax.tree.map(
            lambda old, new: old + self.target_rate * (new - old), (target_actor, target_critic), (actor, critic)
        )
        surprise = jnp.sum(jnp.where(here, entropy(logits), 0.0)) / count
        metrics = {"entropy": surprise, "critic_loss": loss}
        return (actor, critic, target_actor, target_critic, (actor_memory, critic_memory)), metrics
