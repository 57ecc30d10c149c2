"""The devices as agents of PettingZoo's parallel API."""

import warnings
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt32

from gmel.scenario.schema import Scenario
from gmel.simulator.adapters.devices import DeviceView, device_slot, device_view, in_time
from gmel.simulator.adapters.episode import (
    Credit,
    EpisodeSeeds,
    RewardFunction,
    check_lost,
    check_render_mode,
    check_requests,
    check_reward,
    open_site,
)
from gmel.simulator.adapters.flat import BOUND, flat_rows, flat_width
from gmel.simulator.adapters.picture import SlotPicture, draw, write
from gmel.simulator.environment import Environment
from gmel.simulator.scale import Scale
from gmel.simulator.state import State

try:
    from gymnasium import spaces
    from pettingzoo import ParallelEnv
    from pettingzoo.utils.conversions import parallel_to_aec
except ImportError as error:
    raise ImportError('gmel.simulator.adapters.pettingzoo needs the extra "rl": pip install "gmel[rl]"') from error

__all__ = ["GmelParallelEnv", "env", "parallel_env"]

Observations = dict[str, dict[str, Any]]


class _Seen(NamedTuple):
    """What one compiled call gives."""

    state: State
    view: DeviceView
    reward: Float[Array, "devices"]
    team: Float[Array, ""]
    sent: Int[Array, "places"]
    beyond: Int[Array, "devices"]
    replaced: Int[Array, "devices"]
    final: Bool[Array, "rows"]
    device: Int[Array, "rows"]
    latency_s: Float[Array, "rows"]
    in_time: Bool[Array, "rows"]


# The environment is an argument, so instances of the same plant share one compiled program.
@partial(jax.jit, static_argnames=("scale", "k"))
def _reset(
    environment: Environment, seed: UInt32[Array, "2"], place: Int[Array, ""], scale: Scale, k: int
) -> tuple[State, DeviceView]:
    state = environment.reset(seed, place)
    return state, device_view(environment, state, scale, k)


@partial(jax.jit, static_argnames=("scale", "reward"))
def _step(
    environment: Environment,
    state: State,
    action: Int[Array, "devices k"],
    scale: Scale,
    reward: Credit | RewardFunction,
) -> _Seen:
    slot = device_slot(environment, state, action, reward)
    places = 1 + environment.servers
    to = slot.option[:, None] % places == jnp.arange(places)
    return _Seen(
        slot.state,
        device_view(environment, slot.state, scale, action.shape[1]),
        slot.reward,
        slot.team,
        jnp.sum(to & state.requests.present[:, None], axis=0, dtype=jnp.int32),
        slot.beyond,
        slot.replaced,
        slot.outcome.final,
        slot.outcome.device,
        slot.outcome.account.latency_s,
        in_time(slot.outcome),
    )


@partial(jax.jit, static_argnames=("scale",))
def _global(environment: Environment, state: State, scale: Scale) -> Float[Array, "numbers"]:
    return flat_rows(environment.observe(state, fresh=True), scale).reshape(-1)


class GmelParallelEnv(ParallelEnv[str, dict[str, Any], Any]):
    """A plant whose devices are agents that act at the same time. Spaces, rules and infos: docs/adapters.md.

    Args:
        scenario: name of a preset, path of a scenario file, or a scenario.
        load: offered load in place of the scenario's own.
        trace: requests to replay in place of the scenario's arrivals.
        held_out: of a trace, the part kept for evaluation.
        slots: length of an episode in place of the scenario's.
        requests_per_device: requests that an agent decides in a slot. With 1 the action is `Discrete`, else
            `MultiDiscrete`. What comes beyond it follows the last of them and is counted in `infos`.
        reward: `own`, `team`, `mixed`, or a function of (state, action, outcome, reward).
        render_mode: `human` (text to the terminal after every slot), `ansi` or `rgb_array`.

    Raises:
        InputError: an unknown scenario or trace, or a value out of its range.
    """

    metadata = {  # noqa: RUF012 -- as PettingZoo declares it
        "name": "gmel_v0",
        "render_modes": ["human", "ansi", "rgb_array"],
        "is_parallelizable": True,
        "render_fps": 4,
    }

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
        render_mode: str | None = None,
    ) -> None:
        check_requests(requests_per_device)
        check_render_mode(render_mode, self.metadata["render_modes"])
        self.site = open_site(scenario, load, trace, held_out, slots)
        self.render_mode = render_mode
        self._k = requests_per_device
        self._reward = check_reward(reward)
        self._seeds = EpisodeSeeds(self.site.environment)
        self._state: State | None = None
        self._last: _Seen | None = None
        self._warned = False
        environment = self.site.environment
        self.possible_agents = [f"device_{number}" for number in range(environment.plant.switches.devices)]
        self.agents: list[str] = []
        options, k = environment.options, requests_per_device
        width = k * flat_width(environment)

        # A space for each agent, not one for all: each has a random generator of its own.
        def mask() -> spaces.Space[Any]:
            return spaces.Box(0, 1, (options,), np.int8)

        self.observation_spaces = {
            agent: spaces.Dict(
                {
                    "observation": spaces.Box(-BOUND, BOUND, (width,), np.float32),
                    "action_mask": mask() if k == 1 else spaces.Tuple([mask() for _ in range(k)]),
                }
            )
            for agent in self.possible_agents
        }
        self.action_spaces = {
            agent: spaces.Discrete(options) if k == 1 else spaces.MultiDiscrete([options] * k)
            for agent in self.possible_agents
        }
        self.state_space = spaces.Box(
            -BOUND,
            BOUND,
            (environment.requests * flat_width(environment),),
            np.float32,
        )

    def observation_space(self, agent: str) -> spaces.Space[Any]:
        """`observation`: flat float32 vector; `action_mask`: int8, one entry an option (a tuple of them with k > 1)."""
        return self.observation_spaces[agent]

    def action_space(self, agent: str) -> spaces.Space[Any]:
        """0 = on the device itself, j = on server j."""
        return self.action_spaces[agent]

    def reset(
        self, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observations, dict[str, dict[str, Any]]]:
        """Starts an episode: with a seed that very one, without it the next.

        Args:
            seed: in [0, 2**64).
            options: `trace_slot`, where the trace starts; other keys are ignored.
        """
        words, place = self._seeds.start(seed, options)
        self._state, view = _reset(self.site.environment, words, place, self.site.scale, self._k)
        self._last = None
        self.agents = list(self.possible_agents)
        return self._observations(view), {agent: {} for agent in self.agents}

    def step(
        self, actions: dict[str, Any]
    ) -> tuple[Observations, dict[str, float], dict[str, bool], dict[str, bool], dict[str, dict[str, Any]]]:
        """One slot.

        Raises:
            ValueError: an agent without an action, or an action out of range.
            InputError: more uploads in flight than the scenario has room for.
        """
        if not self.agents:
            return {}, {}, {}, {}, {}
        seen = _step(
            self.site.environment, self._state, self._table(actions), scale=self.site.scale, reward=self._reward
        )
        self._state, self._last = seen.state, seen
        check_lost(int(seen.state.lost), self.site.environment)
        self._warn(seen)
        agents = self.agents
        over = int(seen.state.slot) >= self.site.slots
        rewards = dict(zip(agents, np.asarray(seen.reward, float).tolist(), strict=True))
        result = (
            self._observations(seen.view),
            rewards,
            dict.fromkeys(agents, False),
            dict.fromkeys(agents, over),
            self._infos(seen),
        )
        if over:
            self.agents = []
        if self.render_mode == "human":
            self.render()
        return result

    def render(self) -> np.ndarray | str | None:
        """The backlogs now and where the requests of the last slot went, as `render_mode` says."""
        if self.render_mode is None or self._state is None:
            return None
        if self.render_mode == "rgb_array":
            return draw(self._picture(), self.site.scenario)
        text = write(self._picture(), self.site.scenario)
        if self.render_mode == "ansi":
            return text
        print(text)
        return None

    def state(self) -> np.ndarray:
        """All requests with the servers as they are, uploads in flight included: for centralised critics.

        Raises:
            RuntimeError: before the first reset.
        """
        if self._state is None:
            raise RuntimeError("state() before reset(): call reset() first")
        return np.array(_global(self.site.environment, self._state, self.site.scale))

    def close(self) -> None:
        """Nothing to release."""

    def _table(self, actions: dict[str, Any]) -> np.ndarray:
        """The actions as a table [devices, k]."""
        try:
            table = np.array([actions[agent] for agent in self.agents])
        except KeyError as error:
            raise ValueError(
                f"actions: none for {error}; every agent acts in every slot (0 where it has no request)"
            ) from None
        table = table.reshape(len(self.agents), -1)
        options = self.site.environment.options
        if table.shape[1] != self._k or table.dtype.kind not in "iu" or (table < 0).any() or (table >= options).any():
            bad = next(
                (agent for agent in self.agents if not self.action_spaces[agent].contains(np.asarray(actions[agent]))),
                self.agents[0],
            )
            raise ValueError(f"actions[{bad!r}] = {actions[bad]!r}: must be in {self.action_spaces[bad]}")
        return table.astype(np.int32)

    def _observations(self, view: DeviceView) -> Observations:
        flat, mask = np.array(view.observation), np.array(view.mask, np.int8)
        if self._k == 1:
            return {
                agent: {"observation": flat[row], "action_mask": mask[row, 0]} for row, agent in enumerate(self.agents)
            }
        return {
            agent: {"observation": flat[row], "action_mask": tuple(mask[row])} for row, agent in enumerate(self.agents)
        }

    def _infos(self, seen: _Seen) -> dict[str, dict[str, Any]]:
        beyond, replaced = np.asarray(seen.beyond).tolist(), np.asarray(seen.replaced).tolist()
        latency: list[list[float]] = [[] for _ in self.agents]
        timely: list[list[bool]] = [[] for _ in self.agents]
        rows = np.flatnonzero(np.asarray(seen.final))
        columns = (np.asarray(column)[rows].tolist() for column in (seen.device, seen.latency_s, seen.in_time))
        for device, taken_s, on_time in zip(*columns, strict=True):
            latency[device].append(taken_s)
            timely[device].append(on_time)
        return {
            agent: {
                "latency_s": latency[row],
                "in_time": timely[row],
                "beyond": beyond[row],
                "replaced": replaced[row],
            }
            for row, agent in enumerate(self.agents)
        }

    def _warn(self, seen: _Seen) -> None:
        """Says once that agents had more requests than they decide on."""
        if not self._warned and (beyond := int(np.asarray(seen.beyond).sum())):
            self._warned = True
            warnings.warn(
                f"{beyond} requests of slot {int(seen.state.slot) - 1} came beyond requests_per_device = {self._k}; "
                "they go where the last one of their device goes. infos count them in 'beyond'; "
                "raise requests_per_device to decide on each",
                stacklevel=3,
            )

    def _picture(self) -> SlotPicture:
        assert self._state is not None  # render checks it
        places = 1 + self.site.environment.servers
        sent = np.zeros(places, np.int32) if self._last is None else np.asarray(self._last.sent)
        team = 0.0 if self._last is None else float(self._last.team)
        return SlotPicture(int(self._state.slot), np.asarray(self._state.broadcasts.wait_s[0]), sent, team)


def parallel_env(scenario: str | Scenario = "hall-20x5", **choices: Any) -> GmelParallelEnv:
    """The parallel environment; arguments as of `GmelParallelEnv`."""
    return GmelParallelEnv(scenario, **choices)


def env(scenario: str | Scenario = "hall-20x5", **choices: Any) -> Any:
    """The same as an agent-environment cycle (PettingZoo's AEC API): agents act one after the other, the slot happens
    after the last."""
    return parallel_to_aec(parallel_env(scenario, **choices))
