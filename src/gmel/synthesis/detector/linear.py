"""Class-balanced logistic regression on features, with calibrated probabilities and a threshold for false alarms.

The strong default: a fit takes milliseconds, needs no tuning at five photos a class, and its weights can be averaged.
"""

# scikit-learn ships no types; unknown types from it are not ours (as in pyproject.toml).
# pyright: reportUnknownMemberType=false, reportMissingTypeStubs=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
from numpy.typing import NDArray
from scipy import optimize
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression

from gmel.scenario.errors import InputError
from gmel.synthesis.photo import GOOD, Floats

__all__ = ["LinearDetector", "Scaling", "alarm_threshold", "balanced", "fit_temperature", "softmax", "two_ways"]

Doubles = NDArray[np.float64]

_STRENGTH = 1.0
"""Inverse strength of the L2 penalty on standardised features (0.1 and 1 are alike from 3 to 10 photos a class)."""
_WHITE_STRENGTH = 0.05
"""The same on whitened features."""
_ENOUGH_GOOD = 30
"""Good parts from which on their spread is known well enough to whiten by it."""
_RIDGE = 0.5
"""Added to the deviations of good parts along their principal axes, in deviations of a feature: what good parts hardly
vary in is not blown up without bound."""
_BOUND = 5.0
"""Standardised features are cut here: a photo unlike all others must not decide by one statistic."""
_TEMPERATURES = (0.05, 20.0)


@dataclass(frozen=True)
class Scaling:
    """Standardisation of features, cut at five deviations; where good parts are plenty, also whitening by their spread.

    In what good parts vary among themselves a defect may hide; along the axes of their largest spread differences count
    least: linear discriminant analysis with one class that is known well.

    Attributes:
        mean, deviation: of the training rows, [features].
        whitening: [features, features], or none.
    """

    mean: Floats
    deviation: Floats
    whitening: Floats | None = None

    @classmethod
    def fit(cls, features: Floats, good: NDArray[np.bool_] | None = None) -> Self:
        """The scaling of training rows.

        Args:
            features: [photos, features].
            good: which rows are real good parts, [photos].
        """
        plain = cls(features.mean(axis=0), features.std(axis=0) + np.float32(1e-6))
        if good is None or np.count_nonzero(good) < _ENOUGH_GOOD:
            return plain
        rows = plain(features[good]).astype(np.float64)
        variances, axes = np.linalg.eigh(np.cov(rows, rowvar=False))
        whitening = axes / (np.sqrt(np.maximum(variances, 0.0)) + _RIDGE)
        return cls(plain.mean, plain.deviation, whitening.astype(np.float32))

    def __call__(self, features: Floats) -> Floats:
        """[photos, features], standardised."""
        standard = np.clip((features - self.mean) / self.deviation, -_BOUND, _BOUND)
        return standard if self.whitening is None else standard @ self.whitening


@dataclass(frozen=True)
class LinearDetector:
    """What a photo shows, from its features.

    Attributes:
        classes: names of the columns, `GOOD` first where it is one.
        scaling: of the features.
        weights: [classes, features].
        bias: [classes].
        temperature: logits are divided by it; 1 before calibration.
        threshold: probability of a defect from which on a photo is called one.
    """

    classes: tuple[str, ...]
    scaling: Scaling
    weights: Floats
    bias: Floats
    temperature: float = 1.0
    threshold: float = 0.5

    @classmethod
    def fit(
        cls,
        features: Floats,
        labels: Sequence[str],
        synthetic: NDArray[np.bool_] | None = None,
        weights: Doubles | None = None,
    ) -> Self:
        """The detector of training rows. Each class weighs the same.

        Args:
            features: [photos, features].
            labels: [photos]; at least two classes.
            synthetic: which rows are synthetic, [photos]; the scaling does not learn from them.
            weights: of the rows within their class, [photos]; the same for all where they are left out.

        Raises:
            InputError: a single class.
        """
        names = np.asarray(labels)
        made = np.zeros(names.size, np.bool_) if synthetic is None or synthetic.all() else synthetic
        found = sorted(set(names.tolist()))
        if len(found) < 2:
            raise InputError(f"photos of {' and '.join(found) or 'nothing'} alone; a detector needs two classes")
        classes = (*((GOOD,) if GOOD in found else ()), *(name for name in found if name != GOOD))
        scaling = Scaling.fit(features[~made], (names == GOOD)[~made])
        model = LogisticRegression(C=_STRENGTH if scaling.whitening is None else _WHITE_STRENGTH, max_iter=500)
        with warnings.catch_warnings():
            # A penalised fit stopped at the last steps is as good for what follows.
            warnings.simplefilter("ignore", ConvergenceWarning)
            model.fit(scaling(features), names, balanced(names, weights))
        slopes, bias = np.asarray(model.coef_, np.float32), np.asarray(model.intercept_, np.float32)
        if len(found) == 2:
            # scikit-learn keeps one row for two classes: that of the second; the first is the zero.
            slopes, bias = np.concatenate([0.0 * slopes, slopes]), np.concatenate([0.0 * bias, bias])
        order = [found.index(name) for name in classes]
        return cls(classes, scaling, slopes[order], bias[order])

    def logits(self, features: Floats) -> Doubles:
        """[photos, classes], before the temperature."""
        return (self.scaling(features) @ self.weights.T + self.bias).astype(np.float64)

    def probabilities(self, features: Floats) -> Doubles:
        """[photos, classes], calibrated where the detector is."""
        return softmax(self.logits(features) / self.temperature)

    def defect_probability(self, features: Floats) -> Doubles:
        """[photos]: the probability that it is no good part. The temperature does not change the order of photos.

        Raises:
            InputError: it was trained without good parts.
        """
        if GOOD not in self.classes:
            raise InputError("the detector has seen no good parts: it names types, it finds no defects")
        return softmax(two_ways(self.logits(features)) / self.temperature)[:, 1]

    def calibrated(self, logits: Doubles, labels: Sequence[str]) -> Self:
        """With the temperature that fits logits of photos that were held out of the training.

        Args:
            logits: [photos, classes], of detectors trained without each photo.
            labels: [photos].
        """
        return replace(self, temperature=fit_temperature(logits, [self.classes.index(label) for label in labels]))

    def tempered(self, temperature: float) -> Self:
        """With another temperature."""
        return replace(self, temperature=temperature)

    def alarming(self, good_features: Floats, false_alarms: float) -> Self:
        """With the threshold that keeps the rate of false alarms, from good parts held out of the training."""
        return replace(self, threshold=alarm_threshold(self.defect_probability(good_features), false_alarms))


def balanced(names: NDArray[np.str_], weights: Doubles | None) -> Doubles:
    """Weights that sum to the same for each class, one on average."""
    given = np.ones(names.size) if weights is None else weights
    _, kind = np.unique(names, return_inverse=True)
    total = np.bincount(kind, weights=given)
    return given / total[kind] * names.size / total.size


def two_ways(logits: Doubles) -> Doubles:
    """Logits of good and of any defect: [photos, 2], from those of all classes, good first."""
    top = logits[:, 1:].max(axis=1)
    defect = top + np.log(np.exp(logits[:, 1:] - top[:, None]).sum(axis=1))
    return np.stack([logits[:, 0], defect], axis=1)


def fit_temperature(logits: Doubles, truth: Sequence[int]) -> float:
    """The temperature of least log loss (each class weighing the same).

    Args:
        logits: [photos, classes].
        truth: column of the true class, [photos].

    Source: Guo et al. 2017 (arXiv 1706.04599), section 4.2.
    """
    column = np.asarray(truth)
    weight = 1.0 / np.bincount(column, minlength=logits.shape[1])[column]

    def loss(log_temperature: float) -> float:
        chance = softmax(logits / np.exp(log_temperature))[np.arange(column.size), column]
        return float(-np.sum(weight * np.log(chance + 1e-12)))

    found = optimize.minimize_scalar(loss, bounds=tuple(np.log(_TEMPERATURES)), method="bounded")
    return float(np.exp(found.x))


def alarm_threshold(suspicion: Doubles, false_alarms: float) -> float:
    """The threshold at which a new good part is called defect with at most the given probability.

    Split conformal: the k-th greatest of n held-out values, k = floor(false_alarms (n + 1)), is exceeded by the next
    with probability at most k / (n + 1). With fewer than 1 / false_alarms - 1 parts no finite threshold promises that:
    then it is the greatest value seen.

    Args:
        suspicion: defect probability of held-out good parts, [parts].
        false_alarms: between 0 and 1.

    Raises:
        InputError: no held-out good parts.

    Source: Lei et al., J. R. Stat. Soc. B 80 (2018), section 2.
    """
    if not suspicion.size:
        raise InputError("no good parts were held out; a threshold for false alarms needs some (20 or more for 5 %)")
    place = int(np.floor(false_alarms * (suspicion.size + 1)))
    return float(np.sort(suspicion)[::-1][max(place - 1, 0)])


def softmax(logits: Doubles) -> Doubles:
    """Probabilities of logits, over the last axis: [photos, classes]."""
    shifted = np.exp(logits - logits.max(axis=1, keepdims=True))
    return shifted / shifted.sum(axis=1, keepdims=True)
