"""The sensor: what every photo of a line has in common, whatever is on it. Samples are passed through it before use.

A network's samples are smooth between the grey values that a sensor knows, and below its noise. On photos of a binary
sensor, setting samples to its two values is worth a factor of twenty in kernel distance.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from gmel.scenario.errors import InputError
from gmel.synthesis.generator import Arrays
from gmel.synthesis.photo import Floats, Photo

__all__ = ["Sensor", "noise_floor"]

_BINARY_SHARE = 0.9
"""Share of pixels at the two ends from which on a sensor is binary."""
_FEW = 64
"""A sensor of so many grey values or fewer quantises visibly."""
_BLOCK = 8


@dataclass(frozen=True, eq=False)
class Sensor:
    """What is common to all photos of a sensor.

    Attributes:
        levels: grey values that occur, 0 to 1, rising, where they are few; empty where all may occur.
        binary: the sensor gives two values: samples go to the nearer one.
        noise: standard deviation of the noise in the calmest places, of the full scale.
        low: the darkest value (but for one pixel in a thousand).
        high: the brightest.
    """

    levels: Floats
    binary: bool
    noise: float
    low: float
    high: float

    @classmethod
    def fit(cls, photos: Sequence[Photo]) -> Self:
        """The sensor of photos of one line.

        Raises:
            InputError: there are none.
        """
        if not photos:
            raise InputError("photos: there are none to learn the sensor from; give at least one")
        pixels = [photo.pixels() for photo in photos]
        values = np.concatenate([each.ravel() for each in pixels])
        low, high = (float(value) for value in np.quantile(values, [0.001, 0.999]))
        ends = np.quantile(values, [0.02, 0.98])
        near = np.abs(values[:, None] - ends[None, :]).min(1) <= 0.1 * (ends[1] - ends[0])
        binary = bool(ends[1] - ends[0] > 0.2 and near.mean() >= _BINARY_SHARE)
        if binary:
            middle = (ends[0] + ends[1]) / 2
            levels = np.asarray([np.median(values[values < middle]), np.median(values[values >= middle])], np.float32)
        else:
            found = np.unique(values)
            levels = found.astype(np.float32) if found.size <= _FEW else np.zeros(0, np.float32)
        noise = 0.0 if binary else float(np.median([noise_floor(each) for each in pixels]))
        return cls(levels, binary, noise, low, high)

    def applied(self, pixels: Floats, rng: np.random.Generator) -> Floats:
        """Pixels as this sensor would have given them: its noise where they have less, its range, its grey values."""
        if not self.binary:
            missing = self.noise**2 - noise_floor(pixels) ** 2
            if missing > 0.0:
                noise = np.sqrt(missing) * rng.standard_normal(pixels.shape)
                pixels = (pixels + noise).astype(np.float32)
        pixels = pixels.clip(self.low, self.high)
        if self.levels.size:
            between = (self.levels[1:] + self.levels[:-1]) / 2
            pixels = self.levels[np.searchsorted(between, pixels)]
        return pixels.astype(np.float32)

    def state(self) -> Arrays:
        """The arrays of a file."""
        numbers = np.asarray([self.binary, self.noise, self.low, self.high], np.float32)
        return {"sensor.levels": self.levels, "sensor.numbers": numbers}

    @classmethod
    def from_state(cls, arrays: Arrays) -> Self:
        """The sensor of a file.

        Raises:
            InputError: its arrays are missing or have other shapes.
        """
        levels, numbers = arrays.get("sensor.levels"), arrays.get("sensor.numbers")
        if levels is None or levels.ndim != 1 or numbers is None or numbers.shape != (4,):
            raise InputError(
                "array sensor.levels or sensor.numbers is missing or has another shape; fit the generator anew"
            )
        binary, noise, low, high = (float(value) for value in numbers)
        return cls(levels.astype(np.float32), bool(binary), noise, low, high)


def noise_floor(pixels: NDArray[np.floating]) -> float:
    """Standard deviation of the noise in the calmest tenth of a photo (Immerkaer 1996: a mask that is blind to slopes
    and curvature, here in blocks of 8 x 8)."""
    mask = np.asarray([[1, -2, 1], [-2, 4, -2], [1, -2, 1]], np.float32)
    rough = np.abs(ndimage.convolve(pixels.astype(np.float32), mask, mode="nearest"))
    height, width = (max(length // _BLOCK, 1) for length in rough.shape)
    inner = rough[: height * _BLOCK, : width * _BLOCK]
    step = [length // count for length, count in zip(inner.shape, (height, width), strict=True)]
    blocks = inner[: height * step[0], : width * step[1]].reshape(height, step[0], width, step[1]).mean((1, 3))
    return float(np.sqrt(np.pi / 2) / 6 * np.quantile(blocks, 0.1))
