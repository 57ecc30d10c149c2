"""Mode `harmonise`: defects that were composed onto good parts, drawn over by a few steps from low noise (SDEdit,
arXiv 2108.01073), so that seams and false light at their edge go. Only the pixels around the edge change.

The denoiser has seen good parts alone: it knows how a surface goes on, and nothing of the shots. So a photo holds
nothing of any shot but the one that its defect was cut from.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import ClassVar, Self

import numpy as np

from gmel.evaluation.progress import Reporter
from gmel.scenario.errors import InputError
from gmel.synthesis.compose import Compose
from gmel.synthesis.diffusion.drawer import checked_steps
from gmel.synthesis.diffusion.drawing import Asking, Draw, Drawing, Order, drawn_in_turns, finishing, redrawn
from gmel.synthesis.diffusion.prior import Prior, prior_for
from gmel.synthesis.diffusion.samplers import karras_sigmas
from gmel.synthesis.diffusion.stitching import Field, draw_fields, window_gflop
from gmel.synthesis.diffusion.windows import Box, Mask, dilated, field_box, reduced_mask, shapes
from gmel.synthesis.generate import SIGMA_LOW, Plan
from gmel.synthesis.generator import NO_MEANS, Arrays, Means, Request
from gmel.synthesis.photo import Floats, Photo
from gmel.synthesis.sensor import Sensor

__all__ = ["EDGE", "SIGMA", "Harmonise", "harmonised"]

SIGMA = 0.2
"""Noise from which an edge is drawn anew, in contrasts: enough to melt it, too little to change what is there."""
EDGE = 3
"""Pixels on each side of the edge of a defect that change."""


def harmonised(photos: Sequence[Photo], scale: int, sensor: Sensor, seed: int, draw: Draw) -> list[Photo]:
    """Composed photos drawn over at the edges of their defects; all other pixels stay as they are, bit for bit.

    Args:
        photos: photos with masks of their defects.
        scale: working resolution of what draws: 1 native, 2 half.
        sensor: of the photos.
        seed: of the noise; a photo's noise depends on the seed and its place in `photos` only.
        draw: draws fields.

    Raises:
        InputError: a photo without a mask.
    """
    return drawn_in_turns([_order(photos, scale, sensor, seed)], draw)[0]


def _order(photos: Sequence[Photo], scale: int, sensor: Sensor, seed: int) -> Order:
    places = [_places(photo, scale) for photo in photos]
    streams = [np.random.default_rng((seed, index)) for index in range(len(photos))]
    # Defects of one photo may lie near each other: they are drawn one after the other, photos together.
    turns = max((len(boxes) for _, boxes in places), default=0)

    def asking() -> Asking:
        current = list(photos)
        for turn in range(turns):
            chosen = [index for index, (_, boxes) in enumerate(places) if turn < len(boxes)]
            drawings: list[Drawing] = []
            for index in chosen:
                (mask, boxes), rng = places[index], streams[index]
                box = field_box(boxes[turn], (mask.shape[0], mask.shape[1]), rng)
                defect = box.of(mask)
                edge = dilated(defect, EDGE) & dilated(~defect, EDGE)
                drawings.append(redrawn(current[index], box, edge, mask, 0, scale, sensor, rng, blank=False))
            made = yield from finishing(drawings, [streams[index] for index in chosen])
            for index, photo in zip(chosen, made, strict=True):
                current[index] = replace(photo, mask=photos[index].mask)
        return current

    return Order(turns, asking())


def _places(photo: Photo, scale: int) -> tuple[Mask, list[Box]]:
    mask = reduced_mask(photo.mask, scale)
    if mask is None:
        raise InputError(f"{photo.name or photo.label}: has no mask of the defect; harmonise needs one")
    return mask, shapes(mask)


class Harmonise(Compose):
    """Composes, then draws over (see the module).

    Attributes:
        prior: of good parts.
        sensor: of good parts.
    """

    mode: ClassVar[str] = "harmonise"
    default_steps: ClassVar[int] = 4

    def __init__(self, shots: Sequence[Photo], good: Sequence[Photo], prior: Prior, sensor: Sensor) -> None:
        super().__init__(shots, good)
        self.prior, self.sensor = prior, sensor

    @classmethod
    def fit(
        cls,
        shots: Sequence[Photo],
        good: Sequence[Photo],
        seed: int,
        reporter: Reporter,
        means: Means = NO_MEANS,
        plan: Plan | None = None,
    ) -> Self:
        """Keeps the shots that have a mask, and trains a prior on the good parts where no file has one.

        Raises:
            InputError: no good parts, no masks, or files that do not fit.
        """
        plan = plan or Plan()
        composed = Compose.fit(shots, good, seed, reporter)
        prior = prior_for(good, reporter, plan.prior, plan.size, plan.scale, means)
        means.forget()
        return cls(composed.shots, composed.good, prior, Sensor.fit(good))

    def on(self, good: Sequence[Photo]) -> Self:
        """The generator with these good parts to draw on in place of its own; the prior stays that of its own."""
        return type(self)(self.shots, good, self.prior, self.sensor)

    def sample(self, label: str, count: int, seed: int, steps: int | None = None) -> list[Photo]:
        """`count` good parts, each with a defect of the class.

        Raises:
            InputError: a class that it has not learned, or steps that are not from 1 to 50.
        """
        steps = checked_steps(self.default_steps if steps is None else steps)
        return self.drawn_with(partial(self._draw, steps), label, count, seed)

    def sample_several(self, requests: Sequence[Request], steps: int | None = None) -> list[list[Photo]]:
        """As `sample` of each request, their fields drawn together: up to rounding the same photos.

        Raises:
            InputError: as `sample`.
        """
        steps = checked_steps(self.default_steps if steps is None else steps)
        composed = [(super(Harmonise, self).sample(each.label, each.count, each.seed), each.seed) for each in requests]
        orders = [_order(photos, self.prior.scale, self.sensor, seed) for photos, seed in composed]
        return drawn_in_turns(orders, partial(self._draw, steps))

    def drawn_with(self, draw: Draw, label: str, count: int, seed: int) -> list[Photo]:
        """As `sample`, with fields drawn by something else."""
        return harmonised(super().sample(label, count, seed), self.prior.scale, self.sensor, seed, draw)

    def sham(self, count: int, seed: int) -> list[Photo]:
        """`count` good parts with a piece of another good part, harmonised as a defect would be."""
        draw = partial(self._draw, self.default_steps)
        made = harmonised(self._shams(count, seed), self.prior.scale, self.sensor, seed, draw)
        return [replace(photo, mask=None) for photo in made]

    def _draw(self, steps: int, fields: list[Field]) -> list[Floats]:
        return draw_fields(self.prior.denoiser, fields, karras_sigmas(steps, SIGMA_LOW, SIGMA))

    def window_gflop(self) -> float:
        """GFLOP of one step for one window, from the compiled program."""
        return window_gflop(self.prior.denoiser)

    def state(self) -> tuple[Arrays, dict[str, str]]:
        """The photos, the prior and the sensor."""
        (arrays, facts), (weights, size) = super().state(), self.prior.state()
        return {**arrays, **weights, **self.sensor.state()}, {**facts, **size}

    @classmethod
    def from_state(cls, arrays: Arrays, facts: dict[str, str]) -> Self:
        """The generator of a state.

        Raises:
            InputError: an array or a fact is missing or wrong.
        """
        composed = Compose.from_state(arrays, facts)
        return cls(composed.shots, composed.good, Prior.from_state(arrays, facts), Sensor.from_state(arrays))
