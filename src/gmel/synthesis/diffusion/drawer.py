"""What modes share that draw whole photos, or defects on good parts, from the looks of classes."""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar, Self

from gmel.scenario.errors import InputError
from gmel.synthesis.diffusion.drawing import Draw, drawn_in_turns
from gmel.synthesis.diffusion.looks import Looks
from gmel.synthesis.diffusion.stitching import Field
from gmel.synthesis.generator import Request
from gmel.synthesis.photo import Floats, Photo

__all__ = ["MOST_STEPS", "Drawer", "checked_steps"]

MOST_STEPS = 50


@dataclass(frozen=True, eq=False)
class Drawer:
    """A mode that draws what `looks` asks for.

    Attributes:
        looks: what is known of the classes beside the network.
    """

    mode: ClassVar[str]
    default_steps: ClassVar[int]
    most_steps: ClassVar[int] = MOST_STEPS
    shares_photos: ClassVar[bool] = False

    looks: Looks

    @property
    def labels(self) -> tuple[str, ...]:
        """Classes that it can draw."""
        return self.looks.labels

    def on(self, good: Sequence[Photo]) -> Self:
        """The generator with good parts to draw on: another site's, or those that a saved generator does not hold."""
        return replace(self, looks=replace(self.looks, good=tuple(good)))

    def draws_on_good(self, label: str) -> bool:
        """Whether defects of a class are drawn on good parts: where it was learned with masks, beside good parts."""
        return label in self.labels and self.looks.inpaints(label)

    def sample(self, label: str, count: int, seed: int, steps: int | None = None) -> list[Photo]:
        """`count` photos of a class; photo `i` depends on the seed and `i` only.

        Raises:
            InputError: a class that it has not learned, or steps that are not from 1 to `most_steps`.
        """
        steps = checked_steps(self.default_steps if steps is None else steps, self.most_steps)
        return self.drawn_with(partial(self._draw, steps), label, count, seed)

    def sample_several(self, requests: Sequence[Request], steps: int | None = None) -> list[list[Photo]]:
        """As `sample` of each request, their fields drawn together: up to rounding the same photos.

        Raises:
            InputError: as `sample`.
        """
        steps = checked_steps(self.default_steps if steps is None else steps, self.most_steps)
        orders = [self.looks.order(self.mode, each.label, each.count, each.seed) for each in requests]
        return drawn_in_turns(orders, partial(self._draw, steps))

    def drawn_with(self, draw: Draw, label: str, count: int, seed: int) -> list[Photo]:
        """As `sample`, with fields drawn by something else."""
        return self.looks.photos(self.mode, label, count, seed, draw)

    def sham(self, count: int, seed: int) -> list[Photo]:
        """`count` good parts, drawn as those with defects are; none where no good parts were learned."""
        return self.looks.sham(self.mode, count, seed, partial(self._draw, self.default_steps))

    @abstractmethod
    def _draw(self, steps: int, fields: list[Field]) -> list[Floats]:
        """Draws fields by the network of the mode."""


def checked_steps(steps: int, most: int = MOST_STEPS) -> int:
    """The steps.

    Raises:
        InputError: they are not from 1 to `most`.
    """
    if not 1 <= steps <= most:
        raise InputError(f"steps is {steps}, must be from 1 to {most}")
    return steps
