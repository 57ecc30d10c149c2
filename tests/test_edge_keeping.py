"""What has ended leaves after its time, and nothing else does."""

import asyncio
import os
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from tests.edge_gateways import gateway_of
from tests.edge_plants import ran, task, until

from gmel.edge.dispatch import _SMALL
from gmel.edge.engines.engine import Answer, Told
from gmel.edge.gateway.gateway import Settings
from gmel.edge.gateway.process import run_gateway
from gmel.edge.keeping import Keeper
from gmel.edge.ledger import Ledger
from gmel.edge.serving import Place
from gmel.edge.store import FolderStore, name_of
from gmel.edge.task import CANCELLED, DONE, EXPIRED, FAILED, Task
from gmel.scenario.errors import InputError

DAY_S = 86400.0


def with_ledger(what: Any, folder: Path) -> None:
    async def opened() -> None:
        ledger = Ledger(folder / "ledger.sqlite")
        try:
            await what(ledger, FolderStore(folder / "results"))
        finally:
            await ledger.close()

    ran(opened())


async def ended(ledger: Ledger, store: FolderStore, task_id: str, data: bytes | None, days: float, **how: Any) -> None:
    """A task that ended so many days ago; a result beyond `small` bytes lies in the store."""
    small, state = how.get("small", True), how.get("state", DONE)
    await ledger.accept(task(task_id))
    name = None if data is None else name_of(data)
    if data is not None and not small:
        store.put(data)
        old_s = time.time() - days * DAY_S
        os.utime(store._path(str(name)), (old_s, old_s))
    length = None if data is None else len(data)
    await ledger.finish(task_id, state, result=name, result_bytes=length, data=data if small else None)

    def change(connection: Any) -> None:
        connection.execute("UPDATE task SET finished_s = ? WHERE id = ?", (time.time() - days * DAY_S, task_id))

    await ledger._change(change)


def ids(ledger: Ledger) -> set[str]:
    return {entry.task.id for entry in ledger.page(limit=1000)}


def test_old_tasks_leave_with_their_results(tmp_path: Path) -> None:
    async def steps(ledger: Ledger, store: FolderStore) -> None:
        for number, state in enumerate((DONE, FAILED, EXPIRED, CANCELLED)):
            data = b"%d" % number if state == DONE else None
            await ended(ledger, store, f"old-{state}", data, 31.0, state=state)
            await ended(ledger, store, f"new-{state}", None if data is None else b"n" + data, 29.0, state=state)
        await ended(ledger, store, "old-large", b"large", 31.0, small=False)
        await ended(ledger, store, "old-shared", b"shared", 31.0, small=False)
        await ended(ledger, store, "new-shared", b"shared", 1.0, small=False)
        await ledger.accept(task("open"), time.time() - 400 * DAY_S)
        await ledger.accept(task("leased"), time.time() - 400 * DAY_S)
        ledger.lease("leased", "a", 1, 0.0)
        await ledger.lose("old-failed")
        await ledger.flush()
        keeper = Keeper(ledger, store, set(), set(), days=30.0)
        await keeper.look()
        assert ids(ledger) == {f"new-{state}" for state in (DONE, FAILED, EXPIRED, CANCELLED)} | {
            "new-shared",
            "open",
            "leased",
        }
        assert keeper.tasks == 6
        assert ledger.blob(name_of(b"0")) is None
        assert ledger.blob(name_of(b"n0")) == b"n0"
        assert store.get(name_of(b"large")) is None
        assert store.get(name_of(b"shared")) == b"shared", "another task refers to it"
        assert ledger._read("SELECT * FROM loss") == []
        await keeper.look()
        assert keeper.tasks == 6
        verdict, entry = await ledger.accept(task("old-done"))
        assert (verdict, entry.seq > 11) == ("new", True), "an id that has left is a new task, behind all others"

    with_ledger(steps, tmp_path)


def test_the_oldest_results_leave_where_there_are_too_many(tmp_path: Path) -> None:
    async def steps(ledger: Ledger, store: FolderStore) -> None:
        for day in range(10):
            await ended(ledger, store, f"t{day}", b"%d" % day * 1000, 10.0 - day, small=day % 2 == 0)
        await ended(ledger, store, "same", b"9" * 1000, 0.5, small=False)
        await ledger.accept(task("open"))
        assert ledger.result_bytes() == 10_000, "the same result counts once"
        keeper = Keeper(ledger, store, set(), set(), gb=6.5e-6)
        await keeper.look()
        assert ledger.result_bytes() == 6000
        assert ids(ledger) == {*(f"t{day}" for day in range(4, 10)), "same", "open"}
        assert store.get(name_of(b"3" * 1000)) is None
        assert store.get(name_of(b"5" * 1000)) is not None
        # Where nothing is left that could leave, the look ends.
        await Keeper(ledger, store, set(), set(), gb=1e-9).look()
        assert ids(ledger) == {"open"}

    with_ledger(steps, tmp_path)


def test_results_of_nobody_leave_but_not_those_that_are_being_written(tmp_path: Path) -> None:
    async def steps(ledger: Ledger, store: FolderStore) -> None:
        orphan, fresh, coming = (store.put(data) for data in (b"orphan", b"fresh", b"coming"))
        await ended(ledger, store, "t", b"kept", 2.0, small=False)
        (store.folder / "notes.txt").write_text("not a result")
        for name in (orphan, coming):
            os.utime(store._path(name), (0.0, 0.0))
        writing = Counter([coming])
        keeper = Keeper(ledger, store, writing, set(), days=30.0)
        for _ in range(32):
            await keeper.look()
        found = {each.name for each in store.held()}
        assert found == {fresh, coming, name_of(b"kept")}
        writing -= Counter([coming])
        for _ in range(32):
            await keeper.look()
        assert store.get(coming) is None
        assert (store.folder / "notes.txt").exists()
        store.remove("../../ledger.sqlite")
        assert (tmp_path / "ledger.sqlite").exists(), "a name never leads out of the folder"

    with_ledger(steps, tmp_path)


def test_a_clock_that_is_put_ahead_makes_nothing_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def steps(ledger: Ledger, store: FolderStore) -> None:
        await ended(ledger, store, "t", b"x", 1.0)
        keeper = Keeper(ledger, store, set(), set(), days=30.0)
        real = time.time
        monkeypatch.setattr("gmel.edge.keeping.time.time", lambda: real() + 3650 * DAY_S)
        await keeper.look()
        assert ids(ledger) == {"t"}

    with_ledger(steps, tmp_path)


def test_many_leave_in_small_transactions_and_others_are_accepted_meanwhile(tmp_path: Path) -> None:
    async def steps(ledger: Ledger, store: FolderStore) -> None:
        def fill(connection: Any) -> None:
            rows = [(f"old{number}", "x", "d", "part", "{}", DONE, 0.0, 1.0) for number in range(1050)]
            connection.executemany(
                "INSERT INTO task (id, digest, device, model, request, state, accepted_s, finished_s) "
                "VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                rows,
            )

        await ledger._change(fill)
        commits = ledger.commits
        looking = asyncio.create_task(Keeper(ledger, store, set(), set(), days=1.0).look())
        accepted = 0
        while not looking.done():
            await ledger.accept(task(f"new{accepted}"))
            accepted += 1
            await asyncio.sleep(0.005)
        await looking
        assert ledger.counts() == {"accepted": accepted}
        assert accepted >= 5
        assert ledger.commits - commits >= 11

    with_ledger(steps, tmp_path)


def test_a_task_that_has_left_is_not_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gmel.edge.keeping._FIRST_S", 0.05)
    monkeypatch.setattr("gmel.edge.keeping.EVERY_S", 0.05)
    data = b"x" * (_SMALL + 1)

    async def steps() -> None:
        async with gateway_of(tmp_path, "a", keep_days=1e-5) as inside, inside.beating("a"):

            async def large(task: Task, told: Told) -> Answer:
                return Answer(data)

            inside.engine.behave["a"] = large
            await inside.submit("t")
            await until(lambda: inside.gateway.keeper.tasks == 1, "it has left")
            for method, path in (("GET", ""), ("DELETE", ""), ("GET", "/result"), ("GET", "/preview.png")):
                answer = await inside.client.request(method, f"/v1/tasks/t{path}")
                assert answer.status_code == 404
                assert "not here; tasks are kept for 1e-05 days" in answer.json()["error"]
            await until(lambda: inside.gateway.store.get(name_of(data)) is None, "its result has left as well")
            assert not inside.gateway.dispatcher.writing
            assert (await inside.submit("t")).status_code == 202
            await inside.all_ended()

    ran(steps())


@pytest.mark.parametrize("words", [{"keep_days": float("nan")}, {"keep_gb": float("inf")}, {"keep_gb": float("nan")}])
def test_a_time_that_is_no_number_is_said_in_one_line(tmp_path: Path, words: dict[str, float]) -> None:
    with pytest.raises(InputError, match=f"--keep-{'days' if 'keep_days' in words else 'gb'} is") as caught:
        run_gateway("live", Place(), Settings(tmp_path / "g", **words), print)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "g").exists()


def test_for_ever_is_for_ever(tmp_path: Path) -> None:
    async def steps(ledger: Ledger, store: FolderStore) -> None:
        await ended(ledger, store, "t", b"x", 1e4)
        await asyncio.wait_for(Keeper(ledger, store, set(), set()).keep(), 5.0)
        assert ids(ledger) == {"t"}

    with_ledger(steps, tmp_path)


def test_a_result_that_is_made_again_while_the_old_one_leaves_stays(tmp_path: Path) -> None:
    """The old task leaves between the moment that its result is found in the store and the new task's end."""
    data = b"x" * (_SMALL + 1)

    async def steps() -> None:
        async with gateway_of(tmp_path, "a") as inside, inside.beating("a"):

            async def large(task: Task, told: Told) -> Answer:
                return Answer(data)

            inside.engine.behave["a"] = large
            await inside.submit("old")
            assert (await inside.entry("old"))["state"] == "done"
            ledger, gateway = inside.gateway.ledger, inside.gateway
            real = ledger.finish

            async def slow(task_id: str, *args: Any, **more: Any) -> bool:
                gone = await ledger.forget(time.time() + 1.0, 10)
                assert gone.tasks == 1
                await gateway.keeper._remove(gone.results)
                return await real(task_id, *args, **more)

            ledger.finish = slow  # type: ignore[method-assign]
            await inside.submit("new")
            assert (await inside.entry("new"))["state"] == "done"
            assert (await inside.client.get("/v1/tasks/new/result")).content == data

    ran(steps())


def test_a_result_that_is_made_again_while_it_is_taken_away_is_put_there_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = b"x" * (_SMALL + 1)
    begun, go_on = threading.Event(), threading.Event()
    real = FolderStore.remove

    def slow(store: FolderStore, name: str) -> None:
        begun.set()
        assert go_on.wait(10.0)
        real(store, name)

    async def steps() -> None:
        async with gateway_of(tmp_path, "a") as inside, inside.beating("a"):

            async def large(task: Task, told: Told) -> Answer:
                return Answer(data)

            inside.engine.behave["a"] = large
            await inside.submit("old")
            assert (await inside.entry("old"))["state"] == "done"
            gateway = inside.gateway
            gone = await gateway.ledger.forget(time.time() + 1.0, 10)
            monkeypatch.setattr(FolderStore, "remove", slow)
            removing = asyncio.create_task(gateway.keeper._remove(gone.results))
            await asyncio.to_thread(begun.wait, 10.0)
            await inside.submit("new")
            await until(lambda: gateway.dispatcher.writing.total() > 0, "its result is there")
            assert "new" in gateway.dispatcher.jobs, "it waits"
            go_on.set()
            await removing
            await inside.all_ended()
            assert (await inside.client.get("/v1/tasks/new/result")).content == data
            assert not gateway.dispatcher.leaving

    ran(steps())
