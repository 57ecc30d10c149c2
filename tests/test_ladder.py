"""The simulator lands on the reference ladder of `hall-20x5`: an independent simulator, other topologies and draws."""

import jax
import pytest
from benchmarks.ladder import REFERENCE

from gmel.evaluation.episodes import Episodes, run_episodes
from gmel.evaluation.ladder import ladder
from gmel.evaluation.statistics import t_interval
from gmel.evaluation.tuning import shipped
from gmel.scenario.load import digest, load_scenario
from gmel.simulator.environment import Environment

QUICK = ["proportional", "greedy", "led2", "coordinated"]


def latency_agrees(load: float, name: str, episodes: int, slots: int) -> None:
    scenario = load_scenario("hall-20x5", load)
    tuned = shipped(digest(scenario))
    assert tuned is not None, "the package has tuned parameters for this load"
    policy = next(entry.policy for entry in ladder(tuned) if entry.name == name)
    traffic = Episodes(episodes, slots, 100, 40_000)
    measured = run_episodes(Environment.from_scenario(scenario), policy, traffic, jax.random.key(3))
    ours = t_interval(measured.per_episode(lambda records: float(records.latency_s.mean())))
    theirs = REFERENCE[load][name]
    # The intervals overlap, with 1 % for what both leave out (transients, tuning).
    assert ours.low - 0.01 * ours.mean <= theirs.mean_s + theirs.half_s
    assert ours.high + 0.01 * ours.mean >= theirs.mean_s - theirs.half_s
    assert not measured.unstable
    assert measured.unfinished.sum() == 0


@pytest.mark.parametrize("name", QUICK)
def test_rungs_at_load_07(name: str) -> None:
    latency_agrees(0.7, name, 8, 900)


DEPARTS = pytest.mark.xfail(
    reason="its temperature is tuned on another grid: 6 % faster here (docs/presets/hall-20x5.md)"
)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("load", "name"),
    [
        pytest.param(load, name, marks=DEPARTS if (load, name) == (0.9, "softmax") else ())
        for load in (0.5, 0.7, 0.9)
        for name in REFERENCE[0.7]
    ],
)
def test_all_rungs_at_all_loads(load: float, name: str) -> None:
    latency_agrees(load, name, 8, 2500)
