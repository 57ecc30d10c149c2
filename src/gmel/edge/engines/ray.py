"""Edge servers as actors of a Ray cluster: one actor a server, pinned to its machine by a custom resource.

For those who run Ray already. The gateway keeps the ledger and the decision, and it is the gateway that tries again:
Ray would run a task of a dead actor on the same actor once more (`max_task_retries = 0`), and keeps nothing itself. A
machine offers `edge:NAME`, for instance `ray start --address ... --resources '{"edge:line-a": 1}'`.
"""

import asyncio
import contextlib
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from gmel.edge.engines.engine import Answer, LostError, RefusedError, SilentError, Told
from gmel.edge.fleet import Beat, ServerState
from gmel.edge.plant import Plant
from gmel.edge.server.inputs import GivenPhotos
from gmel.edge.server.runner import Run, Runner
from gmel.edge.server.work import Sleeping, Source, Synthesis
from gmel.edge.store import Store, StoreError
from gmel.edge.task import Task, read_task
from gmel.scenario.errors import InputError

__all__ = ["RayEngine"]

_SHARE = 0.001
"""Of the resource: it says where the actor runs, not how much it takes."""
_CALLS = 256


class EdgeActor:
    """What runs on the machine of a server."""

    def __init__(self, plant: dict[str, Any], name: str, models: str | None) -> None:
        described = Plant.from_json(plant)
        server = described.servers[name]
        self._photos = GivenPhotos()
        source: Source = (
            Sleeping(described, server.speed) if models is None else Synthesis(Path(models), photos=self._photos)
        )
        self._runner = Runner(source, server.gpus, server.memory_gb)
        self._speed, self._started = server.speed, False

    async def run(self, task: dict[str, Any], attempt: int, photo: bytes | None = None) -> dict[str, Any]:
        """Does a task, on a photo where it names one; the last line of its story, with the bytes of the result."""
        self._start()
        try:
            if photo is not None:
                await asyncio.to_thread(self._photos.give, str(task.get("input")), photo)
            run = await self._runner.take(read_task(task), attempt)
        except InputError as error:
            return {"event": "gone", "error": str(error)}
        await _ended(run)
        return run.end() | {"data": b"" if run.product is None else run.product.data}

    async def cancel(self, task_id: str) -> bool:
        """Cancels a task that has not ended."""
        return self._runner.cancel(task_id)

    async def beat(self) -> dict[str, Any]:
        """What it says of itself."""
        self._start()
        runner = self._runner
        return {
            "speed": self._speed,
            "gpus": runner.gpus,
            "memory_gb": runner.memory_gb,
            "resident": runner.resident,
            "models": runner.source.names(),
            "running": len(runner.runs),
        }

    def _start(self) -> None:
        if not self._started:
            self._runner.start()  # here, since the loop of the actor runs here
            self._started = True


async def _ended(run: Run) -> None:
    news: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
    run.watchers.append(news)
    try:
        while not run.over:
            await news.get()
    finally:
        run.watchers.remove(news)


class RayEngine:
    """See the module.

    Args:
        plant: servers; each gets an actor.
        models: folder of generators on every machine; none: actors take their time and make nothing.
        address: of the cluster; none: a new one on this machine, which offers every server.
        stall_s: silence after which an actor has stopped.
        inputs: where inputs of tasks lie, which are handed over with the task.

    Raises:
        InputError: Ray is not installed, or no cluster is there.
    """

    def __init__(
        self,
        plant: Plant,
        models: Path | None = None,
        address: str | None = None,
        stall_s: float = 5.0,
        inputs: Store | None = None,
    ) -> None:
        if find_spec("ray") is None:
            raise InputError(
                "the engine ray needs the extra 'ray': pip install 'gmel[ray]', or uv sync --extra edge --extra ray"
            )
        self._ray: Any = import_module("ray")
        self._stall_s, self._inputs = stall_s, inputs
        where: dict[str, Any] = {"address": address}
        if address is None:
            where = {"resources": {f"edge:{name}": 1.0 for name in plant.servers}, "include_dashboard": False}
        try:
            self._ray.init(logging_level="warning", log_to_driver=False, ignore_reinit_error=True, **where)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise InputError(f"ray cluster {address or 'on this machine'}: cannot be used ({error})") from error
        remote = self._ray.remote(EdgeActor)
        folder = None if models is None else str(models.resolve())
        self._actors = {
            name: remote.options(
                num_cpus=0,
                resources={f"edge:{name}": _SHARE},
                max_restarts=-1,
                max_task_retries=0,
                max_concurrency=_CALLS,
            ).remote(plant.as_json(), name, folder)
            for name in plant.servers
        }

    @property
    def servers(self) -> Sequence[str]:
        """Servers that are actors here."""
        return tuple(self._actors)

    async def submit(self, server: ServerState, task: Task, attempt: int, told: Told) -> Answer:
        """As :meth:`Engine.submit`. An actor that runs a task is asked for a sign of life meanwhile."""
        actor = self._actor(server)
        photo = await self._photo(server, task)
        told("queued", {})
        call = asyncio.ensure_future(_result(actor.run.remote(task.as_json(), attempt, photo)))
        try:
            while True:
                done, _ = await asyncio.wait([call], timeout=self._stall_s / 2)
                if done:
                    return _answer(server, call.result())
                async with asyncio.timeout(self._stall_s):
                    await _result(actor.beat.remote())
        except TimeoutError as error:
            raise SilentError(f"{server.name}: silent for {self._stall_s:g} s") from error
        except self._ray.exceptions.RayError as error:
            raise LostError(f"{server.name}: {type(error).__name__}") from error
        finally:
            call.cancel()

    async def cancel(self, server: ServerState, task_id: str) -> None:
        """As :meth:`Engine.cancel`."""
        self._actor(server).cancel.remote(task_id)

    async def heartbeat(self, server: ServerState) -> Beat | None:
        """As :meth:`Engine.heartbeat`."""
        try:
            async with asyncio.timeout(self._stall_s / 2):
                said = await _result(self._actor(server).beat.remote())
        except (TimeoutError, LostError, self._ray.exceptions.RayError):
            return None
        return Beat(url=f"ray:{server.name}", **said)

    async def close(self) -> None:
        """As :meth:`Engine.close`: the actors end with their gateway."""
        for actor in self._actors.values():
            with contextlib.suppress(self._ray.exceptions.RayError):
                self._ray.kill(actor)
        self._ray.shutdown()

    async def _photo(self, server: ServerState, task: Task) -> bytes | None:
        if not task.input or self._inputs is None:
            return None
        try:
            return await asyncio.to_thread(self._inputs.get, task.input)
        except StoreError as error:
            raise RefusedError(f"{server.name}: {error}") from error

    def _actor(self, server: ServerState) -> Any:
        actor = self._actors.get(server.name)
        if actor is None:
            raise LostError(f"{server.name}: is no actor here")
        return actor


async def _result(reference: Any) -> Any:
    return await reference


def _answer(server: ServerState, said: dict[str, Any]) -> Answer:
    if said["event"] == "gone":
        raise RefusedError(f"{server.name}: {said.get('error', 'cancelled')}")
    failed = said["event"] == "failed"
    return Answer(
        None if failed else bytes(said["data"]),
        str(said.get("error")) if failed else None,
        str(said.get("kind", "application/octet-stream")),
        float(said["wait_s"]),
        float(said["switch_s"]),
        float(said["service_s"]),
        int(said["together"]),
    )
