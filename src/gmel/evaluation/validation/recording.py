"""Runs recorded for the exact checks: plants with random decisions, and every task of a run with what it asked for.

Five plants: `hall-20x5` (one GPU per server); a small one with much at once (several GPUs, model memory,
discarded tasks, noise, shared cells, outage, downloads); servers with a capacity that crash or reject; gangs. After the
traffic all run until they are empty.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from gmel.evaluation.validation.check import Run
from gmel.scenario.load import load_scenario, parse_scenario
from gmel.scenario.schema import Scenario
from gmel.simulator.environment import Environment, seeds
from gmel.simulator.records import Records, task_records
from gmel.simulator.state import Links, Outcome, Requests, State, option

__all__ = [
    "SLOTS",
    "TOLERANCE_S",
    "Path",
    "crashing",
    "gangs",
    "gangs_plant",
    "hall",
    "hosting_plant",
    "mixed",
    "mixed_plant",
    "rejecting",
    "run_path",
]

Floats = NDArray[np.float64]

TOLERANCE_S = 1e-9
SLOTS, DRAIN_SLOTS = 400, 400

MIXED = """
name = "mixed"
switching = true
max_uploads = 64
[slot]
length_s = 0.5
broadcast_age_slots = 2
[devices]
count = 6
speed = 0.5
[[servers]]
name = "A"
speed = 2.0
gpus = 2
memory_gb = 10.0
[[servers]]
name = "B"
speed = 3.0
memory_gb = 12.0
[[servers]]
name = "C"
speed = 1.0
gpus = 3
memory_gb = 24.0
[radio]
model = "inf"
bandwidth_hz = 2e6
rate = "nr-mcs"
fading = "block"
floor = "outage"
floor_snr_db = 15.0
sharing = "equal"
download = true
noise_figure_db = 35.0
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
load = { warm_median_s = 0.4, cold_median_s = 1.0, sigma = 0.3 }
[tasks]
kind = "catalogue"
deadline_s = { low = 2.0, high = 8.0 }
deadline = "drop"
noise_sigma = 0.2
[arrivals]
load = 0.8
max_per_slot = 16
[reward]
miss = 0.5
energy = 0.1
"""
HOSTING = """
name = "hosting"
max_uploads = 96
[slot]
length_s = 0.5
[devices]
count = 6
speed = 2.0
[[servers]]
name = "A"
speed = 2.0
capacity = 100
[[servers]]
name = "B"
speed = 3.0
capacity = 70
[[servers]]
name = "C"
speed = 1.0
capacity = 150
[service]
discipline = "capacity"
[radio]
model = "uniform-snr"
snr_db = [5.0, 25.0]
bandwidth_hz = 2e6
rate = "shannon"
fading = "none"
floor = "clip"
[[models]]
name = "short"
popularity = 2.0
step_work = 0.03
fixed_work = 0.1
steps = { values = [20.0, 35.0], weights = [1.0, 2.0] }
images = { values = [1.0, 2.0], weights = [3.0, 1.0] }
memory_gb = 4.0
bits_in = { low = 1e6, high = 4e6 }
bits_out_per_image = 2e6
[[models]]
name = "long"
popularity = 1.0
step_work = 0.04
steps = { values = [50.0, 80.0], weights = [4.0, 1.0] }
images = { values = [1.0], weights = [1.0] }
memory_gb = 4.0
bits_in = { low = 1e6, high = 6e6 }
bits_out_per_image = 4e6
[tasks]
kind = "catalogue"
deadline_s = { low = 2.0, high = 8.0 }
noise_sigma = 0.2
[arrivals]
load = 0.8
max_per_slot = 16
[reward]
miss = 0.5
energy = 0.1
"""

GANGS = """
name = "gangs"
max_uploads = 64
[slot]
length_s = 0.5
[devices]
count = 6
speed = 2.0
[[servers]]
name = "A"
speed = 2.0
gpus = 4
[[servers]]
name = "B"
speed = 3.0
gpus = 2
[[servers]]
name = "C"
speed = 1.0
gpus = 8
[service]
discipline = "gang"
[radio]
model = "uniform-snr"
snr_db = [5.0, 25.0]
bandwidth_hz = 2e6
rate = "shannon"
fading = "none"
floor = "clip"
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
gangs = [
    { gpus = 1, weight = 2.0, load_s = 0.8 },
    { gpus = 2, weight = 2.0, speedup = 1.6, load_s = 1.0 },
    { gpus = 4, speedup = 2.2, load_s = 1.2 },
]
[[models]]
name = "large"
popularity = 1.0
step_work = 0.05
steps = { values = [30.0], weights = [1.0] }
images = { values = [1.0], weights = [1.0] }
memory_gb = 10.0
bits_in = { low = 1e6, high = 8e6 }
bits_out_per_image = 4e6
gangs = [
    { gpus = 2, weight = 2.0, speedup = 1.8, load_s = 1.0 },
    { gpus = 4, weight = 2.0, speedup = 3.0, load_s = 1.5 },
    { gpus = 8, speedup = 4.5, load_s = 2.0 },
]
[tasks]
kind = "catalogue"
deadline_s = { low = 4.0, high = 12.0 }
deadline = "drop"
noise_sigma = 0.2
[arrivals]
load = 0.4
max_per_slot = 16
[reward]
miss = 0.5
energy = 0.1
"""


@dataclass(frozen=True)
class Path:
    """What a run showed. Arrays of slots hold the state before the step and the outcome after it.

    Of each task in `records`, `service_s`, `load_s`, `steps` and `gpus` are what its requests say, not what the outcome
    says.
    """

    scenario: Scenario
    links: Links
    requests: Requests
    actions: NDArray[np.int64]
    records: Records
    service_s: Floats
    load_s: Floats
    steps: Floats | None
    """Denoising steps: the units of capacity that a task takes; only with a capacity."""
    gpus: NDArray[np.int64]
    row: NDArray[np.int64]
    free_s: Floats
    """Time until each GPU is free [slots + 1, servers, gpus], as the state has it (absent: infinite)."""
    group: NDArray[np.int64] | None
    """Group of each GPU, likewise (-1: none); only with gangs."""
    wait_s: Floats
    """Time until a GPU is free [slots + 1, servers]."""
    in_flight: NDArray[np.int64]
    """Uploads in flight per server at each slot start [slots, servers], as the state has them."""
    seen_s: Floats
    """What observations said of the servers at each slot start [slots, servers]."""
    team_reward: Floats
    resident: NDArray[np.bool_]
    """Models resident at the start [servers, models]."""
    left: int
    lost: int

    @property
    def slot_s(self) -> float:
        """Length of a slot in seconds."""
        return self.scenario.slot.length_s

    def at_server(self) -> Iterator[tuple[int, NDArray[np.int64]]]:
        """Each server with its tasks in the order in which it must serve them: by the end of the upload.

        Ends that are equal but for rounding (alike uploads at a rate of the table, decided whole slots apart) may be
        served in either order; there the order of service is taken as it was.
        """
        records = self.records
        for server in range(len(self.scenario.servers)):
            own = np.nonzero(records.option == server + 1)[0]
            own = own[np.argsort(records.upload_end_s[own], kind="stable")]
            instant = np.cumsum(np.diff(records.upload_end_s[own], prepend=0.0) > TOLERANCE_S)
            yield server, own[np.lexsort((self.row[own], records.decided_slot[own], records.start_s[own], instant))]


def mixed_plant() -> Scenario:
    """Several GPUs, model memory, discarded tasks, noise, shared cells, outage and downloads at once."""
    return parse_scenario(MIXED, "mixed plant")


def hosting_plant(on_overload: str) -> Scenario:
    """Servers with a capacity that crash or reject, tasks of unlike size."""
    return parse_scenario(HOSTING.replace("[radio]", f'on_overload = "{on_overload}"\n[radio]'), "hosting plant")


def gangs_plant() -> Scenario:
    """Gangs of 1 to 8 GPUs on servers with 2 to 8, two models, discarded tasks."""
    return parse_scenario(GANGS, "gangs plant")


def run_path(scenario: Scenario, seed: int, slots: int = SLOTS, drain: int = DRAIN_SLOTS, double: bool = True) -> Path:
    """Random allowed decisions for `slots` slots, then slots without requests until the plant is empty.

    Raises:
        RuntimeError: it was not empty at the end.
    """
    with jax.enable_x64(double):
        environment = Environment.from_scenario(scenario)
        shape = (slots + drain, environment.requests)
        wanted = np.random.default_rng(seed).integers(0, environment.servers + 1, shape)
        played = _episode(environment, seeds(seed, 1)[0], jnp.asarray(wanted, jnp.int32), slots)
        start, last, seen = jax.device_get(played)
        requests, actions, outcome, servers, in_flight, seen_s, reward = seen
        records = task_records(outcome, scenario.slot.length_s)
        row = _rows(outcome)
        at = (records.decided_slot, row)
        speeds = np.array([scenario.devices.speed.mean, *(server.speed for server in scenario.servers)])
        service_s = np.asarray(requests.work, float)[at] * np.asarray(requests.noise, float)[at]
        service_s /= speeds[records.option]
    gpus, load_s = np.ones(len(records), np.int64), np.asarray(requests.load_s, float)[at]
    if requests.gang is not None:
        wanted = np.asarray(requests.gang)[at]
        ways = [scenario.models[m].gangs[g] for m, g in zip(records.model.tolist(), wanted.tolist(), strict=True)]
        gpus, load_s = np.array([way.gpus for way in ways]), np.array([way.load_s for way in ways])
        service_s /= np.where(records.option > 0, [way.speedup for way in ways], 1.0)
    free_s, group = (_with_last(*each) for each in zip(servers, _gpus(last), strict=True))
    if (
        np.any(free_s[-1][np.isfinite(free_s[-1])] > 0)
        or np.any(last.device_backlog_s > 0)
        or last.uploads.present.any()
    ):
        raise RuntimeError(f"{scenario.name}: not empty after {drain} slots without requests")
    return Path(
        scenario=scenario,
        links=start.links,
        requests=requests,
        actions=np.asarray(actions, np.int64),
        records=records,
        service_s=service_s,
        load_s=load_s,
        steps=np.asarray(requests.steps, float)[at] if scenario.service.discipline == "capacity" else None,
        gpus=gpus,
        row=row,
        free_s=free_s.astype(float),
        group=None if last.gangs is None else group.astype(np.int64),
        wait_s=free_s.min(axis=2).astype(float),
        in_flight=np.asarray(in_flight, np.int64),
        seen_s=np.asarray(seen_s, float),
        team_reward=np.asarray(reward, float),
        resident=np.asarray(start.servers.resident),
        left=int(last.uploads.present.sum()),
        lost=int(last.lost),
    )


def hall(run: Run, slots: int | None = None) -> Path:
    """The run of `hall-20x5` that these checks share, or one of so many slots."""
    length = _slots(run) if slots is None else slots
    return run.once(f"hall {length}", lambda: run_path(load_scenario("hall-20x5", 0.6), run.seed, length))


def mixed(run: Run) -> Path:
    """The run of the small plant."""
    return run.once("mixed", lambda: run_path(mixed_plant(), run.seed, _slots(run)))


def crashing(run: Run) -> Path:
    """The run of servers that crash when they are given more than they hold."""
    return run.once("crashing", lambda: run_path(hosting_plant("crash"), run.seed, _slots(run)))


def rejecting(run: Run) -> Path:
    """The run of servers that reject what they cannot hold."""
    return run.once("rejecting", lambda: run_path(hosting_plant("reject"), run.seed, _slots(run)))


def gangs(run: Run) -> Path:
    """The run of the plant with gangs."""
    return run.once("gangs", lambda: run_path(gangs_plant(), run.seed, _slots(run)))


def _slots(run: Run) -> int:
    return SLOTS * run.batches


def _rows(outcome: Outcome) -> NDArray[np.int64]:
    """Row of the request table of every record, in the order of `task_records`."""
    final = np.asarray(outcome.final)
    decided, row = np.asarray(outcome.decided_slot)[final], np.asarray(outcome.row)[final]
    return row[np.lexsort((row, decided))].astype(np.int64)


def _gpus(state: State) -> tuple[Any, Any]:
    """When each GPU is free, and its group (0 everywhere without gangs)."""
    free_s = state.servers.free_s
    return free_s, jnp.zeros_like(free_s, int) if state.gangs is None else state.gangs.group


def _with_last(slots: Any, last: Any) -> NDArray[Any]:
    return np.concatenate([np.asarray(slots), np.asarray(last)[None]])


@eqx.filter_jit
def _episode(environment: Environment, seed: Any, actions: Any, slots: int) -> Any:
    """State at the reset and at the end, and what every slot showed."""
    servers = jnp.arange(environment.servers)

    def slot(state: State, action: Any) -> tuple[State, Any]:
        present = state.requests.present & (state.slot < slots)
        state = state._replace(requests=state.requests._replace(present=present))
        observation = environment.observe(state)
        # A dead link would keep its upload for hours: what the mask forbids runs on the device.
        allowed = jnp.take_along_axis(observation.mask, action[:, None], axis=1)[:, 0]
        action = jnp.where(allowed, action, 0)
        seen = option(observation, "backlog_s")[0, 1:]
        at_server = state.uploads.present[:, None] & (state.uploads.server[:, None] == servers)
        after, reward, outcome = environment.step(state, action)
        return after, (state.requests, action, outcome, _gpus(state), jnp.sum(at_server, axis=0), seen, reward.team)

    start = environment.reset(seed)
    last, seen = jax.lax.scan(slot, start, actions)
    return start, last, seen
