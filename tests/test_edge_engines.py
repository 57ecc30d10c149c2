"""Ways to reach servers: every wait ends, and whatever a server sends is an answer or a loss."""

import asyncio
import contextlib
import json
import re
from collections.abc import AsyncGenerator, Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.edge_gateways import gateway_of
from tests.edge_plants import beat, fleet, ran, task, until

from gmel.edge.engines.engine import Answer, LostError, RefusedError, SilentError, read_answer
from gmel.edge.engines.http import HttpEngine
from gmel.edge.engines.pull import PullEngine
from gmel.edge.engines.transport import AiohttpTransport, HttpxTransport, Links, Reply
from gmel.edge.fleet import ServerState
from gmel.scenario.errors import InputError

DONE = b'{"event": "done", "bytes": 5, "kind": "text/plain", "wait_s": 1, "switch_s": 2, "service_s": 3}\n'


WAYS = [HttpxTransport, AiohttpTransport]
Way = type[HttpxTransport] | type[AiohttpTransport]


class Says:
    """A transport that answers with these chunks, and then fails."""

    def __init__(self, status: int, chunks: list[bytes], error: Exception | None) -> None:
        self._status, self._chunks, self._error = status, chunks, error

    @contextlib.asynccontextmanager
    async def post(self, url: str, body: Any, headers: Mapping[str, str]) -> AsyncGenerator[Reply]:
        yield Reply(self._status, self._all())

    async def delete(self, url: str, most_s: float) -> None:
        raise AssertionError("nobody cancels here")

    async def close(self) -> None:
        pass

    async def _all(self) -> AsyncGenerator[bytes]:
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
        engine = HttpEngine(Says(status, chunks, error))
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
    for error in (LostError("reset"), SilentError("silent")):
        found, _ = answer_to([b'{"event": "queued"}\n'], error=error)
        assert type(found) is type(error)
        assert str(found) == f"a: {error}"
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
async def answering(says: bytes, closes: bool = False) -> AsyncGenerator[tuple[str, list[int]]]:
    """A server that answers each request with these bytes, whatever they are: its address, and the requests of each
    connection."""
    requests: list[int] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        number = len(requests)
        requests.append(0)
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                (length,) = re.findall(rb"content-length: (\d+)", head.lower())
                await reader.readexactly(int(length))
                requests[number] += 1
                writer.write(says)
                await writer.drain()
                if closes:
                    break
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", requests
    finally:
        server.close()


CHUNKED = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
QUEUED = b'14\r\n{"event": "queued"}\n\r\n'
WHOLE = b"%x\r\n%b12345\r\n" % (len(DONE) + 5, DONE)


@pytest.mark.parametrize("says", [b"", b"HTTP/1.1 200 OK\r\n", CHUNKED, CHUNKED + QUEUED])
@pytest.mark.parametrize("way", WAYS)
def test_silence_is_a_loss_after_the_time_that_was_set(way: Way, says: bytes) -> None:
    async def ask() -> float:
        engine, loop = HttpEngine(way(Links(0.3))), asyncio.get_running_loop()
        async with answering(says) as (url, _):
            began = loop.time()
            with pytest.raises(SilentError, match="a: silent"):
                await engine.submit(server_at(url), task("t"), 1, lambda event, said: None)
            took = loop.time() - began
            await engine.close()
        return took

    assert 0.25 < ran(ask()) < 20.0


@pytest.mark.parametrize("says", [b"", b"what?\r\n\r\n", CHUNKED + QUEUED, CHUNKED + QUEUED + b"zz\r\n"])
@pytest.mark.parametrize("way", WAYS)
def test_a_connection_that_breaks_off_is_a_loss(way: Way, says: bytes) -> None:
    async def ask() -> None:
        engine = HttpEngine(way(Links(5.0)))
        async with answering(says, closes=True) as (url, _):
            with pytest.raises(LostError) as caught:
                await engine.submit(server_at(url), task("t"), 1, lambda event, said: None)
            assert not isinstance(caught.value, SilentError)
            await engine.close()

    ran(ask())


@pytest.mark.parametrize("way", WAYS)
def test_tasks_that_follow_one_another_take_one_connection(way: Way) -> None:
    async def ask() -> list[int]:
        engine = HttpEngine(way(Links(5.0)))
        async with answering(CHUNKED + QUEUED + WHOLE + b"0\r\n\r\n") as (url, requests):
            for name in ("t1", "t2", "t3"):
                answer = await engine.submit(server_at(url), task(name), 1, lambda event, said: None)
                assert answer.data == b"12345"
            await engine.close()
        return requests

    assert ran(ask()) == [3]


@pytest.mark.parametrize("way", WAYS)
def test_an_answer_that_is_complete_but_does_not_end_is_one(way: Way) -> None:
    async def ask() -> None:
        engine, loop = HttpEngine(way(Links(30.0))), asyncio.get_running_loop()
        async with answering(CHUNKED + WHOLE) as (url, requests):
            began = loop.time()
            for name in ("t1", "t2"):
                answer = await engine.submit(server_at(url), task(name), 1, lambda event, said: None)
                assert answer.data == b"12345"
            assert loop.time() - began < 20.0
            assert requests == [1, 1]
            await engine.close()

    ran(ask())


@pytest.mark.parametrize("way", WAYS)
def test_a_redirection_is_not_followed(way: Way) -> None:
    async def ask() -> None:
        engine = HttpEngine(way(Links(5.0)))
        async with answering(b"") as (elsewhere, requests):
            says = f"HTTP/1.1 307 Over there\r\nlocation: {elsewhere}/v1/run\r\ncontent-length: 0\r\n\r\n"
            async with answering(says.encode()) as (url, _):
                with pytest.raises(RefusedError, match="307"):
                    await engine.submit(server_at(url), task("t"), 1, lambda event, said: None)
            assert requests == []
            await engine.close()

    ran(ask())


@pytest.mark.parametrize("way", WAYS)
def test_nobody_there_is_a_loss_at_once_and_cancelling_hurts_nobody(way: Way) -> None:
    async def ask() -> None:
        engine = HttpEngine(way(Links(1.0)))
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


def test_certificates_that_are_none_are_said_at_once(tmp_path: Path) -> None:
    broken = tmp_path / "ca.pem"
    broken.write_text("no certificate\n")
    for path in (broken, tmp_path / "not-there.pem"):
        with pytest.raises(InputError, match=path.name):
            AiohttpTransport(Links(verify=str(path)))


# Servers that fetch.


def submitted(engine: PullEngine, name: str, told: list[Any] | None = None) -> "asyncio.Task[Answer]":
    def listen(event: str, said: dict[str, Any]) -> None:
        if told is not None:
            told.append(event)

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
