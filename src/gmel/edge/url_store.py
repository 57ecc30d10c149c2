"""Results and inputs wherever fsspec reaches: S3 and what speaks like it, in-memory for tests, and many others.

For an object store each thing is one object that is there whole or not at all; the answer of the store to the write is
the promise that it lasts. Whatever goes wrong there (no network, no right, no answer in time) is a `StoreError`: what
was to be stored is still held by who wanted it stored, and is tried again.
"""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from datetime import UTC, datetime
from importlib import import_module
from importlib.util import find_spec
from typing import Any, TypeVar

from gmel.edge.store import PARTS, Held, StoreError, is_name, name_of
from gmel.scenario.errors import InputError

__all__ = ["UrlStore"]

Value = TypeVar("Value")

_TIMEOUT_S = 30.0
_CALLS = 32
"""At once. A call that hangs keeps its thread: more than these are not risked."""
_OBJECTS = {"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss"}
"""Kinds without folders: to make one there would make a bucket of a mistyped name."""
_TIMES = ("LastModified", "last_modified", "updated", "mtime", "created")
"""What file systems call the time of the last write."""


class UrlStore:
    """See the module.

    Args:
        url: where; keys come from where its driver takes them (for S3 the usual AWS variables and files).
        timeout_s: after which a call has failed.
        options: of the file system.

    Raises:
        InputError: fsspec, or its driver for this kind of URL, is not installed, or the URL is none.
    """

    def __init__(self, url: str, timeout_s: float = _TIMEOUT_S, **options: Any) -> None:
        if find_spec("fsspec") is None:
            raise InputError(
                f"--store {url}: needs the extra 'store': pip install 'gmel[store]', or uv sync --extra edge "
                "--extra store"
            )
        core: Any = import_module("fsspec.core")
        kind = url.split(":", 1)[0]
        if kind in ("s3", "s3a"):
            options = {"config_kwargs": {"connect_timeout": 5, "read_timeout": timeout_s / 2}} | options
        try:
            self._files, root = core.url_to_fs(url, use_listings_cache=False, **options)
        except (ImportError, ValueError, TypeError) as error:
            said = " ".join(str(error).split())[:200]
            raise InputError(f"--store {url}: cannot be used ({said})") from error
        self._root, self._folders = str(root).rstrip("/"), kind not in _OBJECTS
        self._timeout_s = timeout_s
        self._room = threading.Semaphore(_CALLS)

    def put(self, data: bytes) -> str:
        """As :meth:`Store.put`.

        Raises:
            StoreError: it is not there.
        """
        name = name_of(data)

        def write() -> None:
            try:
                self._files.pipe_file(self._path(name), data)
            except FileNotFoundError:
                if not self._folders:
                    raise
                self._files.makedirs(self._root, exist_ok=True)
                self._files.pipe_file(self._path(name), data)

        self._within(write)
        return name

    def get(self, name: str) -> bytes | None:
        """As :meth:`Store.get`."""
        if not is_name(name):
            return None
        data = self._within(lambda: self._there(self._files.cat_file, name))
        return data if data is not None and name_of(data) == name else None

    def has(self, name: str) -> bool:
        """As :meth:`Store.has`."""
        return is_name(name) and self._within(lambda: self._there(self._files.info, name)) is not None

    def keep(self, name: str) -> None:
        """As :meth:`Store.keep`: it is written anew, since object stores know no other way."""
        data = self.get(name)
        if data is not None:
            self.put(data)

    def remove(self, name: str) -> None:
        """As :meth:`Store.remove`."""
        if is_name(name):
            self._within(lambda: self._there(self._files.rm_file, name))

    def held(self, parts: range = range(PARTS)) -> Iterator[Held]:
        """As :meth:`Store.held`. Where the file system tells no times, everything is new."""

        def listed() -> list[dict[str, Any]]:
            try:
                return list(self._files.find(self._root, detail=True).values())
            except FileNotFoundError:
                return []

        now_s = time.time()
        for each in self._within(listed):
            name = str(each["name"]).rsplit("/", 1)[-1]
            if is_name(name) and int(name[:2], 16) in parts:
                yield Held(name, int(each.get("size") or 0), max(now_s - _written_s(each, now_s), 0.0))

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    def _there(self, call: Callable[[str], Value], name: str) -> Value | None:
        try:
            return call(self._path(name))
        except FileNotFoundError:
            return None

    def _within(self, call: Callable[[], Value]) -> Value:
        """The answer of a call, in a thread of its own: drivers have no time-out that all of them keep.

        Raises:
            StoreError: it failed, or has no end yet.
        """
        if not self._room.acquire(timeout=self._timeout_s):
            raise StoreError(f"store {self._root}: {_CALLS} calls have no answer")
        answer: Future[Value] = Future()

        def work() -> None:
            try:
                answer.set_result(call())
            except BaseException as error:
                answer.set_exception(error)
            finally:
                self._room.release()

        threading.Thread(target=work, name="store", daemon=True).start()  # one that hangs must not hold up the end
        try:
            return answer.result(self._timeout_s)
        except TimeoutError as error:
            raise StoreError(f"store {self._root}: no answer after {self._timeout_s:g} s") from error
        except Exception as error:  # drivers raise whatever they like
            said = " ".join(str(error).split())[:200]
            raise StoreError(f"store {self._root}: {type(error).__name__} {said}".strip()) from error


def _written_s(found: dict[str, Any], now_s: float) -> float:
    """Seconds since 1970 of the last write."""
    for key in _TIMES:
        value = found.get(key)
        if isinstance(value, str):
            with contextlib.suppress(ValueError):
                value = datetime.fromisoformat(value)
        if isinstance(value, datetime):
            return (value if value.tzinfo else value.replace(tzinfo=UTC)).timestamp()
        if isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
    return now_s
