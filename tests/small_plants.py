"""Small plants for tests, written as the TOML text that a user would write."""

import jax
import numpy as np
import pytest

import compiled
from gmel.evaluation.ladder import RULES
from gmel.evaluation.tuning import UNTUNED
from gmel.scenario.load import parse_scenario
from gmel.scenario.schema import Scenario
from gmel.simulator.environment import Environment, seeds
from gmel.simulator.state import State

# The rules that search compile for half a minute.
EVERY_RULE = [
    pytest.param(name, marks=pytest.mark.slow) if name in ("optimum", "nash") else name for name in sorted(RULES)
]

RADIO = """
model = "uniform-snr"
snr_db = [5.0, 25.0]
rate = "shannon"
fading = "block"
floor = "clip"
sharing = "none"
download = false
"""

WIRED = 'model = "wired"\naccess = "home"\nsharing = "none"\ndownload = false'
"""Every device in the cell of a server, sending in no time."""

CATALOGUE = """
[[models]]
name = "small"
popularity = 2.0
step_work = 0.02
fixed_work = 0.1
steps = { values = [20.0, 40.0], weights = [1.0, 2.0] }
images = { values = [1.0, 2.0], weights = [3.0, 1.0] }
memory_gb = 4.0
bits_in = { low = 1e6, high = 4e6 }
bits_out_per_image = 2e6
load = { warm_median_s = 0.5, cold_median_s = 2.0, sigma = 0.3 }
[[models]]
name = "large"
popularity = 1.0
step_work = 0.03
steps = { values = [30.0], weights = [1.0] }
images = { values = [1.0], weights = [1.0] }
memory_gb = 10.0
bits_in = { low = 1e6, high = 8e6 }
bits_out_per_image = 4e6
load = { warm_median_s = 1.0, cold_median_s = 4.0, sigma = 0.3 }
[[models]]
name = "medium"
popularity = 3.0
step_work = 0.025
steps = { values = [30.0], weights = [1.0] }
images = { values = [1.0], weights = [1.0] }
memory_gb = 6.0
bits_in = { low = 1e6, high = 1e6 }
load = { warm_median_s = 0.4, cold_median_s = 1.0, sigma = 0.0 }
"""

UNIFORM = """
work = { low = 0.5, high = 2.0 }
bits_in = { low = 1e6, high = 8e6 }
"""


def plant_text(
    *,
    slot_s: float = 1.0,
    age: int = 1,
    latency_from: str = "generated",
    devices: int = 6,
    device_speed: float = 0.5,
    device_memory_gb: float = 0.0,
    speeds: tuple[float, ...] = (2.0, 3.0, 1.0),
    gpus: tuple[int, ...] = (),
    memory_gb: tuple[float, ...] = (),
    bandwidth_hz: float = 1e6,
    radio: str = RADIO,
    catalogue: bool = False,
    switching: bool = False,
    tasks: str = "",
    deadline_s: tuple[float, float] = (6.0, 6.0),
    deadline: str = "late",
    arrivals: str = "load = 0.7",
    max_per_slot: int | None = 8,
    max_uploads: int | None = 24,
    reward: str = "",
) -> str:
    """TOML text of a plant with a few devices and servers."""
    gpus = gpus or (1,) * len(speeds)
    memory_gb = memory_gb or (24.0,) * len(speeds)
    servers = "\n".join(
        f'[[servers]]\nname = "S{number}"\nspeed = {speed}\ngpus = {count}\nmemory_gb = {room}'
        for number, (speed, count, room) in enumerate(zip(speeds, gpus, memory_gb, strict=True))
    )
    return f"""
name = "small"
switching = {str(switching).lower()}
{"" if max_uploads is None else f"max_uploads = {max_uploads}"}
[slot]
length_s = {slot_s}
broadcast_age_slots = {age}
latency_from = "{latency_from}"
[devices]
count = {devices}
speed = {device_speed}
memory_gb = {device_memory_gb}
{servers}
[radio]
bandwidth_hz = {bandwidth_hz}
{radio}
{CATALOGUE if catalogue else ""}
[tasks]
kind = "{"catalogue" if catalogue else "uniform"}"
{"" if catalogue else UNIFORM}
deadline_s = {{ low = {deadline_s[0]}, high = {deadline_s[1]} }}
deadline = "{deadline}"
{tasks}
[arrivals]
{arrivals}
{"" if max_per_slot is None else f"max_per_slot = {max_per_slot}"}
[reward]
{reward}
"""


def small_plant(**choices: object) -> Scenario:
    """The scenario of :func:`plant_text`."""
    return parse_scenario(plant_text(**choices), "small plant")  # type: ignore[arg-type]


def opened(scenario: Scenario, seed: int = 1) -> tuple[Environment, State]:
    """An environment and its first state."""
    environment = Environment.from_scenario(scenario)
    return environment, compiled.reset(environment, seeds(seed, 1)[0])


def rule_keeps_to_the_mask(name: str, environment: Environment, state: State) -> None:
    """A rule of the ladder chooses what every request may choose."""
    policy = RULES[name][1](UNTUNED)
    seen = compiled.observe(environment, state)
    if hasattr(policy, "assign"):
        action = policy.assign(environment, state, jax.random.key(0))
    else:
        action = policy.choose(seen, jax.random.key(0))
    allowed = np.take_along_axis(np.asarray(seen.mask), np.asarray(action)[:, None], axis=1)[:, 0]
    assert allowed[np.asarray(seen.present)].all()
