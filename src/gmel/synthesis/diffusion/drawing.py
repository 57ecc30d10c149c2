"""From fields of texture that a network draws to photos, and back."""

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from gmel.synthesis.diffusion.stitching import Field
from gmel.synthesis.diffusion.watching import part
from gmel.synthesis.diffusion.windows import Box, Mask, background, enlarged, reduced
from gmel.synthesis.photo import Floats, Photo
from gmel.synthesis.sensor import Sensor

__all__ = [
    "AROUND",
    "CLIP",
    "Asking",
    "Draw",
    "Drawing",
    "Order",
    "drawn_in_turns",
    "enlarged_mask",
    "field_of",
    "finishing",
    "redrawn",
]

AROUND = 2
"""Pixels around a defect that are drawn with it: its edge and its shadow."""
CLIP = 6.0
"""Texture is held within so many contrasts: a few glaring pixels must not rule the loss."""

Draw = Callable[[list[Field]], list[Floats]]
"""Draws fields of texture."""
Asking = Generator[list[Field], list[Floats], list[Photo]]
"""Asks for fields, turn after turn, is sent what was drawn of them, and returns photos."""


@dataclass(frozen=True, eq=False)
class Drawing:
    """A field to draw and how it becomes a photo."""

    field: Field
    finish: Callable[[Floats, np.random.Generator], Photo]


@dataclass(frozen=True, eq=False)
class Order:
    """Photos that are to be drawn.

    Attributes:
        turns: how often it asks for fields: what is drawn on top of something waits for that.
        asking: asks.
    """

    turns: int
    asking: Asking


def drawn_in_turns(orders: Sequence[Order], draw: Draw) -> list[list[Photo]]:
    """The photos of orders. What they ask for in the same turn is drawn by one call; each order keeps its own random
    streams, so company changes nothing beyond what it changes in `draw`."""
    made: list[list[Photo]] = [[] for _ in orders]
    asked: dict[int, list[Field]] = {}

    def go_on(number: int, drawn: list[Floats] | None) -> None:
        asking = orders[number].asking
        try:
            asked[number] = next(asking) if drawn is None else asking.send(drawn)
        except StopIteration as end:
            made[number] = end.value

    for number in range(len(orders)):
        go_on(number, None)
    turns = max((order.turns for order in orders), default=0)
    for turn in range(turns):
        now = dict(asked)
        asked.clear()
        with part(turn, turns):
            drawn = draw([field for fields in now.values() for field in fields])
        for number, fields in now.items():
            own, drawn = drawn[: len(fields)], drawn[len(fields) :]
            go_on(number, own)
    return made


def finishing(drawings: list[Drawing], streams: list[np.random.Generator]) -> Asking:
    """Asks for the fields of drawings once, and makes them photos."""
    drawn = yield [drawing.field for drawing in drawings]
    return [each.finish(field, rng) for each, field, rng in zip(drawings, drawn, streams, strict=True)]


def redrawn(
    photo: Photo,
    box: Box,
    inside: Mask,
    shape: Mask,
    number: int,
    scale: int,
    sensor: Sensor,
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
        number: class number; 0 for a network without classes.
        scale: working resolution: 1 native, 2 half.
        sensor: what is drawn is passed through it.
        rng: of the noise.
        blank: what is drawn starts from noise alone, not from the photo.
    """
    pixels = np.asarray(box.of(reduced(photo.pixels(), scale)), np.float32)
    mean, contrast = background(pixels, inside | box.of(shape))
    texture = np.clip((pixels - mean) / contrast, -CLIP, CLIP).astype(np.float32)
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
        full = sensor.applied(photo.pixels() + enlarged(change, scale, height, width), stream)
        made = photo.having(full)
        changed = enlarged_mask(where, scale, height, width)
        image = np.where(changed, made.image, photo.image).astype(photo.image.dtype)
        return replace(made, image=image, mask=enlarged_mask(shape, scale, height, width))

    return Drawing(field_of(start, texture, mask, nothing, number, rng), finish)


def field_of(start: Floats, known: Floats, mask: Floats, guide: Floats, number: int, rng: np.random.Generator) -> Field:
    """A field with its noise."""
    noise = rng.standard_normal(mask.shape, np.float32)
    return Field(start, known, mask, noise, guide, number, int(rng.integers(2**62)))


def enlarged_mask(mask: Mask, scale: int, height: int, width: int) -> NDArray[np.bool_]:
    """The mask at the resolution and size of the photo."""
    return np.kron(mask, np.ones((scale, scale), bool))[:height, :width]
