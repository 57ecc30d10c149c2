"""The few-shot adaptation of a pipeline: low-rank changes are trained on pictures of a site.

The loop follows `diffusion/training.py`: a batch depends on the seed and the number of the update only, an interrupt
keeps what was learned, and a resumed training ends with the weights that it would have had.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gmel.evaluation.progress import Reporter
from gmel.learning.checkpoint import load_checkpoint, save_checkpoint
from gmel.synthesis.generator import Arrays
from gmel.synthesis.photo import Floats
from gmel.synthesis.pretrained.extra import Tensor
from gmel.synthesis.pretrained.pipeline import Pipeline, Weights

__all__ = ["Adaptation", "Adapted", "adapt", "denoising_loss"]

Draw = Callable[[np.random.Generator, int], tuple[Floats, NDArray[np.int64]]]
"""A batch of the given size: pictures [n, side, side] and their class numbers [n]."""

_FIRST, _SECOND, _TINY = 0.9, 0.99, 1e-8


@dataclass(frozen=True)
class Adaptation:
    """How the changes are trained: as in the examples of diffusers for a few photos (DreamBooth with LoRA), in which
    the rank is 4, the rate 1e-4 and the updates are 500.

    Attributes:
        steps: updates.
        batch: pictures of an update.
        rate: highest learning rate, after a warm-up of a twentieth of the steps; it falls to 0 along a cosine.
        clip: longest gradient.
        unlabelled: share of pictures that are learned without their class.
        checkpoint: where the training is written every `checkpoint_every_s` seconds and when it is interrupted.
        facts: what a checkpoint must say of itself to be resumed.
    """

    steps: int = 500
    batch: int = 4
    rate: float = 1e-4
    clip: float = 1.0
    unlabelled: float = 0.1
    checkpoint: Path | None = None
    checkpoint_every_s: float = 20.0
    facts: dict[str, str] = field(default_factory=dict[str, str])

    def rate_at(self, step: int) -> float:
        """Learning rate of an update, counted from 0."""
        warm = max(self.steps // 20, 1)
        if step < warm:
            return self.rate * (step + 1) / (warm + 1)
        return self.rate * 0.5 * (1.0 + math.cos(math.pi * (step - warm) / max(self.steps - warm, 1)))


@dataclass(frozen=True)
class Adapted:
    """What came of it: weights, loss of each update, whether it came to its end."""

    weights: Weights
    losses: list[float]
    finished: bool


@dataclass(frozen=True)
class _Loop:
    """All that a checkpoint holds: weights, their mean gradients and mean squares (Adam), losses."""

    weights: Weights
    first: Weights
    second: Weights
    losses: tuple[float, ...] = ()


def denoising_loss(
    pipeline: Pipeline,
    pictures: Floats,
    numbers: NDArray[np.int64],
    conditions: Tensor,
    seed: int,
    unlabelled: float = 0.0,
) -> Tensor:
    """Squared error of what the network predicts, at random noise levels.

    Args:
        pipeline: with the weights that it wears.
        pictures: [n, side, side], 0 to 1.
        numbers: [n], classes from 1.
        conditions: see `Pipeline.conditions`.
        seed: of noise and levels.
        unlabelled: share of pictures whose class is not told.
    """
    torch, count = pipeline.torch, len(numbers)
    clean = pipeline.encode(pictures)
    random = torch.Generator().manual_seed(seed)
    noise = torch.randn(clean.shape, generator=random).to(pipeline.device)
    times = torch.randint(0, pipeline.folder.noise.steps, (count,), generator=random).to(pipeline.device)
    told = torch.rand(count, generator=random) >= unlabelled
    classes = (torch.from_numpy(numbers) * told).to(pipeline.device)
    noisy = pipeline.trained_noise.add_noise(clean, noise, times)
    wanted = {
        "epsilon": lambda: noise,
        "v_prediction": lambda: pipeline.trained_noise.get_velocity(clean, noise, times),
        "sample": lambda: clean,
    }[pipeline.folder.noise.predicts]()
    return torch.nn.functional.mse_loss(pipeline.predict(noisy, times, classes, conditions), wanted)


def adapt(
    pipeline: Pipeline,
    draw: Draw,
    classes: tuple[str, ...],
    how: Adaptation,
    seed: int,
    reporter: Reporter,
    resume: bool = False,
) -> Adapted:
    """Trains the low-rank changes of a pipeline.

    Where there is a checkpoint, KeyboardInterrupt ends the training after the last whole update: the checkpoint is
    written and what there is is returned. Without one it is not caught.

    Args:
        pipeline: what is adapted.
        draw: the batches.
        classes: in the order of their numbers.
        how: how long, how fast.
        seed: of the first weights, of batches and of noise.
        reporter: who is told.
        resume: go on from the checkpoint where there is one.

    Raises:
        InputError: the checkpoint does not fit.
    """
    torch = pipeline.torch
    weights = pipeline.fresh(len(classes), seed)
    zeros = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    loop = _Loop(weights, zeros, zeros)
    if resume and how.checkpoint is not None and how.checkpoint.is_file():
        loop = _restored(load_checkpoint(how.checkpoint, _arrays(loop, how.steps), how.facts), pipeline)
    conditions = pipeline.conditions(classes)
    saved = time.monotonic()

    def save() -> None:
        if how.checkpoint is not None:
            save_checkpoint(how.checkpoint, _arrays(loop, how.steps), how.facts)

    try:
        while len(loop.losses) < how.steps:
            step = len(loop.losses)
            parts = pipeline.wear(loop.weights)
            pictures, numbers = draw(np.random.default_rng((seed, 2, step)), how.batch)
            of_step = int(np.random.default_rng((seed, 3, step)).integers(2**62))
            loss = denoising_loss(pipeline, pictures, numbers, conditions, of_step, how.unlabelled)
            gradients = dict(zip(parts, torch.autograd.grad(loss, list(parts.values())), strict=True))
            # One assignment, so that an interrupt finds either the old loop or the new one.
            loop = _after(loop, gradients, float(loss.detach()), how, torch)
            reporter.advance(step + 1, how.steps, f"adaptation: loss {loop.losses[-1]:.3f}")
            if time.monotonic() - saved > how.checkpoint_every_s:
                save()
                saved = time.monotonic()
    except KeyboardInterrupt:
        if how.checkpoint is None:
            raise
        reporter.note(f"adaptation: interrupted after {len(loop.losses)} of {how.steps} updates; these are kept")
    save()
    return Adapted(loop.weights, list(loop.losses), len(loop.losses) >= how.steps)


def _after(loop: _Loop, gradients: Weights, loss: float, how: Adaptation, torch: Any) -> _Loop:
    """The loop after an update by Adam (arXiv 1412.6980) with clipped gradients."""
    step = len(loop.losses)
    length = float(torch.sqrt(sum((gradient**2).sum() for gradient in gradients.values())))
    scale = min(1.0, how.clip / max(length, _TINY))
    weights: Weights = {}
    first: Weights = {}
    second: Weights = {}
    for name, gradient in gradients.items():
        first[name] = _FIRST * loop.first[name] + (1.0 - _FIRST) * scale * gradient
        second[name] = _SECOND * loop.second[name] + (1.0 - _SECOND) * (scale * gradient) ** 2
        mean, square = first[name] / (1.0 - _FIRST ** (step + 1)), second[name] / (1.0 - _SECOND ** (step + 1))
        weights[name] = loop.weights[name] - how.rate_at(step) * mean / (torch.sqrt(square) + _TINY)
    return _Loop(weights, first, second, (*loop.losses, loss))


def _arrays(loop: _Loop, steps: int) -> dict[str, Arrays]:
    losses = np.full(steps, np.nan, np.float32)
    losses[: len(loop.losses)] = loop.losses
    parts = {"weights": loop.weights, "first": loop.first, "second": loop.second}
    made = {
        part: {name: tensor.detach().cpu().numpy() for name, tensor in tensors.items()}
        for part, tensors in parts.items()
    }
    return {**made, "losses": {"losses": losses}}


def _restored(arrays: dict[str, Any], pipeline: Pipeline) -> _Loop:
    def tensors(part: str) -> Weights:
        return {
            name: pipeline.torch.from_numpy(np.array(array)).to(pipeline.device) for name, array in arrays[part].items()
        }

    losses = np.asarray(arrays["losses"]["losses"])
    done = tuple(float(value) for value in losses[np.isfinite(losses)])
    return _Loop(tensors("weights"), tensors("first"), tensors("second"), done)
