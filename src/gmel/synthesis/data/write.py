"""A data set as a folder of PNG files, in the image-folder layout."""

import io
import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from gmel.evaluation.progress import Reporter
from gmel.scenario.errors import InputError
from gmel.synthesis.data.dataset import Dataset
from gmel.synthesis.photo import GOOD

__all__ = ["check_file", "check_folder", "png_bytes", "write_dataset"]

# What the reader takes for something else than a class, and what Windows takes for a device.
_TAKEN = {"img", "imgs", "image", "images", "mask", "masks", "ground_truth", "template", "templates", "train", "test"}
_DEVICES = {"con", "prn", "aux", "nul", *(f"{port}{n}" for port in ("com", "lpt") for n in range(1, 10))}
_LONGEST = 80


def check_file(out: Path, example: str) -> None:
    """That a file can be written there, before the work.

    Raises:
        InputError: a folder is there, or the folder around it is missing.
    """
    if out.is_dir() or not out.resolve().parent.is_dir():
        raise InputError(f"{out}: a file in a folder that exists is needed, for instance {example}")


def check_folder(path: Path) -> None:
    """Refuses a folder that holds something, before any work.

    Raises:
        InputError: it exists and is not an empty folder.
    """
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise InputError(f"{path}: exists and is not an empty folder; choose another place")


def write_dataset(dataset: Dataset, path: Path, reporter: Reporter | None = None) -> None:
    """Writes `[SITE/]CLASS/NAME.png`, masks into `CLASS/mask/` and templates into `CLASS/template/`.

    Names of sites, classes and photos become names that every system allows; two that fall together get a number.
    Everything is written into a folder beside and renamed in the end: there is a whole data set, or none.

    Args:
        dataset: what to write.
        path: the folder, new or empty.
        reporter: who is told how far it is.

    Raises:
        InputError: the folder holds something, or cannot be written.
    """
    check_folder(path)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.mkdir(parents=True)
        _write_photos(dataset, part, reporter)
        if path.exists():
            path.rmdir()
        part.rename(path)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror}); make room or choose another place") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _write_photos(dataset: Dataset, folder: Path, reporter: Reporter | None) -> None:
    sites = {"": "."} if dataset.sites == ("",) else _safe_names(dataset.sites, ())
    classes = {GOOD: GOOD} | _safe_names((label for label in dataset.classes if label != GOOD), (GOOD,))
    used: dict[Path, set[str]] = {}
    for number, photo in enumerate(dataset.photos):
        place = folder / sites[photo.site] / classes[photo.label]
        name = _unused(_safe(PurePosixPath(photo.name).with_suffix("").name), used.setdefault(place, set()))
        for array, below in ((photo.image, ""), (photo.mask, "mask"), (photo.template, "template")):
            if array is not None:
                _write_image(place / below / f"{name}.png", array)
        if reporter is not None and number % 50 == 0:
            reporter.advance(number, len(dataset.photos), "writing photos")


def png_bytes(array: NDArray[np.uint8] | NDArray[np.uint16] | NDArray[np.bool_]) -> bytes:
    """A PNG file of grey values [height, width], or of a mask."""
    stream = io.BytesIO()
    Image.fromarray(array.astype(np.uint8) * 255 if array.dtype == np.bool_ else array).save(stream, "PNG")
    return stream.getvalue()


def _write_image(path: Path, array: NDArray[np.uint8] | NDArray[np.uint16] | NDArray[np.bool_]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(png_bytes(array))


def _safe_names(names: Iterable[str], taken: Iterable[str]) -> dict[str, str]:
    used = set(taken)
    return {name: _unused(_safe(name), used) for name in names}


def _safe(name: str) -> str:
    """A name of letters, digits, dot, dash and underscore that means nothing to any system or to the reader."""
    plain = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-. ")[:_LONGEST].strip("-. ") or "unnamed"
    plain = re.sub(r"_mask$", "-mask", plain)
    return f"{plain}_" if plain.lower() in _TAKEN or plain.lower().split(".")[0] in _DEVICES else plain


def _unused(name: str, used: set[str]) -> str:
    """A name that is not used yet, on systems that do not tell capitals from small letters either."""
    number, free = 1, name
    while free.lower() in used:
        number += 1
        free = f"{name}-{number}"
    used.add(free.lower())
    return free
