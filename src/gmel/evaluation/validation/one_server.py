"""One server fed with explicit Poisson instants: the common part of the checks of queues in the steady state."""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gmel.evaluation.validation.check import Run, Sample
from gmel.evaluation.validation.drive import (
    NEVER_S,
    Instants,
    Law,
    Measure,
    drive,
    poisson_instants,
    queue_plant,
    task_mean,
    waits,
)
from gmel.simulator.environment import Environment

__all__ = [
    "LOAD",
    "PER_SLOT",
    "SLOTS",
    "SLOT_S",
    "WARMUP_SLOTS",
    "constant",
    "erlang_2",
    "explicit_sample",
    "explicit_values",
    "exponential",
    "hyperexponential",
    "offered",
]

Floats = NDArray[np.float64]

LOAD = 0.6
"""Work per second of a server of speed 1. Mean work is 1, so this is the rate of arrivals as well."""
PER_SLOT = 2.0
SLOT_S = PER_SLOT / LOAD
SLOTS = 8000
WARMUP_SLOTS = 200
"""About 400 mean services; a queue at this load forgets in about twenty (1 / (1 - sqrt(load))^2)."""


def exponential(random: np.random.Generator, shape: tuple[int, ...]) -> Floats:
    """Work of mean 1, second moment 2."""
    return random.standard_exponential(shape)


def constant(random: np.random.Generator, shape: tuple[int, ...]) -> Floats:
    """Work of 1."""
    del random
    return np.ones(shape)


def erlang_2(random: np.random.Generator, shape: tuple[int, ...]) -> Floats:
    """Work of mean 1, second moment 1.5."""
    return random.gamma(2.0, 0.5, shape)


def hyperexponential(random: np.random.Generator, shape: tuple[int, ...]) -> Floats:
    """Work of mean 1, second moment 3: exponential with mean 1 + or - sqrt(1/2), each for half of the tasks."""
    spread = math.sqrt(0.5)
    return random.standard_exponential(shape) * np.where(random.random(shape) < 0.5, 1.0 + spread, 1.0 - spread)


def explicit_sample(run: Run, expected: float, law: Law, **choices: Any) -> Sample:
    """What `explicit_values` gives beside a closed form."""
    return Sample(expected, *explicit_values(run, law, **choices))


def explicit_values(
    run: Run,
    law: Law,
    *,
    gpus: int = 1,
    rate_per_s: float = LOAD,
    slots: int = SLOTS,
    patience_s: float = NEVER_S,
    measure: Measure = waits,
    drop: bool = False,
    **plant: Any,
) -> tuple[Floats, Floats]:
    """A statistic of one server with explicit Poisson instants, and controls, a row per replication.

    `plant` goes to `queue_plant`.
    """
    slot_s = PER_SLOT / rate_per_s
    environment = Environment.from_scenario(queue_plant(slot_s=slot_s, gpus=gpus, drop=drop, **plant))

    def batch(random: np.random.Generator) -> tuple[Floats, ...]:
        instants = poisson_instants(random, rate_per_s, slot_s, slots, run.replications, law, patience_s)
        totals = drive(environment, instants, measure)
        return task_mean(totals, WARMUP_SLOTS), offered(instants)

    values, controls = run.repeat(batch)
    return values, controls


def offered(instants: Instants) -> Floats:
    """How far the tasks of each replication are from a Poisson process with work of mean 1: number, work."""
    present = instants.present[:, WARMUP_SLOTS:]
    count = present.sum(axis=(1, 2))
    work = np.where(present, instants.work[:, WARMUP_SLOTS:], 0.0).sum(axis=(1, 2)) / count
    return np.stack([count / (PER_SLOT * present.shape[1]) - 1.0, work - 1.0], axis=1)
