"""The layout of MVTec AD: `train/good`, `test/CLASS`, `ground_truth/CLASS/NAME_mask.png`."""

from collections.abc import Iterator
from pathlib import Path

from gmel.scenario.errors import InputError
from gmel.synthesis.data.layouts.entry import Entry, Index
from gmel.synthesis.data.paths import images_in, subfolders
from gmel.synthesis.photo import GOOD

__all__ = ["index_mvtec", "is_mvtec"]


def is_mvtec(root: Path) -> bool:
    """Whether a folder is a product of this layout, or holds such products."""
    return _is_product(root) or any(_is_product(folder) for folder in subfolders(root))


def index_mvtec(root: Path, good: str) -> Index:
    """Lists the photos of a product, or of a folder of products, each of which becomes a site.

    Good parts of `train/` and of `test/` are one class: which photos are held out is for the split to say.

    Raises:
        InputError: no product in the folder.
    """
    products = [(root, "")] if _is_product(root) else [(each, each.name) for each in subfolders(root)]
    entries = [
        entry for folder, site in products if _is_product(folder) for entry in _product(root, folder, site, good)
    ]
    if not entries:
        raise InputError(f"{root}: no photos in `train/{good}/` and `test/`; is this the layout of MVTec AD?")
    return Index(tuple(entries))


def _is_product(folder: Path) -> bool:
    # Several classes to train on are somebody's split of class folders: the image-folder layout reads it.
    return len(subfolders(folder / "train")) == 1 and (folder / "test").is_dir()


def _product(root: Path, folder: Path, site: str, good: str) -> Iterator[Entry]:
    for part in ("train", "test"):
        for place in subfolders(folder / part):
            drawn = {path.stem.removesuffix("_mask"): path for path in images_in(folder / "ground_truth" / place.name)}
            for path in images_in(place):
                label = GOOD if place.name == good else place.name
                mask = drawn.get(path.stem) if part == "test" else None
                yield Entry(path, label, path.relative_to(root).as_posix(), mask=mask, site=site)
