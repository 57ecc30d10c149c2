"""The devices as agents in the style of JaxMARL: pure functions of arrays, `jit`, `vmap` and `scan` work on them.

JaxMARL (Rutherford et al. 2024) itself is not needed. Where it is installed its spaces are used, because some of its
algorithms ask for their types.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, Shaped, UInt32

from gmel.scenario.schema import Scenario
from gmel.simulator.adapters.devices import device_slot, device_view, finished
from gmel.simulator.adapters.episode import Credit, RewardFunction, check_requests, check_reward, open_site
from gmel.simulator.adapters.flat import BOUND, flat_rows, flat_width
from gmel.simulator.state import State

__all__ = ["Box", "Discrete", "GmelMultiAgentEnv", "MultiDiscrete"]

Key = PRNGKeyArray | UInt32[Array, "2"]


@dataclass(frozen=True)
class Discrete:
    """The numbers 0 ... n - 1."""

    n: int
    dtype: Any = jnp.int32

    @property
    def shape(self) -> tuple[int, ...]:
        """A scalar."""
        return ()

    def sample(self, rng: Key) -> Int[Array, ""]:
        """One of them, each as likely."""
        return jax.random.randint(rng, (), 0, self.n, self.dtype)

    def contains(self, x: Any) -> Bool[Array, ""]:
        """Whether `x` is one of them."""
        return jnp.all((jnp.asarray(x) >= 0) & (jnp.asarray(x) < self.n))


@dataclass(frozen=True)
class MultiDiscrete:
    """One number for each entry of `num_categories`."""

    num_categories: tuple[int, ...]
    dtype: Any = jnp.int32

    @property
    def shape(self) -> tuple[int, ...]:
        """A vector."""
        return (len(self.num_categories),)

    def sample(self, rng: Key) -> Int[Array, "n"]:
        """Each number as likely."""
        return jax.random.randint(rng, self.shape, 0, jnp.array(self.num_categories), self.dtype)

    def contains(self, x: Any) -> Bool[Array, ""]:
        """Whether `x` is one of them."""
        return jnp.all((jnp.asarray(x) >= 0) & (jnp.asarray(x) < jnp.array(self.num_categories)))


@dataclass(frozen=True)
class Box:
    """Vectors between two bounds."""

    low: float
    high: float
    shape: tuple[int, ...]
    dtype: Any = jnp.float32

    def sample(self, rng: Key) -> Float[Array, "..."]:
        """Uniform."""
        return jax.random.uniform(rng, self.shape, self.dtype, self.low, self.high)

    def contains(self, x: Any) -> Bool[Array, ""]:
        """Whether `x` lies within."""
        return jnp.all((jnp.asarray(x) >= self.low) & (jnp.asarray(x) <= self.high))


class GmelMultiAgentEnv:
    """A plant whose devices are agents, for learners in JAX. Rules, features and rewards as of the PettingZoo adapter.

    The state is the simulator's own `State`. Observations are the flat vector alone; what may be chosen comes from
    `get_avail_actions`. Uploads that did not fit their table are counted in `state.lost`, which must stay 0.

    Args:
        scenario: name of a preset, path of a scenario file, or a scenario.
        load: offered load in place of the scenario's own.
        trace: requests to replay in place of the scenario's arrivals.
        held_out: of a trace, the part kept for evaluation.
        slots: length of an episode in place of the scenario's.
        requests_per_device: requests that an agent decides in a slot (`MultiDiscrete` with more than 1).
        reward: `own`, `team`, `mixed`, or a function of (state, action, outcome, reward).

    Raises:
        InputError: an unknown scenario or trace, or a value out of its range.

    Example:
        >>> env = GmelMultiAgentEnv("hall-20x5", slots=100)
        >>> obs, state = env.reset(jax.random.key(0))
        >>> actions = {agent: jnp.zeros((), jnp.int32) for agent in env.agents}
        >>> obs, state, rewards, dones, infos = env.step(jax.random.key(1), state, actions)
    """

    name = "gmel"

    def __init__(
        self,
        scenario: str | Scenario = "hall-20x5",
        *,
        load: float | None = None,
        trace: str | None = None,
        held_out: bool = False,
        slots: int | None = None,
        requests_per_device: int = 1,
        reward: str | RewardFunction = "mixed",
    ) -> None:
        check_requests(requests_per_device)
        self.site = open_site(scenario, load, trace, held_out, slots)
        self._k = requests_per_device
        self._reward: Credit | RewardFunction = check_reward(reward)
        environment = self.site.environment
        self.num_agents = environment.plant.switches.devices
        self.agents = [f"device_{number}" for number in range(self.num_agents)]
        box, discrete, multi = _space_types()
        options, width = (
            environment.options,
            requests_per_device * flat_width(environment),
        )
        action: Any = discrete(options) if requests_per_device == 1 else multi((options,) * requests_per_device)
        self.observation_spaces = dict.fromkeys(self.agents, box(-BOUND, BOUND, (width,)))
        self.action_spaces = dict.fromkeys(self.agents, action)

    def observation_space(self, agent: str) -> Any:
        """Flat float32 vector."""
        return self.observation_spaces[agent]

    def action_space(self, agent: str) -> Any:
        """0 = on the device itself, j = on server j."""
        return self.action_spaces[agent]

    @property
    def agent_classes(self) -> dict[str, list[str]]:
        """All devices are of one class: they may share a policy."""
        return {"device": self.agents}

    @partial(jax.jit, static_argnums=0)
    def reset(self, key: Key) -> tuple[dict[str, Float[Array, "width"]], State]:
        """Starts an episode whose traffic follows from the key."""
        state = self._start(key)
        return self._observe(state), state

    @partial(jax.jit, static_argnums=0)
    def step(
        self,
        key: Key,
        state: State,
        actions: dict[str, Int[Array, "..."]],
        reset_state: State | None = None,
    ) -> tuple[
        dict[str, Float[Array, "width"]],
        State,
        dict[str, Float[Array, ""]],
        dict[str, Bool[Array, ""]],
        dict[str, Shaped[Array, "agents"]],
    ]:
        """One slot; at the end of an episode the state and observations returned are those of the next.

        Args:
            key: makes the next episode.
            state: at a slot start.
            actions: of each agent.
            reset_state: start of the next episode in place of a drawn one.
        """
        _, after, rewards, dones, infos = self.step_env(key, state, actions)
        fresh = self._start(key) if reset_state is None else reset_state
        over = dones["__all__"]
        after = jax.tree.map(lambda new, old: jnp.where(over, new, old), fresh, after)
        # Observed once, after the choice between both; the compiler leaves out what `step_env` observed.
        return self._observe(after), after, rewards, dones, infos

    def step_env(
        self, key: Key, state: State, actions: dict[str, Int[Array, "..."]]
    ) -> tuple[
        dict[str, Float[Array, "width"]],
        State,
        dict[str, Float[Array, ""]],
        dict[str, Bool[Array, ""]],
        dict[str, Shaped[Array, "agents"]],
    ]:
        """One slot without a reset. Nothing is drawn from the key: traffic follows from the state."""
        del key
        environment = self.site.environment
        table = jnp.stack([jnp.reshape(actions[agent], (self._k,)) for agent in self.agents]).astype(jnp.int32)
        slot = device_slot(environment, state, table, self._reward)
        over = slot.state.slot >= self.site.slots
        done = finished(environment, slot.outcome)
        infos = {
            "tasks": done.tasks,
            "in_time": done.in_time,
            "total_latency_s": done.latency_s,
            "total_energy_j": done.energy_j,
            "beyond": slot.beyond,
            "replaced": slot.replaced,
        }
        rewards = {agent: slot.reward[row] for row, agent in enumerate(self.agents)}
        dones = dict.fromkeys([*self.agents, "__all__"], over)
        return self._observe(slot.state), slot.state, rewards, dones, infos

    def get_obs(self, state: State) -> dict[str, Float[Array, "width"]]:
        """What each agent knows."""
        return self._observe(state)

    @partial(jax.jit, static_argnums=0)
    def get_avail_actions(self, state: State) -> dict[str, Bool[Array, "..."]]:
        """What each agent may choose: [options], or [k, options] with more than one request a device."""
        mask = device_view(self.site.environment, state, self.site.scale, self._k).mask
        mask = mask[:, 0] if self._k == 1 else mask
        return {agent: mask[row] for row, agent in enumerate(self.agents)}

    @partial(jax.jit, static_argnums=0)
    def world_state(self, state: State) -> Float[Array, "numbers"]:
        """All requests with the servers as they are: for centralised critics."""
        return flat_rows(self.site.environment.observe(state, fresh=True), self.site.scale).reshape(-1)

    def _start(self, key: Key) -> State:
        environment = self.site.environment
        seed_key, place_key = jax.random.split(key)
        length = 1 if environment.trace is None else environment.trace.present.shape[0]
        seed = jax.random.bits(seed_key, (2,), jnp.uint32)
        return environment.reset(seed, jax.random.randint(place_key, (), 0, length, jnp.int32))

    def _observe(self, state: State) -> dict[str, Float[Array, "width"]]:
        rows = device_view(self.site.environment, state, self.site.scale, self._k).observation
        return {agent: rows[row] for row, agent in enumerate(self.agents)}


def _space_types() -> tuple[Any, Any, Any]:
    """Box, Discrete and MultiDiscrete: JaxMARL's where it is installed, else our own."""
    try:
        # Optional, and slow to import.
        from jaxmarl.environments import spaces  # type: ignore[import-not-found]  # noqa: PLC0415
    except ImportError:
        return Box, Discrete, MultiDiscrete
    return spaces.Box, spaces.Discrete, spaces.MultiDiscrete
