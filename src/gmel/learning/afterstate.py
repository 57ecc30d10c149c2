"""The value of what a slot leaves behind: credit for the delay that a decision causes to requests yet to come.

A difference reward (`rollout.collect`) knows the other tasks of the slot and those in flight, not the ones that follow.
Where service lasts many slots, most of the harm comes later: work on a server delays what is sent there after it, and
a model that is loaded pushes out another. The servers' state at the end of a slot, before the next requests are known,
is an *afterstate* (Sutton and Barto 2018, section 6.8). With V(afterstate) the expected discounted reward of all later
requests, a request is credited with what its own part of the afterstate changes,

    difference_i + discount (V(after) - V(after without i)).

Both afterstates come from the simulator, so the only thing that is learned is V, and common noise cancels in the
difference: the counterfactual of COMA (Foerster et al. 2018, arXiv 1705.08926) taken over the future instead of over
the agent's own options.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from gmel.learning.networks import Linear
from gmel.simulator.environment import Afterstate
from gmel.simulator.plant import Plant
from gmel.simulator.scale import Scale

__all__ = ["AfterstateCritic", "lambda_returns"]

_INPUTS = 9


class AfterstateCritic(eqx.Module):
    """V of an afterstate: a sum over the servers, each judged beside the mean of all. Any number of servers.

    The last layer starts small: an untrained critic hardly changes the credit.
    """

    scale: Scale = eqx.field(static=True)
    server_in: Linear
    mix: Linear
    out: Linear

    def __init__(self, scale: Scale, key: PRNGKeyArray, width: int = 32) -> None:
        keys = jax.random.split(key, 3)
        self.scale = scale
        self.server_in = Linear(_INPUTS, width, keys[0])
        self.mix = Linear(2 * width, width, keys[1])
        self.out = Linear(width, 1, keys[2], gain=0.01)

    def __call__(self, after: Afterstate, plant: Plant) -> Float[Array, "*batch"]:
        """Expected discounted reward of the later slots, in mean rewards of a slot's requests."""
        hidden = jax.nn.relu(self.server_in(_features(after, plant, self.scale)))
        mean = jnp.broadcast_to(jnp.mean(hidden, axis=-2, keepdims=True), hidden.shape)
        mixed = jax.nn.relu(self.mix(jnp.concatenate([hidden, mean], axis=-1)))
        return jnp.sum(self.out(mixed)[..., 0], axis=-1)


def _features(after: Afterstate, plant: Plant, scale: Scale) -> Float[Array, "*batch servers inputs"]:
    wait, first, coming = (x / scale.time_s for x in (after.wait_s, after.first_s, after.coming_s))
    held, missing_s = jnp.zeros_like(wait), jnp.zeros_like(wait)
    if after.resident.shape[-1]:
        popularity = plant.catalogue.popularity
        held = jnp.sum(jnp.where(after.resident, popularity, 0.0), axis=-1)
        # What the next request would spend on loading here.
        missing_s = jnp.sum(jnp.where(after.resident, 0.0, popularity * plant.catalogue.load_mean_s), axis=-1)
    speed = jnp.log(plant.server_speed * scale.time_s / scale.work)
    return jnp.stack(
        [
            jnp.log1p(wait + coming),
            jnp.minimum(wait + coming, 16.0) / 4.0,
            jnp.log1p(first),
            jnp.minimum(first, 16.0) / 4.0,
            jnp.log1p(coming),
            jnp.broadcast_to(speed, wait.shape),
            jnp.broadcast_to(jnp.log(plant.server_gpus), wait.shape),
            held,
            jnp.log1p(missing_s / scale.time_s),
        ],
        axis=-1,
    )


def lambda_returns(
    reward: Float[Array, "slots environments"],
    value: Float[Array, "slots environments"],
    discount: float,
    decay: float,
) -> Float[Array, "slots environments"]:
    """Targets of V(afterstate of slot t): rewards of the slots t + 1 on, bootstrapped at the last afterstate.

    G_t = r_{t+1} + discount ((1 - decay) V_{t+1} + decay G_{t+1}); the last slot has no later reward and keeps its V.
    """

    def back(later: jax.Array, slot: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        following, here = slot
        target = following + discount * ((1 - decay) * here + decay * later)
        return target, target

    last = value[-1]
    _, targets = jax.lax.scan(back, last, (reward[1:], value[1:]), reverse=True)
    return jnp.concatenate([targets, last[None]])
