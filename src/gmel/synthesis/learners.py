"""The detectors by name, and how one of them learns from rows."""

from functools import partial

from gmel.evaluation.progress import Reporter
from gmel.scenario.errors import InputError
from gmel.synthesis.detector.cnn import STEPS, CnnDetector
from gmel.synthesis.detector.linear import Doubles
from gmel.synthesis.detector.pictures import PictureExtractor
from gmel.synthesis.rows import Bools, Learner, Rows

__all__ = ["CNN", "DETECTORS", "TEXTURE", "cnn_learner", "detector_named"]

TEXTURE, CNN = "texture", "cnn"
DETECTORS = (TEXTURE, CNN)


def detector_named(name: str) -> str:
    """The name, where there is such a detector.

    Raises:
        InputError: there is none.
    """
    if name not in DETECTORS:
        raise InputError(f"detector: {name!r}, must be one of {', '.join(DETECTORS)}")
    return name


def cnn_learner(extractor: PictureExtractor, seed: int, reporter: Reporter) -> Learner:
    """How the CNN learns from rows of this extractor.

    Args:
        extractor: gave the rows.
        seed: of the first weights and of the batches.
        reporter: told how each training goes on.
    """
    return partial(_cnn, extractor.channels, STEPS, seed, reporter)


def _cnn(
    channels: int, steps: int, seed: int, reporter: Reporter, rows: Rows, _synthetic: Bools, weights: Doubles
) -> CnnDetector:
    return CnnDetector.fit(rows.features, rows.labels.tolist(), weights, channels, seed, reporter, steps)
