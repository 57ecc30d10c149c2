"""Results by their content: the name of a file is the SHA-256 of what is in it."""

import contextlib
import hashlib
import os
import re
import secrets
from pathlib import Path
from typing import Protocol

__all__ = ["PARTS", "FolderStore", "Store", "name_of"]

PARTS = 256
"""Of a store, by the first byte of names."""
_NAME = re.compile(r"[0-9a-f]{64}")


class Store(Protocol):
    """Where results and inputs lie."""

    def put(self, data: bytes) -> str:
        """Keeps data; when this returns it is on disk. Returns its name."""
        ...

    def get(self, name: str) -> bytes | None:
        """What has this name; None where there is nothing, or where it is not what its name says any more."""
        ...

    def listed(self, part: int) -> list[tuple[str, float]]:
        """Names of one of `PARTS` parts, and when each was put there, in seconds of the wall clock."""
        ...

    def remove(self, name: str) -> None:
        """Takes away what has this name, if there is something."""
        ...


def name_of(data: bytes) -> str:
    """The name of data: 64 hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


class FolderStore:
    """A store in a folder, in 256 subfolders by the first byte of the name."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
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
        if not _NAME.fullmatch(name):
            return None
        try:
            data = self._path(name).read_bytes()
        except OSError:
            return None
        return data if name_of(data) == name else None

    def listed(self, part: int) -> list[tuple[str, float]]:
        """As :meth:`Store.listed`."""
        found: list[tuple[str, float]] = []
        for path in sorted((self.folder / f"{part:02x}").glob("*")):
            if _NAME.fullmatch(path.name):
                with contextlib.suppress(OSError):  # gone meanwhile
                    found.append((path.name, path.stat().st_mtime))
        return found

    def remove(self, name: str) -> None:
        """As :meth:`Store.remove`.

        Raises:
            OSError: it cannot be taken away.
        """
        if _NAME.fullmatch(name):
            self._path(name).unlink(missing_ok=True)

    def _path(self, name: str) -> Path:
        return self.folder / name[:2] / name
