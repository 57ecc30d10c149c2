"""Servers that divide their time by weight, beside a replay in plain Python, a Markov chain and a closed form."""

import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse
from scipy.sparse import linalg

from gmel.evaluation.validation.closed_forms import weighted_sharing_s
from gmel.physics.sharing import SharedServers, Sharing, share, weighted_shares

NEVER = math.inf


# The processor


def water_filled(weights: Sequence[float], gpus: int) -> list[float]:
    """Shares in plain Python: the heaviest first, each at most one GPU, what is left by weight among the others."""
    shares = [0.0] * len(weights)
    left, rest = float(gpus), sum(weights)
    for k in sorted(range(len(weights)), key=lambda k: -weights[k]):
        shares[k] = min(1.0, left * weights[k] / rest)
        left, rest = left - shares[k], rest - weights[k]
    return shares


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from([0.01, 0.5, 1.0, 4.0, 100.0]), min_size=1, max_size=8), st.integers(1, 6))
def test_shares_are_in_proportion_up_to_one_gpu(weights: list[float], gpus: int) -> None:
    count = len(weights)
    padded = jnp.asarray([*weights, *[1.0] * (8 - count)])
    with jax.enable_x64(True):
        found = weighted_shares(
            padded.astype(float),
            jnp.arange(8) < count,
            jnp.ones((8, 1), bool),
            jnp.zeros(8, jnp.int32),
            jnp.asarray([float(gpus)]),
            min(5, gpus),
        )[:count]
    np.testing.assert_allclose(found, water_filled(np.asarray(padded, float)[:count].tolist(), gpus), rtol=1e-9)
    assert float(np.asarray(found).sum()) == pytest.approx(min(count, gpus), rel=1e-6)


class Job:
    """A task of one server: ready, service, weight."""

    def __init__(self, ready_s: float, service_s: float, weight: float) -> None:
        self.ready_s, self.service_s, self.weight = ready_s, service_s, weight


def replayed(jobs: Sequence[Job], gpus: int, limit: float, speed: float, horizon_s: float) -> list[float]:
    """Ends of the jobs, event by event in plain Python; the speed is 1 after the horizon."""
    ends = [math.nan] * len(jobs)
    left = [job.service_s for job in jobs]
    coming = sorted(range(len(jobs)), key=lambda k: (jobs[k].ready_s, k))
    waiting: list[int] = []
    serving: list[int] = []
    now = 0.0
    while coming or waiting or serving:
        current = speed if now < horizon_s else 1.0
        while waiting and len(serving) < limit and current > 0:
            serving.append(waiting.pop(0))
        shares = dict(zip(serving, water_filled([jobs[k].weight for k in serving], gpus), strict=True))
        done = min(((now + left[k] / (current * shares[k]), k) for k in serving), default=(NEVER, -1))
        if current == 0:
            done = (NEVER, -1)
        comes = jobs[coming[0]].ready_s if coming else NEVER
        following = min(done[0], max(comes, now), horizon_s if now < horizon_s else NEVER)
        for k in serving:
            left[k] -= current * shares[k] * (following - now)
        crosses = now < horizon_s <= following
        now = following
        if crosses:
            continue
        if done[0] <= comes:
            serving.remove(done[1])
            ends[done[1]] = now
        else:
            waiting.append(coming.pop(0))
    return ends


SERVE = {passes: jax.jit(functools.partial(share, passes=passes)) for passes in (1, 2, 3)}
ROWS = 7


def served(
    jobs: Sequence[Job],
    gpus: int = 1,
    limit: float = NEVER,
    speed: float = 1.0,
    horizon_s: float = 1.0,
    passes: int = 3,
) -> Any:
    """`share` in double precision; padding rows have a server of their own."""
    padded = [*jobs, *[Job(0.0, 0.0, 1.0)] * (ROWS - len(jobs))]
    with jax.enable_x64(True):
        zero, one = jnp.zeros(ROWS), jnp.ones(2)
        rows = Sharing(
            present=jnp.ones(ROWS, bool),
            server=jnp.asarray([0] * len(jobs) + [1] * (ROWS - len(jobs)), jnp.int32),
            ready_s=jnp.asarray([job.ready_s for job in padded]),
            left_s=jnp.asarray([job.service_s for job in padded]),
            serving=jnp.zeros(ROWS, bool),
            start_s=zero,
            switch_s=zero,
            model=jnp.zeros(ROWS, jnp.int32),
            load_s=zero,
            latest_start_s=jnp.full(ROWS, jnp.inf),
            weight=jnp.asarray([job.weight for job in padded]),
        )
        server = SharedServers(gpus * one, limit * one, one, speed * one, jnp.zeros((2, 0), bool), jnp.zeros((2, 0)))
        return jax.device_get(SERVE[passes](rows, server, jnp.asarray(horizon_s), jnp.zeros(0), one))


def test_two_tasks_of_unlike_weight_by_hand() -> None:
    # Alone until 1, then 1/5 and 4/5: the second takes 1.25 s; the first has 2 - 0.25 left then and ends at 4.
    found = served([Job(0.0, 3.0, 1.0), Job(1.0, 1.0, 4.0)])
    np.testing.assert_allclose(found.end_s[:2], [4.0, 2.25], rtol=1e-12)


JOBS = st.lists(
    st.builds(
        Job,
        st.floats(0, 6).map(lambda x: round(x, 3)),
        st.floats(0.01, 4).map(lambda x: round(x, 3)),
        st.sampled_from([0.25, 1.0, 4.0]),
    ),
    min_size=1,
    max_size=ROWS,
)


@settings(max_examples=60, deadline=None)
@given(
    jobs=JOBS,
    gpus=st.integers(1, 4),
    limit=st.sampled_from([4.0, 5.0, NEVER]),
    speed=st.sampled_from([0.0, 0.5, 1.0]),
    horizon_s=st.sampled_from([0.7, 2.0]),
)
def test_every_task_agrees_with_a_replay_in_plain_python(
    jobs: list[Job], gpus: int, limit: float, speed: float, horizon_s: float
) -> None:
    found = served(jobs, gpus, limit, speed, horizon_s)
    expected = replayed(jobs, gpus, limit, speed, horizon_s)
    np.testing.assert_allclose(found.end_s[: len(jobs)], expected, rtol=0, atol=1e-9)


@settings(max_examples=30, deadline=None)
@given(jobs=JOBS, seed=st.integers(0, 100))
def test_the_order_of_rows_changes_nothing_and_no_work_is_lost(jobs: list[Job], seed: int) -> None:
    found = served(jobs).end_s[: len(jobs)]
    order = np.random.default_rng(seed).permutation(len(jobs))
    again = served([jobs[k] for k in order]).end_s[: len(jobs)]
    np.testing.assert_allclose(again, found[order], rtol=0, atol=1e-9)
    # One GPU never idles while there is work: the last of a busy period ends as it would first in, first out.
    free_s = 0.0
    ends: list[float] = []
    for job in sorted(jobs, key=lambda job: job.ready_s):
        if job.ready_s > free_s:
            ends.append(free_s)
        free_s = max(free_s, job.ready_s) + job.service_s
    ends.append(free_s)
    for end_s in ends[1:] if jobs and ends[0] == 0.0 else ends:
        assert np.min(np.abs(found - end_s)) < 1e-9


@pytest.mark.parametrize("gpus", [1, 3])
def test_a_heavier_task_ends_no_later(gpus: int) -> None:
    rng = np.random.default_rng(4)
    for _ in range(20):
        ready_s, service_s = rng.uniform(0, 3, 5).tolist(), rng.exponential(1.0, 5).tolist()
        ends: list[float] = []
        for weight in (0.25, 1.0, 4.0):
            weights = [weight, 1.0, 1.0, 1.0, 1.0]
            jobs = [Job(*each) for each in zip(ready_s, service_s, weights, strict=True)]
            ends.append(float(served(jobs, gpus).end_s[0]))
        assert ends[0] >= ends[1] - 1e-9
        assert ends[1] >= ends[2] - 1e-9


# The closed form


def by_markov_chain(rates: Sequence[float], means: Sequence[float], weights: Sequence[float], most: int) -> list[float]:
    """Mean sojourns of two classes from the stationary law of their numbers, cut off at `most` of each."""
    size = most + 1
    rows, columns, values = [], [], []

    def add(start: tuple[int, int], end: tuple[int, int], rate: float) -> None:
        one, other = start[0] * size + start[1], end[0] * size + end[1]
        rows.extend([other, one])
        columns.extend([one, one])
        values.extend([rate, -rate])

    for first, second in itertools.product(range(size), repeat=2):
        total = first * weights[0] + second * weights[1]
        if first < most:
            add((first, second), (first + 1, second), rates[0])
        if second < most:
            add((first, second), (first, second + 1), rates[1])
        if first:
            add((first, second), (first - 1, second), first * weights[0] / total / means[0])
        if second:
            add((first, second), (first, second - 1), second * weights[1] / total / means[1])
    flow = sparse.csc_matrix((values, (rows, columns))).tolil()
    flow[0, :] = 1.0
    law = linalg.spsolve(flow.tocsc(), np.eye(1, size * size)[0]).reshape(size, size)
    count = np.arange(size)
    return [float(count @ law.sum(axis=1)) / rates[0], float(count @ law.sum(axis=0)) / rates[1]]


@pytest.mark.parametrize("weights", [(1.0, 4.0), (1.0, 1.0), (100.0, 1.0)])
def test_the_closed_form_is_that_of_the_markov_chain(weights: tuple[float, float]) -> None:
    rates, means = (0.3, 0.2), (0.5, 1.5)
    load = [rate * mean for rate, mean in zip(rates, means, strict=True)]
    found = weighted_sharing_s(rates, means, weights)
    np.testing.assert_allclose(found, by_markov_chain(rates, means, weights, 50), rtol=1e-6)
    # Conservation: the work left is that of M/G/1, whatever the weights.
    left_s = sum(share * mean for share, mean in zip(load, means, strict=True)) / (1.0 - sum(load))
    assert float(np.dot(load, found)) == pytest.approx(left_s, rel=1e-9)
    if weights == (1.0, 1.0):
        np.testing.assert_allclose(found, [mean / (1.0 - sum(load)) for mean in means], rtol=1e-9)
    else:
        # With one class there is nobody to be preferred to.
        assert weighted_sharing_s([0.4], [1.0], [weights[0]])[0] == pytest.approx(1.0 / 0.6)


def test_the_closed_form_tends_to_priority() -> None:
    """Where one class weighs all, it is alone with itself: M/M/1 shared; the other is last (preemptive priority)."""
    first, second = weighted_sharing_s((0.3, 0.2), (1.0, 1.0), (1e9, 1.0))
    assert first == pytest.approx(1.0 / 0.7, rel=1e-6)
    assert second == pytest.approx(1.0 / (0.7 * 0.5), rel=1e-6)
