"""How good a detector is on photos that it has never seen.

Detection (is there a defect?) and typing (which one?) are told apart: a shift of the decision point moves balanced
accuracy over all classes without any change in what the detector knows (docs/synthesis.md).
"""

# scikit-learn ships no types; unknown types from it are not ours (as in pyproject.toml).
# pyright: reportUnknownMemberType=false, reportMissingTypeStubs=false, reportUnknownVariableType=false

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score

from gmel.synthesis.photo import GOOD

__all__ = ["FALSE_ALARMS", "METRICS", "Scores", "score"]

FALSE_ALARMS = 0.05
"""Share of good parts that may be called defect where the true positive rate is read."""

METRICS = ("auroc", "tpr", "type_accuracy", "balanced_accuracy")


@dataclass(frozen=True)
class Scores:
    """What a detector reaches on a test set; NaN where the test set does not have what it needs.

    Attributes:
        auroc: probability that a photo of a defect has a greater defect probability than one of a good part.
        tpr: share of defects found where `FALSE_ALARMS` of the test's good parts are called defect.
        type_accuracy: mean over defect classes of the share of photos whose class is named among the defects.
        balanced_accuracy: mean over all classes of the share of photos whose class is named, at the threshold.
        recall: the latter by class.
    """

    auroc: float
    tpr: float
    type_accuracy: float
    balanced_accuracy: float
    recall: dict[str, float]


def score(
    probabilities: NDArray[np.floating], classes: Sequence[str], labels: Sequence[str], threshold: float = 0.5
) -> Scores:
    """Scores of predictions.

    Args:
        probabilities: [photos, classes].
        classes: names of the columns.
        labels: the truth, [photos]; every one of `classes`.
        threshold: probability of a defect above which a photo is called one, and named by its likeliest type.

    Raises:
        ValueError: a label that is no column, or no photos.
    """
    truth = np.asarray(labels)
    names = np.asarray(classes)
    unknown = sorted(set(truth.tolist()) - set(names.tolist()))
    if unknown or not truth.size:
        raise ValueError(f"labels {unknown or 'are empty'}; they must be among {', '.join(classes)}")
    defect = truth != GOOD
    among = [n for n, c in enumerate(classes) if c != GOOD]
    # Summed over the types: one minus the probability of a good part loses the order below 1e-16.
    suspicion = probabilities[:, among].sum(axis=1)
    auroc = tpr = float("nan")
    if GOOD in classes and defect.any() and not defect.all():
        auroc = float(roc_auc_score(defect, suspicion))
        tpr = float(np.mean(suspicion[defect] > _quantile(suspicion[~defect], FALSE_ALARMS)))
    kind = names[among][np.argmax(probabilities[:, among], axis=1)]
    called = suspicion > threshold if GOOD in classes else np.ones(truth.size, np.bool_)
    named = np.where(called, kind, GOOD)
    recall = {str(c): float(np.mean(named[truth == c] == c)) for c in names if np.any(truth == c)}
    typed = float("nan")
    if defect.any() and len(among) > 1:
        typed = float(np.mean([np.mean(kind[truth == c] == c) for c in names[among] if np.any(truth == c)]))
    return Scores(auroc, tpr, typed, float(np.mean(list(recall.values()))), recall)


def _quantile(suspicion: NDArray[np.floating], above: float) -> float:
    """The least value that at most a share `above` of the good parts exceeds."""
    ordered = np.sort(suspicion)[::-1]
    return float(ordered[min(int(above * ordered.size), ordered.size - 1)])
