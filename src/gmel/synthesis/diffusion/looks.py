"""What is learned of a site beside the network: appearance and outlines of its classes, and the sensor.

It says what is to be drawn for a photo of a class, and turns what is drawn into the photo. Two ways:

- inpainting, for classes with masks where there are good parts: an outline of a shot, turned and scaled, is put on a
  good part, and what is inside is drawn, given what is around it;
- whole photos for the others: a field of texture is drawn and given the appearance of a shot.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from gmel.scenario.errors import InputError
from gmel.synthesis.diffusion.drawing import (
    AROUND,
    Asking,
    Draw,
    Drawing,
    Order,
    drawn_in_turns,
    field_of,
    finishing,
    redrawn,
)
from gmel.synthesis.diffusion.windows import (
    SIDE,
    Appearance,
    Box,
    Mask,
    appearances_of,
    dihedral_grid,
    dilated,
    enlarged,
    field_box,
    fields,
    guide,
    placed,
    reduced,
    reduced_mask,
    shapes,
)
from gmel.synthesis.generator import Arrays
from gmel.synthesis.photo import GOOD, Floats, Photo, labels_of
from gmel.synthesis.sensor import Sensor

__all__ = ["Look", "Looks"]


@dataclass(frozen=True, eq=False)
class Look:
    """What is kept of a class.

    Attributes:
        number: class number of the network.
        appearances: of its photos.
        outlines: masks of its separate defects, cut to their boxes; empty where nobody drew any.
    """

    number: int
    appearances: tuple[Appearance, ...]
    outlines: tuple[Mask, ...]


@dataclass(frozen=True, eq=False)
class Looks:
    """What is learned of a site beside the network.

    Attributes:
        classes: by label, `GOOD` among them where there were good parts.
        scale: windows are at 1 / `scale` of the photos' resolution: 1 or 2.
        sensor: of the photos.
        dtype: of their pixels.
        good: good parts to draw on; not saved.
    """

    classes: dict[str, Look]
    scale: int
    sensor: Sensor
    dtype: np.dtype[np.unsignedinteger]
    good: tuple[Photo, ...] = ()

    @classmethod
    def fit(
        cls, shots: Sequence[Photo], good: Sequence[Photo], scale: int, factorised: Mapping[str, bool] | bool
    ) -> Self:
        """Args:
            shots: photos of defects.
            good: photos of good parts, or none.
            scale: 1 for native resolution, 2 for half.
            factorised: whether brightness and contrast are taken out, by class or for all.

        Raises:
            InputError: no shots, a scale that is not 1 or 2, or masks of another size than their photos.
        """
        if not shots:
            raise InputError("shots: there are none; give at least one photo of a defect")
        if scale not in (1, 2):
            raise InputError(f"scale is {scale}, must be 1 (native resolution) or 2 (half)")
        for photo in (*shots, *good):
            if photo.mask is not None and photo.mask.shape != photo.image.shape:
                raise InputError(
                    f"{photo.name}: the mask is {photo.mask.shape}, the photo {photo.image.shape}; mend it"
                )
        everything = [*shots, *good]
        classes: dict[str, Look] = {}
        for number, label in enumerate(labels_of(everything), start=1):
            members = [photo for photo in everything if photo.label == label]
            pixels = [reduced(photo.pixels(), scale) for photo in members]
            apart = factorised if isinstance(factorised, bool) else factorised.get(label, True)
            sizes = [(photo.image.shape[0], photo.image.shape[1]) for photo in members]
            looks = appearances_of(pixels, sizes, apart=apart)
            outlines = [
                np.ascontiguousarray(box.of(mask), bool)
                for photo in members
                if label != GOOD and (mask := reduced_mask(photo.mask, scale)) is not None
                for box in shapes(mask)
            ]
            classes[label] = Look(number, tuple(looks), tuple(outlines))
        return cls(classes, scale, Sensor.fit(everything), everything[0].image.dtype, tuple(good))

    @property
    def labels(self) -> tuple[str, ...]:
        """Classes of defects."""
        return tuple(label for label in self.classes if label != GOOD)

    def inpaints(self, label: str) -> bool:
        """Whether defects of a class are drawn on good parts."""
        return bool(self.classes[label].outlines) and GOOD in self.classes

    def photos(self, mode: str, label: str, count: int, seed: int, draw: Draw) -> list[Photo]:
        """`count` photos of a class. Photo `i` depends on the seed and `i` only.

        Raises:
            InputError: a class that was not learned, or a count below 0.
        """
        return drawn_in_turns([self.order(mode, label, count, seed)], draw)[0]

    def order(self, mode: str, label: str, count: int, seed: int) -> Order:
        """As `photos`, to be drawn with other orders.

        Raises:
            InputError: as `photos`.
        """
        if label not in self.labels:
            raise InputError(f"label is {label!r}, must be one of {', '.join(self.labels)}")
        if count < 0:
            raise InputError(f"count is {count}, must be 0 or more")
        streams = [np.random.default_rng((seed, self.classes[label].number, index)) for index in range(count)]

        def asking() -> Asking:
            made = yield from self._asking(label, label, streams)
            return [replace(photo, name=f"{mode} {label} {index}") for index, photo in enumerate(made)]

        return Order(self._turns(label), asking())

    def sham(self, mode: str, count: int, seed: int, draw: Draw) -> list[Photo]:
        """`count` photos of good parts, drawn as those of the defects are, without a defect.

        Beside drawn defects a detector could learn the drawing instead of the defect. None where no good parts were
        learned.
        """
        if GOOD not in self.classes:
            return []
        streams = [np.random.default_rng((seed, 0, index)) for index in range(count)]
        made: list[Photo] = []
        for turn, label in enumerate(self.labels):
            order = Order(self._turns(label), self._asking(label, GOOD, streams[turn :: len(self.labels)]))
            made += drawn_in_turns([order], draw)[0]
        return [replace(photo, name=f"{mode} {GOOD} {index}", mask=None) for index, photo in enumerate(made)]

    def _turns(self, outlined: str) -> int:
        """A defect is drawn on a good part, which has to be drawn first where there is none."""
        return 2 if self.inpaints(outlined) and not self.good else 1

    def _asking(self, outlined: str, label: str, streams: list[np.random.Generator]) -> Asking:
        """Photos of a class; where outlines are filled, they are those of the class `outlined`."""
        if not self.inpaints(outlined):
            return (yield from finishing([self._whole(label, rng) for rng in streams], streams))
        if self.good:
            grounds = [self.good[int(rng.integers(len(self.good)))] for rng in streams]
        else:
            grounds = yield from finishing([self._whole(GOOD, rng) for rng in streams], streams)
        drawings = [self._inpainted(outlined, label, each, rng) for each, rng in zip(grounds, streams, strict=True)]
        return (yield from finishing(drawings, streams))

    def _whole(self, label: str, rng: np.random.Generator) -> Drawing:
        """A whole photo: the appearance of a shot, turned, its level moved some way to another's."""
        look = self.classes[label]
        one, other = (look.appearances[int(rng.integers(len(look.appearances)))] for _ in range(2))
        part = float(rng.uniform())
        shift = part * (other.grid.mean((0, 1)) - one.grid.mean((0, 1)))
        grid = one.grid + np.asarray([shift[0], 0.0], np.float32)
        grid[..., 1] *= (1.0 + shift[1] / one.grid[..., 1].mean()).astype(np.float32)
        moved = dihedral_grid(replace(one, grid=grid), int(rng.integers(8)))
        mean, contrast = fields(moved)
        empty, full = np.zeros(moved.size, np.float32), np.ones(moved.size, np.float32)

        def finish(texture: Floats, stream: np.random.Generator) -> Photo:
            pixels = enlarged((mean + contrast * texture).astype(np.float32), self.scale, *moved.native)
            pixels = self.sensor.applied(pixels, stream)
            return Photo(np.zeros((1, 1), self.dtype), label).having(pixels)

        return Drawing(field_of(empty, empty, full, guide(mean, contrast), look.number, rng), finish)

    def _inpainted(self, outlined: str, label: str, ground: Photo, rng: np.random.Generator) -> Drawing:
        """A defect (or, as a sham, none) drawn on a good part, within an outline of the class `outlined`."""
        pixels = reduced(ground.pixels(), self.scale)
        outlines = self.classes[outlined].outlines
        outline = outlines[int(rng.integers(len(outlines)))]
        size = (pixels.shape[0], pixels.shape[1])
        shape = placed(outline, size, rng)
        box = field_box(_bounds(shape), size, rng)
        inside = dilated(box.of(shape), AROUND)
        template = ground.image if ground.template is None else ground.template
        photo = replace(ground, label=label, template=template, group="", source="")
        number = self.classes[label].number
        return redrawn(photo, box, inside, shape, number, self.scale, self.sensor, rng, blank=True)

    def state(self) -> tuple[Arrays, dict[str, str]]:
        """Arrays and facts of a file. The good parts are not in it."""
        arrays = self.sensor.state()
        for label, look in self.classes.items():
            for index, appearance in enumerate(look.appearances):
                arrays[f"appearance.{label}.{index}"] = appearance.grid
                arrays[f"size.{label}.{index}"] = np.asarray([*appearance.size, *appearance.native], np.int32)
            for index, outline in enumerate(look.outlines):
                arrays[f"outline.{label}.{index}"] = outline.astype(np.uint8)
        facts = {"labels": "\n".join(self.classes), "scale": str(self.scale), "dtype": self.dtype.name}
        return arrays, facts

    @classmethod
    def from_state(cls, arrays: Arrays, facts: dict[str, str]) -> Self:
        """The looks of a file.

        Raises:
            InputError: something is missing or has another shape.
        """
        labels = [label for label in facts.get("labels", "").split("\n") if label]
        if not labels or facts.get("scale") not in ("1", "2") or facts.get("dtype") not in ("uint8", "uint16"):
            raise InputError("labels, scale or dtype are missing in the file or wrong; fit the generator anew")
        classes: dict[str, Look] = {}
        for number, label in enumerate(labels, start=1):
            appearances = [
                Appearance(_shaped(arrays, f"appearance.{label}.{index}", 3), *_size(arrays, f"size.{label}.{index}"))
                for index in range(_count(arrays, f"appearance.{label}."))
            ]
            outlines = [
                _shaped(arrays, f"outline.{label}.{index}", 2).astype(bool)
                for index in range(_count(arrays, f"outline.{label}."))
            ]
            if not appearances:
                raise InputError(f"array appearance.{label}.0 is missing; fit the generator anew")
            classes[label] = Look(number, tuple(appearances), tuple(outlines))
        return cls(classes, int(facts["scale"]), Sensor.from_state(arrays), np.dtype(facts["dtype"]))


def _bounds(mask: Mask) -> Box:
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return Box(int(rows[0]), int(columns[0]), int(rows[-1] - rows[0]) + 1, int(columns[-1] - columns[0]) + 1)


def _count(arrays: Arrays, prefix: str) -> int:
    return sum(name.startswith(prefix) for name in arrays)


def _shaped(arrays: Arrays, name: str, axes: int) -> NDArray[Any]:
    array = arrays.get(name)
    if array is None or array.ndim != axes or not array.size or not np.isfinite(array).all():
        raise InputError(f"array {name} is missing, empty or has another shape; fit the generator anew")
    return array


def _size(arrays: Arrays, name: str) -> tuple[tuple[int, int], tuple[int, int]]:
    array = arrays.get(name)
    if array is None or array.shape != (4,) or (array[:2] < SIDE).any() or (array[2:] < 1).any():
        raise InputError(f"array {name} is missing or no size of at least {SIDE} pixels; fit the generator anew")
    height, width, *native = (int(length) for length in array)
    return (height, width), (native[0], native[1])
