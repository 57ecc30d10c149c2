"""What a detector learns from: rows of features, which of them are synthetic, and how they are mixed."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, Self

import numpy as np
from numpy.typing import NDArray

from gmel.synthesis.detector.linear import Doubles, LinearDetector, alarm_threshold, softmax
from gmel.synthesis.detector.scores import FALSE_ALARMS
from gmel.synthesis.photo import GOOD, Floats

__all__ = [
    "CLASSIC",
    "NONE",
    "Bools",
    "Choice",
    "Head",
    "Heads",
    "Learner",
    "Mixture",
    "Rows",
    "fit_head",
    "fit_heads",
    "joined",
    "linear_learner",
    "training_rows",
]

Bools = NDArray[np.bool_]

NONE = "none"
CLASSIC = "classic"


@dataclass(frozen=True, eq=False)
class Rows:
    """Features of photos.

    Attributes:
        features: [photos, features].
        labels: [photos].
        sources: name of the shot each is or was made from; empty for good parts and where none stands out, [photos].
    """

    features: Floats
    labels: NDArray[np.str_]
    sources: NDArray[np.str_]

    @classmethod
    def of(cls, features: Floats, labels: Sequence[str], sources: Sequence[str]) -> Self:
        """Rows from plain sequences."""
        return cls(features, np.asarray(labels, np.str_), np.asarray(sources, np.str_))

    def __len__(self) -> int:
        return self.labels.size

    def where(self, rows: NDArray[np.bool_]) -> "Rows":
        """Some of the rows."""
        return Rows(self.features[rows], self.labels[rows], self.sources[rows])

    def without(self, sources: Iterable[str]) -> "Rows":
        """The rows that were not made from any of these shots."""
        return self.where(~np.isin(self.sources, list(sources)))


def joined(*parts: Rows) -> Rows:
    """All rows of several, in order."""
    return Rows(
        np.concatenate([part.features for part in parts]),
        np.concatenate([part.labels for part in parts]),
        np.concatenate([part.sources for part in parts]),
    )


@dataclass(frozen=True, order=True)
class Choice:
    """What a class learns from beside its shots.

    Attributes:
        mode: `NONE`, `CLASSIC`, or a mode of synthesis (then classic augmentation is there as well).
        share: weight of the mode's samples in the class, 0 to 1; half of the class for `CLASSIC`.
    """

    mode: str
    share: float = 0.0


Mixture = dict[str, Choice]
"""A choice for each class, good parts among them (for them a mode means its blends without a defect)."""


_CLASSIC_SHARE = 0.5


def training_rows(
    real: Rows, classic: Rows, made: dict[str, Rows], mixture: Mixture
) -> tuple[Rows, NDArray[np.bool_], NDArray[np.float64]]:
    """Rows of a mixture, which of them are synthetic, and the weight of each within its class (their sum is one)."""
    parts: list[Rows] = []
    weights: list[NDArray[np.float64]] = []
    synthetic: list[NDArray[np.bool_]] = []
    for label in np.unique(real.labels):
        choice = mixture[str(label)]
        own = [real.where(real.labels == label)]
        varied = classic.where(classic.labels == label)
        if choice.mode != NONE and len(varied):
            own.append(varied)
        drawn = made.get(choice.mode)
        drawn = None if drawn is None else drawn.where(drawn.labels == label)
        share = choice.share if drawn is not None and len(drawn) else 0.0
        for kind, rows in enumerate(own):
            part = (1.0 - share) * ((_CLASSIC_SHARE if kind else 1.0 - _CLASSIC_SHARE) if len(own) > 1 else 1.0)
            parts.append(rows)
            weights.append(np.full(len(rows), part / max(len(rows), 1)))
            synthetic.append(np.full(len(rows), kind > 0))
        if drawn is not None and share > 0.0:
            parts.append(drawn)
            weights.append(np.full(len(drawn), share / len(drawn)))
            synthetic.append(np.ones(len(drawn), np.bool_))
    return joined(*parts), np.concatenate(synthetic), np.concatenate(weights)


class Head(Protocol):
    """What is trained on rows: the linear detector or the CNN.

    Attributes:
        classes: names of the columns, `GOOD` first where it is one.
        temperature: logits are divided by it; 1 before calibration.
    """

    @property
    def classes(self) -> tuple[str, ...]: ...

    @property
    def temperature(self) -> float: ...

    def logits(self, features: Floats) -> Doubles:
        """[photos, classes], before the temperature."""
        ...

    def defect_probability(self, features: Floats) -> Doubles:
        """[photos]: the probability that it is no good part.

        Raises:
            InputError: it was trained without good parts.
        """
        ...

    def tempered(self, temperature: float) -> Self:
        """With another temperature."""
        ...


class Learner(Protocol):
    """How a head learns from rows."""

    def __call__(self, rows: Rows, synthetic: Bools, weights: Doubles, /) -> Head:
        """The head of training rows, as `training_rows` gives them.

        Raises:
            InputError: a single class.
        """
        ...


def linear_learner(rows: Rows, synthetic: Bools, weights: Doubles) -> LinearDetector:
    """Logistic regression: how a head learns where nobody says otherwise."""
    return LinearDetector.fit(rows.features, rows.labels.tolist(), synthetic, weights)


@dataclass(frozen=True)
class Heads:
    """A detector of two parts, each with the training set that suits it: one finds defects, one names their type.

    Composed defects teach what a type looks like on any part; but they also take away what real defects have beside the
    defect (another batch, another lamp), of which a test on the same line makes use. What helps one may harm the other.

    Attributes:
        detection: gives the probability of `GOOD`; none where there are no good parts.
        typing: gives the probabilities of the types among defects; none where there is one type.
        threshold: probability of a defect above which a photo is called one.
    """

    classes: tuple[str, ...]
    detection: Head | None
    typing: Head | None
    threshold: float = 0.5

    def alarming(self, good_features: Floats, false_alarms: float = FALSE_ALARMS) -> "Heads":
        """With the threshold that keeps the rate of false alarms on good parts that were not learned from."""
        if self.detection is None or not len(good_features):
            return self
        suspicion = self.detection.defect_probability(good_features)
        return replace(self, threshold=alarm_threshold(suspicion, false_alarms))

    def types(self, features: Floats) -> Doubles:
        """[photos, defect classes]: the probability of each type, given that there is a defect."""
        if self.typing is None:
            return np.ones((features.shape[0], 1))
        kinds = [self.typing.classes.index(name) for name in self.classes if name != GOOD]
        return softmax(self.typing.logits(features)[:, kinds] / self.typing.temperature)

    def probabilities(self, features: Floats) -> Doubles:
        """[photos, classes]."""
        if self.detection is None:
            return self.types(features)
        defect = self.detection.defect_probability(features)[:, None]
        return np.concatenate([1.0 - defect, defect * self.types(features)], axis=1)


def fit_head(
    real: Rows, classic: Rows, made: dict[str, Rows], mixture: Mixture, learner: Learner = linear_learner
) -> Head:
    """A detector trained on one mixture."""
    rows, synthetic, weights = training_rows(real, classic, made, mixture)
    return learner(rows, synthetic, weights)


def fit_heads(
    real: Rows,
    classic: Rows,
    made: dict[str, Rows],
    detection: Mixture,
    typing: Mixture,
    learner: Learner = linear_learner,
) -> Heads:
    """Trains both parts, each on its mixture."""
    found = sorted(set(real.labels.tolist()))
    classes = (*((GOOD,) if GOOD in found else ()), *(name for name in found if name != GOOD))

    typed = len(classes) > 2 or (GOOD not in classes and len(classes) == 2)
    first = fit_head(real, classic, made, detection, learner) if GOOD in classes else None
    if typed and first is not None and detection == typing:
        return Heads(classes, first, first)
    return Heads(classes, first, fit_head(real, classic, made, typing, learner) if typed else None)
