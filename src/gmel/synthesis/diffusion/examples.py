"""The windows that networks are trained on: cut from photos at random places, turned and mirrored."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import jax.numpy as jnp
import numpy as np

from gmel.synthesis.diffusion.drawing import AROUND, CLIP
from gmel.synthesis.diffusion.edm import Given, Windows
from gmel.synthesis.diffusion.looks import Looks
from gmel.synthesis.diffusion.windows import (
    SIDE,
    Appearance,
    Box,
    Mask,
    appearances_of,
    background,
    dihedral,
    dilated,
    field_box,
    fields,
    guide,
    random_mask,
    reduced,
    reduced_mask,
    shapes,
)
from gmel.synthesis.photo import GOOD, Floats, Photo

__all__ = ["Examples"]

_GOOD_SHARE = 0.25
_EDGE_SHARE = 0.25
"""Of the windows of defects: only the edge is unknown, as when composed photos are harmonised."""

Window = tuple[Floats, Mask, int]
"""Texture and guide [side, side, 3], what is drawn, class number."""


@dataclass(frozen=True, eq=False)
class Examples:
    """Windows to train on, cut at random places, turned and mirrored.

    Attributes:
        whole: by class number, the texture and the guide of its photos, as channels.
        marked: by class number, photos with masks (pixels, mask, boxes of its defects).
        good: class number of good parts, drawn a quarter of the time; 0 where there are none among others.
        plain: pixels of good parts. Half of their windows are normalised by what is not drawn of the window, as where a
            part of a photo is drawn over; the other half are texture, as where whole photos are drawn.
    """

    whole: dict[int, list[Floats]]
    marked: dict[int, list[tuple[Floats, Mask, list[Box]]]]
    good: int
    plain: list[Floats]

    @classmethod
    def of(cls, shots: Sequence[Photo], good: Sequence[Photo], looks: Looks) -> Self:
        """The windows of a site."""
        whole: dict[int, list[Floats]] = {}
        marked: dict[int, list[tuple[Floats, Mask, list[Box]]]] = {}
        for label, look in looks.classes.items():
            members = [photo for photo in (*shots, *good) if photo.label == label]
            if label != GOOD and looks.inpaints(label):
                marked[look.number] = [
                    (reduced(photo.pixels(), looks.scale), mask, shapes(mask))
                    for photo in members
                    if (mask := reduced_mask(photo.mask, looks.scale)) is not None and mask.any()
                ]
            else:
                whole[look.number] = textures(members, look.appearances, looks.scale)
        number = looks.classes[GOOD].number if GOOD in looks.classes else 0
        return cls(whole, marked, number, [reduced(photo.pixels(), looks.scale) for photo in good] if number else [])

    @classmethod
    def of_good(cls, good: Sequence[Photo], scale: int) -> Self:
        """Windows of good parts alone."""
        pixels = [reduced(photo.pixels(), scale) for photo in good]
        sizes = [(photo.image.shape[0], photo.image.shape[1]) for photo in good]
        return cls({1: textures(good, appearances_of(pixels, sizes), scale)}, {}, 1, pixels)

    def __call__(self, rng: np.random.Generator, count: int) -> Windows:
        """A batch: a class at random for each window, good parts a quarter of the time."""
        defects = [number for number in (*self.whole, *self.marked) if number != self.good]
        made: list[Window] = []
        for _ in range(count):
            if self.good and (not defects or rng.random() < _GOOD_SHARE):
                inside = random_mask(rng)
                plain = bool(rng.random() < 0.5)
                cut = _cut_plain(self.plain, inside, rng) if plain else _cut(self.whole[self.good], rng)
                made.append((cut, inside, self.good))
                continue
            number = defects[int(rng.integers(len(defects)))]
            if number in self.marked:
                made.append((*_cut_marked(self.marked[number], rng), number))
            else:
                made.append((_cut(self.whole[number], rng), np.ones((SIDE, SIDE), bool), number))
        return window_batch(made, rng)


def textures(photos: Sequence[Photo], appearances: Sequence[Appearance], scale: int) -> list[Floats]:
    """[height, width, 3] each: the photos without their appearance, and the guide that tells of it."""
    made: list[Floats] = []
    for photo, appearance in zip(photos, appearances, strict=True):
        mean, contrast = fields(appearance)
        texture = np.clip((reduced(photo.pixels(), scale) - mean) / contrast, -CLIP, CLIP)
        made.append(np.concatenate([texture[..., None], guide(mean, contrast)], axis=-1).astype(np.float32))
    return made


def window_batch(windows: Sequence[Window], rng: np.random.Generator) -> Windows:
    """Windows with their guide, masks and class numbers as a batch, each turned and mirrored by chance."""
    turns = [int(turn) for turn in rng.integers(8, size=len(windows))]
    turned = [
        (dihedral(window, turn), dihedral(mask, turn)) for (window, mask, _), turn in zip(windows, turns, strict=True)
    ]
    channels = jnp.asarray(np.stack([window for window, _ in turned]))
    masks = jnp.asarray(np.stack([mask for _, mask in turned])[..., None], jnp.float32)
    numbers = jnp.asarray([number for _, _, number in windows], jnp.int32)
    return Windows(channels[..., :1], Given(channels[..., :1], masks, channels[..., 1:], numbers))


def _cut(fields_: Sequence[Floats], rng: np.random.Generator) -> Floats:
    field = fields_[int(rng.integers(len(fields_)))]
    top, left = (int(rng.integers(length - SIDE + 1)) for length in field.shape[:2])
    return field[top : top + SIDE, left : left + SIDE]


def _cut_plain(photos: Sequence[Floats], inside: Mask, rng: np.random.Generator) -> Floats:
    window = _cut(photos, rng)
    mean, contrast = background(window, inside)
    return _texture(window, mean, contrast)


def _texture(pixels: Floats, mean: float, contrast: float) -> Floats:
    """[height, width, 3]: texture by one mean and contrast; there is no guide."""
    texture = np.clip((pixels - mean) / contrast, -CLIP, CLIP)
    return np.pad(texture[..., None], ((0, 0), (0, 0), (0, 2))).astype(np.float32)


def _cut_marked(photos: Sequence[tuple[Floats, Mask, list[Box]]], rng: np.random.Generator) -> tuple[Floats, Mask]:
    """A window at a defect, normalised by the background of the field around it, as in sampling."""
    pixels, mask, boxes = photos[int(rng.integers(len(photos)))]
    around = field_box(boxes[int(rng.integers(len(boxes)))], (pixels.shape[0], pixels.shape[1]), rng)
    inside = dilated(around.of(mask), int(rng.integers(1, 2 * AROUND + 1)))
    patch = np.asarray(around.of(pixels), np.float32)
    mean, contrast = background(patch, inside)
    if rng.random() < _EDGE_SHARE:
        inside &= dilated(~around.of(mask), 2 * AROUND)
    window = np.zeros((SIDE, SIDE), bool)
    top = left = 0
    for _ in range(8):
        top, left = (int(rng.integers(length - SIDE + 1)) for length in patch.shape)
        window = inside[top : top + SIDE, left : left + SIDE]
        if window.any():
            break
    return _texture(patch[top : top + SIDE, left : left + SIDE], mean, contrast), window
