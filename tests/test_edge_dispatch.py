"""From an accepted task to its one result, whatever servers, engines, policies, the disk and clients do."""

import asyncio
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from tests.edge_gateways import gateway_of
from tests.edge_plants import ran, task, until

from gmel.edge.engines.engine import Answer, LostError, RefusedError, Told
from gmel.edge.task import Task


def does(what: Any) -> Any:
    """A server that raises, or gives an answer."""

    async def behave(task: Task, told: Told) -> Answer:
        await asyncio.sleep(0)
        if isinstance(what, BaseException):
            raise what
        return what

    return behave


async def forever(task: Task, told: Told) -> Answer:
    """A server that speaks but does not come to an end."""
    while True:
        told("progress", {"share": 0.5})
        await asyncio.sleep(0.02)


@pytest.mark.parametrize(
    "trouble",
    [LostError("broke off"), RefusedError("full"), AttributeError("a bug"), TimeoutError("of the engine"), OSError(5)],
    ids=lambda error: type(error).__name__,
)
def test_a_task_goes_elsewhere_whatever_goes_wrong(tmp_path: Path, trouble: Exception) -> None:
    async def steps() -> None:
        async with gateway_of(tmp_path, "a", "b") as inside, inside.beating("a", "b"):
            inside.engine.behave["a"] = does(trouble)
            for number in range(6):
                await inside.submit(f"t{number}")
            await inside.all_ended()
            assert inside.gateway.ledger.counts() == {"done": 6}
            tries = Counter(name for _, name in inside.engine.submitted)
            assert max(tries.values()) == 2, "one more try, at the other server"
            assert all(not server.flights for server in inside.gateway.fleet.servers.values())
            assert set(inside.gateway.dispatcher._at.values()) == {0}

    ran(steps())


def test_what_waits_for_a_server_that_breaks_is_decided_anew_at_once(tmp_path: Path) -> None:
    async def steps() -> None:
        async with gateway_of(tmp_path, "a") as inside, inside.beating("a"):
            broken = asyncio.Event()

            async def breaks(task: Task, told: Told) -> Answer:
                await broken.wait()
                raise LostError("a: died")

            inside.engine.behave["a"] = breaks
            for number in range(20):
                await inside.submit(f"t{number:02d}")
            await inside.beat("b")
            broken.set()
            async with inside.beating("b"):
                await inside.all_ended()
            tries = Counter(name for _, name in inside.engine.submitted)
            assert sorted(tries.values()) == [1] * 17 + [2] * 3, "only what was at the server is tried twice"

    ran(steps())


def test_tasks_of_a_server_that_is_not_heard_do_not_wait_for_it(tmp_path: Path) -> None:
    async def steps() -> None:
        async with gateway_of(tmp_path, "a", "b") as inside, inside.beating("b"):
            inside.engine.behave["a"] = forever
            for number in range(20):
                await inside.submit(f"t{number}")
            # Of those at `a` nothing is known; its heartbeats have ended, so the others leave.
            await until(lambda: inside.gateway.dispatcher.lane("a") == 0, "the lane is empty")
            await until(lambda: len(inside.gateway.dispatcher.jobs) <= 3, "the others are done")
            assert inside.gateway.dispatcher.parked == type(inside.gateway.dispatcher.parked)()

    ran(steps())


def test_a_server_that_speaks_but_never_ends_is_given_up(tmp_path: Path) -> None:
    async def steps() -> None:
        async with gateway_of(tmp_path, "a", "b", lease_s=0.3) as inside, inside.beating("a", "b"):
            inside.engine.behave["a"] = forever
            inside.gateway.plant.models["part"].__dict__["fixed_work"] = 1e-3  # so that nothing is added for work
            for number in range(4):
                await inside.submit(f"t{number}")
            await inside.all_ended()
            assert inside.gateway.ledger.counts() == {"done": 4}
            assert {name for name, _ in inside.engine.cancelled} == {"a"}, "it is told that nobody waits"

    ran(steps())


def test_a_task_that_is_only_slow_gets_more_time_with_each_try(tmp_path: Path) -> None:
    async def steps() -> None:
        async with gateway_of(tmp_path, "a", lease_s=0.1) as inside, inside.beating("a"):
            inside.gateway.plant.models["part"].__dict__["fixed_work"] = 1e-4

            async def slow(task: Task, told: Told) -> Answer:
                await asyncio.sleep(0.35)
                return Answer(b"x")

            inside.engine.behave["a"] = slow
            await inside.submit("t")
            entry = await inside.entry("t")
            assert entry["state"] == "done"
            assert entry["attempt"] == 3, "0.1, 0.2, then 0.4 s"

    ran(steps())


def test_a_server_that_refuses_is_not_asked_without_a_pause(tmp_path: Path) -> None:
    async def steps() -> None:
        async with gateway_of(tmp_path, "a") as inside, inside.beating("a"):
            inside.engine.behave["a"] = does(RefusedError("401"))
            await inside.submit("t")
            await asyncio.sleep(4.0)
            # 0.25, 0.5, 1 and 2 s between them, where a sweep every 0.25 s would have asked 16 times.
            assert 3 <= len(inside.engine.submitted) <= 6
            assert inside.gateway.fleet.servers["a"].usable(time.monotonic()), "refusing is no failure"
            # Another server gets it at once, however long the pause is.
            async with inside.beating("b"):
                entry = await inside.entry("t", 5.0)
            assert (entry["state"], entry["server"]) == ("done", "b")

    ran(steps())


def test_a_server_that_fails_quickly_does_not_look_fast(tmp_path: Path) -> None:
    async def steps() -> None:
        async with gateway_of(tmp_path, "a", "b") as inside, inside.beating("a", "b"):
            inside.engine.behave["a"] = does(Answer(None, "out of memory", service_s=1e-4))
            for number in range(12):
                await inside.submit(f"t{number}")
            await inside.all_ended()
            assert inside.gateway.ledger.counts() == {"done": 12}
            assert inside.gateway.fleet.servers["a"].pace == 1.0

    ran(steps())


def test_a_task_that_fails_everywhere_has_failed(tmp_path: Path) -> None:
    async def steps() -> None:
        async with gateway_of(tmp_path, "a", "b") as inside, inside.beating("a", "b"):
            for name in "ab":
                inside.engine.behave[name] = does(Answer(None, "label: not known"))
            await inside.submit("t")
            entry = await inside.entry("t")
            assert (entry["state"], entry["error"]) == ("failed", "label: not known")
            assert len(inside.engine.submitted) == 3
            assert (await inside.client.get("/v1/tasks/t/result")).status_code == 409

    ran(steps())


def test_cancelled_before_its_try_has_begun_it_gives_the_place_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A try that is broken off before its first step never gets to its own clean-up."""

    async def steps() -> None:
        async with gateway_of(tmp_path, "a") as inside, inside.beating("a"):
            dispatcher, server = inside.gateway.dispatcher, inside.gateway.fleet.servers["a"]
            free = asyncio.Event()

            async def hang(task: Task, told: Told) -> Answer:
                await free.wait()
                return Answer(b"x")

            inside.engine.behave["a"] = hang
            for number in range(8):
                await inside.submit(f"t{number}")
            await until(lambda: len(inside.engine.submitted) == 3, "three are sent")
            entry = await inside.gateway.ledger.cancel("t3")

            async def cancelled_already(task_id: str) -> Any:
                return entry

            with monkeypatch.context() as patch:
                patch.setattr("gmel.edge.fleet.AHEAD", 3)
                dispatcher._pump(server)  # its try is there, and has not begun
            with monkeypatch.context() as patch:
                patch.setattr(inside.gateway.ledger, "cancel", cancelled_already)
                await dispatcher.cancel("t3")
            await asyncio.sleep(0.05)
            assert dispatcher._at["a"] == 3
            free.set()
            await inside.all_ended()
            assert dispatcher._at["a"] == 0
            assert ("a", "t3") not in inside.engine.submitted
            assert inside.gateway.ledger.counts() == {"cancelled": 1, "done": 7}

    ran(steps())


def test_its_try_may_end_while_the_server_is_told(tmp_path: Path) -> None:
    async def steps() -> None:
        async with gateway_of(tmp_path, "a") as inside, inside.beating("a"):
            free = asyncio.Event()

            async def hang(task: Task, told: Told) -> Answer:
                await free.wait()
                return Answer(b"x")

            async def slow_to_hear(server: Any, task_id: str) -> None:
                free.set()
                await asyncio.sleep(0.1)

            inside.engine.behave["a"] = hang
            inside.engine.cancel = slow_to_hear  # type: ignore[method-assign]
            await inside.submit("t")
            await until(lambda: inside.engine.submitted, "sent")
            both = await asyncio.gather(*(inside.client.delete("/v1/tasks/t") for _ in range(2)))
            assert [(each.status_code, each.json()["state"]) for each in both] == [(200, "cancelled")] * 2
            await inside.all_ended()
            assert inside.gateway.fleet.servers["a"].flights == {}
            assert 'ended_total{state="cancelled"} 1.0' in (await inside.client.get("/metrics")).text
            assert 'ended_total{state="done"}' not in (await inside.client.get("/metrics")).text

    ran(steps())


def test_cancelled_while_its_result_is_written_it_ends_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def steps() -> None:
        async with gateway_of(tmp_path, "a") as inside, inside.beating("a"):
            ledger = inside.gateway.ledger
            real, begun, free = ledger.finish, asyncio.Event(), asyncio.Event()

            async def late(*args: Any, **more: Any) -> bool:
                begun.set()
                await free.wait()
                return await real(*args, **more)

            monkeypatch.setattr(ledger, "finish", late)
            watcher = inside.gateway.watch()
            await inside.submit("t")
            await begun.wait()
            assert (await inside.client.delete("/v1/tasks/t")).json()["state"] == "cancelled"
            free.set()
            await until(lambda: ledger.counts() == {"cancelled": 1, "duplicates": 1}, "the late result is counted")
            await asyncio.sleep(0.05)
            told = [watcher.get_nowait() for _ in range(watcher.qsize())]
            assert sum('"cancelled"' in line for line in told) == 1
            assert not any('"event": "done"' in line for line in told)

    ran(steps())


def test_without_a_decision_a_task_waits_for_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def steps() -> None:
        async with gateway_of(tmp_path, "a") as inside, inside.beating("a"):
            real, calls = inside.gateway.decider.decide, [0]

            def breaks(*args: Any, **more: Any) -> Any:
                calls[0] += 1
                if calls[0] <= 3:
                    raise ZeroDivisionError
                return real(*args, **more)

            monkeypatch.setattr(inside.gateway.decider, "decide", breaks)
            assert (await inside.submit("t")).status_code == 202
            assert (await inside.entry("t"))["state"] == "done"
            assert calls[0] == 4

    ran(steps())


def test_the_watch_over_servers_does_not_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def steps() -> None:
        async with gateway_of(tmp_path, "a") as inside:
            real, calls = inside.gateway.fleet.usable, [0]

            def breaks(*args: Any) -> Any:
                calls[0] += 1
                if calls[0] <= 2:
                    raise ValueError("a bug")
                return real(*args)

            _, entry = await inside.gateway.ledger.accept(task("t"))
            inside.gateway.fleet.servers["a"].heard -= 100.0  # nobody can take it yet
            job = inside.gateway.dispatcher.take(entry, time.monotonic())
            assert list(inside.gateway.dispatcher.parked) == [job]
            job.not_before = time.monotonic() + 100.0
            monkeypatch.setattr(inside.gateway.fleet, "usable", breaks)
            async with inside.beating("a"):
                await asyncio.wait_for(job.ended.wait(), 20.0)
            assert calls[0] > 2

    ran(steps())


def test_a_large_result_waits_for_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gmel.edge.dispatch._PATIENCE_S", 0.01)

    async def steps() -> None:
        async with gateway_of(tmp_path, "a") as inside, inside.beating("a"):
            inside.engine.behave["a"] = does(Answer(b"x" * 100_000))
            real, full = inside.gateway.store.put, [True]

            def put(data: bytes) -> str:
                if full[0]:
                    raise OSError(28, "No space left on device")
                return real(data)

            monkeypatch.setattr(inside.gateway.store, "put", put)
            await inside.submit("t")
            assert (await inside.entry("t", 0.3))["state"] != "done"
            full[0] = False
            assert (await inside.entry("t"))["state"] == "done"
            assert inside.engine.submitted == [("a", "t")], "the work is not done twice"

    ran(steps())


TROUBLE = st.sampled_from(["lost", "refused", "failed", "bug", "slow", "silent heartbeat", "well", "well"])


@settings(
    max_examples=8,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=[HealthCheck.too_slow],
)
@given(plan=st.lists(TROUBLE, min_size=10, max_size=40), cancelled=st.sets(st.integers(0, 29), max_size=5))
def test_in_any_trouble_every_task_ends_once(
    tmp_path_factory: pytest.TempPathFactory, plan: list[str], cancelled: set[int]
) -> None:
    """Three servers get into trouble as drawn, then are well: all tasks end, no count is left over."""

    async def steps() -> None:
        async with gateway_of(tmp_path_factory.mktemp("g"), "a", "b", "c") as inside, inside.beating("a", "b", "c"):
            troubles = iter(plan)

            async def behave(task: Task, told: Told) -> Answer:
                what = next(troubles, "well")
                told("running", {})
                await asyncio.sleep(0)
                if what == "lost":
                    raise LostError("died")
                if what == "refused":
                    raise RefusedError("full")
                if what == "bug":
                    raise KeyError("x")
                if what == "failed":
                    return Answer(None, "failed")
                if what == "slow":
                    await asyncio.sleep(0.05)
                if what == "silent heartbeat":
                    inside.gateway.fleet.servers["a"].heard -= 10.0
                return Answer(task.id.encode())

            for name in "abc":
                inside.engine.behave[name] = behave
            answers = await asyncio.gather(*(inside.submit(f"t{number}") for number in range(30)))
            assert {answer.status_code for answer in answers} == {202}
            await asyncio.gather(*(inside.client.delete(f"/v1/tasks/t{number}") for number in cancelled))
            await inside.all_ended()
            counts = inside.gateway.ledger.counts()
            assert sum(counts.get(state, 0) for state in ("done", "failed", "cancelled")) == 30
            assert counts.get("cancelled", 0) <= len(cancelled)
            for entry in inside.gateway.ledger.page(state="done"):
                assert inside.gateway.result(entry) == entry.task.id.encode()
            await asyncio.sleep(0.01)
            assert all(not server.flights for server in inside.gateway.fleet.servers.values())
            assert set(inside.gateway.dispatcher._at.values()) <= {0}
            assert not inside.gateway.dispatcher.parked

    ran(steps(), 120.0)
