"""The file of a ledger: its tables, who may have it, and whether it is sound."""

import contextlib
import fcntl
import sqlite3
from pathlib import Path
from typing import Any

from gmel.scenario.errors import InputError

__all__ = ["check_ledger", "connect", "lock_ledger"]

_VERSION = 1

_SCHEMA = """
CREATE TABLE IF NOT EXISTS task (
    seq INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    digest TEXT NOT NULL,
    device TEXT NOT NULL,
    model TEXT NOT NULL,
    request TEXT NOT NULL,
    state TEXT NOT NULL,
    attempt INTEGER NOT NULL DEFAULT 0,
    server TEXT,
    lease_until_s REAL,
    accepted_s REAL NOT NULL,
    finished_s REAL,
    result TEXT,
    result_bytes INTEGER,
    error TEXT,
    record TEXT
);
CREATE INDEX IF NOT EXISTS task_state ON task (state, seq);
CREATE INDEX IF NOT EXISTS task_finished ON task (finished_s);
CREATE INDEX IF NOT EXISTS task_result ON task (result);
CREATE TABLE IF NOT EXISTS loss (id TEXT PRIMARY KEY, value INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS blob (name TEXT PRIMARY KEY, data BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS count (name TEXT PRIMARY KEY, value INTEGER NOT NULL);
"""


def lock_ledger(path: Path) -> Any:
    """Keeps other gateways away from a ledger: each would run every task. The system takes it back when a process dies.

    Raises:
        InputError: another one has it, or it cannot be made.
    """
    try:
        file = path.with_name(f"{path.name}.lock").open("wb")
    except OSError as error:
        raise InputError(f"{path}: cannot be used as a ledger ({error.strerror}); choose another folder") from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        raise InputError(f"{path}: is in use by another gateway; end that one, or choose another --folder") from error
    return file


def check_ledger(path: Path) -> None:
    """Opens a ledger and closes it again, before anything else is begun.

    Raises:
        InputError: as for :class:`Ledger`.
    """
    with contextlib.closing(lock_ledger(path)):
        connect(path).close()


def connect(path: Path) -> sqlite3.Connection:
    """A connection that may write; the file is made where there is none.

    Raises:
        InputError: not a ledger, of another version, or damaged.
    """
    connection: sqlite3.Connection | None = None
    try:
        connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=10.0)
        return _prepared(path, connection)
    except sqlite3.DatabaseError as error:
        if connection is not None:
            connection.close()
        if isinstance(error, sqlite3.OperationalError):
            raise InputError(f"{path}: cannot be used as a ledger ({error}); choose another --folder") from error
        raise InputError(f"{path}: damaged ({error}); take back what can be read with --recover") from error
    except InputError:
        if connection is not None:
            connection.close()
        raise


def _prepared(path: Path, connection: sqlite3.Connection) -> sqlite3.Connection:
    if path.stat().st_size and (found := connection.execute("PRAGMA quick_check(1)").fetchone()) != ("ok",):
        said = " ".join(str(found[0]).split()) if found else "no answer"
        raise InputError(f"{path}: damaged ({said[:200]}); take back what can be read with --recover")
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = FULL")
    version = connection.execute("PRAGMA user_version").fetchone()[0]
    tables = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
    if tables and version != _VERSION:
        raise InputError(f"{path}: ledger of version {version}, this gmel keeps {_VERSION}; choose another file")
    # In one transaction: a kill between table and version would leave a file that no gateway takes.
    connection.executescript(f"BEGIN; {_SCHEMA} PRAGMA user_version = {_VERSION}; COMMIT;")
    return connection
