"""AMARL, off-policy: discrete soft actor-critic with a centralised attention critic and a replay of slots.

In the line of MAAC (Iqbal and Sha 2019, arXiv 1810.02912; reference 3.5) and of SAC for discrete actions (Christodoulou
2019, 1910.07207). The choices that differ, and why:

*Target.* The requests of the next slot belong to other devices, so "the value of agent i in the next state" does not
exist here. The reward of a request itself is credited at once: its critic is a regression on it, without bootstrap,
    Q_own_i(s, a) -> own_i.
What goes on is the plant. One joint critic holds it, with a target network and a soft bootstrap,
    Q_team(s, a) -> team / n + gamma ( Q_team'(s', a') + alpha sum_j H(pi_j(s')) / n ),   a' ~ pi(s'),
with n the mean requests of a slot. An actor climbs (1 - mu) Q_own_i + mu n Q_team, mu: `reward.cooperation`.

*Attention.* Keys, queries and values are shared by all agents as in MAAC; one token per request. MAAC attends once per
agent; here each own option asks separately, and hears the requests that chose the same place (only they queue with it).
The weights are sigmoids, not a softmax: work in front adds up, a mean forgets how many there are (sigmoid attention:
Ramapuram et al. 2024, 2409.04431).

*Counterfactuals.* Q_own_i has a value for every own option given the others' actions. Q_team is a sum over servers of a
function of the server and of the pooled tokens of those who chose it, so the joint value with request i moved to option
b differs in two terms only: the marginal f(pool without i, plus i at b) - f(pool without i) is Q_team(b, a_-i) up to a
constant, exactly. The baseline is sum_b pi(b) Q_i(b), actions of all agents re-sampled from the current policy; the
expectation over the agent's own option is taken exactly, not by its sampled action (same mean, less variance).

No bootstrap takes a maximum, so a second critic against over-estimation has nothing to do and there is none.
"""

from typing import ClassVar, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from gmel.learning import replay
from gmel.learning.algorithm import Algorithm, LearnedPolicy, Metrics, Task, Workers, refresh, start_workers
from gmel.learning.clipped import entropy
from gmel.learning.networks import Actor, Linear, encode, mean_of_rows, option_inputs, servers_seen, task_inputs
from gmel.learning.replay import Replay, Slot
from gmel.learning.rollout import Credit
from gmel.scenario.errors import InputError
from gmel.simulator.scale import Scale
from gmel.simulator.state import Observation

__all__ = ["AmarlSoft", "AmarlSoftState", "Judged", "OptionCritic"]


class Judged(NamedTuple):
    """What the critic says of a joint action: reward of each request, and marginal team value, for every own option.

    `team_marginal` is the team value up to a constant per request; `team` the value of the joint action itself.
    `logits`: mean square of the attention logits.
    """

    own: Float[Array, "*batch requests options"]
    team_marginal: Float[Array, "*batch requests options"]
    team: Float[Array, "*batch"]
    logits: Float[Array, "*batch"]


class OptionCritic(eqx.Module):
    """Centralised attention critic of joint actions; see the head of this file. Any number of requests and servers."""

    scale: Scale = eqx.field(static=True)
    heads: int = eqx.field(static=True)
    own_waits: bool = eqx.field(static=True)
    option_in: Linear
    task_in: Linear
    query: Linear
    key: Linear
    value: Linear
    own_hidden: Linear
    own_out: Linear
    server_in: Linear
    pool: Linear
    team_hidden: Linear
    team_out: Linear
    alone_out: Linear

    def __init__(
        self, scale: Scale, key: PRNGKeyArray, width: int = 32, heads: int = 4, own_waits: bool = False
    ) -> None:
        keys = jax.random.split(key, 12)
        self.scale, self.heads, self.own_waits = scale, heads, own_waits
        self.option_in = Linear(option_inputs(scale), width, keys[0])
        self.task_in = Linear(task_inputs(scale), width, keys[1])
        self.query, self.key, self.value = (Linear(width, width, k, gain=1.0) for k in keys[2:5])
        self.own_hidden = Linear(2 * width, width, keys[5])
        self.own_out = Linear(width, 1, keys[6], gain=0.1)
        self.server_in = Linear(4, width, keys[7])
        self.pool = Linear(width, width, keys[8], gain=0.5)
        self.team_hidden = Linear(2 * width, width, keys[9])
        self.team_out = Linear(width, 1, keys[10], gain=0.1)
        self.alone_out = Linear(width, 1, keys[11], gain=0.1)

    def __call__(self, fresh: Observation, action: Int[Array, "*batch requests"]) -> Judged:
        """Judges a batch of slots."""
        options, tasks = encode(fresh, self.scale)
        token = jax.nn.relu(self.option_in(options) + self.task_in(tasks)[..., None, :])
        count, places = fresh.mask.shape[-2:]
        chose = (action[..., None] == jnp.arange(places)) & fresh.present[..., None]
        own, logits = self._own(fresh, token, chose)
        # Servers: pooled tokens of those who chose them, with the state of the server in this slot.
        joined = jax.nn.relu(self.pool(token))
        joined = jnp.where(fresh.present[..., None, None], joined, 0.0)
        sent = jnp.where(chose[..., None], joined, 0.0)[..., 1:, :]
        together = jnp.sum(sent, axis=-3)
        server = self._servers(fresh)
        value = self._team(together, server)
        without = together[..., None, :, :] - sent
        around = server[..., None, :, :]
        marginal = self._team(without + joined[..., 1:, :], around) - self._team(without, around)
        # On the device itself nobody else is in the way: a value of the request alone.
        alone = self.alone_out(token[..., 0, :])
        team = jnp.sum(value, axis=-1) + jnp.sum(jnp.where(chose[..., 0], alone[..., 0], 0.0), axis=-1)
        return Judged(own, jnp.concatenate([alone, marginal], axis=-1), team, logits / max(count * places, 1))

    def _own(
        self,
        fresh: Observation,
        token: Float[Array, "*batch requests options width"],
        chose: Bool[Array, "*batch requests options"],
    ) -> tuple[Float[Array, "*batch requests options"], Float[Array, "*batch"]]:
        """Reward of each request at each option, given where the others go."""
        count, places = fresh.mask.shape[-2:]
        others = jnp.swapaxes(chose, -1, -2)[..., None, :] & ~jnp.eye(count, dtype=bool)
        # Option 0 is a place of its own for each device.
        same_device = fresh.device[..., :, None] == fresh.device[..., None, :]
        shared = (jnp.arange(places) > 0)[:, None, None] | same_device[..., None, :, :]
        others = (others & shared)[..., None, :, :, :]

        def split(x: Float[Array, "*batch requests options width"]) -> jax.Array:
            return x.reshape(*x.shape[:-1], self.heads, x.shape[-1] // self.heads)

        query, key, value = split(self.query(token)), split(self.key(token)), split(self.value(token))
        logits = jnp.einsum("...ibhd,...jbhd->...hbij", query, key) / query.shape[-1] ** 0.5
        weight = jnp.where(others, jax.nn.sigmoid(logits), 0.0)
        heard = jnp.einsum("...hbij,...jbhd->...ibhd", weight, value)
        heard = heard.reshape(token.shape)
        hidden = jax.nn.relu(self.own_hidden(jnp.concatenate([token, heard], axis=-1)))
        size = jnp.sum(jnp.where(others, logits**2, 0.0), axis=(-4, -3, -2, -1)) / self.heads
        return self.own_out(hidden)[..., 0], size

    def _servers(self, fresh: Observation) -> Float[Array, "*batch servers width"]:
        """State of the servers, as all requests see them on average: so that it does not depend on who goes where."""
        views = servers_seen(fresh, self.scale, self.own_waits)
        return self.server_in(mean_of_rows(views, fresh.present))

    def _team(self, pooled: Float[Array, "*batch width"], server: Float[Array, "*batch width"]) -> jax.Array:
        server = jnp.broadcast_to(jax.nn.relu(server), pooled.shape)
        hidden = self.team_hidden(jnp.concatenate([pooled, server], axis=-1))
        return self.team_out(jax.nn.relu(hidden))[..., 0]


class AmarlSoftState(NamedTuple):
    """Everything that training changes. `log_temperature`: of the entropy."""

    actor: Actor
    critic: OptionCritic
    target: OptionCritic
    log_temperature: Float[Array, ""]
    optimisers: tuple[optax.OptState, optax.OptState, optax.OptState]
    replay: Replay[Slot]
    workers: Workers
    key: PRNGKeyArray
    updates: Int[Array, ""]


_Learned = tuple[Actor, OptionCritic, OptionCritic, jax.Array, tuple[optax.OptState, optax.OptState, optax.OptState]]


class AmarlSoft(Algorithm[AmarlSoftState]):
    """The off-policy rule. One update: a few slots of all environments, then `steps` gradient steps on the replay."""

    name: ClassVar[str] = "amarl-soft"
    title: ClassVar[str] = "AMARL, off-policy"

    updates: int = eqx.field(static=True, default=120)
    """Updates of the learning-rate schedules; training may go on with the last rates."""
    environments: int = eqx.field(static=True, default=128)
    slots: int = eqx.field(static=True, default=16)
    capacity: int = eqx.field(static=True, default=20_000)
    """Slots in the replay."""
    steps: int = eqx.field(static=True, default=12)
    """Gradient steps per update."""
    batch: int = eqx.field(static=True, default=256)
    """Slots per gradient step."""
    learning_rate: float = eqx.field(static=True, default=1e-3)
    critic_rate: float = eqx.field(static=True, default=2e-3)
    discount: float = eqx.field(static=True, default=0.8)
    target_rate: float = eqx.field(static=True, default=0.02)
    """Share of the critic that enters the target network at each gradient step."""
    temperature: float = eqx.field(static=True, default=0.03)
    """Weight of the entropy, in units of the reward; where it starts if `entropy_share` is given."""
    entropy_share: float | None = eqx.field(static=True, default=None)
    """Entropy to hold by adapting the temperature, as a share of the logarithm of the allowed options; None: fixed."""
    logit_penalty: float = eqx.field(static=True, default=1e-3)
    """Of the mean squared attention logit, as in MAAC."""
    huber: float = eqx.field(static=True, default=5.0)
    """Errors of the critic beyond this count linearly: latency has a heavy tail. Units of the reward."""
    gradient_norm: float = eqx.field(static=True, default=5.0)
    credit: Credit = eqx.field(static=True, default="own")
    """What Q_own learns: the request's own reward, or its difference reward (see `rollout.collect`)."""
    cooperation: float | None = eqx.field(static=True, default=None)
    """Share of the team in what an actor climbs; None: the scenario's `reward.cooperation`."""
    reward_scale: float = eqx.field(static=True, default=1.0)
    """Multiplies all rewards."""
    width: int = eqx.field(static=True, default=32)
    critic_width: int = eqx.field(static=True, default=32)
    heads: int = eqx.field(static=True, default=4)
    lifetime: int = eqx.field(static=True, default=64)
    """Updates after which an environment starts anew with other links and empty queues."""
    communicating: bool = eqx.field(static=True, default=False)

    def init(self, task: Task, key: PRNGKeyArray) -> AmarlSoftState:
        """Networks, optimisers, environments, an empty replay.

        Raises:
            InputError: there is more than the place to choose; the counterfactuals of the critic know places only.
        """
        if task.scale.levels > 1:
            raise InputError(
                "algorithm amarl-soft: its critic knows places only, this scenario lets devices choose steps, power, "
                "shares, service or parts; use amarl, mappo, idqn or maddpg"
            )
        actor_key, critic_key, worker_key, key = jax.random.split(key, 4)
        actor = Actor(task.scale, actor_key, self.width, communicating=self.communicating)
        critic = OptionCritic(
            task.scale, critic_key, self.critic_width, self.heads, task.environment.plant.switches.own_waits
        )
        log_temperature = jnp.log(jnp.asarray(self.temperature, jnp.float32))
        actor_rule, critic_rule, temperature_rule = self._optimisers()
        optimisers = (
            actor_rule.init(eqx.filter(actor, eqx.is_array)),
            critic_rule.init(eqx.filter(critic, eqx.is_array)),
            temperature_rule.init(log_temperature),
        )
        workers = start_workers(task, worker_key, self.environments)
        entries = jax.eval_shape(lambda: replay.collect_slots(task, actor, workers, key, self.slots, self.credit)[1])
        ring = replay.empty(entries, self.capacity)
        count = jnp.zeros((), jnp.int32)
        # The target starts as a copy: buffers of a training state must not be shared, they may be donated.
        target = jax.tree.map(jnp.copy, critic)
        return AmarlSoftState(actor, critic, target, log_temperature, optimisers, ring, workers, key, count)

    def policy(self, state: AmarlSoftState) -> LearnedPolicy:
        """The actor alone."""
        return LearnedPolicy(state.actor, mode="communicating" if self.communicating else "decentralised")

    def decisions_per_update(self, task: Task) -> int:
        """Devices x slots x environments."""
        return task.environment.plant.switches.devices * self.slots * self.environments

    def update(self, task: Task, state: AmarlSoftState) -> tuple[AmarlSoftState, Metrics]:
        """A few slots into the replay, then gradient steps on samples of it."""
        rollout_key, learn_key, key = jax.random.split(state.key, 3)
        workers, seen = replay.collect_slots(task, state.actor, state.workers, rollout_key, self.slots, self.credit)
        ring = replay.add(state.replay, seen)

        def step(learned: _Learned, step_key: PRNGKeyArray) -> tuple[_Learned, Metrics]:
            sample_key, step_key = jax.random.split(step_key)
            now, following = replay.sample(ring, sample_key, self.batch, self.environments)
            return self._step(task, learned, now, following, step_key)

        learned: _Learned = (state.actor, state.critic, state.target, state.log_temperature, state.optimisers)
        learned, losses = jax.lax.scan(step, learned, jax.random.split(learn_key, self.steps))
        workers = refresh(task, workers, max(1, self.environments // self.lifetime))
        count = jnp.maximum(jnp.sum(seen.observation.present), 1)
        metrics: Metrics = {
            "own_reward": jnp.sum(jnp.where(seen.observation.present, seen.own, 0.0)) / count,
            "team_reward": jnp.mean(seen.team),
            **jax.tree.map(jnp.mean, losses),
        }
        return AmarlSoftState(*learned, ring, workers, key, state.updates + 1), metrics

    def _optimisers(self) -> tuple[optax.GradientTransformation, ...]:
        steps = self.updates * self.steps

        def rule(rate: float) -> optax.GradientTransformation:
            schedule = optax.linear_schedule(rate, 0.05 * rate, steps)
            return optax.chain(optax.clip_by_global_norm(self.gradient_norm), optax.adam(schedule, eps=1e-5))

        return rule(self.learning_rate), rule(self.critic_rate), rule(self.learning_rate)

    def _step(
        self, task: Task, learned: _Learned, now: Slot, following: Slot, key: PRNGKeyArray
    ) -> tuple[_Learned, Metrics]:
        """One step of the critic, of the actor and of the temperature."""
        actor, critic, target, log_temperature, (actor_memory, critic_memory, temperature_memory) = learned
        actor_rule, critic_rule, temperature_rule = self._optimisers()
        next_key, own_key = jax.random.split(key)
        alpha = jnp.exp(log_temperature)
        here = now.observation.present
        count = jnp.maximum(jnp.sum(here), 1)
        logits = actor(following.observation)
        soft = jnp.sum(jnp.where(following.observation.present, entropy(logits), 0.0), axis=-1)
        value = target(following.fresh, jax.random.categorical(next_key, logits)).team
        goal = self.reward_scale * now.team + alpha * self.discount * soft
        goal = goal / task.requests_per_slot + self.discount * value
        # After a fresh start of an environment the next entry is another life.
        known = following.number == now.number + 1

        def critic_loss(critic: OptionCritic) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
            judged = critic(now.fresh, now.action)
            taken = jnp.take_along_axis(judged.own, now.action[..., None], axis=-1)[..., 0]
            own = optax.losses.huber_loss(taken, self.reward_scale * now.own, delta=self.huber)
            own = jnp.sum(jnp.where(here, own, 0.0)) / count
            team = optax.losses.huber_loss(judged.team, goal, delta=self.huber)
            team = jnp.sum(jnp.where(known, team, 0.0)) / jnp.maximum(jnp.sum(known), 1)
            return own + team + self.logit_penalty * jnp.mean(judged.logits), (own, team)

        gradient, (own_loss, team_loss) = jax.grad(critic_loss, has_aux=True)(critic)
        change, critic_memory = critic_rule.update(gradient, critic_memory)
        critic = eqx.apply_updates(critic, change)
        share = task.environment.plant.switches.reward.cooperation if self.cooperation is None else self.cooperation
        judged = critic(now.fresh, jax.random.categorical(own_key, actor(now.observation)))
        quality = (1 - share) * judged.own + share * task.requests_per_slot * judged.team_marginal

        def actor_loss(actor: Actor) -> tuple[jax.Array, jax.Array]:
            logits = actor(now.observation)
            allowed = jnp.isfinite(logits)
            log = jnp.where(allowed, jax.nn.log_softmax(logits), 0.0)
            chance = jnp.where(allowed, jnp.exp(log), 0.0)
            baseline = jnp.sum(jax.lax.stop_gradient(chance) * quality, axis=-1, keepdims=True)
            gain = jnp.sum(chance * (quality - baseline - alpha * log), axis=-1)
            return -jnp.sum(jnp.where(here, gain, 0.0)) / count, logits

        gradient, logits = jax.grad(actor_loss, has_aux=True)(actor)
        change, actor_memory = actor_rule.update(gradient, actor_memory)
        actor = eqx.apply_updates(actor, change)
        uniform = jnp.log(jnp.sum(now.observation.mask, axis=-1).astype(jnp.float32))
        surprise = jnp.sum(jnp.where(here, entropy(logits), 0.0)) / count
        if self.entropy_share is not None:
            wanted = self.entropy_share * jnp.sum(jnp.where(here, uniform, 0.0)) / count
            change, temperature_memory = temperature_rule.update(surprise - wanted, temperature_memory)
            log_temperature = eqx.apply_updates(log_temperature, change)
        target = jax.tree.map(lambda old, new: old + self.target_rate * (new - old), target, critic)
        metrics = {"entropy": surprise, "own_loss": own_loss, "team_loss": team_loss, "temperature": alpha}
        memories = (actor_memory, critic_memory, temperature_memory)
        return (actor, critic, target, log_temperature, memories), metrics
