"""Queues: hand-computed sequences, two independent implementations, and the closed forms of M/M/1, M/D/1 and M/M/c."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gmel.physics.queueing import Queued, Served, Servers, fifo_many_gpus, fifo_one_gpu, local_queue
from reference_simulator import Server, Task, simulate

ROWS, SERVERS, MODELS = 7, 2, 4
INF = math.inf

one_gpu = jax.jit(fifo_one_gpu)
many_gpus = jax.jit(fifo_many_gpus)
on_device = jax.jit(local_queue)


def queued(rows: list[dict[str, Any]], count: int | None = None) -> Queued:
    """Rows with only what matters said; padded with absent ones."""
    blank = {"present": True, "server": 0, "ready_s": 0.0, "service_s": 1.0, "model": 0, "load_s": 0.0}
    blank["latest_start_s"] = INF
    absent = {**blank, "present": False, "service_s": 3.0}
    table = [{**blank, **row} for row in rows] + [absent] * ((count or len(rows)) - len(rows))
    return Queued(**{name: jnp.array([row[name] for row in table]) for name in Queued._fields})


def idle(gpus: list[int], models: int = 0, resident: list[list[int]] | None = None) -> Servers:
    free_s = np.where(np.arange(max(gpus))[None, :] < np.array(gpus)[:, None], 0.0, INF)
    held = np.zeros((len(gpus), models), bool)
    for server, holds in enumerate(resident or []):
        held[server, holds] = True
    return Servers(jnp.asarray(free_s), jnp.asarray(held), jnp.zeros((len(gpus), models)))


def serve(servers: Servers, rows: Queued, horizon_s: float = INF, memory: Any = (), room: Any = None) -> Any:
    room = jnp.full(servers.free_s.shape[0], 24.0) if room is None else jnp.array(room)
    return many_gpus(servers, rows, horizon_s, jnp.array(memory, float), room)


# Sixteenths are exact in float32, and equal times are frequent.
sixteenths = st.integers(1, 64).map(lambda n: n / 16)
row = st.fixed_dictionaries(
    {
        "present": st.sampled_from([True, True, True, False]),
        "server": st.integers(0, SERVERS - 1),
        "ready_s": st.integers(-16, 64).map(lambda n: n / 16),
        "service_s": sixteenths,
        "model": st.integers(0, MODELS - 1),
        "load_s": sixteenths,
        "latest_start_s": sixteenths,
    }
)
rows_of_a_slot = st.lists(row, min_size=ROWS, max_size=ROWS)


@settings(max_examples=60, deadline=None)
@given(rows_of_a_slot, st.lists(sixteenths, min_size=SERVERS, max_size=SERVERS), sixteenths)
def test_closed_form_equals_the_recursion(rows: list[dict[str, Any]], free_s: list[float], horizon_s: float) -> None:
    table = queued([{**r, "latest_start_s": INF} for r in rows])
    closed, closed_free_s = one_gpu(jnp.array(free_s), table, horizon_s)
    before = idle([1] * SERVERS)._replace(free_s=jnp.array(free_s)[:, None])
    stepped, after = serve(before, table, horizon_s)
    present = np.asarray(table.present)
    np.testing.assert_array_equal(closed.start_s[present], stepped.start_s[present])
    np.testing.assert_array_equal(closed.end_s[present], stepped.end_s[present])
    np.testing.assert_array_equal(closed_free_s, after.free_s[:, 0])
    assert not closed.dropped.any()
    assert not stepped.dropped.any()


@settings(max_examples=60, deadline=None)
@given(rows_of_a_slot, st.booleans(), st.sampled_from([1, 2, 3]))
def test_recursion_equals_the_event_driven_reference(rows: list[dict[str, Any]], drop: bool, gpus: int) -> None:
    memory, room = [2.0, 3.0, 4.0, 1.0], [5.0, 6.0]
    # On several GPUs equal start times leave the order of use open; the reference needs it only for switching.
    switching = gpus == 1
    table = [{**r, "ready_s": max(r["ready_s"], 1 / 16)} for r in rows]
    if not drop:
        table = [{**r, "latest_start_s": INF} for r in table]
    if not switching:
        table = [{**r, "load_s": 0.0} for r in table]
    resident = [[0, 1], [2]] if switching else None
    served, _ = serve(
        idle([gpus] * SERVERS, MODELS if switching else 0, resident),
        queued(table),
        memory=memory if switching else (),
        room=room,
    )
    tasks = [
        Task(0.0, 0.0, n, n, r["server"] + 1, r["ready_s"], r["service_s"], 0.0, r["latest_start_s"])
        for n, r in enumerate(table)
    ]
    tasks = [
        Task(**{**t.__dict__, "model": r["model"], "load_s": r["load_s"]}) for t, r in zip(tasks, table, strict=True)
    ]
    present = [n for n, r in enumerate(table) if r["present"]]
    records = simulate(
        [tasks[n] for n in present],
        [Server(gpus, room[0], (1, 0)), Server(gpus, room[1], (2,))],
        memory,
        switching=switching,
        drop=drop,
    )
    assert [bool(served.dropped[n]) for n in present] == [record.dropped for record in records]
    for n, record in zip(present, records, strict=True):
        if not record.dropped:
            expected = (record.start_s, record.end_s, record.switch_s)
            assert (served.start_s[n], served.end_s[n], served.switch_s[n]) == expected


def test_three_tasks_on_one_gpu_by_hand() -> None:
    # Ready 2.0, 0.5, 0.5 with service 1, 2, 4 behind a backlog of 1: the two of 0.5 go first, in row order.
    rows = queued([{"ready_s": 2.0}, {"ready_s": 0.5, "service_s": 2.0}, {"ready_s": 0.5, "service_s": 4.0}])
    served, free_s = one_gpu(jnp.array([1.0]), rows, INF)
    assert served.start_s.tolist() == [7.0, 1.0, 3.0]
    assert served.end_s.tolist() == [8.0, 3.0, 7.0]
    assert free_s.tolist() == [8.0]


def test_idle_server_starts_at_readiness_and_others_keep_their_backlog() -> None:
    served, free_s = one_gpu(jnp.array([0.0, 5.0]), queued([{"ready_s": 3.0, "service_s": 0.5}]), INF)
    assert (float(served.start_s[0]), float(served.end_s[0])) == (3.0, 3.5)
    assert free_s.tolist() == [3.5, 5.0]


def test_two_gpus_by_hand() -> None:
    # GPUs free at 0 and 2: the tasks of 3 s go to 0, 2, 3 and, when the second is free again, 5.
    servers = idle([2])._replace(free_s=jnp.array([[2.0, 0.0]]))
    served, after = serve(servers, queued([{"service_s": 3.0}] * 4))
    assert served.start_s.tolist() == [0.0, 2.0, 3.0, 5.0]
    assert sorted(after.free_s[0].tolist()) == [6.0, 8.0]


def test_absent_gpu_serves_nothing() -> None:
    served, after = serve(idle([1, 2]), queued([{"server": 0}] * 3 + [{"server": 1}] * 2))
    assert served.start_s.tolist() == [0.0, 1.0, 2.0, 0.0, 0.0]
    assert after.free_s.tolist() == [[3.0, INF], [1.0, 1.0]]


def test_least_recently_used_model_leaves() -> None:
    # Memory for two models; 0 and 1 resident. 0 hit, 2 in and 1 out (0 was used), 1 in and 0 out, 2 hit,
    # 0 in and 1 out.
    order = [0, 2, 1, 2, 0]
    rows = queued([{"ready_s": 1.0 + n, "service_s": 0.25, "model": m, "load_s": 0.5} for n, m in enumerate(order)])
    served, after = serve(idle([1], 3, [[0, 1]]), rows, memory=[1.0, 1.0, 1.0], room=[2.0])
    assert served.switch_s.tolist() == [0.0, 0.5, 0.5, 0.0, 0.5]
    assert served.end_s.tolist() == [1.25, 2.75, 3.75, 4.25, 5.75]
    assert after.resident.tolist() == [[True, False, True]]


def test_as_many_models_leave_as_the_new_one_needs() -> None:
    # 4 + 3 + 2 GB resident of 10; a model of 5 GB sends the two oldest away (0, then 1), the youngest stays.
    rows = queued([{"ready_s": float(n + 1), "service_s": 0.25, "model": n, "load_s": 1.0} for n in range(4)])
    servers = idle([1], 4, [[0, 1, 2]])
    served, after = serve(servers, rows, memory=[4.0, 3.0, 2.0, 5.0], room=[10.0])
    assert served.switch_s.tolist() == [0.0, 0.0, 0.0, 1.0]
    assert after.resident.tolist() == [[False, True, True, True]]
    _, after = serve(servers, rows, memory=[4.0, 3.0, 2.0, 5.0], room=[9.0])
    assert after.resident.tolist() == [[False, False, True, True]]


def test_gpus_of_a_server_share_the_loaded_model() -> None:
    rows = queued([{"ready_s": 1.0, "model": 1, "load_s": 2.0}, {"ready_s": 2.0, "model": 1, "load_s": 2.0}])
    served, _ = serve(idle([2], 2, [[0]]), rows, memory=[1.0, 1.0], room=[1.0])
    assert served.switch_s.tolist() == [2.0, 0.0]


def test_discarded_task_makes_room() -> None:
    # The second cannot start by 1 and is discarded, so the third starts at 2, as if it had not been there.
    rows = queued([{"service_s": 2.0}, {"service_s": 4.0, "latest_start_s": 1.0}, {"latest_start_s": 2.0}])
    served, after = serve(idle([1]), rows)
    assert served.dropped.tolist() == [False, True, False]
    assert served.start_s[2] == 2.0, "a start exactly at the latest time is in time"
    assert after.free_s.tolist() == [[3.0]]


def test_discarded_task_loads_no_model() -> None:
    rows = queued([{"service_s": 2.0}, {"model": 1, "load_s": 1.0, "latest_start_s": 1.0}, {"ready_s": 1.0}])
    served, after = serve(idle([1], 2, [[0]]), rows, memory=[1.0, 1.0], room=[1.0])
    assert served.dropped.tolist() == [False, True, False]
    assert served.switch_s.tolist() == [0.0, 0.0, 0.0]
    assert after.resident.tolist() == [[True, False]]


@pytest.mark.parametrize("absent", [0, 1, 3])
def test_only_rows_ready_before_the_horizon_are_committed(absent: int) -> None:
    rows = queued([{"ready_s": 0.25}, {"ready_s": 1.0, "service_s": 4.0}], 2 + absent)
    _, free_s = one_gpu(jnp.array([0.0]), rows, 1.0)
    assert free_s.tolist() == [1.25]
    served, after = serve(idle([1]), rows, 1.0)
    assert served.end_s[:2].tolist() == [1.25, 5.25], "all rows are projected to their end"
    assert after.free_s.tolist() == [[1.25]], "but only the first is final"


def test_model_of_an_upload_after_the_horizon_is_not_loaded_yet() -> None:
    rows = queued([{"ready_s": 0.25}, {"ready_s": 1.5, "model": 1, "load_s": 1.0}], 4)
    _, after = serve(idle([1], 2, [[0]]), rows, 1.0, memory=[1.0, 1.0], room=[1.0])
    assert after.resident.tolist() == [[True, False]]
    assert after.used_s.tolist() == [[0.25, 0.0]]


@settings(max_examples=60, deadline=None)
@given(rows_of_a_slot, sixteenths)
def test_two_slots_serve_as_one(rows: list[dict[str, Any]], horizon_s: float) -> None:
    """What is committed at a horizon, followed by the rest, is the whole."""
    memory, room = [2.0, 3.0, 4.0, 1.0], [5.0, 6.0]
    table, start = queued(rows), idle([2, 2], MODELS, [[0, 1], [2]])
    whole, whole_after = serve(start, table, memory=memory, room=room)
    first, between = serve(start, table, horizon_s, memory, room)
    late = table.present & (table.ready_s >= horizon_s)
    second, after = serve(between, table._replace(present=late), memory=memory, room=room)
    for name in Served._fields:
        joined = jnp.where(late, getattr(second, name), getattr(first, name))[table.present]
        np.testing.assert_array_equal(joined, getattr(whole, name)[table.present], name)
    np.testing.assert_array_equal(after.free_s, whole_after.free_s)
    np.testing.assert_array_equal(after.resident, whole_after.resident)


def test_local_queue_by_hand() -> None:
    present = jnp.array([True, True, False, True, True])
    device = jnp.array([3, 1, 3, 3, 1])
    backlog_s = jnp.array([1.0, 0.0, 1.0, 1.0, 0.0])
    service_s = jnp.array([2.0, 4.0, 8.0, 1.0, 1.0])
    served = on_device(present, device, backlog_s, service_s, None)
    assert served.start_s[jnp.array([0, 1, 3, 4])].tolist() == [1.0, 0.0, 3.0, 4.0]
    assert served.end_s[jnp.array([0, 1, 3, 4])].tolist() == [3.0, 4.0, 4.0, 5.0]
    latest_s = jnp.array([0.5, 9.0, 9.0, 1.0, 3.0])
    served = on_device(present, device, backlog_s, service_s, latest_s)
    assert served.dropped.tolist() == [True, False, False, False, True]
    assert served.start_s[3] == 1.0, "the discarded one in front leaves its place"


@settings(max_examples=100, deadline=None)
@given(rows_of_a_slot, st.booleans())
def test_local_queue_equals_the_event_driven_reference(rows: list[dict[str, Any]], drop: bool) -> None:
    """Servers are taken for devices here; their backlog is a task in front of all."""
    backlog_s = {0: 1.5, 1: 0.25}
    latest = [r["latest_start_s"] if drop else INF for r in rows]
    served = on_device(
        jnp.array([r["present"] for r in rows]),
        jnp.array([r["server"] for r in rows]),
        jnp.array([backlog_s[r["server"]] for r in rows]),
        jnp.array([r["service_s"] for r in rows]),
        jnp.array(latest) if drop else None,
    )
    ahead = [Task(0.0, 0.0, device - 2, device, 0, 0.0, wait_s, 0.0, INF) for device, wait_s in backlog_s.items()]
    present = [n for n, r in enumerate(rows) if r["present"]]
    tasks = [Task(0.0, 0.0, n, rows[n]["server"], 0, 0.0, rows[n]["service_s"], 0.0, latest[n]) for n in present]
    for n, record in zip(present, simulate(ahead + tasks, [], drop=drop)[2:], strict=True):
        assert bool(served.dropped[n]) == record.dropped
        if not record.dropped:
            assert (served.start_s[n], served.end_s[n]) == (record.start_s, record.end_s)


def waits_closed_form(ready_s: jax.Array, service_s: jax.Array) -> jax.Array:
    """Waits of one long queue through `fifo_one_gpu`, in pieces of 250 tasks."""

    def piece(free_s: jax.Array, rows: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        served, free_s = fifo_one_gpu(free_s, _all_on_one(*rows), jnp.inf)
        return free_s, served.start_s - rows[0]

    pieces = (ready_s.reshape(-1, 250), service_s.reshape(-1, 250))
    return jax.lax.scan(piece, jnp.zeros(1), pieces)[1].reshape(-1)


def waits_recursion(gpus: int) -> Callable[[jax.Array, jax.Array], jax.Array]:
    def waits(ready_s: jax.Array, service_s: jax.Array) -> jax.Array:
        served, _ = fifo_many_gpus(idle([gpus]), _all_on_one(ready_s, service_s), jnp.inf, jnp.zeros(0), jnp.ones(1))
        return served.start_s - ready_s

    return waits


def _all_on_one(ready_s: jax.Array, service_s: jax.Array) -> Queued:
    zero = jnp.zeros_like(ready_s)
    index = zero.astype(int)
    return Queued(zero == 0, index, ready_s, service_s, index, zero, zero + jnp.inf)


def erlang_c_wait(load: float, servers: int, service_s: float) -> float:
    """Mean wait of M/M/c (Erlang C), `load` per server."""
    offered = load * servers
    tail = offered**servers / math.factorial(servers) / (1 - load)
    waits = tail / (sum(offered**k / math.factorial(k) for k in range(servers)) + tail)
    return waits * service_s / (servers * (1 - load))


@pytest.mark.parametrize(
    ("waits", "gpus", "law", "expected_s"),
    [
        (waits_closed_form, 1, "exponential", 0.7 / 0.3),
        (waits_closed_form, 1, "constant", 0.7 / 0.6),
        (waits_recursion(1), 1, "exponential", 0.7 / 0.3),
        (waits_recursion(3), 3, "exponential", erlang_c_wait(0.7, 3, 1.0)),
    ],
    ids=["M/M/1", "M/D/1", "M/M/1-recursion", "M/M/3"],
)
def test_mean_wait_is_that_of_theory(waits: Any, gpus: int, law: str, expected_s: float) -> None:
    replications, tasks, warmup = 24, 8000, 500
    draw = np.random.default_rng(20)
    ready_s = np.cumsum(draw.exponential(1 / (0.7 * gpus), (replications, tasks)), axis=1)
    service_s = draw.exponential(1.0, (replications, tasks)) if law == "exponential" else np.ones((replications, tasks))
    with jax.enable_x64(True):
        measured_s = jax.jit(jax.vmap(waits))(jnp.asarray(ready_s), jnp.asarray(service_s))
    means_s = np.asarray(measured_s)[:, warmup:].mean(axis=1)
    error_s = means_s.std(ddof=1) / math.sqrt(replications)
    assert error_s < 0.03 * expected_s, "too little to say anything"
    assert abs(means_s.mean() - expected_s) < 3.5 * error_s
