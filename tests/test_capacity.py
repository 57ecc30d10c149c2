"""Capacity instead of a queue: an event-driven reference, cases by hand, closed forms, and the figures of AGOD."""

import heapq
import math
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from drawn_times import times
from gmel.physics.capacity import Hosted, Hosting, host

ROWS, SERVERS = 8, 2
INF = math.inf
Mode = Literal["crash", "reject"]
MODES: tuple[Mode, ...] = ("crash", "reject")

# One program for all examples of a shape.
hosted = jax.jit(host, static_argnames="on_overload")

Row = dict[str, Any]
BLANK: Row = {
    "present": True,
    "server": 0,
    "ready_s": 0.0,
    "units": 1.0,
    "service_s": 1.0,
    "running": False,
    "start_s": 0.0,
}


def table(rows: list[Row]) -> Hosting:
    """Rows with only what matters said."""
    return Hosting(**{name: jnp.array([(BLANK | row)[name] for row in rows]) for name in Hosting._fields})


@dataclass
class Fate:
    start_s: float
    end_s: float = math.nan
    lost: bool = False
    caused: bool = False
    at_horizon: bool = False


def one_server(rows: dict[int, Row], capacity: float, horizon_s: float, on_overload: Mode) -> dict[int, Fate]:
    """The rules of `physics/capacity.py` for one server, event by event."""
    fates = {n: Fate(row["start_s"] if row["running"] else row["ready_s"]) for n, row in rows.items()}
    running = {n for n, row in rows.items() if row["running"]}
    leaves, comes = 0, 1  # of equal times those who leave go first
    events = [(fates[n].start_s + rows[n]["service_s"], leaves, n) for n in running]
    events += [(rows[n]["ready_s"], comes, n) for n in rows if n not in running]
    heapq.heapify(events)
    passed = False
    while events:
        now, what, n = heapq.heappop(events)
        if not passed and (now, what) >= (horizon_s, comes):
            passed = True
            for k in running:
                fates[k].at_horizon = True
        if what == leaves:
            if n in running:
                running.remove(n)
                fates[n].end_s = now
        elif sum(rows[k]["units"] for k in running) + rows[n]["units"] <= capacity:
            running.add(n)
            heapq.heappush(events, (now + rows[n]["service_s"], leaves, n))
        else:
            fates[n].caused = True
            victims = {n} | (running if on_overload == "crash" else set())
            for k in victims:
                fates[k].lost, fates[k].end_s = True, now
            running -= victims
    return fates


row_of_a_slot = st.fixed_dictionaries(
    {
        "present": st.sampled_from([True, True, True, False]),
        "server": st.integers(0, SERVERS - 1),
        "ready_s": times(0, 4),
        "units": st.sampled_from([0.0, 1.0, 1.0, 2.0, 2.0, 3.0, 4.5, 7.0]),
        "service_s": times(0, 6),
        "running": st.sampled_from([False, False, True]),
        "start_s": times(-4, 0),
    }
)
rows_of_a_slot = st.lists(row_of_a_slot, min_size=ROWS, max_size=ROWS)
capacities = st.lists(st.sampled_from([2.0, 4.0, 6.5]), min_size=SERVERS, max_size=SERVERS)


@pytest.mark.parametrize("mode", MODES)
@settings(max_examples=150, deadline=None)
@given(rows=rows_of_a_slot, capacity=capacities, horizon_s=times(0.0625, 4))
def test_every_task_agrees_with_plain_python(
    mode: Mode, rows: list[Row], capacity: list[float], horizon_s: float
) -> None:
    with jax.enable_x64(True):
        found = jax.device_get(hosted(table(rows), jnp.array(capacity), horizon_s, mode))
    for server in range(SERVERS):
        own = {n: row for n, row in enumerate(rows) if row["present"] and row["server"] == server}
        for n, fate in one_server(own, capacity[server], horizon_s, mode).items():
            assert (found.start_s[n], found.end_s[n]) == (fate.start_s, fate.end_s)
            assert (found.lost[n], found.caused[n], found.running[n]) == (fate.lost, fate.caused, fate.at_horizon)
            if fate.lost:
                share = (fate.end_s - fate.start_s) / (own[n]["service_s"] or 1.0)
                np.testing.assert_allclose(found.progress[n], share, rtol=0, atol=1e-12)
            else:
                assert found.progress[n] == 1.0
    absent = [n for n, row in enumerate(rows) if not row["present"]]
    assert not (found.lost | found.caused | found.running)[absent].any()
    assert all(np.isfinite(field).all() for field in found)


@pytest.mark.parametrize("mode", MODES)
@settings(max_examples=60, deadline=None)
@given(rows=rows_of_a_slot, capacity=capacities, horizon_s=times(0.0625, 4))
def test_two_slots_hold_the_tasks_as_one(mode: Mode, rows: list[Row], capacity: list[float], horizon_s: float) -> None:
    """What runs at a horizon, carried on beside the rest, ends as it would have without the border."""
    with jax.enable_x64(True):
        tasks, room = table(rows), jnp.array(capacity)
        whole = hosted(tasks, room, INF, mode)
        first = hosted(tasks, room, horizon_s, mode)
        coming = tasks.present & ~tasks.running & (tasks.ready_s >= horizon_s)
        carried = tasks._replace(present=first.running | coming, running=first.running, start_s=first.start_s)
        second = hosted(carried, room, INF, mode)
        later = hosted(carried, room, horizon_s, mode)
    for name in ("start_s", "end_s", "lost", "caused", "progress"):
        joined = jnp.where(carried.present, getattr(second, name), getattr(first, name))[tasks.present]
        np.testing.assert_array_equal(joined, getattr(whole, name)[tasks.present], name)
    np.testing.assert_array_equal(later.running, first.running, "nothing has happened between two slots")
    assert not second.running.any()


@pytest.mark.parametrize("mode", MODES)
@settings(max_examples=25, deadline=None)
@given(rows=rows_of_a_slot, capacity=capacities)
def test_labels_of_the_servers_do_not_matter(mode: Mode, rows: list[Row], capacity: list[float]) -> None:
    swapped = [{**row, "server": 1 - row["server"]} for row in rows]
    with jax.enable_x64(True):
        found = hosted(table(rows), jnp.array(capacity), 2.0, mode)
        mirrored = hosted(table(swapped), jnp.array(capacity[::-1]), 2.0, mode)
    for name in Hosted._fields:
        np.testing.assert_array_equal(getattr(found, name), getattr(mirrored, name), name)


@pytest.mark.parametrize("mode", MODES)
@settings(max_examples=3, deadline=None)
@given(rows=rows_of_a_slot, more=rows_of_a_slot, capacity=capacities)
def test_alone_compiled_and_among_others_is_the_same(
    mode: Mode, rows: list[Row], more: list[Row], capacity: list[float]
) -> None:
    room = jnp.array(capacity)
    plain = host(table(rows), room, 2.0, mode)
    both = jax.tree.map(lambda *leaves: jnp.stack(leaves), table(rows), table(more))
    batched = jax.vmap(lambda tasks: hosted(tasks, room, 2.0, mode))(both)
    compiled = hosted(table(rows), room, 2.0, mode)
    for name in Hosted._fields:
        np.testing.assert_array_equal(getattr(plain, name), getattr(compiled, name), name)
        np.testing.assert_array_equal(getattr(plain, name), getattr(batched, name)[0], name)


def test_crash_by_hand() -> None:
    # Room for 5. 2 + 3 run; at 2 another 1 does not fit: all three are lost, the first after half of its 4 s, the
    # second after a quarter of its 4 s. The server goes on at once, so 5 fit at 2.5.
    rows = [
        {"units": 2.0, "service_s": 4.0},
        {"units": 3.0, "service_s": 4.0, "ready_s": 1.0},
        {"units": 1.0, "service_s": 4.0, "ready_s": 2.0},
        {"units": 5.0, "service_s": 4.0, "ready_s": 2.5},
    ]
    found = hosted(table(rows), jnp.array([5.0]), 10.0)
    assert found.end_s.tolist() == [2.0, 2.0, 2.0, 6.5]
    assert found.lost.tolist() == [True, True, True, False]
    assert found.caused.tolist() == [False, False, True, False]
    assert found.progress.tolist() == [0.5, 0.25, 0.0, 1.0]


def test_rejection_by_hand() -> None:
    # As above, but the others stay; 5 do not fit at 2.5 either, 2 do at 4 exactly, when the first has left.
    rows = [
        {"units": 2.0, "service_s": 4.0},
        {"units": 3.0, "service_s": 4.0, "ready_s": 1.0},
        {"units": 1.0, "service_s": 4.0, "ready_s": 2.0},
        {"units": 5.0, "service_s": 4.0, "ready_s": 2.5},
        {"units": 2.0, "service_s": 4.0, "ready_s": 4.0},
    ]
    found = hosted(table(rows), jnp.array([5.0]), 10.0, "reject")
    assert found.end_s.tolist() == [4.0, 5.0, 2.0, 2.5, 8.0]
    assert found.lost.tolist() == found.caused.tolist() == [False, False, True, True, False]
    assert found.progress.tolist() == [1.0, 1.0, 0.0, 0.0, 1.0]


def test_other_servers_stand() -> None:
    rows = [{"server": 1, "service_s": 4.0}, {"units": 3.0, "ready_s": 1.0}]
    found = hosted(table(rows), jnp.array([2.0, 2.0]), 1.5)
    assert found.lost.tolist() == [False, True]
    assert found.running.tolist() == [True, False]


def test_task_accepted_earlier_takes_room_until_its_end() -> None:
    # It runs from -3 to 1: nothing fits beside it before, and it is lost after three and a half of its four seconds.
    before = {"units": 2.0, "service_s": 4.0, "running": True, "start_s": -3.0}
    found = hosted(table([before, {"ready_s": 1.0}]), jnp.array([2.0]), 4.0)
    assert found.end_s.tolist() == [1.0, 2.0]
    found = hosted(table([before, {"ready_s": 0.5}]), jnp.array([2.0]), 4.0)
    assert (found.end_s.tolist(), found.progress.tolist()) == ([0.5, 0.5], [0.875, 0.0])


def test_equal_arrivals_go_by_row() -> None:
    # 30 fit, the next crashes the server, the rest fit again. So many that an unstable sort would mix them.
    found = hosted(table([{}] * 40), jnp.array([30.0]), 4.0)
    assert np.flatnonzero(found.caused).tolist() == [30]
    assert np.flatnonzero(found.lost).tolist() == list(range(31))
    assert found.progress.tolist() == [0.0] * 31 + [1.0] * 9


def test_what_runs_at_the_horizon_is_decided_by_earlier_arrivals_only() -> None:
    # The second comes at the horizon, crashes the server and belongs to the next slot; a task that ends then is done.
    rows = [{"units": 2.0, "service_s": 4.0}, {"ready_s": 1.0}, {"server": 1}, {"server": 1, "ready_s": 3.0}]
    found = hosted(table(rows), jnp.array([2.0, 2.0]), 1.0)
    assert found.lost.tolist() == [True, True, False, False], "all rows are projected to their end"
    assert found.running.tolist() == [True, False, False, False], "but only the first has arrived and still runs"


def test_no_crash_where_all_fits() -> None:
    found = hosted(table([{"units": 1.0}] * 5), jnp.array([5.0]), 0.5)
    assert not found.lost.any()
    assert found.running.all()


def loss_system(units: np.ndarray, offered: np.ndarray, capacity: int) -> np.ndarray:
    """Share of each class that is rejected (Kaufman 1981, Roberts 1981); one class of one unit is Erlang's B."""
    weight = np.zeros(capacity + 1)
    weight[0] = 1.0
    for taken in range(1, capacity + 1):
        fits = units <= taken
        weight[taken] = np.sum(offered[fits] * units[fits] * weight[taken - units[fits]]) / taken
    weight /= weight.sum()
    return np.array([weight[capacity - unit + 1 :].sum() for unit in units])


def replicate(
    units: np.ndarray, rates: np.ndarray, law: str, capacity: float, mode: Mode
) -> tuple[np.ndarray, np.ndarray]:
    """Class of each task, and whether its arrival was one too many, of replications of a Poisson stream with a mean
    service of 1 s."""
    replications, count, warmup = 16, 2500, 100
    draw = np.random.default_rng(4)
    shape = (replications, count)
    ready_s = np.cumsum(draw.exponential(1 / rates.sum(), shape), axis=1)
    service_s = draw.exponential(1.0, shape) if law == "exponential" else np.ones(shape)
    kind = draw.choice(len(rates), shape, p=rates / rates.sum())
    with jax.enable_x64(True):
        rows = Hosting(
            present=jnp.ones(shape, bool),
            server=jnp.zeros(shape, jnp.int32),
            ready_s=jnp.asarray(ready_s),
            units=jnp.asarray(units[kind].astype(float)),
            service_s=jnp.asarray(service_s),
            running=jnp.zeros(shape, bool),
            start_s=jnp.zeros(shape),
        )
        room = jnp.array([float(capacity)])
        found = jax.jit(jax.vmap(lambda tasks: host(tasks, room, INF, mode)))(rows)
    return kind[:, warmup:], np.asarray(found.caused)[:, warmup:]


@pytest.mark.parametrize("law", ["exponential", "constant"])
def test_rejections_are_those_of_theory(law: str) -> None:
    """Two classes, one and three units; whatever the law of the service."""
    units, rates, capacity = np.array([1, 3]), np.array([4.0, 1.5]), 10
    kind, caused = replicate(units, rates, law, capacity, "reject")
    for number, expected in enumerate(loss_system(units, rates, capacity)):
        share = np.array([caused[n][kind[n] == number].mean() for n in range(len(kind))])
        error = share.std(ddof=1) / math.sqrt(len(share))
        assert error < 0.06 * expected, "too little to say anything"
        assert abs(share.mean() - expected) < 3.5 * error


@pytest.mark.parametrize("law", ["exponential", "constant"])
def test_crashes_of_a_server_for_one_task_are_those_of_theory(law: str) -> None:
    """The next arrival finds the task still there with p = 1 - E exp(-rate S); a cycle has 1 + p arrivals."""
    rate = 1.5
    meets = rate / (1 + rate) if law == "exponential" else 1 - math.exp(-rate)
    _, caused = replicate(np.array([1]), np.array([rate]), law, 1, "crash")
    share = caused.mean(axis=1)
    error = share.std(ddof=1) / math.sqrt(len(share))
    assert error < 0.03 * share.mean(), "too little to say anything"
    assert abs(share.mean() - meets / (1 + meets)) < 3.5 * error


# AGOD (2303.13052): 20 providers, about 1,000 tasks in 1e6 s, each of 100 to 250 denoising steps, which are its units.
PROVIDERS, IN_FLIGHT = 20, 80
# Mean and standard deviation of the reward of an episode, crashes in it: 30 seeds, providers drawn for each.
AGOD = {
    "random": (-87, 75, 98),
    "round robin": (251, 52, 41),
    "most room": (388, 36, 0),
    "best that fits": (557, 49, 0),
}


@dataclass
class Episodes:
    """Tasks and providers of episodes; absent tasks come after the last."""

    capacity: np.ndarray
    arrival_s: np.ndarray
    present: np.ndarray
    units: np.ndarray
    service_s: np.ndarray
    quality: np.ndarray
    """Of every task on every provider."""
    at_random: np.ndarray


def draw_episodes(seeds: int) -> Episodes:
    rng = np.random.default_rng(7)
    shape = (seeds, PROVIDERS)
    capacity = rng.choice(np.arange(400, 1000, 100), shape).astype(float)
    from_steps, from_quality = rng.choice(np.arange(0, 100, 10), shape), rng.choice(np.arange(0, 0.5, 0.05), shape)
    to_steps, to_quality = rng.choice(np.arange(150, 250, 10), shape), rng.choice(np.arange(0.5, 1, 0.05), shape)
    count = 1 + rng.poisson(1000, seeds)
    rows = count.max()
    present = np.arange(rows) < count[:, None]
    drawn_s = np.where(np.arange(rows) == 0, 0.0, rng.uniform(0, 1e6, (seeds, rows)))
    arrival_s = np.sort(np.where(present, drawn_s, 2e6), axis=1)
    steps = rng.choice(np.arange(100, 260, 10), (seeds, rows)).astype(float)
    # The released code starts the line at 0, not at `from_quality`.
    gain = (to_quality - from_quality)[:, None, :]
    line = (steps[:, :, None] - from_steps[:, None, :]) / (to_steps - from_steps)[:, None, :]
    return Episodes(
        capacity=capacity,
        arrival_s=arrival_s,
        present=present,
        units=steps,
        service_s=60 * (0.001 * steps**2 + 2.5 * steps - 14),
        quality=gain * np.clip(line, 0.0, 1.0),
        at_random=rng.integers(PROVIDERS, size=(seeds, rows)),
    )


def play(
    policy: jax.Array,
    capacity: jax.Array,
    arrival_s: jax.Array,
    units: jax.Array,
    service_s: jax.Array,
    quality: jax.Array,
    at_random: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """One episode, a slot from each arrival to the next: provider of every task, reward, and tasks in flight.

    Of `policy` the numbers are those of the names in `AGOD`.
    """
    slot_s = jnp.append(jnp.diff(arrival_s), 1.0)

    def decide(tasks: Hosting, task: Any) -> tuple[Hosting, Any]:
        number, until_s, size, length_s, worth, anything = task
        at = (tasks.server[:, None] == jnp.arange(PROVIDERS)[None, :]) & tasks.running[:, None]
        room = capacity - jnp.sum(jnp.where(at, tasks.units[:, None], 0.0), axis=0)
        best = jnp.argmax(jnp.where(size <= room, worth, 0.0))
        choice = jnp.stack([anything, number % PROVIDERS, jnp.argmax(room), best])[policy]
        new = jnp.arange(IN_FLIGHT) == jnp.argmin(tasks.running)
        tasks = Hosting(
            present=tasks.running | new,
            server=jnp.where(new, choice, tasks.server),
            ready_s=jnp.zeros(IN_FLIGHT),
            units=jnp.where(new, size, tasks.units),
            service_s=jnp.where(new, length_s, tasks.service_s),
            running=tasks.running,
            start_s=tasks.start_s,
        )
        found = host(tasks, capacity, until_s)
        crashed = jnp.any(found.caused)
        reward = jnp.where(crashed, -2 * jnp.sum(jnp.where(found.lost, 1 - found.progress, 0.0)), worth[choice])
        after = tasks._replace(running=found.running, start_s=found.start_s - until_s)
        return after, (choice, reward, jnp.sum(found.running))

    zero = jnp.zeros(IN_FLIGHT)
    nothing = jnp.zeros(IN_FLIGHT, bool)
    empty = Hosting(nothing, jnp.zeros(IN_FLIGHT, at_random.dtype), zero, zero, zero, nothing, zero)
    tasks = (jnp.arange(len(units)), slot_s, units, service_s, quality, at_random)
    return jax.lax.scan(decide, empty, tasks)[1]


@pytest.mark.slow
def test_rewards_of_agod() -> None:
    seeds = 30
    drawn = draw_episodes(seeds)
    with jax.enable_x64(True):
        arrays = [
            jnp.asarray(field)
            for field in (
                drawn.capacity,
                drawn.arrival_s,
                drawn.units,
                drawn.service_s,
                drawn.quality,
                drawn.at_random,
            )
        ]
        of_policies = jax.vmap(jax.vmap(play, in_axes=(None, *[0] * 6)), in_axes=(0, *[None] * 6))
        choice, reward, in_flight = jax.device_get(jax.jit(of_policies)(jnp.arange(len(AGOD)), *arrays))
        assert in_flight.max() < IN_FLIGHT

        # The whole episode at once, with these choices.
        capacity, arrival_s, units, service_s, *_ = arrays

        def whole(capacity: jax.Array, present: jax.Array, chosen: jax.Array, *row: jax.Array) -> Hosted:
            none = jnp.zeros_like(present)
            return host(Hosting(present, chosen, *row, none, jnp.zeros(len(present))), capacity, INF)

        episodes = jax.jit(jax.vmap(jax.vmap(whole), in_axes=(None, None, 0, None, None, None)))
        found = jax.device_get(
            episodes(capacity, jnp.asarray(drawn.present), jnp.asarray(choice), arrival_s, units, service_s)
        )
    reward = np.where(drawn.present, reward, 0.0).sum(axis=2)
    quality = np.take_along_axis(
        np.broadcast_to(drawn.quality, (len(AGOD), *drawn.quality.shape)), choice[..., None], 3
    )
    gained = np.where(drawn.present & ~found.caused, quality[..., 0], 0.0).sum(axis=2)
    penalty = 2 * np.where(found.lost, 1 - found.progress, 0.0).sum(axis=2)
    np.testing.assert_allclose(gained - penalty, reward, rtol=1e-9)
    crashes = found.caused.sum(axis=2)
    for n, (name, (mean, spread, crashed)) in enumerate(AGOD.items()):
        error = math.hypot(reward[n].std(ddof=1), spread) / math.sqrt(seeds)
        assert abs(reward[n].mean() - mean) < 3 * error, name
        assert 0.6 * spread < reward[n].std(ddof=1) < 1.7 * spread, name
        assert abs(crashes[n].mean() - crashed) <= 0.15 * crashed, name
