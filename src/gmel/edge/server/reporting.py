"""What a server says to its gateway: a heartbeat every second, or, where nobody can reach it, everything."""

import asyncio
import base64
import contextlib
import logging
import secrets
import time
from collections.abc import Coroutine, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import httpx

from gmel.edge.fleet import AHEAD, Beat
from gmel.edge.server.app import BEAT_S, follow
from gmel.edge.server.runner import Run, Runner
from gmel.edge.task import read_task
from gmel.scenario.errors import InputError

__all__ = ["Reporting"]

_POLL_S = 20.0
_RETRY_S = 1.0
_log = logging.getLogger("gmel.server")


@dataclass
class Reporting:
    """The line to a gateway.

    Attributes:
        name: of this server.
        gateway: address of the gateway.
        runner: the queue.
        url: where the gateway reaches this server; none: it fetches its tasks.
        speed: work units per second, 0 where it is not known.
        key: what the gateway is shown.
        verify: false, or a file of certificates.
        mark: tells this process from the one before it, whose tasks are gone.
    """

    name: str
    gateway: str
    runner: Runner
    url: str | None
    speed: float = 0.0
    key: str | None = None
    verify: bool | str = True
    mark: str = field(default_factory=lambda: secrets.token_hex(8))
    _now: asyncio.Event = field(default_factory=asyncio.Event)
    _asked: "list[asyncio.Event]" = field(default_factory=list[asyncio.Event])
    _telling: "set[asyncio.Task[None]]" = field(default_factory=set["asyncio.Task[None]"])

    async def keep(self) -> None:
        """Goes on until it is cancelled; a gateway that is away is asked again."""
        headers = {} if self.key is None else {"Authorization": f"Bearer {self.key}"}
        timeout = httpx.Timeout(5.0, read=_POLL_S + 10.0)
        async with (
            httpx.AsyncClient(
                base_url=self.gateway, headers=headers, timeout=timeout, verify=self.verify, trust_env=False
            ) as client,
            asyncio.TaskGroup() as group,
        ):
            group.create_task(self._beat(client))
            if self.url is None:
                group.create_task(self._fetch(client, group))

    def beat(self) -> Beat:
        """What it says of itself."""
        runner = self.runner
        return Beat(
            url=self.url,
            speed=self.speed,
            gpus=runner.gpus,
            memory_gb=runner.memory_gb,
            resident=runner.resident,
            models=runner.source.names(),
            foreign_s=runner.backlog_s(direct=True),
            draining=runner.draining,
            running=len(runner.runs),
            together=runner.together,
        )

    async def _beat(self, client: httpx.AsyncClient) -> None:
        said = ""
        while True:
            began = time.monotonic()
            asked, self._asked = self._asked, []
            self._now.clear()
            trouble = ""
            try:
                answer = await client.put(f"/v1/servers/{self.name}", json=asdict(self.beat()), timeout=BEAT_S * 2)
                if answer.status_code != 200:
                    trouble = f"gateway {self.gateway}: {answer.status_code} {answer.text[:200]}"
            except Exception as error:  # without heartbeats a server that is well would be taken for dead
                trouble = f"gateway {self.gateway}: {type(error).__name__} {error}".strip()
            if trouble != said:
                _log.warning("%s", trouble or f"gateway {self.gateway}: reached")
                said = trouble
            for each in asked:
                each.set()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(max(BEAT_S - (time.monotonic() - began), 0.05)):
                    await self._now.wait()

    async def say(self) -> None:
        """Says a heartbeat at once. Returns when the gateway has it, or could not be told within two of them."""
        said = asyncio.Event()
        self._asked.append(said)
        self._now.set()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(2 * BEAT_S):
                await said.wait()

    async def delivered(self) -> None:
        """Returns when the end of everything that was fetched is at the gateway, or was tried for long enough."""
        while self._telling:
            await asyncio.wait(list(self._telling))

    def _tell(self, group: asyncio.TaskGroup, telling: Coroutine[Any, Any, None]) -> None:
        task = group.create_task(telling)
        self._telling.add(task)
        task.add_done_callback(self._telling.discard)

    async def _fetch(self, client: httpx.AsyncClient, group: asyncio.TaskGroup) -> None:
        while True:
            wanted = self.runner.gpus + max(AHEAD, self.runner.together)
            room = 0 if self.runner.draining else max(wanted - len(self.runner.runs), 0)
            try:
                answer = await client.post(
                    f"/v1/servers/{self.name}/fetch",
                    json={"room": room, "wait_s": _POLL_S if room else 1.0, "mark": self.mark},
                )
                answer.raise_for_status()
                given = answer.json()
                for gone in given["cancelled"]:
                    self.runner.cancel(str(gone))
                for each in given["tasks"]:
                    task = read_task(each["task"])
                    try:
                        run = await self.runner.take(task, int(each["attempt"]), str(each.get("traceparent", "")))
                    except InputError as error:
                        gone = {"event": "gone", "error": str(error)}
                        self._tell(group, self._end(client, task.id, gone, None))
                        continue
                    self._tell(group, self._follow(client, run))
            except Exception as error:  # a gateway may say anything; this server goes on asking
                if not isinstance(error, httpx.HTTPError):
                    _log.warning("gateway %s: %s %s", self.gateway, type(error).__name__, error)
                await asyncio.sleep(_RETRY_S)

    async def _follow(self, client: httpx.AsyncClient, run: Run) -> None:
        async with contextlib.aclosing(follow(run)) as story:
            async for line in story:
                if line["event"] in ("done", "failed", "gone"):
                    await self._end(client, run.task.id, line, run)
                    return
                try:
                    await client.post(f"/v1/servers/{self.name}/tasks/{run.task.id}", json=line)
                except httpx.HTTPError:
                    continue  # the next line comes within a second

    async def _end(self, client: httpx.AsyncClient, task_id: str, line: Mapping[str, object], run: Run | None) -> None:
        data = b"" if run is None or run.product is None else run.product.data
        body = {**line, "data": base64.b64encode(data).decode()}
        for _ in range(30):
            try:
                answer = await client.put(f"/v1/servers/{self.name}/tasks/{task_id}", json=body)
                if answer.status_code < 500:
                    return
            except httpx.HTTPError:
                pass
            await asyncio.sleep(_RETRY_S)
