"""Rules for servers with a capacity that their papers compare with: by the steps that there is still room for."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from gmel.simulator.environment import Environment
from gmel.simulator.state import State

__all__ = ["one_by_one", "room_for_steps"]

Best = Callable[[jax.Array, jax.Array], jax.Array]


def room_for_steps(environment: Environment, state: State) -> jax.Array:
    """Steps that each server has room for."""
    tasks = state.uploads
    assert tasks.shared is not None and tasks.units is not None
    running = tasks.present & tasks.shared.serving
    at = (tasks.server[:, None] == jnp.arange(environment.servers)) & running[:, None]
    return environment.plant.server_capacity - jnp.sum(jnp.where(at, tasks.units[:, None], 0.0), axis=0)


def one_by_one(environment: Environment, state: State, best: Best, services: int = 1) -> jax.Array:
    """Each request in turn takes the best server x services + service, by the room that those before it in the slot
    left: `best` of that and of its row."""
    requests, steps = state.requests, state.requests.steps
    assert steps is not None  # with a capacity

    def place(room: jax.Array, row: jax.Array) -> tuple[jax.Array, jax.Array]:
        number = best(room, row)
        used = jnp.where(requests.present[row], steps[row], 0.0)
        return room - used * (jnp.arange(environment.servers) == number // services), number

    return jax.lax.scan(place, room_for_steps(environment, state), jnp.arange(environment.requests))[1]
