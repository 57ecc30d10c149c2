"""Driving the simulator: small plants, arrivals as arrays, and runs through `Environment.step`."""

# SciPy ships no types; unknown types from it are not ours (as in pyproject.toml).
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int
from numpy.typing import NDArray
from scipy import stats

from gmel.policies.policy import Policy
from gmel.scenario.schema import (
    Arrivals,
    Choice,
    Devices,
    GenerationModel,
    Radio,
    Range,
    Scenario,
    Server,
    Service,
    Slot,
    Spread,
    Tasks,
)
from gmel.simulator.environment import Environment, seeds
from gmel.simulator.state import Outcome, Requests, State

__all__ = [
    "NEVER_S",
    "ONE_STEP",
    "Instants",
    "Law",
    "Measure",
    "drive",
    "drive_drawn",
    "drive_policy",
    "poisson_instants",
    "queue_plant",
    "sojourns",
    "task_mean",
    "waits",
]

Floats = NDArray[np.float64]
Law = Callable[[np.random.Generator, tuple[int, ...]], Floats]
Measure = Callable[[Outcome], tuple[Float[Array, "..."], Float[Array, "..."]]]
"""From the outcome of a slot to a sum over its final tasks and their number."""

NEVER_S = 1e6
"""A deadline that is never met in a run; finite in float32."""


ONE_STEP = GenerationModel(
    name="one step",
    popularity=1.0,
    fixed_work=1.0,
    steps=Choice(values=[1.0], weights=[1.0]),
    images=Choice(values=[1.0], weights=[1.0]),
    memory_gb=1.0,
    bits_in=Range(low=0.0, high=0.0),
)
"""Asks for one denoising step, one unit of the capacity of a server."""


class Instants(NamedTuple):
    """Tasks of a one-server plant as arrays: upload end after the slot start, work, and latest start after that end."""

    present: Bool[Array, "replications slots rows"] | NDArray[np.bool_]
    ready_s: Float[Array, "replications slots rows"] | Floats
    work: Float[Array, "replications slots rows"] | Floats
    patience_s: Float[Array, "replications slots rows"] | Floats
    level: Int[Array, "replications slots rows"] | NDArray[np.int64] | None = None
    """Which level of the plant each task takes (`gmel.simulator.levels`); None: the first."""


def queue_plant(
    *,
    slot_s: float = 1.0,
    servers: int = 1,
    gpus: int = 1,
    rate_per_s: float = 1.0,
    rows: int | None = None,
    uploads: int = 1,
    work: tuple[float, float] = (1.0, 1.0),
    noise_sigma: float = 0.0,
    drop: bool = False,
    age: int = 0,
    discipline: Literal["fifo", "sharing", "batching", "capacity", "gang"] = "fifo",
    concurrency: int | None = None,
    round_share: float = 1.0,
    places: int | None = None,
    capacity: float | None = None,
    on_overload: Literal["crash", "reject"] = "crash",
    models: list[GenerationModel] | None = None,
    cpu_weights: list[float] | None = None,
) -> Scenario:
    """Alike servers of speed 1 behind links that cost no time; the device itself is far too slow to be chosen.

    With a `capacity` the tasks take one unit each; with `models` requests are drawn from them.
    """
    if discipline == "capacity" and models is None:
        models = [ONE_STEP]
    asked: dict[str, Any] = {"kind": "catalogue"}
    if models is None:
        bits = Range(low=0.0, high=0.0)
        asked = {"kind": "uniform", "work": Range(low=work[0], high=work[1]), "bits_in": bits}
    return Scenario(
        name="queue",
        slot=Slot(length_s=slot_s, broadcast_age_slots=age),
        devices=Devices(count=1, speed=Spread.constant(1e-6)),
        servers=[
            Server(
                name=f"S{number}",
                speed=1.0,
                gpus=gpus,
                concurrency=concurrency,
                round_share=round_share,
                places=places,
                capacity=capacity,
            )
            for number in range(servers)
        ],
        service=Service(discipline=discipline, on_overload=on_overload),
        models=models or [],
        radio=Radio(model="uniform-snr", rate="shannon", fading="none", floor="clip", sharing="none", download=False),
        tasks=Tasks(
            **asked,
            deadline_s=Range(low=NEVER_S, high=NEVER_S),
            deadline="drop" if drop else "late",
            noise_sigma=noise_sigma,
            cpu_weights=cpu_weights,
        ),
        arrivals=Arrivals(rate_per_s=rate_per_s, max_per_slot=rows),
        max_uploads=uploads,
    )


def poisson_instants(
    random: np.random.Generator,
    rate_per_s: float,
    slot_s: float,
    slots: int,
    replications: int,
    law: Law,
    patience_s: float = NEVER_S,
) -> Instants:
    """A Poisson process cut into slots: a Poisson count, each instant uniform within the slot."""
    rows = int(stats.poisson.isf(1e-12, rate_per_s * slot_s)) + 1
    shape = (replications, slots, rows)
    count = random.poisson(rate_per_s * slot_s, shape[:2])
    return Instants(
        present=np.arange(rows) < count[..., None],
        ready_s=random.uniform(0.0, slot_s, shape),
        work=law(random, shape),
        patience_s=np.full(shape, patience_s),
    )


def waits(outcome: Outcome) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """Time in the queue of the final tasks."""
    return _total(outcome, outcome.account.queue_s)


def sojourns(outcome: Outcome) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """Time from the end of the upload to the end of the service of the final tasks."""
    return _total(outcome, outcome.account.queue_s + outcome.account.switch_s + outcome.account.service_s)


def task_mean(totals: tuple[Any, Any], warmup_slots: int) -> Floats:
    """Mean over the tasks of each replication, the slots of the warm-up left out; totals [replications, slots]."""
    value, count = (np.asarray(total, float)[:, warmup_slots:].sum(axis=1) for total in totals)
    return value / count


def drive(environment: Environment, instants: Instants, measure: Measure) -> tuple[Any, Any]:
    """One server, explicit requests: nothing is drawn. Totals of `measure`, each [replications, slots].

    Raises:
        RuntimeError: uploads in flight did not fit their table.
    """
    number = jnp.result_type(float)
    table = Instants(
        present=jnp.asarray(instants.present),
        ready_s=jnp.asarray(instants.ready_s, number),
        work=jnp.asarray(instants.work, number),
        patience_s=jnp.asarray(instants.patience_s, number),
        level=None if instants.level is None else jnp.asarray(instants.level, jnp.int32),
    )
    totals, lost = jax.device_get(_drive(environment, table, measure))
    _refuse_losses(lost)
    return totals


def drive_drawn(
    environment: Environment,
    first_seed: int,
    replications: int,
    slots: int,
    measure: Measure,
    policy: Policy[None] | None = None,
) -> tuple[Any, Any]:
    """Requests as the simulator draws them. Totals of `measure`, each [replications, slots].

    With a policy they arrive at the slot start at the server it chooses. Without one they go to the first server, and
    their uploads are stretched to end one slot after the generation: decisions at slot starts make arrivals in batches,
    and a delay that undoes the wait for the slot start gives back the Poisson process of the generations, for which the
    laws of continuous time hold exactly.

    Raises:
        RuntimeError: uploads in flight did not fit their table.
    """
    totals, lost = jax.device_get(_drive_drawn(environment, seeds(first_seed, replications), slots, measure, policy))
    _refuse_losses(lost)
    return totals


def drive_policy(
    environment: Environment, policy: Policy[None], gap_s: Floats, work: Floats, key: jax.Array
) -> NDArray[np.float64]:
    """One request a slot, decided by a policy; the length of each slot is the time to the next request.

    So decisions fall on the instants of arrival, one at a time, as queueing theory has it.

    Args:
        gap_s, work: [replications, tasks].

    Returns:
        The wait of every task [replications, tasks].
    """
    keys = jax.random.split(key, gap_s.shape[0])
    number = jnp.result_type(float)
    wait_s = _drive_policy(environment, policy, jnp.asarray(gap_s, number), jnp.asarray(work, number), keys)
    return np.asarray(wait_s, float)


def explicit(environment: Environment, present: Any, ready_s: Any, work: Any, deadline_s: Any) -> Requests:
    """Requests of device 0 whose uploads end `ready_s` after the slot start at whatever server they choose.

    Where servers have a capacity they take one unit of it.
    """
    zero = jnp.zeros_like(work)
    index = jnp.zeros(work.shape, jnp.int32)
    per_server = jnp.broadcast_to(zero[:, None], (work.shape[0], environment.servers))
    return Requests(
        present=present,
        device=index,
        generated_s=zero,
        size_bit=zero,
        bits_out=zero,
        work=work,
        noise=zero + 1.0,
        model=index,
        load_s=zero,
        deadline_s=deadline_s,
        fade=per_server + 1.0,
        outage_s=per_server + ready_s[:, None],
        steps=zero + 1.0 if environment.plant.switches.discipline == "capacity" else None,
    )


def _total(outcome: Outcome, values: Float[Array, "rows"]) -> tuple[Float[Array, ""], Float[Array, ""]]:
    return jnp.sum(jnp.where(outcome.final, values, 0.0)), jnp.sum(outcome.final).astype(values.dtype)


@eqx.filter_jit
def _drive(environment: Environment, table: Instants, measure: Measure) -> Any:
    first_server = jnp.ones(table.work.shape[-1], jnp.int32)

    def slot(state: State, row: Instants) -> tuple[State, Any]:
        action = first_server if row.level is None else first_server + row.level * (1 + environment.servers)
        deadline_s = row.ready_s + row.patience_s
        requests = explicit(environment, row.present, row.ready_s, row.work, deadline_s)
        after, _, outcome = environment.step(state._replace(requests=requests), action, requests=requests)
        return after, measure(outcome)

    def one(table: Instants) -> Any:
        first = jax.tree.map(lambda field: field[0], table)
        start = environment.reset(seeds(0, 1)[0])
        start = start._replace(
            requests=explicit(environment, first.present, first.ready_s, first.work, first.patience_s)
        )
        last, totals = jax.lax.scan(slot, start, table)
        return totals, last.lost

    return jax.vmap(one)(table)


@eqx.filter_jit
def _drive_drawn(
    environment: Environment, words: Any, slots: int, measure: Measure, policy: Policy[None] | None
) -> Any:
    def slot(state: State, key: Any) -> tuple[State, Any]:
        if policy is None:
            drawn = state.requests
            held_s = environment.plant.slot_s + drawn.generated_s
            held = drawn._replace(outage_s=jnp.broadcast_to(held_s[:, None], drawn.outage_s.shape))
            state, action = state._replace(requests=held), jnp.ones(environment.requests, jnp.int32)
        else:
            action, _ = policy.act(environment.observe(state, fresh=policy.fresh), None, key)
        after, _, outcome = environment.step(state, action)
        return after, measure(outcome)

    def one(seed: Any) -> Any:
        keys = jax.random.split(jax.random.key(seed[0]), slots)
        last, totals = jax.lax.scan(slot, environment.reset(seed), keys)
        return totals, last.lost

    return jax.vmap(one)(words)


@eqx.filter_jit
def _drive_policy(environment: Environment, policy: Policy[None], gap_s: Any, work: Any, keys: Any) -> Any:
    def one(gap_s: Any, work: Any, key: Any) -> Any:
        def slot(state: State, now: tuple[Any, Any, Any]) -> tuple[State, Any]:
            length_s, task_work, slot_key = now
            timed = eqx.tree_at(lambda tree: tree.plant.slot_s, environment, length_s)
            zero = jnp.zeros_like(task_work[None])
            requests = explicit(timed, zero == 0, zero, task_work[None], zero + NEVER_S)
            state = state._replace(requests=requests)
            action, _ = policy.act(timed.observe(state, fresh=policy.fresh), None, slot_key)
            after, _, outcome = timed.step(state, action, requests=requests)
            return after, waits(outcome)[0]

        start = environment.reset(seeds(0, 1)[0])
        return jax.lax.scan(slot, start, (gap_s, work, jax.random.split(key, gap_s.shape[0])))[1]

    return jax.vmap(one)(gap_s, work, keys)


def _refuse_losses(lost: Any) -> None:
    if np.any(lost):
        raise RuntimeError(f"{int(np.sum(lost))} uploads in flight did not fit their table")
