"""One image file as the grey values that the sensor gave."""

import io
import warnings
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from gmel.scenario.errors import InputError

__all__ = ["LARGEST_PIXELS", "Grey", "grey_of", "read_grey", "read_mask"]

Grey = NDArray[np.uint8] | NDArray[np.uint16]

LARGEST_PIXELS = 100_000_000
"""More pixels than any inspection camera has: a file that claims more is refused before it is unpacked."""

_SMALLEST_SIDE = 8
# Only what cameras and drawing programs write: formats with a programming language (EPS) or plug-ins stay shut.
_FORMATS = ("PNG", "JPEG", "BMP", "TIFF", "WEBP", "PPM", "GIF")
_COLOUR = {"RGB", "RGBA", "RGBX", "RGBa", "P", "PA", "CMYK", "YCbCr"}


def read_grey(path: Path) -> Grey:
    """The photo in a file: [height, width], uint8 or uint16.

    Grey values are taken as they are, without rescaling. Colour becomes luma (ITU-R 601, 8 bits a channel), alpha is
    dropped, the orientation of EXIF is applied, of several frames the first is taken.

    Raises:
        InputError: missing, not an image, truncated or corrupt, too large, too small, or with floating-point values;
            the message names the file and the remedy.
    """
    if not path.is_file():
        raise InputError(f"{path}: there is no such file; check the name")
    return _read(path, str(path), LARGEST_PIXELS)


def grey_of(data: bytes, name: str, most_pixels: int = LARGEST_PIXELS) -> Grey:
    """The photo in the bytes of a file, as of :func:`read_grey`: [height, width], uint8 or uint16.

    Args:
        data: what the file would hold.
        name: for messages.
        most_pixels: more are refused before they are unpacked.

    Raises:
        InputError: as of :func:`read_grey`.
    """
    return _read(io.BytesIO(data), name, most_pixels)


def _read(source: Path | BinaryIO, name: str, most_pixels: int) -> Grey:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of size and odd tags; size is ours to judge, below.
            with Image.open(source, formats=_FORMATS) as image:
                _check_size(name, image.size, most_pixels)
                return _grey(name, image)
    except InputError:
        raise
    except Image.DecompressionBombError as error:
        raise InputError(f"{name}: {_too_large(most_pixels)}") from error
    except Image.UnidentifiedImageError as error:
        raise InputError(f"{name}: not an image that can be read; save it again as PNG, or remove it") from error
    except Exception as error:  # decoders raise whatever they like on bytes that are not what they say
        said = " ".join(str(error).split())[:100] or type(error).__name__
        raise InputError(f"{name}: truncated or corrupt ({said}); copy it again, or remove it") from error


def read_mask(path: Path) -> NDArray[np.bool_]:
    """The mask in a file: [height, width], true where it is not black.

    In a JPEG, which rings around edges, true where it is brighter than half.

    Raises:
        InputError: as of :func:`read_grey`.
    """
    grey = read_grey(path)
    return grey > (np.iinfo(grey.dtype).max // 2 if path.suffix.lower() in {".jpg", ".jpeg"} else 0)


def _check_size(name: str, size: tuple[int, int], most_pixels: int) -> None:
    width, height = size
    if width * height > most_pixels:
        raise InputError(f"{name}: {width} x {height} pixels, {_too_large(most_pixels)}")
    if min(size) < _SMALLEST_SIDE:
        raise InputError(f"{name}: {width} x {height} pixels, at least {_SMALLEST_SIDE} a side are needed; remove it")


def _too_large(most_pixels: int) -> str:
    return f"more than {most_pixels:,} pixels are not read; cut the photo into parts"


def _grey(name: str, image: Image.Image) -> Grey:
    image.load()
    turned = ImageOps.exif_transpose(image)
    mode = turned.mode
    if mode == "L":
        return np.array(turned, np.uint8)
    if mode in {"LA", "La"}:
        return np.array(turned.getchannel(0), np.uint8)
    if mode == "1":
        return np.array(turned.convert("L"), np.uint8)
    if mode in _COLOUR:
        return np.array(turned.convert("RGB").convert("L"), np.uint8)
    if mode.startswith("I"):
        values = np.asarray(turned)
        if values.min() < 0 or values.max() > np.iinfo(np.uint16).max:
            raise InputError(f"{name}: grey values outside 0 to 65535; save it with 8 or 16 bits, without sign")
        return values.astype(np.uint16)
    kind = "floating-point values" if mode == "F" else f"colours of the kind {mode}"
    raise InputError(f"{name}: {kind} cannot be read; save it as grey with 8 or 16 bits")
