"""Names that come from files, and the files that lie in folders: nothing leads out of the data set."""

from collections.abc import Iterable
from pathlib import Path, PurePosixPath, PureWindowsPath

from gmel.scenario.errors import InputError

__all__ = ["SUFFIXES", "file_text", "images_in", "inside", "printable", "subfolders"]

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".pgm", ".ppm", ".pnm", ".gif"})
"""Ends of the names of files that are read as photos."""

_LARGEST_TEXT = 16 << 20


def inside(root: Path, named: str, source: str) -> Path:
    """The path of a name that a file gives, below a folder.

    Args:
        root: the folder that it must stay in.
        named: what the file says: a relative path, `/` or `\\` between its parts.
        source: the file that says it, for the message.

    Raises:
        InputError: an absolute path, a drive, a step upwards, or a name that no file can have.
    """
    windows = PureWindowsPath(named)
    parts = PurePosixPath(named.replace("\\", "/")).parts
    bad = not parts or windows.drive or windows.root or ".." in parts or not named.isprintable()
    if bad:
        raise InputError(
            f"{source}: names the file {named[:80]!r}, which is not a path inside the data set; "
            "write it relative to the data set and without `..`"
        )
    return root.joinpath(*parts)


def printable(name: str) -> str:
    """A name that can be shown and hashed: bytes that are no text, and control characters, become question marks."""
    return "".join(letter if letter.isprintable() else "?" for letter in name)


def subfolders(folder: Path) -> list[Path]:
    """The folders in a folder by name, without hidden ones; none where there is no such folder."""
    return sorted((path for path in _listed(folder) if path.is_dir()), key=lambda path: path.name)


def images_in(folder: Path) -> list[Path]:
    """The files in a folder that should be images, by name, without hidden ones."""
    return sorted(
        (path for path in _listed(folder) if path.suffix.lower() in SUFFIXES and not path.is_dir()),
        key=lambda path: path.name,
    )


def file_text(path: Path) -> str:
    """The text of a list or a table of boxes.

    Raises:
        InputError: unreadable, not text, or larger than such a file can be.
    """
    try:
        if not path.is_file():
            raise InputError(f"{path}: there is no such file; the layout of this data set needs it")
        if path.stat().st_size > _LARGEST_TEXT:
            raise InputError(f"{path}: larger than {_LARGEST_TEXT >> 20} MiB; this is not a list of photos")
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); check its rights") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text; save it as UTF-8") from error


def _listed(folder: Path) -> Iterable[Path]:
    if not folder.is_dir():
        return ()
    try:
        return [path for path in folder.iterdir() if not path.name.startswith(".")]
    except OSError as error:
        raise InputError(f"{folder}: cannot be read ({error.strerror}); check its rights") from error
