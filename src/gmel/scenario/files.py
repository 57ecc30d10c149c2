"""Writing files so that nobody ever reads half of one."""

import os
from pathlib import Path

__all__ = ["replace_file"]


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
