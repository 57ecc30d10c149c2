"""What a policy is, and how one is asked.

A policy is an Equinox module, so its parameters are a pytree. It looks at an `Observation` (decentralised: every row on
its own, shared by all devices) or, if it is central, at the state of the environment.
"""

from abc import abstractmethod
from typing import Generic, Literal, TypeVar

import equinox as eqx
import jax
from jaxtyping import Array, Int, PRNGKeyArray

from gmel.simulator.environment import Environment
from gmel.simulator.state import Observation, State

__all__ = ["CentralPolicy", "Mode", "Policy", "StatelessPolicy", "decide"]

Mode = Literal["decentralised", "communicating", "central"]
Memory = TypeVar("Memory")


class Policy(eqx.Module, Generic[Memory]):
    """Decides from what devices know.

    `mode`: `decentralised` (each row sees itself alone), `communicating` (one round of messages between the requests of
    the slot) or `central`. `fresh`: it needs the servers' state of this instant in place of the last broadcast.
    """

    mode: Mode = eqx.field(static=True, default="decentralised", kw_only=True)
    fresh: bool = eqx.field(static=True, default=False, kw_only=True)

    @abstractmethod
    def init(self, key: PRNGKeyArray) -> Memory:
        """Memory at the start of an episode."""

    @abstractmethod
    def act(self, observation: Observation, memory: Memory, key: PRNGKeyArray) -> tuple[Int[Array, "requests"], Memory]:
        """Option of each request, and the memory for the next slot."""


class StatelessPolicy(Policy[None]):
    """A policy without memory: implement `choose`."""

    def init(self, key: PRNGKeyArray) -> None:
        """Nothing to remember."""
        del key

    def act(self, observation: Observation, memory: None, key: PRNGKeyArray) -> tuple[Int[Array, "requests"], None]:
        """As `choose`."""
        return self.choose(observation, key), memory

    @abstractmethod
    def choose(self, observation: Observation, key: PRNGKeyArray) -> Int[Array, "requests"]:
        """Option of each request."""


class CentralPolicy(eqx.Module):
    """Decides with everything known, the exact queues and the requests of all devices: a reference, not a contender."""

    mode: Mode = eqx.field(static=True, default="central", kw_only=True)

    @abstractmethod
    def assign(self, environment: Environment, state: State, key: PRNGKeyArray) -> Int[Array, "requests"]:
        """Option of each request."""


def decide(
    policy: Policy[Memory] | CentralPolicy,
    environment: Environment,
    state: State,
    memory: Memory,
    key: PRNGKeyArray,
) -> tuple[Int[Array, "requests"], Memory]:
    """Asks any policy for the actions of a slot."""
    if isinstance(policy, CentralPolicy):
        return policy.assign(environment, state, key), memory
    return policy.act(environment.observe(state, fresh=policy.fresh), memory, key)


def initial_memory(policy: "Policy[Memory] | CentralPolicy", key: PRNGKeyArray) -> Memory | None:
    """Memory of any policy at the start of an episode (central policies have none)."""
    return None if isinstance(policy, CentralPolicy) else policy.init(key)


def sample(logits: jax.Array, key: PRNGKeyArray) -> Int[Array, "requests"]:
    """One option a row by its logits (masked options: minus infinity)."""
    return jax.random.categorical(key, logits, axis=-1)
