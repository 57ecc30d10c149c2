"""The door of a process: who sends nothing or drips does not hold it open."""

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from tests.edge_plants import ran

from gmel.edge import serving
from gmel.edge.serving import Place, check_open, listen, serve
from gmel.scenario.errors import InputError


async def hello(request: Any) -> PlainTextResponse:
    await asyncio.sleep(float(request.query_params.get("s", 0)))
    return PlainTextResponse("hello")


@contextlib.asynccontextmanager
async def served() -> AsyncIterator[int]:
    door = listen(Place())
    ready = asyncio.Event()
    running = asyncio.create_task(serve(Starlette(routes=[Route("/", hello)]), door, Place(), ready.set))
    await asyncio.wait_for(ready.wait(), 20)
    try:
        yield door.getsockname()[1]
    finally:
        os.kill(os.getpid(), signal.SIGTERM)
        await asyncio.wait_for(running, 20)


async def closed_after(port: int, *pieces: bytes, pause_s: float = 0.05) -> float:
    """Sends pieces with pauses, again and again the last one; the seconds until the other side closes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    began = time.monotonic()
    reading = asyncio.create_task(reader.read())
    waiting = list(pieces)
    while not reading.done():
        assert time.monotonic() - began < 20, "never closed"
        if waiting:
            with contextlib.suppress(ConnectionError):
                writer.write(waiting.pop(0) if len(waiting) > 1 else waiting[0])
        await asyncio.wait([reading], timeout=pause_s)
    writer.close()
    return time.monotonic() - began


def test_who_sends_nothing_or_drips_is_sent_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "HEAD_S", 0.5)

    async def steps() -> None:
        async with served() as port, httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", trust_env=False) as client:
            times = await asyncio.gather(
                closed_after(port),
                closed_after(port, b"GET / HTTP/1.1\r\nhost: x\r\n", b"x-drip: 1\r\n"),
                # A second request on a connection that had a good one.
                closed_after(port, b"GET / HTTP/1.1\r\nhost: x\r\n\r\n", b"", b"GET / HTTP/1.1\r\n", b"x-drip: 1\r\n"),
                *(closed_after(port) for _ in range(50)),
            )
            assert min(times) > 0.3
            # Who asks properly is not hurried: a slow answer, and a connection that rests between requests.
            assert (await client.get("/?s=1.2")).text == "hello"
            await asyncio.sleep(1.2)
            assert (await client.get("/")).text == "hello"

    ran(steps())


def test_a_port_that_is_taken_and_a_door_without_keys() -> None:
    door = listen(Place())
    with pytest.raises(InputError, match="choose another --port"):
        listen(Place(port=door.getsockname()[1]))
    door.close()
    with pytest.raises(InputError, match="cannot listen"):
        listen(Place("203.0.113.7"))
    for host in ("0.0.0.0", "::", "203.0.113.7", "some-name"):
        with pytest.raises(InputError, match="without keys"):
            check_open(Place(host), None, "gateway")
    for host in ("127.0.0.1", "::1", "localhost", "127.8.8.8"):
        check_open(Place(host), None, "gateway")
