"""Queues in the steady state beside their closed forms: means over independent replications, warm-up left out."""

# SciPy ships no types; unknown types from it are not ours (as in pyproject.toml).
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from numpy.typing import NDArray

from gmel.evaluation.validation.check import Run, Sample, check
from gmel.evaluation.validation.closed_forms import (
    birth_death_sojourn_s,
    erlang_c_wait_s,
    least_loaded_wait_s,
    pollaczek_khinchine_s,
    weighted_sharing_s,
)
from gmel.evaluation.validation.drive import (
    NEVER_S,
    ONE_STEP,
    Law,
    drive,
    drive_drawn,
    drive_policy,
    poisson_instants,
    queue_plant,
    sojourns,
    task_mean,
    waits,
)
from gmel.evaluation.validation.one_server import (
    LOAD,
    PER_SLOT,
    SLOT_S,
    SLOTS,
    WARMUP_SLOTS,
    constant,
    erlang_2,
    explicit_sample,
    exponential,
    hyperexponential,
    offered,
)
from gmel.policies.policy import Policy
from gmel.policies.rules import Greedy, LeastExpectedDelay, Proportional
from gmel.scenario.demand import Gang
from gmel.simulator.environment import Environment
from gmel.simulator.state import Outcome

__all__: list[str] = []

Floats = NDArray[np.float64]

SHARED_SLOTS = 1500
SHARED_ROWS = 80
"""Places for tasks at a server that shares its time."""
GANG_SLOTS = 3000
BATCH_RATE_PER_S = 1.0
"""Arrivals at a server that does 1.6 tasks of mean work 1 per second in batches of 4."""


@check("mm1-wait", "queues")
def mm1_wait(run: Run) -> Sample:
    """M/M/1: mean wait = rho / (mu - lambda).

    Source: Kleinrock, Queueing Systems I, 1975, section 3.2
    """
    return explicit_sample(run, LOAD / (1.0 - LOAD), exponential)


@check("mm1-waiting", "queues")
def mm1_waiting(run: Run) -> Sample:
    """M/M/1: share of tasks that wait longer than 2 / mu = rho exp(-2 (1 - rho)).

    Source: Kleinrock, Queueing Systems I, 1975, section 5.12
    """
    return explicit_sample(run, LOAD * math.exp(-2.0 * (1.0 - LOAD)), exponential, measure=_waited_two)


@check("md1-wait", "queues")
def md1_wait(run: Run) -> Sample:
    """M/D/1: mean wait = rho s / (2 (1 - rho)).

    Source: Pollaczek 1930, Khinchine 1932
    """
    return explicit_sample(run, pollaczek_khinchine_s(LOAD, 1.0, 1.0), constant)


@check("mg1-erlang", "queues")
def mg1_erlang(run: Run) -> Sample:
    """M/E2/1: mean wait = lambda E[S^2] / (2 (1 - rho)).

    Source: Pollaczek 1930, Khinchine 1932
    """
    return explicit_sample(run, pollaczek_khinchine_s(LOAD, 1.0, 1.5), erlang_2)


@check("mg1-hyperexponential", "queues")
def mg1_hyperexponential(run: Run) -> Sample:
    """M/H2/1: mean wait = lambda E[S^2] / (2 (1 - rho)).

    Source: Pollaczek 1930, Khinchine 1932
    """
    return explicit_sample(run, pollaczek_khinchine_s(LOAD, 1.0, 3.0), hyperexponential)


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
    return explicit_sample(run, erlang_c_wait_s(rate, 3), exponential, gpus=3, rate_per_s=rate, slots=2 * SLOTS)


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
        return task_mean(drive(second, again, waits), WARMUP_SLOTS), offered(again)

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
    small, small_controls = _by_policy(run, policy, servers, load, tasks=12_000, warmup=servers * 30)
    large, large_controls = _by_policy(run, policy, 2 * servers, load, tasks=16_800, warmup=2 * servers * 30)
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


@check("gang-wait", "queues")
def gang_wait(run: Run) -> Sample:
    """Gangs on all 4 GPUs, two models at random: M/G/1, cold with probability 1/2 each: mean wait by P-K.

    A start is cold if the model differs from that of the task before: independent from task to task.
    Source: Pollaczek 1930, Khinchine 1932; warm and cold starts: EAT, arXiv 2507.10026
    """
    warm_s, load_s, speedup = 0.6, 0.4, 2.0
    rate_per_s = LOAD / (warm_s + 0.5 * load_s)
    gang = Gang(gpus=4, speedup=speedup, load_s=load_s)
    alike = {"fixed_work": warm_s * speedup, "gangs": (gang,)}
    plant = queue_plant(
        slot_s=PER_SLOT / rate_per_s,
        gpus=4,
        rate_per_s=rate_per_s,
        discipline="gang",
        models=[ONE_STEP.model_copy(update={"name": name, **alike}) for name in ("A", "B")],
    )
    second_s2 = 0.5 * (warm_s**2 + (warm_s + load_s) ** 2)
    expected_s = pollaczek_khinchine_s(rate_per_s, warm_s + 0.5 * load_s, second_s2)
    return Sample(expected_s, _drawn(run, Environment.from_scenario(plant), GANG_SLOTS))


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
        return sojourn_s, np.concatenate([offered(told), share[:, None]], axis=1)

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
    return explicit_sample(run, expected, law, rate_per_s=rate_per_s, slots=SHARED_SLOTS, measure=sojourns, **table)


def _drawn(run: Run, environment: Environment, slots: int = SLOTS) -> Floats:
    """Mean wait at one server with the requests that the simulator draws."""

    def batch(random: np.random.Generator) -> tuple[Floats, ...]:
        first = int(random.integers(2**40))
        totals = drive_drawn(environment, first, run.replications, slots, waits)
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


def _departures(outcome: Outcome) -> tuple[Float[Array, "rows"], Float[Array, "rows"]]:
    """End of service of every row of the request table, seen from its slot."""
    requests = outcome.end_s[1:]
    return requests, outcome.final[1:].astype(requests.dtype)
