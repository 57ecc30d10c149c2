"""The training loop: updates, validation, checkpoints. Interrupted and resumed, it ends where it would have ended.

The loop knows nothing of the algorithm but `init`, `update` and `policy`. The policy that is kept is the one with the
best validation latency, on traffic that neither training nor evaluation uses.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from gmel.learning.algorithm import Algorithm, Task
from gmel.learning.checkpoint import load_checkpoint, save_checkpoint
from gmel.policies.policy import Policy

__all__ = ["Progress", "Row", "Trained", "Training", "Validation", "train"]

Row = dict[str, float | int | None]
Validation = Callable[[Policy[Any]], tuple[float, float]]
"""Mean latency in seconds and completion rate of a policy on the validation traffic."""


@dataclass(frozen=True)
class Progress:
    """Where a training stands."""

    update: int
    updates: int
    decisions: int
    wall_s: float
    validation_latency_s: float | None


@dataclass(frozen=True)
class Training:
    """How long to train, how often to look, where to keep it."""

    updates: int
    seed: int = 0
    validate_every: int = 10
    checkpoint: Path | None = None
    checkpoint_every_s: float = 20.0
    facts: dict[str, str] = field(default_factory=dict[str, str])
    budget_s: float = math.inf


@dataclass(frozen=True)
class Trained:
    """What came of it. `finished` is false after an interrupt; `stopped` names what ended it early, if anything did."""

    policy: Policy[Any]
    rows: list[Row]
    finished: bool
    stopped: str | None
    wall_s: float
    decisions: int


class _Loop(eqx.Module):
    """All that a checkpoint holds: the training state, the best policy so far, and the log (arrays, so that it is
    restored with the rest)."""

    state: Any
    best: Any
    best_latency_s: jax.Array
    update: jax.Array
    wall_s: jax.Array
    log: jax.Array


_LOG = ("update", "decisions", "wall_s", "validation_latency_s", "validation_completion_rate")


def train(
    task: Task,
    algorithm: Algorithm[Any],
    training: Training,
    validate: Validation,
    on_progress: Callable[[Progress], None] = lambda _: None,
    *,
    resume: bool = False,
) -> Trained:
    """Trains one seed.

    KeyboardInterrupt ends the training after the update in progress: the checkpoint is written and what there is is
    returned. With `resume` and a checkpoint, training goes on from it.

    Raises:
        InputError: the checkpoint does not fit.
    """
    update = eqx.filter_jit(algorithm.update)
    state = eqx.filter_jit(algorithm.init)(task, jax.random.key(training.seed))
    # Names of the metrics without running anything; the first update then finds its program traced.
    names = sorted(eqx.filter_eval_shape(update, task, state)[1])
    loop = _first(algorithm, training, state, names)
    if resume and training.checkpoint is not None and training.checkpoint.is_file():
        loop = load_checkpoint(training.checkpoint, loop, training.facts)
    per_update = algorithm.decisions_per_update(task)
    earlier_s, began = float(loop.wall_s), time.monotonic()
    saved, stopped = began, None
    number = int(loop.update)
    best = float(loop.best_latency_s)

    def clock() -> float:
        return earlier_s + time.monotonic() - began

    def save() -> None:
        if training.checkpoint is not None:
            kept = eqx.tree_at(lambda each: each.wall_s, loop, jnp.asarray(clock()))
            save_checkpoint(training.checkpoint, eqx.filter(kept, eqx.is_array), training.facts)

    try:
        while number < training.updates:
            if clock() > training.budget_s:
                stopped = "budget"
                break
            state, metrics = update(task, loop.state)
            number += 1
            validation: tuple[float, float] | None = None
            policy = loop.best
            if number % training.validate_every == 0 or number == training.updates:
                candidate = algorithm.policy(state)
                validation = validate(candidate)
                if validation[0] <= best:
                    best, policy = validation[0], candidate
            entry = [float(number), float(number * per_update), clock(), *(validation or (math.nan, math.nan))]
            entry += [float(metrics[name]) for name in names]
            # One assignment, so that an interrupt finds either the old loop or the new one.
            loop = _Loop(
                state,
                policy,
                jnp.asarray(best),
                jnp.asarray(number),
                jnp.asarray(entry[2]),
                loop.log.at[number - 1].set(jnp.asarray(entry)),
            )
            on_progress(Progress(number, training.updates, number * per_update, entry[2], validation and validation[0]))
            if time.monotonic() - saved > training.checkpoint_every_s:
                save()
                saved = time.monotonic()
    except KeyboardInterrupt:
        stopped = "interrupt"
    save()
    number = int(loop.update)
    rows = _rows(loop, names, training.seed)
    policy = loop.best if math.isfinite(float(loop.best_latency_s)) else algorithm.policy(loop.state)
    return Trained(policy, rows, number >= training.updates, stopped, clock(), number * per_update)


def _first(algorithm: Algorithm[Any], training: Training, state: Any, names: list[str]) -> _Loop:
    log = jnp.full((training.updates, len(_LOG) + len(names)), jnp.nan)
    zero = jnp.zeros((), jnp.int32)
    return _Loop(state, algorithm.policy(state), jnp.asarray(math.inf), zero, jnp.asarray(0.0), log)


def _rows(loop: _Loop, names: list[str], seed: int) -> list[Row]:
    rows: list[Row] = []
    for values in jax.device_get(loop.log)[: int(loop.update)]:
        named = dict(zip([*_LOG, *names], (float(v) for v in values), strict=True))
        row: Row = {"seed": seed}
        for name, value in named.items():
            row[name] = int(value) if name in ("update", "decisions") else None if math.isnan(value) else value
        rows.append(row)
    return rows
