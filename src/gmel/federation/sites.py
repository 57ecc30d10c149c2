"""Who has which photos: sites by their name in the data, with disjoint classes, or with skewed shares of classes."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gmel.scenario.errors import InputError
from gmel.synthesis.photo import GOOD, Photo, labels_of

__all__ = ["SPLITS", "Site", "sites_of"]

SPLITS = ("disjoint", "dirichlet", "site")


@dataclass(frozen=True, eq=False)
class Site:
    """A plant or line with its photos.

    Attributes:
        name: of the site.
        photos: what it may learn from; they never leave it.
    """

    name: str
    photos: tuple[Photo, ...]


def sites_of(photos: Sequence[Photo], split: str, count: int, seed: int, alpha: float = 0.5) -> tuple[Site, ...]:
    """Deals photos to sites; the same arguments give the same sites, whatever the order of the photos.

    `disjoint`: every class of defects is at one site, dealt in turn in the order of their names; good parts are at all
    sites. `dirichlet`: for each class, also good parts, the shares of the sites are drawn from a symmetric Dirichlet
    law. `site`: as the photos say.

    Args:
        photos: of all sites.
        split: one of `SPLITS`.
        count: number of sites; not used for `site`.
        seed: of what is drawn.
        alpha: of the Dirichlet law: small is uneven, large is even.

    Raises:
        InputError: an unknown split, a number out of range, or sites without photos that cannot be helped.

    Source of the Dirichlet split: Hsu et al. 2019 (arXiv 1909.06335), section 3.
    """
    ordered = sorted(photos, key=lambda photo: photo.name)
    if split not in SPLITS:
        raise InputError(f"split: {split!r}, must be one of {', '.join(SPLITS)}")
    if split == "site":
        names = sorted({photo.site for photo in ordered})
        if len(names) < 2:
            raise InputError("split: the photos name fewer than two sites; use disjoint or dirichlet")
        return tuple(Site(name, tuple(p for p in ordered if p.site == name)) for name in names)
    if not 2 <= count <= len(ordered):
        raise InputError(f"sites: {count}, must be 2 to {len(ordered)} (the photos to deal)")
    if not alpha > 0:
        raise InputError(f"alpha: {alpha}, must be greater than 0")
    home = _by_class(ordered, count) if split == "disjoint" else _skewed(ordered, count, seed, alpha)
    return tuple(
        Site(f"site {number + 1}", tuple(p for p, at in zip(ordered, home, strict=True) if at == number))
        for number in range(count)
    )


def _by_class(photos: Sequence[Photo], count: int) -> list[int]:
    """Neighbouring classes lie at one site: with 6 classes and 3 sites the first two, the next two, the last two."""
    defects = [label for label in labels_of(tuple(photos)) if label != GOOD]
    if len(defects) < count:
        raise InputError(f"sites: {count} with disjoint classes, but {len(defects)} classes of defects; take fewer")
    place = {label: number * count // len(defects) for number, label in enumerate(defects)}
    home: list[int] = []
    good = 0
    for photo in photos:
        if photo.label == GOOD:
            home.append(good % count)
            good += 1
        else:
            home.append(place[photo.label])
    return home


def _skewed(photos: Sequence[Photo], count: int, seed: int, alpha: float) -> list[int]:
    home = [0] * len(photos)
    for label in labels_of(tuple(photos)):
        random = np.random.default_rng([seed, *label.encode()])
        members = [place for place, photo in enumerate(photos) if photo.label == label]
        shares = random.dirichlet(np.full(count, alpha))
        ends = np.rint(np.cumsum(shares) * len(members)).astype(int)
        for rank, place in enumerate(random.permutation(members).tolist()):
            home[place] = min(int(np.searchsorted(ends, rank, side="right")), count - 1)
    # A site without photos takes no part: it gets one of the site that has most.
    for number in range(count):
        if number not in home:
            most = int(np.argmax(np.bincount(home, minlength=count)))
            home[home.index(most)] = number
    return home
