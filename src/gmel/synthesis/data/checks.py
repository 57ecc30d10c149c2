"""What spoils a data set unseen: twins on both sides of a split, labels that contradict, photos of unlike kinds."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from hashlib import sha256

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from gmel.synthesis.data.problem import Problem, counted
from gmel.synthesis.photo import GOOD, Floats, Photo, labels_of

__all__ = ["ALIKE", "check_photos", "group_twins", "thumbnails"]

ALIKE = 0.99
"""Correlation of thumbnails from which two photos of a class are taken to show the same part."""

_SIDE = 32
_ROWS = 2048
# A class of which one component holds most has something in all its photos that hides the parts: see `_residuals`.
_SWALLOWED = 0.5
_ENOUGH = 8
_LIKE_GOOD = {"good", "ok", "okay", "free", "normal", "perfect", "no_defect", "defect_free", "defect-free", "none"}

Pairs = NDArray[np.int64]


def thumbnails(photos: Sequence[Photo]) -> Floats:
    """[photos, pixels], float32: thumbnails of 32 x 32 with mean 0 and norm 1, so that a product is a correlation.

    A photo without any contrast gives zeros: it correlates with nothing.
    """
    rows = np.empty((len(photos), _SIDE * _SIDE), np.float32)
    for row, photo in zip(rows, photos, strict=True):
        image = photo.image if photo.image.dtype == np.uint8 else photo.image.astype(np.float32)
        row[:] = np.asarray(Image.fromarray(image).resize((_SIDE, _SIDE), Image.Resampling.BICUBIC)).ravel()
    return _normalised(rows)


def group_twins(photos: Sequence[Photo]) -> tuple[tuple[Photo, ...], tuple[Problem, ...]]:
    """The photos with groups, and what was found.

    Of one group are photos that their layout says to be, photos with the same pixels, and the connected components of
    thumbnails of a class that correlate by more than `ALIKE`. A group is called like its first photo.

    Where more than half of a class would be one group, something that all its photos share (strong lighting, parts that
    lie alike) hides the parts; there the mean thumbnail of the class is taken off first.
    """
    if not photos:
        return (), ()
    problems: list[Problem] = []
    rows = thumbnails(photos)
    labels = np.array([photo.label for photo in photos])
    known, equal = _same([photo.group for photo in photos]), _same([_digest(photo) for photo in photos])
    alike = [known, equal]
    twins = 0
    hidden = np.zeros(len(photos), np.bool_)
    for label in labels_of(tuple(photos)):
        members = np.flatnonzero(labels == label)
        pairs = _above(rows[members], rows[members])
        parts = _components(len(members), [pairs])
        largest = int(np.bincount(parts).max())
        if len(members) >= _ENOUGH and largest > _SWALLOWED * len(members):
            pairs = _above(*2 * (_residuals(rows[members]),))
            text = (
                f"{label}: thumbnails of {largest} of {len(members)} photos are alike, so twins were sought in what "
                "differs from their mean; if photos show the same part, keep only one of each"
            )
            problems.append(Problem("alike", text, (label,)))
            hidden[members] = True
        twins += len(np.unique(pairs))
        alike.append(members[pairs])
    component = _components(len(photos), alike)
    problems += _equal(photos, equal, labels)
    if twins:
        count = len(np.unique(component))
        text = (
            f"photos with a twin (thumbnail correlation above {ALIKE}): {twins}; splits keep the {count} groups whole"
        )
        problems.append(Problem("twins", text))
    across = _across(np.where(hidden[:, None], np.float32(0), rows), labels)
    if len(across):
        names = tuple(f"{photos[a].name} = {photos[b].name}" for a, b in across)
        what = "pairs of photos of different classes that look alike"
        problems.append(counted("twins-across", what, names, "check their labels"))
    first: dict[int, str] = {}
    grouped = (
        replace(photo, group=first.setdefault(part, photo.name))
        for photo, part in zip(photos, component.tolist(), strict=True)
    )
    return tuple(grouped), tuple(problems)


def check_photos(photos: Sequence[Photo]) -> tuple[Problem, ...]:
    """Problems that one sees without comparing photos: no good parts, lone photos, unlike sizes and depths."""
    return tuple(_of_kind(photos))


def _of_kind(photos: Sequence[Photo]) -> Iterator[Problem]:
    by_label: defaultdict[str, list[Photo]] = defaultdict(list)
    for photo in photos:
        by_label[photo.label].append(photo)
    if GOOD not in by_label:
        likely = sorted(label for label in by_label if label.lower() in _LIKE_GOOD)
        hint = (
            f"--good {likely[0]}"
            if likely
            else "put photos of good parts into `good/`, or name their folder with --good"
        )
        yield Problem("no-good", f"no good parts, so no detection and nothing to compose onto; {hint}")
    elif len(by_label) == 1:
        yield Problem("no-defects", "only good parts, so no class to learn; add a folder with photos for each defect")
    for label, own in by_label.items():
        if len(own) == 1:
            yield Problem("single", f"{label}: one photo cannot be learned from and tested on; add photos", (label,))
    for site in sorted({photo.site for photo in photos}):
        own = [photo for photo in photos if photo.site == site]
        where = f"{site}: " if site else ""
        depths = {bits: sum(photo.image.dtype.itemsize * 8 == bits for photo in own) for bits in (8, 16)}
        if all(depths.values()):
            told = " and ".join(f"{count} photos of {bits} bits" for bits, count in depths.items())
            yield Problem("depths", f"{where}{told}; save all with the depth of the camera")
        sides = np.array([photo.image.shape for photo in own])
        if (sides.max(axis=0) > sides.min(axis=0)).any():
            low, high = sides.min(axis=0), sides.max(axis=0)
            text = (
                f"{where}{len(np.unique(sides, axis=0))} sizes, {low[1]} to {high[1]} wide, {low[0]} to {high[0]} "
                "high; harmless where a pixel is as many millimetres everywhere, else rescale"
            )
            yield Problem("sizes", text)


def _equal(photos: Sequence[Photo], pairs: Pairs, labels: NDArray[np.str_]) -> Iterator[Problem]:
    """Photos with the same pixels, within a class and across classes."""
    for same, kind, remedy in (
        (True, "duplicates", "keep one of each"),
        (False, "duplicates-across", "at most one of the classes is right: remove the others"),
    ):
        found = [pair for pair in pairs if (labels[pair[0]] == labels[pair[1]]) == same]
        names = tuple(f"{photos[a].name} = {photos[b].name}" for a, b in found)
        where = "in one class" if same else "in different classes"
        if names:
            yield counted(kind, f"photos with the pixels of another {where}", names, remedy)


def _digest(photo: Photo) -> str:
    image = photo.image
    return sha256(f"{image.dtype.name}{image.shape}".encode() + np.ascontiguousarray(image).data).hexdigest()


def _same(keys: Sequence[str]) -> Pairs:
    """[pairs, 2]: each number with the first before it that has the same key; empty keys are like nothing."""
    first: dict[str, int] = {}
    pairs = [(first.setdefault(key, number), number) for number, key in enumerate(keys) if key]
    return np.array([pair for pair in pairs if pair[0] != pair[1]], np.int64).reshape(-1, 2)


def _normalised(rows: Floats) -> Floats:
    """Rows with mean 0 and norm 1; rows that hardly vary (rounding, no signal) become zeros."""
    centred = rows - rows.mean(axis=1, keepdims=True)
    norms = np.linalg.norm(centred, axis=1, keepdims=True)
    scale = np.abs(rows).max(axis=1, keepdims=True) if rows.size else norms
    return np.where(norms > 1e-5 * scale, centred / np.maximum(norms, 1e-30), 0).astype(np.float32)


def _residuals(rows: Floats) -> Floats:
    """What is left of thumbnails without their mean."""
    return _normalised(rows - rows.mean(axis=0))


def _above(left: Floats, right: Floats) -> Pairs:
    """[pairs, 2]: numbers a < b of rows that correlate by more than `ALIKE`; by blocks, so that memory stays small."""
    found = [np.zeros((0, 2), np.int64)]
    for start in range(0, len(left), _ROWS):
        pairs = np.argwhere(left[start : start + _ROWS] @ right.T > ALIKE)
        pairs[:, 0] += start
        found.append(pairs[pairs[:, 0] < pairs[:, 1]])
    return np.concatenate(found)


def _across(rows: Floats, labels: NDArray[np.str_]) -> Pairs:
    """Pairs of different classes that look alike."""
    pairs = _above(rows, rows)
    return pairs[labels[pairs[:, 0]] != labels[pairs[:, 1]]]


def _components(count: int, pairs: Sequence[Pairs]) -> NDArray[np.int32]:
    """[count]: number of the connected component of each."""
    edges = np.concatenate([np.zeros((0, 2), np.int64), *pairs])
    graph = coo_array((np.ones(len(edges), np.bool_), (edges[:, 0], edges[:, 1])), shape=(count, count))
    return connected_components(graph, directed=False)[1]
