"""The environment: invariants of every run, hand-computed slots, what is seen, and the law of the traffic."""

import dataclasses
import math
from functools import cache
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

import compiled
from gmel.physics.random import seed_words
from gmel.simulator.environment import Environment, seeds
from gmel.simulator.state import Observation, Outcome, Requests, State, option, task
from gmel.simulator.traffic import next_requests
from small_plants import RADIO, small_plant

BUSY_SLOTS, DRAIN_SLOTS = 150, 60
REWARD = "latency = 1.5\nmiss = 0.5\nenergy = 0.25\nenergy_scale_j = 20.0\nclip = 2.0\ncooperation = 0.3"
EVERYTHING: dict[str, Any] = {
    "catalogue": True,
    "switching": True,
    "memory_gb": (10.0, 12.0, 24.0),
    "gpus": (2, 1, 3),
    "deadline": "drop",
    "deadline_s": (2.0, 6.0),
    "slot_s": 0.5,
    "arrivals": "load = 1.0",
    "tasks": "noise_sigma = 0.2",
    "radio": RADIO.replace('"none"', '"equal"').replace('"clip"', '"outage"').replace("false", "true"),
    "bandwidth_hz": 4e6,
    "max_uploads": 40,
    "max_per_slot": 10,
    "age": 2,
    "reward": REWARD,
}
PLAIN: dict[str, Any] = {"age": 2, "bandwidth_hz": 0.5e6, "reward": REWARD, "max_per_slot": 6, "max_uploads": 48}


@eqx.filter_jit
def step(environment: Environment, state: State, action: jax.Array, requests: Requests | None = None) -> Any:
    return environment.step(state, action, requests)


@cache
def environment_of(kind: str) -> Environment:
    return Environment.from_scenario(small_plant(**{"everything": EVERYTHING, "plain": PLAIN}[kind]))


@eqx.filter_jit
def episode(environment: Environment, seed: jax.Array, actions: jax.Array, busy: int) -> tuple[State, Any]:
    """Per slot: the state before the step, its reward and outcome, the aged and the fresh view before it."""

    def one_slot(state: State, action: jax.Array) -> tuple[State, Any]:
        present = state.requests.present & (state.slot < busy)
        state = state._replace(requests=state.requests._replace(present=present))
        after, reward, outcome = environment.step(state, action)
        return after, (state, reward, outcome, environment.observe(state), environment.observe(state, fresh=True))

    return jax.lax.scan(one_slot, environment.reset(seed), actions)


@cache
def run(kind: str, actions_seed: int = 1) -> tuple[State, Any]:
    """Random actions on a busy plant, then empty slots until everything is done; as host arrays."""
    environment = environment_of(kind)
    shape = (BUSY_SLOTS + DRAIN_SLOTS, environment.requests)
    actions = np.random.default_rng(actions_seed).integers(0, environment.servers + 1, shape, dtype=np.int32)
    seed = jnp.asarray(seed_words(3))
    return jax.device_get(episode(environment, seed, jnp.asarray(actions), jnp.int32(BUSY_SLOTS)))


def finals(outcome: Outcome) -> dict[str, np.ndarray]:
    """The records of a run as columns; times are absolute."""
    slot_s = EVERYTHING["slot_s"]
    at = np.nonzero(outcome.final)
    columns = {
        name: np.asarray(getattr(outcome, name))[at]
        for name in outcome._fields
        if np.shape(getattr(outcome, name)) == outcome.final.shape
    }
    columns |= {name: np.asarray(getattr(outcome.account, name), float)[at] for name in outcome.account._fields}
    for name in ("generated_s", "decided_s", "upload_start_s", "upload_end_s", "start_s", "end_s"):
        columns[name] = columns[name].astype(float) + at[0] * slot_s
    parts = ("wait_to_slot_s", "upload_s", "queue_s", "switch_s", "service_s", "download_s")
    columns["latency_s"] = sum(columns[name] for name in parts)
    return columns


def test_latency_parts_add_up() -> None:
    records = finals(run("everything")[1][2])
    served = ~records["dropped"]
    assert served.sum() > 300
    assert (~served).sum() > 10
    whole_s = records["end_s"] + records["download_s"] - records["generated_s"]
    np.testing.assert_allclose(records["latency_s"][served], whole_s[served], atol=1e-4)
    np.testing.assert_allclose(records["latency_s"][~served], records["deadline_s"][~served], atol=1e-5)
    for name in ("wait_to_slot_s", "upload_s", "queue_s", "switch_s", "service_s", "download_s", "energy_j"):
        assert records[name].min() >= -1e-5, name
    itself = records["option"] == 0
    for name in ("upload_s", "switch_s", "download_s"):
        assert not records[name][itself].any(), name


def test_tasks_are_conserved() -> None:
    last, (states, _, outcome, _, _) = run("everything")
    generated = np.cumsum(states.requests.present.sum(axis=1))
    final = np.cumsum(outcome.final.sum(axis=1))
    in_flight = np.append(states.uploads.present.sum(axis=1)[1:], last.uploads.present.sum())
    np.testing.assert_array_equal(generated, final + in_flight)
    assert in_flight.max() > 3
    assert in_flight[-1] == 0
    assert last.lost == 0
    keys = np.stack([outcome.decided_slot[outcome.final], outcome.row[outcome.final]])
    assert np.unique(keys, axis=1).shape == keys.shape


def test_work_is_conserved() -> None:
    """What is served is what was asked for, as fast as the chosen place is."""
    _, (states, _, outcome, _, _) = run("everything")
    records, requests = finals(outcome), states.requests
    speeds = np.array([0.5, 2.0, 3.0, 1.0])
    at = (records["decided_slot"], records["row"])
    asked = (requests.work * requests.noise)[at]
    served = ~records["dropped"]
    np.testing.assert_allclose((records["service_s"] * speeds[records["option"]])[served], asked[served], rtol=1e-5)
    assert not records["service_s"][~served].any()


def on_device(tree: Observation) -> Observation:
    """The observation as the package takes it, from arrays on the host."""
    return jax.tree.map(jnp.asarray, tree)


def test_no_gpu_idles_with_work_present() -> None:
    records = finals(run("everything")[1][2])
    checked = 0
    for server, gpus in enumerate(EVERYTHING["gpus"]):
        here = (records["option"] == server + 1) & ~records["dropped"]
        ready_s, start_s, end_s = (records[name][here] for name in ("upload_end_s", "start_s", "end_s"))
        for waits in np.nonzero(start_s > ready_s + 1e-2)[0]:
            for share in (0.01, 0.5, 0.99):
                now_s = ready_s[waits] + share * (start_s[waits] - ready_s[waits])
                near = np.abs(np.concatenate([start_s, end_s]) - now_s).min() < 1e-4
                if not near:
                    assert ((start_s <= now_s) & (now_s < end_s)).sum() == gpus
                    checked += 1
        # Ties in readiness (to rounding of absolute times) may stand in either order.
        order = np.lexsort((start_s, np.round(ready_s, 5)))
        assert (np.diff(start_s[order]) >= -1e-4).all(), "first in, first out"
    assert checked > 100


def cost_by_hand(records: dict[str, np.ndarray], requests_deadline_s: np.ndarray) -> np.ndarray:
    """Equation (15) with the weights of REWARD."""
    late = (records["latency_s"] > requests_deadline_s) | records["dropped"]
    latency = np.minimum(records["latency_s"] / requests_deadline_s, 2.0)
    return 1.5 * latency + 0.5 * late + 0.25 * records["energy_j"] / 20.0


@pytest.mark.parametrize("kind", ["plain", "everything"])
def test_team_reward_telescopes_to_the_cost_of_all_tasks(kind: str) -> None:
    last, (states, reward, outcome, _, _) = run(kind)
    assert last.lost == 0
    assert not last.uploads.present.any()
    records = finals(outcome)
    deadline_s = states.requests.deadline_s[records["decided_slot"], records["row"]]
    costs = cost_by_hand(records, deadline_s)
    assert costs.std() > 0.1
    assert -np.sum(reward.team, dtype=float) == pytest.approx(costs.sum(), rel=2e-5)
    # Overtaking must have happened, or the test is about nothing.
    assert abs(np.sum(reward.own, dtype=float) + costs.sum()) > 0.1


def test_mixed_reward_is_the_blend() -> None:
    _, (_, reward, _, _, _) = run("plain")
    np.testing.assert_allclose(reward.mixed, 0.7 * reward.own + 0.3 * reward.team[:, None], rtol=1e-5, atol=1e-5)


def table(environment: Environment, rows: list[dict[str, Any]]) -> Requests:
    """Explicit requests: each row says what matters, the others are absent."""
    links = np.ones(environment.servers)
    blank = dict.fromkeys(Requests._fields, 0.0) | {"noise": 1.0, "deadline_s": 6.0, "work": 1.0, "size_bit": 1e6}
    blank |= {"present": True, "device": 0, "model": 0, "fade": links, "outage_s": 0.0 * links}
    padding = [{**blank, "present": False}] * (environment.requests - len(rows))
    filled = [{**blank, **row} for row in rows] + padding
    return Requests(**{name: jnp.asarray(np.array([row[name] for row in filled])) for name in Requests._fields})


def start_with(environment: Environment, rows: list[dict[str, Any]], snr: float = 15.0) -> State:
    """An empty plant with given requests, every link with the same SNR: at 15, four bits per second and hertz."""
    state = compiled.reset(environment, jnp.asarray(seed_words(1)))
    links = jax.tree.map(lambda field: jnp.full_like(field, snr), state.links)
    return state._replace(links=links, requests=table(environment, rows))


def act(environment: Environment, *options: int) -> jax.Array:
    return jnp.array(list(options) + [0] * (environment.requests - len(options)), jnp.int32)


def test_energy_of_one_task_by_hand() -> None:
    # 0.5 MHz at 4 bit/s/Hz: 1 Mbit in 0.5 s. Server 1 (speed 3) runs 1.5 in 0.5 s. Generated 0.25 s before.
    environment = environment_of("plain")
    rows = [{"work": 1.5, "generated_s": -0.25}, {"work": 0.75, "device": 1, "generated_s": -0.5}]
    _, reward, outcome = step(environment, start_with(environment, rows), act(environment, 2, 0))
    at = environment.plant.switches.uploads
    account = outcome.account
    parts = [float(getattr(account, name)[at]) for name in account._fields[:-1]]
    assert parts == pytest.approx([0.25, 0.5, 0.0, 0.0, 0.5, 0.0], abs=1e-6)
    # 23 dBm for 0.5 s, 0.1 W idle for 0.5 s, 5 W of the server for 0.5 s.
    energy_j = 10**-0.7 * 0.5 + 0.1 * 0.5 + 5.0 * 0.5
    assert float(account.energy_j[at]) == pytest.approx(energy_j, rel=1e-5)
    # The other on its device of speed 0.5: 10 W for 1.5 s.
    assert float(account.energy_j[at + 1]) == pytest.approx(15.0, rel=1e-6)
    own = [1.5 * 1.25 / 6 + 0.25 * energy_j / 20, 1.5 * 2.0 / 6 + 0.25 * 15 / 20]
    np.testing.assert_allclose(reward.own[:2], [-cost for cost in own], rtol=1e-5)
    assert not np.asarray(reward.own[2:]).any()
    assert float(reward.team) == pytest.approx(-sum(own), rel=1e-5)


def test_equal_sharing_and_outage_by_hand() -> None:
    # 4 MHz by two sharers: 2 MHz each at log2(1 + 7.5 x 2) = 4 bit/s/Hz, so 0.8 Mbit take 0.1 s; one waits 0.75 s
    # before. The third is alone: log2(1 + 7.5) x 4 MHz. The outage does not count as sending.
    environment = environment_of("everything")
    outage_s = np.array([0.75, 0.0, 0.0])
    rows = [{"size_bit": 8e5}, {"size_bit": 8e5, "outage_s": outage_s}, {"size_bit": 8e5, "outage_s": outage_s}]
    state = start_with(environment, rows, snr=7.5)
    after, _, outcome = step(environment, state, act(environment, 1, 1, 2))
    at = environment.plant.switches.uploads
    alone_s = 0.2 / math.log2(8.5)
    np.testing.assert_allclose(outcome.upload_end_s[at : at + 3], [0.1, 0.85, alone_s], rtol=1e-5)
    np.testing.assert_allclose(outcome.upload_start_s[at : at + 3], [0.0, 0.75, 0.0])
    assert np.asarray(outcome.final[at : at + 3]).tolist() == [True, False, True]
    assert after.uploads.present.sum() == 1
    assert float(after.uploads.ready_s[0]) == pytest.approx(0.35, abs=1e-6)
    # While it is in flight it takes its share of the cell of server 0.
    crowd = after._replace(requests=table(environment, [{"size_bit": 8e5}]))
    _, _, outcome = step(environment, crowd, act(environment, 1))
    assert float(outcome.upload_end_s[at]) == pytest.approx(0.1, rel=1e-5)


def test_overtaken_upload_is_charged_to_who_overtook() -> None:
    # 2 bit/s/Hz x 0.5 MHz: 3 Mbit take 3 s to server 0 (speed 2) and its run 0.5 s. In the third slot a task of 1 s
    # comes with 0.5 Mbit, so it is there at 2.5 and holds the first back from 3 to 3.5.
    environment = environment_of("plain")
    first, fast = [{"size_bit": 3e6}], [{"size_bit": 0.5e6, "work": 2.0, "device": 1}]
    sending_w = 10**-0.7
    cost = 1.5 * 3.5 / 6 + 0.25 * (sending_w * 3.0 + 0.1 * 0.5 + 5 * 0.5) / 20
    fast_cost = 1.5 * 1.5 / 6 + 0.25 * (sending_w * 0.5 + 0.1 * 1.0 + 5 * 1.0) / 20
    delay_cost = 1.5 * 0.5 / 6 + 0.25 * 0.1 * 0.5 / 20
    expected = [(cost, cost), (0.0, 0.0), (fast_cost, fast_cost + delay_cost), (0.0, 0.0)]
    coming = [table(environment, rows) for rows in ([], fast, [], [])]
    state = start_with(environment, first, snr=3.0)
    for slot, (own_cost, team_cost) in enumerate(expected):
        if slot == 2:
            projection = compiled.project(environment, state, act(environment, 1))
            assert float(projection.latency_s[0]) == pytest.approx(1.5, abs=1e-5)
            assert float(projection.delay_s) == pytest.approx(0.5, abs=1e-5)
            assert float(projection.cost[0]) == pytest.approx(fast_cost, rel=1e-5)
            assert float(projection.delay_cost) == pytest.approx(delay_cost, rel=1e-4)
        state, reward, outcome = step(environment, state, act(environment, 1), coming[slot])
        assert -float(reward.own[0]) == pytest.approx(own_cost, abs=1e-5)
        assert -float(reward.team) == pytest.approx(team_cost, abs=1e-5)
    assert float(outcome.end_s[outcome.final][0]) == pytest.approx(1.0, abs=1e-5)


def test_own_reward_is_the_cost_where_nothing_overtakes() -> None:
    """One server alone, equal uploads: first decided is first there."""
    environment = environment_of("plain")
    state = start_with(environment, [])
    own, costs = 0.0, 0.0
    for _ in range(6):
        rows = [{"device": n, "size_bit": 3e6, "work": 1.0 + n} for n in range(3)]
        state = state._replace(requests=table(environment, rows))
        state, reward, outcome = step(environment, state, act(environment, 1, 1, 1))
        own += float(reward.own.sum())
        assert float(reward.team) == pytest.approx(float(reward.own.sum()), abs=1e-5)
        costs += cost_by_hand(records := finals(outcome_of(outcome)), records["deadline_s"]).sum()
    for _ in range(3):
        state = state._replace(requests=table(environment, []))
        state, reward, outcome = step(environment, state, act(environment))
        costs += cost_by_hand(records := finals(outcome_of(outcome)), records["deadline_s"]).sum()
        assert float(reward.team) == pytest.approx(0.0, abs=1e-5)
    assert not state.uploads.present.any()
    assert own == pytest.approx(-costs, rel=1e-5)


def outcome_of(outcome: Outcome) -> Outcome:
    """The outcome of one slot as a run of one slot, on the host."""
    return jax.tree.map(lambda field: np.asarray(field)[None], outcome)


def test_same_seed_same_run_and_other_seed_another() -> None:
    environment = environment_of("plain")
    actions = jnp.ones((BUSY_SLOTS + DRAIN_SLOTS, environment.requests), jnp.int32)
    runs = [episode(environment, jnp.asarray(seed_words(s)), actions, jnp.int32(BUSY_SLOTS)) for s in (11, 11, 12)]
    for first, second in zip(jax.tree.leaves(runs[0]), jax.tree.leaves(runs[1]), strict=True):
        np.testing.assert_array_equal(first, second)
    assert not np.array_equal(runs[0][1][0].requests.work, runs[2][1][0].requests.work)


def test_nothing_in_a_run_is_undefined() -> None:
    """Absent rows may hold any number, but no NaN: `jax_debug_nans` must stay usable."""
    undefined = [
        jax.tree_util.keystr(path)
        for path, leaf in jax.tree_util.tree_leaves_with_path(run("plain"))
        if np.isnan(leaf).any()
    ]
    assert not undefined


def test_traffic_does_not_depend_on_the_actions() -> None:
    """Common random numbers for all policies."""
    for kind in ("plain", "everything"):
        first, second = (run(kind, actions_seed)[1][0] for actions_seed in (1, 2))
        assert jax.tree.all(jax.tree.map(np.array_equal, first.requests, second.requests))
        assert jax.tree.all(jax.tree.map(np.array_equal, first.links, second.links))
        assert not np.array_equal(first.servers.free_s, second.servers.free_s)


def alike(first: Any, second: Any) -> None:
    for here, there in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        np.testing.assert_allclose(here, there, rtol=1e-5, atol=1e-5)


def test_parallel_environments_equal_single_ones() -> None:
    environment = environment_of("plain")
    many = seeds(40, 3)
    actions = jnp.asarray(np.random.default_rng(0).integers(0, 4, (12, environment.requests)), jnp.int32)

    def drive(seed: jax.Array) -> Any:
        def one_slot(state: State, action: jax.Array) -> Any:
            after, reward, outcome = environment.step(state, action)
            return after, (reward, outcome)

        return jax.lax.scan(one_slot, environment.reset(seed), actions)

    together = jax.device_get(jax.jit(jax.vmap(drive))(many))
    single = jax.jit(drive)
    for lane, seed in enumerate(many):
        alone = jax.device_get(single(seed))
        for here, there in zip(jax.tree.leaves(together), jax.tree.leaves(alone), strict=True):
            np.testing.assert_allclose(here[lane], there, rtol=1e-5, atol=1e-4)


def test_compiled_step_equals_the_interpreted_one() -> None:
    environment = environment_of("plain")
    state, action = compiled.reset(environment, jnp.asarray(seed_words(5))), act(environment, 1, 2, 1, 0, 3)
    alike(step(environment, state, action), environment.step(state, action))


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(-3, 9), min_size=6, max_size=6), st.integers(0, 6))
def test_actions_of_absent_rows_are_ignored(noise: list[int], present: int) -> None:
    environment = environment_of("plain")
    state = start_with(environment, [{"device": n, "size_bit": 4e5} for n in range(present)])
    options = [1 + n % 3 for n in range(present)]
    plain = step(environment, state, act(environment, *options))
    noisy = step(environment, state, jnp.array(options + noise[present:], jnp.int32))
    (state_a, reward_a, outcome_a), (state_b, reward_b, outcome_b) = plain, noisy
    assert jax.tree.all(jax.tree.map(np.array_equal, state_a, state_b)) or _equal_where_present(state_a, state_b)
    assert jax.tree.all(jax.tree.map(np.array_equal, reward_a, reward_b))
    shown = np.asarray(outcome_a.final)
    np.testing.assert_array_equal(shown, outcome_b.final)
    assert shown.sum() == present
    for name in ("option", "start_s", "end_s"):
        np.testing.assert_array_equal(getattr(outcome_a, name)[shown], getattr(outcome_b, name)[shown])


def _equal_where_present(first: State, second: State) -> bool:
    """Rows of uploads that are absent may hold anything."""
    uploads = jax.tree.map(lambda field: jnp.where(first.uploads.present, field, 0), first.uploads)
    others = jax.tree.map(lambda field: jnp.where(second.uploads.present, field, 0), second.uploads)
    pairs = (first._replace(uploads=uploads), second._replace(uploads=others))
    return bool(jax.tree.all(jax.tree.map(np.array_equal, *pairs)))


def test_servers_in_another_order_give_the_same_result() -> None:
    permutation = np.array([2, 0, 1])
    environment = environment_of("everything")
    plant = environment.plant
    named = [name for name in (f.name for f in dataclasses.fields(plant)) if name.startswith("server_")]
    shuffled = dataclasses.replace(plant, **{name: getattr(plant, name)[permutation] for name in named})
    other = Environment(shuffled)
    place = np.argsort(permutation) + 1  # where option j + 1 is now
    _, (states, _, _, _, _) = run("everything")
    requests = jax.tree.map(lambda field: jnp.asarray(field[:20]), states.requests)
    moved = requests._replace(fade=requests.fade[..., permutation], outage_s=requests.outage_s[..., permutation])
    actions = np.random.default_rng(8).integers(0, 4, (20, environment.requests))
    moved_actions = np.where(actions == 0, 0, place[np.maximum(actions - 1, 0)])

    @eqx.filter_jit
    def replay(environment: Environment, state: State, requests: Requests, actions: jax.Array) -> Any:
        def one_slot(state: State, row: tuple[Requests, jax.Array]) -> Any:
            after, reward, outcome = environment.step(state._replace(requests=row[0]), row[1], row[0])
            return after, (reward, outcome, environment.observe(state._replace(requests=row[0])))

        return jax.lax.scan(one_slot, state, (requests, actions))

    start = compiled.reset(environment, jnp.asarray(seed_words(3)))
    links = jax.tree.map(lambda field: field[:, permutation], start.links)
    servers = jax.tree.map(lambda field: field[permutation], start.servers)
    seen = jax.tree.map(lambda field: field[:, permutation], start.broadcasts)
    other_start = start._replace(links=links, servers=servers, broadcasts=seen)
    _, (reward, outcome, view) = replay(environment, start, requests, jnp.asarray(actions, jnp.int32))
    _, (reward_b, outcome_b, view_b) = replay(other, other_start, moved, jnp.asarray(moved_actions, jnp.int32))
    np.testing.assert_allclose(reward.own, reward_b.own, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(reward.team, reward_b.team, rtol=1e-4, atol=1e-4)
    final = np.asarray(outcome.final)
    assert final.sum() > 30
    np.testing.assert_array_equal(final, outcome_b.final)
    np.testing.assert_allclose(np.asarray(outcome.end_s)[final], np.asarray(outcome_b.end_s)[final], atol=1e-4)
    back = np.append(0, permutation + 1)
    np.testing.assert_allclose(np.asarray(view.options)[:, :, back], view_b.options, rtol=1e-5, atol=1e-4)
    np.testing.assert_array_equal(np.asarray(view.mask)[:, :, back], view_b.mask)


def test_view_has_the_age_that_the_scenario_says() -> None:
    """Age k shows the servers as they were k slots ago; the first slots show the empty plant."""
    age = PLAIN["age"]
    _, (states, _, _, aged, fresh) = run("plain")
    wait_s = states.servers.free_s.min(axis=2)
    shown_s = option(on_device(aged), "backlog_s")[:, 0, 1:]
    assert not shown_s[:age].any()
    np.testing.assert_array_equal(shown_s[age:], wait_s[:-age])
    np.testing.assert_array_equal(option(on_device(aged), "previous_s")[age + 1 :, 0, 1:], wait_s[: -age - 1])
    np.testing.assert_array_equal(option(on_device(aged), "age_s")[:, :, 1:], float(age))
    assert wait_s.max() > 1
    # The fresh view is of this instant, with the work that is on its way.
    uploads = states.uploads
    coming = uploads.present[:, :, None] & (uploads.server[:, :, None] == np.arange(3))
    work_s = np.where(coming, uploads.service_s[:, :, None], 0).sum(axis=1)
    np.testing.assert_allclose(option(on_device(fresh), "backlog_s")[:, 0, 1:], wait_s + work_s, rtol=1e-5, atol=1e-5)
    assert not option(on_device(fresh), "age_s").any()


def test_view_of_the_device_itself_is_never_old() -> None:
    _, (states, _, _, aged, _) = run("plain")
    requests = states.requests
    slots = np.arange(requests.device.shape[0])[:, None]
    backlog_s = states.device_backlog_s[slots, requests.device]
    np.testing.assert_array_equal(option(on_device(aged), "backlog_s")[:, :, 0], backlog_s)
    np.testing.assert_array_equal(task(on_device(aged), "own_backlog_s"), backlog_s)
    np.testing.assert_allclose(option(on_device(aged), "service_s")[:, :, 0], requests.work / 0.5, rtol=1e-6)
    np.testing.assert_allclose(option(on_device(aged), "service_s")[:, :, 2], requests.work / 3.0, rtol=1e-6)
    np.testing.assert_array_equal(task(on_device(aged), "waited_s"), -requests.generated_s)


def test_device_remembers_what_it_sent_since_the_broadcast() -> None:
    environment = environment_of("plain")
    state = start_with(environment, [{"work": 2.0}, {"work": 1.0}, {"work": 3.0, "device": 1}])
    again = table(environment, [{"work": 1.0}, {"work": 1.0, "device": 1}, {"work": 1.0, "device": 2}])
    sent = []
    for _ in range(4):
        state, _, _ = step(environment, state, act(environment, 1, 1, 2), again)
        sent.append(option(compiled.observe(environment, state), "own_unseen_s")[:3, 1:].tolist())
        assert not option(compiled.observe(environment, state, fresh=True), "own_unseen_s").any()
    # Servers of speed 2 and 3; an age of two slots: the first slot is forgotten after the third.
    assert sent[0] == [[1.5, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 0.0]]
    np.testing.assert_allclose(sent[1], [[2.0, 0, 0], [0.5, 1, 0], [0, 1 / 3, 0]], rtol=1e-6)
    np.testing.assert_allclose(sent[2], [[1.0, 0, 0], [1.0, 0, 0], [0, 2 / 3, 0]], rtol=1e-6)


def test_device_does_not_see_the_noise_of_its_tasks() -> None:
    """`noise` is what the server finds: no observation may depend on it before the broadcast that shows the queue."""
    environment = environment_of("plain")
    views = []
    for noise in (1.0, 3.0):
        rows = [{"work": 2.0, "noise": noise}]
        state = start_with(environment, rows)
        before = compiled.observe(environment, state)
        state, _, _ = step(environment, state, act(environment, 1), table(environment, [{"work": 1.0}]))
        views.append((before, compiled.observe(environment, state)))
    assert jax.tree.all(jax.tree.map(np.array_equal, *views))


def test_mask_follows_the_links_and_the_memory_of_the_device() -> None:
    plant = {**EVERYTHING, "device_memory_gb": 5.0}
    environment = Environment.from_scenario(small_plant(**plant))
    rows = [{"model": 0}, {"model": 1, "device": 1}, {"model": 1, "device": 2}]
    state = start_with(environment, rows)
    floor = 10**-0.5
    weak = jnp.array([[1.0, 0.99 * floor, 1.01 * floor]]) * jnp.array([[1.0], [1.0], [1e-3], [1.0], [1.0], [1.0]])
    view = compiled.observe(environment, state._replace(links=state.links._replace(uplink_snr=weak)))
    # The small model fits the device, the large one does not, unless no server can be reached.
    assert view.mask[:3].tolist() == [
        [True, True, False, True],
        [False, True, False, True],
        [True, False, False, False],
    ]
    assert view.mask[3:].tolist() == [[True, False, False, False]] * (environment.requests - 3)


def test_switch_time_is_shown_only_for_models_that_are_not_held() -> None:
    environment = environment_of("everything")
    state = start_with(environment, [{"model": m} for m in range(3)])
    shown_s = np.asarray(option(compiled.observe(environment, state), "switch_s"))[:3, 1:]
    held = np.asarray(state.servers.resident).T
    assert held.any()
    assert not held.all()
    np.testing.assert_array_equal(shown_s == 0, held)
    warm, cold = np.array([0.5, 1.0, 0.4]), np.array([2.0, 4.0, 1.0])
    mean_s = (0.35 * warm + 0.65 * cold) * np.exp(0.5 * np.array([0.3, 0.3, 0.0]) ** 2)
    np.testing.assert_allclose(shown_s, np.where(held, 0.0, mean_s[:, None]), rtol=1e-5)


def test_explicit_requests_replay_the_drawn_run() -> None:
    environment = environment_of("everything")
    drawn = compiled.reset(environment, jnp.asarray(seed_words(9)))
    other = compiled.reset(environment, jnp.asarray(seed_words(10)))
    explicit = other._replace(links=drawn.links, requests=drawn.requests)
    for slot in range(6):
        action = act(environment, *(1 + (slot + n) % 3 for n in range(environment.requests)))
        drawn, reward, outcome = step(environment, drawn, action)
        explicit, reward_b, outcome_b = step(environment, explicit, action, drawn.requests)
        # Two programs: the compiler may round the last bit otherwise.
        alike((reward, outcome), (reward_b, outcome_b))
    alike(drawn._replace(seed=other.seed), explicit)


def test_uploads_that_do_not_fit_are_counted() -> None:
    environment = Environment.from_scenario(small_plant(**{**PLAIN, "max_uploads": 2}))
    # 8 Mbit at 2 Mbit/s: four slots in flight.
    rows = [{"size_bit": 8e6, "device": n} for n in range(5)]
    state = start_with(environment, rows)
    state, _, outcome = step(environment, state, act(environment, 1, 2, 0, 1, 1), table(environment, rows[:1]))
    assert (int(state.lost), int(state.uploads.present.sum()), int(outcome.final.sum())) == (2, 2, 1)
    state, _, _ = step(environment, state, act(environment, 1), table(environment, []))
    assert int(state.lost) == 3


def test_types_of_the_state_are_kept_in_double_precision() -> None:
    """A scan over slots needs it."""
    with jax.enable_x64(True):
        environment = Environment.from_scenario(small_plant(**PLAIN))
        state = compiled.reset(environment, jnp.asarray(seed_words(1)))
        after, _, _ = jax.eval_shape(environment.step, state, jnp.zeros(environment.requests, jnp.int32))
    changed = jax.tree.map(lambda new, old: (old.dtype, new.dtype) if new.dtype != old.dtype else None, after, state)
    assert not jax.tree.leaves(changed)


def test_discarded_task_counts_its_deadline_even_if_that_was_over_at_the_decision() -> None:
    """Equation (14): the latency of a discarded task counts as its deadline."""
    environment = environment_of("everything")
    rows = [{"generated_s": -0.5, "deadline_s": 0.25}, {"generated_s": -0.5, "deadline_s": 0.25, "device": 1}]
    _, _, outcome = step(environment, start_with(environment, rows), act(environment, 1, 0))
    at = environment.plant.switches.uploads
    assert np.asarray(outcome.dropped[at : at + 2]).all()
    latency_s = sum(part[at : at + 2] for part in outcome.account[:-1])
    np.testing.assert_allclose(latency_s, 0.25, rtol=1e-6)


def traffic(slots: int, **choices: Any) -> tuple[Environment, Requests]:
    """Requests of many slots at once: they depend on the slot number alone."""
    environment = Environment.from_scenario(small_plant(**{"max_per_slot": None, **choices}))
    state = compiled.reset(environment, jnp.asarray(seed_words(21)))

    @jax.jit
    def of_slots(numbers: jax.Array) -> Requests:
        def of_slot(n: jax.Array) -> Requests:
            return next_requests(environment.plant, None, state.seed, n, n, state.links, None)[0]

        return jax.vmap(of_slot)(numbers)

    return environment, jax.device_get(of_slots(jnp.arange(slots)))


def test_arrivals_are_poisson_from_weighted_devices() -> None:
    slots = 20_000
    _, requests = traffic(slots, arrivals="rate_per_s = 6.0\ndevice_skew = 1.0", slot_s=0.5, devices=5)
    counts = requests.present.sum(axis=1)
    assert abs(counts.mean() - 3.0) / math.sqrt(3.0 / slots) < 4
    assert abs(counts.var(ddof=1) / 3.0 - 1) / math.sqrt(2 / slots) < 4
    top = 9
    seen = np.bincount(np.minimum(counts, top), minlength=top + 1)
    law = stats.poisson.pmf(np.arange(top), 3.0)
    assert stats.chisquare(seen, slots * np.append(law, 1 - law.sum())).pvalue > 1e-4
    # Present rows come first, from devices with weights 1, 1/2, 1/3, ...
    assert (np.diff(requests.present.astype(int), axis=1) <= 0).all()
    device = requests.device[requests.present]
    weights = 1 / np.arange(1, 6)
    assert stats.chisquare(np.bincount(device, minlength=5), device.size * weights / weights.sum()).pvalue > 1e-4
    generated_s = requests.generated_s[requests.present]
    assert stats.kstest(generated_s / -0.5, "uniform").pvalue > 1e-4
    work = requests.work[requests.present]
    assert stats.kstest((work - 0.5) / 1.5, "uniform").pvalue > 1e-4
    size_bit = requests.size_bit[requests.present]
    assert stats.kstest((size_bit - 1e6) / 7e6, "uniform").pvalue > 1e-4
    assert abs(np.corrcoef(work, size_bit)[0, 1]) * math.sqrt(work.size) < 4.5
    assert abs(np.corrcoef(counts[1:], counts[:-1])[0, 1]) * math.sqrt(slots) < 4.5


@pytest.mark.parametrize("choices", [{}, {"catalogue": True, "tasks": "noise_sigma = 0.4", "gpus": (2, 1, 1)}])
def test_offered_load_is_that_of_the_scenario(choices: dict[str, Any]) -> None:
    slots = 20_000
    environment, requests = traffic(slots, arrivals="load = 0.8", **choices)
    work = (requests.work * requests.noise * requests.present).sum(axis=1).astype(float)
    capacity = float(jnp.sum(environment.plant.server_speed * environment.plant.server_gpus))
    error = work.std(ddof=1) / math.sqrt(slots) / capacity
    assert error < 0.01
    assert abs(work.mean() / capacity - 0.8) < 4 * error


def test_latency_counts_from_the_decision_where_the_scenario_says_so() -> None:
    _, requests = traffic(50, latency_from="decided")
    assert requests.present.any()
    assert not requests.generated_s.any()


def test_load_times_are_bimodal_log_normal() -> None:
    plant = {"catalogue": True, "switching": True, "arrivals": "load = 0.8"}
    _, requests = traffic(20_000, **plant)
    shown = requests.present & (requests.model == 0)
    log_s = np.log(requests.load_s[shown])

    def law(x: np.ndarray) -> np.ndarray:
        normal = stats.norm.cdf
        return 0.35 * normal((x - math.log(0.5)) / 0.3) + 0.65 * normal((x - math.log(2.0)) / 0.3)

    assert stats.kstest(log_s, law).pvalue > 1e-4
    assert abs((requests.model[requests.present] == 1).mean() * 6 - 1) < 0.1
