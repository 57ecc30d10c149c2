"""Edge servers over HTTP: one request a task, answered line by line while it runs.

A server sends a line of JSON whenever something happens, and at least once a second; the last one is followed by the
bytes of the result. So a server that has stopped (not died) is known by its silence, whatever the task takes.
"""

import json
from collections.abc import Sequence
from typing import Any

import anyio
import httpx

from gmel.edge.engines.engine import Answer, LostError, RefusedError, SilentError, Told, read_answer
from gmel.edge.fleet import Beat, ServerState
from gmel.edge.task import Task
from gmel.edge.traces import CONTEXT

__all__ = ["MOST_RESULT_BYTES", "HttpEngine"]

MOST_RESULT_BYTES = 256 * 2**20
"""Of one task."""
_MOST_LINE = 64 * 1024


class HttpEngine:
    """See the module.

    Args:
        stall_s: silence after which a server has stopped.
        key: what the servers are shown, where they ask for it.
        verify: false, or a file of certificates to trust in place of the usual ones.
    """

    def __init__(self, stall_s: float = 5.0, key: str | None = None, verify: bool | str = True) -> None:
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        timeout = httpx.Timeout(stall_s, connect=min(stall_s, 2.0), pool=None)
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=256)
        self._client = httpx.AsyncClient(
            timeout=timeout, limits=limits, headers=headers, verify=verify, trust_env=False
        )

    async def submit(self, server: ServerState, task: Task, attempt: int, told: Told) -> Answer:
        """As :meth:`Engine.submit`."""
        url = _url(server)
        body = {"task": task.as_json(), "attempt": attempt}
        try:
            context = {"traceparent": header} if (header := CONTEXT.get()) else {}
            async with self._client.stream("POST", f"{url}/v1/run", json=body, headers=context) as response:
                if response.status_code != 200:
                    await response.aread()
                    raise RefusedError(f"{server.name}: {response.status_code} {response.text[:200]}")
                return await _read(response, server, told)
        except httpx.TimeoutException as error:
            raise SilentError(f"{server.name}: silent ({type(error).__name__})") from error
        except (httpx.HTTPError, httpx.InvalidURL, ValueError, KeyError, RecursionError) as error:
            raise LostError(f"{server.name}: {type(error).__name__} {error}".strip()) from error

    async def cancel(self, server: ServerState, task_id: str) -> None:
        """As :meth:`Engine.cancel`."""
        if server.beat is None or server.beat.url is None:
            return
        try:
            await self._client.delete(f"{server.beat.url}/v1/run/{task_id}", timeout=2.0)
        except (httpx.HTTPError, httpx.InvalidURL):
            return

    async def heartbeat(self, server: ServerState) -> Beat | None:
        """Servers say it on their own."""
        del server

    @property
    def servers(self) -> Sequence[str]:
        """None: they say it on their own."""
        return ()

    async def close(self) -> None:
        """As :meth:`Engine.close`."""
        with anyio.CancelScope(shield=True):
            await self._client.aclose()


def _url(server: ServerState) -> str:
    if server.beat is None or server.beat.url is None:
        raise LostError(f"{server.name}: has no address")
    return server.beat.url


async def _read(response: httpx.Response, server: ServerState, told: Told) -> Answer:
    """Lines, then the bytes that the last one announces."""
    waiting = bytearray()
    final: dict[str, Any] | None = None
    size = 0
    async for chunk in response.aiter_raw():
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
    if final is None or len(waiting) != size:
        raise LostError(f"{server.name}: broke off")
    return read_answer(final, None if final["event"] == "failed" else bytes(waiting))
