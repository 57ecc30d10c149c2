"""A data set: photos in memory, with their classes and groups, and what was found wrong."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gmel.evaluation.progress import Reporter
from gmel.scenario.errors import InputError
from gmel.synthesis.data.checks import check_photos, group_twins
from gmel.synthesis.data.layouts.deeppcb import index_deeppcb, is_deeppcb
from gmel.synthesis.data.layouts.entry import Entry, Index
from gmel.synthesis.data.layouts.folder import index_folder
from gmel.synthesis.data.layouts.mvtec import index_mvtec, is_mvtec
from gmel.synthesis.data.layouts.voc import index_voc, is_voc
from gmel.synthesis.data.paths import printable
from gmel.synthesis.data.problem import Problem, counted
from gmel.synthesis.data.reading import Grey, read_grey, read_mask
from gmel.synthesis.data.windows import box_mask, windows_of
from gmel.synthesis.photo import GOOD, Photo, labels_of

__all__ = ["LARGEST_BYTES", "LAYOUTS", "Dataset", "read_dataset"]

LAYOUTS = ("auto", "folder", "voc", "deeppcb", "mvtec")

LARGEST_BYTES = 4 << 30
"""Photos, masks and templates are held in memory; a data set that needs more is refused before it fills it."""

_WITH_BOXES = ("voc", "deeppcb")
_DEEPPCB_WINDOW = 64


@dataclass(frozen=True, eq=False)
class Dataset:
    """Photos of one or several sites.

    Attributes:
        name: of the folder, for reports.
        photos: in the order of the layout, always the same; each has a group.
        problems: what was found wrong while reading and comparing.
    """

    name: str
    photos: tuple[Photo, ...]
    problems: tuple[Problem, ...] = ()

    @property
    def classes(self) -> tuple[str, ...]:
        """The classes in order: `GOOD` first where there is one, the defects by name."""
        return labels_of(self.photos)

    @property
    def sites(self) -> tuple[str, ...]:
        """The sites by name; one without a name where nobody named any."""
        return tuple(sorted({photo.site for photo in self.photos}))

    def of_class(self, label: str) -> tuple[Photo, ...]:
        """The photos of a class."""
        return tuple(photo for photo in self.photos if photo.label == label)

    def of_site(self, site: str) -> "Dataset":
        """The part of a site, without the problems.

        Raises:
            InputError: there is no such site.
        """
        if site not in self.sites:
            raise InputError(f"site {site!r}: not in {self.name}, must be one of {', '.join(self.sites)}")
        return replace(self, photos=tuple(p for p in self.photos if p.site == site), problems=())


def read_dataset(
    path: Path | str,
    layout: str = "auto",
    good: str = GOOD,
    crop: int | None = None,
    reporter: Reporter | None = None,
) -> Dataset:
    """Reads a folder of photos, compares them and puts twins into groups.

    A file that cannot be read is skipped and listed in the problems.

    Args:
        path: the folder.
        layout: how it is laid out; `auto` looks.
        good: name of the class of good parts.
        crop: side in pixels of windows that are cut around boxes, one photo for each box; whole photos where it is
            none, except in DeepPCB, whose boards show many defects each (64).
        reporter: who is told how far it is.

    Raises:
        InputError: no such folder, no photos in it, none that can be read, too large for memory, or a file of it names
            another outside.
    """
    root = Path(path)
    if not root.is_dir():
        raise InputError(f"{root}: there is no such folder; give the folder with the photos")
    if crop is not None and crop < 16:
        raise InputError(f"crop: {crop} pixels, must be at least 16; a window shows a defect and what is around it")
    found, index = _index(root, layout, good)
    if crop is not None and found not in _WITH_BOXES:
        raise InputError(f"crop: {root} has no boxes to cut windows around; only {' and '.join(_WITH_BOXES)} have")
    size = _DEEPPCB_WINDOW if crop is None and found == "deeppcb" else crop
    reading = _Reading(size)
    photos: list[Photo] = []
    held = 0
    for number, entry in enumerate(index.entries):
        if reporter is not None and number % 50 == 0:
            reporter.advance(number, len(index.entries), f"reading {root.name}")
        own = reading.photos(entry)
        held += sum(a.nbytes for photo in own for a in (photo.image, photo.mask, photo.template) if a is not None)
        if held > LARGEST_BYTES:
            raise InputError(
                f"{root}: more than {LARGEST_BYTES >> 30} GiB of photos; cut windows (--crop) or shrink them"
            )
        photos += own
    if not photos:
        raise InputError(f"{root}: none of {len(index.entries)} photos can be read; the first: {reading.first_reason}")
    if reporter is not None:
        reporter.advance(1, 1, f"comparing {len(photos)} photos")
    grouped, twins = group_twins(photos)
    problems = (*index.problems, *reading.problems(len(index.entries)), *check_photos(grouped), *twins)
    return Dataset(root.resolve().name, grouped, problems)


def _index(root: Path, layout: str, good: str) -> tuple[str, Index]:
    tests: tuple[tuple[str, Callable[[Path], bool]], ...] = (
        ("deeppcb", is_deeppcb),
        ("voc", is_voc),
        ("mvtec", is_mvtec),
    )
    found = next((name for name, fits in tests if fits(root)), "folder") if layout == "auto" else layout
    match found:
        case "deeppcb":
            return found, index_deeppcb(root)
        case "voc":
            return found, index_voc(root, good)
        case "mvtec":
            return found, index_mvtec(root, good)
        case "folder":
            return found, index_folder(root, good)
        case _:
            raise InputError(f"layout: {layout!r}, must be one of {', '.join(LAYOUTS)}")


class _Reading:
    """Opens the entries of a data set one after the other, and keeps what went wrong."""

    def __init__(self, size: int | None) -> None:
        self._size = size
        self._wrong: dict[str, list[str]] = {}
        self._template: tuple[Path | None, Grey | None] = (None, None)
        self.first_reason = ""

    def photos(self, entry: Entry) -> list[Photo]:
        """The photo of an entry, or its windows; nothing where it cannot be read."""
        try:
            image = read_grey(entry.image)
        except InputError as error:
            self.first_reason = self.first_reason or str(error)
            self._note("photo", entry.name)
            return []
        label, group, site, name = map(printable, (entry.label, entry.group, entry.site, entry.name))
        photo = Photo(image, label, group=group, site=site, name=name)
        photo = replace(photo, template=self._template_of(entry, image))
        if self._size is not None:
            return windows_of(photo, entry.boxes, self._size)
        return [replace(photo, mask=self._mask_of(entry, image))]

    def problems(self, total: int) -> Iterator[Problem]:
        """What went wrong, one line for each kind."""
        told = {
            "photo": ("unreadable", f"photos that cannot be read, of {total}", f"the first: {self.first_reason}"),
            "mask": ("mask", "masks that cannot be read, their photos are used without", "draw or copy them again"),
            "mask size": ("mask", "masks of another size than their photo, not used", "draw them again"),
            "mask empty": ("mask", "defects with an empty mask, used without one", "draw the defect"),
            "mask good": ("mask", "good parts with a mask that is not empty", "look whether there is a defect"),
            "template": ("template", "templates unreadable or of another size or depth, not used", "take them again"),
        }
        for reason, names in self._wrong.items():
            kind, what, remedy = told[reason]
            yield counted(kind, what, names, remedy)

    def _note(self, reason: str, name: str) -> None:
        self._wrong.setdefault(reason, []).append(name)

    def _mask_of(self, entry: Entry, image: Grey) -> NDArray[np.bool_] | None:
        if entry.boxes:
            return box_mask(image.shape, [box for box in entry.boxes if box.label == entry.label])
        if entry.mask is None:
            return None
        try:
            mask = read_mask(entry.mask)
        except InputError:
            self._note("mask", entry.name)
            return None
        if mask.shape != image.shape:
            self._note("mask size", entry.name)
            return None
        if mask.any() == (entry.label == GOOD):
            self._note("mask good" if mask.any() else "mask empty", entry.name)
        return mask if mask.any() and entry.label != GOOD else None

    def _template_of(self, entry: Entry, image: Grey) -> Grey | None:
        if entry.template is None:
            return None
        path, template = self._template
        if path != entry.template:
            try:
                template = read_grey(entry.template)
            except InputError:
                template = None
            self._template = entry.template, template
        if template is None or template.shape != image.shape or template.dtype != image.dtype:
            self._note("template", entry.name)
            return None
        return template
