"""Edge servers over HTTP: one request a task, answered line by line while it runs.

A server sends a line of JSON whenever something happens, and at least once a second; the last one is followed by the
bytes of the result. So a server that has stopped (not died) is known by its silence, whatever the task takes.
"""

import asyncio
import contextlib
import json
from collections.abc import Sequence
from typing import Any

from gmel.edge.engines.engine import Answer, LostError, RefusedError, SilentError, Told, read_answer
from gmel.edge.engines.transport import Reply, Transport
from gmel.edge.fleet import Beat, ServerState
from gmel.edge.task import Task
from gmel.edge.traces import CONTEXT

__all__ = ["MOST_RESULT_BYTES", "HttpEngine"]

MOST_RESULT_BYTES = 256 * 2**20
"""Of one task."""
_MOST_LINE = 64 * 1024
_MOST_REFUSAL = 200
_CANCEL_S = 2.0
_END_S = 1.0
"""For the end of an answer that is complete."""


class HttpEngine:
    """See the module."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    async def submit(self, server: ServerState, task: Task, attempt: int, told: Told) -> Answer:
        """As :meth:`Engine.submit`."""
        url = _url(server)
        body = {"task": task.as_json(), "attempt": attempt}
        context = {"traceparent": header} if (header := CONTEXT.get()) else {}
        try:
            async with self._transport.post(f"{url}/v1/run", body, context) as reply:
                if reply.status != 200:
                    raise RefusedError(f"{server.name}: {reply.status} {await _refusal(reply)}")
                return await _read(reply, server, told)
        except SilentError as error:
            raise SilentError(f"{server.name}: {error}") from error
        except (LostError, ValueError, KeyError, RecursionError) as error:
            said = str(error) if isinstance(error, LostError) else f"{type(error).__name__} {error}".strip()
            raise LostError(f"{server.name}: {said}") from error

    async def cancel(self, server: ServerState, task_id: str) -> None:
        """As :meth:`Engine.cancel`."""
        if server.beat is not None and server.beat.url is not None:
            await self._transport.delete(f"{server.beat.url}/v1/run/{task_id}", _CANCEL_S)

    async def heartbeat(self, server: ServerState) -> Beat | None:
        """Servers say it on their own."""
        del server

    @property
    def servers(self) -> Sequence[str]:
        """None: they say it on their own."""
        return ()

    async def close(self) -> None:
        """As :meth:`Engine.close`."""
        await self._transport.close()


def _url(server: ServerState) -> str:
    if server.beat is None or server.beat.url is None:
        raise LostError(f"{server.name}: has no address")
    return server.beat.url


async def _refusal(reply: Reply) -> str:
    """What a server says of why it does not take a task, cut to what a line bears."""
    said = bytearray()
    async for chunk in reply.chunks:
        said += chunk
        if len(said) >= _MOST_REFUSAL:
            break
    return bytes(said[:_MOST_REFUSAL]).decode("utf-8", "replace")


async def _read(reply: Reply, server: ServerState, told: Told) -> Answer:
    """Lines, then the bytes that the last one announces."""
    waiting = bytearray()
    final: dict[str, Any] | None = None
    size = 0
    async for chunk in reply.chunks:
        waiting += chunk
        while final is None and (end := waiting.find(b"\n")) >= 0:
            line: Any = json.loads(bytes(waiting[:end]))
            del waiting[: end + 1]
            if not isinstance(line, dict):
                raise ValueError("a line that is no object")
            event = str(line.pop("event"))
            if event in ("done", "failed"):
                final, size = line | {"event": event}, line.get("bytes", 0)
                if isinstance(size, bool) or not isinstance(size, int) or not 0 <= size <= MOST_RESULT_BYTES:
                    raise ValueError(f"a result of {str(size)[:40]} bytes, at most {MOST_RESULT_BYTES} are taken")
            elif event == "gone":
                raise RefusedError(f"{server.name}: {line.get('error', 'cancelled')}")
            elif event != "beat":
                told(event, line)
        if final is None and len(waiting) > _MOST_LINE:
            raise ValueError("a line without an end")
        if final is not None and len(waiting) >= size:
            break
    # To the last byte of HTTP as well: a connection that is left before it cannot be used again. A server that does not
    # end has done its work all the same.
    with contextlib.suppress(LostError, TimeoutError):
        async with asyncio.timeout(_END_S):
            async for chunk in reply.chunks:
                waiting += chunk
                if len(waiting) > size:
                    break
    if final is None or len(waiting) != size:
        raise LostError("broke off")
    return read_answer(final, None if final["event"] == "failed" else bytes(waiting))
