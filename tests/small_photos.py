"""Small photos for the tests of synthesis: quick to make, unlike each other."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from gmel.synthesis.data.dataset import Dataset
from gmel.synthesis.photo import GOOD, Photo

REAL = Path(os.environ.get("GMEL_REAL_DATA") or Path(__file__).parents[2] / "shared" / "data")


def real(name: str) -> Path:
    """A folder of real photos; the test is skipped where there is none."""
    if not (REAL / name).is_dir():
        pytest.skip(f"real photos of {name} are not in {REAL} (GMEL_REAL_DATA); they may not be shipped")
    return REAL / name


def pixels(seed: int, shape: tuple[int, int] = (24, 20), dtype: Any = np.uint8) -> Any:
    """Random grey values: no two seeds look alike."""
    return np.random.default_rng(seed).integers(0, np.iinfo(dtype).max, shape, dtype, endpoint=True)


def save(path: Path, image: Any, **options: Any) -> Path:
    """Writes an array or image, with the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(path, **options)
    return path


def spot(shape: tuple[int, int] = (24, 20)) -> Any:
    """A mask of 0 and 255 with a few pixels set."""
    mask = np.zeros(shape, np.uint8)
    mask[5:9, 4:10] = 255
    return mask


def dataset(groups: dict[str, list[int]]) -> Dataset:
    """A data set of tiny photos: for each class the sizes of its groups."""
    photos = [
        Photo(pixels(7, (8, 8)), label, group=f"{label}-{number}", name=f"{label}/{number}-{copy}.png")
        for label, sizes in groups.items()
        for number, size in enumerate(sizes)
        for copy in range(size)
    ]
    return Dataset("small", tuple(photos))


def simple_folder(root: Path, classes: tuple[str, ...] = (GOOD, "pit"), count: int = 3) -> Path:
    """A folder in the image-folder layout without masks."""
    for row, label in enumerate(classes):
        for number in range(count):
            save(root / label / f"{number}.png", pixels(100 * row + number))
    return root
