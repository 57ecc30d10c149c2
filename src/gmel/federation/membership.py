"""What a shared generator gives away: can it be told which photos it was fitted on?"""

# scikit-learn ships no types; unknown types from it are not ours (as in pyproject.toml).
# pyright: reportUnknownMemberType=false, reportMissingTypeStubs=false, reportUnknownVariableType=false

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score

from gmel.synthesis.photo import Floats

__all__ = ["Likely", "attack_auroc"]


class Likely(Protocol):
    """A generator that says how likely rows are."""

    @property
    def labels(self) -> tuple[str, ...]:
        """The classes that it can draw."""
        ...

    @property
    def log_likelihood(self) -> Callable[[str, Floats], NDArray[np.float64]]:
        """From a class and rows [rows, features] to the logarithm of their density, up to a constant, [rows]."""
        ...


def attack_auroc(
    generator: Likely,
    members: Floats,
    member_labels: Sequence[str],
    others: Floats,
    other_labels: Sequence[str],
) -> float:
    """AUROC of an attacker who holds the generator and guesses that near photos were in its training.

    The nearness is the likelihood of the photo under its class; photos are compared within their class only, and the
    mean over classes is given. 0.5 is blind guessing, 1 is certainty.

    Args:
        generator: what was shared.
        members: features of the photos it was fitted on, [photos, features].
        member_labels: their classes, [photos].
        others: features of photos of the same classes that it never saw, [photos, features].
        other_labels: their classes, [photos].

    Raises:
        ValueError: no class has photos on both sides.
    """
    inside, outside = np.asarray(member_labels, np.str_), np.asarray(other_labels, np.str_)
    found: list[float] = []
    for label in generator.labels:
        near = generator.log_likelihood(label, members[inside == label])
        far = generator.log_likelihood(label, others[outside == label])
        if near.size and far.size:
            truth = np.repeat([1, 0], [near.size, far.size])
            found.append(float(roc_auc_score(truth, np.concatenate([near, far]))))
    if not found:
        raise ValueError("no class has photos on both sides")
    return float(np.mean(found))
