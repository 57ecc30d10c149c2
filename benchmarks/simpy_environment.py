"""The environment of `hall-20x5` in SimPy: what a simulation by events costs, beside the compiled one.

Written as a SimPy user would: a process for the slots, one for each device and server that takes tasks from its store
one after another, one for each upload. Events lie on one absolute clock, and whoever finishes a task notes its latency.
The model and the traffic are those of the NumPy environment (`benchmarks/numpy_environment.py` says what is covered);
`tests/test_benchmarks.py` replays the same requests and actions through both.

The servers announce their backlogs at every slot start. Nobody reads them, as no observation is made, but here they
belong to the events of a slot.
"""

from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import simpy

from benchmarks.numpy_environment import Finished, Floats, Integers, Model, SlotRequests
from gmel.scenario.schema import Scenario

__all__ = ["SimpyEnvironment"]

Process = Generator[simpy.Event, Any, None]


@dataclass(slots=True)
class _Task:
    """A request that was decided. `at_s` is when, on the clock of the simulation."""

    slot: int
    row: int
    at_s: float
    service_s: float


class _Queue:
    """A device or a server: what comes into its store is served first in, first out."""

    def __init__(self, environment: "SimpyEnvironment") -> None:
        self._environment = environment
        self._engine = environment.engine
        self._store = simpy.Store(environment.engine)
        self._free_at_s = 0.0
        environment.engine.process(self._serve())

    def put(self, task: _Task) -> None:
        """A task joins the queue."""
        self._free_at_s = max(self._free_at_s, self._engine.now) + task.service_s
        self._store.put(task)

    def backlog_s(self) -> float:
        """Time until the queue is empty if nobody comes."""
        return max(self._free_at_s - self._engine.now, 0.0)

    def _serve(self) -> Process:
        while True:
            task = yield self._store.get()
            yield self._engine.timeout(task.service_s)
            self._environment.finish(task)


class SimpyEnvironment:
    """One environment. `cost` is minus the sum of the rewards of the tasks in `finished`."""

    def __init__(self, scenario: Scenario, seed: int, snr: Floats | None = None) -> None:
        """`snr`: mean SNR of each link, devices x servers; drawn where it is not given."""
        self._model = model = Model.of(scenario)
        self._random = np.random.default_rng(seed)
        self._snr = model.draw_snr(self._random) if snr is None else snr
        self.engine = simpy.Environment()
        self._devices = [_Queue(self) for _ in range(model.devices)]
        self._servers = [_Queue(self) for _ in range(len(model.server_speed))]
        self._speed: list[float] = model.server_speed.tolist()
        self.announced_s: list[float] = []
        self.finished: list[Finished] = []
        self.cost = 0.0

    def run(self, slots: Iterable[tuple[SlotRequests, Integers]]) -> None:
        """Simulates what is decided in `slots`, until the last task is done."""
        self.engine.process(self._decide(slots))
        self.engine.run()

    def random_slots(self, count: int) -> Iterator[tuple[SlotRequests, Integers]]:
        """Random requests of `count` slots, with an option of each: 0 the device itself, j server j - 1."""
        for _ in range(count):
            requests = self._model.draw(self._random)
            yield requests, self._random.integers(0, len(self._servers) + 1, len(requests.device))

    def finish(self, task: _Task) -> None:
        """The latency of a task and what it costs."""
        model = self._model
        latency_s = self.engine.now - task.at_s
        self.finished.append(Finished(task.slot, task.row, latency_s))
        self.cost += model.latency_weight * min(latency_s / model.latency_scale_s, model.clip)

    def _decide(self, slots: Iterable[tuple[SlotRequests, Integers]]) -> Process:
        """At every slot start the servers announce their backlogs, and the requests go where they were told to."""
        model, engine = self._model, self.engine
        for slot, (requests, action) in enumerate(slots):
            self.announced_s = [server.backlog_s() for server in self._servers]
            snr = np.maximum(self._snr[requests.device] * requests.fade, model.floor)
            upload_s = requests.size_bit[:, None] / (model.bandwidth_hz * np.log2(1 + snr))
            rows = zip(requests.device.tolist(), requests.work.tolist(), action.tolist(), strict=True)
            for row, (device, work, option) in enumerate(rows):
                if option:
                    task = _Task(slot, row, engine.now, work / self._speed[option - 1])
                    engine.process(self._upload(task, option - 1, float(upload_s[row, option - 1])))
                else:
                    self._devices[device].put(_Task(slot, row, engine.now, work / model.device_speed))
            yield engine.timeout(model.slot_s)

    def _upload(self, task: _Task, server: int, upload_s: float) -> Process:
        yield self.engine.timeout(upload_s)
        self._servers[server].put(task)
