"""Collecting experience: all environments, a few slots, one `lax.scan`."""

from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from gmel.learning.algorithm import Task
from gmel.simulator.environment import Afterstate
from gmel.simulator.state import Observation, State

__all__ = ["Credit", "Trajectory", "collect", "log_prob"]

Credit = Literal["own", "difference"]


class Trajectory(NamedTuple):
    """What happened, leading axes [slots, environments].

    `own`: reward of each request (by the credit asked for); `team`: of all together (see `simulator.state.Reward`).
    """

    observation: Observation
    fresh: Observation
    action: Int[Array, "slots environments requests"]
    log_prob: Float[Array, "slots environments requests"]
    own: Float[Array, "slots environments requests"]
    team: Float[Array, "slots environments"]
    after: Afterstate | None = None
    """What each slot left behind (with an afterstate critic)."""


def log_prob(logits: Float[Array, "*batch options"], action: Int[Array, "*batch"]) -> Float[Array, "*batch"]:
    """Log probability of the chosen options."""
    return jnp.take_along_axis(jax.nn.log_softmax(logits), action[..., None], axis=-1)[..., 0]


def collect(
    task: Task,
    logits: Callable[[Observation], Float[Array, "environments requests options"]],
    states: State,
    key: PRNGKeyArray,
    slots: int,
    credit: Credit = "own",
    later: Callable[[Afterstate], Float[Array, "..."]] | None = None,
) -> tuple[State, Trajectory, Observation]:
    """Runs the stochastic policy of `logits` for some slots; also returns the fresh observation after the last.

    With the credit `difference` a request is charged with what the slot would have cost less without it: its own cost
    and the delay it causes to the others (difference rewards, Wolpert and Tumer 2002; exact here, because the
    environment can be asked). `later` judges what a slot leaves behind (see `afterstate.py`); with it a request is also
    charged with what it takes from the requests yet to come.
    """
    environment = task.environment

    def fresh(state: State) -> Observation:
        return environment.observe(state, fresh=True)

    def slot(states: State, slot_key: PRNGKeyArray) -> tuple[State, Trajectory]:
        observation = jax.vmap(environment.observe)(states)
        scores = logits(observation)
        action = jax.random.categorical(slot_key, scores)
        after, reward, _ = jax.vmap(environment.step)(states, action)
        own, left = reward.own, None
        if credit == "difference":
            changed = jax.vmap(environment.counterfactual)(states, action)
            own = changed.difference
            if later is not None:
                left = changed.after
                own = own + jnp.where(observation.present, later(left)[:, None] - later(changed.without), 0.0)
        seen = Trajectory(
            observation, jax.vmap(fresh)(states), action, log_prob(scores, action), own, reward.team, left
        )
        return after, seen

    states, trajectory = jax.lax.scan(slot, states, jax.random.split(key, slots))
    return states, trajectory, jax.vmap(fresh)(states)
