"""Class-conditional Gaussians over a feature space: a generator of rows for a detector, small enough to send around.

It draws features, not photos: a site that has never seen a class learns it from its mean and its spread alone.
"""

# scikit-learn ships no types; unknown types from it are not ours (as in pyproject.toml).
# pyright: reportUnknownMemberType=false, reportMissingTypeStubs=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load as parse_arrays
from safetensors.numpy import save as write_arrays
from sklearn.covariance import ledoit_wolf

from gmel.scenario.errors import InputError
from gmel.synthesis.photo import GOOD, Floats

__all__ = ["FORMAT", "GaussianFeatures"]

FORMAT = 1
Doubles = NDArray[np.float64]

_ENOUGH_GOOD = 30
"""Good parts from which on their spread is taken for that within every class."""
_SHARED_ROWS = 20.0
"""The shared covariance counts as so many rows beside the rows of a class."""


@dataclass(frozen=True, eq=False)
class GaussianFeatures:
    """One Gaussian a class.

    Attributes:
        labels: the classes that it can draw.
        means: [classes, features].
        covariances: [classes, features, features].
    """

    labels: tuple[str, ...]
    means: Floats
    covariances: Floats

    @classmethod
    def fit(cls, features: Floats, labels: Sequence[str], weights: Doubles | None = None) -> Self:
        """The Gaussians of training rows.

        The covariance of a class is its own, shrunk towards one that all share: that of the good parts where these are
        plenty, else that of all rows around the means of their classes, by Ledoit and Wolf.

        Args:
            features: [rows, features], standardised.
            labels: [rows].
            weights: of the rows within their class, [rows]; the same for all where they are left out.

        Raises:
            InputError: no rows, a shape that does not fit, or values that are not finite.

        Source: Ledoit and Wolf, J. Multivariate Analysis 88 (2004).
        """
        names = np.asarray(labels, np.str_)
        if features.ndim != 2 or not names.size or names.size != features.shape[0]:
            raise InputError(f"features of shape {features.shape} for {names.size} labels; one row for each is needed")
        if not np.isfinite(features).all():
            raise InputError("features: not all are finite; leave out the photo that gives them")
        given = np.ones(names.size) if weights is None else weights
        found = tuple(sorted(set(names.tolist())))
        rows = features.astype(np.float64)
        means = np.stack([np.average(rows[names == name], axis=0, weights=given[names == name]) for name in found])
        residuals = rows - means[[found.index(name) for name in names.tolist()]]
        good = names == GOOD
        shared = _shrunk(residuals[good] if np.count_nonzero(good) >= _ENOUGH_GOOD else residuals, len(found))
        covariances: list[Doubles] = []
        for name in found:
            own, weight = residuals[names == name], given[names == name]
            scatter = (own * (weight / weight.sum())[:, None]).T @ own
            # Augmented rows of one shot are not independent: what counts is how many rows of equal weight they equal.
            effective = float(weight.sum() ** 2 / np.sum(weight**2))
            share = effective / (effective + _SHARED_ROWS)
            covariances.append(share * scatter + (1.0 - share) * shared)
        return cls(found, means.astype(np.float32), np.stack(covariances).astype(np.float32))

    def sample(self, label: str, count: int, seed: int) -> Floats:
        """Rows of a class; the same seed gives the same rows, and rows of a class do not depend on other classes.

        Returns:
            [count, features].

        Raises:
            InputError: a class that it has not learned, or a negative count.
        """
        place = self._place(label)
        if count < 0:
            raise InputError(f"count is {count}; must not be negative")
        random = np.random.default_rng([seed, *label.encode()])
        variances, axes = np.linalg.eigh(self.covariances[place].astype(np.float64))
        white = random.standard_normal((count, variances.size))
        return (self.means[place] + (white * np.sqrt(np.maximum(variances, 0.0))) @ axes.T).astype(np.float32)

    def log_likelihood(self, label: str, features: Floats, floor: float = 1e-3) -> Doubles:
        """Logarithm of the density of rows in a class, up to a constant that all classes share, [rows].

        Args:
            label: the class.
            features: [rows, features].
            floor: added to the variances, in shares of their mean: directions that nobody knows must not decide alone.

        Raises:
            InputError: a class that it has not learned.
        """
        place = self._place(label)
        variances, axes = np.linalg.eigh(self.covariances[place].astype(np.float64))
        steady = np.maximum(variances, 0.0) + floor * float(variances.mean())
        distance = np.sum(((features - self.means[place]) @ axes) ** 2 / steady, axis=1)
        return -0.5 * (distance + float(np.log(steady).sum()))

    def to_bytes(self) -> bytes:
        """What is sent: one safetensors file; of each covariance the upper triangle."""
        upper = np.triu_indices(self.means.shape[1])
        arrays = {"means": self.means, "covariances": np.ascontiguousarray(self.covariances[:, upper[0], upper[1]])}
        return write_arrays(arrays, metadata={"format": str(FORMAT), "labels": json.dumps(self.labels)})

    @classmethod
    def from_bytes(cls, data: bytes, source: str = "generator of features") -> Self:
        """The Gaussians of a file.

        Args:
            data: what :meth:`to_bytes` gave.
            source: where it comes from, for messages.

        Raises:
            InputError: corrupt, of another format, or with arrays that do not fit or are not finite.
        """
        try:
            arrays = parse_arrays(data)
            length = int.from_bytes(data[:8], "little")
            facts: dict[str, str] = json.loads(data[8 : 8 + length]).get("__metadata__", {})
            labels = tuple(str(name) for name in json.loads(facts["labels"]))
            means, packed = arrays["means"], arrays["covariances"]
        except (SafetensorError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{source}: corrupt ({error}); ask the site to send it again") from error
        if facts.get("format") != str(FORMAT):
            raise InputError(f"{source}: format is {facts.get('format')!r}, this gmel reads {FORMAT}; fit it anew")
        wide = means.shape[1] if means.ndim == 2 else 0
        if means.shape != (len(labels), wide) or packed.shape != (len(labels), wide * (wide + 1) // 2):
            raise InputError(f"{source}: shapes {means.shape} and {packed.shape} do not fit {len(labels)} classes")
        if means.dtype != np.float32 or packed.dtype != np.float32:
            raise InputError(f"{source}: types {means.dtype} and {packed.dtype}, must be float32; fit it anew")
        if not (np.isfinite(means).all() and np.isfinite(packed).all()):
            raise InputError(f"{source}: values are not finite; ask the site to fit it anew")
        upper = np.triu_indices(wide)
        covariances = np.zeros((len(labels), wide, wide), np.float32)
        covariances[:, upper[0], upper[1]] = packed
        covariances[:, upper[1], upper[0]] = packed
        return cls(labels, means, covariances)

    def _place(self, label: str) -> int:
        if label not in self.labels:
            raise InputError(f"class {label!r}: not learned, must be one of {', '.join(self.labels)}")
        return self.labels.index(label)


def _shrunk(residuals: Doubles, classes: int) -> Doubles:
    """Covariance of residuals by Ledoit and Wolf, corrected for the means that were estimated."""
    if residuals.shape[0] <= classes:
        # One row a class shows no spread: that of standardised features.
        return np.eye(residuals.shape[1])
    covariance, _ = ledoit_wolf(residuals, assume_centered=True)
    return np.asarray(covariance) * (residuals.shape[0] / (residuals.shape[0] - classes))
