"""The layout of DeepPCB: lists of pairs (tested board, template) with a table of boxes for each."""

from pathlib import Path

from gmel.scenario.errors import InputError
from gmel.synthesis.data.layouts.entry import Box, Entry, Index
from gmel.synthesis.data.paths import file_text, inside
from gmel.synthesis.data.problem import counted
from gmel.synthesis.photo import GOOD

__all__ = ["CLASSES", "index_deeppcb", "is_deeppcb"]

CLASSES = ("open", "short", "mousebite", "spur", "copper", "pin-hole")
"""Names of the types 1 to 6 of its tables (from its README)."""

_LISTS = ("trainval.txt", "test.txt")


def is_deeppcb(root: Path) -> bool:
    """Whether a folder, or its `PCBData/`, has the lists of this layout."""
    return bool(_lists(root))


def index_deeppcb(root: Path) -> Index:
    """Lists the boards that its lists name: photo, template, boxes; the board groups are sites.

    A line of a list is `group00041/00041/00041000.jpg group00041/00041_not/00041000.txt`; the photo is
    `00041000_test.jpg`, its template `00041000_temp.jpg`; a line of a table is `left top right bottom type`.

    Raises:
        InputError: no list; a list that names a file outside, or is not a list of pairs.
    """
    lists = _lists(root)
    if not lists:
        raise InputError(f"{root}: neither `trainval.txt` nor `test.txt`; is this the layout of DeepPCB?")
    entries: list[Entry] = []
    lost: list[str] = []
    flawed: list[str] = []
    seen: set[str] = set()
    for path in lists:
        for number, line in enumerate(file_text(path).splitlines(), 1):
            words = line.split()
            if not words:
                continue
            if len(words) != 2:
                raise InputError(f"{path}: line {number} must be a photo and a table of boxes, apart by a space")
            photo, table = (inside(path.parent, word, f"{path}, line {number}") for word in words)
            if words[0] in seen:
                continue
            seen.add(words[0])
            tested = photo.with_name(f"{photo.stem}_test{photo.suffix}")
            if not tested.is_file() or not table.is_file():
                lost.append(words[0])
                continue
            boxes = _boxes(table)
            if boxes is None:
                flawed.append(words[1])
                continue
            template = photo.with_name(f"{photo.stem}_temp{photo.suffix}")
            entries.append(
                Entry(
                    tested,
                    max(boxes, key=lambda box: box.area).label if boxes else GOOD,
                    tested.relative_to(root).as_posix(),
                    boxes=boxes,
                    template=template if template.is_file() else None,
                    group=words[0],
                    site=photo.relative_to(path.parent).parts[0],
                )
            )
    told = (
        ("unreadable", "boards of the lists that are not there", lost, "copy them again"),
        ("unreadable", "tables of boxes that cannot be read, their boards are skipped", flawed, "copy them again"),
    )
    problems = tuple(counted(*words) for words in told if words[2])
    return Index(tuple(entries), problems)


def _lists(root: Path) -> list[Path]:
    for folder in (root, root / "PCBData"):
        found = [folder / name for name in _LISTS if (folder / name).is_file()]
        if found:
            return found
    return []


def _boxes(table: Path) -> tuple[Box, ...] | None:
    """The boxes of a board; none where the table is not one."""
    boxes: list[Box] = []
    try:
        for line in file_text(table).splitlines():
            if line.strip():
                left, top, right, bottom, kind = (int(word) for word in line.replace(",", " ").split())
                if not 1 <= kind <= len(CLASSES):
                    return None
                boxes.append(Box(CLASSES[kind - 1], left, top, right, bottom))
    except ValueError:
        return None
    return tuple(boxes) if all(box.area > 0 for box in boxes) else None
