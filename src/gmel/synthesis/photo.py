"""A photo of a part: what all of the room reads, makes and judges."""

from dataclasses import dataclass, replace
from typing import Self

import numpy as np
from numpy.typing import NDArray

__all__ = ["GOOD", "Floats", "Photo", "labels_of", "quantised", "unit_scale"]

GOOD = "good"
"""The label of photos without a defect."""

Floats = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Photo:
    """One grey photo and what is known of it.

    Attributes:
        image: [height, width], uint8 or uint16: what the sensor gave, without rescaling.
        label: class of the defect, or `GOOD`.
        mask: [height, width], true on the defect; none where nobody drew one.
        template: [height, width], the same view of a part that is known to be good (a reference image), like `image`.
        group: photos of one group show one part (twins, exposures, crops): a split never tears them apart.
        site: plant or line that took it.
        name: where it comes from, for messages: a path within the data set, or the generator and a number.
        source: name of the shot that a synthetic photo was made from; empty for real photos and where none stands out.
    """

    image: NDArray[np.uint8] | NDArray[np.uint16]
    label: str
    mask: NDArray[np.bool_] | None = None
    template: NDArray[np.uint8] | NDArray[np.uint16] | None = None
    group: str = ""
    site: str = ""
    name: str = ""
    source: str = ""

    def pixels(self) -> Floats:
        """[height, width], float32, 0 (black) to 1 (full scale of the type)."""
        return unit_scale(self.image)

    def having(self, pixels: NDArray[np.floating], **other: object) -> Self:
        """The photo with other pixels (0 to 1, rounded to the type of its image) and other fields."""
        return replace(self, image=quantised(pixels, self.image.dtype), **other)  # pyright: ignore[reportArgumentType]


def unit_scale(image: NDArray[np.uint8] | NDArray[np.uint16]) -> Floats:
    """Grey values as float32 in 0 to 1."""
    return image.astype(np.float32) / np.float32(np.iinfo(image.dtype).max)


def quantised(
    pixels: NDArray[np.floating], dtype: np.dtype[np.uint8] | np.dtype[np.uint16]
) -> NDArray[np.uint8] | NDArray[np.uint16]:
    """Pixels from 0 to 1 as the sensor's integers: clipped and rounded."""
    level = np.rint(np.clip(pixels, 0.0, 1.0) * np.iinfo(dtype).max)
    return level.astype(np.uint8) if dtype == np.uint8 else level.astype(np.uint16)


def labels_of(photos: "list[Photo] | tuple[Photo, ...]") -> tuple[str, ...]:
    """The classes in order: `GOOD` first where it occurs, the defects by name."""
    found = {photo.label for photo in photos}
    return (*((GOOD,) if GOOD in found else ()), *sorted(found - {GOOD}))
