"""Edge servers that fetch their tasks: only they open connections, so they may stand behind a firewall.

The gateway side: tasks wait here until the server asks for some (long poll), then until it brings the result. What the
server says in between is its sign of life.
"""

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from gmel.edge.engines.engine import Answer, Engine, LostError, RefusedError, SilentError, Told
from gmel.edge.fleet import Beat, ServerState
from gmel.edge.task import Task
from gmel.edge.traces import CONTEXT

__all__ = ["MOST_MARK", "EitherEngine", "PullEngine"]

MOST_MARK = 64


@dataclass
class _Errand:
    task: Task
    attempt: int
    told: Told
    answer: "asyncio.Future[Answer]"
    heard: float
    fetched: bool = False
    context: str = ""
    """The `traceparent` of this attempt."""
    mark: str = ""
    """Of the process that fetched it."""

    def as_json(self) -> dict[str, Any]:
        given: dict[str, Any] = {"task": self.task.as_json(), "attempt": self.attempt}
        return given | {"traceparent": self.context} if self.context else given


class PullEngine:
    """See the module.

    Args:
        stall_s: silence of a server after which it has stopped.
        listened_s: seconds in which anything could be heard; silence is counted by them.
    """

    def __init__(self, stall_s: float = 5.0, listened_s: Callable[[], float] = time.monotonic) -> None:
        self._stall_s, self._listened_s = stall_s, listened_s
        self._errands: dict[str, dict[str, _Errand]] = {}
        self._news: dict[str, asyncio.Event] = {}
        self._gone: dict[str, set[str]] = {}
        self._polled: dict[str, float] = {}
        self._turn: dict[str, int] = {}
        self._closed = False

    async def submit(self, server: ServerState, task: Task, attempt: int, told: Told) -> Answer:
        """As :meth:`Engine.submit`."""
        errands = self._errands.setdefault(server.name, {})
        errand = _Errand(task, attempt, told, asyncio.get_running_loop().create_future(), self._listened_s())
        errand.context = CONTEXT.get()
        errands[task.id] = errand
        self._bell(server.name).set()
        try:
            while True:
                heard = errand.heard
                if not errand.fetched:  # a busy server that asks again and again is no silent one
                    heard = max(heard, self._polled.get(server.name, heard))
                left = heard + self._stall_s - self._listened_s()
                if left <= 0:
                    raise SilentError(f"{server.name}: silent for {self._stall_s:g} s")
                done, _ = await asyncio.wait([errand.answer], timeout=left)
                if done:
                    return errand.answer.result()
        finally:
            if errands.get(task.id) is errand:
                del errands[task.id]

    async def cancel(self, server: ServerState, task_id: str) -> None:
        """As :meth:`Engine.cancel`: the server hears it when it asks next."""
        self._gone.setdefault(server.name, set()).add(task_id)
        self._bell(server.name).set()

    async def heartbeat(self, server: ServerState) -> Beat | None:
        """Servers say it on their own."""
        del server

    @property
    def servers(self) -> Sequence[str]:
        """None: they say it on their own."""
        return ()

    async def close(self) -> None:
        """As :meth:`Engine.close`; those who wait for tasks are sent away."""
        self._closed = True
        for bell in self._news.values():
            bell.set()
        for errands in self._errands.values():
            for errand in errands.values():
                if not errand.answer.done():
                    errand.answer.set_exception(LostError("the gateway closes"))

    def spare(self, server: str) -> None:
        """A server takes no more: what it has not fetched goes elsewhere."""
        for errand in self._errands.get(server, {}).values():
            if not errand.fetched and not errand.answer.done():
                errand.answer.set_exception(RefusedError(f"{server}: draining"))

    def _missed(self, server: str, mark: str) -> None:
        """What an earlier process of a server has fetched is gone with it; no need to wait for its silence."""
        for errand in self._errands.get(server, {}).values():
            if errand.fetched and errand.mark and errand.mark != mark and not errand.answer.done():
                errand.answer.set_exception(LostError(f"{server}: was started anew"))

    async def fetch(self, server: str, room: int, wait_s: float, mark: str = "") -> dict[str, Any]:
        """Tasks for a server that has room for some, as soon as there are any; and those that nobody wants any more.

        Who asks for the same server later takes the place of who asked before: after a restart nobody listens to the
        answer of the older request, and the tasks in it would be missed only after a while.

        Args:
            server: who asks.
            room: tasks that it takes.
            wait_s: how long it waits for some.
            mark: of its process; empty where it has none.
        """
        if mark:
            self._missed(server, mark)
        bell = self._bell(server)
        until = time.monotonic() + wait_s
        self._polled[server] = self._listened_s()
        turn = self._turn[server] = self._turn.get(server, 0) + 1
        bell.set()
        await asyncio.sleep(0)
        while True:
            if self._closed or self._turn[server] != turn:
                return {"tasks": [], "cancelled": []}
            bell.clear()
            waiting = [errand for errand in self._errands.get(server, {}).values() if not errand.fetched]
            gone = self._gone.pop(server, set())
            if (waiting and room > 0) or gone:
                given = waiting[:room]
                for errand in given:
                    errand.fetched, errand.heard, errand.mark = True, self._listened_s(), mark
                tasks = [errand.as_json() for errand in given]
                return {"tasks": tasks, "cancelled": sorted(gone)}
            left = until - time.monotonic()
            if left <= 0:
                return {"tasks": [], "cancelled": []}
            try:
                await asyncio.wait_for(bell.wait(), left)
            except TimeoutError:
                continue

    def hear(self, server: str, task_id: str, event: str, said: dict[str, Any]) -> bool:
        """What a server says of a task; False where nobody waits for it there any more."""
        errand = self._errands.get(server, {}).get(task_id)
        if errand is None:
            return False
        errand.heard = self._listened_s()
        if event != "beat":
            errand.told(event, said)
        return True

    def bring(self, server: str, task_id: str, answer: Answer | None, reason: str = "") -> bool:
        """The end of a task at a server (none: it was refused); False where nobody waits for it there any more."""
        errand = self._errands.get(server, {}).get(task_id)
        if errand is None or errand.answer.done():
            return False
        if answer is None:
            errand.answer.set_exception(RefusedError(f"{server}: {reason}"))
        else:
            errand.answer.set_result(answer)
        return True

    def _bell(self, server: str) -> asyncio.Event:
        return self._news.setdefault(server, asyncio.Event())


class EitherEngine:
    """The engine that suits a server: over HTTP where it has an address, else the one whose tasks it fetches."""

    def __init__(self, push: Engine, pull: PullEngine) -> None:
        self.push, self.pull = push, pull

    def _of(self, server: ServerState) -> Engine:
        reached = server.name in self.push.servers or (server.beat is not None and server.beat.url is not None)
        return self.push if reached else self.pull

    async def submit(self, server: ServerState, task: Task, attempt: int, told: Told) -> Answer:
        """As :meth:`Engine.submit`."""
        return await self._of(server).submit(server, task, attempt, told)

    async def cancel(self, server: ServerState, task_id: str) -> None:
        """As :meth:`Engine.cancel`."""
        await self._of(server).cancel(server, task_id)

    async def heartbeat(self, server: ServerState) -> Beat | None:
        """As :meth:`Engine.heartbeat`."""
        return await self._of(server).heartbeat(server)

    @property
    def servers(self) -> Sequence[str]:
        """Those of the engine that pushes."""
        return self.push.servers

    async def close(self) -> None:
        """As :meth:`Engine.close`."""
        await self.push.close()
        await self.pull.close()
