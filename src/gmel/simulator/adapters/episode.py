"""What every adapter needs: a plant from its name, a reward by its name, and the seeds of its episodes."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Array, Float, Int, UInt32

from gmel.physics.random import seed_words
from gmel.scenario.errors import InputError
from gmel.scenario.load import load_scenario, with_load
from gmel.scenario.schema import Scenario
from gmel.simulator.build import build_environments
from gmel.simulator.environment import Environment
from gmel.simulator.scale import Scale, scale_of
from gmel.simulator.state import Outcome, Reward, State

__all__ = [
    "Credit",
    "EpisodeSeeds",
    "RewardFunction",
    "Site",
    "check_lost",
    "check_render_mode",
    "check_requests",
    "check_reward",
    "open_site",
]

RewardFunction = Callable[[State, Int[Array, "requests"], Outcome, Reward], Float[Array, "requests"]]
"""A reward of your own: the state before the step, the options of the requests, what became of them, the reward of the
scenario; gives one number a request. Must be a pure function that JAX can compile."""

Credit = Literal["own", "team", "mixed"]


class Site(NamedTuple):
    """A plant ready for an adapter."""

    scenario: Scenario
    environment: Environment
    scale: Scale
    slots: int
    """Slots of an episode."""


def open_site(
    scenario: str | Scenario,
    load: float | None = None,
    trace: str | None = None,
    held_out: bool = False,
    slots: int | None = None,
) -> Site:
    """The plant of a preset, a file or a scenario.

    Args:
        scenario: name of a preset, path of a scenario file, or a scenario.
        load: offered load in place of the scenario's own.
        trace: requests to replay in place of the scenario's arrivals (a shipped name or a file).
        held_out: of a trace, the part that is kept for evaluation; drawn traffic differs by seed alone.
        slots: length of an episode in place of the scenario's `episode.slots`.

    Raises:
        InputError: an unknown scenario or trace, or values out of their range.
    """
    if isinstance(scenario, str):
        scenario = load_scenario(scenario, load)
    elif load is not None:
        scenario = with_load(scenario, load)
    if slots is not None and slots < 1:
        raise InputError(f"slots = {slots}: an episode has at least one slot")
    built = build_environments(scenario, trace)
    environment = built.test if held_out else built.train
    return Site(scenario, environment, scale_of(scenario), slots or scenario.episode.slots)


def check_reward(reward: str | RewardFunction) -> Credit | RewardFunction:
    """The reward as it is. Raises InputError where it is neither a known name nor a function."""
    # One by one: pyright narrows no set.
    if callable(reward) or reward == "own" or reward == "team" or reward == "mixed":  # noqa: PLR1714
        return reward
    raise InputError(
        f"reward = {reward!r}: give 'own', 'team', 'mixed' or a function of (state, action, outcome, reward)"
    )


def check_requests(requests_per_device: int) -> None:
    """Raises InputError unless agents decide on at least one request."""
    if requests_per_device < 1:
        raise InputError(f"requests_per_device = {requests_per_device}: must be at least 1")


def check_render_mode(render_mode: str | None, modes: list[str]) -> None:
    """Raises InputError for a mode that is not offered."""
    if render_mode is not None and render_mode not in modes:
        raise InputError(f"render_mode = {render_mode!r}: must be None or one of {', '.join(modes)}")


def check_lost(lost: int, environment: Environment) -> None:
    """Raises InputError where uploads in flight did not fit their table: from there on results would be wrong."""
    if lost:
        raise InputError(
            f"{lost} uploads in flight did not fit their table of {environment.plant.switches.uploads} rows; "
            "raise max_uploads in the scenario"
        )


class EpisodeSeeds:
    """Seeds of the episodes of one instance; no state is shared between instances.

    `start(seed)` begins with that very seed, so an adapter meets the same traffic as `Environment.reset` with it. Every
    `start()` after it is another episode; the whole sequence follows from the last seed given.
    """

    def __init__(self, environment: Environment) -> None:
        trace = environment.trace
        self._trace_slots = 1 if trace is None else int(trace.present.shape[0])
        self._generator: np.random.Generator | None = None

    def start(
        self, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[UInt32[np.ndarray, "2"], Int[np.ndarray, ""]]:
        """Words of the seed, and where a trace starts (`options["trace_slot"]`, else somewhere).

        Raises:
            ValueError: a seed below 0 or of more than 64 bits.
        """
        if seed is not None:
            words = seed_words(seed)
            self._generator = np.random.default_rng(seed)
        else:
            if self._generator is None:
                self._generator = np.random.default_rng()
            words = self._generator.integers(0, 2**32, 2, dtype=np.uint32)
        place = int(self._generator.integers(self._trace_slots))
        if options and "trace_slot" in options:
            place = int(options["trace_slot"])
        return words, np.asarray(place, np.int32)
