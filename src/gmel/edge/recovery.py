"""What can be read of a damaged ledger, as a new one.

Every task carries the digest of its request, and every small result its own as its name: a row that a damaged page has
bent is known and left out. A task that was done but whose result is gone is taken up again: the same task gives
the same result.
"""

import contextlib
import json
import os
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gmel.edge.ledger import COLUMNS, read_entry
from gmel.edge.ledger_file import connect, lock_ledger
from gmel.edge.store import Store, name_of
from gmel.edge.task import ACCEPTED, DONE, STATES
from gmel.scenario.errors import InputError

__all__ = ["Recovered", "recover_ledger"]

_LEAST_ROW_BYTES = 64
"""No row is shorter, so a file holds no more rows than its length allows."""


@dataclass(frozen=True)
class Recovered:
    """What came of it.

    Attributes:
        tasks: that were taken back.
        again: of these, those that run again since their result could not be read.
        results: small results that were taken back.
        bent: rows that could be read but were not what they said.
        kept: where the damaged file lies now.
    """

    tasks: int
    again: int
    results: int
    bent: int
    kept: Path

    def __str__(self) -> str:
        return (
            f"took {self.tasks} tasks and {self.results} results back, {self.again} tasks run again, {self.bent} rows "
            f"were damaged; the old ledger lies at {self.kept}"
        )


def recover_ledger(path: Path, store: Store) -> Recovered:
    """Puts a new ledger with all that can be read in the place of a damaged one, and keeps that beside it.

    Args:
        path: the ledger.
        store: where the larger results lie.

    Raises:
        InputError: no such file, or one that a gateway uses.
    """
    if not path.is_file():
        raise InputError(f"{path}: is not there, nothing can be taken back")
    with contextlib.closing(lock_ledger(path)):
        fresh = path.with_name(f"{path.name}.recovering")
        for left in (fresh, *_beside(fresh)):
            left.unlink(missing_ok=True)
        with contextlib.closing(connect(fresh)) as new:
            tasks, again, results, bent = _copy(path, new, store)
            new.execute("PRAGMA journal_mode = DELETE")  # everything in the one file that is renamed
        kept = _free(path)
        # Links first: whenever this is cut short, one of the two names still has the damaged file.
        for old in (path, *_beside(path)):
            if old.exists():
                os.link(old, kept.with_name(kept.name + old.name.removeprefix(path.name)))
        for old in _beside(path):  # else they would be taken for those of the new file
            old.unlink(missing_ok=True)
        fresh.replace(path)
    return Recovered(tasks, again, results, bent, kept)


def _copy(path: Path, new: sqlite3.Connection, store: Store) -> tuple[int, int, int, int]:
    tasks = again = results = bent = 0
    most = path.stat().st_size // _LEAST_ROW_BYTES
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as old:
        old.text_factory = _text
        new.execute("BEGIN")
        for _, name, data in _rows(old, "blob", "rowid", "rowid, name, data", most):
            if not isinstance(data, bytes) or name_of(data) != name:
                bent += 1
                continue
            results += new.execute("INSERT INTO blob VALUES (?, ?) ON CONFLICT DO NOTHING", (name, data)).rowcount
        for row in _rows(old, "task", "seq", COLUMNS, most):
            try:
                entry = read_entry(row)
                sound = entry.task.digest == entry.digest and entry.state in STATES and entry.task.id == row[1]
                said = None if entry.record is None else json.dumps(entry.record)
            except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
                sound, said, entry = False, None, None
            if not sound or entry is None:
                bent += 1
                continue
            values = [*row[:1], row[1], row[3], entry.task.device, entry.task.model, *row[2:3], *row[4:13], said]
            if entry.state == DONE and not _has(new, store, entry.result):
                again += 1
                values[6:] = [ACCEPTED, entry.attempt, None, None, entry.accepted_s, None, None, None, None, None]
            marks = ", ".join("?" * len(values))
            tasks += new.execute(
                "INSERT INTO task (seq, id, digest, device, model, request, state, attempt, server, lease_until_s, "
                f"accepted_s, finished_s, result, result_bytes, error, record) VALUES ({marks}) ON CONFLICT DO NOTHING",
                values,
            ).rowcount
        for _, name, value in _rows(old, "count", "rowid", "rowid, name, value", most):
            if isinstance(name, str) and isinstance(value, int):
                new.execute("INSERT INTO count VALUES (?, ?) ON CONFLICT DO NOTHING", (name, value))
        new.execute("COMMIT")
    return tasks, again, results, bent


def _rows(connection: sqlite3.Connection, table: str, key: str, columns: str, most: int) -> Iterator[tuple[Any, ...]]:
    """Every row that can be read: where a range cannot, its halves are tried.

    The whole table is tried first without an upper end; `most` bounds the halves.
    """
    try:
        yield from connection.execute(f"SELECT {columns} FROM {table} ORDER BY {key}").fetchall()
        return
    except sqlite3.Error:
        pass
    ranges = [(1, max(most, 1))]
    while ranges:
        low, high = ranges.pop()
        try:
            rows = connection.execute(
                f"SELECT {columns} FROM {table} WHERE {key} BETWEEN ? AND ? ORDER BY {key}", (low, high)
            ).fetchall()
        except sqlite3.Error:
            if low < high:
                middle = (low + high) // 2
                ranges += [(middle + 1, high), (low, middle)]
            continue
        yield from rows


def _has(new: sqlite3.Connection, store: Store, name: str | None) -> bool:
    if name is None:
        return False
    return (
        new.execute("SELECT 1 FROM blob WHERE name = ?", (name,)).fetchone() is not None or store.get(name) is not None
    )


def _text(data: bytes) -> str:
    """Damaged text is text that is not what it says, not the end of reading."""
    return data.decode("utf-8", errors="replace")


def _beside(path: Path) -> tuple[Path, Path]:
    return path.with_name(f"{path.name}-wal"), path.with_name(f"{path.name}-shm")


def _free(path: Path) -> Path:
    number = 1
    while (kept := path.with_name(f"{path.name}.damaged-{number}")).exists():
        number += 1
    return kept
