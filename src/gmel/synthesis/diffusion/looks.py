"""What is learned of a site beside the network: appearance and outlines of its classes, and the sensor.

It gives the windows that networks are trained on, and turns the fields that they draw into photos. Two ways:

- inpainting, for classes with masks where there are good parts: an outline of a shot, turned and scaled, is put on a
good
  part, and what is inside is drawn, given what is around it;
- whole photos for the others: a field of texture is drawn and given the appearance of a shot.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from gmel.scenario.errors import InputError
from gmel.synthesis.diffusion.edm import Given, Windows
from gmel.synthesis.diffusion.stitching import Field
from gmel.synthesis.diffusion.windows import (
    SIDE,
    Appearance,
    Box,
    Mask,
    appearances_of,
    background,
    dihedral,
    dihedral_grid,
    dilated,
    enlarged,
    field_box,
    fields,
    guide,
    placed,
    random_mask,
    reduced,
    reduced_mask,
    shapes,
)
from gmel.synthesis.generator import Arrays
from gmel.synthesis.photo import GOOD, Floats, Photo, labels_of
from gmel.synthesis.sensor import Sensor

__all__ = ["AROUND", "Drawing", "Examples", "Look", "Looks", "finished", "textures", "window_batch"]

AROUND = 2
"""Pixels around a defect that are drawn with it: its edge and its shadow."""
_CLIP = 6.0
"""Texture is held within so many contrasts: a few glaring pixels must not rule the loss."""
_GOOD_SHARE = 0.25
_EDGE_SHARE = 0.25
"""Of the windows of defects: only the edge is unknown, as when composed photos are harmonised."""

Draw = Callable[[list[Field]], list[Floats]]
Window = tuple[Floats, Mask, int]
"""Texture and guide [side, side, 3], what is drawn, class number."""


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
class Drawing:
    """A field to draw and how it becomes a photo."""

    field: Field
    finish: Callable[[Floats, np.random.Generator], Photo]


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

    def photos(self, label: str, count: int, seed: int, draw: Draw) -> list[Photo]:
        """`count` photos of a class. Photo `i` depends on the seed and `i` only.

        Raises:
            InputError: a class that was not learned, or a count below 0.
        """
        if label not in self.labels:
            raise InputError(f"label is {label!r}, must be one of {', '.join(self.labels)}")
        if count < 0:
            raise InputError(f"count is {count}, must be 0 or more")
        streams = [np.random.default_rng((seed, self.classes[label].number, index)) for index in range(count)]
        if not self.inpaints(label):
            return finished([self._whole(label, rng) for rng in streams], streams, draw)
        if self.good:
            grounds = [self.good[int(rng.integers(len(self.good)))] for rng in streams]
        else:
            grounds = finished([self._whole(GOOD, rng) for rng in streams], streams, draw)
        drawings = [self._inpainted(label, ground, rng) for ground, rng in zip(grounds, streams, strict=True)]
        return finished(drawings, streams, draw)

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

        return Drawing(_field(empty, empty, full, guide(mean, contrast), look.number, rng), finish)

    def _inpainted(self, label: str, ground: Photo, rng: np.random.Generator) -> Drawing:
        """A defect drawn on a good part."""
        look = self.classes[label]
        pixels = reduced(ground.pixels(), self.scale)
        outline = look.outlines[int(rng.integers(len(look.outlines)))]
        size = (pixels.shape[0], pixels.shape[1])
        shape = placed(outline, size, rng)
        box = field_box(_bounds(shape), size, rng)
        inside = dilated(box.of(shape), AROUND)
        return self.redrawn(replace(ground, label=label), box, inside, shape, look.number, rng, blank=True)

    def redrawn(
        self,
        photo: Photo,
        box: Box,
        inside: Mask,
        shape: Mask,
        number: int,
        rng: np.random.Generator,
        *,
        blank: bool,
    ) -> Drawing:
        """Part of a photo drawn anew; every pixel outside `inside` stays as it is, bit for bit.

        Args:
            photo: the photo.
            box: where windows are drawn, at the working resolution.
            inside: [box.height, box.width], what is drawn.
            shape: mask of the defect in the whole photo, at the working resolution.
            number: class number.
            rng: of the noise.
            blank: what is drawn starts from noise alone, not from the photo.
        """
        pixels = np.asarray(box.of(reduced(photo.pixels(), self.scale)), np.float32)
        mean, contrast = background(pixels, inside | box.of(shape))
        texture = np.clip((pixels - mean) / contrast, -_CLIP, _CLIP).astype(np.float32)
        mask = inside.astype(np.float32)
        start = np.where(inside, 0.0, texture).astype(np.float32) if blank else texture
        height, width = photo.image.shape
        nothing = np.zeros((*mask.shape, 2), np.float32)

        def finish(drawn: Floats, stream: np.random.Generator) -> Photo:
            change = np.zeros(shape.shape, np.float32)
            where = np.zeros(shape.shape, bool)
            rows, columns = slice(box.top, box.top + box.height), slice(box.left, box.left + box.width)
            change[rows, columns] = contrast * (drawn - texture) * mask
            where[rows, columns] = inside
            full = self.sensor.applied(photo.pixels() + enlarged(change, self.scale, height, width), stream)
            made = photo.having(full)
            changed = _enlarged_mask(where, self.scale, height, width)
            image = np.where(changed, made.image, photo.image).astype(photo.image.dtype)
            return replace(made, image=image, mask=_enlarged_mask(shape, self.scale, height, width))

        return Drawing(_field(start, texture, mask, nothing, number, rng), finish)

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


@dataclass(frozen=True, eq=False)
class Examples:
    """Windows to train on, cut at random places, turned and mirrored.

    Attributes:
        whole: by class number, the texture and the guide of its photos, as channels.
        marked: by class number, photos with masks (pixels, mask, boxes of its defects).
        good: class number of good parts, drawn a quarter of the time; 0 where there are none among others.
        blobs: windows of `whole` get masks to fill in (half of the time those of good parts, never those of defects).
    """

    whole: dict[int, list[Floats]]
    marked: dict[int, list[tuple[Floats, Mask, list[Box]]]]
    good: int

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
        return cls(whole, marked, looks.classes[GOOD].number if GOOD in looks.classes else 0)

    def __call__(self, rng: np.random.Generator, count: int) -> Windows:
        """A batch: a class at random for each window, good parts a quarter of the time."""
        defects = [number for number in (*self.whole, *self.marked) if number != self.good]
        made: list[Window] = []
        for _ in range(count):
            if self.good and (not defects or rng.random() < _GOOD_SHARE):
                made.append((_cut(self.whole[self.good], rng), random_mask(rng), self.good))
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
        texture = np.clip((reduced(photo.pixels(), scale) - mean) / contrast, -_CLIP, _CLIP)
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
    texture = np.clip((patch[top : top + SIDE, left : left + SIDE] - mean) / contrast, -_CLIP, _CLIP)
    return np.pad(texture[..., None], ((0, 0), (0, 0), (0, 2))).astype(np.float32), window


def finished(drawings: list[Drawing], streams: list[np.random.Generator], draw: Draw) -> list[Photo]:
    """The photos of drawings."""
    drawn = draw([drawing.field for drawing in drawings])
    return [each.finish(field, rng) for each, field, rng in zip(drawings, drawn, streams, strict=True)]


def _field(start: Floats, known: Floats, mask: Floats, told: Floats, number: int, rng: np.random.Generator) -> Field:
    noise = rng.standard_normal(mask.shape, np.float32)
    return Field(start, known, mask, noise, told, number, int(rng.integers(2**62)))


def _enlarged_mask(mask: Mask, scale: int, height: int, width: int) -> NDArray[np.bool_]:
    return np.kron(mask, np.ones((scale, scale), bool))[:height, :width]


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
