"""The queue of an edge server: one run for each id, models in limited memory, cancelling, draining."""

import asyncio
import threading
import time
from collections import Counter
from typing import Any

import httpx
import pytest
from tests.edge_plants import ran, task, until

from gmel.edge.server.app import follow, server_app
from gmel.edge.server.runner import Run, Runner
from gmel.edge.server.work import CancelledError, Loaded, Product, Tell
from gmel.edge.task import Task
from gmel.scenario.errors import InputError


class Shelf:
    """Models of one GB that do what a test says."""

    def __init__(self, *names: str, size: int = 3) -> None:
        self._names, self._size = names, size
        self.gate = threading.Event()
        self.gate.set()
        self.begun: list[str] = []
        self.loaded: list[str] = []

    def names(self) -> tuple[str, ...] | None:
        return self._names or None

    def load(self, name: str) -> Loaded:
        self.loaded.append(name)
        if name == "broken":
            raise RuntimeError("not a model")
        return _Model(self, 100.0 if name == "huge" else 1.0)


class _Model:
    def __init__(self, shelf: Shelf, memory_gb: float) -> None:
        self._shelf, self.memory_gb = shelf, memory_gb

    def run(self, task: Task, tell: Tell, stop: threading.Event) -> Product:
        self._shelf.begun.append(task.id)
        while not self._shelf.gate.wait(0.01):
            if stop.is_set():
                raise CancelledError
        if task.label == "wrong":
            raise InputError("label: not known")
        if task.label == "memory":
            raise MemoryError
        tell(1.0)
        return Product(task.id.encode() * self._shelf._size, "text/plain")


def with_runner(what: Any, shelf: Shelf, **options: Any) -> Any:
    async def started() -> Any:
        runner = Runner(shelf, **options)
        runner.start()
        try:
            return await what(runner)
        finally:
            shelf.gate.set()
            await runner.close()

    return ran(started())


async def story(run: Run) -> list[dict[str, Any]]:
    return [line async for line in follow(run)]


def test_an_id_is_run_once_however_often_it_is_sent() -> None:
    shelf = Shelf()

    async def sent(runner: Runner) -> None:
        runs = [await runner.take(task("a"), attempt) for attempt in (1, 2, 3)]
        assert runs[0] is runs[1] is runs[2]
        stories = await asyncio.gather(*(story(run) for run in runs))
        assert [lines[-1]["event"] for lines in stories] == ["done"] * 3
        again = await runner.take(task("a"), 4)
        assert (await story(again))[-1]["bytes"] == 3
        assert again.product is not None
        assert again.product.data == b"aaa"
        assert shelf.begun == ["a"]
        other = await runner.take(task("a", seed=1), 1)
        await story(other)
        assert shelf.begun == ["a", "a"], "another task under the same id is another task"

    with_runner(sent, shelf)


def test_a_failed_task_may_be_tried_again() -> None:
    shelf = Shelf()

    async def sent(runner: Runner) -> None:
        for label, error in (("wrong", "label: not known"), ("memory", "out of memory")):
            last = (await story(await runner.take(task(label, label=label), 1)))[-1]
            assert (last["event"], last["error"]) == ("failed", error)
        last = (await story(await runner.take(task("x", model="broken"), 1)))[-1]
        assert (last["event"], last["error"]) == ("failed", "RuntimeError: not a model")
        last = (await story(await runner.take(task("y", model="huge"), 1)))[-1]
        assert "takes 100 GB" in last["error"]
        await story(await runner.take(task("wrong", label="wrong"), 2))
        assert Counter(shelf.begun)["wrong"] == 2
        # None of it has stopped the server.
        assert (await story(await runner.take(task("z"), 1)))[-1]["event"] == "done"
        assert not runner.runs

    with_runner(sent, shelf)


def test_the_least_recently_used_model_leaves() -> None:
    shelf = Shelf()

    async def sent(runner: Runner) -> None:
        for number, model in enumerate(["a", "b", "a", "c", "a", "b"]):
            await story(await runner.take(task(f"t{number}", model=model), 1))
            assert len(runner.resident) <= 2
        assert shelf.loaded == ["a", "b", "c", "b"]
        assert runner.resident == ("a", "b")

    with_runner(sent, shelf, memory_gb=2.0)


def test_cancelled_in_the_queue_or_at_work() -> None:
    shelf = Shelf()
    shelf.gate.clear()

    async def sent(runner: Runner) -> None:
        first, second, third = [await runner.take(task(name), 1) for name in "abc"]
        await until(lambda: shelf.begun == ["a"], "a runs")
        assert runner.cancel("b")
        assert (await story(second))[-1]["event"] == "gone"
        assert runner.cancel("a")
        assert (await story(first))[-1]["event"] == "gone"
        await until(lambda: "a" not in runner.runs, "its thread has seen it")
        assert not runner.cancel("a")
        assert not runner.cancel("nobody")
        shelf.gate.set()
        assert (await story(third))[-1]["event"] == "done"
        assert shelf.begun == ["a", "c"], "b never began"
        assert not runner.runs

    with_runner(sent, shelf)


def test_sent_again_while_it_is_cancelled_it_runs_and_counts() -> None:
    shelf = Shelf()
    shelf.gate.clear()

    async def sent(runner: Runner) -> None:
        first = await runner.take(task("a"), 1)
        await until(lambda: shelf.begun == ["a"], "a runs")
        runner.cancel("a")
        second = await runner.take(task("a"), 2)
        assert second is not first
        await until(lambda: shelf.begun == ["a", "a"], "a runs again")
        assert runner.find("a") is second, "the end of the first one does not take the second one away"
        assert len(runner.runs) == 1
        shelf.gate.set()
        assert (await story(second))[-1]["event"] == "done"

    with_runner(sent, shelf)


def test_draining_takes_no_more_and_finishes_what_is_here() -> None:
    shelf = Shelf()
    shelf.gate.clear()

    async def sent(runner: Runner) -> None:
        runs = [await runner.take(task(name), 1) for name in "ab"]
        drained = asyncio.create_task(runner.drain())
        await until(lambda: runner.draining, "draining")
        with pytest.raises(InputError, match="draining"):
            await runner.take(task("c"), 1)
        assert await runner.take(task("a"), 2) is runs[0], "what is here may be asked for"
        assert not drained.done()
        shelf.gate.set()
        await drained
        assert all(run.product is not None for run in runs)

    with_runner(sent, shelf)


def test_full_is_said() -> None:
    shelf = Shelf("part")
    shelf.gate.clear()

    async def sent(runner: Runner) -> None:
        for number in range(3):
            await runner.take(task(f"t{number}"), 1)
        with pytest.raises(InputError, match="full"):
            await runner.take(task("more"), 1)
        with pytest.raises(InputError, match="not here"):
            await Runner(shelf).take(task("x", model="other"), 1)

    with_runner(sent, shelf, most=3)


def test_what_is_kept_of_results_has_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gmel.edge.server.runner._KEPT_BYTES", 1000)
    shelf = Shelf(size=100)

    async def sent(runner: Runner) -> None:
        for number in range(30):
            await story(await runner.take(task(f"t{number:02d}"), 1))
        kept = [run.product for run in runner._done.values()]
        assert sum(len(product.data) for product in kept if product) == runner._kept <= 1000
        # The same id with other tasks, again and again, leaves no trace in the count.
        for seed in range(20):
            await story(await runner.take(task("again", seed=seed), 1))
        kept = [run.product for run in runner._done.values()]
        assert sum(len(product.data) for product in kept if product) == runner._kept
        assert runner.find("again") is not None

    with_runner(sent, shelf)


def test_who_listens_and_leaves_is_forgotten() -> None:
    shelf = Shelf()
    shelf.gate.clear()

    async def sent(runner: Runner) -> None:
        run = await runner.take(task("a"), 1)
        listeners = [follow(run) for _ in range(5)]
        for each in listeners:
            await anext(each)
        assert len(run.watchers) == 5
        for each in listeners:
            await each.aclose()
        assert run.watchers == []

    with_runner(sent, shelf)


class Chatty:
    """A model that tells a thousand steps within moments."""

    memory_gb = 1.0

    def run(self, task: Task, tell: Tell, stop: threading.Event) -> Product:
        for step in range(1000):
            tell(step / 1000)
            time.sleep(3e-4)
        tell(1.0)
        return Product(b"x", "text/plain")


def test_progress_is_told_no_more_often_than_anybody_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    shelf = Shelf()
    monkeypatch.setattr(shelf, "load", lambda name: Chatty())

    async def sent(runner: Runner) -> None:
        began = time.monotonic()
        lines = await story(await runner.take(task("a"), 1))
        took_s = time.monotonic() - began
        shares = [line["share"] for line in lines if line["event"] == "progress"]
        assert 2 <= len(shares) <= took_s / 0.05 + 2
        assert shares == sorted(shares)
        assert shares[-1] == 1.0

    with_runner(sent, shelf)


def test_who_reads_slowly_gets_the_newest_progress_and_the_end() -> None:
    async def read() -> None:
        run = Run(task("a"), 1, time.monotonic())
        lines = follow(run)
        assert (await anext(lines))["event"] == "queued"
        for share in (0.1, 0.2, 0.3):
            run.watchers[0].put_nowait({"event": "progress", "share": share})
        assert await anext(lines) == {"event": "progress", "share": 0.3}
        for share in (0.4, 0.5):
            run.watchers[0].put_nowait({"event": "progress", "share": share})
        run.watchers[0].put_nowait({"event": "done"})
        assert [line async for line in lines] == [{"event": "done"}]

    ran(read())


def test_over_http() -> None:
    """Lines, then the bytes; what is no task is refused with a reason; health."""
    shelf = Shelf("part", size=2000)

    async def sent(runner: Runner) -> None:
        transport = httpx.ASGITransport(server_app("x", runner))
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
            answer = await client.post("/v1/run", json={"task": task("a").as_json(), "attempt": 1})
            assert answer.content.endswith(b"a" * 2000)
            assert b'"event": "done", "bytes": 2000' in answer.content
            for body, status in [
                (b"", 400),
                (b"[]", 400),
                (b'{"task": 1}', 400),
                (b"[" * 60_000, 400),
                (b'{"task": {"id": "a", "device": "d", "model": "part", "deadline_s": 1' + b"0" * 400 + b"}}", 400),
                (b" " * 70_000, 413),
                (b'{"task": {"id": "a", "device": "d", "model": "other"}}', 503),
            ]:
                answer = await client.post("/v1/run", content=body)
                assert answer.status_code == status, body[:50]
                assert answer.json()["error"]
            assert (await client.get("/readyz")).status_code == 200
            runner.draining = True
            assert (await client.get("/readyz")).status_code == 503
            assert (await client.get("/healthz")).status_code == 200
            assert (await client.get("/v1/state")).json()["done"] == 1
            assert "gmel_server_done 1.0" in (await client.get("/metrics")).text

    with_runner(sent, shelf)
