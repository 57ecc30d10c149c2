"""Anomaly score against good parts: a memory of how their patches look, and how far a photo's patches are from it.

Needs no defects at all: it finds what nobody has photographed yet. It names no type, and where good parts differ much
among themselves (lamps, exposures) it finds little; `gmel synthesize train` says what it reaches on the shots.
"""

# scikit-learn and SciPy's `ndimage` ship no types; unknown types from them are not ours (as in pyproject.toml).
# pyright: reportUnknownMemberType=false, reportMissingTypeStubs=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
from scipy import ndimage
from sklearn.neighbors import NearestNeighbors

from gmel.scenario.errors import InputError
from gmel.synthesis.photo import Floats, Photo

__all__ = ["PatchMemory", "patch_features"]

_CELL = 4
"""Pixels between patches, each way."""
_SCALES = (1.0, 2.0, 4.0)
"""Widths at which a patch is looked at, in pixels (standard deviation of the blur)."""
_FLOOR = 0.02
_PATCHES = 20_000
"""Patches of good parts that the memory is chosen from."""
_MEMORY = 2_000
_NEIGHBOURS = 3
_WORST = 0.01
"""Share of a photo's patches that its score is the mean of: its worst."""


def patch_features(pixels: Floats) -> Floats:
    """What each patch looks like: [rows, columns, features], a patch every 4 pixels.

    At three widths: brightness, steepness, curvature (its sum and its difference by direction), each blurred over the
    patch; after the photo's own brightness and contrast are taken out.

    Args:
        pixels: [height, width], 0 to 1, at least 8 x 8.
    """
    middle = float(np.median(pixels))
    spread = float(np.median(np.abs(pixels - middle))) * 1.4826 + _FLOOR
    standard = np.clip((pixels - middle) / spread, -8.0, 8.0)
    maps: list[Floats] = []
    for scale in _SCALES:
        blurred = np.asarray(ndimage.gaussian_filter(standard, scale), np.float32)
        down, right = np.gradient(blurred)
        down_down, down_right = np.gradient(down)
        right_right = np.gradient(right)[1]
        trace = down_down + right_right
        twist = np.sqrt((down_down - right_right) ** 2 + 4.0 * down_right**2)
        steep = np.sqrt(down**2 + right**2)
        looks = (blurred, scale * steep, scale**2 * trace, scale**2 * twist)
        maps += [np.asarray(ndimage.uniform_filter(look, 2 * _CELL), np.float32) for look in looks]
    half = _CELL // 2
    return np.stack(maps, axis=-1)[half::_CELL, half::_CELL]


@dataclass(frozen=True, eq=False)
class PatchMemory:
    """Patches of good parts.

    Attributes:
        mean, deviation: of each feature, [features].
        patches: standardised, chosen to cover all of them, [memory, features].
    """

    mean: Floats
    deviation: Floats
    patches: Floats

    @classmethod
    def fit(cls, good: Sequence[Photo], seed: int = 0) -> Self:
        """The memory of good parts.

        Raises:
            InputError: no good parts.

        Source: Roth et al. 2022 (arXiv 2106.08265), sections 3.1 and 3.2 (greedy coreset), on weight-free features.
        """
        if not good:
            raise InputError("no good parts; an anomaly score is a distance from them")
        random = np.random.default_rng(seed)
        each = max(1, _PATCHES // len(good))
        rows: list[Floats] = []
        for photo in good:
            found = patch_features(photo.pixels())
            flat = found.reshape(-1, found.shape[-1])
            rows.append(flat[random.permutation(len(flat))[:each]])
        patches = np.concatenate(rows)
        mean, deviation = patches.mean(axis=0), patches.std(axis=0) + np.float32(1e-6)
        standard = (patches - mean) / deviation
        return cls(mean, deviation, standard[_coreset(standard, min(_MEMORY, len(standard)), random)])

    def distances(self, photo: Photo) -> Floats:
        """Distance of each patch from the memory: [rows, columns]."""
        found = patch_features(photo.pixels())
        flat = (found.reshape(-1, found.shape[-1]) - self.mean) / self.deviation
        near = min(_NEIGHBOURS, len(self.patches))
        distance, _ = NearestNeighbors(n_neighbors=near).fit(self.patches).kneighbors(flat)
        return distance.mean(axis=1).reshape(found.shape[:2]).astype(np.float32)

    def score(self, photo: Photo) -> float:
        """Anomaly score: mean distance of the photo's worst patches; greater is stranger."""
        distance = np.sort(self.distances(photo).ravel())[::-1]
        return float(distance[: max(1, int(_WORST * distance.size))].mean())


def _coreset(rows: Floats, size: int, random: np.random.Generator) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """Rows that cover all rows: each next one is the farthest from those chosen (after a first at random)."""
    chosen = [int(random.integers(len(rows)))]
    nearest = np.linalg.norm(rows - rows[chosen[0]], axis=1)
    while len(chosen) < size:
        chosen.append(int(np.argmax(nearest)))
        nearest = np.minimum(nearest, np.linalg.norm(rows - rows[chosen[-1]], axis=1))
    return np.asarray(chosen, np.int64)
