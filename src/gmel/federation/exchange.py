"""One exchange: every site fits a generator of features on its photos and sends it once; receivers draw from it.

Nothing goes round: a site can train any later detector on what it has received.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from gmel.federation.training import SiteRows
from gmel.scenario.errors import InputError
from gmel.synthesis.detector.linear import LinearDetector
from gmel.synthesis.feature_space import GaussianFeatures
from gmel.synthesis.photo import Floats

__all__ = ["RowGenerator", "Shipment", "beside", "detector_of", "from_all", "own_and_others", "receive", "ship"]

_NAME = 2**32


class RowGenerator(Protocol):
    """What receivers draw from."""

    @property
    def labels(self) -> tuple[str, ...]:
        """The classes that it can draw."""
        ...

    def sample(self, label: str, count: int, seed: int) -> Floats:
        """Rows of a class, [count, features]."""
        ...


@dataclass(frozen=True, eq=False)
class Shipment:
    """What a site sends.

    Attributes:
        site: who.
        counts: photos that each class was learned from, by label.
        data: the serialised generator.
    """

    site: str
    counts: dict[str, int]
    data: bytes


def ship(rows: SiteRows, counts: dict[str, int]) -> Shipment:
    """Fits the generator of a site.

    Args:
        rows: of the site.
        counts: its real photos of each class.
    """
    generator = GaussianFeatures.fit(rows.features, rows.labels.tolist(), rows.weights)
    return Shipment(rows.name, counts, generator.to_bytes())


def receive(shipments: Sequence[Shipment]) -> tuple[dict[str, GaussianFeatures], dict[str, str]]:
    """Opens what came.

    Returns:
        The generators by site, and why those of other sites cannot be used, by site.
    """
    usable: dict[str, GaussianFeatures] = {}
    refused: dict[str, str] = {}
    for shipment in shipments:
        try:
            usable[shipment.site] = GaussianFeatures.from_bytes(shipment.data, shipment.site)
        except InputError as error:
            refused[shipment.site] = str(error)
    wide = [generator.means.shape[1] for generator in usable.values()]
    for site in list(usable):
        own = usable[site].means.shape[1]
        # The width that most have is the agreed one.
        agreed = max(set(wide), key=lambda width: (wide.count(width), width))
        if own != agreed:
            refused[site] = f"{site}: {own} features, agreed are {agreed}"
            del usable[site]
    return usable, refused


def from_all(
    generators: Mapping[str, RowGenerator], counts: dict[str, dict[str, int]], per_class: int, seed: int
) -> SiteRows:
    """Synthetic rows of every class that any site has sent.

    Args:
        generators: by site.
        counts: photos that each class was learned from, by site and label: a class of several sites is drawn from each
            in these shares.
        per_class: rows of each class.
        seed: of the drawing.
    """
    labels = sorted({label for generator in generators.values() for label in generator.labels})
    parts: list[Floats] = []
    names: list[str] = []
    for label in labels:
        owners = [site for site in sorted(generators) if label in generators[site].labels]
        known = np.asarray([max(counts[site].get(label, 0), 1) for site in owners], np.float64)
        ends = np.rint(np.cumsum(known) / known.sum() * per_class).astype(int)
        for place, site in enumerate(owners):
            count = int(ends[place] - (ends[place - 1] if place else 0))
            parts.append(generators[site].sample(label, count, (seed * 1009 + place) % _NAME))
            names += [label] * count
    kinds = np.asarray(names, np.str_)
    return SiteRows("synthetic", np.concatenate(parts), kinds, _even(kinds))


def own_and_others(
    own: SiteRows,
    own_counts: dict[str, int],
    generators: Mapping[str, RowGenerator],
    counts: dict[str, dict[str, int]],
    per_class: int,
    seed: int,
) -> SiteRows:
    """A site's own rows beside synthetic ones of the other sites.

    In a class that the site has itself, both count by the photos behind them.
    """
    others = {site: generator for site, generator in generators.items() if site != own.name}
    if not others:
        return own
    return beside(own, own_counts, from_all(others, counts, per_class, seed), [counts[site] for site in others])


def beside(
    own: SiteRows, own_counts: dict[str, int], drawn: SiteRows, other_counts: Sequence[dict[str, int]]
) -> SiteRows:
    """A site's own rows beside drawn ones that stand for the photos of other sites.

    Both count by the photos behind them; drawn rows of a class that no other site has are left out.

    Args:
        own: rows of the site.
        own_counts: its photos by class.
        drawn: synthetic rows.
        other_counts: photos by class of each other site.
    """
    mine = {label: float(own.weights[own.labels == label].sum()) for label in set(own.labels.tolist())}
    weights: list[NDArray[np.float64]] = []
    for rows, is_own in ((own, True), (drawn, False)):
        scaled = np.zeros(rows.labels.size)
        for label in set(rows.labels.tolist()):
            at = rows.labels == label
            here = own_counts.get(label, 0)
            there = sum(counts.get(label, 0) for counts in other_counts)
            share = (here if is_own else there) / max(here + there, 1)
            total = mine[label] if is_own else float(rows.weights[at].sum())
            scaled[at] = rows.weights[at] / total * (share if here + there else 1.0)
        weights.append(scaled)
    used = weights[1] > 0
    return SiteRows(
        own.name,
        np.concatenate([own.features, drawn.features[used]]),
        np.concatenate([own.labels, drawn.labels[used]]),
        np.concatenate([weights[0], weights[1][used]]),
    )


def detector_of(rows: SiteRows) -> LinearDetector:
    """The detector of training rows; its own scaling is that of all of them, real or not."""
    return LinearDetector.fit(rows.features, rows.labels.tolist(), weights=rows.weights)


def _even(labels: NDArray[np.str_]) -> NDArray[np.float64]:
    _, kind, count = np.unique(labels, return_inverse=True, return_counts=True)
    return 1.0 / count[kind]
