"""Detectors of one draw, each trained on another recipe, scored on the same test photos."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from gmel.synthesis.detector.scores import Scores, score
from gmel.synthesis.lesson import Lesson
from gmel.synthesis.photo import Floats
from gmel.synthesis.rows import Choice, Heads, Learner, Rows, fit_heads, linear_learner

__all__ = ["SHARE", "Referee"]

SHARE = 0.15
"""Share of a mode's samples where no gate chooses."""


@dataclass(frozen=True, eq=False)
class Referee:
    """Scores whatever is trained on one lesson.

    Attributes:
        lesson: what there is to learn from.
        features: of the test photos, [photos, features].
        labels: their classes.
        learner: trains what is scored, in the features of the lesson.
    """

    lesson: Lesson
    features: Floats
    labels: Sequence[str]
    learner: Learner = linear_learner

    def scores(self, heads: Heads) -> dict[str, Any]:
        """Scores for JSON: what the test cannot give is null."""
        return _plain(score(heads.probabilities(self.features), heads.classes, self.labels, heads.threshold))

    def of_choice(self, choice: Choice, made: Mapping[str, Rows]) -> dict[str, Any]:
        """Scores where every class learns from the same choice.

        Args:
            choice: a mode and its share.
            made: rows of the modes.
        """
        lesson = self.lesson
        mixture = dict.fromkeys(sorted(set(lesson.real.labels.tolist())), choice)
        heads = fit_heads(lesson.real, lesson.classic, dict(made), mixture, mixture, self.learner)
        return self.scores(heads.alarming(lesson.judges.features))


def _plain(scores: Scores) -> dict[str, Any]:
    values = {field.name: getattr(scores, field.name) for field in fields(scores)}
    return {name: None if isinstance(value, float) and np.isnan(value) else value for name, value in values.items()}
