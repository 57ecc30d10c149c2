"""Rules of thumb that look at a request alone: the lower rungs of the ladder (L0 to L3).

Sources: reference ladder 4.2-4.3. LED: least expected delay, also known as SED with sampling (Mitzenmacher's power of
two choices for unlike servers); the softmax of expected delays spreads simultaneous decisions (Dahlin 2000 for the
idea).
"""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from gmel.policies.policy import StatelessPolicy, sample
from gmel.simulator.state import Observation, option, other_cost_s

__all__ = [
    "AllLocal",
    "Greedy",
    "LeastExpectedDelay",
    "Nearest",
    "Proportional",
    "Softmax",
    "Softmax7",
    "UniformRandom",
    "expected_cost_s",
    "expected_latency_s",
]


def expected_latency_s(observation: Observation) -> Float[Array, "*batch requests options"]:
    """Latency of each option from now on, if the queue is as last heard and nobody else comes.

    The wait overlaps the upload: a task starts when both its upload and the work before it are done.
    """
    start_s = jnp.maximum(option(observation, "upload_s"), option(observation, "backlog_s"))
    return (
        start_s + option(observation, "switch_s") + option(observation, "service_s") + option(observation, "download_s")
    )


def expected_cost_s(observation: Observation) -> Float[Array, "*batch requests options"]:
    """Expected latency, and what else the reward counts of an option, in seconds
    (`gmel.simulator.state.OTHER_COST`)."""
    return expected_latency_s(observation) + other_cost_s(observation)


def _servers_only(observation: Observation) -> jax.Array:
    """The mask without the device itself, where a row has any server at all."""
    servers = observation.mask & (option(observation, "local") == 0)
    return jnp.where(jnp.any(servers, axis=-1, keepdims=True), servers, observation.mask)


class AllLocal(StatelessPolicy):
    """Every task on its device, where the device can run it."""

    def choose(self, observation: Observation, key: PRNGKeyArray) -> Int[Array, "requests"]:
        """The device, or a random server where the model does not fit it; of several levels the cheapest or a
        random one."""
        local = option(observation, "local") > 0
        scores = jnp.where(local, 50.0 - other_cost_s(observation), 0.0)
        return sample(jnp.where(observation.mask, scores, -jnp.inf), key)


class UniformRandom(StatelessPolicy):
    """Any allowed option with equal probability."""

    def choose(self, observation: Observation, key: PRNGKeyArray) -> Int[Array, "requests"]:
        """A uniform draw."""
        return sample(jnp.where(observation.mask, 0.0, -jnp.inf), key)


class Nearest(StatelessPolicy):
    """The server with the fastest upload."""

    def choose(self, observation: Observation, key: PRNGKeyArray) -> Int[Array, "requests"]:
        """Arg-min of the upload time over the servers."""
        del key
        upload_s = option(observation, "upload_s") + 1e-3 * other_cost_s(observation)  # only where levels tie
        return jnp.argmin(jnp.where(_servers_only(observation), upload_s, jnp.inf), axis=-1)


class Proportional(StatelessPolicy):
    """L0: a random server in proportion to its capacity."""

    def choose(self, observation: Observation, key: PRNGKeyArray) -> Int[Array, "requests"]:
        """A draw with weights speed x GPUs."""
        capacity = option(observation, "speed") * option(observation, "gpus")
        return sample(jnp.where(_servers_only(observation), jnp.log(capacity), -jnp.inf), key)


class Greedy(StatelessPolicy):
    """The option with the least expected cost: everybody runs to the same server."""

    def choose(self, observation: Observation, key: PRNGKeyArray) -> Int[Array, "requests"]:
        """Arg-min of the expected cost."""
        del key
        return jnp.argmin(jnp.where(observation.mask, expected_cost_s(observation), jnp.inf), axis=-1)


class LeastExpectedDelay(StatelessPolicy):
    """L1, LED(2): of two random servers the one with the least expected cost."""

    choices: int = eqx.field(static=True, default=2)

    def choose(self, observation: Observation, key: PRNGKeyArray) -> Int[Array, "requests"]:
        """Arg-min over a random subset of the servers, drawn without replacement."""
        allowed = _servers_only(observation)
        lottery = jnp.where(allowed, jax.random.uniform(key, allowed.shape), -1.0)
        threshold = jax.lax.top_k(lottery, min(self.choices, lottery.shape[-1]))[0][..., -1:]
        drawn = allowed & (lottery >= threshold)
        return jnp.argmin(jnp.where(drawn, expected_cost_s(observation), jnp.inf), axis=-1)


class Softmax(StatelessPolicy):
    """L2: softmax of minus the expected cost over a temperature in seconds."""

    temperature_s: Float[Array, ""]

    def choose(self, observation: Observation, key: PRNGKeyArray) -> Int[Array, "requests"]:
        """A draw by the softmax."""
        return sample(jnp.where(observation.mask, -expected_cost_s(observation) / self.temperature_s, -jnp.inf), key)


class Softmax7(StatelessPolicy):
    """L3: seven weights, tuned by random search; decentralised and memoryless like a learned actor.

    Server m: theta0 ln F_m - theta1 max(0, backlog - theta2) - theta3 upload - theta4 (switch + service + download);
    the device itself: theta5 - theta6 (own backlog + service).
    """

    theta: Float[Array, "7"]

    def logits(self, observation: Observation) -> Float[Array, "*batch requests options"]:
        """Scores of the options; masked options minus infinity."""
        theta = self.theta
        wait_s = option(observation, "backlog_s")
        run_s = option(observation, "switch_s") + option(observation, "service_s") + option(observation, "download_s")
        other_s = other_cost_s(observation)
        capacity = option(observation, "speed") * option(observation, "gpus")
        server = (
            theta[0] * jnp.log(capacity)
            - theta[1] * jnp.maximum(0.0, wait_s - theta[2])
            - theta[3] * option(observation, "upload_s")
            - theta[4] * (run_s + other_s)
        )
        itself = theta[5] - theta[6] * (wait_s + run_s + other_s)
        scores = jnp.where(option(observation, "local") > 0, itself, server)
        return jnp.where(observation.mask, scores, -jnp.inf)

    def choose(self, observation: Observation, key: PRNGKeyArray) -> Int[Array, "requests"]:
        """A draw by the softmax of the scores."""
        return sample(self.logits(observation), key)
