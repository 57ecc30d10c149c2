"""What one site can learn from in one draw: its shots, its good parts, their variants, and samples of every mode."""

from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from typing import Self

import numpy as np

from gmel.evaluation.progress import Reporter
from gmel.scenario.errors import InputError
from gmel.synthesis.augment import augmented
from gmel.synthesis.detector.features import Extractor, FeatureBook
from gmel.synthesis.generator import NO_MEANS, Generator, Means, Shamming
from gmel.synthesis.modes import mode_named
from gmel.synthesis.photo import GOOD, Floats, Photo
from gmel.synthesis.rows import Rows, joined

__all__ = ["Lesson", "Samples", "notices", "prepare", "rows_of", "seen_by", "set_aside", "variants_of_good"]

_SHAM_FOR_SHOTS = 2
"""Blends without a defect for every shot, where defects are blended."""
_GOOD_COPIES = 1


@dataclass(frozen=True, eq=False)
class Lesson:
    """Everything that detectors of one draw are trained on and gated by.

    Attributes:
        real: shots and good parts.
        classic: their augmented variants.
        judges: good parts kept from everything else: they set thresholds and judge in the gate.
        samples: what each mode makes.
        refused: why a mode cannot be used here, by mode.
        left_out: classes that a mode cannot draw, by mode: it can use none of their shots.
    """

    real: Rows
    classic: Rows
    judges: Rows
    samples: dict[str, "Samples"]
    refused: dict[str, str]
    left_out: dict[str, list[str]]

    def made(self, held: frozenset[str]) -> dict[str, Rows]:
        """Rows of all modes, made without the shots named."""
        return {mode: samples.without(held) for mode, samples in self.samples.items()}


class Samples:
    """What one mode makes of the shots, and of the shots without some.

    A mode that says for each photo which shot it was made from needs no second fit: the photos of a shot are left out.
    The others are fitted anew without the shots.
    """

    def __init__(
        self,
        mode: type[Generator],
        shots: Sequence[Photo],
        good: Sequence[Photo],
        per_shot: int,
        extractor: Extractor,
        seed: int,
        reporter: Reporter,
        means: Means = NO_MEANS,
    ) -> None:
        self._means = means
        self.mode, self._shots, self._good = mode, tuple(shots), tuple(good)
        self.per_shot, self._extractor, self._seed, self._reporter = per_shot, extractor, seed, reporter
        self.generator = self._fitted(self._shots)
        self.photos, self.rows = self._drawn(self.generator, self._shots, per_shot)
        self._known = {frozenset[str](): self.rows}

    @property
    def tracks_sources(self) -> bool:
        """Whether each photo of a defect names its shot."""
        return all(photo.source for photo in self.photos if photo.label != GOOD)

    def without(self, held: frozenset[str]) -> Rows:
        """Rows made without the shots named."""
        if held not in self._known:
            if self.tracks_sources:
                self._known[held] = self.rows.without(held)
            else:
                rest = [photo for photo in self._shots if photo.name not in held]
                nothing = self.rows.where(np.zeros(len(self.rows), np.bool_))
                self._known[held] = self._drawn(self._fitted(rest), rest, self.per_shot)[1] if rest else nothing
        return self._known[held]

    def seen_by(self, extractor: Extractor) -> Self:
        """The same photos of the same generator, with other features."""
        other = copy(self)
        other._extractor = extractor
        other.rows = self._rows(self.photos, extractor)
        other._known = {frozenset[str](): other.rows}
        return other

    def again(self, per_shot: int, steps: int | None) -> Rows:
        """Rows of other samples of the same generator.

        Args:
            per_shot: samples for each shot.
            steps: denoising steps; those of the mode where it is none.

        Raises:
            InputError: steps that the mode does not allow.
        """
        return self._drawn(self.generator, self._shots, per_shot, steps)[1]

    def _fitted(self, shots: Sequence[Photo]) -> Generator:
        return self.mode.fit(shots, self._good, self._seed, self._reporter, self._means)

    def _drawn(
        self, generator: Generator, shots: Sequence[Photo], per_shot: int, steps: int | None = None
    ) -> tuple[list[Photo], Rows]:
        photos: list[Photo] = []
        for label in generator.labels:
            count = per_shot * sum(photo.label == label for photo in shots)
            photos += generator.sample(label, count, self._seed, steps)
        if isinstance(generator, Shamming):
            photos += generator.sham(_SHAM_FOR_SHOTS * len(shots), self._seed)
        return photos, self._rows(photos, self._extractor)

    def _rows(self, photos: Sequence[Photo], extractor: Extractor) -> Rows:
        # Like shots, samples are turned, cropped and lit anew: a detector must not learn that only shots are.
        return rows_of(augmented(photos, 1, self._seed), extractor)


def rows_of(photos: Sequence[Photo], features: Callable[[Sequence[Photo]], Floats]) -> Rows:
    """Rows of photos; a real shot is its own source.

    Args:
        photos: real or synthetic.
        features: a book, for photos that come again, or an extractor, for those that do not.
    """
    sources = ["" if photo.label == GOOD else photo.source or photo.name for photo in photos]
    return Rows.of(features(photos), [photo.label for photo in photos], sources)


def prepare(
    shots: Sequence[Photo],
    good: Sequence[Photo],
    modes: Sequence[str],
    book: FeatureBook,
    seed: int,
    reporter: Reporter,
    copies: int = 8,
    per_shot: int = 8,
    judging: float = 0.25,
    good_rows: Rows | None = None,
    means: Means = NO_MEANS,
) -> Lesson:
    """The lesson of a draw.

    Args:
        shots: photos of defects.
        good: photos of good parts; may be none.
        modes: names of the modes to try.
        book: computes features.
        seed: of variants and samples.
        copies: augmented variants of each shot.
        per_shot: samples of a mode for each shot.
        judging: share of the good parts that is kept for thresholds and the gate.
        good_rows: of augmented variants of the good parts that are learned from, where they are at hand.
        means: files that modes may use.
    """
    learned, judges = set_aside(good, judging)
    varied = rows_of(augmented(shots, copies, seed), book.extractor)
    classic = joined(varied, variants_of_good(learned, seed, book) if good_rows is None else good_rows)
    samples: dict[str, Samples] = {}
    refused: dict[str, str] = {}
    for mode in modes:
        try:
            kind = mode_named(mode)
            samples[mode] = Samples(kind, shots, learned, per_shot, book.extractor, seed, reporter, means)
        except InputError as error:
            refused[mode] = str(error)
    wanted = {photo.label for photo in shots} - {GOOD}
    lacking = {mode: sorted(wanted - set(made.generator.labels)) for mode, made in samples.items()}
    left_out = {mode: labels for mode, labels in lacking.items() if labels}
    return Lesson(rows_of([*shots, *learned], book), classic, rows_of(judges, book), samples, refused, left_out)


def seen_by(
    lesson: Lesson,
    shots: Sequence[Photo],
    good: Sequence[Photo],
    book: FeatureBook,
    seed: int,
    reporter: Reporter,
    copies: int = 8,
    good_rows: Rows | None = None,
) -> Lesson:
    """The same lesson in other features: the same photos, variants and samples, nothing fitted anew.

    Args:
        lesson: as `prepare` has made it.
        shots, good, seed, copies: what `prepare` was given.
        book: computes the other features.
        reporter: told how it goes on.
        good_rows: of augmented variants of the good parts that are learned from, where they are at hand.
    """
    plain = prepare(shots, good, (), book, seed, reporter, copies, good_rows=good_rows)
    return replace(
        plain,
        samples={mode: samples.seen_by(book.extractor) for mode, samples in lesson.samples.items()},
        refused=lesson.refused,
        left_out=lesson.left_out,
    )


def notices(refused: Mapping[str, str], left_out: Mapping[str, Sequence[str]]) -> list[str]:
    """What a person should know of modes that were not used, or not for all classes."""
    lacking = (
        f"{mode} draws nothing of {', '.join(labels)}: it can use none of their shots (no mask, no box)"
        for mode, labels in left_out.items()
    )
    return [*(f"{mode} was not tried: {why}" for mode, why in refused.items()), *lacking]


def variants_of_good(good: Sequence[Photo], seed: int, book: FeatureBook) -> Rows:
    """Rows of augmented variants of good parts."""
    return rows_of(augmented(good, _GOOD_COPIES, seed), book.extractor)


def set_aside(good: Sequence[Photo], share: float) -> tuple[list[Photo], list[Photo]]:
    """Good parts to learn from, and a share of them to judge by; the same whatever the draw."""
    order = np.random.default_rng(0).permutation(len(good))
    kept = int(share * len(good))
    return [good[n] for n in sorted(order[kept:])], [good[n] for n in sorted(order[:kept])]
