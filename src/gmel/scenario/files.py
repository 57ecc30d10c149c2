"""Files: whether there is one, and writing so that nobody ever reads half of one."""

import os
from pathlib import Path

__all__ = ["is_file", "replace_file"]


def is_file(path: Path) -> bool:
    """Whether there is a file; False as well for names that no file can have."""
    try:
        return path.is_file()
    except OSError:
        return False


def replace_file(path: Path, data: bytes) -> None:
    """Writes a file under a temporary name beside its own and renames it.

    Raises:
        OSError: it cannot be written; names the file that was asked for, which a full disk alone does not.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_bytes(data)
        part.replace(path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        part.unlink(missing_ok=True)
