"""Spans of tasks: one tree from acceptance to the store, across processes; and nothing at all where nobody asked."""

import asyncio
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.edge_apps import served
from tests.edge_gateways import Inside, gateway_of
from tests.edge_plants import FakeEngine, plant, ran, task, until

from gmel.edge.engines.engine import Answer, LostError, Told
from gmel.edge.engines.http import HttpEngine
from gmel.edge.engines.transport import AiohttpTransport, Links
from gmel.edge.gateway.app import gateway_app
from gmel.edge.gateway.gateway import Settings
from gmel.edge.server.app import server_app
from gmel.edge.server.reporting import Reporting
from gmel.edge.server.runner import Runner
from gmel.edge.server.work import Sleeping
from gmel.edge.task import Task
from gmel.edge.traces import CONTEXT, NOTHING, OFF, OtelTraces, Traces, server_spans, traces_of
from gmel.scenario.errors import InputError

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
ENDPOINT = "OTEL_EXPORTER_OTLP_ENDPOINT"


class Memory:
    """Spans that have ended, as a collector would get them."""

    def __init__(self) -> None:
        sdk = pytest.importorskip("opentelemetry.sdk.trace", reason="needs the extra 'otel'")
        export = pytest.importorskip("opentelemetry.sdk.trace.export")
        memory = pytest.importorskip("opentelemetry.sdk.trace.export.in_memory_span_exporter")
        self.exporter = memory.InMemorySpanExporter()
        provider = sdk.TracerProvider()
        provider.add_span_processor(export.SimpleSpanProcessor(self.exporter))
        self.traces: Traces = OtelTraces(provider)

    def named(self, name: str) -> list[Any]:
        return [span for span in self.exporter.get_finished_spans() if span.name == name]

    def tree(self) -> dict[str, set[str]]:
        """Names of the children of each name."""
        spans = self.exporter.get_finished_spans()
        by_id = {span.context.span_id: span.name for span in spans}
        found: dict[str, set[str]] = {}
        for span in spans:
            parent = "" if span.parent is None else by_id.get(span.parent.span_id, "elsewhere")
            found.setdefault(parent, set()).add(span.name)
        return found


@pytest.fixture
def memory() -> Memory:
    return Memory()


async def started(app: Any, engine: FakeEngine | None = None) -> Inside:
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    client = httpx.AsyncClient(transport=transport, base_url="http://g")
    return Inside(app, app.state.gateway, engine or FakeEngine(), client)


def test_one_tree_a_task_with_each_attempt_in_it(tmp_path: Path, memory: Memory) -> None:
    engine, calls = FakeEngine(), list[str]()

    async def breaks(each: Task, told: Told) -> Answer:
        calls.append(CONTEXT.get())
        if len(calls) == 1:
            raise LostError("broke off")
        return Answer(b"x" * 20_000, service_s=0.01)

    engine.behave |= {"a": breaks, "b": breaks}
    app = gateway_app(plant(a=1.0, b=1.0), Settings(tmp_path), engine, memory.traces)

    async def steps() -> None:
        async with app.router.lifespan_context(app):
            inside = await started(app, engine)
            for name in ("a", "b"):
                await inside.beat(name)
            answer = await inside.client.post(
                "/v1/tasks", json={"id": "t", "device": "d", "model": "part"}, headers={"traceparent": PARENT}
            )
            assert answer.status_code == 202
            assert (await inside.entry("t"))["state"] == "done"
            assert (await inside.submit("t")).status_code == 200, "no second tree"
            await inside.client.aclose()

    ran(steps())
    assert memory.tree() == {"elsewhere": {"task"}, "task": {"accept", "decide", "dispatch", "store"}}
    (root,) = memory.named("task")
    assert format(root.context.trace_id, "032x") == PARENT.split("-")[1], "it is part of what the device traces"
    assert format(root.parent.span_id, "016x") == PARENT.split("-")[2]
    assert root.attributes["gmel.state"] == "done"
    assert root.attributes["gmel.attempts"] == 2
    first, second = memory.named("dispatch")
    assert first.status.description == "broke off"
    assert (first.attributes["gmel.attempt"], second.attributes["gmel.attempt"]) == (1, 2)
    assert {first.attributes["gmel.server"], second.attributes["gmel.server"]} == {"a", "b"}
    assert second.status.is_ok or second.status.is_unset
    assert [call.split("-")[2] for call in calls] == [format(each.context.span_id, "016x") for each in (first, second)]
    assert memory.named("store")[0].attributes["gmel.bytes"] == 20_000
    assert len(memory.named("decide")) == 2


@pytest.mark.parametrize("way", ["push", "pull"])
def test_the_context_reaches_the_server_and_its_spans_are_part_of_the_attempt(
    tmp_path: Path, memory: Memory, way: str
) -> None:
    where = plant(a=20.0)
    app = gateway_app(where, Settings(tmp_path), HttpEngine(AiohttpTransport(Links(5.0))), memory.traces)

    async def steps() -> None:
        async with served(app) as gateway:
            runner = Runner(Sleeping(where, 20.0), traces=memory.traces)
            runner.start()
            async with served(server_app("a", runner)) as server, httpx.AsyncClient(base_url=gateway) as client:
                line = Reporting("a", gateway, runner, server if way == "push" else None)
                keeping = asyncio.create_task(line.keep())
                await until(
                    lambda: app.state.gateway.fleet.state("part", asyncio.get_running_loop().time()) == "ready", "heard"
                )
                answer = await client.post(
                    "/v1/tasks", params={"wait_s": 20}, json={"id": "t", "device": "d", "model": "part", "images": 2}
                )
                assert answer.json()["state"] == "done"
                keeping.cancel()
                await asyncio.gather(keeping, return_exceptions=True)
                await runner.close()

    ran(steps())
    tree = memory.tree()
    assert tree["dispatch"] >= {"queue", "run"}
    assert tree[""] == {"task"}
    (run,), (dispatch,) = memory.named("run"), memory.named("dispatch")
    assert run.attributes["gmel.images"] == 2
    assert 0.09e9 < run.end_time - run.start_time < 20e9
    assert dispatch.start_time <= run.start_time + 1e7
    assert run.end_time <= dispatch.end_time + 1e7


def test_what_is_no_header_starts_a_tree_of_its_own_and_no_spans_at_a_server(memory: Memory) -> None:
    for wrong in ("", "x", "00-0-0-0", PARENT[:-1], PARENT.replace("00-", "ff-", 1), "é", "00-" + "0" * 32 + "-1-01"):
        memory.exporter.clear()
        span = memory.traces.begin("task", wrong, id="t")
        span.end()
        server_spans(memory.traces, wrong, 1.0, 2.0, 3.0, 4.0)
        (only,) = memory.exporter.get_finished_spans()
        assert only.parent is None, wrong
        assert span.header.startswith("00-")


def test_times_of_the_spans_of_a_server(memory: Memory) -> None:
    server_spans(memory.traces, PARENT, 10.0, 12.0, 15.0, 20.0, images=3)
    lengths = {span.name: (span.end_time - span.start_time) / 1e9 for span in memory.exporter.get_finished_spans()}
    assert lengths == pytest.approx({"queue": 2.0, "load": 3.0, "run": 5.0})
    memory.exporter.clear()
    server_spans(memory.traces, PARENT, 10.0, 12.0, 12.0, 20.0)
    assert [span.name for span in memory.exporter.get_finished_spans()] == ["queue", "run"], "nothing was loaded"
    memory.exporter.clear()
    server_spans(memory.traces, PARENT, 10.0, 0.0, 0.0, 11.0, cancelled=True)
    (queue,) = memory.exporter.get_finished_spans()
    assert (queue.name, queue.attributes["gmel.cancelled"]) == ("queue", True)


def test_a_task_that_is_cancelled_or_fails_says_so(memory: Memory) -> None:
    class Broken(Sleeping):
        def load(self, name: str) -> Any:
            raise InputError("model: cannot be read")

    async def steps() -> None:
        for source, number in ((Sleeping(plant(a=1.0), 1.0), 2), (Broken(plant(a=1.0), 1.0), 1)):
            runner = Runner(source, traces=memory.traces)
            runner.start()
            runs = [await runner.take(task(f"t{place}", images=200), 1, PARENT) for place in range(number)]
            await until(lambda run=runs[0]: run.ready > run.queued or run.over, "begun")
            for run in reversed(runs):
                runner.cancel(run.task.id)
            await until(lambda runner=runner: not runner.runs, "ended")
            await runner.close()

    ran(steps())
    begun, waited = (
        [span for span in memory.named(name) if "gmel.cancelled" in span.attributes] for name in ("run", "queue")
    )
    assert len(begun) == len(waited) == 1, "one was broken off at work, one in the queue"
    (failed,) = [span for span in memory.named("run") if "gmel.error" in span.attributes]
    assert failed.attributes["gmel.error"] == "model: cannot be read"


def test_off_is_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (ENDPOINT, "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_SDK_DISABLED"):
        monkeypatch.delenv(name, raising=False)
    assert traces_of("gmel-gateway", False) is OFF
    assert OFF.begin("task", PARENT, id="t") is NOTHING
    assert NOTHING.header == ""
    seen: list[str] = []

    async def looks(each: Task, told: Told) -> Answer:
        seen.append(CONTEXT.get())
        return Answer(b"x")

    async def steps() -> None:
        async with gateway_of(tmp_path, "a") as inside:
            inside.engine.behave["a"] = looks
            await inside.client.post(
                "/v1/tasks", json={"id": "t", "device": "d", "model": "part"}, headers={"traceparent": PARENT}
            )
            assert (await inside.entry("t"))["state"] == "done"

    ran(steps())
    assert seen == [""], "no header goes on"


def test_the_extra_is_needed_only_where_traces_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENDPOINT, "http://127.0.0.1:9")
    monkeypatch.setattr("gmel.edge.traces._is_there", lambda module: False)
    assert traces_of("gmel-gateway", False) is OFF, "the variable may be there for other programs"
    with pytest.raises(InputError, match=r"gmel\[otel\]"):
        traces_of("gmel-gateway", True)
    monkeypatch.setenv("OTEL_SDK_DISABLED", "true")
    assert traces_of("gmel-gateway", True) is OFF


def test_nothing_of_opentelemetry_is_imported_while_it_is_off() -> None:
    code = (
        "import sys, gmel.edge.traces as t, gmel.edge.server.process; t.traces_of('x', False); "
        "print([name for name in sys.modules if name.startswith('opentelemetry')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"


def test_spans_reach_a_collector_over_http_and_one_that_is_away_stops_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http.trace_exporter", reason="needs the extra 'otel'")
    got: list[bytes] = []

    async def collect(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        length = next(
            int(line.split(b":")[1]) for line in head.splitlines() if line.lower().startswith(b"content-length")
        )
        got.append(head.split(b" ")[1] + await reader.readexactly(length))
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: application/x-protobuf\r\ncontent-length: 0\r\n\r\n")
        await writer.drain()
        writer.close()

    async def steps() -> None:
        server = await asyncio.start_server(collect, "127.0.0.1", 0)
        for address in (f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", "http://127.0.0.1:9"):
            monkeypatch.setenv(ENDPOINT, address)
            monkeypatch.setenv("OTEL_EXPORTER_OTLP_COMPRESSION", "none")
            monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "1")
            traces = traces_of("gmel-gateway", False)
            assert isinstance(traces, OtelTraces)
            traces.begin("task", id="t").end()
            await asyncio.to_thread(traces.close)
        server.close()

    ran(steps())
    (body,) = got
    assert body.startswith(b"/v1/traces")
    assert b"gmel-gateway" in body
    assert b"gmel.id" in body
