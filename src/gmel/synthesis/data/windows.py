"""Windows of one size around the defects of large photos with boxes."""

import zlib
from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from gmel.synthesis.data.layouts.entry import Box
from gmel.synthesis.photo import GOOD, Photo

__all__ = ["box_mask", "windows_of"]


def box_mask(shape: tuple[int, ...], boxes: Iterable[Box]) -> NDArray[np.bool_]:
    """[height, width], true inside boxes; parts outside the photo are cut off."""
    height, width = shape
    mask = np.zeros((height, width), np.bool_)
    for box in boxes:
        left, right = (round(min(max(x, 0), width)) for x in (box.left, box.right))
        top, bottom = (round(min(max(y, 0), height)) for y in (box.top, box.bottom))
        mask[min(top, height - 1) : max(bottom, top + 1), min(left, width - 1) : max(right, left + 1)] = True
    return mask


def windows_of(photo: Photo, boxes: Sequence[Box], size: int) -> list[Photo]:
    """One window for each box, and one that no box touches (where there is room), which shows a good part.

    A window lies around the centre of its box, moved into the photo where it would stick out; it has the class of its
    box, and its mask is made of the boxes of that class in it. All windows of a photo are of one group.

    Args:
        photo: the whole photo.
        boxes: all its boxes.
        size: side of a window in pixels; a photo with a smaller side is not enlarged.
    """
    height, width = photo.image.shape
    whole = replace(photo, group=photo.group or photo.name, mask=None)
    cut: list[Photo] = []
    for number, box in enumerate(boxes, 1):
        top = _start((box.top + box.bottom) / 2, size, height)
        left = _start((box.left + box.right) / 2, size, width)
        mask = box_mask((height, width), [each for each in boxes if each.label == box.label])
        cut.append(_window(replace(whole, label=box.label, mask=mask), top, left, size, f"#{number}"))
    taken = box_mask((height, width), boxes) if boxes else np.zeros((height, width), np.bool_)
    step = max(size // 2, 1)
    places = [
        (top, left)
        for top in range(0, max(height - size, 0) + 1, step)
        for left in range(0, max(width - size, 0) + 1, step)
        if not taken[top : top + size, left : left + size].any()
    ]
    if places:
        top, left = places[zlib.crc32(photo.name.encode()) % len(places)]
        cut.append(_window(replace(whole, label=GOOD), top, left, size, "#good"))
    return cut


def _start(centre: float, size: int, length: int) -> int:
    return int(min(max(round(centre - size / 2), 0), max(length - size, 0)))


def _window(photo: Photo, top: int, left: int, size: int, mark: str) -> Photo:
    part = np.s_[top : top + size, left : left + size]
    return replace(
        photo,
        image=photo.image[part].copy(),
        mask=None if photo.mask is None else photo.mask[part].copy(),
        template=None if photo.template is None else photo.template[part].copy(),
        name=photo.name + mark,
    )
