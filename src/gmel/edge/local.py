"""The device's own processor: option 0 of a device that decides itself, where the scenario lets devices run tasks.

One task after the other, in a queue of its own. Without generators a task takes the time that the speed of the devices
gives it; loading takes none, as in the simulator (docs/model.md).
"""

import asyncio
import math
import time
from typing import Any

from gmel.edge.engines.engine import Answer
from gmel.edge.fleet import Beat, Flight, ServerState
from gmel.edge.plant import Plant, Server
from gmel.edge.server.runner import Run, Runner
from gmel.edge.server.work import Sleeping, Source
from gmel.edge.task import Task
from gmel.scenario.errors import InputError

__all__ = ["LOCAL", "LocalWork"]

LOCAL = "local"
"""Stands in records and outcomes where the name of a server would: the device itself."""
_LEAST_SPEED = 1e-6
_MOST = 1_000_000
"""Tasks that may wait here: nobody else is asked to take them."""


class LocalWork:
    """See the module. Made anywhere; used inside one running loop.

    Args:
        plant: what models cost, how fast devices are, what fits into their memory.
        source: generators; none: tasks only take their time.

    Raises:
        InputError: the scenario does not let devices run tasks, or says they have no speed.
    """

    def __init__(self, plant: Plant, source: Source | None = None) -> None:
        if not plant.local:
            raise InputError(f"scenario {plant.name!r}: devices.local = false; devices of this plant run no tasks")
        if plant.device_speed < _LEAST_SPEED:
            raise InputError(
                f"scenario {plant.name!r}: devices.speed is {plant.device_speed:g}; such a device ends no task"
            )
        self._plant = plant
        room_gb = plant.device_memory_gb or math.inf
        self._runner = Runner(source or Sleeping(plant, plant.device_speed, loads=False), 1, room_gb, _MOST)
        self._room_gb = room_gb
        described = Server(LOCAL, plant.device_speed, 1, room_gb, None)
        # The same account of what is under way and how long it takes as for a server, so that both are compared fairly.
        self._state = ServerState(LOCAL, described, Beat(None, plant.device_speed), time.monotonic())
        self._started = False

    def offers(self, model: str) -> bool:
        """Whether tasks of a model can run here: it is there, and fits."""
        names = self._runner.source.names()
        if names is not None and model not in names:
            return False
        described = self._plant.models.get(model)
        return described is None or described.memory_gb <= self._room_gb

    def backlog_s(self, now: float) -> float:
        """Seconds until the processor is free. `now` is of the monotonic clock."""
        return self._state.backlog_s(now)

    @property
    def pace(self) -> float:
        """Measured over expected seconds of service."""
        return self._state.pace

    async def run(self, task: Task) -> Answer:
        """Runs a task to its end, behind those that were given before."""
        if not self._started:
            self._runner.start()
            self._started = True
        flight = self._expected(task)
        self._state.send(flight, {})
        try:
            answer = await self._ended(await self._runner.take(task, 0), flight)
        except InputError as error:
            return Answer(None, str(error))
        finally:
            if self._state.flights.get(task.id) is flight:
                del self._state.flights[task.id]
        if answer.data is not None:
            self._state.succeed(flight, answer.service_s)
        return answer

    async def close(self) -> None:
        """Stops at once; tasks that have not ended do not end."""
        await self._runner.close()

    def _expected(self, task: Task) -> Flight:
        model = self._plant.models.get(task.model)
        work = float(task.images) if model is None else model.work(task.images, task.steps, task.size_bit)
        pace = self._state.pace
        return Flight(task, 0.0, 0.0, pace * work / self._plant.device_speed, pace)

    async def _ended(self, run: Run, flight: Flight) -> Answer:
        news: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        run.watchers.append(news)
        try:
            while not run.over:
                if (await news.get())["event"] == "running":
                    flight.began = time.monotonic()
        except asyncio.CancelledError:
            self._runner.cancel(run.task.id)  # nobody waits for it any more
            raise
        finally:
            run.watchers.remove(news)
        end = run.end()
        wait_s, switch_s, service_s = (float(end.get(name, 0.0)) for name in ("wait_s", "switch_s", "service_s"))
        if run.product is None:
            return Answer(None, str(end["error"]), "", wait_s, switch_s, service_s)
        return Answer(run.product.data, None, run.product.kind, wait_s, switch_s, service_s)
