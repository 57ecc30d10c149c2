"""The experiment: what synthesis is worth on a data set, over many draws of the shots, always on the same test photos.

For each draw detectors are trained on the same real photos and differ in what else they see. The comparison with
classic augmentation is paired by draw.
"""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np

from gmel.evaluation.progress import Reporter
from gmel.evaluation.statistics import Interval, paired_t_interval, t_interval
from gmel.scenario.errors import InputError
from gmel.scenario.files import replace_file
from gmel.synthesis.curves import by_samples_and_steps
from gmel.synthesis.data.dataset import Dataset
from gmel.synthesis.data.splits import SPLIT_SEED, Split, few_shot_split
from gmel.synthesis.detector.features import FeatureBook, extractor_for
from gmel.synthesis.detector.pictures import PictureExtractor
from gmel.synthesis.detector.scores import METRICS
from gmel.synthesis.fidelity import fidelity
from gmel.synthesis.gate import Decision, decide
from gmel.synthesis.generator import NO_MEANS, Means
from gmel.synthesis.learners import CNN, TEXTURE, cnn_learner, detector_named
from gmel.synthesis.lesson import Lesson, prepare, seen_by, set_aside, variants_of_good
from gmel.synthesis.photo import GOOD, Photo
from gmel.synthesis.recipes import SHARE, Referee
from gmel.synthesis.rows import CLASSIC, NONE, Choice, Rows

__all__ = [
    "BASE",
    "FORMAT",
    "OF_CNN",
    "Experiment",
    "Settings",
    "evaluate",
    "read_experiment",
    "table",
    "write_experiment",
]

FORMAT = 1
_FOLDS = 5
_FOLDS_WITH_FITS = 2
"""Rounds of the gate where a mode has to be fitted anew in each."""
BASE = "real + classic"
OF_CNN = ", CNN"
"""What the name of a recipe ends with where a CNN has learned from it."""


@dataclass(frozen=True)
class Settings:
    """What is asked.

    Attributes:
        shots: photos of each defect class.
        draws: independent draws of the shots.
        modes: modes of synthesis that are tried.
        test_per_class: photos of each class that are tested on; half of the groups where it is none.
        split_seed: what decides which photos are tested on.
        copies: augmented variants of each shot.
        per_shot: samples of a mode for each shot.
        curves: whether utility is measured by number of samples and by steps as well.
        detector: name in `DETECTORS`; with the CNN its recipes stand beside those of the texture features.
    """

    shots: int = 5
    draws: int = 10
    modes: tuple[str, ...] = ("compose",)
    test_per_class: int | None = None
    split_seed: int = SPLIT_SEED
    copies: int = 8
    per_shot: int = 8
    curves: bool = False
    detector: str = TEXTURE


Experiment = dict[str, Any]
"""Settings, draws (scores of every recipe), fidelity, seconds: what `experiment.json` holds."""


def evaluate(
    dataset: Dataset,
    settings: Settings,
    reporter: Reporter,
    kept: Experiment | None = None,
    save: Callable[[Experiment, dict[str, list[Photo]]], None] | None = None,
    means: Means = NO_MEANS,
) -> tuple[Experiment, dict[str, list[Photo]]]:
    """Runs the experiment.

    Args:
        dataset: photos with groups.
        settings: what is asked.
        reporter: told how it goes on.
        kept: what an interrupted run has left; its draws are not repeated.
        save: called after every draw with what is returned in the end.
        means: files that modes may use.

    Returns:
        The experiment, and samples of every mode from the first draw (empty where that was kept).

    Raises:
        InputError: the data set is too small for the split, the detector is unknown, or `kept` has other settings.
    """
    began = time.perf_counter()
    detector_named(settings.detector)
    asked = {**asdict(settings), "modes": list(settings.modes)}
    found: Experiment = kept or {"format": FORMAT, "dataset": dataset.name, "settings": asked, "draws": []}
    usual = asdict(Settings())  # what settings are in files from before they could be chosen
    if {key: found["settings"].get(key, usual[key]) for key in asked if key != "draws"} != {
        key: value for key, value in asked.items() if key != "draws"
    } or found["dataset"] != dataset.name:
        raise InputError("experiment: it was begun with other settings or photos; choose another folder")
    found["settings"] = asked
    split = _split(dataset, settings, 0)
    seen = {photo.label for photo in (*split.shots, *split.good)}
    if len(seen) < 2:
        raise InputError(f"{dataset.name}: photos of {' and '.join(seen)} alone; add good parts or another class")
    photos = {"test": len(split.test), "good": len(split.good), "shots": len(split.shots)}
    if found.setdefault("photos", photos) != photos:
        raise InputError(f"experiment: {dataset.name} held other photos when it was begun; choose another folder")
    # The first draw may make the prior; from then on it has to stay the same.
    if found["draws"] and found.get("means", {}) != means.digests():
        raise InputError("experiment: it was begun with another prior or pipeline; choose another folder")
    book = FeatureBook(extractor_for(dataset.photos))
    reporter.stage(f"features of {len(split.test)} photos to test on")
    _tell(book, [*split.test, *split.good], reporter)
    learned, _ = set_aside(split.good, 0.25)
    good_rows = variants_of_good(learned, 0, book)
    network = _Network(dataset, learned, split) if settings.detector == CNN else None
    sheets: dict[str, list[Photo]] = {}
    reporter.stage("draws of the shots")
    for draw in range(len(found["draws"]), settings.draws):
        split = _split(dataset, settings, draw)
        lesson = prepare(
            split.shots,
            split.good,
            settings.modes,
            book,
            draw,
            reporter,
            settings.copies,
            settings.per_shot,
            good_rows=good_rows,
            means=means,
        )
        entry = _draw(lesson, split, book, settings.curves)
        if network is not None:
            entry["scores"] |= network.scores(lesson, split, settings, draw, reporter)
        if draw == 0:
            found["fidelity"] = _fidelity(lesson, split, book)
            found["refused"], found["left_out"] = lesson.refused, lesson.left_out
            found["means"] = means.digests()
            sheets = {mode: samples.photos for mode, samples in lesson.samples.items()}
            sheets = {"shots": list(split.shots), **sheets}
        found["draws"].append(entry)
        found["seconds"] = found.get("seconds", 0.0) + time.perf_counter() - began
        began = time.perf_counter()
        if save is not None:
            save(found, sheets)
        reporter.advance(draw + 1, settings.draws, f"draw {draw + 1} of {settings.draws}")
    return found, sheets


def table(found: Experiment, confidence: float = 0.95) -> dict[str, dict[str, dict[str, Interval | float]]]:
    """Of every recipe and metric: the mean with its interval over draws, and the paired difference from the base.

    Returns:
        By recipe and metric: `value` (an interval), `gain` (an interval), `ahead` and `behind` (shares of draws with a
        gain and with a loss). Metrics that the test set cannot give are left out.
    """
    draws = found["draws"]
    rows: dict[str, dict[str, dict[str, Interval | float]]] = {}
    for recipe in draws[0]["scores"]:
        row: dict[str, dict[str, Interval | float]] = {}
        for metric in METRICS:
            own = [draw["scores"][recipe][metric] for draw in draws]
            base = [draw["scores"][BASE][metric] for draw in draws]
            if any(value is None for value in own):
                continue
            row[metric] = {
                "value": t_interval(own, confidence),
                "gain": paired_t_interval(own, base, confidence),
                "ahead": float(np.mean(np.asarray(own) > np.asarray(base))),
                "behind": float(np.mean(np.asarray(own) < np.asarray(base))),
            }
        rows[recipe] = row
    return rows


def read_experiment(path: Path) -> Experiment:
    """What a run has left.

    Raises:
        InputError: unreadable, or of another format.
    """
    try:
        found: Any = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read ({error}); begin the experiment anew") from error
    if not isinstance(found, dict) or cast("Experiment", found).get("format") != FORMAT:
        raise InputError(f"{path}: not an experiment of format {FORMAT}; begin it anew")
    missing = [key for key in ("dataset", "settings", "photos", "draws") if not cast("Experiment", found).get(key)]
    if missing:
        raise InputError(f"{path}: lacks {', '.join(missing)}; begin the experiment anew")
    return cast("Experiment", found)


def write_experiment(path: Path, found: Experiment) -> None:
    """Writes the experiment under a temporary name and renames it."""
    replace_file(path, json.dumps(found, allow_nan=False, indent=1).encode())


def _split(dataset: Dataset, settings: Settings, draw: int) -> Split:
    return few_shot_split(
        dataset, settings.shots, draw, test_per_class=settings.test_per_class, split_seed=settings.split_seed
    )


def _tell(book: FeatureBook, photos: Sequence[Photo], reporter: Reporter) -> None:
    for start in range(0, len(photos), 64):
        book(photos[start : start + 64])
        done = min(start + 64, len(photos))
        reporter.advance(done, len(photos), f"features of {done} of {len(photos)} photos")


def _draw(lesson: Lesson, split: Split, book: FeatureBook, curves: bool) -> dict[str, Any]:
    """Scores of every recipe on the test photos, and what the gate has decided."""
    referee = Referee(lesson, book(split.test), [photo.label for photo in split.test])
    made = lesson.made(frozenset())
    scores = {"real": referee.of_choice(Choice(NONE), made), BASE: referee.of_choice(Choice(CLASSIC), made)}
    for mode in lesson.samples:
        scores[f"{BASE} + {mode}"] = referee.of_choice(Choice(mode, SHARE), made)
    folds = _FOLDS if all(samples.tracks_sources for samples in lesson.samples.values()) else _FOLDS_WITH_FITS
    decision = decide(lesson.real, lesson.classic, lesson.made, lesson.judges, folds)
    scores["gate"] = referee.scores(decision.heads)
    entry = {"scores": scores, "gate": _said(decision)}
    return {**entry, "curves": by_samples_and_steps(lesson, referee)} if curves else entry


class _Network:
    """The CNN on the lessons of the draws: the same photos, variants and samples as the texture features have."""

    def __init__(self, dataset: Dataset, learned: Sequence[Photo], split: Split) -> None:
        self._extractor = PictureExtractor(all(photo.template is not None for photo in dataset.photos))
        self._book = FeatureBook(self._extractor)
        self._good: Rows = variants_of_good(learned, 0, self._book)
        self._tested = self._book(split.test)

    def scores(
        self, lesson: Lesson, split: Split, settings: Settings, draw: int, reporter: Reporter
    ) -> dict[str, dict[str, Any]]:
        """Scores by recipe: classic augmentation, and each mode at the share that it has without a gate."""
        own = seen_by(lesson, split.shots, split.good, self._book, draw, reporter, settings.copies, self._good)
        learner = cnn_learner(self._extractor, draw, reporter)
        referee = Referee(own, self._tested, [photo.label for photo in split.test], learner)
        made = own.made(frozenset())
        found = {BASE + OF_CNN: referee.of_choice(Choice(CLASSIC), made)}
        for mode in own.samples:
            found[f"{BASE} + {mode}{OF_CNN}"] = referee.of_choice(Choice(mode, SHARE), made)
        return found


def _said(decision: Decision) -> dict[str, Any]:
    return {
        "detection": {label: asdict(choice) for label, choice in decision.detection.items()},
        "typing": {label: asdict(choice) for label, choice in decision.typing.items()},
        "evidence": {part: [asdict(found) for found in rows] for part, rows in decision.evidence.items()},
    }


def _fidelity(lesson: Lesson, split: Split, book: FeatureBook) -> dict[str, dict[str, Any]]:
    """Of every mode and class: samples beside the real photos of the test, which no generator saw."""
    found: dict[str, dict[str, Any]] = {}
    for mode, samples in lesson.samples.items():
        for label in sorted({photo.label for photo in samples.photos} - {GOOD}):
            real = [photo for photo in split.test if photo.label == label]
            shots = [photo for photo in split.shots if photo.label == label]
            made = [photo for photo in samples.photos if photo.label == label]
            if min(len(real) // 2, len(shots), len(made)) < 2:
                continue
            facts = fidelity(book.extractor(made), book(real), book(shots)).as_dict()
            found.setdefault(mode, {})[label] = json.loads(json.dumps(facts).replace("NaN", "null"))
    return found
