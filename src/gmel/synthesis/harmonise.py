"""Mode `harmonise`: defects that were composed onto good parts, drawn over by a few steps from low noise (SDEdit,
arXiv 2108.01073), so that seams and false light at their edge go. Only the defect and the pixels around its edge
change.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Self, TypeVar

import numpy as np

from gmel.evaluation.progress import Reporter
from gmel.scenario.errors import InputError
from gmel.synthesis.diffusion.looks import Drawing, finished
from gmel.synthesis.diffusion.prior import Prior
from gmel.synthesis.diffusion.samplers import karras_sigmas
from gmel.synthesis.diffusion.stitching import draw_fields
from gmel.synthesis.diffusion.windows import Box, Mask, dilated, field_box, reduced_mask, shapes
from gmel.synthesis.generate import SIGMA_LOW, Generate, Plan, checked_steps
from gmel.synthesis.generator import Arrays, Generator
from gmel.synthesis.photo import Photo

__all__ = ["Harmonise", "harmonised"]

Value = TypeVar("Value")
_SIGMA_MOST = 5.0

SIGMA = 0.2
"""Noise from which a composed defect is drawn anew, in contrasts: enough to melt its edge, too little to change it."""
EDGE = 3
"""Pixels on each side of the edge of a defect that change."""


def harmonised(
    photos: Sequence[Photo],
    model: Generate,
    seed: int,
    steps: int,
    *,
    sigma: float = SIGMA,
    edge_only: bool = True,
) -> list[Photo]:
    """Composed photos drawn over; all other pixels stay as they are, bit for bit.

    Args:
        photos: photos with masks of their defects.
        model: the diffusion model of the site.
        seed: of the noise; a photo's noise depends on the seed and its place in `photos` only.
        steps: evaluations of the network.
        sigma: noise to start from, in contrasts.
        edge_only: only the pixels within `EDGE` of a defect's edge change; else the defect's inside too.

    Raises:
        InputError: a photo without a mask, or noise that is not above the lowest level.
    """
    if not SIGMA_LOW < sigma <= _SIGMA_MOST:
        raise InputError(f"sigma is {sigma}, must be above {SIGMA_LOW} and at most {_SIGMA_MOST}")
    sigmas = karras_sigmas(steps, SIGMA_LOW, sigma)
    current = list(photos)
    streams = [np.random.default_rng((seed, index)) for index in range(len(current))]
    places = [_places(photo, model.looks.scale) for photo in current]
    # Defects of one photo may lie near each other: they are drawn one after the other, photos together.
    for turn in range(max((len(boxes) for _, boxes in places), default=0)):
        chosen = [index for index, (_, boxes) in enumerate(places) if turn < len(boxes)]
        drawings: list[Drawing] = []
        for index in chosen:
            mask, boxes = places[index]
            box = field_box(boxes[turn], (mask.shape[0], mask.shape[1]), streams[index])
            defect = box.of(mask)
            inside = dilated(defect, EDGE)
            if edge_only:
                inside &= dilated(~defect, EDGE)
            number = model.looks.classes[current[index].label].number
            drawings.append(model.looks.redrawn(current[index], box, inside, mask, number, streams[index], blank=False))
        made = finished(
            drawings,
            [streams[index] for index in chosen],
            lambda fields: draw_fields(model.denoiser, fields, sigmas, model.solver, model.guidance),
        )
        for index, photo in zip(chosen, made, strict=True):
            current[index] = replace(photo, mask=photos[index].mask)
    return current


def _places(photo: Photo, scale: int) -> tuple[Mask, list[Box]]:
    mask = reduced_mask(photo.mask, scale)
    if mask is None:
        raise InputError(f"{photo.name or photo.label}: has no mask of the defect; harmonise needs one")
    return mask, shapes(mask)


@dataclass(frozen=True, eq=False)
class Harmonise:
    """Composes, then draws over.

    Attributes:
        composer: a generator whose photos have masks, of the class `composing`.
        model: the diffusion model of the same classes.
        sigma: noise to start from, in contrasts.
    """

    mode: ClassVar[str] = "harmonise"
    default_steps: ClassVar[int] = 4
    shares_photos: ClassVar[bool] = True
    composing: ClassVar[type[Generator]]

    composer: Generator
    model: Generate
    sigma: float = SIGMA

    @classmethod
    def fit(
        cls,
        shots: Sequence[Photo],
        good: Sequence[Photo],
        seed: int,
        reporter: Reporter,
        *,
        prior: Prior | None = None,
        plan: Plan | None = None,
        model: Generate | None = None,
        sigma: float = SIGMA,
        resume: bool = False,
    ) -> Self:
        """Learns the classes of the shots.

        Args:
            shots: photos of defects, with masks.
            good: photos of good parts.
            seed: of all that is random.
            reporter: who is told.
            prior: see `Generate.fit`.
            plan: see `Generate.fit`.
            model: a diffusion model of the same shots that is already there: it is used, and nothing is trained.
            sigma: noise to start from, in contrasts.
            resume: see `Generate.fit`.

        Raises:
            InputError: what the composer or the diffusion model needs is missing.
        """
        if not SIGMA_LOW < sigma <= _SIGMA_MOST:
            raise InputError(f"sigma is {sigma}, must be above {SIGMA_LOW} and at most {_SIGMA_MOST}")
        composer = cls.composing.fit(shots, good, seed, reporter)
        model = model or Generate.fit(shots, good, seed, reporter, prior=prior, plan=plan, resume=resume)
        missing = sorted(set(composer.labels) - set(model.labels))
        if missing:
            raise InputError(f"model: has not learned {', '.join(missing)}; give one of the same shots")
        return cls(composer, model, sigma)

    @property
    def labels(self) -> tuple[str, ...]:
        """Classes that it can draw."""
        return self.composer.labels

    def sample(self, label: str, count: int, seed: int, steps: int | None = None) -> list[Photo]:
        """`count` photos of a class; the same seed gives the same photos.

        Raises:
            InputError: a class that it has not learned, or steps that are not from 1 to 50.
        """
        steps = checked_steps(self.default_steps if steps is None else steps)
        composed = self.composer.sample(label, count, seed)
        return harmonised(composed, self.model, seed, steps, sigma=self.sigma)

    def state(self) -> tuple[Arrays, dict[str, str]]:
        """The states of the composer and of the model, each under its name."""
        arrays: Arrays = {}
        facts: dict[str, str] = {"sigma": repr(self.sigma)}
        for name, part in (("composer", self.composer), ("model", self.model)):
            its_arrays, its_facts = part.state()
            arrays |= {f"{name}/{key}": array for key, array in its_arrays.items()}
            facts |= {f"{name}/{key}": fact for key, fact in its_facts.items()}
        return arrays, facts

    @classmethod
    def from_state(cls, arrays: Arrays, facts: dict[str, str]) -> Self:
        """The generator of a state.

        Raises:
            InputError: an array or a fact is missing or wrong.
        """
        try:
            sigma = float(facts["sigma"])
        except (KeyError, ValueError) as error:
            raise InputError(f"sigma is {facts.get('sigma')!r}, must be a number; fit the generator anew") from error
        composer = cls.composing.from_state(_part(arrays, "composer"), _part(facts, "composer"))
        return cls(composer, Generate.from_state(_part(arrays, "model"), _part(facts, "model")), sigma)


def _part(named: dict[str, Value], name: str) -> dict[str, Value]:
    return {key.removeprefix(f"{name}/"): value for key, value in named.items() if key.startswith(f"{name}/")}
