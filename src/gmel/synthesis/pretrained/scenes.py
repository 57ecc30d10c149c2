"""What is drawn for a photo of a class, on a square canvas of a pipeline's side, and how the photo is made of it.

A pipeline knows whole pictures of one size. A class with masks is drawn on good parts: a square region around an
outline of a shot, larger than the defect, is brought to the canvas and only the outline is drawn anew. Other classes
are drawn whole and brought to the size of a shot.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from gmel.scenario.errors import InputError
from gmel.synthesis.diffusion.drawing import AROUND
from gmel.synthesis.diffusion.windows import Box, Mask, dihedral, dilated, placed, shapes
from gmel.synthesis.generator import Arrays
from gmel.synthesis.photo import GOOD, Floats, Photo, labels_of
from gmel.synthesis.sensor import Sensor

__all__ = ["Canvas", "Crops", "DrawCanvases", "Scenes"]

_GOOD_SHARE = 0.25
_ROOM = 2
"""Side of a region over that of its defect, at least: half of what the network sees is the part around it."""


@dataclass(frozen=True, eq=False)
class Canvas:
    """What a pipeline is to draw.

    Attributes:
        known: [side, side], 0 to 1, the pixels where `mask` is 0.
        mask: [side, side], true where pixels are drawn.
        number: of the class, from 1.
        seed: of the noise.
    """

    known: Floats
    mask: Mask
    number: int
    seed: int


DrawCanvases = Callable[[list[Canvas]], list[Floats]]
"""Draws canvases: [side, side] each, 0 to 1."""


@dataclass(frozen=True, eq=False)
class _Scene:
    """A canvas and how the photo is made of it."""

    canvas: Canvas
    finish: Callable[[Floats, np.random.Generator], Photo]


@dataclass(frozen=True, eq=False)
class _Look:
    """What is kept of a class: its number, sizes of its photos (height, width), outlines of its defects."""

    number: int
    sizes: tuple[tuple[int, int], ...]
    outlines: tuple[Mask, ...]


@dataclass(frozen=True, eq=False)
class Scenes:
    """What is learned of a site beside the weights.

    Attributes:
        looks: by class, `GOOD` among them where there were good parts.
        side: pixels of a canvas's side.
        sensor: of the photos.
        dtype: of their pixels.
        good: good parts to draw on; not saved.
    """

    looks: dict[str, _Look]
    side: int
    sensor: Sensor
    dtype: np.dtype[np.unsignedinteger]
    good: tuple[Photo, ...] = ()

    @classmethod
    def fit(cls, shots: Sequence[Photo], good: Sequence[Photo], side: int) -> Self:
        """Args:
            shots: photos of defects.
            good: photos of good parts, or none.
            side: pixels of a canvas's side.

        Raises:
            InputError: no shots, or masks of another size than their photos.
        """
        if not shots:
            raise InputError("shots: there are none; give at least one photo of a defect")
        everything = [*shots, *good]
        for photo in everything:
            if photo.mask is not None and photo.mask.shape != photo.image.shape:
                raise InputError(
                    f"{photo.name}: the mask is {photo.mask.shape}, the photo {photo.image.shape}; mend it"
                )
        looks: dict[str, _Look] = {}
        for number, label in enumerate(labels_of(everything), start=1):
            members = [photo for photo in everything if photo.label == label]
            outlines = [
                np.ascontiguousarray(box.of(photo.mask))
                for photo in members
                if label != GOOD and photo.mask is not None
                for box in shapes(photo.mask)
            ]
            sizes = tuple(dict.fromkeys((photo.image.shape[0], photo.image.shape[1]) for photo in members))
            looks[label] = _Look(number, sizes, tuple(outlines))
        return cls(looks, side, Sensor.fit(everything), everything[0].image.dtype, tuple(good))

    @property
    def labels(self) -> tuple[str, ...]:
        """Classes of defects."""
        return tuple(label for label in self.looks if label != GOOD)

    @property
    def classes(self) -> tuple[str, ...]:
        """All classes, in the order of their numbers from 1."""
        return tuple(self.looks)

    def inpaints(self, label: str) -> bool:
        """Whether defects of a class are drawn on good parts."""
        return bool(self.looks[label].outlines) and GOOD in self.looks

    def photos(self, mode: str, label: str, count: int, seed: int, draw: DrawCanvases) -> list[Photo]:
        """`count` photos of a class; what is random in photo `i` depends on the seed and `i` only.

        Raises:
            InputError: a class that was not learned, or a count below 0.
        """
        if label not in self.labels:
            raise InputError(f"label is {label!r}, must be one of {', '.join(self.labels)}")
        if count < 0:
            raise InputError(f"count is {count}, must be 0 or more")
        streams = [np.random.default_rng((seed, self.looks[label].number, index)) for index in range(count)]
        made = self._drawn(label, label, streams, draw)
        return [replace(photo, name=f"{mode} {label} {index}") for index, photo in enumerate(made)]

    def sham(self, mode: str, count: int, seed: int, draw: DrawCanvases) -> list[Photo]:
        """`count` photos of good parts, drawn as those of the defects are; none where no good parts were learned."""
        if GOOD not in self.looks:
            return []
        streams = [np.random.default_rng((seed, 0, index)) for index in range(count)]
        made: list[Photo] = []
        for turn, label in enumerate(self.labels):
            made += self._drawn(label, GOOD, streams[turn :: len(self.labels)], draw)
        return [replace(photo, name=f"{mode} {GOOD} {index}", mask=None) for index, photo in enumerate(made)]

    def _drawn(self, outlined: str, label: str, streams: list[np.random.Generator], draw: DrawCanvases) -> list[Photo]:
        """Photos of a class; where outlines are filled, they are those of the class `outlined`."""
        if not self.inpaints(outlined):
            return _finished([self._whole(label, rng) for rng in streams], streams, draw)
        if self.good:
            grounds = [self.good[int(rng.integers(len(self.good)))] for rng in streams]
        else:
            grounds = _finished([self._whole(GOOD, rng) for rng in streams], streams, draw)
        scenes = [self._inpainted(outlined, label, each, rng) for each, rng in zip(grounds, streams, strict=True)]
        return _finished(scenes, streams, draw)

    def _whole(self, label: str, rng: np.random.Generator) -> _Scene:
        look = self.looks[label]
        height, width = look.sizes[int(rng.integers(len(look.sizes)))]
        nothing, everywhere = np.zeros((self.side, self.side), np.float32), np.ones((self.side, self.side), bool)

        def finish(drawn: Floats, stream: np.random.Generator) -> Photo:
            pixels = self.sensor.applied(resized(drawn, height, width), stream)
            return Photo(np.zeros((1, 1), self.dtype), label).having(pixels)

        return _Scene(Canvas(nothing, everywhere, look.number, int(rng.integers(2**62))), finish)

    def _inpainted(self, outlined: str, label: str, ground: Photo, rng: np.random.Generator) -> _Scene:
        """An outline of the class `outlined` on a good part, filled by the class `label`; all other pixels stay as they
        are, bit for bit."""
        outlines = self.looks[outlined].outlines
        size = (ground.image.shape[0], ground.image.shape[1])
        shape = placed(outlines[int(rng.integers(len(outlines)))], size, rng)
        inside = dilated(shape, AROUND)
        rows, columns = np.flatnonzero(shape.any(1)), np.flatnonzero(shape.any(0))
        bounds = Box(int(rows[0]), int(columns[0]), int(rows[-1] - rows[0]) + 1, int(columns[-1] - columns[0]) + 1)
        region = region_around(bounds, size, self.side, rng)
        pixels = ground.pixels()
        known = resized(np.asarray(region.of(pixels)), self.side, self.side)
        mask = resized(region.of(inside).astype(np.float32), self.side, self.side, Image.Resampling.BOX) > 0.0
        template = ground.image if ground.template is None else ground.template

        def finish(drawn: Floats, stream: np.random.Generator) -> Photo:
            filled = pixels.copy()
            rows, columns = (
                slice(region.top, region.top + region.height),
                slice(region.left, region.left + region.width),
            )
            filled[rows, columns] = resized(drawn, region.height, region.width)
            sensed = ground.having(self.sensor.applied(np.where(inside, filled, pixels), stream))
            image = np.where(inside, sensed.image, ground.image).astype(ground.image.dtype)
            return replace(sensed, image=image, label=label, mask=shape, template=template, group="", source="")

        return _Scene(Canvas(known, mask, self.looks[label].number, int(rng.integers(2**62))), finish)

    def state(self) -> tuple[Arrays, dict[str, str]]:
        """Arrays and facts of a file: outlines, sizes, sensor; no photo is in it."""
        arrays = self.sensor.state()
        for label, look in self.looks.items():
            arrays[f"sizes.{label}"] = np.asarray(look.sizes, np.int32)
            for index, outline in enumerate(look.outlines):
                arrays[f"outline.{label}.{index}"] = outline.astype(np.uint8)
        facts = {"labels": "\n".join(self.looks), "side": str(self.side), "dtype": self.dtype.name}
        return arrays, facts

    @classmethod
    def from_state(cls, arrays: Arrays, facts: dict[str, str]) -> Self:
        """The scenes of a file.

        Raises:
            InputError: something is missing or has another shape.
        """
        labels = [label for label in facts.get("labels", "").split("\n") if label]
        side = facts.get("side", "")
        if not labels or not side.isdecimal() or facts.get("dtype") not in ("uint8", "uint16"):
            raise InputError("labels, side or dtype are missing in the file or wrong; fit the generator anew")
        looks: dict[str, _Look] = {}
        for number, label in enumerate(labels, start=1):
            sizes = arrays.get(f"sizes.{label}")
            if sizes is None or sizes.ndim != 2 or sizes.shape[1] != 2 or not sizes.size or (sizes < 1).any():
                raise InputError(f"array sizes.{label} is missing or has another shape; fit the generator anew")
            names = [f"outline.{label}.{index}" for index in range(len(arrays)) if f"outline.{label}.{index}" in arrays]
            outlines = tuple(_outline(arrays[name], name) for name in names)
            pairs = tuple((int(height), int(width)) for height, width in sizes)
            looks[label] = _Look(number, pairs, outlines)
        return cls(looks, int(side), Sensor.from_state(arrays), np.dtype(facts["dtype"]))


@dataclass(frozen=True, eq=False)
class Crops:
    """Pictures to train on: what canvases will be, at random places, turned and mirrored.

    Attributes:
        scenes: what is drawn later.
        photos: by class.
    """

    scenes: Scenes
    photos: dict[str, list[Photo]]

    @classmethod
    def of(cls, shots: Sequence[Photo], good: Sequence[Photo], scenes: Scenes) -> Self:
        """The pictures of a site."""
        photos: dict[str, list[Photo]] = {}
        for photo in (*shots, *good):
            photos.setdefault(photo.label, []).append(photo)
        return cls(scenes, photos)

    def __call__(self, rng: np.random.Generator, count: int) -> tuple[Floats, NDArray[np.int64]]:
        """Pictures [count, side, side], 0 to 1, and their class numbers [count]; a quarter of them are good parts."""
        side, defects = self.scenes.side, self.scenes.labels
        pictures: list[Floats] = []
        numbers: list[int] = []
        for _ in range(count):
            good = GOOD in self.photos and rng.random() < _GOOD_SHARE
            label = GOOD if good else defects[int(rng.integers(len(defects)))]
            photo = self.photos[label][int(rng.integers(len(self.photos[label])))]
            size = (photo.image.shape[0], photo.image.shape[1])
            region = Box(0, 0, *size)
            if label == GOOD:
                if rng.random() < 0.5 and any(self.scenes.inpaints(each) for each in defects):
                    anywhere = Box(int(rng.integers(size[0])), int(rng.integers(size[1])), 1, 1)
                    region = region_around(anywhere, size, side, rng)
            elif self.scenes.inpaints(label) and photo.mask is not None and photo.mask.any():
                boxes = shapes(photo.mask)
                region = region_around(boxes[int(rng.integers(len(boxes)))], size, side, rng)
            picture = resized(np.asarray(region.of(photo.pixels())), side, side)
            pictures.append(dihedral(picture, int(rng.integers(8))))
            numbers.append(self.scenes.looks[label].number)
        return np.stack(pictures), np.asarray(numbers, np.int64)


def region_around(box: Box, size: tuple[int, int], side: int, rng: np.random.Generator) -> Box:
    """A region that holds a box, by chance where in it: a square of a canvas's side, or twice the box's longer side
    where that is more; no more than the photo."""
    wanted = max(side, _ROOM * max(box.height, box.width))
    place: list[tuple[int, int]] = []
    for start, length, limit in ((box.top, box.height, size[0]), (box.left, box.width, size[1])):
        extent = min(wanted, limit)
        first, last = max(start + length - extent, 0), min(start, limit - extent)
        place.append((int(rng.integers(min(first, last), max(first, last) + 1)), extent))
    return Box(place[0][0], place[1][0], place[0][1], place[1][1])


def resized(pixels: Floats, height: int, width: int, filtering: Image.Resampling = Image.Resampling.BICUBIC) -> Floats:
    """Pixels at another size, without aliasing; as they are where the size is theirs."""
    if pixels.shape == (height, width):
        return pixels
    made = Image.fromarray(np.ascontiguousarray(pixels, np.float32)).resize((width, height), filtering)
    return np.asarray(made, np.float32).clip(0.0, 1.0)


def _finished(scenes: list[_Scene], streams: list[np.random.Generator], draw: DrawCanvases) -> list[Photo]:
    drawn = draw([scene.canvas for scene in scenes])
    return [scene.finish(each, rng) for scene, each, rng in zip(scenes, drawn, streams, strict=True)]


def _outline(array: NDArray[Any], name: str) -> Mask:
    if array.ndim != 2 or not array.any():
        raise InputError(f"array {name} is empty or has another shape; fit the generator anew")
    return array.astype(bool)
