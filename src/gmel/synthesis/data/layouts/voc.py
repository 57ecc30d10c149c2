"""The layout of Pascal VOC: `Annotations/*.xml` with boxes, photos in `JPEGImages/`."""

import math
from pathlib import Path
from xml.etree import ElementTree
from xml.parsers import expat

from gmel.scenario.errors import InputError
from gmel.synthesis.data.layouts.entry import Box, Entry, Index
from gmel.synthesis.data.paths import SUFFIXES, images_in, inside, subfolders
from gmel.synthesis.data.problem import counted
from gmel.synthesis.photo import GOOD

__all__ = ["index_voc", "is_voc"]

_LARGEST_BYTES = 16 << 20
_IMAGES = ("jpegimages", "images", "image", "imgs", "img")


def is_voc(root: Path) -> bool:
    """Whether a folder has annotations of this layout."""
    return bool(_annotations(root))


def index_voc(root: Path, good: str) -> Index:
    """Lists the photos that have an annotation.

    A photo without objects is a good part; of a photo with objects of several classes the class with the largest boxes
    is its label. Only `filename`, `object/name` and `object/bndbox` are read.

    Args:
        root: the folder with `Annotations/` and the photos.
        good: name of objects that mark good parts, if there are any.

    Raises:
        InputError: no annotations; one that declares a document type or entities, or names a file outside.
    """
    documents = _annotations(root)
    if not documents:
        raise InputError(f"{root}: no `Annotations/*.xml`; is this the layout of Pascal VOC?")
    folders = [path for path in subfolders(root) if path.name.lower() in _IMAGES] or [root]
    folders += [inner for folder in folders if folder != root for inner in subfolders(folder)]
    entries: list[Entry] = []
    corrupt: list[str] = []
    lost: list[str] = []
    mixed: list[str] = []
    flawed: list[str] = []
    for document in documents:
        name = document.relative_to(root).as_posix()
        tree = _parsed(document)
        if tree is None:
            corrupt.append(name)
            continue
        image = _image(folders, (tree.findtext("filename") or document.stem).strip(), document)
        if image is None:
            lost.append(name)
            continue
        boxes = [box for box in map(_box, tree.iter("object")) if box is None or box.label not in {good, GOOD}]
        whole = tuple(box for box in boxes if box is not None)
        if len(whole) < len(boxes):
            flawed.append(name)
        if boxes and not whole:
            continue  # A defect that lies nowhere must not pass as a good part.
        areas: dict[str, float] = {}
        for box in whole:
            areas[box.label] = areas.get(box.label, 0.0) + box.area
        if len(areas) > 1:
            mixed.append(name)
        label = max(sorted(areas), key=lambda each: areas[each]) if areas else GOOD
        entries.append(Entry(image, label, image.relative_to(root).as_posix(), boxes=whole))
    known = {entry.image for entry in entries}
    bare = [path.name for folder in folders for path in images_in(folder) if path not in known]
    told = (
        ("unreadable", "annotations that are not XML", corrupt, "export them again"),
        ("layout", "annotations of photos that are not there", lost, "copy the photos again"),
        ("layout", "annotations with a box that has no area or no name", flawed, "draw it again"),
        ("layout", "photos with several classes of defects, named by the largest", mixed, "cut windows with --crop"),
        (
            "layout",
            "photos without a usable annotation, not read",
            bare,
            "annotate them (a good part: without objects)",
        ),
    )
    problems = tuple(counted(*words) for words in told if words[2])
    return Index(tuple(entries), problems)


def _annotations(root: Path) -> list[Path]:
    folders = [path for path in subfolders(root) if path.name.lower() == "annotations"]
    return sorted(path for folder in folders for path in folder.glob("*.xml") if not path.name.startswith("."))


def _parsed(document: Path) -> ElementTree.Element | None:
    """The annotation, none if it is not XML. Document types are refused: entities read files and fill memory."""

    def refuse(*_: object) -> None:
        raise InputError(f"{document}: declares a document type or entities, which are not read; remove `<!DOCTYPE`")

    try:
        if document.stat().st_size > _LARGEST_BYTES:
            return None
        data = document.read_bytes()
        first = expat.ParserCreate()
        first.StartDoctypeDeclHandler = refuse
        first.EntityDeclHandler = refuse
        first.Parse(data, True)
        return ElementTree.fromstring(data)
    except (OSError, expat.ExpatError, ElementTree.ParseError, ValueError, LookupError) as error:
        if isinstance(error, InputError):
            raise
        return None


def _image(folders: list[Path], named: str, document: Path) -> Path | None:
    for folder in folders:
        path = inside(folder, named, str(document))
        ends = ("", *sorted(SUFFIXES), *sorted(end.upper() for end in SUFFIXES))
        for end in ends if path.suffix.lower() not in SUFFIXES else ("",):
            whole = path.with_name(path.name + end)
            if whole.is_file():
                return whole
    return None


def _box(node: ElementTree.Element) -> Box | None:
    name = (node.findtext("name") or "").strip()
    try:
        left, top, right, bottom = (float(node.findtext(f"bndbox/{side}") or "nan") for side in _SIDES)
    except ValueError:
        return None
    box = Box(name, left, top, right, bottom)
    return box if name.isprintable() and name and box.area > 0 and math.isfinite(box.area) else None


_SIDES = ("xmin", "ymin", "xmax", "ymax")
