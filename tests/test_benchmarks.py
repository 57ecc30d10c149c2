"""The NumPy environments that the benchmarks compare with do the same as the compiled one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from benchmarks.numpy_environment import (
    BatchedNumpyEnvironment,
    BatchedRequests,
    NumpyEnvironment,
    SlotRequests,
)

from gmel.scenario.load import load_scenario
from gmel.simulator.environment import Environment, seeds
from gmel.simulator.state import Outcome, Requests, State

SLOTS, ENVIRONMENTS = 60, 3
Latencies = dict[tuple[int, int], float]


class Replay:
    """What the compiled environments drew, were told and did: host arrays [slots, environments, ...]."""

    def __init__(self) -> None:
        self.scenario = load_scenario("hall-20x5")
        environment = Environment.from_scenario(self.scenario)
        shape = (SLOTS, ENVIRONMENTS, environment.requests)
        self.actions = np.random.default_rng(3).integers(0, environment.servers + 1, shape)

        def slot(states: State, action: jax.Array) -> tuple[State, tuple[Requests, jax.Array, Outcome]]:
            after, reward, outcome = jax.vmap(environment.step)(states, action)
            after = jax.tree.map(lambda new, old: new.astype(old.dtype), after, states)
            return after, (states.requests, reward.team, outcome)

        states = jax.vmap(environment.reset)(seeds(7, ENVIRONMENTS))
        self.snr = np.asarray(states.links.uplink_snr, float)
        last, seen = jax.jit(lambda start, actions: jax.lax.scan(slot, start, actions))(
            states, jnp.asarray(self.actions, jnp.int32)
        )
        assert not np.any(last.lost)
        self.requests, self.team, self.outcome = jax.device_get(seen)

    def latencies(self, number: int) -> Latencies:
        """Final latency of each task by slot of decision and row, of one compiled environment."""
        outcome, account = self.outcome, self.outcome.account
        final = outcome.final[:, number]
        latency_s = sum(
            np.asarray(part[:, number], float) for name, part in account._asdict().items() if name != "energy_j"
        )
        keys = zip(outcome.decided_slot[:, number][final].tolist(), outcome.row[:, number][final].tolist(), strict=True)
        return dict(zip(keys, latency_s[final].tolist(), strict=True))


@pytest.fixture(scope="module")
def replay() -> Replay:
    return Replay()


def agree(ours: Latencies, theirs: Latencies) -> None:
    assert ours.keys() == theirs.keys()
    assert len(ours) > 3 * SLOTS
    np.testing.assert_allclose([ours[key] for key in theirs], list(theirs.values()), rtol=1e-5, atol=1e-5)


def test_one_environment_gives_the_compiled_latencies_and_rewards(replay: Replay) -> None:
    for number in range(ENVIRONMENTS):
        environment = NumpyEnvironment(replay.scenario, seed=0, snr=replay.snr[number])
        latencies: Latencies = {}
        for slot in range(SLOTS):
            requests = jax.tree.map(lambda column, slot=slot, number=number: column[slot, number], replay.requests)
            here = requests.present
            drawn = SlotRequests(
                requests.device[here], requests.work[here], requests.size_bit[here], requests.fade[here]
            )
            reward, finished = environment.step(drawn, replay.actions[slot, number][here])
            assert reward == pytest.approx(float(replay.team[slot, number]), rel=1e-4, abs=1e-4)
            latencies |= {(task.slot, task.row): task.latency_s for task in finished}
        agree(latencies, replay.latencies(number))


def test_many_environments_give_the_compiled_latencies_and_rewards(replay: Replay) -> None:
    environment = BatchedNumpyEnvironment(replay.scenario, ENVIRONMENTS, seed=0, snr=replay.snr)
    latencies: list[Latencies] = [{} for _ in range(ENVIRONMENTS)]
    for slot in range(SLOTS):
        requests = jax.tree.map(lambda column, slot=slot: column[slot], replay.requests)
        drawn = BatchedRequests(
            requests.present,
            requests.device,
            requests.work.astype(float),
            requests.size_bit.astype(float),
            requests.fade,
        )
        reward, finished, number = environment.step(drawn, replay.actions[slot])
        np.testing.assert_allclose(reward, replay.team[slot], rtol=1e-4, atol=1e-4)
        for which, task in zip(number.tolist(), finished, strict=True):
            latencies[which][task.slot, task.row] = task.latency_s
    for number in range(ENVIRONMENTS):
        agree(latencies[number], replay.latencies(number))


@pytest.mark.parametrize("batched", [False, True])
def test_drawn_traffic_has_the_load_of_the_scenario(batched: bool) -> None:
    scenario = load_scenario("hall-20x5")
    rate = scenario.arrival_rate_per_s
    assert rate is not None
    if batched:
        counts = BatchedNumpyEnvironment(scenario, 400, seed=1).draw().present.sum(axis=1)
    else:
        environment = NumpyEnvironment(scenario, seed=1)
        counts = np.array([len(environment.draw().device) for _ in range(400)])
    # Five standard errors of a Poisson mean.
    expected = rate * scenario.slot.length_s
    assert counts.mean() == pytest.approx(expected, abs=5 * (expected / 400) ** 0.5)


def test_a_scenario_beyond_the_numpy_model_is_refused() -> None:
    with pytest.raises(ValueError, match="hall-20x5 only"):
        NumpyEnvironment(load_scenario("factory"), seed=0)
