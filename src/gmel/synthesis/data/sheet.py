"""Contact sheets: many photos on one page, for a look."""

from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from scipy import ndimage

from gmel.scenario.errors import InputError
from gmel.scenario.files import replace_file
from gmel.synthesis.photo import GOOD, Photo, unit_scale

__all__ = ["check_sheet_path", "contact_sheet", "rows_by_class", "write_sheet"]

_MARGIN = 4
_NAME_HEIGHT = 14
_OUTLINE = (255, 120, 0)
_KINDS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG"}


def rows_by_class(photos: Sequence[Photo]) -> dict[str, list[Photo]]:
    """Rows for a sheet: one for each site and class, in order."""
    rows: dict[str, list[Photo]] = {}
    for photo in sorted(photos, key=lambda each: (each.site, each.label != GOOD, each.label)):
        rows.setdefault(" ".join(word for word in (photo.site, photo.label) if word), []).append(photo)
    return rows


def contact_sheet(
    rows: Mapping[str, Sequence[Photo]], columns: int = 8, side: int = 128, outlines: bool = True
) -> Image.Image:
    """Photos in rows, with the name of each row above it.

    Args:
        rows: what to show; of each row the first `columns`.
        columns: photos in a row.
        side: pixels of a photo on the sheet; larger photos are shrunk into it.
        outlines: whether the outline of a mask is drawn on its photo.
    """
    step = side + _MARGIN
    sheet = Image.new("RGB", (_MARGIN + columns * step, _MARGIN + len(rows) * (step + _NAME_HEIGHT)), "white")
    drawing = ImageDraw.Draw(sheet)
    for row, (name, photos) in enumerate(rows.items()):
        top = _MARGIN + row * (step + _NAME_HEIGHT)
        drawing.text((_MARGIN, top), name.encode("latin-1", "replace").decode("latin-1"), fill="black")
        for column, photo in enumerate(photos[:columns]):
            sheet.paste(_small(photo, side, outlines), (_MARGIN + column * step, top + _NAME_HEIGHT))
    return sheet


def check_sheet_path(path: Path) -> str:
    """The kind of file that a path asks for.

    Raises:
        InputError: neither PNG nor JPEG.
    """
    kind = _KINDS.get(path.suffix.lower())
    if kind is None:
        raise InputError(f"sheet {path}: must end with {', '.join(_KINDS)}")
    return kind


def write_sheet(path: Path, sheet: Image.Image) -> None:
    """Writes a sheet as PNG or JPEG.

    Raises:
        InputError: another ending, or the file cannot be written.
    """
    kind = check_sheet_path(path)
    data = BytesIO()
    sheet.save(data, kind, **({"quality": 82} if kind == "JPEG" else {"optimize": True}))
    try:
        replace_file(path, data.getvalue())
    except OSError as error:
        raise InputError(f"sheet {path}: cannot be written ({error.strerror}); choose another place") from error


def _small(photo: Photo, side: int, outlines: bool) -> Image.Image:
    """A photo in a square, as it is where it fits."""
    grey = Image.fromarray(np.rint(unit_scale(photo.image) * 255).astype(np.uint8)).convert("RGB")
    grey.thumbnail((side, side), Image.Resampling.LANCZOS)
    if photo.mask is not None and outlines:
        reduced = np.asarray(Image.fromarray(photo.mask).resize(grey.size, Image.Resampling.NEAREST), np.bool_)
        near, beyond = (np.asarray(ndimage.binary_dilation(reduced, iterations=n), np.bool_) for n in (2, 3))
        around = beyond & ~near
        pixels = np.array(grey)
        pixels[around] = _OUTLINE
        grey = Image.fromarray(pixels)
    square = Image.new("RGB", (side, side), "white")
    square.paste(grey, ((side - grey.width) // 2, (side - grey.height) // 2))
    return square
