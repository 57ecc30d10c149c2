"""Photos that tests of synthesis share: striped plates, some with a dark pit, drawn by a few lines of NumPy."""

import numpy as np
from numpy.typing import NDArray

from gmel.synthesis.photo import GOOD, Photo, quantised


def plate(seed: int, size: tuple[int, int] = (40, 48)) -> NDArray[np.floating]:
    """A plate with stripes, lighter on one side, with a little noise."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[: size[0], : size[1]]
    stripes = 0.08 * np.sin(rows / 1.5 + rng.uniform(0, 6)) + 0.1 * columns / size[1]
    return 0.5 + stripes + 0.02 * rng.standard_normal(size)


def good_plates(count: int, size: tuple[int, int] = (40, 48)) -> list[Photo]:
    return [Photo(quantised(plate(seed, size), np.dtype(np.uint8)), GOOD, name=f"good/{seed}") for seed in range(count)]


def pitted_plates(count: int, size: tuple[int, int] = (40, 48), label: str = "pit") -> list[Photo]:
    """Plates with a round dark pit and its mask."""
    made: list[Photo] = []
    for seed in range(count):
        pixels = plate(100 + seed, size)
        rows, columns = np.mgrid[: size[0], : size[1]]
        mask = (rows - 20) ** 2 + (columns - 18 - seed) ** 2 <= 16
        pixels = np.where(mask, pixels - 0.3, pixels)
        made.append(Photo(quantised(pixels, np.dtype(np.uint8)), label, mask=mask, name=f"{label}/{seed}"))
    return made


def rough_plates(count: int, size: tuple[int, int] = (40, 48), label: str = "rough") -> list[Photo]:
    """Plates all over rough, without masks."""
    made: list[Photo] = []
    for seed in range(count):
        rng = np.random.default_rng(200 + seed)
        pixels = plate(200 + seed, size) + 0.1 * rng.standard_normal(size)
        made.append(Photo(quantised(pixels, np.dtype(np.uint8)), label, name=f"{label}/{seed}"))
    return made
