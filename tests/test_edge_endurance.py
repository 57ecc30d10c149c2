"""What a plant must bear that runs for long: servers that end, tasks that kill, pauses, restarts, old tasks."""

import asyncio
import contextlib
import json
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.edge_gateways import Inside, gateway_of
from tests.edge_plants import beat, fleet, plant, ran, task, until

from gmel.edge.engines.engine import Answer, LostError, RefusedError, SilentError, Told
from gmel.edge.engines.pull import PullEngine
from gmel.edge.fleet import STALE_S, Fleet, ServerState
from gmel.edge.gateway.gateway import LEDGER
from gmel.edge.ledger import Ledger
from gmel.edge.server.reporting import Reporting
from gmel.edge.server.runner import Runner
from gmel.edge.server.work import NoModels
from gmel.edge.task import Task

# A server that ends says so.


def test_a_heartbeat_is_said_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[dict[str, Any]] = []

    def gateway(request: httpx.Request) -> httpx.Response:
        said.append(json.loads(request.content))
        return httpx.Response(200, json={})

    real = httpx.AsyncClient

    def client(**options: Any) -> httpx.AsyncClient:
        options.pop("verify")
        return real(**options, transport=httpx.MockTransport(gateway))

    monkeypatch.setattr("gmel.edge.server.reporting.httpx.AsyncClient", client)
    monkeypatch.setattr("gmel.edge.server.reporting.BEAT_S", 20.0)

    async def steps() -> None:
        runner = Runner(NoModels())
        line = Reporting("a", "http://g", runner, "http://a")
        keeping = asyncio.create_task(line.keep())
        await until(lambda: len(said) == 1, "the first heartbeat")
        runner.draining = True
        await asyncio.wait_for(line.say(), 5.0)
        assert [each["draining"] for each in said] == [False, True]
        await asyncio.wait_for(asyncio.gather(line.say(), line.say()), 5.0)
        assert 3 <= len(said) <= 4
        keeping.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await keeping

    ran(steps())


def test_a_gateway_that_is_away_holds_no_ending_server_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gmel.edge.server.reporting.BEAT_S", 0.05)

    async def steps() -> None:
        line = Reporting("a", "http://g", Runner(NoModels()), "http://a")  # nobody says heartbeats
        await asyncio.wait_for(line.say(), 5.0)

    ran(steps())


def hanging(inside: Inside, *names: str) -> asyncio.Event:
    free = asyncio.Event()

    async def hang(task: Task, told: Told) -> Answer:
        await free.wait()
        return Answer(b"x")

    for name in names:
        inside.engine.behave[name] = hang
    return free


def test_a_server_that_drains_is_sent_nothing_more(tmp_path: Path) -> None:
    async def steps() -> None:
        async with gateway_of(tmp_path, "a") as inside:
            free = hanging(inside, "a")
            for number in range(8):
                await inside.submit(f"t{number}")
            await until(lambda: len(inside.engine.submitted) == 3, "three are sent")
            assert inside.gateway.dispatcher.lane("a") == 5
            await inside.beat("b")
            await inside.beat("a", draining=True)
            assert inside.gateway.dispatcher.lane("a") == 0, "before the next look"
            free.set()
            async with inside.beating("b"):
                await inside.all_ended()
            assert [name for name, _ in inside.engine.submitted].count("a") == 3
            assert inside.gateway.ledger.counts() == {"done": 8}

    ran(steps())


def test_what_a_draining_server_has_not_fetched_goes_elsewhere(tmp_path: Path) -> None:
    async def steps() -> None:
        async with gateway_of(tmp_path) as inside:
            await inside.beat("p", url=None)
            for number in range(3):
                await inside.submit(f"t{number}")
            fetched = await inside.client.post("/v1/servers/p/fetch", json={"room": 1, "wait_s": 1, "mark": "one"})
            assert [each["task"]["id"] for each in fetched.json()["tasks"]] == ["t0"]
            async with inside.beating("b"):
                await inside.beat("p", url=None, draining=True)
                await until(lambda: len(inside.gateway.dispatcher.jobs) == 1, "the others are done elsewhere", 3.0)
            assert sorted(inside.engine.submitted) == [("b", "t1"), ("b", "t2")]
            for mark in (1, "x" * 65, None):
                body = {"room": 1, "wait_s": 0, "mark": mark}
                assert (await inside.client.post("/v1/servers/p/fetch", json=body)).status_code == 400

    ran(steps())


# A task that takes servers down.


def breaking(stage: str, error: Exception) -> Any:
    async def behave(task: Task, told: Told) -> Answer:
        told("queued", {})
        if task.id != "killer":
            return Answer(b"x")
        told(stage, {})
        await asyncio.sleep(0)
        raise error

    return behave


@pytest.mark.parametrize("stage", ["loading", "running", "progress"])
def test_a_task_that_takes_down_what_runs_it_fails(tmp_path: Path, stage: str) -> None:
    async def steps() -> None:
        async with gateway_of(tmp_path, *"abcd", most_losses=3) as inside, inside.beating(*"abcd"):
            for name in "abcd":
                inside.engine.behave[name] = breaking(stage, LostError(f"{name}: broke off"))
            await inside.submit("killer")
            entry = await inside.entry("killer")
            assert entry["state"] == "failed"
            assert entry["error"].startswith("3 servers broke off while running it, the last: ")
            assert len(inside.engine.submitted) == entry["attempt"] == 3
            await inside.submit("other")
            assert (await inside.entry("other"))["state"] == "done"

    ran(steps())


@pytest.mark.parametrize(
    ("stage", "error"),
    [
        ("queued", LostError("broke off")),
        ("running", SilentError("silent")),
        ("running", RefusedError("draining")),
        ("running", TimeoutError("of the engine")),
        ("running", ValueError("a bug")),
    ],
)
def test_what_is_not_its_fault_does_not_count(tmp_path: Path, stage: str, error: Exception) -> None:
    async def steps() -> None:
        async with gateway_of(tmp_path, *"abcd", most_losses=1) as inside, inside.beating(*"abcd"):
            for name in "abc":
                inside.engine.behave[name] = breaking(stage, error)
            await inside.submit("killer")
            assert (await inside.entry("killer"))["state"] == "done"
            assert inside.gateway.ledger.losses() == {}

    ran(steps())


def test_losses_are_counted_over_a_restart(tmp_path: Path) -> None:
    async def first() -> None:
        async with gateway_of(tmp_path, *"ab", most_losses=3) as inside, inside.beating(*"ab"):
            for name in "ab":
                inside.engine.behave[name] = breaking("running", LostError("broke off"))
            await inside.submit("killer")
            await until(lambda: inside.gateway.ledger.losses() == {"killer": 2}, "two are lost")

    async def second() -> None:
        async with gateway_of(tmp_path, "c", most_losses=3) as inside, inside.beating("c"):
            inside.engine.behave["c"] = breaking("running", LostError("broke off"))
            entry = await inside.entry("killer")
            assert entry["state"] == "failed"
            assert len(inside.engine.submitted) == 1
            assert inside.gateway.ledger.losses() == {}, "it has an end"

    ran(first())
    ran(second())


def test_a_fetching_server_that_was_started_anew_has_lost_what_it_had() -> None:
    async def steps() -> None:
        engine, told = PullEngine(30.0), list[Any]()
        server = ServerState("p", None)
        runs = [
            asyncio.create_task(engine.submit(server, task(name), 1, lambda *what: told.append(what))) for name in "ab"
        ]
        await asyncio.sleep(0)
        assert len((await engine.fetch("p", 1, 0.0, "one"))["tasks"]) == 1
        await engine.fetch("p", 0, 0.0, "one")
        await engine.fetch("p", 0, 0.0)
        await asyncio.sleep(0.01)
        assert not runs[0].done(), "the same process asks again, or one without a mark"
        assert [each["task"]["id"] for each in (await engine.fetch("p", 2, 0.0, "two"))["tasks"]] == ["b"]
        with pytest.raises(LostError, match="started anew") as caught:
            await asyncio.wait_for(runs[0], 5.0)
        assert not isinstance(caught.value, SilentError), "its process has ended"
        assert not runs[1].done()
        runs[1].cancel()

    ran(steps())


# The gateway itself stands still.


class Clock:
    def __init__(self) -> None:
        self.at = 100.0

    def __call__(self) -> float:
        return self.at


def test_silence_counts_only_while_the_gateway_listened() -> None:
    clock = Clock()
    found = Fleet(plant(a=1.0, b=1.0), clock)
    heard, mute = (found.hear(name, beat(), found.now()) for name in "ab")

    def listen(seconds: float, *names: str) -> None:
        for _ in range(round(seconds / 0.25)):
            clock.at += 0.25
            for name in names:
                found.hear(name, beat(), found.now())
            found.now()

    listen(2.0, "a")
    assert found.paused_s == 0.0
    clock.at += 60.0
    now = found.now()
    assert found.paused_s == pytest.approx(59.75)
    assert heard.alive(now)
    assert mute.alive(now), "two seconds of silence, whatever the clock says"
    assert found.listened_s() == pytest.approx(102.25)
    listen(1.5, "a")
    assert not mute.alive(found.now()), "then its silence goes on"
    assert heard.alive(found.now())
    # The first that happens after a pause may be a heartbeat of another server.
    clock.at += 30.0
    found.hear("b", beat(), found.now())
    assert heard.alive(clock.at)
    assert mute.heard == clock.at


def test_short_delays_are_no_pauses() -> None:
    clock = Clock()
    found = Fleet(plant(a=1.0), clock)
    server = found.hear("a", beat(), found.now())
    for _ in range(8):
        clock.at += 0.5
        found.now()
    assert found.paused_s == 0.0
    assert not server.alive(found.now())
    assert STALE_S < 4.0


def test_a_silence_that_was_ours_does_not_lose_the_task(tmp_path: Path) -> None:
    """The time limit has passed while nobody listened: the server is asked again, and goes on with the task."""

    async def steps() -> None:
        async with gateway_of(tmp_path, "a", "b") as inside, inside.beating("a", "b"):
            calls: list[str] = []

            async def behave(task: Task, told: Told) -> Answer:
                told("running", {})
                calls.append(task.id)
                if len(calls) == 1:
                    inside.gateway.fleet._looked -= 30.0  # as if it had stood still
                    raise SilentError("nothing heard for 5 s")
                return Answer(b"x")

            inside.engine.behave["a"] = inside.engine.behave["b"] = behave
            await inside.submit("t")
            entry = await inside.entry("t")
            assert (entry["state"], entry["attempt"]) == ("done", 1)
            assert len({name for name, _ in inside.engine.submitted}) == 1
            assert len(calls) == 2
            assert inside.gateway.fleet.servers[entry["server"]].lost == 0

    ran(steps())


def test_a_fetching_server_is_not_silent_while_nobody_listens() -> None:
    clock = Clock()

    async def steps() -> None:
        found = fleet()
        found._clock, found._looked = clock, clock()
        engine = PullEngine(0.5, found.listened_s)
        run = asyncio.create_task(engine.submit(ServerState("p", None), task("a"), 1, lambda *what: None))
        await asyncio.sleep(0)
        await engine.fetch("p", 1, 0.0)
        clock.at += 50.0  # the process stood still
        await asyncio.sleep(0.7)
        assert not run.done()
        clock.at += 0.4
        with pytest.raises(SilentError):
            await asyncio.wait_for(run, 5.0)

    ran(steps())


# Deadlines over restarts.


def test_a_deadline_goes_on_after_a_restart(tmp_path: Path) -> None:
    async def before() -> None:
        ledger = Ledger(tmp_path / LEDGER)
        now_s = time.time()
        late = {"deadline_s": 50.0, "expire": True}
        await ledger.accept(task("past", **late), now_s - 60.0)
        await ledger.accept(task("soon", **late), now_s - 49.0)
        await ledger.accept(task("worth", deadline_s=50.0), now_s - 60.0)
        await ledger.accept(task("ahead", deadline_s=1.5, expire=True), now_s + 3600.0)
        await ledger.accept(task("fresh", **late), now_s)
        await ledger.close()

    async def after() -> None:
        async with gateway_of(tmp_path, "nobody") as inside:
            inside.gateway.fleet.servers["nobody"].heard -= 100.0
            began = time.monotonic()
            assert (await inside.entry("past"))["state"] == "expired"
            assert (await inside.entry("soon"))["state"] == "expired"
            assert (await inside.entry("ahead"))["state"] == "expired", "no longer than the whole deadline"
            assert time.monotonic() - began < 15.0
            async with inside.beating("a"):
                await inside.all_ended()
            assert {name for _, name in inside.engine.submitted} == {"worth", "fresh"}
            record = (await inside.entry("worth"))["record"]
            assert record["status"] == "late"
            assert 60.0 <= record["latency_s"] < 100.0

    ran(before())
    ran(after())
