"""What modes share that draw whole photos, or defects on good parts, from the looks of classes."""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar, Self

from gmel.scenario.errors import InputError
from gmel.synthesis.diffusion.drawing import Draw
from gmel.synthesis.diffusion.looks import Looks
from gmel.synthesis.diffusion.stitching import Field
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
