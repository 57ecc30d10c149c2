"""Few-shot splits: a test set that nothing touches, a handful of shots a class, no part on both sides."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gmel.scenario.errors import InputError
from gmel.synthesis.data.dataset import Dataset
from gmel.synthesis.data.problem import Problem
from gmel.synthesis.photo import GOOD, Photo, labels_of

__all__ = ["SPLIT_SEED", "Split", "few_shot_split", "shortages"]

SPLIT_SEED = 2024
"""Not the seed 1234 on which the design of this room was explored: figures are of a test set never seen before."""

_TEST, _SHOTS, _GOOD = range(3)


@dataclass(frozen=True, eq=False)
class Split:
    """A data set for one few-shot trial.

    Attributes:
        shots: defects that may be learned from, k a class, by class.
        good: good parts that may be learned from, one a group.
        test: what is tested on, all photos of its groups, good parts and defects.
    """

    shots: tuple[Photo, ...]
    good: tuple[Photo, ...]
    test: tuple[Photo, ...]


def few_shot_split(
    dataset: Dataset,
    shots: int = 5,
    draw: int = 0,
    test_share: float = 0.5,
    test_per_class: int | None = None,
    split_seed: int = SPLIT_SEED,
) -> Split:
    """Draws shots of every defect class beside a test set.

    Groups stay whole. The test set and the good parts depend on `split_seed` (and the size of the test) alone; draws
    differ in the shots, and more shots of a draw hold those of fewer where no group has photos of several classes.
    Neither depends on the order of the photos. Shots, and good parts, have at most one photo of a group.

    Args:
        dataset: photos with groups.
        shots: photos of each defect class.
        draw: number of the draw.
        test_share: share of the groups of a class that is tested on.
        test_per_class: in place of the share: photos of each class that are tested on, as near as groups allow.
        split_seed: what decides between test and the rest.

    Raises:
        InputError: a value out of range; a class with too few groups, by name and with the remedy.
    """
    _check(shots, draw, test_share, test_per_class, split_seed)
    tested = _tested(dataset.photos, test_share, test_per_class, split_seed)
    pool = [photo for photo in dataset.photos if _group(photo) not in tested]
    test = [photo for photo in dataset.photos if _group(photo) in tested]
    taken: set[str] = set()
    drawn: dict[str, list[Photo]] = {}
    groups = {label: _groups(pool, label) for label in dataset.classes if label != GOOD}
    for label in sorted(groups, key=lambda each: (len(groups[each]), each)):
        rng = _random(split_seed, _SHOTS, draw, label)
        order = [name for name in _shuffled(groups[label], rng) if name not in taken][:shots]
        if len(order) < shots or label not in {photo.label for photo in test}:
            raise InputError(f"class {_shortage(label, dataset.photos, len(order), shots)}")
        taken.update(order)
        picks = _random(split_seed, _SHOTS, draw, label, "photo").random(shots)
        drawn[label] = [_pick(groups[label][name], pick) for name, pick in zip(order, picks, strict=True)]
    rest = _groups(pool, GOOD)
    picks = _random(split_seed, _GOOD, 0, GOOD).random(len(rest))
    return Split(
        shots=tuple(photo for label in sorted(drawn) for photo in drawn[label]),
        good=tuple(_pick(rest[name], pick) for name, pick in zip(sorted(rest), picks, strict=True)),
        test=tuple(sorted(test, key=lambda photo: photo.name)),
    )


def shortages(dataset: Dataset, shots: int = 5, test_share: float = 0.5) -> tuple[Problem, ...]:
    """Classes that have too few groups for as many shots beside a test, one line each with what would do."""
    _check(shots, 0, test_share, None, 0)
    tested = _tested(dataset.photos, test_share, None, SPLIT_SEED)
    pool = [photo for photo in dataset.photos if _group(photo) not in tested]
    test = {photo.label for photo in dataset.photos if _group(photo) in tested}
    left = {label: len(_groups(pool, label)) for label in dataset.classes if label != GOOD}
    return tuple(
        Problem("tiny-class", _shortage(label, dataset.photos, count, shots), (label,))
        for label, count in left.items()
        if count < shots or label not in test
    )


def _shortage(label: str, photos: Sequence[Photo], left: int, shots: int) -> str:
    """What a class lacks, and what would do."""
    total = len(_groups(photos, label))
    remedy = f"take at most {left} shots, a smaller test, or add photos" if total > 1 and left else "add photos"
    return (
        f"{label}: {total} groups of photos, {left} beside the test, {shots} shots need as many and a test 1; {remedy}"
    )


def _check(shots: int, draw: int, share: float, per_class: int | None, seed: int) -> None:
    if shots < 1:
        raise InputError(f"shots: {shots}, must be at least 1")
    if draw < 0 or seed < 0:
        raise InputError(f"{'draw' if draw < 0 else 'split_seed'}: {min(draw, seed)}, must not be negative")
    if not 0 < share < 1:
        raise InputError(f"test_share: {share}, must lie between 0 and 1; 0.5 is usual")
    if per_class is not None and per_class < 1:
        raise InputError(f"test_per_class: {per_class}, must be at least 1")


def _tested(photos: Sequence[Photo], share: float, per_class: int | None, seed: int) -> set[str]:
    """Groups that are tested on. A group with photos of several classes counts for the rarest of them."""
    groups = {label: _groups(photos, label) for label in labels_of(tuple(photos))}
    owner: dict[str, str] = {}
    for label in sorted(groups, key=lambda each: (len(groups[each]), each)):
        for name in groups[label]:
            owner.setdefault(name, label)
    tested: set[str] = set()
    for label, own in groups.items():
        order = _shuffled({name: g for name, g in own.items() if owner[name] == label}, _random(seed, _TEST, 0, label))
        if per_class is None:
            # At least one on either side where there are two.
            tested.update(order[: min(max(int(len(order) * share + 0.5), 1), len(order) - 1) if order else 0])
            continue
        room = per_class
        for name in order:
            if len(own[name]) <= room:
                room -= len(own[name])
                tested.add(name)
    return tested


def _group(photo: Photo) -> str:
    """The group of a photo, itself where nobody compared it with others."""
    return photo.group or photo.name


def _groups(photos: Sequence[Photo], label: str) -> dict[str, list[Photo]]:
    """Photos of a class by group."""
    groups: dict[str, list[Photo]] = {}
    for photo in photos:
        if photo.label == label:
            groups.setdefault(_group(photo), []).append(photo)
    return groups


def _shuffled(groups: dict[str, list[Photo]], rng: np.random.Generator) -> list[str]:
    names = sorted(groups)
    return [names[place] for place in rng.permutation(len(names))]


def _pick(photos: list[Photo], pick: float) -> Photo:
    return sorted(photos, key=lambda photo: photo.name)[int(pick * len(photos))]


def _random(seed: int, purpose: int, draw: int, *words: str) -> np.random.Generator:
    """A stream of its own for each class and purpose, so that a class more changes nothing for the others."""
    return np.random.default_rng([seed, purpose, draw, *"\0".join(words).encode()])
