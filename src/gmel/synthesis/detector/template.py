"""A reference image as second input: what differs from a part that is known to be good."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from gmel.synthesis.photo import Floats, Photo, unit_scale

__all__ = ["best_shift", "difference_from_template"]

_REACH = 4
"""Greatest error of registration that is looked for, in pixels."""


def difference_from_template(photo: Photo) -> Floats:
    """The photo minus its template, moved to where it fits best, around 0.5: [height, width], 0 to 1.

    Raises:
        ValueError: no template, or one of another size.
    """
    if photo.template is None or photo.template.shape != photo.image.shape:
        has = None if photo.template is None else photo.template.shape
        raise ValueError(f"{photo.name}: template has shape {has}, must be that of the photo, {photo.image.shape}")
    pixels, template = photo.pixels(), unit_scale(photo.template)
    moved = np.roll(template, best_shift(pixels, template), axis=(0, 1))
    return (0.5 + 0.5 * (pixels - moved)).astype(np.float32)


def best_shift(pixels: Floats, template: Floats) -> Sequence[int]:
    """Rows and columns by which the template has to move to lie on the photo: the peak of phase correlation.

    Args:
        pixels, template: [height, width].

    Source: Kuglin and Hines, Proc. IEEE Int. Conf. Cybernetics and Society (1975) 163-165.
    """
    product: NDArray[np.complex128] = np.fft.rfft2(pixels) * np.conj(np.fft.rfft2(template))
    correlation = np.fft.irfft2(product / (np.abs(product) + 1e-12), s=pixels.shape)
    near = [*range(_REACH + 1), *range(-_REACH, 0)]
    window = correlation[np.ix_(near, near)]
    row, column = np.unravel_index(int(np.argmax(window)), window.shape)
    return near[int(row)], near[int(column)]
