"""What a picture shows: one window of an episode, who stands where, and every task in it with its times.

The model is exact in continuous time, so a picture at any instant follows from the records alone: what uploads, waits
and runs. Positions follow from the seed.
"""

import math
from dataclasses import dataclass
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from gmel.evaluation.episodes import DRAIN_SLOTS, AnyPolicy, Episodes
from gmel.evaluation.simulate import Simulation
from gmel.policies.policy import decide, initial_memory
from gmel.scenario.errors import InputError
from gmel.scenario.schema import Scenario
from gmel.simulator.environment import Environment, seeds
from gmel.simulator.motion import positions_m
from gmel.simulator.records import Records, task_records
from gmel.simulator.state import Outcome

__all__ = [
    "MAX_DEVICES",
    "MAX_TASKS",
    "WINDOW_SLOTS",
    "Scene",
    "Server",
    "Task",
    "film",
    "lanes",
    "schematic_m",
    "side_by_side",
]

WINDOW_SLOTS = 60
"""Slots that a picture shows, from the end of the warm-up on."""
MAX_TASKS = 5_000
"""Most tasks in a picture: more cannot be told apart, and the page would be slow."""
MAX_DEVICES = 500
MAX_SERVERS = 32

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Server:
    """A server in the picture."""

    name: str
    x_m: float
    y_m: float
    gpus: int
    speed: float
    lanes: int
    """Rows of its tasks: one a GPU; where tasks share it as many as run at once, at least that."""

    @property
    def lane_height(self) -> float:
        """Height of a row in heights of a GPU: that of its share, but no less than can be seen."""
        return min(1.0, max(self.gpus / self.lanes, 1.0 / 3.0))

    @property
    def height(self) -> float:
        """Height of all its rows."""
        return self.lanes * self.lane_height


@dataclass(frozen=True)
class Task:
    """A task in the picture; times in seconds since the start of the episode.

    `server` is -1 on the device itself, `lane` the GPU that runs it (0, 1, ...), or its row beside those that it shares
    the server with. A dropped task has no lane and its
    `start_s` is when it would have begun. `rate_bps` is its size over the time it was sent; 0 on the device.
    """

    device: int
    server: int
    lane: int
    model: str
    generated_s: float
    decided_s: float
    upload_start_s: float
    upload_end_s: float
    start_s: float
    switch_s: float
    end_s: float
    finish_s: float
    deadline_s: float
    status: str
    size_bit: float
    rate_bps: float

    @property
    def dropped(self) -> bool:
        """Discarded before it began."""
        return self.status == "dropped"


@dataclass(frozen=True)
class Scene:
    """A window of an episode. `schematic`: the plant has no geometry, places say nothing about distance. `shared`:
    tasks at a server run side by side, not one a GPU."""

    title: str
    subtitle: str
    start_s: float
    end_s: float
    slot_s: float
    hall_m: tuple[float, float]
    schematic: bool
    shared: bool
    devices_m: Floats
    servers: list[Server]
    tasks: list[Task]

    def of_server(self, server: int) -> list[Task]:
        """Tasks of a server that were not dropped, in order of start."""
        return sorted((t for t in self.tasks if t.server == server and not t.dropped), key=lambda t: t.start_s)


def film(simulation: Simulation, slots: int = WINDOW_SLOTS) -> Scene:
    """The window of the first episode of a simulation, decided exactly as it was measured.

    Raises:
        InputError: more devices, servers or tasks than a picture can show, or tasks at several servers.
    """
    scenario, traffic = simulation.scenario, simulation.episodes
    if scenario.tasks.most_parts > 1:
        raise InputError(
            "--render: a picture shows a task at one server, tasks.split_options lets them be split; leave it out"
        )
    if scenario.service.discipline == "gang":
        raise InputError("--render: a picture shows a task on one GPU, gangs take several; leave it out")
    environment, policy = simulation.environments.test, simulation.chosen.policy
    if scenario.devices.count > MAX_DEVICES or len(scenario.servers) > MAX_SERVERS:
        raise InputError(
            f"--render: {scenario.devices.count} devices and {len(scenario.servers)} servers, at most {MAX_DEVICES} "
            f"and {MAX_SERVERS} can be told apart in a picture; render a smaller plant"
        )
    slots = min(slots, traffic.slots - traffic.warmup_slots)
    outcome, size_bit, seed = _one_episode(
        environment, policy, traffic, simulation.key, traffic.warmup_slots + slots + DRAIN_SLOTS
    )
    slot_s = scenario.slot.length_s
    start_s = traffic.warmup_slots * slot_s
    end_s = start_s + slots * slot_s
    records, sizes = task_records(outcome, slot_s), _sizes(outcome, size_bit)
    finish_s = records.generated_s + records.latency_s
    shown = (records.decided_s < end_s) & (finish_s >= start_s)
    if shown.sum() > MAX_TASKS:
        raise InputError(f"--render: {shown.sum():,} tasks in {slots} slots, at most {MAX_TASKS:,} can be shown")
    devices_m, servers_m, hall_m = _places(scenario, environment, seed)
    tasks = _tasks(scenario, records.where(shown), sizes[shown], _all_lanes(scenario, records)[shown])
    servers = [
        Server(
            server.name,
            float(x),
            float(y),
            server.gpus,
            server.speed,
            max([server.gpus, *(task.lane + 1 for task in tasks if task.server == number)]),
        )
        for number, (server, (x, y)) in enumerate(zip(scenario.servers, servers_m, strict=True))
    ]
    count = traffic.slots - traffic.warmup_slots
    part = "" if slots == count else f"; {slots} of the {count} slots after the warm-up"
    return Scene(
        title=f"{scenario.name}: {simulation.chosen.label}",
        subtitle=f"load {simulation.load:.2f}, slots of {slot_s:g} s, seed {traffic.first_seed}{part}",
        start_s=start_s,
        end_s=end_s,
        slot_s=slot_s,
        hall_m=hall_m,
        schematic=scenario.radio.model == "uniform-snr",
        shared=_shared(scenario),
        devices_m=devices_m,
        servers=servers,
        tasks=tasks,
    )


def schematic_m(devices: int, servers: int) -> tuple[Floats, Floats, tuple[float, float]]:
    """Places for a plant without geometry: servers in a row on the middle line, devices in two rows above and below.

    Returns:
        devices [devices, 2], servers [servers, 2], and the size of the drawing; the unit has no meaning.
    """
    length, width = 120.0, 60.0
    row = -(-devices // 2)
    # Many devices would touch in one row: several rows on each side then.
    layers = max(1, -(-row // 40))
    per_layer = -(-row // layers)
    places = np.zeros((devices, 2))
    for device in range(devices):
        side, rank = device % 2, device // 2
        layer, column = rank // per_layer, rank % per_layer
        depth = 5.0 + 3.0 * layer
        places[device] = ((column + 0.5) * length / per_layer, depth if side else width - depth)
    centre = np.stack([(np.arange(servers) + 0.5) * length / servers, np.full(servers, width / 2)], axis=1)
    return places, centre, (length, width)


def lanes(start_s: Floats, end_s: Floats, gpus: int) -> NDArray[np.int64]:
    """Which GPU runs each task: first in, first out on the GPU that is free earliest, as the simulator serves them."""
    free_s = np.full(gpus, -math.inf)
    lane = np.zeros(len(start_s), np.int64)
    for task in np.argsort(start_s, kind="stable"):
        lane[task] = int(np.argmin(free_s))
        free_s[lane[task]] = end_s[task]
    return lane


def side_by_side(start_s: Floats, end_s: Floats) -> NDArray[np.int64]:
    """A row for each task in which nothing else runs meanwhile: the lowest that is free."""
    free_s: list[float] = []
    lane = np.zeros(len(start_s), np.int64)
    for task in np.argsort(start_s, kind="stable"):
        free = [row for row, until_s in enumerate(free_s) if until_s <= start_s[task]]
        if not free:
            free_s.append(-math.inf)
        lane[task] = free[0] if free else len(free_s) - 1
        free_s[lane[task]] = float(end_s[task])
    return lane


def _shared(scenario: Scenario) -> bool:
    """Whether a server works on more tasks at once than it has GPUs."""
    return scenario.service.discipline in ("sharing", "batching", "capacity")


def _all_lanes(scenario: Scenario, records: Records) -> NDArray[np.int64]:
    """Lanes from the whole episode, so that a task keeps its GPU wherever the window begins."""
    lane = np.zeros(len(records), np.int64)
    for number, server in enumerate(scenario.servers):
        mine = np.flatnonzero((records.option == number + 1) & ~records.dropped)
        start_s, end_s = records.start_s[mine], records.end_s[mine]
        lane[mine] = side_by_side(start_s, end_s) if _shared(scenario) else lanes(start_s, end_s, server.gpus)
    return lane


def _tasks(scenario: Scenario, records: Records, size_bit: Floats, lane: NDArray[np.int64]) -> list[Task]:
    catalogue = scenario.tasks.kind == "catalogue"
    status, finish_s = records.status, records.generated_s + records.latency_s
    tasks: list[Task] = []
    for row in range(len(records)):
        sent_s = float(records.upload_end_s[row] - records.upload_start_s[row])
        offloaded = records.option[row] > 0
        tasks.append(
            Task(
                device=int(records.device[row]),
                server=int(records.option[row]) - 1,
                lane=int(lane[row]),
                model=scenario.models[int(records.model[row])].name if catalogue else "",
                generated_s=float(records.generated_s[row]),
                decided_s=float(records.decided_s[row]),
                upload_start_s=float(records.upload_start_s[row]),
                upload_end_s=float(records.upload_end_s[row]),
                start_s=float(records.start_s[row]),
                switch_s=float(records.switch_s[row]),
                end_s=float(records.end_s[row]),
                finish_s=float(finish_s[row]),
                deadline_s=float(records.deadline_s[row]),
                status=str(status[row]),
                size_bit=float(size_bit[row]),
                rate_bps=float(size_bit[row]) / sent_s if offloaded and sent_s > 0 else 0.0,
            )
        )
    return tasks


def _one_episode(
    environment: Environment, policy: AnyPolicy, traffic: Episodes, key: jax.Array, slots: int
) -> tuple[Outcome, Any, jax.Array]:
    """Outcomes and sizes of the requests of the first episode, and the seed its places follow from."""
    # The keys of `run_episodes`, so that the picture shows what was measured.
    longest = traffic.slots + DRAIN_SLOTS
    memory_key, slot_key = jax.random.split(jax.random.split(key, traffic.count)[0])
    keys = jax.random.split(slot_key, longest)[: min(slots, longest)]

    @eqx.filter_jit
    def run(environment: Environment, policy: AnyPolicy, seed: jax.Array, start: jax.Array) -> Any:
        state = environment.reset(seed, start)

        def slot(carry: tuple[Any, Any], slot_key: jax.Array) -> tuple[tuple[Any, Any], tuple[Outcome, jax.Array]]:
            state, memory = carry
            action, memory = decide(policy, environment, state, memory, slot_key)
            size_bit = state.requests.size_bit
            state, _, outcome = environment.step(state, action)
            return (state, memory), (outcome, size_bit)

        _, recorded = jax.lax.scan(slot, (state, initial_memory(policy, memory_key)), keys)
        return (*recorded, state.seed)

    start = jnp.asarray(traffic.starts()[0])
    return jax.device_get(run(environment, policy, seeds(traffic.first_seed, 1)[0], start))


def _sizes(outcome: Outcome, size_bit: Any) -> Floats:
    """Upload size of each record, in the order of `task_records`."""
    final = np.asarray(outcome.final)
    slot, row = np.asarray(outcome.decided_slot)[final], np.asarray(outcome.row)[final]
    order = np.lexsort((row, slot))
    return np.asarray(size_bit)[slot[order], row[order]].astype(np.float64)


def _places(
    scenario: Scenario, environment: Environment, seed: jax.Array
) -> tuple[Floats, Floats, tuple[float, float]]:
    if scenario.radio.model == "uniform-snr":
        return schematic_m(scenario.devices.count, len(scenario.servers))
    devices_m = np.asarray(positions_m(environment.plant, jnp.asarray(seed)), np.float64)
    return devices_m, np.asarray(environment.plant.server_position_m, np.float64), scenario.radio.hall_m
