"""Results and inputs by their content: the name of a file is the SHA-256 of what is in it."""

import hashlib
import os
import re
import secrets
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol
from urllib.parse import unquote, urlsplit

from gmel.scenario.errors import InputError

__all__ = ["PARTS", "FolderStore", "Held", "Store", "StoreError", "is_name", "name_of", "store_at"]

PARTS = 256
"""Of a store, by the first byte of names."""
_NAME = re.compile(r"[0-9a-f]{64}")


class StoreError(OSError):
    """The store cannot be reached, or does not answer in time. What it holds, it holds."""


@dataclass(frozen=True)
class Held:
    """One thing in a store: its name, its length in bytes, and the seconds since it was put or kept."""

    name: str
    size: int
    age_s: float


class Store(Protocol):
    """Where results and inputs lie. All calls block, and end: callers make them in threads."""

    def put(self, data: bytes) -> str:
        """Keeps data; when this returns it is on disk. Returns its name.

        Raises:
            OSError: it is not.
        """
        ...

    def get(self, name: str) -> bytes | None:
        """What has this name; None where there is nothing, or where it is not what its name says any more.

        Raises:
            StoreError: nobody knows.
        """
        ...

    def has(self, name: str) -> bool:
        """Whether something has this name; what is in it is not looked at.

        Raises:
            StoreError: nobody knows.
        """
        ...

    def keep(self, name: str) -> None:
        """Begins the age of something anew, where it is there.

        Raises:
            OSError: it could not be done.
        """
        ...

    def remove(self, name: str) -> None:
        """Removes something; nothing happens where it is not there.

        Raises:
            OSError: it is still there.
        """
        ...

    def held(self, parts: range = range(PARTS)) -> Iterator[Held]:
        """Everything that is here and has a name whose first byte lies in `parts`.

        Raises:
            StoreError: nobody knows.
        """
        ...


def name_of(data: bytes) -> str:
    """The name of data: 64 hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


def is_name(name: str) -> bool:
    """Whether this can be the name of something: no other string leads anywhere."""
    return _NAME.fullmatch(name) is not None


def store_at(url: str | None, folder: Path, part: str) -> Store:
    """The store of one kind of things.

    Args:
        url: where it lies, for instance `s3://bucket/prefix`; none for a folder on this machine.
        folder: that folder's parent.
        part: `results` or `inputs`.

    Raises:
        InputError: a URL that cannot be used, or the extra for it is missing.
    """
    if url is None:
        return FolderStore(folder / part)
    if not re.match(r"[a-z][a-z0-9+.-]*(::[a-z][a-z0-9+.-]*)*://", url):
        raise InputError(f"--store {url[:80]!r}: must be a URL, for instance s3://bucket/prefix or file:///mnt/results")
    parts = urlsplit(url)
    if parts.scheme == "file":  # our own way writes through to the disk and never shows half a file
        if parts.netloc not in ("", "localhost"):
            raise InputError(f"--store {url[:80]!r}: names another machine; three slashes begin a path of this one")
        return FolderStore(Path(unquote(parts.path)) / part)
    from gmel.edge.url_store import UrlStore  # noqa: PLC0415  # needs an extra

    return UrlStore(f"{url.rstrip('/')}/{part}")


class FolderStore:
    """A store in a folder, in 256 subfolders by the first byte of the name."""

    def __init__(self, folder: Path) -> None:
        """Makes the folder where it is not there.

        Raises:
            InputError: it cannot be made.
        """
        self.folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"{folder}: cannot be made ({error.strerror}); choose another folder") from error
        for part in folder.glob("??/.*.part"):  # of a process that was killed while it wrote
            part.unlink(missing_ok=True)

    def put(self, data: bytes) -> str:
        """As :meth:`Store.put`.

        Raises:
            OSError: full disk and the like; nothing half-written is left.
        """
        name = name_of(data)
        path = self._path(name)
        if self.get(name) is not None:
            return name
        path.parent.mkdir(exist_ok=True)
        part = path.with_name(f".{name}.{secrets.token_hex(8)}.part")  # two tasks may have made the same
        try:
            with part.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)
        folder = os.open(path.parent, os.O_RDONLY)  # the new name must survive a power cut as well
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
        return name

    def get(self, name: str) -> bytes | None:
        """As :meth:`Store.get`. A name that is no name is nothing: it never leads out of the folder."""
        if not is_name(name):
            return None
        try:
            data = self._path(name).read_bytes()
        except OSError:
            return None
        return data if name_of(data) == name else None

    def has(self, name: str) -> bool:
        """As :meth:`Store.has`."""
        return is_name(name) and self._path(name).is_file()

    def keep(self, name: str) -> None:
        """As :meth:`Store.keep`."""
        if self.has(name):
            os.utime(self._path(name))

    def remove(self, name: str) -> None:
        """As :meth:`Store.remove`."""
        if is_name(name):
            self._path(name).unlink(missing_ok=True)

    def held(self, parts: range = range(PARTS)) -> Iterator[Held]:
        """As :meth:`Store.held`."""
        now_s = time.time()
        for path in (each for part in parts for each in self.folder.glob(f"{part:02x}/*")):
            if is_name(path.name):
                try:
                    found = path.stat()
                except OSError:  # removed meanwhile
                    continue
                yield Held(path.name, found.st_size, max(now_s - found.st_mtime, 0.0))

    def _path(self, name: str) -> Path:
        return self.folder / name[:2] / name
