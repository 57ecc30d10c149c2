"""Servers that turn tasks away or lose them, in the steady state beside their closed forms: means over replications."""

import math
from dataclasses import replace
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from numpy.typing import NDArray

from gmel.evaluation.validation.check import Run, Sample, check
from gmel.evaluation.validation.closed_forms import bounded_queue, crash_loss, erlang_b
from gmel.evaluation.validation.drive import Law
from gmel.evaluation.validation.one_server import (
    constant,
    explicit_sample,
    explicit_values,
    exponential,
    hyperexponential,
)
from gmel.simulator.state import Outcome

__all__: list[str] = []

Floats = NDArray[np.float64]

PLACES, PLACES_LOAD = 4, 1.2
"""Places of a bounded queue, and its load: more than it can do, since it turns tasks away."""
PLACES_SLOTS = 1000
CAPACITY, CAPACITY_OFFERED = 4, 2.5
"""Tasks that a server with a capacity holds at once, and work that comes a second."""
CAPACITY_SLOTS = 3000
SPARE_ROWS = 4
"""Rows for tasks that arrive on the very border of a slot, by rounding."""


@check("mg3-loss", "queues")
def mg3_loss(run: Run) -> Sample:
    """M/G/3/3 without patience, hyperexponential work: share discarded = Erlang B, whatever the law of the work.

    Source: Erlang 1917; insensitivity: Sevastyanov 1957
    """
    rate = 2.0
    return explicit_sample(
        run,
        erlang_b(rate, 3),
        hyperexponential,
        gpus=3,
        rate_per_s=rate,
        patience_s=0.0,
        measure=_discarded,
        drop=True,
        slots=3000,
    )


@check("mm1-patience", "queues")
def mm1_patience(run: Run) -> Sample:
    """M/M/1 with tasks discarded that would wait longer than tau: share = lambda p0 e^(-(mu - lambda) tau) / mu.

    Source: Barrer 1957; p0 = 1 / (1 + rho (1 - e^(-(mu - lambda) tau)) / (1 - rho) + rho e^(-(mu - lambda) tau))
    """
    load, patience_s = 0.8, 2.0
    late = math.exp(-(1.0 - load) * patience_s)
    empty = 1.0 / (1.0 + load * (1.0 - late) / (1.0 - load) + load * late)
    expected = load * empty * late
    return explicit_sample(
        run, expected, exponential, rate_per_s=load, patience_s=patience_s, measure=_discarded, drop=True, slots=4000
    )


@check("mm1k-loss", "queues")
def mm1k_loss(run: Run) -> Sample:
    """M/M/1/K, first in, first out: share rejected = (1 - rho) rho^K / (1 - rho^(K + 1)).

    Source: Kleinrock, Queueing Systems I, 1975, section 3.6. Places K with one task in service at a time
    """
    values, controls = _bounded(run)
    return Sample(bounded_queue(PLACES_LOAD, PLACES)[0], values[:, 0], controls)


@check("mm1k-wait", "queues")
def mm1k_wait(run: Run) -> Sample:
    """M/M/1/K, first in, first out: mean wait of the accepted tasks = E[N] / (lambda (1 - p_K)) - 1 / mu.

    Source: Kleinrock, Queueing Systems I, 1975, section 3.6; Little 1961
    """
    values, controls = _bounded(run)
    return Sample(bounded_queue(PLACES_LOAD, PLACES)[1], values[:, 1], controls)


@check("mg1k-sharing", "queues")
def mg1k_sharing(run: Run) -> Sample:
    """M/H2/1/K with processor sharing: share rejected as in M/M/1/K, whatever the law of the work.

    Source: Kelly, Reversibility and Stochastic Networks, 1979, section 3.3 (symmetric queues, cut off at K)
    """
    return explicit_sample(
        run,
        bounded_queue(PLACES_LOAD, PLACES)[0],
        hyperexponential,
        rate_per_s=PLACES_LOAD,
        measure=_discarded,
        slots=PLACES_SLOTS,
        discipline="sharing",
        places=PLACES,
        uploads=PLACES + SPARE_ROWS,
    )


@check("mg4-capacity", "queues")
def mg4_capacity(run: Run) -> Sample:
    """M/H2/4/4, a capacity of 4 that rejects, tasks of one unit: share rejected = Erlang B, whatever the law.

    Source: Erlang 1917; insensitivity: Sevastyanov 1957
    """
    return _hosted(run, erlang_b(CAPACITY_OFFERED, CAPACITY), hyperexponential, on_overload="reject")


@check("md4-capacity", "queues")
def md4_capacity(run: Run) -> Sample:
    """M/D/4/4, a capacity of 4 that rejects, tasks of one unit: share rejected = Erlang B, as with any other law.

    Source: Erlang 1917; insensitivity: Sevastyanov 1957
    """
    return _hosted(run, erlang_b(CAPACITY_OFFERED, CAPACITY), constant, on_overload="reject")


@check("mm4-crash", "queues")
def mm4_crash(run: Run) -> Sample:
    """Capacity of 4 that crashes, exponential work: share lost = 5 pi_4, pi of birth, death, and a fall to 0.

    Source: equations of balance, solved by NumPy; crash: AGOD, arXiv 2303.13052
    """
    return _hosted(run, crash_loss(CAPACITY_OFFERED, CAPACITY), exponential, on_overload="crash")


def _bounded(run: Run) -> tuple[Floats, Floats]:
    """Share rejected and mean wait of the accepted tasks in M/M/1/K [replications, 2], and controls."""
    shared = replace(run, name="mm1k")
    return run.once(
        "mm1k",
        lambda: explicit_values(
            shared,
            exponential,
            rate_per_s=PLACES_LOAD,
            measure=_rejected_and_waits,
            slots=PLACES_SLOTS,
            discipline="sharing",
            concurrency=1,
            places=PLACES,
            uploads=PLACES + SPARE_ROWS,
        ),
    )


def _hosted(run: Run, expected: float, law: Law, **plant: Any) -> Sample:
    """Share lost at a server with a capacity, tasks of one unit."""
    return explicit_sample(
        run,
        expected,
        law,
        rate_per_s=CAPACITY_OFFERED,
        measure=_discarded,
        slots=CAPACITY_SLOTS,
        discipline="capacity",
        capacity=CAPACITY,
        uploads=CAPACITY + SPARE_ROWS,
        **plant,
    )


def _discarded(outcome: Outcome) -> tuple[Float[Array, ""], Float[Array, ""]]:
    return jnp.sum(outcome.final & outcome.dropped).astype(float), jnp.sum(outcome.final).astype(float)


def _rejected_and_waits(outcome: Outcome) -> tuple[Float[Array, "2"], Float[Array, "2"]]:
    """Tasks that were rejected, of all; time in the queue, of the others."""
    kept = outcome.final & ~outcome.dropped
    all_tasks, others = jnp.sum(outcome.final).astype(float), jnp.sum(kept).astype(float)
    queue_s = jnp.sum(jnp.where(kept, outcome.account.queue_s, 0.0))
    return jnp.stack([all_tasks - others, queue_s]), jnp.stack([all_tasks, others])
