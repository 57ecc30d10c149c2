"""One loop for all trainings on windows: the label-free prior, the few-shot adaptation (full or low-rank), the energy.

A batch depends on the seed and the number of the step only, so that a training that was interrupted and resumed ends
with the weights that it would have had.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, PRNGKeyArray

from gmel.evaluation.progress import Reporter
from gmel.learning.checkpoint import load_checkpoint, save_checkpoint
from gmel.synthesis.diffusion.edm import averaged

__all__ = ["Loss", "Trained", "Training", "train"]

Model = TypeVar("Model", bound=eqx.Module)
Draw = Callable[[np.random.Generator, int], Any]
"""A batch of the given size."""
Loss = Callable[[Any, Any, PRNGKeyArray], Float[Array, ""]]
"""Loss of a model on a batch. Trainings with equal losses (a frozen dataclass is equal by value) share a program."""


@dataclass(frozen=True)
class Training:
    """How a model is trained.

    Attributes:
        steps: updates.
        batch: windows of an update.
        rate: highest learning rate, after a warm-up of a twentieth of the steps; it falls to 0 along a cosine.
        decay: of the moving average of the weights, which is what is kept.
        weight_decay: of AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101); 0 is Adam.
        probe_every: updates between two looks at the loss of the average on the probe (the same windows and noise each
            time); the best average is kept. 0 for never: the last is kept.
        checkpoint: where the training is written every `checkpoint_every_s` seconds and when it is interrupted.
        facts: what a checkpoint must say of itself to be resumed.
    """

    steps: int = 250
    batch: int = 32
    rate: float = 2e-3
    decay: float = 0.99
    clip: float = 1.0
    probe_every: int = 50
    probe: int = 64
    checkpoint: Path | None = None
    checkpoint_every_s: float = 20.0
    facts: dict[str, str] = field(default_factory=dict[str, str])
    weight_decay: float = 0.0


@dataclass(frozen=True)
class Trained(Generic[Model]):
    """What came of it.

    Attributes:
        model: the kept average of the weights.
        losses: of each update.
        finished: false after an interrupt.
        wall_s: seconds of this run of the loop.
    """

    model: Model
    losses: list[float]
    finished: bool
    wall_s: float


class _Loop(eqx.Module):
    """All that a checkpoint holds."""

    trained: Any
    optimiser: Any
    mean: Any
    best: Any
    best_loss: Array
    step: Array
    losses: Array


def train(
    model: Model,
    loss: Loss,
    draw: Draw,
    training: Training,
    seed: int,
    reporter: Reporter,
    *,
    text: str,
    trained: Callable[[Model], Any] | None = None,
    resume: bool = False,
) -> Trained[Model]:
    """Trains a model.

    Where there is a checkpoint, KeyboardInterrupt ends the training after the update in progress: the checkpoint is
    written and what there is is returned. Without one it is not caught.

    Args:
        model: where it starts.
        loss: what is made small.
        draw: the batches, from a generator of random numbers.
        training: how long, how fast.
        seed: of batches and noise.
        reporter: who is told.
        text: what this training is, for the reporter.
        trained: marks (true, false) the arrays that are trained, in the structure of the model; all where none.
        resume: go on from the checkpoint where there is one.

    Raises:
        InputError: the checkpoint does not fit.
    """
    marks = eqx.is_inexact_array if trained is None else trained(model)
    moving, still = eqx.partition(model, marks)
    pace = _Pace(training.steps, training.rate, training.clip, training.decay, training.weight_decay)
    key = jax.random.key(seed)
    infinite, zero = jnp.asarray(math.inf), jnp.zeros((), jnp.int32)
    log = jnp.full((training.steps,), jnp.nan)
    loop = _Loop(moving, pace.optimiser().init(moving), moving, moving, infinite, zero, log)
    if resume and training.checkpoint is not None and training.checkpoint.is_file():
        loop = load_checkpoint(training.checkpoint, loop, training.facts)
    probe = draw(np.random.default_rng((seed, 1)), training.probe) if training.probe_every else None
    number, began = int(loop.step), time.monotonic()
    saved = began

    def save() -> None:
        if training.checkpoint is not None:
            save_checkpoint(training.checkpoint, eqx.filter(loop, eqx.is_array), training.facts)

    try:
        while number < training.steps:
            batch = draw(np.random.default_rng((seed, 2, number)), training.batch)
            following = _update(loop, still, batch, jax.random.fold_in(key, number), loss, pace)
            number += 1
            if probe is not None and (number % training.probe_every == 0 or number == training.steps):
                found = _loss_of(following.mean, still, probe, key, loss)
                better = found <= following.best_loss
                following = eqx.tree_at(
                    lambda each: (each.best, each.best_loss),
                    following,
                    (following.mean if better else following.best, jnp.minimum(found, following.best_loss)),
                )
            # One assignment, so that an interrupt finds either the old loop or the new one.
            loop = following
            reporter.advance(number, training.steps, f"{text}: loss {float(loop.losses[number - 1]):.3f}")
            if time.monotonic() - saved > training.checkpoint_every_s:
                save()
                saved = time.monotonic()
    except KeyboardInterrupt:
        if training.checkpoint is None:
            raise
        reporter.note(f"{text}: interrupted after {int(loop.step)} of {training.steps} updates; these are kept")
    save()
    losses = [float(value) for value in np.asarray(loop.losses)[: int(loop.step)]]
    kept = eqx.combine(_kept(loop), still)
    return Trained(kept, losses, int(loop.step) >= training.steps, time.monotonic() - began)


def _kept(loop: _Loop) -> Any:
    return loop.best if math.isfinite(float(loop.best_loss)) else loop.mean


@dataclass(frozen=True)
class _Pace:
    """What an update is compiled for: equal for equal trainings, so that the second fit of a process compiles
    nothing."""

    steps: int
    rate: float
    clip: float
    decay: float
    weight_decay: float = 0.0

    def optimiser(self) -> optax.GradientTransformation:
        warm = min(max(self.steps // 20, 1), max(self.steps - 1, 1))
        rate = optax.warmup_cosine_decay_schedule(0.0, self.rate, warm, max(self.steps, warm + 1))
        adam = optax.adamw(rate, b2=0.99, weight_decay=self.weight_decay)
        # Without decay the state keeps the structure that checkpoints of plain Adam have.
        return optax.chain(
            optax.clip_by_global_norm(self.clip), adam if self.weight_decay else optax.adam(rate, b2=0.99)
        )


@eqx.filter_jit
def _loss_of(moving: Any, still: Any, batch: Any, key: PRNGKeyArray, loss: Loss) -> Array:
    return loss(eqx.combine(moving, still), batch, key)


@eqx.filter_jit
def _update(loop: _Loop, still: Any, batch: Any, key: PRNGKeyArray, loss: Loss, pace: _Pace) -> _Loop:
    value, gradient = jax.value_and_grad(_loss_of)(loop.trained, still, batch, key, loss)
    changes, state = pace.optimiser().update(gradient, loop.optimiser, loop.trained)
    moved = eqx.apply_updates(loop.trained, changes)
    mean = jax.tree.map(lambda old, new: averaged(old, new, pace.decay, loop.step), loop.mean, moved)
    losses = loop.losses.at[loop.step].set(value)
    return _Loop(moved, state, mean, loop.best, loop.best_loss, loop.step + 1, losses)
