"""The exchange with differential privacy: noisy means of a few public features a class.

A record is a photo of a shot together with all its augmentations: their projected features are averaged, clipped and
summed by class, so that leaving out the photo changes the sum of its class by at most the clipping norm, and no other
sum. The numbers of photos are public, as are the projection, the centre and the norm: they are learned on the built-in
procedural set, which shows no real part.
"""

# SciPy ships no types; unknown types from it are not ours (as in pyproject.toml).
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save as write_arrays
from scipy import linalg, optimize, special

from gmel.scenario.errors import InputError
from gmel.synthesis.feature_space import GaussianFeatures
from gmel.synthesis.photo import Floats

__all__ = [
    "Budget",
    "PrivateSums",
    "PublicSpace",
    "accounted_epsilon",
    "gaussian_delta",
    "gaussian_epsilon",
    "noise_multiplier",
    "private_gaussians",
    "private_sums",
]

Doubles = NDArray[np.float64]

_NOISE = 0x9D


@dataclass(frozen=True)
class Budget:
    """How much what is shared may tell about one photo: (epsilon, delta)-differential privacy.

    Attributes:
        epsilon, delta: of the guarantee.
        replaced: between which data sets it holds: those where one photo is another photo of its class (twice the
            noise), or those where one photo is left out (its row is zero; numbers of photos are public).
    """

    epsilon: float = 8.0
    delta: float = 1e-5
    replaced: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.epsilon < float("inf"):
            raise InputError(f"epsilon: {self.epsilon}, must be positive and finite; 8 is weak, 1 is strong")
        if not 0 < self.delta < 1:
            raise InputError(f"delta: {self.delta}, must lie between 0 and 1; well below one over the number of photos")

    @property
    def noise(self) -> float:
        """Standard deviation of the noise on a sum, in units of the norm to which records are cut."""
        return noise_multiplier(self) * (2.0 if self.replaced else 1.0)


def gaussian_delta(epsilon: float, multiplier: float) -> float:
    """The least delta of the Gaussian mechanism whose noise is `multiplier` times the sensitivity.

    Source: Balle and Wang 2018 (arXiv 1805.06530), theorem 8.
    """
    half, cost = 0.5 / multiplier, epsilon * multiplier
    # The second term as one exponential: e^epsilon alone overflows where the term is small.
    return float(special.ndtr(half - cost) - math.exp(epsilon + float(special.log_ndtr(-half - cost))))


def noise_multiplier(budget: Budget) -> float:
    """The least noise of the Gaussian mechanism within a budget, in units of the sensitivity."""
    low, high = 1e-3, 1.0
    while gaussian_delta(budget.epsilon, high) > budget.delta:
        high *= 2.0
    # On the safe side of the tolerance of the root.
    return _root(lambda m: gaussian_delta(budget.epsilon, m) - budget.delta, low, high) * (1.0 + 1e-7)


def gaussian_epsilon(multiplier: float, delta: float) -> float:
    """The least epsilon of the Gaussian mechanism at a delta: the inverse of :func:`noise_multiplier`."""
    if gaussian_delta(0.0, multiplier) <= delta:
        return 0.0
    high = 1.0
    while gaussian_delta(high, multiplier) > delta:
        high *= 2.0
    return _root(lambda e: gaussian_delta(e, multiplier) - delta, 0.0, high)


def _root(function: Callable[[float], float], low: float, high: float) -> float:
    found: Any = optimize.brentq(function, low, high, xtol=1e-10)
    return float(found)


def accounted_epsilon(multiplier: float, delta: float) -> float:
    """The same by a maintained accountant, privacy loss distributions of `dp-accounting`.

    Raises:
        InputError: the extra is not installed.
    """
    try:
        from dp_accounting.dp_event import GaussianDpEvent  # noqa: PLC0415
        from dp_accounting.pld import PLDAccountant  # noqa: PLC0415
    except ImportError as error:
        raise InputError("privacy: dp-accounting is not installed; pip install 'gmel[privacy]'") from error
    return float(PLDAccountant().compose(GaussianDpEvent(multiplier)).get_epsilon(delta))


@dataclass(frozen=True, eq=False)
class PublicSpace:
    """A few directions of the feature space, chosen without looking at anybody's photos.

    Attributes:
        centre, deviation: of the public features, [features].
        axes: [features, dimensions].
        within: [dimensions, dimensions], covariance within a class, of the public photos.
        norm: rows are cut to this length.
    """

    centre: Doubles
    deviation: Doubles
    axes: Doubles
    within: Doubles
    norm: float

    @classmethod
    def learned(cls, features: Floats, labels: Sequence[str], dimensions: int, ridge: float = 3.0) -> Self:
        """Directions that tell public classes apart best, by linear discriminant analysis with a ridge.

        Args:
            features: of public photos, [photos, features].
            labels: of their kinds, [photos].
            dimensions: how many directions.
            ridge: added to the within-class covariance of standardised features.

        Raises:
            InputError: more dimensions than the kinds support.
        """
        names = np.asarray(labels, np.str_)
        found = np.unique(names)
        if not 1 <= dimensions < min(found.size, features.shape[1] + 1):
            raise InputError(f"dimensions: {dimensions}, must be 1 to {found.size - 1} (public kinds less one)")
        centre = features.mean(axis=0, dtype=np.float64)
        deviation = features.std(axis=0, dtype=np.float64) + 1e-6
        rows = np.clip((features - centre) / deviation, -5.0, 5.0)
        means = np.stack([rows[names == name].mean(axis=0) for name in found])
        residuals = rows - means[np.searchsorted(found, names)]
        within = residuals.T @ residuals / (names.size - found.size)
        spread = np.cov(means, rowvar=False)
        _, vectors = linalg.eigh(spread, within + ridge * np.eye(rows.shape[1]))
        axes = vectors[:, ::-1][:, :dimensions]
        space = cls(centre, deviation, axes, axes.T @ within @ axes, float("inf"))
        return cls(centre, deviation, axes, space.within, float(np.median(np.linalg.norm(rows @ axes, axis=1))))

    def project(self, features: Floats) -> Doubles:
        """[rows, dimensions], not cut."""
        return np.clip((features - self.centre) / self.deviation, -5.0, 5.0) @ self.axes

    def cut(self, rows: Doubles) -> Doubles:
        """Rows of the space, [rows, dimensions], shortened to the norm where they are longer."""
        length = np.linalg.norm(rows, axis=1, keepdims=True)
        return rows * np.minimum(1.0, self.norm / np.maximum(length, 1e-12))


@dataclass(frozen=True, eq=False)
class PrivateSums:
    """What a site sends.

    Attributes:
        labels: its classes.
        sums: of the cut records of each class, with noise, [classes, dimensions].
        noise: standard deviation of the noise in each number; not a secret.
    """

    labels: tuple[str, ...]
    sums: Floats
    noise: float

    def to_bytes(self) -> bytes:
        """What is sent."""
        return write_arrays({"sums": self.sums}, metadata={"labels": json.dumps(self.labels), "noise": str(self.noise)})


def private_sums(
    records: Doubles, labels: Sequence[str], space: PublicSpace, budget: Budget | None, seed: int
) -> PrivateSums:
    """Sums of a site's classes that keep a budget for each photo.

    Every photo is in one sum only, so the budget holds for all sums of the site together.

    Args:
        records: one row of the public space for each photo, [photos, dimensions]; cut here.
        labels: [photos].
        space: the public space.
        budget: what may be told about one photo; without one there is no noise and no promise.
        seed: of the noise. Outside of an experiment it must be secret and used once.

    Raises:
        InputError: no records, or values that are not finite: they cannot be cut.
    """
    names = np.asarray(labels, np.str_)
    if not names.size or not np.isfinite(records).all():
        raise InputError("records: none, or not all are finite; leave out the photo that gives them")
    found = tuple(sorted(set(names.tolist())))
    noise = 0.0 if budget is None else budget.noise * space.norm
    cut = space.cut(records)
    sums = np.stack([cut[names == name].sum(axis=0) for name in found])
    sums = sums + noise * np.random.default_rng([seed, _NOISE]).standard_normal(sums.shape)
    return PrivateSums(found, sums.astype(np.float32), noise)


def private_gaussians(sent: Sequence[PrivateSums], photos: dict[str, int], space: PublicSpace) -> GaussianFeatures:
    """The Gaussians of all classes, from the sums of all sites. This is post-processing: it costs no privacy.

    Args:
        sent: by the sites; a site may put its own without noise.
        photos: public number of photos of each class over these sites.
        space: the public space.

    Returns:
        Means with noise; as covariance that of a new photo around such a mean.
    """
    labels = tuple(sorted({label for site in sent for label in site.labels}))
    means: list[Doubles] = []
    covariances: list[Doubles] = []
    for label in labels:
        owners = [site for site in sent if label in site.labels]
        total = np.sum([site.sums[site.labels.index(label)] for site in owners], axis=0, dtype=np.float64)
        count = photos[label]
        means.append(np.asarray(total, np.float64) / count)
        noise = sum(site.noise**2 for site in owners) / count**2
        covariances.append(space.within * (1.0 + 1.0 / count) + noise * np.eye(space.within.shape[0]))
    return GaussianFeatures(labels, np.stack(means).astype(np.float32), np.stack(covariances).astype(np.float32))
