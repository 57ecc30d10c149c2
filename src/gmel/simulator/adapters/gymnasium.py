"""One central scheduler as an environment of Gymnasium, alone or many at once.

Importing this module registers `gmel/Central-v0`; `gymnasium.make("gmel.simulator.adapters.gymnasium:gmel/Central-v0")`
does both.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, UInt32

from gmel.scenario.errors import InputError
from gmel.scenario.schema import Scenario
from gmel.simulator.adapters.central import (
    Central,
    Decide,
    Seen,
    central_columns,
    central_reset,
    central_step,
    central_width,
)
from gmel.simulator.adapters.episode import (
    EpisodeSeeds,
    RewardFunction,
    check_lost,
    check_render_mode,
    open_site,
)
from gmel.simulator.adapters.flat import BOUND
from gmel.simulator.adapters.picture import SlotPicture, draw, write
from gmel.simulator.environment import Environment
from gmel.simulator.scale import Scale

try:
    import gymnasium
    from gymnasium import spaces
    from gymnasium.vector import AutoresetMode, VectorEnv
    from gymnasium.vector.utils import batch_space
except ImportError as error:
    raise ImportError('gmel.simulator.adapters.gymnasium needs the extra "rl": pip install "gmel[rl]"') from error

__all__ = ["GmelCentralEnv", "GmelVectorEnv"]

ID = "gmel/Central-v0"


# The environment is an argument, so instances of the same plant share one compiled program.
@partial(jax.jit, static_argnames=("scale", "decide"))
def _reset(
    environment: Environment,
    seeds: UInt32[Array, "n 2"],
    places: Int[Array, "n"],
    scale: Scale,
    slots: Int[Array, ""] | int,
    decide: Decide,
) -> Seen:
    return jax.vmap(lambda seed, place: central_reset(environment, seed, place, scale, slots, decide))(seeds, places)


@partial(jax.jit, static_argnames=("scale", "decide", "reward"))
def _step(
    environment: Environment,
    central: Central,
    action: Int[Array, "n ..."],
    scale: Scale,
    slots: Int[Array, ""] | int,
    decide: Decide,
    reward: RewardFunction | None,
) -> Seen:
    return jax.vmap(lambda one, chosen: central_step(environment, one, chosen, scale, slots, decide, reward))(
        central, action
    )


@jax.jit
def _merge(which: Bool[Array, "n"], fresh: Seen, seen: Seen) -> Seen:
    """Environment by environment: the one that starts anew, or the one that goes on."""

    def pick(new: jax.Array, old: jax.Array) -> jax.Array:
        return jnp.where(which.reshape(-1, *[1] * (new.ndim - 1)), new, old)

    return jax.tree.map(pick, fresh, seen)


class _Scheduler:
    """The compiled programs of a plant for a number of environments, and their spaces."""

    def __init__(
        self,
        scenario: str | Scenario,
        load: float | None,
        trace: str | None,
        held_out: bool,
        slots: int | None,
        decide: str,
        reward: str | RewardFunction | None,
    ) -> None:
        # One by one: pyright narrows no set.
        if decide != "slot" and decide != "request":  # noqa: PLR1714
            raise InputError(f"decide = {decide!r}: must be 'slot' or 'request'")
        if isinstance(reward, str):
            raise InputError(
                f"reward = {reward!r}: give None (the team's) or a function of (state, action, outcome, reward)"
            )
        self.site = open_site(scenario, load, trace, held_out, slots)
        self.decide: Decide = decide
        self._reward: RewardFunction | None = reward
        environment = self.site.environment
        options = environment.options
        self.observation_space = spaces.Box(-BOUND, BOUND, (central_width(environment, decide),), np.float32)
        self.action_space: spaces.Space[Any] = (
            spaces.MultiDiscrete([options] * environment.requests) if decide == "slot" else spaces.Discrete(options)
        )

    def reset(self, seeds: np.ndarray, places: np.ndarray) -> Seen:
        """First decisions of episodes [n]."""
        return _reset(
            self.site.environment, seeds, places, scale=self.site.scale, slots=self.site.slots, decide=self.decide
        )

    def step(self, central: Central, action: np.ndarray) -> Seen:
        """Next decisions.

        Raises:
            ValueError: an action out of range.
            InputError: more uploads in flight than the scenario has room for.
        """
        options = self.site.environment.options
        shape = (len(action), *self.action_space.shape) if self.action_space.shape else (len(action),)
        if action.shape != shape or action.dtype.kind not in "iu" or (action < 0).any() or (action >= options).any():
            raise ValueError(f"action = {action!r}: each environment needs one of {self.action_space}")
        seen = _step(
            self.site.environment,
            central,
            action.astype(np.int32),
            scale=self.site.scale,
            slots=self.site.slots,
            decide=self.decide,
            reward=self._reward,
        )
        check_lost(int(np.asarray(seen.central.state.lost).sum()), self.site.environment)
        return seen

    def picture(self, seen: Seen, index: int) -> SlotPicture:
        """The decision that stands, of one environment."""
        one = jax.tree.map(lambda leaf: np.asarray(leaf)[index], seen)
        central: Any = one.central
        places = 1 + self.site.environment.servers
        sent = np.bincount(central.option[central.decided] % places, minlength=places)
        return SlotPicture(
            int(central.state.slot), central.state.broadcasts.wait_s[0], sent.astype(np.int32), float(one.reward)
        )


def _infos(seen: Seen) -> dict[str, np.ndarray]:
    """Infos of all environments, leading axis [n]."""
    tally = seen.tally
    return {
        "action_mask": np.array(seen.mask, np.int8),
        "slot": np.array(seen.central.state.slot),
        "tasks": np.array(tally.tasks),
        "in_time": np.array(tally.in_time),
        "total_latency_s": np.array(tally.latency_s, float),
        "total_energy_j": np.array(tally.energy_j, float),
        "replaced": np.array(tally.replaced),
    }


class GmelCentralEnv(gymnasium.Env[np.ndarray, Any]):
    """A scheduler that sees everything and decides for all devices. Spaces and infos: docs/adapters.md.

    Args:
        scenario: name of a preset, path of a scenario file, or a scenario.
        load: offered load in place of the scenario's own.
        trace: requests to replay in place of the scenario's arrivals.
        held_out: of a trace, the part kept for evaluation.
        slots: length of an episode in place of the scenario's.
        decide: `request`: one request a step, `Discrete`; `slot`: all requests of a slot at once, `MultiDiscrete`.
        reward: None for the team's reward, or a function of (state, action, outcome, reward) that is summed.
        render_mode: `ansi` or `rgb_array`.

    Raises:
        InputError: an unknown scenario or trace, or a value out of its range.
    """

    metadata = {  # noqa: RUF012 -- as Gymnasium declares it
        "render_modes": ["ansi", "rgb_array"],
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
        decide: str = "request",
        reward: str | RewardFunction | None = None,
        render_mode: str | None = None,
    ) -> None:
        check_render_mode(render_mode, self.metadata["render_modes"])
        self._scheduler = _Scheduler(scenario, load, trace, held_out, slots, decide, reward)
        self._seeds = EpisodeSeeds(self._scheduler.site.environment)
        self._seen: Seen | None = None
        self.site = self._scheduler.site
        self.render_mode = render_mode
        self.observation_space = self._scheduler.observation_space
        self.action_space = self._scheduler.action_space

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the entries of an observation, in order."""
        return central_columns(self.site.environment, self._scheduler.decide)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Starts an episode: with a seed that very one, without it the next.

        Args:
            seed: in [0, 2**64).
            options: `trace_slot`, where the trace starts; other keys are ignored.
        """
        super().reset(seed=seed)
        words, place = self._seeds.start(seed, options)
        self._seen = self._scheduler.reset(words[None], place[None])
        return self._observation(self._seen), self._info(self._seen)

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """One decision.

        Raises:
            RuntimeError: before the first reset.
            ValueError: an action out of range.
            InputError: more uploads in flight than the scenario has room for.
        """
        if self._seen is None:
            raise RuntimeError("step() before reset(): call reset() first")
        self._seen = seen = self._scheduler.step(self._seen.central, np.asarray(action)[None])
        return self._observation(seen), float(seen.reward[0]), False, bool(seen.truncated[0]), self._info(seen)

    def action_masks(self) -> np.ndarray:
        """What may be chosen, bool: [options], or [requests x options] one behind the other (as MaskablePPO asks).

        Raises:
            RuntimeError: before the first reset.
        """
        if self._seen is None:
            raise RuntimeError("action_masks() before reset(): call reset() first")
        return np.array(self._seen.mask[0]).reshape(-1)

    def render(self) -> Any:
        """The backlogs now and what has been decided in this slot, as `render_mode` says."""
        if self.render_mode is None or self._seen is None:
            return None
        shown = self._scheduler.picture(self._seen, 0)
        return (draw if self.render_mode == "rgb_array" else write)(shown, self.site.scenario)

    def _observation(self, seen: Seen) -> np.ndarray:
        return np.array(seen.observation[0])

    def _info(self, seen: Seen) -> dict[str, Any]:
        return {name: value[0] if value.ndim > 1 else value[0].item() for name, value in _infos(seen).items()}


class GmelVectorEnv(VectorEnv[np.ndarray, np.ndarray, np.ndarray]):
    """Many central schedulers in one compiled program; each is what `GmelCentralEnv` would be with its seed.

    Args:
        num_envs: how many.
        autoreset_mode: when an environment whose episode is over starts anew: with the `NEXT_STEP` (Gymnasium's
            default; that step's action is ignored), with the `SAME_STEP` (the last observation is then in
            `infos["final_obs"]`), or `DISABLED` (by `reset(options={"reset_mask": ...})`).
        scenario, load, trace, held_out, slots, decide, reward: as of `GmelCentralEnv`.

    Raises:
        InputError: an unknown scenario or trace, or a value out of its range.
    """

    def __init__(
        self,
        num_envs: int = 1,
        scenario: str | Scenario = "hall-20x5",
        *,
        load: float | None = None,
        trace: str | None = None,
        held_out: bool = False,
        slots: int | None = None,
        decide: str = "request",
        reward: str | RewardFunction | None = None,
        render_mode: str | None = None,
        autoreset_mode: AutoresetMode | str = AutoresetMode.NEXT_STEP,
    ) -> None:
        if num_envs < 1:
            raise InputError(f"num_envs = {num_envs}: must be at least 1")
        check_render_mode(render_mode, GmelCentralEnv.metadata["render_modes"])
        self.autoreset_mode = AutoresetMode(autoreset_mode)
        self.metadata = {**GmelCentralEnv.metadata, "autoreset_mode": self.autoreset_mode}
        self.num_envs, self.render_mode = num_envs, render_mode
        self._scheduler = _Scheduler(scenario, load, trace, held_out, slots, decide, reward)
        self.site = self._scheduler.site
        self._seeds = [EpisodeSeeds(self.site.environment) for _ in range(num_envs)]
        self._seen: Seen | None = None
        self._over = np.zeros(num_envs, bool)
        self.single_observation_space = self._scheduler.observation_space
        self.single_action_space = self._scheduler.action_space
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Starts an episode in every environment, or where `options["reset_mask"]` is true.

        Args:
            seed: of the first environment, the others follow (seed + 1, ...); or one for each.
            options: `reset_mask`, bool [num_envs]; `trace_slot`, where the trace starts.
        """
        super().reset(seed=seed if isinstance(seed, int) else None)
        each = [None if seed is None else seed + i for i in range(self.num_envs)] if _single(seed) else list(seed)  # type: ignore[operator, arg-type]
        if len(each) != self.num_envs:
            raise ValueError(f"seed: {len(each)} seeds for {self.num_envs} environments")
        which = np.ones(self.num_envs, bool)
        if options and "reset_mask" in options:
            which = np.asarray(options["reset_mask"])
            if which.shape != (self.num_envs,) or which.dtype != bool or not which.any():
                raise ValueError(f"options['reset_mask'] = {which!r}: must be bool, one a environment, not all false")
        self._seen = self._start(which, each, options)
        self._over = self._over & ~which
        return np.array(self._seen.observation), _with_masks(_infos(self._seen), which)

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """One decision in every environment.

        Raises:
            RuntimeError: before the first reset, or without the reset that `DISABLED` asks for.
            ValueError: an action out of range.
            InputError: more uploads in flight than the scenario has room for.
        """
        if self._seen is None:
            raise RuntimeError("step() before reset(): call reset() first")
        if self.autoreset_mode is AutoresetMode.DISABLED and self._over.any():
            raise RuntimeError(f"environments {np.flatnonzero(self._over).tolist()} are over: reset them first")
        everywhere = np.ones(self.num_envs, bool)
        seen = self._scheduler.step(self._seen.central, np.asarray(actions))
        if self.autoreset_mode is AutoresetMode.NEXT_STEP and self._over.any():
            self._seen = seen
            seen = self._start(self._over, [None] * self.num_envs, None)
        over, reward = np.array(seen.truncated), np.array(seen.reward, float)
        infos: dict[str, Any] = {}
        if self.autoreset_mode is AutoresetMode.SAME_STEP and over.any():
            last = np.full(self.num_envs, None, dtype=object)
            for index in np.flatnonzero(over):
                last[index] = np.array(seen.observation[index])
            infos = {
                "final_obs": last,
                "_final_obs": over.copy(),
                "final_info": _with_masks(_infos(seen), over),
                "_final_info": over.copy(),
            }
            self._seen = seen
            seen = self._start(over, [None] * self.num_envs, None)
        self._seen, self._over = seen, over if self.autoreset_mode is not AutoresetMode.SAME_STEP else self._over
        infos |= _with_masks(_infos(seen), everywhere)
        return np.array(seen.observation), reward, np.zeros(self.num_envs, bool), over, infos

    def action_masks(self) -> np.ndarray:
        """What may be chosen, bool [num_envs, ...], each as of `GmelCentralEnv`.

        Raises:
            RuntimeError: before the first reset.
        """
        if self._seen is None:
            raise RuntimeError("action_masks() before reset(): call reset() first")
        return np.array(self._seen.mask).reshape(self.num_envs, -1)

    def render(self) -> tuple[Any, ...] | None:
        """One picture an environment, as `render_mode` says."""
        if self.render_mode is None or self._seen is None:
            return None
        show = draw if self.render_mode == "rgb_array" else write
        return tuple(show(self._scheduler.picture(self._seen, i), self.site.scenario) for i in range(self.num_envs))

    def _start(self, which: np.ndarray, seed: list[int | None], options: dict[str, Any] | None) -> Seen:
        """New episodes in some environments; the others stand as they are."""
        words, places = np.zeros((self.num_envs, 2), np.uint32), np.zeros(self.num_envs, np.int32)
        for index in np.flatnonzero(which):
            words[index], places[index] = self._seeds[index].start(seed[index], options)
        fresh = self._scheduler.reset(words, places)
        return fresh if self._seen is None or which.all() else _merge(which, fresh, self._seen)


def _single(seed: object) -> bool:
    return seed is None or isinstance(seed, int | np.integer)


def _with_masks(infos: dict[str, np.ndarray], which: np.ndarray) -> dict[str, Any]:
    """Infos in the form of vector environments: with every key `_key`, where it holds."""
    return infos | {f"_{name}": which.copy() for name in infos}


gymnasium.register(ID, entry_point=f"{__name__}:GmelCentralEnv", vector_entry_point=f"{__name__}:GmelVectorEnv")
