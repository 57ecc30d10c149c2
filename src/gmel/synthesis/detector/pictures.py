"""A photo at the working resolution of a network: what the CNN reads in place of statistics."""

from collections.abc import Sequence

import numpy as np
from PIL import Image

from gmel.synthesis.detector.template import difference_from_template
from gmel.synthesis.photo import Floats, Photo

__all__ = ["SCALARS", "SIDE", "PictureExtractor"]

SIDE = 96
"""Pixels of a side (docs/synthesis.md has what 64 reaches in its place)."""
SCALARS = 2
"""Numbers of a row behind its pixels: the photo's own brightness and contrast."""
_FLOOR = 0.005
"""Contrast that is added to each: a plate without any texture is not blown up to noise."""
_ROUGH_FLOOR = 1e-3
"""The same for slopes, per pixel."""
_BOUND = 6.0
_MIDDLE, _MIDDLE_CONTRAST = 0.5, 0.1
"""A usual brightness and contrast of photos; the scalars are counted from there."""


class PictureExtractor:
    """Photos of any size as rows of `side` x `side` pixels, area-averaged. The aspect ratio is not kept.

    Channels: the grey value, at zero mean and unit contrast of each photo; and how rough each pixel's area is at native
    resolution (logarithm of the root mean square slope, less its mean over the photo), since averaging removes the
    fine texture that tells many defects. With a template also the difference from it, at the contrast of the photo.

    Brightness and contrast are taken out because lamps change and they would fill the network's view; because they can
    be what tells a class, they stand behind the pixels as two scalars.

    Attributes:
        with_template: whether every photo has a template.
        side: pixels of a side.
        channels: of the pixels: 2, or 3 with a template.
    """

    def __init__(self, with_template: bool, side: int = SIDE) -> None:
        self.with_template, self.side = with_template, side
        self.channels = 3 if with_template else 2
        self.name = f"pictures of {side} pixels{' and template' if with_template else ''}"
        pixels = [f"pixel_{n}" for n in range(self.channels * side * side)]
        self.names = (*pixels, "brightness", "log_contrast")

    def __call__(self, photos: Sequence[Photo]) -> Floats:
        """[photos, side x side x channels + 2]; pixels by row, column, channel."""
        if not photos:
            return np.zeros((0, len(self.names)), np.float32)
        return np.stack([self._row(photo) for photo in photos])

    def _row(self, photo: Photo) -> Floats:
        pixels = photo.pixels()
        mean, spread = float(pixels.mean()), float(pixels.std()) + _FLOOR
        grey = self._averaged(pixels - mean)
        rough = 0.5 * np.log(self._averaged(_slope_squared(pixels)) + _ROUGH_FLOOR**2)
        # At the contrast of the averaged photo: fine grain that averaging has removed must not dim what is left.
        planes = [grey / (float(grey.std()) + _FLOOR), 2.0 * (rough - rough.mean())]
        if self.with_template:
            planes.append(self._averaged(difference_from_template(photo) - 0.5) / spread)
        picture = np.clip(np.stack(planes, axis=-1), -_BOUND, _BOUND)
        scalars = [(mean - _MIDDLE) / _MIDDLE, np.log(spread / _MIDDLE_CONTRAST)]
        return np.concatenate([picture.ravel(), scalars]).astype(np.float32)

    def _averaged(self, plane: Floats) -> Floats:
        """At the working resolution: each pixel the mean of the area that it covers."""
        return np.asarray(Image.fromarray(plane).resize((self.side, self.side), Image.Resampling.BOX), np.float32)


def _slope_squared(pixels: Floats) -> Floats:
    """Squared length of the gradient between neighbours: [height - 1, width - 1]."""
    down, right = pixels[1:, :-1] - pixels[:-1, :-1], pixels[:-1, 1:] - pixels[:-1, :-1]
    return (down * down + right * right).astype(np.float32)
