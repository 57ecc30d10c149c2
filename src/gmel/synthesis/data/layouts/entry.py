"""What a layout says of a photo before anyone opens it."""

from dataclasses import dataclass
from pathlib import Path

from gmel.synthesis.data.problem import Problem

__all__ = ["Box", "Entry", "Index"]


@dataclass(frozen=True)
class Box:
    """A defect's box in pixels: columns `left` to `right`, rows `top` to `bottom`, the ends not part of it."""

    label: str
    left: float
    top: float
    right: float
    bottom: float

    @property
    def area(self) -> float:
        """Pixels of the box; not positive for a box that is none."""
        return (self.right - self.left) * (self.bottom - self.top) if self.right > self.left else 0.0


@dataclass(frozen=True)
class Entry:
    """One photo of a data set, not opened yet.

    Attributes:
        image: the file.
        label: class, or `GOOD`.
        name: path within the data set.
        mask: file of its mask.
        boxes: boxes of all its defects, of any class (where the layout has boxes in place of masks).
        template: file of the same view of a good part.
        group: what part it shows, where the layout knows.
        site: plant or line, where the layout knows.
    """

    image: Path
    label: str
    name: str
    mask: Path | None = None
    boxes: tuple[Box, ...] = ()
    template: Path | None = None
    group: str = ""
    site: str = ""


@dataclass(frozen=True)
class Index:
    """All photos of a data set, and what the layout found wrong."""

    entries: tuple[Entry, ...]
    problems: tuple[Problem, ...] = ()
