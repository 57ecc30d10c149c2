"""Surfaces without a photo: four kinds of texture, the light that falls on them, the sensor that sees them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import fft, ndimage
from scipy.special import expit

__all__ = ["SURFACES", "Camera", "Field", "Surface", "noise", "photographed"]

Field = NDArray[np.float64]
Shape = tuple[int, int]


@dataclass(frozen=True)
class Camera:
    """Light and sensor of a site, in parts of full scale.

    Attributes:
        exposure: spread (standard deviation) of the brightness from photo to photo, relative.
        slope: largest change of the light across a photo, relative.
        vignette: loss of light in the corners, relative.
        photon_noise: standard deviation of the noise at full scale; it falls with the root of the light.
        read_noise: standard deviation of the noise in the dark.
        blur: standard deviation of the point spread, pixels.
    """

    exposure: float
    slope: float
    vignette: float
    photon_noise: float
    read_noise: float
    blur: float


@dataclass(frozen=True)
class Surface:
    """One kind of surface: mean + contrast x `texture(shape, rng)`, which has mean 0 and deviation 1."""

    texture: Callable[[Shape, np.random.Generator], Field]
    mean: float
    contrast: float
    camera: Camera

    def reflectance(self, shape: Shape, rng: np.random.Generator) -> Field:
        """[height, width]: what part of the light the surface throws back."""
        contrast = self.contrast * np.exp(0.2 * rng.standard_normal())
        return self.mean * np.exp(0.05 * rng.standard_normal()) + contrast * self.texture(shape, rng)


def noise(shape: Shape, rng: np.random.Generator, tall: float, wide: float) -> Field:
    """[height, width]: Gaussian noise smoothed by so many pixels along either side; mean 0, deviation 1."""
    # Twice the width beyond the edge, so that one side does not repeat the other; by FFT, as cheap for any width.
    height, width = (
        int(fft.next_fast_len(side + int(min(2 * s, side))) or side)
        for side, s in zip(shape, (tall, wide), strict=True)
    )
    down, across = np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None]
    transfer = np.exp(-2 * (np.pi * tall * down) ** 2) * np.exp(-2 * (np.pi * wide * across) ** 2)
    rough: Any = fft.rfft2(rng.standard_normal((height, width)))
    smooth: Any = fft.irfft2(rough * transfer, s=(height, width))
    return _unit(smooth[: shape[0], : shape[1]])


def photographed(reflectance: Field, camera: Camera, rng: np.random.Generator) -> Field:
    """[height, width], 0 to 1: what the sensor gives of a surface under uneven light."""
    height, width = reflectance.shape
    rows, columns = np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]
    angle, slope = rng.uniform(0, 2 * np.pi), rng.uniform(0, camera.slope)
    middle = rng.normal(0, 0.2, 2)
    falloff = ((rows - middle[0]) ** 2 + (columns - middle[1]) ** 2) / 2
    light = 1 + slope * (np.cos(angle) * columns + np.sin(angle) * rows) / np.sqrt(2) - camera.vignette * falloff
    seen = ndimage.gaussian_filter(reflectance * light, camera.blur) * np.exp(camera.exposure * rng.standard_normal())
    seen = np.clip(seen, 0, 1)
    deviation = np.sqrt(camera.photon_noise**2 * seen + camera.read_noise**2)
    return np.clip(seen + deviation * rng.standard_normal(seen.shape), 0, 1)


def _unit(field: Field) -> Field:
    return (field - field.mean()) / max(float(field.std()), 1e-12)


def _turned(field: Field, degrees: float, shape: Shape) -> Field:
    """The middle of a larger field, turned."""
    turned = ndimage.rotate(field, degrees, reshape=False, order=1, mode="reflect")
    top, left = ((whole - part) // 2 for whole, part in zip(field.shape, shape, strict=True))
    return turned[top : top + shape[0], left : left + shape[1]]


def _brushed(shape: Shape, rng: np.random.Generator) -> Field:
    """Brushed steel: long streaks of unlike length, nearly along the rows."""
    larger = (shape[0] + 24, shape[1] + 24)
    streaks = 0.8 * noise(larger, rng, 0.7, 40) + 0.6 * noise(larger, rng, 0.5, 9) + 0.5 * noise(larger, rng, 2.5, 60)
    return _unit(_turned(streaks, rng.normal(0, 1.5), shape) + 0.35 * noise(shape, rng, 9, 14))


def _cast(shape: Shape, rng: np.random.Generator) -> Field:
    """Cast iron: grains of several sizes, more dark hollows than bright tips."""
    grains = noise(shape, rng, 1.0, 1.0) + 0.7 * noise(shape, rng, 2.0, 2.0) + 0.5 * noise(shape, rng, 6, 6)
    return _unit(-np.exp(-0.22 * grains) + 0.12 * noise(shape, rng, 18, 18))


def _woven(shape: Shape, rng: np.random.Generator) -> Field:
    """Woven fabric: warp over weft and weft over warp in turn; threads wander and differ."""
    period = rng.uniform(8.5, 9.5)
    rows, columns = np.mgrid[: shape[0], : shape[1]].astype(float)
    rows += 1.6 * noise(shape, rng, 14, 22) + rng.uniform(0, period)
    columns += 1.6 * noise(shape, rng, 22, 14) + rng.uniform(0, period)
    over = np.sin(np.pi * rows / period) * np.sin(np.pi * columns / period)
    weft, warp = np.abs(np.sin(np.pi * rows / period)), np.abs(np.sin(np.pi * columns / period))
    share = expit(9 * over)
    fibres = share * (warp + 0.2 * noise(shape, rng, 3, 0.6)) + (1 - share) * (weft + 0.2 * noise(shape, rng, 0.6, 3))
    threads = 0.12 * noise(shape, rng, 0.8 * period, 60) + 0.12 * noise(shape, rng, 60, 0.8 * period)
    return _unit(fibres + threads + 0.09 * noise(shape, rng, 25, 25))


def _rolled(shape: Shape, rng: np.random.Generator) -> Field:
    """Hot-rolled strip: cloudy scale, short flecks and a few lines along the columns."""
    clouds = noise(shape, rng, 16, 9) + 0.7 * noise(shape, rng, 6, 4)
    flecks = np.maximum(noise(shape, rng, 3.5, 1) - 1.2, 0)
    lines = noise(shape, rng, 90, 1.2)
    return _unit(0.6 * clouds + 0.9 * flecks + 0.35 * lines + 0.5 * noise(shape, rng, 0.9, 0.8))


SURFACES: dict[str, Surface] = {
    "brushed": Surface(_brushed, 0.62, 0.055, Camera(0.06, 0.16, 0.12, 0.014, 0.004, 0.5)),
    "cast": Surface(_cast, 0.47, 0.055, Camera(0.08, 0.14, 0.22, 0.022, 0.006, 0.6)),
    "woven": Surface(_woven, 0.52, 0.085, Camera(0.05, 0.10, 0.08, 0.018, 0.004, 0.7)),
    "rolled": Surface(_rolled, 0.48, 0.050, Camera(0.10, 0.20, 0.15, 0.026, 0.008, 0.5)),
}
"""The surfaces by name; each is the line of one site, with a camera of its own."""
