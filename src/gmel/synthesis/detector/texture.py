"""Weight-free texture features at native resolution.

What a defect of a surface is shows in its fine texture, which a thumbnail no longer has: on NEU-CLS such statistics
with a linear classifier beat a small convolutional network from scratch on thumbnails by far. Nothing here is learned
or downloaded.

For each of five octaves (each a 2 x 2 mean of the one before): the histogram of rotation-invariant uniform local binary
patterns, the same weighted by local contrast, and moments of the gradient; grey quantiles of the whole. A small defect
vanishes in such averages, so four octaves also say how far their extremes stand out from the rest of the photo:
brightness against its surroundings, and local roughness.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from gmel.synthesis.photo import Floats, Photo

__all__ = ["FEATURES", "OCTAVES", "texture_features", "texture_table"]

OCTAVES = 5
_PATTERNS = 10
_GRADIENTS = ("log_gradient", "log_gradient_rms", "anisotropy", "diagonality", "log_contrast", "skewness")
_QUANTILES = (0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99)
_LOCAL_OCTAVES = 4
_SURROUNDINGS = 31
"""Side of the surroundings that a spot is compared with, in pixels of its octave."""
_SPOT_QUANTILES = (0.001, 0.01, 0.99, 0.999)
_ROUGH_QUANTILES = (0.9, 0.99, 0.999)
_NORMAL_MAD = 1.4826
"""Standard deviation of a normal law over its median absolute deviation."""
_LEAST_SIDE = 8
"""An octave with a shorter side says nothing of its own; it repeats the one before."""
_NEIGHBOURS = ((-1, -1), (-1, 0), (-1, 1), (0, 1), (1, 1), (1, 0), (1, -1), (0, -1))
_FLOOR = 1e-4
"""Contrast below a fortieth of an 8-bit step is none."""


def _names() -> tuple[str, ...]:
    names: list[str] = []
    for octave in range(OCTAVES):
        names += [f"lbp_{octave}_{k}" for k in range(_PATTERNS)]
        names += [f"lbp_contrast_{octave}_{k}" for k in range(_PATTERNS)]
        names += [f"{what}_{octave}" for what in _GRADIENTS]
    names += [f"grey_{round(100 * q)}" for q in _QUANTILES]
    names += ["grey_mean", "grey_std", "grey_skewness", "grey_kurtosis"]
    for octave in range(_LOCAL_OCTAVES):
        names += [f"spot_{octave}_{q}" for q in _SPOT_QUANTILES]
        names += [f"log_spot_{octave}", f"spot_heaviness_{octave}"]
        names += [f"rough_{octave}_{q}" for q in _ROUGH_QUANTILES]
    return (*names, "rows_std", "rows_jump", "columns_std", "columns_jump")


FEATURES = _names()
"""Names of the columns of :func:`texture_features`."""


def texture_features(pixels: Floats) -> Floats:
    """Texture statistics of one photo.

    Args:
        pixels: [height, width], 0 to 1, at native resolution; at least 8 x 8.

    Returns:
        [features], in the order of `FEATURES`.

    Source: Ojala, Pietikäinen and Mäenpää, IEEE TPAMI 24 (2002) 971-987 (LBP, riu2; here on the eight pixels around).
    """
    levels = [pixels]
    while len(levels) < OCTAVES:
        octave = _halved(levels[-1])
        levels.append(octave if min(octave.shape) >= _LEAST_SIDE else levels[-1])
    parts = [part for level in levels for part in (_pattern_histograms(level), _gradient_moments(level))]
    parts.append(_grey_statistics(pixels))
    parts += [_extremes(level) for level in levels[:_LOCAL_OCTAVES]]
    return np.concatenate([*parts, _profiles(pixels)]).astype(np.float32)


def texture_table(photos: Sequence[Photo], threads: int = 2) -> Floats:
    """Features of many photos: [photos, features]."""
    with ThreadPoolExecutor(threads) as pool:
        rows = list(pool.map(lambda photo: texture_features(photo.pixels()), photos))
    return np.stack(rows) if rows else np.zeros((0, len(FEATURES)), np.float32)


def _halved(pixels: Floats) -> Floats:
    height, width = (side // 2 * 2 for side in pixels.shape)
    cut = pixels[:height, :width]
    return 0.25 * (cut[0::2, 0::2] + cut[1::2, 0::2] + cut[0::2, 1::2] + cut[1::2, 1::2])


def _riu2() -> NDArray[np.uint8]:
    """Class of each of the 256 patterns: the number of ones where it is uniform (two changes at most), else 9."""
    codes = np.arange(256)
    bits = codes[:, None] >> np.arange(8) & 1
    changes = np.count_nonzero(bits != np.roll(bits, 1, axis=1), axis=1)
    return np.where(changes <= 2, bits.sum(axis=1), 9).astype(np.uint8)


_CLASS_OF = _riu2()


def _pattern_histograms(pixels: Floats) -> Floats:
    """Shares of the ten pattern classes: by number, and by contrast (standard deviation of the eight neighbours)."""
    height, width = pixels.shape
    centre = pixels[1:-1, 1:-1]
    code = np.zeros(centre.shape, np.uint8)
    total = np.zeros(centre.shape, np.float32)
    square = np.zeros(centre.shape, np.float32)
    for bit, (down, right) in enumerate(_NEIGHBOURS):
        neighbour = pixels[1 + down : height - 1 + down, 1 + right : width - 1 + right]
        code |= (neighbour >= centre).astype(np.uint8) << np.uint8(bit)
        difference = neighbour - centre
        total += difference
        square += difference * difference
    contrast = np.sqrt(np.maximum(square / 8 - (total / 8) ** 2, 0.0))
    kinds = _CLASS_OF[code].ravel()
    number = np.bincount(kinds, minlength=_PATTERNS) / kinds.size
    weight = np.bincount(kinds, weights=contrast.ravel(), minlength=_PATTERNS)
    return np.concatenate([number, weight / max(float(weight.sum()), _FLOOR)]).astype(np.float32)


def _gradient_moments(pixels: Floats) -> Floats:
    """Size, heaviness, direction and asymmetry of the gradient, and local contrast."""
    down = pixels[1:, :-1] - pixels[:-1, :-1]
    right = pixels[:-1, 1:] - pixels[:-1, :-1]
    size = np.sqrt(down * down + right * right)
    rms = float(np.sqrt(np.mean(size * size)))
    tensor = np.array([np.mean(right * right), np.mean(down * down), np.mean(right * down)], np.float64)
    trace = max(float(tensor[0] + tensor[1]), _FLOOR**2)
    spread = float(pixels.std())
    bend = pixels[1:-1, 1:-1] - 0.25 * (pixels[:-2, 1:-1] + pixels[2:, 1:-1] + pixels[1:-1, :-2] + pixels[1:-1, 2:])
    bend_rms = max(float(np.sqrt(np.mean(bend * bend))), _FLOOR)
    return np.array(
        [
            np.log(float(size.mean()) + _FLOOR),
            np.log(rms + _FLOOR),
            (tensor[0] - tensor[1]) / trace,
            2 * abs(tensor[2]) / trace,
            np.log(spread + _FLOOR),
            float(np.mean(bend * bend * bend)) / bend_rms**3,
        ],
        np.float32,
    )


def _grey_statistics(pixels: Floats) -> Floats:
    mean, deviation = float(pixels.mean()), float(pixels.std())
    z = (pixels - mean) / max(deviation, _FLOOR)
    square = z * z
    return np.array(
        [*np.quantile(pixels, _QUANTILES), mean, deviation, np.mean(square * z), np.mean(square * square)], np.float32
    )


def _extremes(pixels: Floats) -> Floats:
    """How far the brightest, darkest and roughest spots stand out, in robust deviations of the photo itself."""
    around = _SURROUNDINGS if min(pixels.shape) > 2 * _SURROUNDINGS else _SURROUNDINGS // 2
    spots = ndimage.uniform_filter(pixels, 3) - ndimage.uniform_filter(pixels, around)
    middle = float(np.median(spots))
    deviation = _NORMAL_MAD * float(np.median(np.abs(spots - middle))) + _FLOOR
    z = np.quantile((spots - middle) / deviation, _SPOT_QUANTILES)
    down = pixels[1:, :-1] - pixels[:-1, :-1]
    right = pixels[:-1, 1:] - pixels[:-1, :-1]
    rough = np.log(np.maximum(ndimage.uniform_filter(down * down + right * right, 7), 0.0) + _FLOOR**1.5)
    rms = float(np.sqrt(np.mean(spots * spots))) + _FLOOR
    return np.array(
        [
            *(np.sign(z) * np.log1p(np.abs(z))),
            np.log(deviation),
            np.log(rms / deviation),
            *(np.quantile(rough, _ROUGH_QUANTILES) - np.median(rough)),
        ],
        np.float32,
    )


def _profiles(pixels: Floats) -> Floats:
    """Spread and greatest jump of the mean brightness along columns and rows: bands, edges, broken corners."""
    found: list[float] = []
    for axis in (0, 1):
        profile = pixels.mean(axis=axis)
        found += [float(profile.std()), float(np.abs(np.diff(ndimage.uniform_filter(profile, 5))).max())]
    return np.array(found, np.float32)
