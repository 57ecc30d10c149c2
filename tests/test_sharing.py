"""Servers that share their time: closed forms, limits that are other disciplines, and an independent simulator."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gmel.physics.queueing import Queued, Servers, fifo_many_gpus
from gmel.physics.sharing import Shared, SharedServers, Sharing, share

NEVER = math.inf
# One program for all examples of a shape.
serve, fifo = jax.jit(share), jax.jit(fifo_many_gpus)


@dataclass(frozen=True)
class Task:
    ready_s: float
    service_s: float
    latest_start_s: float = NEVER


@dataclass
class Fate:
    start_s: float = math.nan
    end_s: float = math.nan
    dropped: bool = False
    left_at_s: float = field(default=math.nan)


def one_server(
    tasks: Sequence[Task], gpus: int, limit: float, beta: float, speed: float, horizon_s: float
) -> list[Fate]:
    """The rules of `physics/sharing.py` for one server, event by event in plain Python."""
    fates = [Fate() for _ in tasks]
    left = [task.service_s for task in tasks]
    order = sorted(range(len(tasks)), key=lambda k: (tasks[k].ready_s, k))
    coming, waiting, serving = list(order), [], []
    now = 0.0
    while coming or waiting or serving or now < horizon_s:
        current = speed if now < horizon_s else 1.0
        while waiting and len(serving) < limit and current > 0:
            first = waiting.pop(0)
            fates[first].start_s = now
            if now > tasks[first].latest_start_s:
                fates[first].dropped, fates[first].end_s = True, now
            else:
                serving.append(first)
        if not (coming or waiting or serving) and now >= horizon_s:
            break
        rate = current / (1 + beta * max(len(serving) - gpus, 0) / gpus)
        ends = min(((now + left[k] / rate, k) for k in serving), default=(NEVER, -1)) if rate > 0 else (NEVER, -1)
        comes = tasks[coming[0]].ready_s if coming else NEVER
        following = min(ends[0], max(comes, now), horizon_s if now < horizon_s else NEVER)
        for k in serving:
            left[k] -= rate * (following - now)
        crosses = now < horizon_s <= following
        now = following
        if crosses:
            for k, fate in enumerate(fates):
                fate.left_at_s = left[k]
        elif ends[0] <= comes:
            serving.remove(ends[1])
            fates[ends[1]].end_s, left[ends[1]] = now, 0.0
        else:
            waiting.append(coming.pop(0))
    return fates


def run(
    tasks: Sequence[Task],
    gpus: int = 1,
    limit: float = NEVER,
    beta: float = 1.0,
    speed: float = 1.0,
    horizon_s: float = 1.0,
    server: Sequence[int] | None = None,
    servers: int = 1,
) -> Shared:
    """`share` on tasks that are all on their way, in double precision."""
    number = len(tasks)
    zero = jnp.zeros(number)
    rows = Sharing(
        present=jnp.ones(number, bool),
        server=jnp.asarray(server or [0] * number, jnp.int32),
        ready_s=jnp.asarray([task.ready_s for task in tasks]),
        left_s=jnp.asarray([task.service_s for task in tasks]),
        serving=jnp.zeros(number, bool),
        start_s=zero,
        switch_s=zero,
        model=jnp.zeros(number, jnp.int32),
        load_s=zero,
        latest_start_s=jnp.asarray([task.latest_start_s for task in tasks]),
    )
    one = jnp.ones(servers)
    plant = SharedServers(
        gpus * one, limit * one, beta * one, speed * one, jnp.zeros((servers, 0), bool), jnp.zeros((servers, 0))
    )
    return jax.device_get(serve(rows, plant, jnp.asarray(horizon_s), jnp.zeros(0), one))


def test_two_tasks_share_a_gpu_by_hand() -> None:
    # Alone until 1; then half each: the second takes 2 s for its 1 s of service; the first has 1 s left and ends at 4.
    found = run([Task(0.0, 3.0), Task(1.0, 1.0)])
    np.testing.assert_allclose(found.end_s, [4.0, 3.0])
    np.testing.assert_allclose(found.start_s, [0.0, 1.0])
    np.testing.assert_allclose(found.left_s, [2.0, 1.0])


def test_a_batch_takes_a_x_plus_b_per_round() -> None:
    """STACKING: three tasks of ten rounds that start together; a round of X takes 0.3 X + 0.2 seconds."""
    a, b, rounds = 0.3, 0.2, 10
    alone_s = rounds * (a + b)
    found = run([Task(0.0, alone_s)] * 3, limit=8, beta=a / (a + b))
    np.testing.assert_allclose(found.end_s, rounds * (3 * a + b), rtol=1e-6)


def test_a_server_that_is_down_starts_nothing_and_goes_on_afterwards() -> None:
    found = run([Task(0.0, 1.0), Task(0.5, 1.0)], speed=0.0, limit=1, horizon_s=2.0)
    np.testing.assert_allclose(found.end_s, [3.0, 4.0])
    np.testing.assert_allclose(found.start_s, [2.0, 3.0])


def test_a_straggler_is_slow_in_its_slot_only() -> None:
    found = run([Task(0.0, 1.0)], speed=0.25, horizon_s=2.0)
    np.testing.assert_allclose(found.end_s, [2.5])


TASKS = st.lists(
    st.builds(
        Task,
        st.floats(0, 6).map(lambda x: round(x, 3)),
        st.floats(0.01, 4).map(lambda x: round(x, 3)),
        st.sampled_from([NEVER, 1.0, 3.0]),
    ),
    min_size=1,
    max_size=7,
)


@settings(max_examples=40, deadline=None)
@given(
    tasks=TASKS,
    gpus=st.integers(1, 3),
    limit=st.sampled_from([3.0, 5.0, NEVER]),
    beta=st.sampled_from([0.2, 0.5, 1.0]),
    speed=st.sampled_from([0.0, 0.5, 1.0]),
    horizon_s=st.sampled_from([0.7, 2.0]),
)
def test_every_task_agrees_with_plain_python(
    tasks: list[Task], gpus: int, limit: float, beta: float, speed: float, horizon_s: float
) -> None:
    padded = [*tasks, *[Task(0.0, 0.0)] * (7 - len(tasks))]
    with jax.enable_x64(True):
        # Padding rows have a server of their own, so that they change nothing and one program serves all sizes.
        found = run(padded, gpus, limit, beta, speed, horizon_s, [0] * len(tasks) + [1] * (7 - len(tasks)), 2)
    expected = one_server(tasks, gpus, limit, beta, speed, horizon_s)
    count = len(tasks)
    assert found.dropped[:count].tolist() == [fate.dropped for fate in expected]
    for name in ("start_s", "end_s"):
        want = [getattr(fate, name) for fate in expected]
        np.testing.assert_allclose(getattr(found, name)[:count], want, rtol=0, atol=1e-9, err_msg=name)
    unfinished = [k for k in range(count) if expected[k].end_s > horizon_s + 1e-9]
    want = [expected[k].left_at_s for k in unfinished]
    np.testing.assert_allclose(found.left_s[unfinished], want, rtol=0, atol=1e-9)


@settings(max_examples=25, deadline=None)
@given(tasks=TASKS, gpus=st.integers(1, 3))
def test_with_a_limit_of_the_gpus_it_is_first_in_first_out(tasks: list[Task], gpus: int) -> None:
    padded = [*tasks, *[Task(50.0, 0.0)] * (7 - len(tasks))]
    with jax.enable_x64(True):
        found = run(padded, gpus, limit=float(gpus), beta=0.0)
        free_s = jnp.where(jnp.arange(3) < gpus, 0.0, jnp.inf)[None, :]
        rows = Queued(
            present=jnp.ones(7, bool),
            server=jnp.zeros(7, jnp.int32),
            ready_s=jnp.asarray([task.ready_s for task in padded]),
            service_s=jnp.asarray([task.service_s for task in padded]),
            model=jnp.zeros(7, jnp.int32),
            load_s=jnp.zeros(7),
            latest_start_s=jnp.asarray([task.latest_start_s for task in padded]),
        )
        state = Servers(free_s, jnp.zeros((1, 0), bool), jnp.zeros((1, 0)))
        served, _ = jax.device_get(fifo(state, rows, jnp.asarray(1.0), jnp.zeros(0), jnp.ones(1)))
    assert found.dropped.tolist() == served.dropped.tolist()
    kept = ~served.dropped
    np.testing.assert_allclose(found.start_s[kept], served.start_s[kept], rtol=0, atol=1e-9)
    np.testing.assert_allclose(found.end_s[kept], served.end_s[kept], rtol=0, atol=1e-9)


def test_slots_joined_are_the_whole() -> None:
    """What stands at the end of a slot, carried into the next, ends when it would have ended without the border."""
    rng = np.random.default_rng(2)
    tasks = [Task(float(r), float(w)) for r, w in zip(rng.uniform(0, 5, 6), rng.exponential(1.5, 6), strict=True)]
    with jax.enable_x64(True):
        whole = run(tasks, gpus=2, limit=3, beta=0.5, horizon_s=0.25)
        now = run(tasks, gpus=2, limit=3, beta=0.5, horizon_s=2.0)
        ended = now.end_s < 2.0
        rows = Sharing(
            present=jnp.asarray(~ended),
            server=jnp.zeros(6, jnp.int32),
            ready_s=jnp.asarray([task.ready_s - 2.0 for task in tasks]),
            left_s=jnp.asarray(now.left_s),
            serving=jnp.asarray(now.serving & ~ended),
            start_s=jnp.asarray(now.start_s - 2.0),
            switch_s=jnp.zeros(6),
            model=jnp.zeros(6, jnp.int32),
            load_s=jnp.zeros(6),
            latest_start_s=jnp.full(6, jnp.inf),
        )
        one = jnp.ones(1)
        plant = SharedServers(2 * one, 3 * one, 0.5 * one, one, jnp.zeros((1, 0), bool), jnp.zeros((1, 0)))
        later = jax.device_get(serve(rows, plant, jnp.asarray(2.0), jnp.zeros(0), one))
    np.testing.assert_allclose(np.where(ended, now.end_s, later.end_s + 2.0), whole.end_s, rtol=0, atol=1e-9)
    np.testing.assert_allclose(np.where(ended, now.start_s, later.start_s + 2.0), whole.start_s, rtol=0, atol=1e-9)


@pytest.mark.parametrize("memory", [4.0, 8.0])
def test_models_load_and_leave_by_least_recent_use(memory: float) -> None:
    """One task at a time, three models of 4 GB: a queue served in turn, loads counted by hand."""
    asked = [0, 1, 0, 2, 1]
    number = len(asked)
    rows = Sharing(
        present=jnp.ones(number, bool),
        server=jnp.zeros(number, jnp.int32),
        ready_s=jnp.arange(number) * 0.1,
        left_s=jnp.ones(number),
        serving=jnp.zeros(number, bool),
        start_s=jnp.zeros(number),
        switch_s=jnp.zeros(number),
        model=jnp.asarray(asked, jnp.int32),
        load_s=jnp.full(number, 2.0),
        latest_start_s=jnp.full(number, jnp.inf),
    )
    one = jnp.ones(1)
    plant = SharedServers(one, one, one, one, jnp.zeros((1, 3), bool), jnp.zeros((1, 3)))
    found = jax.device_get(serve(rows, plant, jnp.asarray(1.0), jnp.full(3, 4.0), memory * one))
    # Room for one: every change loads. Room for two: 0, 1 load, 0 is held, 2 loads in the place of 1, then 1 again.
    loads = [2.0, 2.0, 2.0, 2.0, 2.0] if memory == 4.0 else [2.0, 2.0, 0.0, 2.0, 2.0]
    np.testing.assert_allclose(found.switch_s, loads)
    np.testing.assert_allclose(found.end_s, list(itertools.accumulate(1.0 + load for load in loads)), rtol=1e-6)
