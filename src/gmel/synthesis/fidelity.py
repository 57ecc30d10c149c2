"""How like real photos synthetic ones are, and whether they are copies: on weight-free features, with the floor beside.

Few photos and no downloaded network: kernel distance instead of a Fréchet distance (which is biased at this size).
"""

# scikit-learn ships no types; unknown types from it are not ours (as in pyproject.toml).
# pyright: reportUnknownMemberType=false, reportMissingTypeStubs=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false

from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import pairwise_distances
from sklearn.neighbors import NearestNeighbors

from gmel.synthesis.detector.linear import Scaling
from gmel.synthesis.photo import Floats

__all__ = ["Fidelity", "Neighbourhood", "fidelity", "kernel_distance", "neighbourhood", "novelty"]

_NEIGHBOURS = 5
_COPY = 0.5
"""A sample nearer to a shot than half of the distance between shots counts as a copy."""


@dataclass(frozen=True)
class Neighbourhood:
    """Samples and real photos as neighbours of one another, each 0 to 1 (density may exceed 1).

    Attributes:
        precision: share of samples within the k-th neighbour distance of some real photo.
        recall: share of real photos within that of some sample.
        density: mean number of real balls that hold a sample, over k.
        coverage: share of real photos whose ball holds a sample.
    """

    precision: float
    recall: float
    density: float
    coverage: float


@dataclass(frozen=True)
class Fidelity:
    """Synthetic photos of a class beside real ones.

    Attributes:
        kid: kernel distance between samples and real photos.
        floor: the same between two halves of the real photos: what a perfect generator would reach.
        neighbourhood: precision, recall, density, coverage.
        novelty: median distance from a sample to its nearest shot, over the median distance between nearest shots.
        copies: share of samples below half of the latter.
    """

    kid: float
    floor: float
    neighbourhood: Neighbourhood
    novelty: float
    copies: float

    def as_dict(self) -> dict[str, object]:
        """For JSON."""
        return asdict(self)


def fidelity(samples: Floats, real: Floats, shots: Floats, scaling: Scaling | None = None) -> Fidelity:
    """All figures of a class.

    Args:
        samples: features of synthetic photos, [samples, features].
        real: features of real photos that no generator saw, [photos, features].
        shots: features of what the generator learned from, [shots, features].
        scaling: of the features; by the real photos where it is left out.
    """
    scale = Scaling.fit(real) if scaling is None else scaling
    made, seen, learned = scale(samples), scale(real), scale(shots)
    ratio, copies = novelty(made, learned)
    return Fidelity(
        kernel_distance(made, seen),
        # By turns: photos come in order of site and time, and two sites are no floor.
        kernel_distance(seen[::2], seen[1::2]),
        neighbourhood(made, seen),
        ratio,
        copies,
    )


def kernel_distance(first: Floats, second: Floats) -> float:
    """Unbiased squared maximum mean discrepancy, kernel (x . y / features + 1)^3: KID. May be slightly negative.

    Args:
        first, second: standardised features, [n, features], n >= 2; NaN below.

    Source: Binkowski et al. 2018 (arXiv 1801.01401), equation (4).
    """
    n, m = len(first), len(second)
    if n < 2 or m < 2:
        return float("nan")
    x, y = first.astype(np.float64), second.astype(np.float64)

    def kernel(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
        return (a @ b.T / a.shape[1] + 1.0) ** 3

    own_x, own_y = kernel(x, x), kernel(y, y)
    within = (own_x.sum() - np.trace(own_x)) / (n * (n - 1)) + (own_y.sum() - np.trace(own_y)) / (m * (m - 1))
    return float(within - 2.0 * kernel(x, y).mean())


def neighbourhood(samples: Floats, real: Floats, neighbours: int = _NEIGHBOURS) -> Neighbourhood:
    """Precision and recall by balls around photos, density and coverage.

    Args:
        samples, real: standardised features, [n, features].
        neighbours: the radius of a ball is the distance to this neighbour; fewer where there are not as many.

    Source: Kynkäänniemi et al. 2019 (arXiv 1904.06991); Naeem et al. 2020 (arXiv 2002.09797).
    """
    k = min(neighbours, len(real) - 1, len(samples) - 1)
    if k < 1:
        return Neighbourhood(*[float("nan")] * 4)
    between: NDArray[np.float64] = pairwise_distances(samples, real)
    of_real, of_samples = _radii(real, k), _radii(samples, k)
    inside = between <= of_real[None, :]
    return Neighbourhood(
        float(inside.any(axis=1).mean()),
        float((between <= of_samples[:, None]).any(axis=0).mean()),
        float(inside.sum() / (k * len(samples))),
        float(inside.any(axis=0).mean()),
    )


def novelty(samples: Floats, shots: Floats) -> tuple[float, float]:
    """Distance to the nearest shot over that between shots: its median over samples, and the share below a half.

    Args:
        samples, shots: standardised features, [n, features]; NaN with fewer than two shots.
    """
    if len(shots) < 2 or not len(samples):
        return float("nan"), float("nan")
    apart = float(np.median(_radii(shots, 1)))
    ratio = pairwise_distances(samples, shots).min(axis=1) / max(apart, 1e-9)
    return float(np.median(ratio)), float(np.mean(ratio < _COPY))


def _radii(points: Floats, k: int) -> NDArray[np.float64]:
    """Distance of each point to its k-th neighbour."""
    distances, _ = NearestNeighbors(n_neighbors=k + 1).fit(points).kneighbors(points)
    return distances[:, k]
