"""The rules of ADSAC in plain Python, one task after the other: what the preset is compared with.

Written from its public code (GitHub `miilue/An-Attention-Diffusion-Aided-DRL-Method`, folder `env`). It shares nothing
with the simulator.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

__all__ = [
    "RULES",
    "EdgeServer",
    "Played",
    "Task",
    "draw_servers",
    "draw_tasks",
    "play",
    "run_time",
]

SERVERS, SERVICES, TYPES = 10, 4, 4
HORIZON, RATE = 1_000_000, 0.0015
PENALTY = 2.0


class Task(NamedTuple):
    """A task: when it comes, its type, its denoising steps."""

    time: float
    kind: int
    steps: int


def run_time(steps: int) -> float:
    return (0.001 * steps**2 + 2.5 * steps - 14) * 60


@dataclass
class Service:
    """A service of a server: its worth by the type of the task, and by the steps."""

    base: list[float]
    ax: float
    ay: float
    bx: float
    by: float

    def worth(self, task: Task) -> float:
        if task.steps < self.ax:
            return self.base[task.kind]
        if task.steps <= self.bx:
            return self.base[task.kind] + (self.by - self.ay) / (self.bx - self.ax) * (task.steps - self.ax)
        return self.base[task.kind] + self.by - self.ay


@dataclass
class EdgeServer:
    """A server: the steps that it can hold, and the numbers of the tasks that it runs, whatever their service."""

    total: int
    services: list[Service]
    running: list[int] = field(default_factory=list)


def draw_servers() -> list[EdgeServer]:
    """The servers of the public code, which draws them with the seed 0 of NumPy's legacy generator."""
    draw = np.random.RandomState(0).choice
    worths = np.arange(0, 1, step=0.1)
    laws = (
        np.arange(0, 100, step=10),
        np.arange(0.0, 0.5, step=0.05),
        np.arange(150, 250, step=10),
        np.arange(0.5, 1.0, step=0.05),
    )
    servers: list[EdgeServer] = []
    for _ in range(SERVERS):
        services = [
            Service([float(draw(worths)) for _ in range(TYPES)], *(float(draw(law)) for law in laws))
            for _ in range(SERVICES)
        ]
        servers.append(EdgeServer(int(draw(np.arange(600, 1500, step=100))), services))
    return servers


def draw_tasks(rng: np.random.Generator) -> list[Task]:
    """The tasks of an episode: one at 0, and about 1,500 at whole times."""
    times = [0, *np.sort(rng.random(rng.poisson(RATE * HORIZON)) * HORIZON).astype(int)]
    steps = rng.choice(np.arange(100, 250, step=10), len(times))
    kinds = rng.integers(0, TYPES, len(times))
    return [Task(float(t), int(k), int(s)) for t, k, s in zip(times, kinds, steps, strict=True)]


class Played(NamedTuple):
    """What became of the tasks of an episode."""

    paid: float
    """Reward as the source counts it: quality when a task is accepted, whatever becomes of it."""
    kept: float
    """The same, but a task that is lost later has no quality."""
    lost: list[bool]
    quality: list[float]
    """What each task has, or would have, by its service."""
    crashes: int


Rule = Callable[[Sequence[EdgeServer], Sequence[int], Task, int, np.random.Generator], tuple[int, int]]


def play(servers: list[EdgeServer], tasks: list[Task], rule: Rule, rng: np.random.Generator) -> Played:
    """Each task in turn goes where `rule` says: to a service of a server, which crashes when it does not fit."""
    for server in servers:
        server.running.clear()
    lost, quality, penalties, crashes, paid = [False] * len(tasks), [0.0] * len(tasks), 0.0, 0, 0.0
    for number, task in enumerate(tasks):
        for server in servers:
            server.running = [n for n in server.running if task.time < tasks[n].time + run_time(tasks[n].steps)]
        free = [server.total - sum(tasks[n].steps for n in server.running) for server in servers]
        chosen, service = rule(servers, free, task, number, rng)
        server = servers[chosen]
        quality[number] = server.services[service].worth(task)
        if task.steps <= free[chosen]:
            server.running.append(number)
            paid += quality[number]
            continue
        crashes += 1
        lost[number] = True
        penalties += PENALTY
        for n in server.running:
            lost[n] = True
            penalties += PENALTY * (1 - (task.time - tasks[n].time) / run_time(tasks[n].steps))
        server.running.clear()
    kept = sum(worth for worth, gone in zip(quality, lost, strict=True) if not gone)
    return Played(paid - penalties, kept - penalties, lost, quality, crashes)


def _random(
    servers: Sequence[EdgeServer], free: Sequence[int], task: Task, number: int, rng: np.random.Generator
) -> tuple[int, int]:
    del servers, free, task, number
    return divmod(int(rng.integers(SERVERS * SERVICES)), SERVICES)


def _round_robin(
    servers: Sequence[EdgeServer], free: Sequence[int], task: Task, number: int, rng: np.random.Generator
) -> tuple[int, int]:
    """Service after service: four tasks in a row to each server."""
    del servers, free, task, rng
    return divmod(number % (SERVERS * SERVICES), SERVICES)


def _most_room(
    servers: Sequence[EdgeServer], free: Sequence[int], task: Task, number: int, rng: np.random.Generator
) -> tuple[int, int]:
    """Always the first service there."""
    del servers, task, number, rng
    return int(np.argmax(free)), 0


def _prophet(
    servers: Sequence[EdgeServer], free: Sequence[int], task: Task, number: int, rng: np.random.Generator
) -> tuple[int, int]:
    """The best quality among the servers with room; the first service of the first server if none has."""
    del number, rng
    best, where = 0.0, (0, 0)
    for j, server in enumerate(servers):
        for m, service in enumerate(server.services):
            if free[j] >= task.steps and service.worth(task) > best:
                best, where = service.worth(task), (j, m)
    return where


RULES: dict[str, Rule] = {
    "random": _random,
    "round robin": _round_robin,
    "most room": _most_room,
    "prophet": _prophet,
}
