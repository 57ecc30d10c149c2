"""Gangs: an event-driven reference in plain Python, the run times of EAT, hand-computed queues, and their limits."""

import heapq
import math
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from drawn_times import times
from gmel.physics.gang import GangQueued, GangServers, fifo_gangs
from gmel.physics.queueing import Queued, Served, Servers, fifo_many_gpus, fifo_one_gpu

ROWS, GPUS, MODELS = 8, (4, 3), 2
INF = math.inf

# One program for all examples of a shape.
gangs = jax.jit(fifo_gangs)
many_gpus = jax.jit(fifo_many_gpus)
one_gpu = jax.jit(fifo_one_gpu)

Row = dict[str, Any]
Groups = dict[frozenset[int], int]
BLANK: Row = {
    "present": True,
    "server": 0,
    "ready_s": 0.0,
    "service_s": 1.0,
    "gpus": 1,
    "model": 0,
    "load_s": 0.0,
    "latest_start_s": INF,
}


def queued(rows: list[Row]) -> GangQueued:
    """Rows with only what matters said."""
    return GangQueued(**{name: jnp.array([(BLANK | row)[name] for row in rows]) for name in GangQueued._fields})


@dataclass
class Machine:
    """A server of the reference: when its GPUs are free, its loaded groups, and when the last task starts."""

    free_s: list[float]
    groups: Groups = field(default_factory=dict)
    head_s: float = 0.0


@dataclass
class Fate:
    start_s: float = math.nan
    switch_s: float = math.nan
    end_s: float = math.nan
    dropped: bool = False


def state(machines: list[Machine]) -> GangServers:
    width = max(len(machine.free_s) for machine in machines)
    free_s = np.full((len(machines), width), INF)
    group = np.full((len(machines), width), -1, np.int32)
    model = group.copy()
    for number, machine in enumerate(machines):
        free_s[number, : len(machine.free_s)] = machine.free_s
        for members, held in machine.groups.items():
            group[number, list(members)] = min(members)
            model[number, list(members)] = held
    head_s = np.array([machine.head_s for machine in machines])
    return GangServers(jnp.asarray(free_s), jnp.asarray(head_s), jnp.asarray(group), jnp.asarray(model))


def idle(*gpus: int, groups: Groups | None = None) -> GangServers:
    """Servers with so many idle GPUs; `groups` are loaded on the first."""
    return state([Machine([0.0] * count, (groups or {}) if n == 0 else {}) for n, count in enumerate(gpus)])


def groups_of(servers: GangServers, server: int = 0) -> Groups:
    """The loaded groups of a server; each is named by its lowest GPU and holds one model."""
    group, model = np.asarray(servers.group[server]), np.asarray(servers.group_model[server])
    found: Groups = {}
    for name in sorted(set(group.tolist()) - {-1}):
        members = frozenset(np.flatnonzero(group == name).tolist())
        assert min(members) == name
        assert len({int(model[gpu]) for gpu in members}) == 1
        found[members] = int(model[name])
    assert (model[group == -1] == -1).all()
    return found


def one_server(machine: Machine, rows: dict[int, Row]) -> dict[int, Fate]:
    """The rules of `physics/gang.py` for one server, event by event; the machine is left as the rows leave it."""
    fates = {number: Fate() for number in rows}
    queue = deque(sorted(rows, key=lambda number: (rows[number]["ready_s"], number)))
    events = [machine.head_s, *machine.free_s, *(row["ready_s"] for row in rows.values())]
    heapq.heapify(events)
    while queue:
        now = heapq.heappop(events)
        while queue and now >= max(machine.head_s, rows[queue[0]]["ready_s"]):
            row, fate = rows[queue[0]], fates[queue[0]]
            free_in_time = sum(free_s <= row["latest_start_s"] for free_s in machine.free_s)
            in_time = now <= row["latest_start_s"] and free_in_time >= row["gpus"]
            if not (1 <= row["gpus"] <= len(machine.free_s) and in_time):
                fate.dropped = True
            elif sum(free_s <= now for free_s in machine.free_s) < row["gpus"]:
                break
            else:
                fate.start_s = machine.head_s = now
                members, warm = choose(machine, now, row)
                fate.switch_s = 0.0 if warm else row["load_s"]
                fate.end_s = now + fate.switch_s + row["service_s"]
                kept = {group: model for group, model in machine.groups.items() if not group & members}
                machine.groups = {**kept, members: row["model"]}
                for gpu in members:
                    machine.free_s[gpu] = fate.end_s
                heapq.heappush(events, fate.end_s)
            queue.popleft()
    return fates


def choose(machine: Machine, now: float, row: Row) -> tuple[frozenset[int], bool]:
    """The GPUs that a task takes, and whether they are warm."""
    available = {gpu for gpu, free_s in enumerate(machine.free_s) if free_s <= now}
    loaded = [
        (max(machine.free_s[gpu] for gpu in group), min(group), group)
        for group, model in machine.groups.items()
        if len(group) == row["gpus"] and model == row["model"] and group <= available
    ]
    if loaded:
        return min(loaded)[2], True
    grouped = set().union(*machine.groups)
    ranked = sorted(available, key=lambda gpu: (gpu in grouped, machine.free_s[gpu], gpu))
    return frozenset(ranked[: row["gpus"]]), False


row_of_a_slot = st.fixed_dictionaries(
    {
        "present": st.sampled_from([True, True, True, False]),
        "server": st.integers(0, len(GPUS) - 1),
        "ready_s": times(0, 8),
        "service_s": times(0.0625, 4),
        "gpus": st.sampled_from([1, 1, 1, 2, 2, 2, 3, 3, 4, 0, 5]),
        "model": st.integers(0, MODELS - 1),
        "load_s": times(0, 4),
        "latest_start_s": times(2, 12) | st.just(INF),
    }
)
rows_of_a_slot = st.lists(row_of_a_slot, min_size=ROWS, max_size=ROWS)


@st.composite
def machine(draw: st.DrawFn, gpus: int) -> Machine:
    """A server in the middle of its work, with any groups."""
    names = draw(st.lists(st.integers(-1, 2), min_size=gpus, max_size=gpus))
    members = [frozenset(gpu for gpu in range(gpus) if names[gpu] == name) for name in range(3)]
    return Machine(
        free_s=draw(st.lists(times(0, 3), min_size=gpus, max_size=gpus)),
        groups={group: draw(st.integers(0, MODELS - 1)) for group in members if group},
        head_s=draw(times(0, 2)),
    )


machines = st.tuples(*(machine(gpus) for gpus in GPUS)).map(list)


@settings(max_examples=200, deadline=None)
@given(machines, rows_of_a_slot, times(1, 8))
def test_every_task_agrees_with_plain_python(start: list[Machine], rows: list[Row], horizon_s: float) -> None:
    with jax.enable_x64(True):
        served, after = jax.device_get(gangs(state(start), queued(rows), horizon_s))
    for server, begun in enumerate(start):
        whole = Machine(list(begun.free_s), dict(begun.groups), begun.head_s)
        own = {number: row for number, row in enumerate(rows) if row["present"] and row["server"] == server}
        for number, fate in one_server(whole, own).items():
            assert served.dropped[number] == fate.dropped
            if not fate.dropped:
                found = (served.start_s[number], served.switch_s[number], served.end_s[number])
                assert found == (fate.start_s, fate.switch_s, fate.end_s)
        # The state counts those ready before the horizon.
        one_server(begun, {number: row for number, row in own.items() if row["ready_s"] < horizon_s})
        assert after.free_s[server].tolist() == begun.free_s + [INF] * (max(GPUS) - len(begun.free_s))
        assert after.head_s[server] == begun.head_s
        assert groups_of(after, server) == begun.groups


@settings(max_examples=60, deadline=None)
@given(machines, rows_of_a_slot, times(1, 8))
def test_two_slots_serve_as_one(start: list[Machine], rows: list[Row], horizon_s: float) -> None:
    """What is committed at a horizon, followed by the rest, is the whole."""
    with jax.enable_x64(True):
        table = queued(rows)
        whole, whole_after = gangs(state(start), table, INF)
        first, between = gangs(state(start), table, horizon_s)
        late = table.present & (table.ready_s >= horizon_s)
        second, after = gangs(between, table._replace(present=late), INF)
        for name in Served._fields:
            joined = jnp.where(late, getattr(second, name), getattr(first, name))[table.present]
            np.testing.assert_array_equal(joined, getattr(whole, name)[table.present], name)
    for name in GangServers._fields:
        np.testing.assert_array_equal(getattr(after, name), getattr(whole_after, name), name)


@settings(max_examples=25, deadline=None)
@given(machines, rows_of_a_slot)
def test_labels_of_the_servers_do_not_matter(start: list[Machine], rows: list[Row]) -> None:
    swapped = [{**row, "server": 1 - row["server"]} for row in rows]
    with jax.enable_x64(True):
        served, after = gangs(state(start), queued(rows), 4.0)
        mirrored, mirrored_after = gangs(state(start[::-1]), queued(swapped), 4.0)
    present = np.array([row["present"] for row in rows])
    for name in Served._fields:
        np.testing.assert_array_equal(getattr(served, name)[present], getattr(mirrored, name)[present], name)
    for name in GangServers._fields:
        np.testing.assert_array_equal(getattr(after, name), getattr(mirrored_after, name)[::-1], name)


@settings(max_examples=3, deadline=None)
@given(machines, rows_of_a_slot, machines, rows_of_a_slot)
def test_alone_compiled_and_among_others_is_the_same(
    start: list[Machine], rows: list[Row], other: list[Machine], more: list[Row]
) -> None:
    plain = fifo_gangs(state(start), queued(rows), 4.0)
    both = jax.tree.map(lambda *leaves: jnp.stack(leaves), (state(start), queued(rows)), (state(other), queued(more)))
    batched = jax.tree.map(lambda leaf: leaf[0], jax.vmap(gangs, in_axes=(0, 0, None))(*both, 4.0))
    for one, *others in zip(
        *map(jax.tree.leaves, (plain, gangs(state(start), queued(rows), 4.0), batched)), strict=True
    ):
        for leaf in others:
            np.testing.assert_array_equal(one, leaf)


@settings(max_examples=40, deadline=None)
@given(rows_of_a_slot, st.lists(times(0, 3), min_size=3, max_size=3))
def test_single_gpus_without_load_times_are_an_ordinary_queue(rows: list[Row], free_s: list[float]) -> None:
    with jax.enable_x64(True):
        table = queued([{**row, "server": 0, "gpus": 1, "load_s": 0.0} for row in rows])
        start = state([Machine(free_s)])
        served, after = gangs(start, table, INF)
        ordinary = Queued(**{name: getattr(table, name) for name in Queued._fields})
        plain = Servers(start.free_s, jnp.zeros((1, 0), bool), jnp.zeros((1, 0)))
        expected, expected_after = many_gpus(plain, ordinary, INF, jnp.zeros(0), jnp.ones(1))
    for name in Served._fields:
        np.testing.assert_array_equal(
            getattr(served, name)[table.present], getattr(expected, name)[table.present], name
        )
    # A warm start may leave another GPU idle, but none that a later task could tell apart.
    head_s = float(after.head_s[0])
    assert sorted(np.maximum(after.free_s[0], head_s)) == sorted(np.maximum(expected_after.free_s[0], head_s))


@settings(max_examples=40, deadline=None)
@given(rows_of_a_slot, times(0, 3))
def test_tasks_that_need_all_gpus_are_served_as_on_one(rows: list[Row], free_s: float) -> None:
    with jax.enable_x64(True):
        table = queued([{**row, "server": 0, "gpus": 3, "load_s": 0.0, "latest_start_s": INF} for row in rows])
        served, after = gangs(state([Machine([free_s] * 3)]), table, INF)
        ordinary = Queued(**{name: getattr(table, name) for name in Queued._fields})
        expected, expected_free_s = one_gpu(jnp.array([free_s]), ordinary, INF)
    np.testing.assert_allclose(served.end_s[table.present], expected.end_s[table.present], rtol=0, atol=1e-12)
    np.testing.assert_allclose(after.free_s[0], np.repeat(expected_free_s, 3), rtol=0, atol=1e-12)


# EAT (2507.10026): seconds per step and of a cold start, by the GPUs of a task.
EAT = {1: (0.315, 24.0), 2: (0.15625, 24.0), 4: (0.14, 32.0), 8: (0.1, 30.0)}


@pytest.mark.parametrize(("gpus", "warm_s"), [(1, 9.45), (2, 4.69), (4, 4.20), (8, 3.00)])
def test_thirty_steps_of_eat(gpus: int, warm_s: float) -> None:
    step_s, load_s = EAT[gpus]
    row = {"gpus": gpus, "service_s": 30 * step_s, "load_s": load_s}
    served, after = gangs(idle(8), queued([row, {**row, "ready_s": 100.0}]), INF)
    np.testing.assert_allclose(served.end_s - jnp.array([0.0, 100.0]), [load_s + warm_s, warm_s], rtol=0, atol=0.005)
    assert served.switch_s.tolist() == [load_s, 0.0]
    assert groups_of(after) == {frozenset(range(gpus)): 0}


def test_a_group_serves_its_own_size_and_model_warm() -> None:
    # GPUs 0 and 1 hold model 0. Warm for two GPUs of it; its other size and another model go to GPUs 2 and 3.
    pair = {frozenset({0, 1}): 0}
    rows = [{"gpus": 2, "load_s": 5.0}, {"gpus": 1, "load_s": 5.0}, {"gpus": 1, "model": 1, "load_s": 5.0}]
    served, after = gangs(idle(4, groups=pair), queued(rows), INF)
    assert served.start_s.tolist() == [0.0, 0.0, 0.0]
    assert served.switch_s.tolist() == [0.0, 5.0, 5.0]
    assert groups_of(after) == {frozenset({0, 1}): 0, frozenset({2}): 0, frozenset({3}): 1}


@pytest.mark.parametrize("change", [{"model": 1}, {"gpus": 3}, {"gpus": 1}])
def test_a_group_that_loses_a_gpu_is_no_longer_loaded(change: Row) -> None:
    # Whoever takes a GPU of the pair {0, 1} for another model or size leaves the other bare.
    pair = {frozenset({0, 1}): 0}
    busy = {"gpus": 2, "model": 1, "service_s": 50.0}
    task = {"gpus": 2, "ready_s": 1.0, "load_s": 4.0}
    other = {**task, **change, "ready_s": 0.5, "load_s": 0.25, "service_s": 0.125}
    if other["gpus"] == 3:
        served, after = gangs(idle(3, groups=pair), queued([other, task]), INF)
        assert groups_of(after) == {frozenset({0, 1}): 0}
    else:
        # The other two GPUs are busy, so the task must take what the pair holds.
        served, after = gangs(idle(4, groups=pair), queued([busy, other, task]), INF)
        assert groups_of(after) == {frozenset({0, 1}): 0, frozenset({2, 3}): 1}
    assert served.start_s[-1] == 1.0
    assert served.switch_s[-1] == 4.0, "the group is loaded again"


def test_partial_overlap_by_hand() -> None:
    # Pairs {0, 1} and {2, 3} hold model 0. Three GPUs take 0, 1, 2 (all in groups, by number) and leave 3 bare; of
    # the next pair 3 is outside any group and goes first, then 0, which leaves 1 and 2 bare.
    pairs = {frozenset({0, 1}): 0, frozenset({2, 3}): 0}
    rows = [{"gpus": 3, "load_s": 1.0}, {"gpus": 2, "ready_s": 3.0, "load_s": 1.0}]
    served, after = gangs(idle(4, groups=pairs), queued(rows[:1]), INF)
    assert groups_of(after) == {frozenset({0, 1, 2}): 0}
    served, after = gangs(idle(4, groups=pairs), queued(rows), INF)
    assert served.switch_s.tolist() == [1.0, 1.0]
    assert groups_of(after) == {frozenset({0, 3}): 0}
    assert after.free_s.tolist() == [[5.0, 2.0, 2.0, 5.0]]


def test_no_task_waits_to_start_warm() -> None:
    # The warm group is busy until 2, two other GPUs are idle: cold at once, though warm would have ended sooner.
    busy = state([Machine([2.0, 2.0, 0.0, 0.0], {frozenset({0, 1}): 0})])
    served, _ = gangs(busy, queued([{"gpus": 2, "load_s": 10.0}]), INF)
    assert (float(served.start_s[0]), float(served.switch_s[0])) == (0.0, 10.0)


def test_cold_start_takes_bare_gpus_and_those_free_for_longest() -> None:
    # GPU 0 is in a group and free first; 1, 2, 3 are bare and free since 3, 1, 1.
    start = state([Machine([0.0, 3.0, 1.0, 1.0], {frozenset({0}): 1})])
    for gpus, taken in [(1, {2}), (2, {2, 3}), (3, {1, 2, 3}), (4, {0, 1, 2, 3})]:
        _, after = gangs(start, queued([{"ready_s": 4.0, "gpus": gpus}]), INF)
        expected = {frozenset(taken): 0} | ({frozenset({0}): 1} if gpus < 4 else {})
        assert groups_of(after) == expected


def test_of_two_warm_groups_the_one_free_for_longest_serves() -> None:
    start = state([Machine([2.0, 2.0, 1.0, 1.0], {frozenset({0, 1}): 0, frozenset({2, 3}): 0})])
    _, after = gangs(start, queued([{"ready_s": 3.0, "gpus": 2}]), INF)
    assert after.free_s.tolist() == [[2.0, 2.0, 4.0, 4.0]]


def test_no_task_overtakes_the_head_of_the_queue() -> None:
    # One of two GPUs is busy until 10. The pair waits for it, and the single behind it waits with it.
    start = state([Machine([10.0, 0.0])])
    rows = [{"gpus": 2, "ready_s": 1.0}, {"ready_s": 2.0}]
    served, _ = gangs(start, queued(rows), INF)
    assert served.start_s.tolist() == [10.0, 11.0]
    # The pair starts warm on 1 and 2, free at 10; the single behind it may use 0, idle all the time, from then on and
    # not before, also when it comes in a later slot.
    start = state([Machine([0.0, 10.0, 10.0], {frozenset({1, 2}): 0})])
    rows = [{"gpus": 2, "ready_s": 1.0}, {"ready_s": 2.0}]
    served, _ = gangs(start, queued(rows), INF)
    assert served.start_s.tolist() == [10.0, 10.0]
    _, between = gangs(start, queued(rows), 2.0)
    assert between.free_s.tolist() == [[0.0, 11.0, 11.0]]
    later, _ = gangs(between, queued(rows[1:]), INF)
    assert later.start_s.tolist() == [10.0]


def test_discarded_task_holds_nobody_back_and_breaks_no_group() -> None:
    start = state([Machine([4.0, 0.0], {frozenset({1}): 0})])
    rows = [{"gpus": 2, "model": 1, "load_s": 1.0, "latest_start_s": 3.0}, {"load_s": 1.0}]
    served, after = gangs(start, queued(rows), INF)
    assert served.dropped.tolist() == [True, False]
    assert served.start_s[1] == 0.0
    assert served.switch_s.tolist() == [0.0, 0.0]
    assert groups_of(after) == {frozenset({1}): 0}
    served, _ = gangs(start, queued([{"gpus": 2, "latest_start_s": 4.0}]), INF)
    assert not served.dropped[0], "a start exactly at the latest time is in time"


@pytest.mark.parametrize("gpus", [-1, 0, 3, 100])
def test_task_of_a_size_that_the_server_has_not_is_discarded_at_once(gpus: int) -> None:
    served, after = gangs(idle(2, 4), queued([{"gpus": gpus, "ready_s": 0.5}, {"gpus": 2, "ready_s": 1.0}]), INF)
    assert served.dropped.tolist() == [True, False]
    assert served.start_s.tolist() == [0.5, 1.0]
    assert np.isfinite(served.end_s).all()
    assert after.free_s.tolist() == [[2.0, 2.0, INF, INF], [0.0] * 4]


def test_only_rows_ready_before_the_horizon_are_committed() -> None:
    rows = queued([{"gpus": 2, "ready_s": 0.25}, {"gpus": 2, "ready_s": 1.0, "model": 1}])
    served, after = gangs(idle(2), rows, 1.0)
    assert served.end_s.tolist() == [1.25, 2.25], "all rows are projected to their end"
    assert after.free_s.tolist() == [[1.25, 1.25]], "but only the first is final"
    assert groups_of(after) == {frozenset({0, 1}): 0}
