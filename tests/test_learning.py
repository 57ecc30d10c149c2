"""Learners on a game with a known answer; properties of their networks, replay and state."""

import itertools
from collections import Counter
from functools import cache
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gmel.learning import replay
from gmel.learning.algorithm import LearnedPolicy, Task, make_task
from gmel.learning.amarl_soft import OptionCritic
from gmel.learning.clipped import entropy, generalised_advantage, pack, row_capacity, standardise
from gmel.learning.idqn import next_request
from gmel.learning.maddpg import relaxed
from gmel.learning.mappo import FlatCritic
from gmel.learning.networks import Actor, AttentionCritic
from gmel.learning.registry import ALGORITHMS, make_algorithm
from gmel.policies.policy import StatelessPolicy
from gmel.policies.rules import Greedy, Proportional
from gmel.scenario.errors import InputError
from gmel.scenario.load import parse_scenario
from gmel.simulator.environment import Environment, seeds
from gmel.simulator.presence import NEVER_S
from gmel.simulator.scale import Scale
from gmel.simulator.state import OPTION_FEATURES, TASK_FEATURES, Observation

# ---------------------------------------------------------------------------------------------------------------------
# The game: three requests in every slot, each large or small with probability 1/2, everything done within the slot.
# Large ones upload first and need a server (they do not fit a device). Server A looks best to all; but a small one
# waits there behind the large ones, so its place is the device, although that is slower. Slots do not touch each other,
# so the mean cost of a stationary policy is a finite sum.

DEVICES, ROWS = 6, 3
WORK = (4.0, 1.0)  # large, small
SPEED = (2.0, 4.0, 1.2)  # device, A, B
ANSWER = (1, 0)  # large to A, small on the device

GAME = f"""
name = "game"
[slot]
length_s = 16.0
latency_from = "decided"
[devices]
count = {DEVICES}
speed = {SPEED[0]}
memory_gb = 4.0
[[servers]]
name = "A"
speed = {SPEED[1]}
[[servers]]
name = "B"
speed = {SPEED[2]}
[radio]
model = "uniform-snr"
snr_db = [20.0, 20.0]
rate = "shannon"
fading = "none"
floor = "clip"
sharing = "none"
download = false
[[models]]
name = "large"
popularity = 1.0
step_work = {WORK[0]}
steps = {{ values = [1.0], weights = [1.0] }}
images = {{ values = [1.0], weights = [1.0] }}
memory_gb = 8.0
bits_in = {{ low = 1e3, high = 1e3 }}
[[models]]
name = "small"
popularity = 1.0
step_work = {WORK[1]}
steps = {{ values = [1.0], weights = [1.0] }}
images = {{ values = [1.0], weights = [1.0] }}
memory_gb = 2.0
bits_in = {{ low = 2e3, high = 2e3 }}
[tasks]
kind = "catalogue"
deadline_s = {{ low = 10.0, high = 10.0 }}
[arrivals]
rate_per_s = 10.0
max_per_slot = {ROWS}
[reward]
latency_scale_s = 1.0
clip = 20.0
"""


@cache
def game() -> Task:
    """The game as a task. The table is always full, so the mean number of requests is that of its rows."""
    scenario = parse_scenario(GAME, "game")
    return make_task(Environment.from_scenario(scenario), scenario)._replace(requests_per_slot=float(ROWS))


def joint_latency(kinds: tuple[int, ...], devices: tuple[int, ...], options: tuple[int, ...]) -> list[float]:
    """Latency of each request of a slot by hand: first in, first out, large before small at a server."""
    latency, busy = [0.0] * ROWS, Counter[tuple[str, int]]()
    order = sorted(range(ROWS), key=lambda row: (options[row] > 0 and kinds[row], row))
    for row in order:
        place = ("server", options[row]) if options[row] else ("device", devices[row])
        busy[place] += WORK[kinds[row]] / SPEED[options[row]]
        latency[row] = busy[place]
    return latency


@cache
def joint_table() -> dict[tuple[tuple[int, ...], tuple[int, ...]], np.ndarray]:
    """Latencies of every joint choice, averaged over which requests come from the same device."""
    patterns = Counter(
        tuple(devices.index(device) for device in devices) for devices in itertools.product(range(DEVICES), repeat=ROWS)
    )
    return {
        (kinds, options): sum(
            count / DEVICES**ROWS * np.array(joint_latency(kinds, pattern, options))
            for pattern, count in patterns.items()
        )
        for kinds in itertools.product((0, 1), repeat=ROWS)
        for options in itertools.product((0, 1, 2), repeat=ROWS)
    }


def known_cost(chance: np.ndarray) -> float:
    """Mean latency of a stationary policy: `chance[kind, option]`."""
    return sum(
        float(latency.mean()) * float(np.prod([chance[k, o] for k, o in zip(kinds, options, strict=True)])) / 2**ROWS
        for (kinds, options), latency in joint_table().items()
    )


def known_value(chance: np.ndarray) -> np.ndarray:
    """Mean latency of one request by kind and option, when the two others follow `chance`."""
    value = np.zeros((2, 3))
    for (kinds, options), latency in joint_table().items():
        others = [chance[k, o] for k, o in zip(kinds[1:], options[1:], strict=True)]
        value[kinds[0], options[0]] += latency[0] * np.prod(others) / 2 ** (ROWS - 1)
    return value


def pure(large: int, small: int) -> np.ndarray:
    return np.eye(3)[[large, small]]


@cache
def optimum() -> float:
    return known_cost(pure(*ANSWER))


def measured_cost(policy: StatelessPolicy, slots: int = 40) -> float:
    """Mean cost of a policy in the environment, on traffic that no learner met."""
    environment = game().environment

    def one(state: Any, key: jax.Array) -> tuple[Any, jax.Array]:
        action = policy.choose(environment.observe(state), key)
        state, reward, _ = environment.step(state, action)
        return state, -jnp.mean(reward.own)

    def episode(seed: jax.Array, key: jax.Array) -> jax.Array:
        return jnp.mean(jax.lax.scan(one, environment.reset(seed), jax.random.split(key, slots))[1])

    run = eqx.filter_jit(jax.vmap(episode))
    return float(jnp.mean(run(seeds(900, 64), jax.random.split(jax.random.key(1), 64))))


class Fixed(StatelessPolicy):
    """The known answer as a policy."""

    def choose(self, observation: Observation, key: jax.Array) -> jax.Array:
        del key
        return jnp.where(observation.mask[..., 0], ANSWER[1], ANSWER[0])


def test_the_answer_of_the_game_is_unique_an_equilibrium_and_not_what_looks_best() -> None:
    allowed = [(large, small) for large in (1, 2) for small in (0, 1, 2)]
    costs = {choice: known_cost(pure(*choice)) for choice in allowed}
    assert min(costs, key=costs.__getitem__) == ANSWER
    assert sorted(costs.values())[1] > 1.1 * optimum()
    # No mixture does better, and nobody gains by leaving: selfish and cooperative learners share the answer.
    grid = np.linspace(0, 1, 5)
    mixtures = [(p, q, r) for p in grid for q in grid for r in grid if q + r <= 1 and (p, q, r) != (1, 1, 0)]
    mixed = min(known_cost(np.array([[0, p, 1 - p], [q, r, 1 - q - r]])) for p, q, r in mixtures)
    assert mixed > optimum()
    value = known_value(pure(*ANSWER))
    assert value[0, 2] > 1.1 * value[0, 1]
    assert min(value[1, 1], value[1, 2]) > 1.1 * value[1, 0]


def test_the_environment_plays_the_game_that_was_worked_out_by_hand() -> None:
    assert measured_cost(Fixed()) == pytest.approx(optimum(), rel=0.02)
    assert measured_cost(Greedy()) == pytest.approx(known_cost(pure(1, 1)), rel=0.02)
    assert measured_cost(Greedy()) > 1.2 * optimum()


SMALL: dict[str, dict[str, Any]] = {
    "amarl": {"updates": 40, "environments": 32, "slots": 8},
    "amarl-soft": {"updates": 60, "environments": 32, "slots": 4, "capacity": 4096, "batch": 128},
    "mappo": {"updates": 40, "environments": 32, "slots": 8},
    "idqn": {"updates": 60, "environments": 32, "slots": 8, "capacity": 4096, "batch": 128},
    "maddpg": {"updates": 150, "environments": 32, "slots": 4, "capacity": 4096, "batch": 128, "learning_rate": 2e-3},
}


@pytest.mark.parametrize(
    "name", [name if name == "amarl" else pytest.param(name, marks=pytest.mark.slow) for name in SMALL]
)
def test_learner_finds_the_answer(name: str) -> None:
    algorithm = make_algorithm(name, **SMALL[name])
    state = eqx.filter_jit(algorithm.init)(game(), jax.random.key(2))
    untrained = measured_cost(algorithm.policy(state))
    update = eqx.filter_jit(algorithm.update)
    for _ in range(SMALL[name]["updates"]):
        state, metrics = update(game(), state)
    assert all(np.isfinite(value) for value in metrics.values())
    cost = measured_cost(algorithm.policy(state))
    print(name, "cost", cost, "untrained", untrained, "optimum", optimum())
    assert cost < 1.05 * optimum()
    assert cost < 0.9 * untrained
    assert cost < 0.7 * measured_cost(Proportional())


def as_numbers(leaf: jax.Array) -> np.ndarray:
    return np.asarray(jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf)


@pytest.mark.parametrize(
    "name", ["amarl", *(pytest.param(name, marks=pytest.mark.slow) for name in ALGORITHMS if name != "amarl")]
)
def test_update_is_a_function_of_the_state_and_the_state_a_pytree(name: str) -> None:
    small = {key: value for key, value in SMALL[name].items() if key not in ("updates", "learning_rate")}
    algorithm = make_algorithm(name, **small)
    update = eqx.filter_jit(algorithm.update)
    state, _ = update(game(), eqx.filter_jit(algorithm.init)(game(), jax.random.key(0)))
    leaves, structure = jax.tree.flatten(state)
    assert all(isinstance(leaf, jax.Array) for leaf in leaves)
    again = jax.tree.unflatten(structure, [leaf + 0 if leaf.dtype == jnp.float32 else leaf for leaf in leaves])
    first, _ = update(game(), state)
    second, _ = update(game(), again)
    for one, other in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        assert np.array_equal(as_numbers(one), as_numbers(other), equal_nan=True)
    before = [leaf for leaf in leaves if leaf.dtype == jnp.float32]
    after = [leaf for leaf in jax.tree.leaves(first) if leaf.dtype == jnp.float32]
    assert any(not np.array_equal(one, other) for one, other in zip(before, after, strict=True))


# ---------------------------------------------------------------------------------------------------------------------
# Networks.

SCALE = Scale(1.5, 4e6, 2.0)


def situation(
    seed: int, rows: int = 5, servers: int = 3, batch: int = 2, devices: int = 4, own_waits: bool = False
) -> Observation:
    """Any observation that an environment could show; with `own_waits` the backlog of a server differs by row."""
    rng = np.random.default_rng(seed)
    options = rng.exponential(1.0, (batch, rows, 1 + servers, len(OPTION_FEATURES)))
    for name in ("speed", "gpus"):
        column = OPTION_FEATURES.index(name)
        options[..., column] = 1 + rng.integers(0, 4, (batch, 1, 1 + servers))
    options[..., OPTION_FEATURES.index("local")] = np.arange(1 + servers) == 0
    waits = rows if own_waits else 1
    options[..., 1:, OPTION_FEATURES.index("backlog_s")] = rng.exponential(1.0, (batch, waits, servers))
    present = np.arange(rows) < rng.integers(min(2, rows - 1), rows, (batch, 1))
    mask = rng.random((batch, rows, 1 + servers)) < 0.7
    mask[..., 0] |= ~mask.any(-1) | ~present
    mask[..., 1:] &= present[..., None]
    task = rng.exponential(1.0, (batch, rows, len(TASK_FEATURES)))
    parts = (present, rng.integers(0, devices, (batch, rows)), task, options, mask)
    return Observation(*(jnp.asarray(part, jnp.float32 if part.dtype == float else None) for part in parts))


@cache
def actor(communicating: bool = False) -> Actor:
    """An actor whose learned part matters (its last layer starts close to zero)."""
    made = eqx.filter_jit(Actor)(SCALE, jax.random.key(4), 16, communicating=communicating)
    return eqx.tree_at(lambda a: a.out.weight, made, 50 * made.out.weight)


@cache
def option_critic(seed: int = 0, own_waits: bool = False) -> OptionCritic:
    return eqx.filter_jit(OptionCritic)(SCALE, jax.random.key(seed), 16, own_waits=own_waits)


@eqx.filter_jit
def respond(network: Any, *seen: Any) -> Any:
    """What a network says. One program: by itself each operation of it would be compiled."""
    return network(*seen)


@eqx.filter_jit
def choose(policy: LearnedPolicy, seen: Observation, keys: jax.Array) -> jax.Array:
    return jax.vmap(lambda key: policy.choose(seen, key))(keys)


def rows_of(observation: Observation, order: Any) -> Observation:
    return jax.tree.map(lambda leaf: leaf[:, order], observation)


def same(one: jax.Array, other: jax.Array) -> None:
    np.testing.assert_allclose(one, other, rtol=2e-4, atol=2e-4)


@settings(max_examples=6, deadline=None)
@given(st.integers(0, 10**6), st.booleans())
def test_actor_is_equivariant_over_servers_and_never_takes_a_masked_option(seed: int, communicating: bool) -> None:
    seen = situation(seed)
    order = np.concatenate([[0], 1 + np.random.default_rng(seed).permutation(3)])
    moved = seen._replace(options=seen.options[:, :, order], mask=seen.mask[:, :, order])
    logits = respond(actor(communicating), seen)
    same(respond(actor(communicating), moved), logits[..., order])
    assert np.array_equal(jax.nn.softmax(logits) == 0, ~np.asarray(seen.mask))
    one = jax.tree.map(lambda leaf: leaf[0], seen)
    for policy in (LearnedPolicy(actor(communicating)), LearnedPolicy(actor(communicating), greedy=True)):
        drawn = choose(policy, one, jax.random.split(jax.random.key(seed), 50))
        assert np.all(np.take_along_axis(np.asarray(one.mask)[None], np.asarray(drawn)[..., None], axis=-1))


@settings(max_examples=6, deadline=None)
@given(st.integers(0, 10**6))
def test_decentralised_rows_do_not_see_each_other(seed: int) -> None:
    one, other = situation(seed), situation(seed + 1)
    mixed = jax.tree.map(lambda a, b: a.at[:, 1:].set(b[:, 1:]), one, other)
    assert np.array_equal(respond(actor(), one)[:, 0], respond(actor(), mixed)[:, 0])


@settings(max_examples=6, deadline=None)
@given(st.integers(0, 10**6))
def test_communicating_rows_are_equivariant_hear_the_present_and_nobody_else(seed: int) -> None:
    seen, network = situation(seed), actor(communicating=True)
    order = np.random.default_rng(seed).permutation(5)
    logits = respond(network, seen)
    same(respond(network, rows_of(seen, order)), logits[:, order])
    noise = jnp.where(seen.present[..., None, None], 0.0, 3.0)
    padded = respond(network, seen._replace(options=seen.options + noise))
    same(jnp.where(seen.present[..., None], padded, 0.0), jnp.where(seen.present[..., None], logits, 0.0))
    changed = respond(network, seen._replace(options=seen.options.at[:, 0, :, 5:].add(1.0)))
    others = np.asarray(seen.present)[:, 1:]
    heard = np.where(others[..., None] & np.asarray(seen.mask)[:, 1:], changed[:, 1:] - logits[:, 1:], 0)
    assert np.abs(heard).max() > 1e-4


@pytest.mark.parametrize("communicating", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_actor_is_independent_of_the_batch_and_of_the_size_of_the_plant(communicating: bool) -> None:
    network, seen = actor(communicating), situation(7, batch=6)
    for index in range(6):
        alone = jax.tree.map(lambda leaf, at=index: leaf[at : at + 1], seen)
        same(respond(network, alone)[0], respond(network, seen)[index])
    assert respond(network, situation(8, rows=60, servers=8, devices=60)).shape == (2, 60, 9)


def judge(name: str, own_waits: bool = False) -> Any:
    """A critic as a function of the observation: own values by row, and the team's."""
    if name == "attention":
        critic = eqx.filter_jit(AttentionCritic)(SCALE, jax.random.key(0), 16, own_waits=own_waits)
        return lambda seen: tuple(respond(critic, seen))
    if name == "flat":
        flat = eqx.filter_jit(FlatCritic)(SCALE, 5, 4, jax.random.key(0), 16)
        return lambda seen: tuple(respond(flat, seen))
    options = option_critic(own_waits=own_waits)

    def judged(seen: Observation) -> tuple[jax.Array, jax.Array]:
        result = respond(options, seen, jnp.argmax(jnp.where(seen.mask, seen.options[..., 3], -1.0), axis=-1))
        return jnp.sum(result.own + result.team_marginal, axis=-1), result.team

    return judged


@pytest.mark.parametrize(
    ("name", "own_waits"),
    [("attention", False), ("attention", True), ("option", False), ("option", True), ("flat", False)],
)
def test_critics_ignore_absent_rows_and_the_batch(name: str, own_waits: bool) -> None:
    critic, seen = judge(name, own_waits), situation(11, batch=4, own_waits=own_waits)
    own, team = critic(seen)
    absent = ~seen.present[..., None]
    # What is the same of the servers stands in every row, the rest of an absent row is anything.
    alike = ("speed", "gpus") if own_waits else ("speed", "gpus", "backlog_s")
    column = jnp.array([feature not in alike for feature in OPTION_FEATURES])
    junk = seen._replace(
        options=jnp.where(absent[..., None] & column, 9.0, seen.options), task=jnp.where(absent, 7.0, seen.task)
    )
    own_too, team_too = critic(junk)
    same(team_too, team)
    same(jnp.where(seen.present, own_too, 0.0), jnp.where(seen.present, own, 0.0))
    alone_own, alone_team = critic(jax.tree.map(lambda leaf: leaf[2:3], seen))
    same(alone_team[0], team[2])
    same(alone_own[0], own[2])
    if name != "flat":
        order = np.random.default_rng(1).permutation(5)
        moved_own, moved_team = critic(rows_of(seen, order))
        same(moved_team, team)
        same(jnp.where(seen.present, own, 0.0)[:, order], jnp.where(seen.present[:, order], moved_own, 0.0))


@pytest.mark.parametrize("name", ["attention", "option"])
def test_a_server_that_is_away_is_as_one_that_is_very_late(name: str) -> None:
    """And not a number of seconds that drowns all the others: see `gmel.simulator.presence.NEVER_S`."""
    critic, seen = judge(name), situation(11)
    column = OPTION_FEATURES.index("backlog_s")

    def first_waits(wait_s: float) -> jax.Array:
        return critic(seen._replace(options=seen.options.at[:, :, 1, column].set(wait_s)))[1]

    # What enters by its logarithm still tells them apart, a little.
    np.testing.assert_allclose(first_waits(NEVER_S), first_waits(NEVER_S / 2), atol=0.05)
    assert not np.array_equal(first_waits(NEVER_S), first_waits(5.0))


@pytest.mark.parametrize("name", ["attention", "option"])
def test_an_empty_slot_is_judged_by_the_servers(name: str) -> None:
    """Whatever the rows say of servers of their own: without requests, their mean."""
    critic, seen = judge(name, True), situation(11, batch=4, own_waits=True)
    empty = seen._replace(present=jnp.zeros_like(seen.present))
    column = OPTION_FEATURES.index("backlog_s")
    _, team = critic(empty)
    _, busier = critic(empty._replace(options=empty.options.at[:, 1:, 1:, column].add(2.0)))
    assert np.isfinite(np.asarray(team)).all()
    assert (np.abs(np.asarray(busier - team)) > 1e-4).all()


def shared_by_weight() -> Task:
    """Two servers whose tasks share them by weight."""
    text = GAME.replace("[tasks]", "[tasks]\ncpu_weights = [2.0]")
    scenario = parse_scenario(f'{text}\n[service]\ndiscipline = "sharing"', "shared")
    return make_task(Environment.from_scenario(scenario), scenario)


@pytest.mark.parametrize(("name", "critic"), [("amarl", AttentionCritic), ("amarl-soft", OptionCritic)])
def test_learners_tell_their_critics_where_requests_wait_unlike(name: str, critic: type) -> None:
    for task, own_waits in ((game(), False), (shared_by_weight(), True)):
        learner = make_algorithm(name, **{**SMALL[name], "environments": 2})
        state = jax.eval_shape(lambda key, task=task, learner=learner: learner.init(task, key), jax.random.key(0))
        assert isinstance(state.critic, critic)
        assert state.critic.own_waits is own_waits


@settings(max_examples=5, deadline=None)
@given(st.integers(0, 10**6))
def test_team_marginals_are_the_counterfactuals_of_the_joint_value(seed: int) -> None:
    seen, critic = situation(seed), option_critic(3)
    action = jnp.asarray(np.random.default_rng(seed).integers(0, 4, (2, 5)))
    marginal = respond(critic, seen, action).team_marginal[:, 0]
    joint = jnp.stack([respond(critic, seen, action.at[:, 0].set(option)).team for option in range(4)], axis=-1)
    same(marginal - marginal[:, :1], joint - joint[:, :1])


def test_own_value_hears_only_who_goes_to_the_same_place() -> None:
    seen, critic = situation(5, rows=4), option_critic(3)
    seen = seen._replace(present=jnp.ones((2, 4), bool), device=jnp.broadcast_to(jnp.arange(4), (2, 4)))
    there = respond(critic, seen, jnp.array([[0, 1, 2, 0]] * 2)).own[:, 0]
    moved = respond(critic, seen, jnp.array([[0, 3, 2, 0]] * 2)).own[:, 0]
    changed = np.abs(np.asarray(there - moved)) > 1e-6
    assert changed.tolist() == [[False, True, False, True]] * 2


# ---------------------------------------------------------------------------------------------------------------------
# Parts.


def test_generalised_advantage_by_hand() -> None:
    reward, value = jnp.array([[1.0], [2.0], [3.0]]), jnp.array([[0.5], [1.0], [1.5]])
    advantage = generalised_advantage(reward, value, jnp.array([2.0]), 0.5, 0.8)
    # delta = r + 0.5 v' - v: 3 + 1 - 1.5 = 2.5; 2 + 0.75 - 1 = 1.75; 1 + 0.5 - 0.5 = 1; weight 0.4.
    same(advantage[:, 0], jnp.array([1.0 + 0.4 * (1.75 + 0.4 * 2.5), 1.75 + 0.4 * 2.5, 2.5]))


def test_entropy_by_hand_and_its_gradient_with_masked_options() -> None:
    logits = jnp.array([[0.0, jnp.log(3.0), -jnp.inf], [0.0, -jnp.inf, -jnp.inf]])
    same(entropy(logits), jnp.array([0.25 * np.log(4) + 0.75 * np.log(4 / 3), 0.0]))
    assert np.all(np.isfinite(jax.grad(lambda x: jnp.sum(entropy(x)))(logits)))


@pytest.mark.parametrize("communicating", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_gradients_are_finite_with_masked_rows_and_options(communicating: bool) -> None:
    seen = situation(3)
    empty = seen._replace(
        present=jnp.zeros_like(seen.present), mask=seen.mask.at[..., 1:].set(False).at[..., 0].set(True)
    )

    def loss(network: Actor, here: Observation) -> jax.Array:
        logits = network(here)
        draw = relaxed(logits, jax.random.key(0), 1.0)
        log = jnp.where(here.mask, jax.nn.log_softmax(logits), 0.0)
        return jnp.sum(entropy(logits)) + jnp.sum(log) + jnp.sum(draw[..., 0])

    def judged(critic: OptionCritic, here: Observation) -> jax.Array:
        values = critic(here, jnp.argmax(here.mask, axis=-1))
        return jnp.sum(values.own) + jnp.sum(values.team)

    by_actor, by_critic = eqx.filter_jit(jax.grad(loss)), eqx.filter_jit(jax.grad(judged))
    for here in (seen, empty):
        for gradient in (by_actor(actor(communicating), here), by_critic(option_critic(), here)):
            assert all(bool(np.all(np.isfinite(leaf))) for leaf in jax.tree.leaves(gradient))


def test_relaxed_draws_follow_the_softmax_and_leave_masked_options_alone() -> None:
    logits = jnp.broadcast_to(jnp.array([0.0, jnp.log(3.0), -jnp.inf]), (4000, 3))
    draw = relaxed(logits, jax.random.key(0), 0.7)
    np.testing.assert_allclose(jnp.mean(draw, axis=0), [0.25, 0.75, 0.0], atol=0.03)


def test_standardise_and_pack_count_only_what_is_present() -> None:
    present = jnp.array([[True, False], [True, True]])
    values = jnp.array([[1.0, 99.0], [2.0, 3.0]])
    same(standardise(values, present)[present], jnp.array([-1.0, 0.0, 1.0]) * np.sqrt(1.5))
    seen = situation(0, rows=2)._replace(present=present)
    observation, *_, here = pack((seen, values, values, values), present, 4)
    assert here.tolist() == [True, True, True, False]
    assert np.array_equal(observation.task[:3], seen.task[present])
    assert row_capacity(game(), 10) == 10 * ROWS


def test_replay_is_a_ring_that_knows_what_follows() -> None:
    environments, slots = 2, 3
    ring = replay.empty(jnp.zeros(environments * slots, jnp.int32), 14)
    assert ring.entries.shape == (12,)
    for start in range(0, 30, 6):
        ring = replay.add(ring, jnp.arange(start, start + 6))
        assert int(ring.filled) == min(start + 6, 12)
        now, following = replay.sample(ring, jax.random.key(start), 300, environments)
        assert np.array_equal(following, now + environments)
        oldest, newest = start + 6 - int(ring.filled), start + 6
        assert set(np.asarray(now).tolist()) == set(range(oldest, newest - environments))
    with pytest.raises(ValueError, match="capacity = 5 is below"):
        replay.empty(jnp.zeros(6), 5)


def test_next_request_is_the_same_devices() -> None:
    seen = jax.tree.map(lambda leaf: leaf[:4], situation(0, rows=2, batch=4))
    seen = seen._replace(
        present=jnp.array([[True, True], [True, False], [False, False], [True, True]]),
        device=jnp.array([[0, 1], [1, 0], [0, 0], [2, 0]]),
    )
    slot, row = next_request(seen, 3)
    assert slot[0].tolist() == [3, 1]
    assert row[0].tolist() == [1, 0]
    assert int(slot[1, 0]) == 4
    assert slot[3].tolist() == [4, 4]


# ---------------------------------------------------------------------------------------------------------------------
# Registry.


def test_algorithms_are_made_by_name() -> None:
    assert list(ALGORITHMS) == ["amarl", "amarl-soft", "mappo", "idqn", "maddpg"]
    made = make_algorithm("amarl", learning_rate=1, cooperation=None, communicating=True)
    assert (made.learning_rate, type(made.learning_rate)) == (1.0, float)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("name", "given_settings", "message"),
    [
        ("amrl", {}, r"algorithm 'amrl' is unknown; did you mean 'amarl'\?"),
        ("amarl", {"learning_rte": 1.0}, r"amarl has no setting 'learning_rte'; did you mean 'learning_rate'\?"),
        ("idqn", {"name": "x"}, "idqn has no setting 'name'"),
        ("maddpg", {"updates": 1.5}, "maddpg: updates = 1.5 must be a whole number"),
        ("mappo", {"updates": True}, "updates = True must be a whole number"),
        ("amarl", {"clip": float("nan")}, "clip = nan must be a finite number"),
        ("amarl", {"clip": None}, "clip = None must be a finite number"),
        (
            "amarl-soft",
            {"entropy_share": "much"},
            "must be a finite number or nothing",
        ),
    ],
)
def test_bad_settings_say_what_is_allowed(name: str, given_settings: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make_algorithm(name, **given_settings)
