"""The built-in data set: photos that nobody took, free of licences, with several sites and exact masks."""

import zlib
from collections.abc import Sequence

import numpy as np

from gmel.evaluation.progress import Reporter
from gmel.scenario.errors import InputError
from gmel.synthesis.data.checks import group_twins
from gmel.synthesis.data.dataset import Dataset
from gmel.synthesis.data.defects import DEFECTS
from gmel.synthesis.data.surfaces import SURFACES, photographed
from gmel.synthesis.photo import GOOD, Photo, quantised

__all__ = ["draw_photo", "procedural_dataset"]

_SMALLEST = 48
# Strength of a defect against the contrast of its surface: from hard to see to plain, about as many of each.
_FAINT, _PLAIN = 2.0, 8.0


def draw_photo(surface: str, label: str, number: int, seed: int = 0, shape: tuple[int, int] = (160, 160)) -> Photo:
    """One photo of the built-in set: the same arguments give the same photo.

    Args:
        surface: name in `SURFACES`; the photo's site.
        label: name in `DEFECTS`, or `GOOD`.
        number: which photo of the class.
        seed: of the data set.
        shape: height and width in pixels.

    Raises:
        InputError: an unknown name, or a photo too small to show a texture.
    """
    if surface not in SURFACES:
        raise InputError(f"surface: {surface!r}, must be one of {', '.join(SURFACES)}")
    if label != GOOD and label not in DEFECTS:
        raise InputError(f"class: {label!r}, must be {GOOD} or one of {', '.join(DEFECTS)}")
    if min(shape) < _SMALLEST or min(seed, number) < 0:
        raise InputError(f"size: {shape}, must be at least {_SMALLEST} a side; seed and number must not be negative")
    rng = np.random.default_rng([seed, zlib.crc32(surface.encode()), zlib.crc32(label.encode()), number])
    kind = SURFACES[surface]
    reflectance = kind.reflectance(shape, rng)
    mask = None
    if label != GOOD:
        mark = DEFECTS[label](shape, rng)
        while not mark.mask.any():
            mark = DEFECTS[label](shape, rng)
        strength = kind.contrast * np.exp(rng.uniform(np.log(_FAINT), np.log(_PLAIN)))
        reflectance = kind.mean + mark.keeps * (reflectance - kind.mean) + strength * mark.change
        mask = mark.mask
    image = quantised(photographed(reflectance, kind.camera, rng), np.dtype(np.uint8))
    name = f"{surface}/{label}/{number:04d}.png"
    return Photo(image, label, mask=mask, group=name, site=surface, name=name)


def procedural_dataset(
    seed: int = 0,
    good: int = 120,
    defects: int = 24,
    shape: tuple[int, int] = (160, 160),
    sites: Sequence[str] = tuple(SURFACES),
    classes: Sequence[str] = tuple(DEFECTS),
    reporter: Reporter | None = None,
) -> Dataset:
    """Photos of surfaces that are drawn, with few defects and many good parts.

    A photo depends on the seed, its site, class and number alone: more photos, sites or classes leave the others as
    they are. Each shows another part.

    Args:
        seed: of everything.
        good: good parts of each site.
        defects: photos of each class of defects at each site.
        shape: height and width in pixels.
        sites: names in `SURFACES`.
        classes: names in `DEFECTS`.
        reporter: who is told how far it is.

    Raises:
        InputError: a value out of range.
    """
    if min(good, defects) < 0 or good + defects == 0:
        raise InputError(f"good {good}, defects {defects}: must not be negative, and not both 0")
    wanted = [
        (site, label, number)
        for site in sites
        for label, count in ((GOOD, good), *((each, defects) for each in classes))
        for number in range(count)
    ]
    photos: list[Photo] = []
    for done, (site, label, number) in enumerate(wanted):
        if reporter is not None and done % 20 == 0:
            reporter.advance(done, len(wanted), "drawing photos")
        photos.append(draw_photo(site, label, number, seed, shape))
    grouped, problems = group_twins(photos)
    return Dataset("builtin", grouped, problems)
