"""Ways to reach servers: every wait ends, and whatever a server sends is an answer or a loss."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.edge_gateways import gateway_of
from tests.edge_plants import beat, fleet, ran, task, until

from gmel.edge.engines.engine import Answer, LostError, RefusedError, read_answer
from gmel.edge.engines.http import HttpEngine
from gmel.edge.engines.pull import PullEngine
from gmel.edge.fleet import ServerState

DONE = b'{"event": "done", "bytes": 5, "kind": "text/plain", "wait_s": 1, "switch_s": 2, "service_s": 3}\n'


class Body(httpx.AsyncByteStream):
    def __init__(self, chunks: list[bytes], error: Exception | None = None) -> None:
        self._chunks, self._error = chunks, error

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for chunk in self._chunks:
            yield chunk
        if self._error is not None:
            raise self._error


def server_at(url: str = "http://x") -> ServerState:
    found = fleet(a=1.0)
    return found.hear("a", beat(url=url), 0.0)


def answer_to(chunks: list[bytes], status: int = 200, error: Exception | None = None) -> tuple[Any, list[Any]]:
    """What the engine makes of a body; an exception as itself."""
    told: list[Any] = []

    async def ask() -> Any:
        engine = HttpEngine(1.0)
        await engine.close()
        transport = httpx.MockTransport(lambda request: httpx.Response(status, stream=Body(chunks, error)))
        engine._client = httpx.AsyncClient(transport=transport)
        try:
            return await engine.submit(server_at(), task("t"), 1, lambda event, said: told.append((event, said)))
        except (LostError, RefusedError) as trouble:
            return trouble
        finally:
            await engine.close()

    return ran(ask()), told


@pytest.mark.parametrize("size", [1, 2, 7, 1000])
def test_an_answer_in_pieces_of_any_size(size: int) -> None:
    whole = b'{"event": "queued"}\n{"event": "beat"}\n{"event": "progress", "share": 0.5}\n' + DONE + b"12\n45"
    found, told = answer_to([whole[place : place + size] for place in range(0, len(whole), size)])
    assert found == Answer(b"12\n45", None, "text/plain", 1.0, 2.0, 3.0)
    assert told == [("queued", {}), ("progress", {"share": 0.5})]


@pytest.mark.parametrize(
    "chunks",
    [
        [],
        [b'{"event": "queued"}\n'],
        [DONE],
        [DONE + b"1234"],
        [DONE + b"123456"],
        [b"not json\n"],
        [b"[]\n"],
        [b"3\n"],
        [b"null\n"],
        [b'{"no": "event"}\n'],
        [b"\xff\n"],
        [b"[" * 50_000 + b"\n"],
        [b"x" * 70_000],
        [b'{"event": "done", "bytes": -1}\n'],
        [b'{"event": "done", "bytes": 1e999}\n'],
        [b'{"event": "done", "bytes": 1.5}\n1'],
        [b'{"event": "done", "bytes": null}\n'],
        [b'{"event": "done", "bytes": 99999999999}\n'],
        [b'{"event": "done", "bytes": 1, "service_s": NaN}\n1'],
        [b'{"event": "done", "bytes": 1, "service_s": Infinity}\n1'],
        [b'{"event": "done", "bytes": 1, "wait_s": "1"}\n1'],
        [b'{"event": "done", "bytes": 1, "wait_s": 1' + b"0" * 400 + b"}\n1"],
    ],
    ids=lambda chunks: repr(b"".join(chunks)[:40]),
)
def test_whatever_is_no_answer_is_a_loss(chunks: list[bytes]) -> None:
    found, _ = answer_to(chunks)
    assert isinstance(found, LostError), found
    assert "\n" not in str(found)


def test_what_a_connection_does_is_a_loss_and_what_a_server_says_a_refusal() -> None:
    for error in (httpx.ReadError("reset"), httpx.ReadTimeout("silent"), httpx.RemoteProtocolError("half")):
        assert isinstance(answer_to([b'{"event": "queued"}\n'], error=error)[0], LostError)
    assert isinstance(answer_to([b'{"error": "full"}'], 503)[0], RefusedError)
    assert isinstance(answer_to([b'{"event": "gone", "error": "cancelled"}\n'])[0], RefusedError)
    failed, _ = answer_to([b'{"event": "failed", "error": "label: not known", "kind": 3}\n'])
    assert failed == Answer(None, "label: not known")


@settings(max_examples=60)
@given(
    st.dictionaries(
        st.sampled_from(["wait_s", "switch_s", "service_s", "kind", "error"]),
        st.none() | st.booleans() | st.text(max_size=5) | st.integers() | st.floats() | st.just(10**400),
    )
)
def test_times_of_an_answer_are_numbers(said: dict[str, Any]) -> None:
    for data in (b"x", None):
        try:
            found = read_answer(said, data)
        except ValueError:
            continue
        json.dumps([found.wait_s, found.switch_s, found.service_s], allow_nan=False)
        assert min(found.wait_s, found.switch_s, found.service_s) >= 0.0
        found.kind.encode("ascii")
        assert (found.error is None) == (data is not None)


@contextlib.asynccontextmanager
async def silent(says: bytes) -> AsyncIterator[str]:
    """A server that takes a connection, says something, and stops."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(says)
        with contextlib.suppress(ConnectionError):
            await writer.drain()
            await asyncio.sleep(30)

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()


@pytest.mark.parametrize(
    "says",
    [
        b"",
        b"HTTP/1.1 200 OK\r\n",
        b'HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n14\r\n{"event": "queued"}\n\r\n',
    ],
)
def test_silence_is_a_loss_after_the_time_that_was_set(says: bytes) -> None:
    async def ask() -> float:
        engine, loop = HttpEngine(0.3), asyncio.get_running_loop()
        async with silent(says) as url:
            began = loop.time()
            with pytest.raises(LostError):
                await engine.submit(server_at(url), task("t"), 1, lambda event, said: None)
            took = loop.time() - began
        await engine.close()
        return took

    assert 0.25 < ran(ask()) < 20.0


def test_nobody_there_is_a_loss_at_once_and_cancelling_hurts_nobody() -> None:
    async def ask() -> None:
        engine = HttpEngine(1.0)
        for url in ("http://127.0.0.1:9", "http://[", "http://nobody.invalid"):
            with pytest.raises(LostError):
                await engine.submit(server_at(url), task("t"), 1, lambda event, said: None)
            await engine.cancel(server_at(url), "t")
        away = fleet(a=1.0).servers["a"]
        away.beat = None
        with pytest.raises(LostError, match="no address"):
            await engine.submit(away, task("t"), 1, lambda event, said: None)
        await engine.close()

    ran(ask())


# Servers that fetch.


def submitted(engine: PullEngine, name: str, told: list[Any] | None = None) -> "asyncio.Task[Answer]":
    listen: Callable[[str, dict[str, Any]], None] = lambda event, said: None if told is None else told.append(event)
    return asyncio.create_task(engine.submit(server_at(), task(name), 1, listen))


def test_fetched_heard_and_brought() -> None:
    async def steps() -> None:
        engine, told = PullEngine(5.0), list[Any]()
        fetching = asyncio.create_task(engine.fetch("a", 2, 20.0))
        await asyncio.sleep(0.01)
        waiting = submitted(engine, "t", told)
        given = await fetching
        assert [each["task"]["id"] for each in given["tasks"]] == ["t"]
        assert (await engine.fetch("a", 2, 0.0))["tasks"] == [], "given once"
        assert engine.hear("a", "t", "running", {})
        assert engine.hear("a", "t", "beat", {})
        assert not engine.hear("b", "t", "running", {}), "of another server"
        assert not engine.bring("b", "t", Answer(b"no"))
        assert engine.bring("a", "t", Answer(b"yes"))
        assert not engine.bring("a", "t", Answer(b"late")), "the second result is not wanted"
        assert (await waiting).data == b"yes"
        # Out of order: words after the end.
        assert not engine.hear("a", "t", "running", {})
        assert not engine.bring("a", "t", None, "gone")
        assert told == ["running"]

    ran(steps())


def test_a_task_that_was_given_to_nobody_comes_back() -> None:
    async def steps() -> None:
        engine = PullEngine(0.3)
        waiting = submitted(engine, "t")
        await asyncio.sleep(0)
        await engine.fetch("a", 1, 0.0)  # the answer never arrives
        with pytest.raises(LostError, match="silent"):
            await waiting
        waiting = submitted(engine, "t")
        await asyncio.sleep(0)
        assert [each["task"]["id"] for each in (await engine.fetch("a", 1, 5.0))["tasks"]] == ["t"]
        engine.bring("a", "t", Answer(b"x"))
        assert (await waiting).data == b"x"

    ran(steps())


def test_who_asks_later_takes_the_place_of_who_asked_before() -> None:
    """A server that was killed while it waited, and is back: the older request has no reader any more."""

    async def steps() -> None:
        engine = PullEngine(5.0)
        dead = asyncio.create_task(engine.fetch("a", 9, 20.0))
        await asyncio.sleep(0.01)
        alive = asyncio.create_task(engine.fetch("a", 9, 20.0))
        assert (await asyncio.wait_for(dead, 5.0))["tasks"] == []
        waiting = submitted(engine, "t")
        assert [each["task"]["id"] for each in (await alive)["tasks"]] == ["t"]
        waiting.cancel()

    ran(steps())


def test_a_busy_server_that_asks_again_and_again_is_not_silent() -> None:
    async def steps() -> None:
        engine = PullEngine(0.3)
        waiting = submitted(engine, "t")
        for _ in range(20):  # no room, for far longer than it may be silent
            await engine.fetch("a", 0, 0.0)
            await asyncio.sleep(0.05)
        assert not waiting.done()
        assert (await engine.fetch("a", 1, 0.0))["tasks"]
        with pytest.raises(LostError):
            await waiting

    ran(steps())


def test_cancelled_tasks_are_told_and_the_end_wakes_everybody() -> None:
    async def steps() -> None:
        engine = PullEngine(5.0)
        server = server_at()
        waiting = submitted(engine, "t")
        await asyncio.sleep(0)
        await engine.fetch("a", 1, 0.0)
        asking = asyncio.create_task(engine.fetch("a", 0, 20.0))
        await asyncio.sleep(0.01)
        await engine.cancel(server, "t")
        assert (await asking)["cancelled"] == ["t"]
        asking = asyncio.create_task(engine.fetch("a", 1, 20.0))
        await asyncio.sleep(0.01)
        await engine.close()
        assert (await asyncio.wait_for(asking, 5.0))["tasks"] == []
        with pytest.raises(LostError):
            await waiting

    ran(steps())


def test_a_server_that_dies_while_it_waits_for_tasks_is_given_none(tmp_path: Path) -> None:
    async def steps() -> None:
        async with gateway_of(tmp_path) as inside:
            await inside.beat("p", url=None)
            body = json.dumps({"room": 5, "wait_s": 30}).encode()
            gone = asyncio.Event()
            messages = iter([{"type": "http.request", "body": body, "more_body": False}])

            async def receive() -> Any:
                for message in messages:
                    return message
                await gone.wait()
                return {"type": "http.disconnect"}

            sent: list[Any] = []

            async def send(message: Any) -> None:
                sent.append(message)

            scope = {
                "type": "http",
                "method": "POST",
                "path": "/v1/servers/p/fetch",
                "headers": [],
                "query_string": b"",
            }
            scope |= {
                "http_version": "1.1",
                "scheme": "http",
                "root_path": "",
                "raw_path": b"",
                "asgi": {"version": "3.0"},
            }
            polling = asyncio.create_task(inside.app(scope, receive, send))
            await asyncio.sleep(0.1)
            gone.set()
            await asyncio.wait_for(polling, 5.0)
            await inside.submit("t")
            await until(lambda: inside.gateway.pull._errands.get("p"), "t waits for p")
            assert not inside.gateway.pull._errands["p"]["t"].fetched
            fetched = await inside.client.post("/v1/servers/p/fetch", json={"room": 1, "wait_s": 5})
            assert [each["task"]["id"] for each in fetched.json()["tasks"]] == ["t"]

    ran(steps())
