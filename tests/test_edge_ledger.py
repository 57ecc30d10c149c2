"""The ledger: on disk before anybody is told, one end for each task, and what can be read when it is damaged."""

import asyncio
import sqlite3
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.edge_plants import damage, ran, task

from gmel.edge.ledger import Ledger, LedgerError
from gmel.edge.ledger_file import check_ledger
from gmel.edge.recovery import recover_ledger
from gmel.edge.store import FolderStore, name_of
from gmel.scenario.errors import InputError


def with_ledger(path: Path, what: Callable[[Ledger], Awaitable[Any]]) -> Any:
    async def opened() -> Any:
        ledger = Ledger(path)
        try:
            return await what(ledger)
        finally:
            await ledger.close()

    return ran(opened())


def test_an_accepted_task_is_on_disk_for_another_reader(tmp_path: Path) -> None:
    async def accept(ledger: Ledger) -> None:
        verdict, entry = await ledger.accept(task("a", seed=3))
        assert verdict == "new"
        # Another process sees it before the ledger is closed.
        found = sqlite3.connect(ledger.path).execute("SELECT id, state FROM task").fetchall()
        assert found == [("a", "accepted")]
        assert entry.task == task("a", seed=3)

    with_ledger(tmp_path / "l", accept)


def test_the_same_id_is_one_task(tmp_path: Path) -> None:
    async def accept(ledger: Ledger) -> list[str]:
        answers = await asyncio.gather(
            ledger.accept(task("a")), ledger.accept(task("a")), ledger.accept(task("a", seed=1))
        )
        return [verdict for verdict, _ in answers]

    assert with_ledger(tmp_path / "l", accept) == ["new", "same", "other"]


def test_tasks_that_come_together_share_commits(tmp_path: Path) -> None:
    async def accept(ledger: Ledger) -> int:
        before = ledger.commits
        await asyncio.gather(*(ledger.accept(task(f"t{number}")) for number in range(400)))
        return ledger.commits - before

    # 400 wait at once: one commit takes the first, the next ones what has gathered meanwhile.
    assert with_ledger(tmp_path / "l", accept) < 100


def test_a_task_ends_once(tmp_path: Path) -> None:
    async def finish(ledger: Ledger) -> None:
        await ledger.accept(task("a"))
        first = await ledger.finish("a", "done", server="x", result=name_of(b"1"), result_bytes=1, data=b"1")
        late = await ledger.finish("a", "done", server="y", result=name_of(b"2"), result_bytes=1, data=b"2")
        assert (first, late) == (True, False)
        assert not await ledger.finish("a", "failed", error="no")
        entry = await ledger.cancel("a")
        assert entry is not None
        assert (entry.state, entry.server, entry.result) == ("done", "x", name_of(b"1"))
        assert ledger.blob(name_of(b"1")) == b"1"
        assert ledger.blob(name_of(b"2")) is None, "a late result leaves nothing"
        assert ledger.counts() == {"done": 1, "duplicates": 2}

    with_ledger(tmp_path / "l", finish)


ENDS = st.sampled_from(["done", "failed", "expired", "cancel", "lease", "release", "accept"])


@settings(max_examples=25)
@given(steps=st.lists(st.tuples(st.sampled_from("abc"), ENDS), max_size=20))
def test_in_any_order_the_first_end_stays(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[str, str]]
) -> None:
    async def follow(ledger: Ledger) -> dict[str, str]:
        first: dict[str, str] = {}
        accepted: set[str] = set()
        for name, step in steps:
            if step == "accept":
                await ledger.accept(task(name))
                accepted.add(name)
            elif step == "lease":
                ledger.lease(name, "s", 1, 0.0)
            elif step == "release":
                ledger.release(name)
            elif step == "cancel":
                entry = await ledger.cancel(name)
                assert (entry is None) == (name not in accepted)
                if name in accepted:
                    first.setdefault(name, "cancelled")
            else:
                won = await ledger.finish(name, step, result=name_of(step.encode()), data=step.encode())
                assert won == (name in accepted and name not in first)
                if name in accepted:
                    first.setdefault(name, step)
        await ledger.flush()
        assert {entry.task.id for entry in ledger.unfinished()} == accepted - set(first)
        return first

    path = tmp_path_factory.mktemp("ledger") / "l"
    first = with_ledger(path, follow)

    async def again(ledger: Ledger) -> dict[str, str]:
        return {name: entry.state for name in first if (entry := ledger.get(name)) is not None}

    assert with_ledger(path, again) == first, "and after it was opened again"


def test_opened_again_it_holds_what_it_held(tmp_path: Path) -> None:
    async def fill(ledger: Ledger) -> None:
        for number in range(5):
            await ledger.accept(task(f"t{number}"))
        await ledger.finish("t1", "done", result=name_of(b""), result_bytes=0, data=b"")
        ledger.lease("t2", "x", 3, 1e9)
        ledger.note("duplicates", 4)

    async def look(ledger: Ledger) -> None:
        assert [(entry.task.id, entry.state, entry.attempt) for entry in ledger.unfinished()] == [
            ("t0", "accepted", 0),
            ("t2", "leased", 3),
            ("t3", "accepted", 0),
            ("t4", "accepted", 0),
        ]
        assert ledger.blob(name_of(b"")) == b""
        assert ledger.counts()["duplicates"] == 4
        newest, older = ledger.page(limit=2), ledger.page(before=4, limit=2)
        assert [entry.task.id for entry in [*newest, *older]] == ["t4", "t3", "t2", "t1"]
        assert [entry.task.id for entry in ledger.page(state="done")] == ["t1"]
        assert ledger.page(device="nobody") == []

    with_ledger(tmp_path / "l", fill)
    with_ledger(tmp_path / "l", look)


def test_a_full_disk_loses_nothing_and_is_over_when_there_is_room(tmp_path: Path) -> None:
    async def fill(ledger: Ledger) -> None:
        await ledger.accept(task("before"))
        # The limit of pages is how SQLite itself says that the disk is full.
        limit = ledger._writer.execute("PRAGMA page_count").fetchone()[0]
        ledger._writer.execute(f"PRAGMA max_page_count = {limit}")
        refused: list[str] = []
        for number in range(200):
            try:
                await ledger.accept(task(f"t{number}", label="x" * 60))
            except LedgerError as error:
                assert "full" in str(error)
                refused.append(f"t{number}")
        assert refused
        ledger.lease("before", "x", 1, 0.0)
        with pytest.raises(LedgerError):
            await ledger.finish("before", "done", result="r", data=b"x" * 20_000)
        assert all(ledger.get(name) is None for name in refused), "who was refused is not there"
        ledger._writer.execute("PRAGMA max_page_count = 100000")
        assert await ledger.finish("before", "done", result="r", data=b"x" * 20_000)
        verdict, _ = await ledger.accept(task(refused[0], label="x" * 60))
        assert verdict == "new"
        entry = ledger.get("before")
        assert entry is not None
        assert entry.attempt == 1, "a lease that the disk did not take is written later"

    with_ledger(tmp_path / "l", fill)


def test_it_closes_while_the_disk_is_full(tmp_path: Path) -> None:
    async def fill(ledger: Ledger) -> None:
        for number in range(10):
            await ledger.accept(task(f"t{number}"))
        ledger._writer.execute("PRAGMA query_only = ON")  # takes no write any more
        ledger.lease("t0", "x", 1, 0.0)
        threads.append(ledger._thread)

    threads: list[threading.Thread] = []
    with_ledger(tmp_path / "l", fill)
    assert not threads[0].is_alive()


def test_a_change_that_fails_by_itself_stops_nobody(tmp_path: Path) -> None:
    async def fail(ledger: Ledger) -> None:
        def broken(connection: sqlite3.Connection) -> None:
            raise KeyError("no column")

        with pytest.raises(LedgerError):
            await asyncio.wait_for(ledger._change(broken), 10)
        ledger._later.append(broken)  # as a lease that cannot be written
        with pytest.raises(LedgerError):
            await asyncio.wait_for(ledger.accept(task("a")), 10)
        verdict, _ = await asyncio.wait_for(ledger.accept(task("a")), 10)
        assert verdict == "new"

    with_ledger(tmp_path / "l", fail)


def test_after_the_end_nobody_waits(tmp_path: Path) -> None:
    async def ended() -> None:
        ledger = Ledger(tmp_path / "l")
        await ledger.close()
        await ledger.close()
        with pytest.raises(LedgerError, match="closed"):
            await asyncio.wait_for(ledger.accept(task("a")), 10)
        with pytest.raises(LedgerError, match="closed"):
            await asyncio.to_thread(ledger.get, "a")

    ran(ended())


def test_threads_read_what_they_asked_for(tmp_path: Path) -> None:
    """Each has a connection of its own: none waits for the question of another, or gets its answer."""

    async def read(ledger: Ledger) -> None:
        for number in range(8):
            data = b"%d" % number * 2000
            await ledger.accept(task(f"t{number}"))
            await ledger.finish(f"t{number}", "done", result=name_of(data), data=data)
        wrong: list[bytes | None] = []

        def ask(number: int) -> None:
            data = b"%d" % number * 2000
            for _ in range(300):
                found = ledger.blob(name_of(data))
                wrong.extend([found] if found != data else [])

        await asyncio.gather(*(asyncio.to_thread(ask, number) for number in range(8)))
        assert not wrong
        readers = len(ledger._readers)
        assert readers > 1, "each thread has its own"

    with_ledger(tmp_path / "l", read)


def test_two_gateways_cannot_have_one_ledger(tmp_path: Path) -> None:
    async def second(ledger: Ledger) -> None:
        with pytest.raises(InputError, match="in use by another gateway"):
            Ledger(ledger.path)
        with pytest.raises(InputError, match="in use"):
            recover_ledger(ledger.path, FolderStore(tmp_path / "results"))

    with_ledger(tmp_path / "l", second)
    check_ledger(tmp_path / "l")  # free again


def test_another_file_is_no_ledger(tmp_path: Path) -> None:
    path, content = tmp_path / "l", b"not a ledger at all, but long enough to be looked at" * 100
    path.write_bytes(content)
    with pytest.raises(InputError, match="--recover"):
        check_ledger(path)
    assert path.read_bytes() == content, "and is left as it is"


def test_a_ledger_of_another_version_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "l"
    check_ledger(path)
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA user_version = 7")
    connection.close()
    with pytest.raises(InputError, match="version 7"):
        check_ledger(path)


def filled(path: Path, store: FolderStore, tasks: int = 400) -> None:
    """Every third task is open, every third done with a small result, every third with one in the store."""

    async def fill(ledger: Ledger) -> None:
        await asyncio.gather(*(ledger.accept(task(f"t{number:03d}", label="x" * 60)) for number in range(tasks)))
        ends: list[Awaitable[Any]] = []
        for number in range(tasks):
            data = f"result of t{number:03d}".encode() * 10
            if number % 3 == 1:
                ends.append(
                    ledger.finish(f"t{number:03d}", "done", result=name_of(data), data=data, record={"n": number})
                )
            elif number % 3 == 2:
                ends.append(ledger.finish(f"t{number:03d}", "done", result=store.put(data)))
        await asyncio.gather(*ends)
        ledger.note("duplicates", 2)
        await ledger.flush()

    with_ledger(path, fill)
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    connection.close()


@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
def test_a_damaged_page_costs_its_rows_alone(tmp_path: Path, share: float) -> None:
    path, store = tmp_path / "ledger.sqlite", FolderStore(tmp_path / "results")
    filled(path, store)
    whole = path.stat().st_size
    damage(path, share)
    bent = path.read_bytes()
    with pytest.raises(InputError, match=r"damaged .*--recover"):
        check_ledger(path)
    found = recover_ledger(path, store)
    assert found.kept.stat().st_size == whole
    assert found.kept.read_bytes() == bent, "the damaged file is kept"
    assert 400 - 80 <= found.tasks <= 400
    assert str(found.tasks) in str(found)

    async def look(ledger: Ledger) -> None:
        entries = {entry.task.id: entry for entry in ledger.page(limit=1000)}
        assert len(entries) == found.tasks
        for name, entry in entries.items():
            number = int(name[1:])
            assert entry.task == task(name, label="x" * 60)
            if number % 3 == 0:
                assert entry.state == "accepted"
            elif entry.state == "done":
                data = f"result of {name}".encode() * 10
                assert entry.result is not None
                assert (ledger.blob(entry.result) or store.get(entry.result)) == data
            else:
                assert entry.state == "accepted", "it runs again"
        again = sum(entry.state == "accepted" and int(name[1:]) % 3 != 0 for name, entry in entries.items())
        assert again == found.again
        verdict, entry = await ledger.accept(task("new"))
        assert verdict == "new"
        assert entry.seq > max(each.seq for each in entries.values())

    with_ledger(path, look)


def test_of_a_sound_ledger_everything_is_taken_back(tmp_path: Path) -> None:
    path, store = tmp_path / "ledger.sqlite", FolderStore(tmp_path / "results")
    filled(path, store, 60)

    async def everything(ledger: Ledger) -> Any:
        return ledger.page(limit=1000), ledger.counts(), ledger.records()

    before = with_ledger(path, everything)
    found = recover_ledger(path, store)
    assert (found.tasks, found.again, found.results, found.bent) == (60, 0, 20, 0)
    assert with_ledger(path, everything) == before


def test_commits_that_are_not_in_the_file_yet_are_taken_back(tmp_path: Path) -> None:
    """A killed gateway leaves them in the write-ahead log beside it."""
    path = tmp_path / "ledger.sqlite"

    async def copy(ledger: Ledger) -> None:
        for number in range(5):
            await ledger.accept(task(f"t{number}"))
        for name in ("ledger.sqlite", "ledger.sqlite-wal"):
            (tmp_path / "killed").mkdir(exist_ok=True)
            (tmp_path / "killed" / name).write_bytes((tmp_path / name).read_bytes())

    with_ledger(path, copy)
    assert recover_ledger(tmp_path / "killed" / "ledger.sqlite", FolderStore(tmp_path / "results")).tasks == 5


def test_rows_that_are_not_what_they_say_are_left_out(tmp_path: Path) -> None:
    path, store = tmp_path / "ledger.sqlite", FolderStore(tmp_path / "results")
    filled(path, store, 60)
    connection = sqlite3.connect(path)
    connection.execute("UPDATE task SET request = replace(request, 'xx', 'yy') WHERE id = 't003'")
    connection.execute("UPDATE task SET request = 'not json' WHERE id = 't004'")
    connection.execute("UPDATE task SET state = 'dome' WHERE id = 't006'")
    connection.execute("UPDATE blob SET data = x'00' WHERE name = (SELECT result FROM task WHERE id = 't007')")
    connection.commit()
    connection.close()
    found = recover_ledger(path, store)
    assert (found.tasks, found.again, found.bent) == (57, 1, 4)


def test_of_nothing_nothing_is_taken_back(tmp_path: Path) -> None:
    store = FolderStore(tmp_path / "results")
    with pytest.raises(InputError, match="not there"):
        recover_ledger(tmp_path / "ledger.sqlite", store)
    (tmp_path / "ledger.sqlite").write_bytes(b"\x00" * 9000)
    assert recover_ledger(tmp_path / "ledger.sqlite", store).tasks == 0
    (tmp_path / "ledger.sqlite").write_bytes(b"garbage" * 9000)
    assert recover_ledger(tmp_path / "ledger.sqlite", store).tasks == 0
    assert (tmp_path / "ledger.sqlite.damaged-2").read_bytes() == b"garbage" * 9000
    check_ledger(tmp_path / "ledger.sqlite")
