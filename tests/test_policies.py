"""Policies: masks, determinism, symmetry over servers, small choices by hand, and searches beside brute force."""

import itertools
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
from gmel.policies.central import BestResponse, Coordinated, EarliestFinish, SlotOptimum
from gmel.policies.policy import CentralPolicy, StatelessPolicy, decide, initial_memory
from gmel.policies.rules import (
    AllLocal,
    Greedy,
    LeastExpectedDelay,
    Nearest,
    Proportional,
    Softmax,
    Softmax7,
    UniformRandom,
    expected_latency_s,
)
from gmel.simulator.environment import Environment
from gmel.simulator.state import OPTION_FEATURES, TASK_FEATURES, Observation, State
from small_plants import RADIO, small_plant

THETA = jnp.array([1.0, 0.8, 0.5, 0.6, 0.7, 0.2, 0.9])
RULES: dict[str, StatelessPolicy] = {
    "all-local": AllLocal(),
    "uniform": UniformRandom(),
    "nearest": Nearest(),
    "proportional": Proportional(),
    "greedy": Greedy(),
    "led": LeastExpectedDelay(),
    "softmax": Softmax(jnp.array(0.5)),
    "softmax7": Softmax7(THETA),
    "coordinated": Coordinated(),
}
DETERMINISTIC = ("nearest", "greedy", "coordinated")
CENTRAL: dict[str, CentralPolicy] = {
    "earliest-finish": EarliestFinish(),
    "best-response": BestResponse(),
    "slot-optimum": SlotOptimum(),
}
# All run on the table that holds the slot; the simplest stands for them in the quick tests.
SEARCHES = [name if name == "earliest-finish" else pytest.param(name, marks=pytest.mark.slow) for name in CENTRAL]
ROWS, SERVERS = 5, 3
choose = eqx.filter_jit(lambda policy, observation, key: policy.choose(observation, key))


def observation(options: list[list[dict[str, float]]], mask: Any = None) -> Observation:
    """A view with only what matters said: per row the device itself and then the servers."""
    blank = {"local": 0.0, "speed": 1.0, "gpus": 1.0}
    rows = [[{**blank, "local": float(place == 0), **o} for place, o in enumerate(row)] for row in options]
    table = [[[o.get(name, 0.0) for name in OPTION_FEATURES] for o in row] for row in rows]
    count = len(options)
    return Observation(
        present=jnp.ones(count, bool),
        device=jnp.arange(count),
        task=jnp.zeros((count, len(TASK_FEATURES))),
        options=jnp.array(table),
        mask=jnp.ones((count, len(options[0])), bool) if mask is None else jnp.array(mask),
    )


def random_observation(seed: int, rows: int = ROWS) -> Observation:
    """Rows of a plausible view: servers look alike to all rows in what they broadcast."""
    draw = np.random.default_rng(seed)
    speed, gpus, backlog_s = draw.uniform(1, 6, SERVERS), draw.integers(1, 4, SERVERS), draw.exponential(2.0, SERVERS)
    view = [
        [{"service_s": draw.uniform(1, 8), "backlog_s": draw.exponential(4.0), "speed": 0.5}]
        + [
            {
                "speed": speed[j],
                "gpus": gpus[j],
                "backlog_s": backlog_s[j],
                "upload_s": draw.exponential(0.5),
                "service_s": draw.uniform(0.2, 2.0),
                "switch_s": draw.choice([0.0, 1.0]),
                "download_s": draw.exponential(0.1),
            }
            for j in range(SERVERS)
        ]
        for _ in range(rows)
    ]
    mask = draw.random((rows, SERVERS + 1)) < 0.6
    mask[~mask.any(axis=1), 0] = True
    shown = observation(view, mask)
    present = np.arange(rows) < draw.integers(1, rows + 1)
    return shown._replace(
        present=jnp.asarray(present),
        mask=jnp.where(jnp.asarray(present)[:, None], shown.mask, jnp.arange(SERVERS + 1) == 0),
    )


@pytest.mark.parametrize("name", RULES)
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**31), key=st.integers(0, 2**31))
def test_rule_takes_an_allowed_option_and_always_the_same(name: str, seed: int, key: int) -> None:
    shown = random_observation(seed)
    first = choose(RULES[name], shown, jax.random.key(key))
    second = choose(RULES[name], shown, jax.random.key(key))
    assert first.shape == (ROWS,)
    assert np.asarray(shown.mask)[np.arange(ROWS), first].all()
    np.testing.assert_array_equal(first, second)
    if name in DETERMINISTIC:
        np.testing.assert_array_equal(first, choose(RULES[name], shown, jax.random.key(key + 1)))


@pytest.mark.parametrize("name", DETERMINISTIC)
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**31), order=st.permutations(range(SERVERS)))
def test_rule_follows_the_order_of_the_servers(name: str, seed: int, order: list[int]) -> None:
    shown = random_observation(seed)
    place = np.array([0, *(1 + j for j in order)])
    moved = shown._replace(options=shown.options[:, place], mask=shown.mask[:, place])
    key = jax.random.key(0)
    np.testing.assert_array_equal(place[choose(RULES[name], moved, key)], choose(RULES[name], shown, key))


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**31), order=st.permutations(range(SERVERS)))
def test_scores_follow_the_order_of_the_servers(seed: int, order: list[int]) -> None:
    shown = random_observation(seed)
    place = np.array([0, *(1 + j for j in order)])
    moved = shown._replace(options=shown.options[:, place], mask=shown.mask[:, place])
    policy = Softmax7(THETA)
    np.testing.assert_allclose(policy.logits(moved), np.asarray(policy.logits(shown))[:, place], rtol=1e-6)


THREE = [
    {"service_s": 9.0, "backlog_s": 1.0},
    {"upload_s": 1.0, "backlog_s": 3.0, "service_s": 1.0, "speed": 2.0},
    {"upload_s": 2.0, "backlog_s": 0.5, "service_s": 1.5, "download_s": 0.25, "speed": 4.0, "gpus": 2.0},
    {"upload_s": 0.5, "backlog_s": 0.0, "service_s": 1.0, "switch_s": 3.0, "speed": 1.0},
]


def test_expected_latency_by_hand() -> None:
    """The wait overlaps the upload; switch, service and download follow."""
    assert expected_latency_s(observation([THREE])).tolist() == [[10.0, 4.0, 3.75, 4.5]]


def test_rules_by_hand() -> None:
    everywhere = [True] * 4
    shown = observation([THREE] * 3, [everywhere, [True, True, False, True], [True, False, False, False]])
    key = jax.random.key(0)
    assert choose(Greedy(), shown, key).tolist() == [2, 1, 0]
    assert choose(Nearest(), shown, key).tolist() == [3, 3, 0]
    assert choose(AllLocal(), shown, key).tolist() == [0, 0, 0]
    assert choose(LeastExpectedDelay(choices=3), shown, key).tolist() == [2, 1, 0]
    quick = [{"service_s": 0.1}, *THREE[1:]]
    assert choose(Greedy(), observation([quick]), key).tolist() == [0]
    assert choose(LeastExpectedDelay(choices=9), observation([quick]), key).tolist() == [2], "servers come first"


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31))
def test_least_expected_delay_of_all_is_greedy_over_the_servers(seed: int) -> None:
    shown = random_observation(seed)
    servers = shown.mask.at[:, 0].set(False)
    servers = jnp.where(servers.any(axis=1, keepdims=True), servers, shown.mask)
    key = jax.random.key(seed)
    led = choose(LeastExpectedDelay(choices=SERVERS), shown, key)
    np.testing.assert_array_equal(led, choose(Greedy(), shown._replace(mask=servers), key))


def frequencies(policy: StatelessPolicy, row: list[dict[str, float]], mask: list[bool], draws: int = 20_000) -> Any:
    shown = jax.tree.map(lambda field: jnp.repeat(field, draws, axis=0), observation([row], [mask]))
    return np.bincount(choose(policy, shown, jax.random.key(4)), minlength=len(row))


def assert_law(counts: np.ndarray, weights: list[float]) -> None:
    law = np.array(weights) / sum(weights)
    assert not counts[law == 0].any()
    assert stats.chisquare(counts[law > 0], counts.sum() * law[law > 0]).pvalue > 1e-4


def test_random_rules_draw_by_their_law() -> None:
    everywhere, some = [True] * 4, [True, False, True, True]
    assert_law(frequencies(UniformRandom(), THREE, some), [1, 0, 1, 1])
    assert_law(frequencies(Proportional(), THREE, everywhere), [0, 2, 8, 1])
    assert_law(frequencies(Proportional(), THREE, some), [0, 0, 8, 1])
    latency_s = np.array([10.0, 4.0, 3.75, 4.5])
    assert_law(frequencies(Softmax(jnp.array(2.0)), THREE, everywhere), list(np.exp(-latency_s / 2)))
    # Of the pairs {1, 2}, {1, 3}, {2, 3} server 2 wins two and server 1 the other.
    assert_law(frequencies(LeastExpectedDelay(), THREE, everywhere), [0, 1, 2, 0])
    assert_law(frequencies(AllLocal(), THREE, [False, True, True, False]), [0, 1, 1, 0])


def test_softmax7_scores_by_hand() -> None:
    theta = [1.0, 0.8, 0.5, 0.6, 0.7, 0.2, 0.9]
    scores = Softmax7(jnp.array(theta)).logits(observation([THREE], [[True, True, True, False]]))[0]
    assert scores[0] == pytest.approx(0.2 - 0.9 * 10.0, rel=1e-6)
    assert scores[1] == pytest.approx(np.log(2) - 0.8 * 2.5 - 0.6 * 1.0 - 0.7 * 1.0, rel=1e-6)
    assert scores[2] == pytest.approx(np.log(8) - 0.0 - 0.6 * 2.0 - 0.7 * 1.75, rel=1e-6)
    assert scores[3] == -np.inf


def test_coordinated_requests_reserve_in_turn() -> None:
    # Server 1 takes 1 s, server 2 takes 1.5 s: turns 1, 2 (1.5 < 2), 1 (2 < 3), 1 or 2 at 3 s each.
    row = [{"service_s": 9.0}, {"service_s": 1.0}, {"service_s": 1.5}]
    assert choose(Coordinated(), observation([row] * 3), jax.random.key(0)).tolist() == [1, 2, 1]
    # On two GPUs the second finds one free.
    pair = [{"service_s": 9.0}, {"service_s": 1.0, "gpus": 2.0}, {"service_s": 1.9}]
    assert choose(Coordinated(), observation([pair] * 3), jax.random.key(0)).tolist() == [1, 1, 2]
    absent = observation([row] * 3)._replace(present=jnp.array([False, True, True]))
    assert choose(Coordinated(), absent, jax.random.key(0)).tolist()[1:] == [1, 2], "absent rows reserve nothing"


@cache
def plant() -> Environment:
    """Requests of up to four seconds, two of the servers near in speed: many close decisions."""
    scenario = small_plant(
        speeds=(2.0, 3.0, 2.5), age=0, arrivals="load = 0.9", max_per_slot=4, max_uploads=10, device_speed=0.7
    )
    return Environment.from_scenario(scenario)


@eqx.filter_jit
def advance(environment: Environment, state: State, action: jax.Array) -> State:
    return environment.step(state, action)[0]


@eqx.filter_jit
def assign(policy: CentralPolicy, environment: Environment, state: State) -> jax.Array:
    return policy.assign(environment, state, jax.random.key(0))


JOINT = np.array(list(itertools.product(range(SERVERS + 1), repeat=4)), np.int32)


@eqx.filter_jit
def project_all(environment: Environment, state: State, actions: jax.Array) -> Any:
    """Latencies of the requests and the total of the slot, for many joint actions."""
    projections = jax.vmap(lambda action: environment.project(state, action))(actions)
    return projections.latency_s, projections.latency_s.sum(axis=1) + projections.delay_s


@cache
def busy_slots(count: int = 40) -> list[State]:
    """Slot starts with three or four requests, met on the way of a random policy."""
    environment, draw = plant(), np.random.default_rng(6)
    state, found = compiled.reset(environment, jnp.asarray(seed_words(2))), []
    while len(found) < count:
        if int(state.requests.present.sum()) >= 3:
            found.append(state)
        state = advance(environment, state, jnp.asarray(draw.integers(1, 4, environment.requests), jnp.int32))
    return found


def total(environment: Environment, state: State, action: Any) -> float:
    return float(project_all(environment, state, jnp.asarray(action)[None])[1][0])


def test_slots_are_worth_deciding() -> None:
    """Backlogs and uploads in flight are there, and actions differ by far."""
    states = busy_slots()
    assert np.mean([float(state.servers.free_s.max()) > 0.3 for state in states]) > 0.5
    assert np.mean([bool(state.uploads.present.any()) for state in states]) > 0.5


def test_earliest_finish_equals_sequential_brute_force() -> None:
    environment = plant()
    for state in busy_slots():
        mask = np.asarray(compiled.observe(environment, state, fresh=True).mask)
        chosen: list[int] = []
        for row in range(int(state.requests.present.sum())):
            known = state.requests.present & (jnp.arange(environment.requests) <= row)
            actions = np.zeros((SERVERS + 1, environment.requests), np.int32)
            actions[:, :row] = chosen
            actions[:, row] = np.arange(SERVERS + 1)
            partial = state._replace(requests=state.requests._replace(present=known))
            latency_s = np.asarray(project_all(environment, partial, jnp.asarray(actions))[0])[:, row]
            chosen.append(int(np.argmin(np.where(mask[row], latency_s, np.inf))))
        assert assign(EarliestFinish(), environment, state)[: len(chosen)].tolist() == chosen


def test_slot_optimum_is_near_brute_force_and_never_worse_than_earliest_finish() -> None:
    environment, gaps, gaps_of_greedy = plant(), [], []
    for state in busy_slots():
        mask = np.asarray(compiled.observe(environment, state, fresh=True).mask)
        allowed = mask[np.arange(4), JOINT].all(axis=1)
        best = float(np.asarray(project_all(environment, state, jnp.asarray(JOINT))[1])[allowed].min())
        optimum, greedy = (
            total(environment, state, assign(p, environment, state)) for p in (SlotOptimum(), EarliestFinish())
        )
        assert optimum <= greedy + 1e-4
        assert optimum >= best - 1e-4
        gaps.append((optimum - best) / best)
        gaps_of_greedy.append((greedy - best) / best)
    assert np.mean(gaps) < 0.02
    assert np.mean(gaps_of_greedy) > 0.005, "slots too easy to tell"


def test_nobody_gains_by_leaving_a_best_response() -> None:
    environment, moved = plant(), 0
    for state in busy_slots():
        action = np.asarray(assign(BestResponse(), environment, state))
        moved += action.tolist() != assign(EarliestFinish(), environment, state).tolist()
        mask = np.asarray(compiled.observe(environment, state, fresh=True).mask)
        here = np.asarray(project_all(environment, state, jnp.asarray(action)[None])[0])[0]
        for row in np.nonzero(state.requests.present)[0]:
            tried = np.tile(action, (SERVERS + 1, 1))
            tried[:, row] = np.arange(SERVERS + 1)
            latency_s = np.asarray(project_all(environment, state, jnp.asarray(tried))[0])[:, row]
            assert latency_s[mask[row]].min() >= here[row] - 1e-5
    assert moved, "the start was always at rest: nothing was tested"


@pytest.mark.parametrize("name", SEARCHES)
def test_central_policy_respects_masks(name: str) -> None:
    scenario = small_plant(
        catalogue=True,
        device_memory_gb=4.0,
        radio=RADIO.replace('"clip"', '"outage"\nfloor_snr_db = 13.0'),
        max_per_slot=6,
        max_uploads=8,
        arrivals="load = 0.9",
    )
    environment = Environment.from_scenario(scenario)
    state, refused = compiled.reset(environment, jnp.asarray(seed_words(5))), 0
    for _ in range(8):
        mask = np.asarray(compiled.observe(environment, state, fresh=True).mask)
        action = assign(CENTRAL[name], environment, state)
        present = np.asarray(state.requests.present)
        assert mask[np.arange(environment.requests), action][present].all()
        refused += int((~mask[present]).sum())
        state = advance(environment, state, action)
    assert refused


@pytest.mark.parametrize("name", SEARCHES)
def test_central_policy_decides_rows_wherever_they_stand_in_the_table(name: str) -> None:
    """`present` masks the rows of the table: explicit requests may have gaps between them."""
    environment = Environment.from_scenario(small_plant(max_per_slot=7, max_uploads=5, device_speed=0.01))
    state = compiled.reset(environment, jnp.asarray(seed_words(2)))
    last = jnp.arange(environment.requests) == environment.requests - 1
    gap = state._replace(requests=state.requests._replace(present=last))
    front = gap._replace(requests=jax.tree.map(lambda field: jnp.roll(field, 1, axis=0), gap.requests))
    expected = int(assign(CENTRAL[name], environment, front)[0])
    assert expected > 0, "the device is far too slow"
    assert int(assign(CENTRAL[name], environment, gap)[-1]) == expected


def test_anyone_can_be_asked_the_same_way() -> None:
    environment, state, key = plant(), busy_slots()[0], jax.random.key(1)
    for policy in (Greedy(), EarliestFinish()):
        memory = initial_memory(policy, key)
        assert memory is None
        action, memory = decide(policy, environment, state, memory, key)
        assert action.shape == (environment.requests,)
        assert memory is None
    fresh = Greedy(fresh=True)
    shown = compiled.observe(environment, state, fresh=True)
    np.testing.assert_array_equal(decide(fresh, environment, state, None, key)[0], Greedy().choose(shown, key))
