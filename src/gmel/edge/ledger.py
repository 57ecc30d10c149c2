"""What was promised: every accepted task and its one result, on disk before anybody is told.

SQLite in WAL mode with `synchronous = FULL`: a commit is on the disk when it returns. One thread writes; it takes all
that is waiting into one transaction (group commit), so that a hundred clients share one wait for the disk. What it is
asked comes back as a future of the caller's loop, after the commit.

A lease (which server works on a task) is not worth a wait for the disk of its own: after a crash every task that has no
result is taken up again whoever held it. So leases are written with the next commit.
"""

import asyncio
import contextlib
import json
import logging
import queue
import sqlite3
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

from gmel.edge.ledger_file import connect, lock_ledger
from gmel.edge.task import ACCEPTED, CANCELLED, FINAL, LEASED, Task, read_task

__all__ = [
    "COLUMNS",
    "Entry",
    "Forgotten",
    "Ledger",
    "LedgerError",
    "Verdict",
    "read_entry",
]

_log = logging.getLogger("gmel.gateway")

_MOST_TOGETHER = 512
"""Most changes in one transaction."""

COLUMNS = (
    "seq, id, request, digest, state, attempt, server, lease_until_s, accepted_s, finished_s, result, result_bytes, "
    "error, record"
)
_OPEN = f"state NOT IN ({', '.join(repr(state) for state in sorted(FINAL))})"

Value = TypeVar("Value")
Verdict = Literal["new", "same", "other"]
"""Of an acceptance: a new task, one that is here already, or another task under an id that is taken."""


class LedgerError(Exception):
    """The ledger cannot be written or read now (full disk, damaged file). What it holds, it holds."""


@dataclass(frozen=True)
class Entry:
    """A task as the ledger knows it. Times are seconds of the wall clock since 1970: for people, for what is left of a
    deadline after a restart, and for how long a task is kept."""

    seq: int
    task: Task
    digest: str
    state: str
    accepted_s: float
    attempt: int = 0
    server: str | None = None
    lease_until_s: float | None = None
    finished_s: float | None = None
    result: str | None = None
    result_bytes: int | None = None
    error: str | None = None
    record: dict[str, Any] | None = None

    def as_json(self) -> dict[str, Any]:
        """For clients."""
        return {
            "id": self.task.id,
            "state": self.state,
            "attempt": self.attempt,
            "server": self.server,
            "accepted_s": self.accepted_s,
            "finished_s": self.finished_s,
            "result": self.result,
            "result_bytes": self.result_bytes,
            "error": self.error,
            "request": self.task.as_json(),
            "record": self.record,
            "sequence": self.seq,
        }


@dataclass(frozen=True)
class Forgotten:
    """What has left a ledger.

    Attributes:
        tasks: how many.
        results: names of the results that no task refers to any more.
        result_bytes: their length together.
    """

    tasks: int
    results: tuple[str, ...]
    result_bytes: int


_Change = Callable[[sqlite3.Connection], Any]
_Waiting = tuple[_Change, "asyncio.Future[Any] | None"]


class Ledger:
    """Tasks in a file (see the module). Open it inside a running event loop; `close` waits for what is under way."""

    def __init__(self, path: Path) -> None:
        """Opens or makes the ledger.

        Raises:
            InputError: not a ledger, of another version, damaged, or in use.
        """
        self.path = path
        self._loop = asyncio.get_running_loop()
        self._lock = lock_ledger(path)
        try:
            self._writer = connect(path)
        except BaseException:
            self._lock.close()
            raise
        # One for each thread that reads, so that the loop does not wait for a long answer of another.
        self._mine = threading.local()
        self._readers: list[sqlite3.Connection] = []
        self._closed = False
        self._changes: queue.SimpleQueue[_Waiting | None] = queue.SimpleQueue()
        self._later: list[_Change] = []
        self.commits = 0
        self._thread = threading.Thread(target=self._write, name="ledger", daemon=True)
        self._thread.start()

    async def accept(self, task: Task, now_s: float | None = None) -> tuple[Verdict, Entry]:
        """Takes a task down; when this returns, it is on disk.

        Raises:
            LedgerError: it is not on disk.
        """
        accepted_s = time.time() if now_s is None else now_s
        digest, request = task.digest, json.dumps(task.as_json())

        def change(connection: sqlite3.Connection) -> tuple[Verdict, Entry]:
            made = connection.execute(
                "INSERT INTO task (id, digest, device, model, request, state, accepted_s) VALUES (?, ?, ?, ?, ?, ?, ?) "
                "ON CONFLICT (id) DO NOTHING",
                (task.id, digest, task.device, task.model, request, ACCEPTED, accepted_s),
            )
            if made.rowcount:
                return "new", Entry(made.lastrowid or 0, task, digest, ACCEPTED, accepted_s)
            entry = read_entry(connection.execute(f"SELECT {COLUMNS} FROM task WHERE id = ?", (task.id,)).fetchone())
            return ("same" if entry.digest == digest else "other"), entry

        return await self._change(change)

    def lease(self, task_id: str, server: str, attempt: int, lease_until_s: float) -> None:
        """Notes who works on a task; on disk with the next commit."""

        def change(connection: sqlite3.Connection) -> None:
            connection.execute(
                f"UPDATE task SET state = ?, server = ?, attempt = ?, lease_until_s = ? WHERE id = ? AND {_OPEN}",
                (LEASED, server, attempt, lease_until_s, task_id),
            )

        self._later.append(change)

    def release(self, task_id: str) -> None:
        """Notes that nobody works on a task any more; on disk with the next commit."""

        def change(connection: sqlite3.Connection) -> None:
            connection.execute(
                f"UPDATE task SET state = ?, server = NULL, lease_until_s = NULL WHERE id = ? AND {_OPEN}",
                (ACCEPTED, task_id),
            )

        self._later.append(change)

    async def finish(
        self,
        task_id: str,
        state: str,
        *,
        server: str | None = None,
        result: str | None = None,
        result_bytes: int | None = None,
        data: bytes | None = None,
        error: str | None = None,
        record: dict[str, Any] | None = None,
        now_s: float | None = None,
    ) -> bool:
        """Writes how a task ended, once: of a task that has ended nothing changes, and the call says False.

        Args:
            task_id: the task.
            state: one of `FINAL`.
            server: who did it.
            result: name of the result in the store.
            result_bytes: its length.
            data: the result itself where it is small: kept here, it needs no wait for the disk of its own.
            error: what went wrong.
            record: what was measured.
            now_s: when, in seconds of the wall clock; now where it is left out.

        Raises:
            LedgerError: it is not on disk; ask again.
        """
        finished_s = time.time() if now_s is None else now_s
        said = None if record is None else json.dumps(record)

        def change(connection: sqlite3.Connection) -> bool:
            done = connection.execute(
                f"UPDATE task SET state = ?, server = coalesce(?, server), result = ?, result_bytes = ?, error = ?, "
                f"record = ?, finished_s = ?, lease_until_s = NULL WHERE id = ? AND {_OPEN}",
                (state, server, result, result_bytes, error, said, finished_s, task_id),
            )
            if not done.rowcount:
                _count(connection, "duplicates")
            elif data is not None:
                connection.execute("INSERT INTO blob VALUES (?, ?) ON CONFLICT (name) DO NOTHING", (result, data))
            return bool(done.rowcount)

        return await self._change(change)

    async def cancel(self, task_id: str) -> Entry | None:
        """Cancels a task that has not ended; the entry as it is then, None for an id that is not here."""

        def change(connection: sqlite3.Connection) -> Entry | None:
            connection.execute(
                f"UPDATE task SET state = ?, finished_s = ?, lease_until_s = NULL WHERE id = ? AND {_OPEN}",
                (CANCELLED, time.time(), task_id),
            )
            row = connection.execute(f"SELECT {COLUMNS} FROM task WHERE id = ?", (task_id,)).fetchone()
            return None if row is None else read_entry(row)

        return await self._change(change)

    async def lose(self, task_id: str) -> None:
        """Counts a server that broke off while it ran a task.

        Raises:
            LedgerError: it is not on disk.
        """

        def change(connection: sqlite3.Connection) -> None:
            connection.execute(
                "INSERT INTO loss VALUES (?, 1) ON CONFLICT (id) DO UPDATE SET value = value + 1", (task_id,)
            )

        await self._change(change)

    async def forget(self, before_s: float, most: int, most_bytes: int | None = None) -> Forgotten:
        """Takes tasks out that have ended, those that ended first first; small results that nobody refers to any more
        go with them.

        Args:
            before_s: only tasks that ended before, in seconds of the wall clock.
            most: of them; few, so that nobody waits long for the writer.
            most_bytes: no more tasks once results of so many bytes are free.

        Raises:
            LedgerError: nothing was taken out.
        """

        def change(connection: sqlite3.Connection) -> Forgotten:
            rows = connection.execute(
                f"SELECT seq, id, result, result_bytes FROM task WHERE finished_s < ? AND NOT {_OPEN} "
                "ORDER BY finished_s LIMIT ?",
                (before_s, most),
            ).fetchall()
            tasks, free, freed = 0, list[str](), 0
            for seq, task_id, result, length in rows:
                if most_bytes is not None and freed >= most_bytes:
                    break
                connection.execute("DELETE FROM task WHERE seq = ?", (seq,))
                connection.execute("DELETE FROM loss WHERE id = ?", (task_id,))
                tasks += 1
                if result is None or connection.execute("SELECT 1 FROM task WHERE result = ?", (result,)).fetchone():
                    continue
                connection.execute("DELETE FROM blob WHERE name = ?", (result,))
                free.append(result)
                freed += length or 0
            return Forgotten(tasks, tuple(free), freed)

        return await self._change(change)

    def note(self, name: str, more: int = 1) -> None:
        """Counts something that is to be known after a restart as well; on disk with the next commit."""
        self._later.append(lambda connection: _count(connection, name, more))

    def get(self, task_id: str) -> Entry | None:
        """A task by its id."""
        row = self._read(f"SELECT {COLUMNS} FROM task WHERE id = ?", task_id)
        return read_entry(row[0]) if row else None

    def page(
        self, state: str | None = None, device: str | None = None, before: int | None = None, limit: int = 100
    ) -> list[Entry]:
        """Tasks, the newest first.

        Args:
            state: only of this state.
            device: only of this device.
            before: only those with a smaller sequence number: the last of the page before.
            limit: most of them.
        """
        rules, values = ["1"], list[Any]()
        for rule, value in (("state = ?", state), ("device = ?", device), ("seq < ?", before)):
            if value is not None:
                rules.append(rule)
                values.append(value)
        where = " AND ".join(rules)
        rows = self._read(f"SELECT {COLUMNS} FROM task WHERE {where} ORDER BY seq DESC LIMIT ?", *values, limit)
        return [read_entry(row) for row in rows]

    def blob(self, name: str) -> bytes | None:
        """A small result by its name."""
        row = self._read("SELECT data FROM blob WHERE name = ?", name)
        return bytes(row[0][0]) if row else None

    def unfinished(self) -> list[Entry]:
        """Every task without an end, in order of acceptance."""
        return [read_entry(row) for row in self._read(f"SELECT {COLUMNS} FROM task WHERE {_OPEN} ORDER BY seq")]

    def losses(self) -> dict[str, int]:
        """Servers that broke off while they ran a task, by its id; only tasks without an end."""
        rows = self._read(f"SELECT loss.id, value FROM loss JOIN task ON task.id = loss.id WHERE {_OPEN}")
        return dict(cast("list[tuple[str, int]]", rows))

    def referred(self, names: Sequence[str]) -> set[str]:
        """Those of some results that tasks refer to."""
        marks = ", ".join("?" * len(names))
        return {row[0] for row in self._read(f"SELECT result FROM task WHERE result IN ({marks})", *names)}

    def result_bytes(self) -> int:
        """Length of all results together; one that several tasks have counts once."""
        each = "SELECT max(result_bytes) AS size FROM task WHERE result IS NOT NULL GROUP BY result"
        return int(self._read(f"SELECT coalesce(sum(size), 0) FROM ({each})")[0][0])

    def records(self) -> list[dict[str, Any]]:
        """What was measured of each task that was done, in order of acceptance."""
        return [
            json.loads(row[0]) for row in self._read("SELECT record FROM task WHERE record IS NOT NULL ORDER BY seq")
        ]

    def counts(self) -> dict[str, int]:
        """Tasks by state, and what else was counted (`duplicates`)."""
        states = dict(cast("list[tuple[str, int]]", self._read("SELECT state, count(*) FROM task GROUP BY state")))
        return states | dict(cast("list[tuple[str, int]]", self._read("SELECT name, value FROM count")))

    async def flush(self) -> None:
        """Waits until all that was asked is on disk."""
        await self._change(lambda connection: None)

    async def close(self) -> None:
        """Writes what is waiting and closes the file, whether or not the disk takes it."""
        if self._closed:
            return
        if self._later:
            # What was noted and cannot be written is not worth more: no task depends on it.
            with contextlib.suppress(LedgerError):
                await self.flush()
        self._closed = True
        self._changes.put(None)
        await asyncio.to_thread(self._thread.join)
        for connection in (self._writer, *self._readers):
            connection.close()
        self._lock.close()

    def _read(self, statement: str, *values: Any) -> list[Any]:
        try:
            reader: sqlite3.Connection | None = getattr(self._mine, "reader", None)
            if reader is None:
                if self._closed:
                    raise LedgerError(f"{self.path}: is closed")
                reader = sqlite3.connect(self.path, isolation_level=None, check_same_thread=False, timeout=10.0)
                reader.execute("PRAGMA query_only = ON")
                self._mine.reader = reader
                self._readers.append(reader)
            return reader.execute(statement, values).fetchall()
        except sqlite3.Error as error:
            raise LedgerError(f"{self.path}: {error}") from error

    async def _change(self, change: Callable[[sqlite3.Connection], Value]) -> Value:
        if self._closed:
            raise LedgerError(f"{self.path}: is closed")
        future: asyncio.Future[Value] = self._loop.create_future()
        later, self._later = self._later, []
        for each in later:
            self._changes.put((each, None))
        self._changes.put((change, future))
        return await future

    def _write(self) -> None:
        """The writing thread."""
        over = False
        while not over:
            batch: list[_Waiting] = []
            waiting = self._changes.get()
            while waiting is not None:
                batch.append(waiting)
                if len(batch) == _MOST_TOGETHER:
                    break
                try:
                    waiting = self._changes.get_nowait()
                except queue.Empty:
                    break
            over = waiting is None
            if batch:
                self._commit(batch)

    def _commit(self, batch: list[_Waiting]) -> None:
        values: list[Any] = []
        try:
            self._writer.execute("BEGIN IMMEDIATE")
            for change, _ in batch:
                values.append(change(self._writer))
            self._writer.execute("COMMIT")
            self.commits += 1
        except Exception as error:  # whatever it is, nobody may wait for ever, and the thread must go on
            with contextlib.suppress(sqlite3.Error):
                if self._writer.in_transaction:
                    self._writer.execute("ROLLBACK")
            if not isinstance(error, sqlite3.Error):
                _log.exception("%s: a change failed", self.path)
            # What nobody waits for is tried again with the next commit, unless it was itself at fault.
            at_fault = len(values) if len(values) < len(batch) and not _of_the_disk(error) else -1
            again = [change for place, (change, future) in enumerate(batch) if future is None and place != at_fault]
            failure = LedgerError(f"{self.path}: {error}")
            self._tell(self._fail, [future for _, future in batch if future is not None], failure, again)
            return
        self._tell(_settle, [(future, value) for (_, future), value in zip(batch, values, strict=True) if future])

    def _fail(self, futures: "list[asyncio.Future[Any]]", failure: LedgerError, again: list[_Change]) -> None:
        self._later = again + self._later
        for future in futures:
            if not future.done():
                future.set_exception(failure)

    def _tell(self, call: Callable[..., None], *arguments: Any) -> None:
        try:
            self._loop.call_soon_threadsafe(call, *arguments)
        except RuntimeError:  # the loop has ended: nobody waits any more
            return


def _settle(pairs: "list[tuple[asyncio.Future[Any], Any]]") -> None:
    for future, value in pairs:
        if not future.done():  # who asked may have gone
            future.set_result(value)


def _count(connection: sqlite3.Connection, name: str, more: int = 1) -> None:
    connection.execute(
        "INSERT INTO count VALUES (?, ?) ON CONFLICT (name) DO UPDATE SET value = value + excluded.value", (name, more)
    )


def _of_the_disk(error: Exception) -> bool:
    """Whether the disk is to blame (full, not readable, locked), not what was asked."""
    return isinstance(error, sqlite3.OperationalError)


def read_entry(row: Any) -> Entry:
    """A task from its row, in the order of `COLUMNS`.

    Raises:
        InputError: its request is none.
    """
    return Entry(
        seq=row[0],
        task=read_task(json.loads(row[2])),
        digest=row[3],
        state=row[4],
        attempt=row[5],
        server=row[6],
        lease_until_s=row[7],
        accepted_s=row[8],
        finished_s=row[9],
        result=row[10],
        result_bytes=row[11],
        error=row[12],
        record=None if row[13] is None else json.loads(row[13]),
    )
