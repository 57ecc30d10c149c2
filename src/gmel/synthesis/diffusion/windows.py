"""Normalised windows of photos: what the networks see, and what is kept beside them to go back to grey values.

A photo is its appearance, two slow fields of local mean and local contrast, and a field of texture with zero mean and
unit contrast: pixels = mean + contrast x texture. A network trained on the texture alone need not learn how bright a
class is, which a handful of photos cannot teach it; the appearance is resampled from those photos. A class whose
contrast is its mark can be kept whole: then its appearance is one mean and one contrast for the class.

Where a defect is drawn on a good part, mean and contrast are those of the known background around it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from gmel.scenario.errors import InputError
from gmel.synthesis.photo import Floats

__all__ = [
    "FLOOR",
    "SIDE",
    "Appearance",
    "Box",
    "Mask",
    "appearances_of",
    "background",
    "dihedral",
    "dihedral_grid",
    "dilated",
    "enlarged",
    "field_box",
    "fields",
    "guide",
    "placed",
    "random_mask",
    "reduced",
    "reduced_mask",
    "shapes",
    "starts",
]

SIDE = 32
"""Pixels of a window's side."""
FLOOR = 0.01
"""Smallest contrast, of the full scale: below it there is only the noise of the sensor, which must not be blown up."""
MARGIN = 8
"""Pixels of known background on each side of a defect that is larger than a window."""

Mask = NDArray[np.bool_]
Grey = TypeVar("Grey", bound=np.generic)


@dataclass(frozen=True)
class Box:
    """A rectangle of pixels."""

    top: int
    left: int
    height: int
    width: int

    def of(self, image: NDArray[Grey]) -> NDArray[Grey]:
        """The part of an image."""
        return image[self.top : self.top + self.height, self.left : self.left + self.width]


@dataclass(frozen=True, eq=False)
class Appearance:
    """How bright and how rich in contrast a photo is, coarsely.

    Attributes:
        grid: [rows, columns, 2], local mean and local contrast at evenly spaced windows, 0 to 1 of full scale.
        size: height and width of the photo at the working resolution.
        native: height and width of the photo itself.
    """

    grid: Floats
    size: tuple[int, int]
    native: tuple[int, int]


def reduced(pixels: Floats, scale: int) -> Floats:
    """Pixels at 1 / `scale` of the resolution (means of blocks), mirrored at the edges up to whole blocks and to a
    window."""
    height, width = pixels.shape
    wanted = [max(-(-length // scale) * scale, SIDE * scale) for length in (height, width)]
    if wanted != [height, width]:
        pixels = np.pad(pixels, [(0, wanted[0] - height), (0, wanted[1] - width)], mode="symmetric")
    if scale == 1:
        return pixels
    height, width = pixels.shape
    return pixels.reshape(height // scale, scale, width // scale, scale).mean((1, 3), dtype=np.float32)


def reduced_mask(mask: Mask | None, scale: int) -> Mask | None:
    """The mask at the working resolution: a block is marked where any of it is."""
    return None if mask is None else reduced(mask.astype(np.float32), scale) > 0.0


def enlarged(pixels: Floats, scale: int, height: int, width: int) -> Floats:
    """The way back to the resolution and size of the photo (bilinear)."""
    if scale > 1:
        pixels = _interpolated(pixels, pixels.shape[0] * scale, pixels.shape[1] * scale)
    return pixels[:height, :width]


def starts(length: int, side: int = SIDE, stride: int = SIDE) -> NDArray[np.int64]:
    """First pixels of evenly spaced windows that cover a length with at most `stride` from one to the next."""
    if length < side:
        raise InputError(f"a length of {length} pixels is below a window of {side}")
    count = 1 + -(-(length - side) // stride)
    return np.rint(np.linspace(0, length - side, count)).astype(np.int64)


def appearances_of(
    photos: Sequence[Floats], sizes: Sequence[tuple[int, int]], *, apart: bool = True
) -> list[Appearance]:
    """Appearances of the photos of a class.

    Args:
        photos: pixels at the working resolution.
        sizes: heights and widths of the photos themselves.
        apart: local mean and contrast of each photo; else one mean and one contrast for the class, which then keeps its
            differences of brightness as texture.
    """
    everything = np.concatenate([pixels.ravel() for pixels in photos])
    made: list[Appearance] = []
    for pixels, native in zip(photos, sizes, strict=True):
        height, width = pixels.shape
        grid = (
            [[_mean_contrast(pixels[y : y + SIDE, x : x + SIDE]) for x in starts(width)] for y in starts(height)]
            if apart
            else [[_mean_contrast(everything)]]
        )
        made.append(Appearance(np.asarray(grid, np.float32), (height, width), native))
    return made


def fields(appearance: Appearance) -> tuple[Floats, Floats]:
    """[height, width] each: mean and contrast at every pixel, between the centres of the windows bilinearly."""
    height, width = appearance.size
    mean, contrast = (_spread(appearance.grid[..., part], height, width) for part in (0, 1))
    return mean, contrast


def guide(mean: Floats, contrast: Floats) -> Floats:
    """[height, width, 2]: what a network is told of the appearance around a window, so that it draws the scratch where
    the contrast is: local mean against that of the photo in contrasts, and the logarithm of local against usual
    contrast."""
    usual = contrast.mean()
    return np.stack([(mean - mean.mean()) / usual, np.log(contrast / usual)], axis=-1).clip(-4.0, 4.0)


def background(pixels: Floats, mask: Mask) -> tuple[float, float]:
    """Mean and contrast of what is not masked; of everything where all is."""
    known = pixels[~mask]
    return _mean_contrast(known if known.size else pixels)


def dihedral(image: NDArray[Grey], turn: int) -> NDArray[Grey]:
    """One of the eight rotations and mirrors of the first two axes, `turn` from 0 to 7."""
    turned = np.rot90(image, turn % 4)
    return np.ascontiguousarray(turned[:, ::-1] if turn >= 4 else turned)


def dihedral_grid(appearance: Appearance, turn: int) -> Appearance:
    """The appearance of the turned photo."""
    (height, width), (tall, wide) = appearance.size, appearance.native
    turned = replace(appearance, grid=dihedral(appearance.grid, turn))
    return replace(turned, size=(width, height), native=(wide, tall)) if turn % 2 else turned


def dilated(mask: Mask, pixels: int) -> Mask:
    """The mask and what is within so many pixels of it."""
    return np.asarray(ndimage.binary_dilation(mask, iterations=pixels), bool) if pixels else mask


def shapes(mask: Mask, apart: int = 8) -> list[Box]:
    """Boxes of the separate defects of a mask; parts nearer than `apart` pixels are one."""
    near = dilated(mask, max(apart // 2, 1))
    labelled: NDArray[np.int32] = ndimage.label(near)[0]  # pyright: ignore
    boxes: list[Box] = []
    places: list[Any] = ndimage.find_objects(labelled)
    for number, found in enumerate(places, start=1):
        inside = mask[found] & (labelled[found] == number)
        rows, columns = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
        if rows.size:
            top, left = found[0].start + int(rows[0]), found[1].start + int(columns[0])
            boxes.append(Box(top, left, int(rows[-1] - rows[0]) + 1, int(columns[-1] - columns[0]) + 1))
    return boxes


def field_box(box: Box, size: tuple[int, int], rng: np.random.Generator) -> Box:
    """Where windows are drawn around a defect: a window that holds it, by chance where, or the defect with a margin."""
    place: list[tuple[int, int]] = []
    for start, length, limit in ((box.top, box.height, size[0]), (box.left, box.width, size[1])):
        extent = min(max(SIDE, length + 2 * MARGIN), limit)
        if extent > SIDE:
            first, last = start - MARGIN, start - MARGIN
        else:
            first, last = start + length - SIDE, start
        first, last = max(first, 0), max(min(last, limit - extent), 0)
        place.append((int(rng.integers(min(first, last), last + 1)), extent))
    return Box(place[0][0], place[1][0], place[0][1], place[1][1])


def placed(shape: Mask, size: tuple[int, int], rng: np.random.Generator) -> Mask:
    """A mask of the given size with a defect's outline in it: turned, mirrored, grown or shrunk by up to a quarter, and
    put anywhere; cut where it is larger than the photo."""
    outline = dihedral(shape, int(rng.integers(8)))
    factor = float(rng.uniform(0.75, 1.25))
    wanted = [min(max(round(length * factor), 1), limit) for length, limit in zip(outline.shape, size, strict=True)]
    grown = _interpolated(outline.astype(np.float32), wanted[0], wanted[1]) >= 0.5
    if not grown.any():
        grown[:] = True
    mask = np.zeros(size, bool)
    top, left = (int(rng.integers(limit - length + 1)) for limit, length in zip(size, wanted, strict=True))
    mask[top : top + wanted[0], left : left + wanted[1]] = grown
    return mask


def random_mask(rng: np.random.Generator) -> Mask:
    """[side, side]: what a prior learns to fill in. A third of them everything, the others blobs of any size."""
    if rng.random() < 1 / 3:
        return np.ones((SIDE, SIDE), bool)
    white = rng.standard_normal((SIDE, SIDE))
    rough: NDArray[np.float64] = ndimage.gaussian_filter(white, float(rng.uniform(1.5, 5.0)), mode="wrap")
    share = float(rng.uniform(0.05, 0.7))
    return rough >= np.quantile(rough, 1.0 - share)


def _mean_contrast(pixels: Floats) -> tuple[float, float]:
    return float(pixels.mean()), max(float(pixels.std()), FLOOR)


def _spread(grid: Floats, height: int, width: int) -> Floats:
    """Values at the centres of evenly spaced windows, at every pixel."""
    rows, columns = (
        (np.arange(length) - (SIDE - 1) / 2) * (count - 1) / max(length - SIDE, 1)
        for length, count in ((height, grid.shape[0]), (width, grid.shape[1]))
    )
    return _bilinear(grid, rows, columns)


def _interpolated(image: Floats, height: int, width: int) -> Floats:
    """An image at another size, bilinearly, pixel centres on pixel centres."""
    rows, columns = (
        (np.arange(wanted) + 0.5) * length / wanted - 0.5
        for wanted, length in ((height, image.shape[0]), (width, image.shape[1]))
    )
    return _bilinear(image, rows, columns)


def _bilinear(image: Floats, rows: NDArray[np.floating], columns: NDArray[np.floating]) -> Floats:
    for places in (rows, columns):
        held = np.clip(places, 0, image.shape[0] - 1)
        low = np.floor(held).astype(int)
        high = np.minimum(low + 1, image.shape[0] - 1)
        part = (held - low)[:, None]
        # Rows first; the transpose brings the columns to the front, and the second time everything back.
        image = (image[low] * (1.0 - part) + image[high] * part).astype(np.float32).T
    return image
