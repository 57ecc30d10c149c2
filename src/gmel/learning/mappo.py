"""MAPPO, a rival: the clipped on-policy rule with a flat centralised critic.

Actor and clipped loss are AMARL's (`amarl.py`); a request is credited with its own and the shared reward, not with
its difference reward. The critic is what most published multi-agent PPO uses, a plain network on the concatenation of
what all agents see (Yu et al. 2022, arXiv 2103.01955). It knows the rows of the table by their place, its size grows
with requests x options, and it fits one plant.
"""

from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from gmel.learning.algorithm import Task
from gmel.learning.amarl import Amarl, Critic
from gmel.learning.networks import Linear, Values, encode, option_inputs, task_inputs
from gmel.learning.rollout import Credit
from gmel.simulator.scale import Scale
from gmel.simulator.state import Observation

__all__ = ["FlatCritic", "Mappo"]


class FlatCritic(eqx.Module):
    """Two hidden layers on all rows one after the other, absent ones as zeros; with `actions`, on those as well."""

    scale: Scale = eqx.field(static=True)
    actions: bool = eqx.field(static=True)
    layers: tuple[Linear, Linear]
    own_out: Linear
    team_out: Linear

    def __init__(
        self, scale: Scale, rows: int, options: int, key: PRNGKeyArray, width: int = 64, actions: bool = False
    ) -> None:
        keys = jax.random.split(key, 4)
        self.scale, self.actions = scale, actions
        inputs = rows * (1 + task_inputs(scale) + options * (option_inputs(scale) + actions))
        self.layers = (Linear(inputs, width, keys[0]), Linear(width, width, keys[1]))
        self.own_out = Linear(width, rows, keys[2], gain=0.1)
        self.team_out = Linear(width, 1, keys[3], gain=0.1)

    def __call__(
        self,
        fresh: Observation,
        rows: int | None = None,
        chosen: Float[Array, "*batch requests options"] | None = None,
    ) -> Values:
        """Values of a batch of slots; `chosen` are the actions as (relaxed) one-hot rows. It reads every row of the
        table, so `rows` changes nothing."""
        del rows
        options, tasks = encode(fresh, self.scale)
        here = fresh.present[..., None]
        options = jnp.where(here[..., None], options, 0.0)
        parts = [here.astype(tasks.dtype), jnp.where(here, tasks, 0.0), _flat(options, 2)]
        if chosen is not None:
            parts.append(jnp.where(here, chosen, 0.0))
        hidden = _flat(jnp.concatenate(parts, axis=-1), 2)
        for layer in self.layers:
            hidden = jax.nn.relu(layer(hidden))
        return Values(self.own_out(hidden), self.team_out(hidden)[..., 0])


class Mappo(Amarl):
    """AMARL's rule with the flat critic. `critic_width` is that of its hidden layers; `heads` has no meaning here."""

    name: ClassVar[str] = "mappo"
    title: ClassVar[str] = "MAPPO"

    critic_width: int = eqx.field(static=True, default=64)
    # As published: own and shared reward, no difference rewards.
    credit: Credit = eqx.field(static=True, default="own")
    cooperation: float | None = eqx.field(static=True, default=None)

    def critic(self, task: Task, key: PRNGKeyArray) -> Critic:
        """The flat critic of this plant."""
        environment = task.environment
        return FlatCritic(task.scale, environment.requests, environment.options, key, self.critic_width)


def _flat(x: Float[Array, "..."], axes: int) -> Float[Array, "..."]:
    """The last axes as one."""
    return x.reshape(*x.shape[:-axes], -1)
