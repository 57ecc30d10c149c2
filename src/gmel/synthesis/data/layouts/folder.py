"""The image-folder layout: one folder a class, masks and templates beside, sites above."""

from collections.abc import Iterable, Iterator
from pathlib import Path

from gmel.scenario.errors import InputError
from gmel.synthesis.data.layouts.entry import Entry, Index
from gmel.synthesis.data.paths import images_in, subfolders
from gmel.synthesis.data.problem import Problem, counted
from gmel.synthesis.photo import GOOD

__all__ = ["index_folder"]

_IMAGES = ("img", "imgs", "image", "images")
_MASKS = ("mask", "masks", "ground_truth")
_TEMPLATES = ("template", "templates")
_PARTS = {"train", "training", "trainval", "test", "testing", "val", "valid", "validation"}
_RESERVED = {*_IMAGES, *_MASKS, *_TEMPLATES}


def index_folder(root: Path, good: str) -> Index:
    """Lists the photos of class folders.

    Classes are the folders of `root` (or of its `images/`), with the photos in them or in their `img/`; or `root` has
    a folder for each site (or `train/`, `test/` and the like) with such folders in it. A mask is called like its photo,
    or `NAME_mask`, and lies beside it, in `CLASS/mask/` or in `masks/CLASS/`; a PNG beside a JPEG of the same name is
    its mask. Templates are found alike in `CLASS/template/` or `templates/CLASS/`; one single image in `templates/` is
    the template of all photos.

    Args:
        root: the folder.
        good: name of the class folder that holds good parts.

    Raises:
        InputError: no photo in any class folder; a defect class called like good parts.
    """
    problems: list[Problem] = []
    entries = list(_site(root, root, "", good))
    if not entries:
        for folder in _named(subfolders(root)):
            # Parts of somebody's split are not plants.
            entries += _site(root, folder, "" if folder.name.lower() in _PARTS else folder.name, good)
    if not entries:
        loose = images_in(root) or [image for name in _IMAGES for image in images_in(root / name)]
        found = f"{len(loose)} photos without a class" if loose else "no photos in folders of classes"
        raise InputError(
            f"{root}: {found}; put the photos into one folder for each class, good parts into `{good}/` "
            "(layouts: docs/synthesis-data.md)"
        )
    read = {entry.image.parent for entry in entries}
    left = [path.name for path in _named(subfolders(root)) if not any(path in (each, *each.parents) for each in read)]
    if left:
        remedy = "a class has its photos in its folder or in `img/` below it"
        problems.append(counted("layout", "folders in which no photos were found", left, remedy))
    loose = [path.name for path in images_in(root)]
    if loose:
        problems.append(counted("layout", "photos beside the class folders, not read", loose, "move them into a class"))
    return Index(tuple(entries), tuple(problems))


def _site(root: Path, folder: Path, site: str, good: str) -> Iterator[Entry]:
    """Photos of the class folders of a site."""
    base = folder
    for name, path in _by_name(folder).items():
        if name in _IMAGES and not images_in(path):
            base = path
    template = _only_template(folder)
    for place in _named(subfolders(base)):
        photos, masks = _photos(place)
        masks |= _stems(folder, place, _MASKS)
        templates = _stems(folder, place, _TEMPLATES)
        label = GOOD if place.name == good else place.name
        if photos and place.name == GOOD != good:
            raise InputError(
                f"{place}: is called like good parts, but --good names `{good}`; rename it, or use --good {GOOD}"
            )
        for path in photos:
            yield Entry(
                path,
                label,
                path.relative_to(root).as_posix(),
                mask=_partner(path.stem, masks),
                template=_partner(path.stem, templates) or template,
                site=site,
            )


def _photos(place: Path) -> tuple[list[Path], dict[str, Path]]:
    """The photos of a class folder, and the masks that lie among them."""
    inner = [path for name, path in _by_name(place).items() if name in _IMAGES]
    found = [image for folder in (place, *inner) for image in images_in(folder)]
    lossy = {path.with_suffix("") for path in found if path.suffix.lower() in {".jpg", ".jpeg"}}
    bare = {path.with_suffix("") for path in found}
    photos: list[Path] = []
    masks: dict[str, Path] = {}
    for path in found:
        whole = path.with_suffix("")
        beside_photo = whole in lossy and path.suffix.lower() == ".png"
        if beside_photo or (path.stem.endswith("_mask") and whole.with_name(path.stem.removesuffix("_mask")) in bare):
            masks[path.stem] = path
        else:
            photos.append(path)
    return photos, masks


def _stems(folder: Path, place: Path, names: Iterable[str]) -> dict[str, Path]:
    """Files by stem in the folders of these names in a class folder, and in its namesake in such a folder of a site."""
    beside = [path for name, path in _by_name(place).items() if name in names]
    above = [path / place.name for name, path in _by_name(folder).items() if name in names]
    return {image.stem: image for each in (*above, *beside) for image in images_in(each)}


def _partner(stem: str, others: dict[str, Path]) -> Path | None:
    return others.get(stem) or others.get(f"{stem}_mask")


def _only_template(folder: Path) -> Path | None:
    found = [image for name, path in _by_name(folder).items() if name in _TEMPLATES for image in images_in(path)]
    return found[0] if len(found) == 1 else None


def _by_name(folder: Path) -> dict[str, Path]:
    return {path.name.lower(): path for path in subfolders(folder)}


def _named(folders: Iterable[Path]) -> list[Path]:
    """Folders that can be a class or a site."""
    return [path for path in folders if path.name.lower() not in _RESERVED]
