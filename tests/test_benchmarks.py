"""The NumPy and SimPy environments that the benchmarks compare with do the same as the compiled one."""

import sys
from collections.abc import Iterator

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
from benchmarks.sections import Row, measure_simpy
from benchmarks.tables import aims, speed_table

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


def test_simpy_gives_the_latencies_of_numpy(replay: Replay) -> None:
    """On the requests and actions of the compiled environments, whose latencies those of NumPy are."""
    pytest.importorskip("simpy", reason="SimPy is in the dev group: make env")
    from benchmarks.simpy_environment import SimpyEnvironment

    nothing = SlotRequests(np.zeros(0, int), np.zeros(0), np.zeros(0), np.zeros((0, 5)))
    for number in range(ENVIRONMENTS):
        slots: list[tuple[SlotRequests, np.ndarray]] = []
        for slot in range(SLOTS):
            requests = jax.tree.map(lambda column, slot=slot, number=number: column[slot, number], replay.requests)
            here = requests.present
            columns = (requests.work, requests.size_bit, requests.fade)
            drawn = SlotRequests(requests.device[here], *(column[here].astype(float) for column in columns))
            slots.append((drawn, replay.actions[slot, number][here]))
        by_slots = NumpyEnvironment(replay.scenario, seed=0, snr=replay.snr[number])
        cost, expected = 0.0, dict[tuple[int, int], float]()
        # SimPy runs until the last task is done: some uploads end after the last slot.
        for slot in range(SLOTS + 100):
            reward, finished = by_slots.step(*(slots[slot] if slot < SLOTS else (nothing, nothing.device)))
            cost -= reward
            expected |= {(task.slot, task.row): task.latency_s for task in finished}
        assert not by_slots.flying
        by_events = SimpyEnvironment(replay.scenario, seed=0, snr=replay.snr[number])
        by_events.run(slots)
        found = {(task.slot, task.row): task.latency_s for task in by_events.finished}
        assert len(found) == len(by_events.finished) == sum(len(action) for _, action in slots)
        assert found.keys() == expected.keys()
        np.testing.assert_allclose([found[key] for key in expected], list(expected.values()), rtol=0, atol=1e-9)
        assert by_events.cost == pytest.approx(cost, abs=1e-7)


def test_simpy_announces_the_backlogs_of_numpy() -> None:
    pytest.importorskip("simpy", reason="SimPy is in the dev group: make env")
    from benchmarks.simpy_environment import SimpyEnvironment

    scenario = load_scenario("hall-20x5")
    snr = np.full((20, 5), 100.0)
    by_slots, by_events = NumpyEnvironment(scenario, 2, snr), SimpyEnvironment(scenario, 2, snr)
    announced: list[list[float]] = []
    expected: list[list[float]] = []

    def slots() -> Iterator[tuple[SlotRequests, np.ndarray]]:
        for _ in range(SLOTS):
            expected.append(list(by_slots.server_free_s))
            requests = by_slots.draw()
            action = by_slots.random_actions(requests)
            by_slots.step(requests, action)
            yield requests, action
            announced.append(by_events.announced_s)

    by_events.run(slots())
    assert np.count_nonzero(expected) > SLOTS
    np.testing.assert_allclose(announced, expected, rtol=0, atol=1e-9)


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


def rates(what: str, decisions_per_s: float, requests_per_s: float, **more: object) -> Row:
    """A row of the speed table, its processor time twice its time on the clock."""
    return {
        **{"what": what, "slots": 10, "wall_s": 1.0, "requests_per_slot": 5.6, "peak_bytes": 1, "state_bytes": 1},
        **{"decisions_per_s": decisions_per_s, "decisions_per_cpu_s": 0.5 * decisions_per_s},
        **{"requests_per_s": requests_per_s, "requests_per_cpu_s": 0.5 * requests_per_s},
        **more,
    }


def test_aims_are_judged_by_what_was_measured() -> None:
    results: dict[str, list[Row]] = {
        "numpy": [rates("NumPy", 0.2e6, 1e5), rates("NumPy, vectorised", 1e9, 1e8)],
        "simpy": [rates("SimPy", 0.04e6, 1e4)],
        "simulator": [rates("JAX", 1e6, 1e5), rates("JAX, 8", 6e6, 1e6), rates("JAX, observed", 9e9, 1e9)],
        "large": [
            rates("small", 6e6, 1e6, scenario="hall-20x5"),
            rates("large", 1e6, 2e4, scenario="factory-xl"),
            rates("large x 8", 4e6, 1e5, scenario="factory-xl"),
        ],
    }
    found = {entry["what"]: entry for entry in aims(results)}
    expected = {
        "decisions/s, hall-20x5": (6e6, 3e6, True, None),
        "decisions/s over those of SimPy": (150.0, 150.0, True, True),
        "decisions/s over those of NumPy, one environment": (30.0, 30.0, True, True),
        "time per request decided, factory-xl over hall-20x5": (10.0, 10.0, False, False),
        "time per agent decision, factory-xl over hall-20x5": (1.5, 1.5, True, True),
    }
    assert found.keys() == expected.keys()
    for what, (clock, processor, by_clock, by_processor) in expected.items():
        entry = found[what]
        assert (entry["clock"], entry["processor"]) == pytest.approx((clock, processor))
        assert entry["met"] == {"clock": by_clock, "processor": by_processor}


def test_without_simpy_the_row_says_so_and_the_run_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "simpy", None)
    monkeypatch.delitem(sys.modules, "benchmarks.simpy_environment", raising=False)
    rows = measure_simpy(quick=True)
    assert "not installed" in rows[0]["missing"]
    results = {"simpy": rows, "simulator": [rates("JAX", 6e6, 1e6)]}
    table = speed_table(results)
    assert table is not None
    assert table.row_count == 2
    assert [entry["what"] for entry in aims(results)] == ["decisions/s, hall-20x5"]
