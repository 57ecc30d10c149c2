"""Credit for what a decision does to later requests."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gmel.learning.afterstate import AfterstateCritic, lambda_returns
from gmel.learning.algorithm import make_task
from gmel.learning.registry import make_algorithm
from gmel.simulator.environment import Afterstate, Environment, seeds
from gmel.simulator.scale import Scale
from gmel.simulator.state import State
from small_plants import small_plant

PLANT = Environment.from_scenario(small_plant(catalogue=True, switching=True, gpus=(2, 1, 1)))


@pytest.fixture(scope="module")
def busy() -> State:
    """A state with requests, uploads in flight and work at the servers."""

    def slot(state: State, key: jax.Array) -> tuple[State, None]:
        action = jax.random.randint(key, (PLANT.requests,), 0, 4)
        return PLANT.step(state, action)[0], None

    run = eqx.filter_jit(lambda s: jax.lax.scan(slot, s, jax.random.split(jax.random.key(1), 30))[0])
    state = run(PLANT.reset(seeds(4, 1)[0]))
    assert int(state.requests.present.sum()) >= 2
    return state


def test_targets_by_hand() -> None:
    reward = jnp.array([[-1.0], [-2.0], [-4.0]])
    value = jnp.array([[-9.0], [-3.0], [-5.0]])
    # Slot 1: -4 + 0.5 V_2 = -6.5; slot 0: -2 + 0.5 (0.75 V_1 + 0.25 G_1).
    expected = [-2.0 + 0.5 * (0.75 * -3.0 + 0.25 * -6.5), -6.5, -5.0]
    np.testing.assert_allclose(lambda_returns(reward, value, 0.5, 0.25)[:, 0], expected)


def test_what_is_left_without_a_request_is_what_a_slot_without_it_leaves(busy: State) -> None:
    action = jnp.array([1, 2, 3, 1, 2, 3, 1, 2], jnp.int32)
    changed = eqx.filter_jit(PLANT.counterfactual)(busy, action)
    step = eqx.filter_jit(PLANT.step)
    for row in np.nonzero(np.asarray(busy.requests.present))[0]:
        absent = busy.requests._replace(present=busy.requests.present.at[row].set(False))
        after, _, _ = step(busy._replace(requests=absent), action)
        np.testing.assert_allclose(changed.without.first_s[row], after.broadcasts.wait_s[0], atol=1e-5)
        np.testing.assert_array_equal(changed.without.resident[row], after.servers.resident)
    # And it is not all the same: some request leaves more work behind.
    left_s, without_s = (np.asarray(each.wait_s + each.coming_s) for each in (changed.after, changed.without))
    assert (left_s[None] - without_s)[np.asarray(busy.requests.present)].max() > 0.1


def test_difference_is_cost_with_less_cost_without(busy: State) -> None:
    action = jnp.array([1, 1, 2, 3, 2, 3, 1, 2], jnp.int32)
    project = eqx.filter_jit(PLANT.project)

    def total(state: State) -> float:
        projection = project(state, action)
        return float(projection.cost.sum() + projection.delay_cost)

    found = np.asarray(eqx.filter_jit(PLANT.difference)(busy, action))
    for row in range(PLANT.requests):
        absent = busy.requests._replace(present=busy.requests.present.at[row].set(False))
        expected = total(busy._replace(requests=absent)) - total(busy)
        assert found[row] == pytest.approx(expected, abs=1e-4)


def test_value_knows_no_order_of_servers_and_any_number_of_them() -> None:
    critic = AfterstateCritic(Scale(2.0, 1e6, 1.0), jax.random.key(0))
    rng = np.random.default_rng(0)
    left = Afterstate(*(jnp.asarray(rng.exponential(3.0, 3)) for _ in range(3)), jnp.asarray(rng.random((3, 3)) < 0.5))
    order = jnp.array([2, 0, 1])
    plant = PLANT.plant
    turned = eqx.tree_at(
        lambda each: (each.server_speed, each.server_gpus),
        plant,
        (plant.server_speed[order], plant.server_gpus[order]),
    )
    moved = jax.tree.map(lambda field: field[order], left)
    assert float(critic(left, plant)) == pytest.approx(float(critic(moved, turned)), rel=1e-5)


@pytest.mark.slow
def test_learner_with_later_credit_trains_its_critic() -> None:
    scenario = small_plant(arrivals="load = 0.8")
    task = make_task(Environment.from_scenario(scenario), scenario)
    learner = make_algorithm("amarl", horizon=0.9, environments=16, slots=8, updates=20, width=8, critic_width=8)
    state = eqx.filter_jit(learner.init)(task, jax.random.key(0))
    update = eqx.filter_jit(learner.update)
    losses = []
    for _ in range(20):
        state, metrics = update(task, state)
        losses.append(float(metrics["later_loss"]))
    # The first values are about zero, the true ones are sums over ten slots.
    assert np.mean(losses[-4:]) < 0.5 * np.mean(losses[:2])
    assert float(metrics["later_value"]) < -1.0
