"""Classic augmentation: what every defect photo can also look like. The baseline that synthesis has to beat."""

from collections.abc import Sequence

import numpy as np

from gmel.synthesis.photo import Floats, Photo

__all__ = ["augmented", "dihedral"]

_GAIN = 0.25
_OFFSET = 0.1
_CROP = 0.85
"""Least share of each side that a crop keeps. Nothing is rescaled: the class is in the fine texture."""
_NOISE = 0.01


def dihedral(array: Floats, which: int) -> Floats:
    """One of the eight turns and flips of the last two axes: `which` is 0 (as it is) to 7."""
    turned = np.rot90(array, which % 4, axes=(-2, -1))
    return turned[..., ::-1] if which >= 4 else turned


def augmented(photos: Sequence[Photo], copies: int, seed: int) -> list[Photo]:
    """`copies` variants of every photo: turned or flipped, cropped, with another gain, offset and a little noise.

    The crop keeps the defect where a mask says where it is. A template is turned and cropped together with its photo.

    Args:
        photos: real photos.
        copies: variants of each.
        seed: of all that is random; variant j of photo i depends on (seed, i, j) alone.
    """
    return [
        _variant(photo, np.random.default_rng((seed, i, j))) for i, photo in enumerate(photos) for j in range(copies)
    ]


def _variant(photo: Photo, random: np.random.Generator) -> Photo:
    which = int(random.integers(8))
    pixels, mask, template = photo.pixels(), photo.mask, photo.template
    rows, columns = _crop(pixels.shape, mask, random)
    gain = 1.0 + _GAIN * random.uniform(-1.0, 1.0)
    offset = _OFFSET * random.uniform(-1.0, 1.0)
    mean = float(pixels.mean())
    changed = (pixels[rows, columns] - mean) * gain + mean + offset
    changed = changed + _NOISE * random.uniform() * random.standard_normal(changed.shape)
    return photo.having(
        dihedral(changed.astype(np.float32), which),
        mask=None if mask is None else np.ascontiguousarray(dihedral(mask[rows, columns], which)),  # pyright: ignore[reportArgumentType]
        template=None if template is None else np.ascontiguousarray(dihedral(template[rows, columns], which)),  # pyright: ignore[reportArgumentType]
        name=f"{photo.name} (augmented)",
        source=photo.source or photo.name,
    )


def _crop(shape: tuple[int, ...], mask: np.ndarray | None, random: np.random.Generator) -> tuple[slice, slice]:
    """Rows and columns of a random crop that holds the whole mask, if there is one."""
    cuts: list[slice] = []
    for axis, side in enumerate(shape[:2]):
        kept = round(side * random.uniform(_CROP, 1.0))
        first, last = 0, side - kept
        if mask is not None and mask.any():
            where = np.flatnonzero(mask.any(axis=1 - axis))
            kept = max(kept, int(where[-1] - where[0]) + 1)
            first, last = max(0, int(where[-1]) + 1 - kept), min(int(where[0]), side - kept)
        start = int(random.integers(first, max(first, last) + 1))
        cuts.append(slice(start, start + kept))
    return cuts[0], cuts[1]
