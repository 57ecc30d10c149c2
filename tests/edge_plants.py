"""Small plants and tasks for tests of the live room, and a loop that ends."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from gmel.edge.engines.engine import Answer, Told
from gmel.edge.fleet import Beat, Fleet, ServerState
from gmel.edge.plant import Model, Plant, Server
from gmel.edge.task import Task, read_task

__all__ = ["FakeEngine", "beat", "damage", "fleet", "plant", "ran", "task", "until"]

Value = TypeVar("Value")


def ran(what: Awaitable[Value], most_s: float = 60.0) -> Value:
    """Runs to the end; a wait without one fails the test."""

    async def bounded() -> Value:
        async with asyncio.timeout(most_s):
            return await what

    return asyncio.run(bounded())


async def until(holds: Callable[[], Any], what: str, most_s: float = 20.0) -> None:
    """Waits until something is so."""
    loop = asyncio.get_running_loop()
    end = loop.time() + most_s
    while not holds():
        assert loop.time() < end, f"not after {most_s:g} s: {what}"
        await asyncio.sleep(0.005)


def plant(**speeds: float) -> Plant:
    """Servers by name with their speeds, one model `part` of one work unit an image, without loading."""
    model = Model("part", 0.1, 0.0, 1.0, 0.0, 0.0, 0.0, 1, 0.0)
    other = replace(model, name="other", load_s=2.0)
    servers = {name: Server(name, speed, 1, 1.0, None) for name, speed in speeds.items()}
    return Plant("small", "s", 0.5, 1, 0.1, (10.0, 10.0), None, servers, {"part": model, "other": other})


def beat(speed: float = 1.0, **more: Any) -> Beat:
    """What a server says; its address leads nowhere."""
    return Beat(**{"url": "http://127.0.0.1:9", "speed": speed, **more})


def fleet(now: float = 0.0, **speeds: float) -> Fleet:
    """Servers that are all alive."""
    found = Fleet(plant(**speeds))
    for name, speed in speeds.items():
        found.hear(name, beat(speed), now)
    return found


def task(task_id: str = "a", **more: Any) -> Task:
    return read_task({"id": task_id, "device": "d", "model": "part", **more})


class FakeEngine:
    """Servers that do what a test says: `behave[name]` is awaited for each task; without, a task is done at once."""

    servers: tuple[str, ...] = ()
    """That it would have to ask for their heartbeats."""

    def __init__(self) -> None:
        self.behave: dict[str, Callable[[Task, Told], Awaitable[Answer]]] = {}
        self.submitted: list[tuple[str, str]] = []
        self.cancelled: list[tuple[str, str]] = []

    async def submit(self, server: ServerState, task: Task, attempt: int, told: Told) -> Answer:
        self.submitted.append((server.name, task.id))
        behave = self.behave.get(server.name)
        if behave is not None:
            return await behave(task, told)
        return Answer(task.id.encode(), kind="text/plain", service_s=0.001)

    async def cancel(self, server: ServerState, task_id: str) -> None:
        self.cancelled.append((server.name, task_id))

    async def heartbeat(self, server: ServerState) -> Beat | None:
        del server

    async def close(self) -> None:
        return


def damage(path: Path, share: float, pages: int = 1, page: int = 4096) -> None:
    """Writes over pages in the middle of a file."""
    size = path.stat().st_size // page
    with path.open("r+b") as file:
        file.seek(max(int(share * size), 1) * page)
        file.write(b"\xa5" * page * pages)
