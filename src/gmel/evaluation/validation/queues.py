"""Queues in the steady state beside their closed forms: means over independent replications, warm-up left out."""

# SciPy ships no types; unknown types from it are not ours (as in pyproject.toml).
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from numpy.typing import NDArray
from scipy import integrate

from gmel.evaluation.validation.check import Run, Sample, check
from gmel.evaluation.validation.drive import (
    NEVER_S,
    Instants,
    Law,
    Measure,
    drive,
    drive_drawn,
    drive_policy,
    poisson_instants,
    queue_plant,
    sojourns,
    task_mean,
    waits,
)
from gmel.policies.policy import Policy
from gmel.policies.rules import Greedy, LeastExpectedDelay, Proportional
from gmel.simulator.environment import Environment
from gmel.simulator.state import Outcome

__all__ = [
    "birth_death_sojourn_s",
    "erlang_b",
    "erlang_c_wait_s",
    "least_loaded_wait_s",
    "pollaczek_khinchine_s",
    "weighted_sharing_s",
]

Floats = NDArray[np.float64]

LOAD = 0.6
"""Work per second of a server of speed 1. Mean work is 1, so this is the rate of arrivals as well."""
PER_SLOT = 2.0
SLOT_S = PER_SLOT / LOAD
SLOTS = 8000
SHARED_SLOTS = 1500
SHARED_ROWS = 80
"""Places for tasks at a server that shares its time."""
BATCH_RATE_PER_S = 1.0
"""Arrivals at a server that does 1.6 tasks of mean work 1 per second in batches of 4."""
WARMUP_SLOTS = 200
"""About 400 mean services; a queue at this load forgets in about twenty (1 / (1 - sqrt(load))^2)."""


def pollaczek_khinchine_s(rate_per_s: float, mean_s: float, second_moment_s2: float) -> float:
    """Mean wait of M/G/1 in seconds, from the first two moments of the service time."""
    return rate_per_s * second_moment_s2 / (2.0 * (1.0 - rate_per_s * mean_s))


def erlang_b(offered: float, servers: int) -> float:
    """Probability of loss of M/G/c/c, by the recursion over the number of servers."""
    loss = 1.0
    for count in range(1, servers + 1):
        loss = offered * loss / (count + offered * loss)
    return loss


def erlang_c_wait_s(rate_per_s: float, servers: int, mean_s: float = 1.0) -> float:
    """Mean wait of M/M/c in seconds."""
    offered = rate_per_s * mean_s
    loss = erlang_b(offered, servers)
    waiting = loss / (1.0 - offered / servers * (1.0 - loss))
    return waiting * mean_s / (servers - offered)


def birth_death_sojourn_s(rate_per_s: float, limit: int, beta: float) -> float:
    """Mean sojourn with exponential work of mean 1: n tasks progress at 1 / (1 + beta (n - 1)) each, `limit` at most.

    Stationary law p_n ~ prod rate / (n r(n)); beyond the limit a geometric tail. Little's law gives the sojourn.
    """
    weight, total, number = 1.0, 1.0, 0.0
    for count in range(1, 2000):
        busy = min(count, limit)
        weight *= rate_per_s * (1.0 + beta * (busy - 1)) / busy
        total, number = total + weight, number + count * weight
    return number / total / rate_per_s


def weighted_sharing_s(rates_per_s: Sequence[float], means_s: Sequence[float], weights: Sequence[float]) -> Floats:
    """Mean sojourn of each class with discriminatory processor sharing and exponential work, one GPU.

    Of a task of class k and another of class j, both present, work of both gets done in the ratio of their weights w,
    and by memorylessness the one or the other ends at the rates w / mean: until then the other has w_j / (w_k / m_k +
    w_j / m_j) of service, which is what it holds up the first. The first meets rate_j T_j of class j when it comes
    (Little's law) and rate_j T_k while it is there, so T_k = m_k + sum over j of rate_j (T_j + T_k) x that.
    """
    rate, mean, weight = (np.asarray(each, float) for each in (rates_per_s, means_s, weights))
    pace = weight / mean
    held_up_s = rate * weight / (pace[:, None] + pace[None, :])
    return np.asarray(np.linalg.solve(np.diag(1.0 - held_up_s.sum(axis=1)) - held_up_s, mean), float)


def least_loaded_wait_s(load: float, choices: int) -> float:
    """Mean wait with exponential work of mean 1 on the least loaded of `choices` >= 2 random servers of very many.

    The share F(w) of servers with more than w of work solves the Bernoulli equation F' = -F + load F^d, F(0) = load:
    F(w) = (load + (load^(1 - d) - load) e^((d - 1) w))^(1 / (1 - d)). A task waits longer than w if all its choices do.
    """
    power = 1.0 / (1.0 - choices)

    def all_above(wait_s: float) -> float:
        grown = math.exp((choices - 1) * wait_s)
        return (load + (load ** (1 - choices) - load) * grown) ** (choices * power)

    return float(integrate.quad(all_above, 0.0, 60.0, limit=200)[0])


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


@check("mm1-wait", "queues")
def mm1_wait(run: Run) -> Sample:
    """M/M/1: mean wait = rho / (mu - lambda).

    Source: Kleinrock, Queueing Systems I, 1975, section 3.2
    """
    return _explicit(run, LOAD / (1.0 - LOAD), exponential)


@check("mm1-waiting", "queues")
def mm1_waiting(run: Run) -> Sample:
    """M/M/1: share of tasks that wait longer than 2 / mu = rho exp(-2 (1 - rho)).

    Source: Kleinrock, Queueing Systems I, 1975, section 5.12
    """
    return _explicit(run, LOAD * math.exp(-2.0 * (1.0 - LOAD)), exponential, measure=_waited_two)


@check("md1-wait", "queues")
def md1_wait(run: Run) -> Sample:
    """M/D/1: mean wait = rho s / (2 (1 - rho)).

    Source: Pollaczek 1930, Khinchine 1932
    """
    return _explicit(run, pollaczek_khinchine_s(LOAD, 1.0, 1.0), constant)


@check("mg1-erlang", "queues")
def mg1_erlang(run: Run) -> Sample:
    """M/E2/1: mean wait = lambda E[S^2] / (2 (1 - rho)).

    Source: Pollaczek 1930, Khinchine 1932
    """
    return _explicit(run, pollaczek_khinchine_s(LOAD, 1.0, 1.5), erlang_2)


@check("mg1-hyperexponential", "queues")
def mg1_hyperexponential(run: Run) -> Sample:
    """M/H2/1: mean wait = lambda E[S^2] / (2 (1 - rho)).

    Source: Pollaczek 1930, Khinchine 1932
    """
    return _explicit(run, pollaczek_khinchine_s(LOAD, 1.0, 3.0), hyperexponential)


@check("mg1-uniform-drawn", "queues")
def mg1_uniform(run: Run) -> Sample:
    """M/U/1 with the simulator's own Poisson requests and work ~ U(0.5, 1.5): mean wait by Pollaczek-Khinchine.

    Source: Pollaczek 1930, Khinchine 1932
    """
    second = 1.0 + 1.0 / 12.0
    plant = queue_plant(slot_s=SLOT_S, rate_per_s=LOAD, work=(0.5, 1.5))
    return Sample(pollaczek_khinchine_s(LOAD, 1.0, second), _drawn(run, Environment.from_scenario(plant)))


@check("mg1-lognormal-drawn", "queues")
def mg1_lognormal(run: Run) -> Sample:
    """M/G/1 with the simulator's own Poisson requests and log-normal noise on their work: mean wait by P-K.

    Source: Pollaczek 1930, Khinchine 1932; E[z] = exp(s^2 / 2), E[z^2] = exp(2 s^2) for ln z ~ N(0, s^2)
    """
    sigma = 0.5
    nominal = math.exp(-0.5 * sigma**2)
    plant = queue_plant(slot_s=SLOT_S, rate_per_s=LOAD, work=(nominal, nominal), noise_sigma=sigma)
    expected_s = pollaczek_khinchine_s(LOAD, 1.0, nominal**2 * math.exp(2.0 * sigma**2))
    return Sample(expected_s, _drawn(run, Environment.from_scenario(plant)))


@check("mm3-wait", "queues")
def mm3_wait(run: Run) -> Sample:
    """M/M/3: mean wait by Erlang C.

    Source: Erlang 1917; Kleinrock, Queueing Systems I, 1975, section 3.5
    """
    rate = 3 * 0.7
    return _explicit(run, erlang_c_wait_s(rate, 3), exponential, gpus=3, rate_per_s=rate, slots=2 * SLOTS)


@check("mg3-loss", "queues")
def mg3_loss(run: Run) -> Sample:
    """M/G/3/3 without patience, hyperexponential work: share discarded = Erlang B, whatever the law of the work.

    Source: Erlang 1917; insensitivity: Sevastyanov 1957
    """
    rate = 2.0
    return _explicit(
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
    return _explicit(
        run, expected, exponential, rate_per_s=load, patience_s=patience_s, measure=_discarded, drop=True, slots=4000
    )


@check("tandem-wait", "queues")
def tandem_wait(run: Run) -> Sample:
    """Two M/M/1 in a row, uploads of the second ending when the first is done: second mean wait = rho / (mu - lambda).

    Source: Burke 1956: departures of M/M/1 are Poisson and independent of the present state
    """
    load = 0.5
    slot_s = PER_SLOT / load
    first = Environment.from_scenario(queue_plant(slot_s=slot_s))
    second = Environment.from_scenario(queue_plant(slot_s=slot_s, uploads=40))

    def batch(random: np.random.Generator) -> tuple[Floats, ...]:
        instants = poisson_instants(random, load, slot_s, 5000, run.replications, exponential)
        ends_s = drive(first, instants, _departures)[0]
        # Decided in the same slot for the second server, with an upload that lasts until the first is done: it crosses
        # slot starts, and tasks decided later may overtake it on their way.
        again = instants._replace(ready_s=ends_s, work=exponential(random, instants.work.shape))
        return task_mean(drive(second, again, waits), WARMUP_SLOTS), _offered(again)

    return Sample(load / (1.0 - load), *run.repeat(batch))


@check("greedy-central-queue", "queues")
def greedy_central_queue(run: Run) -> Sample:
    """Greedy with fresh knowledge over 4 alike servers is one queue: mean wait of M/M/4 (Erlang C).

    Source: Kiefer and Wolfowitz 1955: least work first equals first in, first out from one queue
    """
    load, servers = 0.7, 4
    found = _by_policy(run, Greedy(fresh=True), servers, load, tasks=80_000, warmup=1000)
    return Sample(erlang_c_wait_s(load * servers, servers), *found)


@check("blind-split", "queues")
def blind_split(run: Run) -> Sample:
    """Random choice over 4 alike servers splits a Poisson process: mean wait of M/M/1.

    Source: Kingman, Poisson Processes, 1993, section 5.1 (colouring)
    """
    return Sample(LOAD / (1.0 - LOAD), *_by_policy(run, Proportional(), 4, LOAD, tasks=24_000, warmup=2000))


@check("two-choices-mean-field", "queues")
def two_choices(run: Run) -> Sample:
    """LED(2), fresh, over n alike servers as n grows: mean wait of the least loaded of two (mean field).

    The finite n adds about c / n; two sizes, n and 2 n, remove it (Richardson): 2 W(2 n) - W(n).
    Source: Hellemans and Van Houdt 2018 (LL(d)); Mitzenmacher 1996, Vvedenskaya et al. 1996 for queue lengths
    """
    load, servers = 0.7, 40
    policy = LeastExpectedDelay(fresh=True)
    small, small_controls = _by_policy(run, policy, servers, load, tasks=10_000, warmup=servers * 30)
    large, large_controls = _by_policy(run, policy, 2 * servers, load, tasks=14_000, warmup=2 * servers * 30)
    controls = np.concatenate([small_controls, large_controls], axis=1)
    return Sample(least_loaded_wait_s(load, 2), 2.0 * large - small, controls)


@check("herding-in-slot", "queues")
def herding_in_slot(run: Run) -> Sample:
    """Bulletin board of age 0: all requests of a slot run to one empty server: mean wait = E[S] lambda D_t / 2.

    A request has on average lambda D_t / 2 of the others of its slot before it, on a server that was empty: of
    24 servers three or four are at work, hardly ever more than ten.
    Source: sum over a Poisson batch of its own places; Mitzenmacher 2000, How Useful Is Old Information
    """
    per_slot = 3.0
    plant = queue_plant(slot_s=1.0, servers=24, rate_per_s=per_slot, work=(0.5, 1.5), uploads=1)
    environment = Environment.from_scenario(plant)

    def batch(random: np.random.Generator) -> tuple[Floats, ...]:
        first = int(random.integers(2**40))
        totals = drive_drawn(environment, first, run.replications, 1500, waits, Greedy())
        return (task_mean(totals, 20),)

    return Sample(per_slot / 2.0, *run.repeat(batch))


@check("mg1-sharing", "queues")
def mg1_sharing(run: Run) -> Sample:
    """M/H2/1 with processor sharing: mean sojourn = E[S] / (1 - rho), whatever the law of the work.

    Source: Kleinrock, Queueing Systems II, 1976, section 4.4 (insensitivity)
    """
    return _shared(run, 1.0 / (1.0 - LOAD), hyperexponential, discipline="sharing")


@check("mm2-sharing", "queues")
def mm2_sharing(run: Run) -> Sample:
    """M/M/2 with processor sharing: mean sojourn as first in, first out, by Erlang C (birth and death).

    Source: Kleinrock, Queueing Systems I, 1975, section 3.5
    """
    rate_per_s = 2 * LOAD
    expected = 1.0 + erlang_c_wait_s(rate_per_s, 2)
    return _shared(run, expected, exponential, gpus=2, rate_per_s=rate_per_s, discipline="sharing")


@check("batching", "queues")
def batching(run: Run) -> Sample:
    """Batches of up to 4, a round of X takes (X + 1) / 2: mean sojourn of the birth and death process, by Little's law.

    Source: Kleinrock, Queueing Systems I, 1975, section 3.1; law of a round: STACKING, arXiv 2511.19847
    """
    expected = birth_death_sojourn_s(BATCH_RATE_PER_S, 4, 0.5)
    shape: dict[str, Any] = {"discipline": "batching", "concurrency": 4, "round_share": 0.5}
    return _shared(run, expected, exponential, rate_per_s=BATCH_RATE_PER_S, **shape)


HEAVY, LIGHT = 0, 1
WEIGHTS, WEIGHTED_MEANS_S = (4.0, 1.0), (0.5, 1.5)
"""Of two classes, each half of the tasks, whose work has mean 1 together."""


@check("mm1-weighted-sharing", "queues")
def mm1_weighted_sharing(run: Run) -> Sample:
    """M/M/1 with discriminatory processor sharing, weights 4 and 1: mean sojourn of the heavier class.

    Source: Fayolle, Mitrani and Iasnogorodski 1980, J. ACM 27(3), exponential case
    """
    expected_s = weighted_sharing_s([LOAD / 2] * 2, WEIGHTED_MEANS_S, WEIGHTS)
    sojourn_s, controls = run.once("weighted sharing", lambda: _two_classes(run))
    return Sample(float(expected_s[HEAVY]), sojourn_s[:, HEAVY], controls)


@check("weighted-sharing-conserved", "queues")
def weighted_sharing_conserved(run: Run) -> Sample:
    """Two classes whatever their weights: sum of rho_k T_k = sum of rho_k / mu_k over 1 - rho (work left, from M/G/1).

    Source: Kleinrock, Queueing Systems II, 1976, section 3.4 (conservation law); exponential work left: mean 1 / mu_k
    """
    load = 0.5 * LOAD * np.asarray(WEIGHTED_MEANS_S)
    expected = float(load @ np.asarray(WEIGHTED_MEANS_S)) / (1.0 - LOAD)
    sojourn_s, controls = run.once("weighted sharing", lambda: _two_classes(run))
    return Sample(expected, sojourn_s @ load, controls)


def _two_classes(run: Run) -> tuple[Floats, Floats]:
    """Mean sojourn of either class, and controls, row by replication."""
    slot_s = PER_SLOT / LOAD
    plant = queue_plant(slot_s=slot_s, uploads=SHARED_ROWS, discipline="sharing", cpu_weights=list(WEIGHTS))
    environment = Environment.from_scenario(plant)

    def batch(random: np.random.Generator) -> tuple[Floats, ...]:
        instants = poisson_instants(random, LOAD, slot_s, SHARED_SLOTS, run.replications, exponential)
        light = random.random(instants.work.shape) < 0.5
        mean_s = np.where(light, WEIGHTED_MEANS_S[LIGHT], WEIGHTED_MEANS_S[HEAVY])
        # The records know no weight: the light ones are told by a deadline that is longer, and never met either.
        patience_s = np.where(light, 2.0 * NEVER_S, NEVER_S)
        told = instants._replace(work=instants.work * mean_s, patience_s=patience_s, level=light.astype(int))
        sojourn_s = task_mean(drive(environment, told, _by_deadline), WARMUP_SLOTS)
        present = instants.present[:, WARMUP_SLOTS:]
        share = (light[:, WARMUP_SLOTS:] & present).sum(axis=(1, 2)) / present.sum(axis=(1, 2)) - 0.5
        return sojourn_s, np.concatenate([_offered(told), share[:, None]], axis=1)

    sojourn_s, controls = run.repeat(batch)
    return sojourn_s, controls


def _by_deadline(outcome: Outcome) -> tuple[Float[Array, "2"], Float[Array, "2"]]:
    """Sojourn and number of the final tasks of the heavier and of the lighter class."""
    light = outcome.deadline_s > 1.5 * NEVER_S
    of_class = jnp.stack([outcome.final & ~light, outcome.final & light])
    sojourn_s = outcome.account.queue_s + outcome.account.switch_s + outcome.account.service_s
    return jnp.sum(jnp.where(of_class, sojourn_s, 0.0), axis=1), jnp.sum(of_class, axis=1).astype(sojourn_s.dtype)


def _shared(run: Run, expected: float, law: Law, *, rate_per_s: float = LOAD, **plant: Any) -> Sample:
    """Mean sojourn at a server that works on several tasks at once; its events cost more than a queue's."""
    table: dict[str, Any] = {"uploads": SHARED_ROWS, **plant}
    return _explicit(run, expected, law, rate_per_s=rate_per_s, slots=SHARED_SLOTS, measure=sojourns, **table)


def _explicit(
    run: Run,
    expected: float,
    law: Law,
    *,
    gpus: int = 1,
    rate_per_s: float = LOAD,
    slots: int = SLOTS,
    patience_s: float = NEVER_S,
    measure: Measure = waits,
    drop: bool = False,
    **plant: Any,
) -> Sample:
    """A statistic of one server with explicit Poisson instants; `plant` goes to `queue_plant`."""
    slot_s = PER_SLOT / rate_per_s
    environment = Environment.from_scenario(queue_plant(slot_s=slot_s, gpus=gpus, drop=drop, **plant))

    def batch(random: np.random.Generator) -> tuple[Floats, ...]:
        instants = poisson_instants(random, rate_per_s, slot_s, slots, run.replications, law, patience_s)
        totals = drive(environment, instants, measure)
        return task_mean(totals, WARMUP_SLOTS), _offered(instants)

    return Sample(expected, *run.repeat(batch))


def _offered(instants: Instants) -> Floats:
    """How far the tasks of each replication are from a Poisson process with work of mean 1: number, work."""
    present = instants.present[:, WARMUP_SLOTS:]
    count = present.sum(axis=(1, 2))
    work = np.where(present, instants.work[:, WARMUP_SLOTS:], 0.0).sum(axis=(1, 2)) / count
    return np.stack([count / (PER_SLOT * present.shape[1]) - 1.0, work - 1.0], axis=1)


def _drawn(run: Run, environment: Environment) -> Floats:
    """Mean wait at one server with the requests that the simulator draws."""

    def batch(random: np.random.Generator) -> tuple[Floats, ...]:
        first = int(random.integers(2**40))
        totals = drive_drawn(environment, first, run.replications, SLOTS, waits)
        return (task_mean(totals, WARMUP_SLOTS),)

    return run.repeat(batch)[0]


def _by_policy(
    run: Run, policy: Policy[None], servers: int, load: float, *, tasks: int, warmup: int
) -> tuple[Floats, ...]:
    """Mean wait of exponential work that a policy spreads over alike servers, and controls, row by replication."""
    environment = Environment.from_scenario(queue_plant(servers=servers, rows=1))
    # Half the replications of a one-server queue: every one holds many servers.
    count = max(2, run.replications // 2)

    def batch(random: np.random.Generator) -> tuple[Floats, ...]:
        gap_s = random.standard_exponential((count, tasks))
        work = random.standard_exponential((count, tasks))
        key = jax.random.key(int(random.integers(2**31)))
        wait_s = drive_policy(environment, policy, gap_s / (load * servers), work, key)
        controls = [gap_s[:, warmup:].mean(axis=1) - 1.0, work[:, warmup:].mean(axis=1) - 1.0]
        return wait_s[:, warmup:].mean(axis=1), np.stack(controls, axis=1)

    return run.repeat(batch)


def _waited_two(outcome: Outcome) -> tuple[Float[Array, ""], Float[Array, ""]]:
    long = outcome.final & (outcome.account.queue_s > 2.0)
    return jnp.sum(long).astype(float), jnp.sum(outcome.final).astype(float)


def _discarded(outcome: Outcome) -> tuple[Float[Array, ""], Float[Array, ""]]:
    return jnp.sum(outcome.final & outcome.dropped).astype(float), jnp.sum(outcome.final).astype(float)


def _departures(outcome: Outcome) -> tuple[Float[Array, "rows"], Float[Array, "rows"]]:
    """End of service of every row of the request table, seen from its slot."""
    requests = outcome.end_s[1:]
    return requests, outcome.final[1:].astype(requests.dtype)
