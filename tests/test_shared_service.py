"""The environment with servers that share their time, batch, fail or straggle."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

import compiled
from gmel.scenario.errors import InputError
from gmel.scenario.load import parse_scenario
from gmel.scenario.schema import Scenario
from gmel.simulator.environment import Environment, seeds
from gmel.simulator.failures import next_speed
from gmel.simulator.records import Records, task_records
from gmel.simulator.state import Outcome, State
from small_plants import plant_text

DRAIN_SLOTS = 80


def shared_plant(service: str, servers: str = "", **choices: Any) -> Scenario:
    """A small plant with more sections; `servers` is added to each server."""
    text = plant_text(**{"max_per_slot": 8, "max_uploads": 60, "arrivals": "load = 0.3", **choices})
    text = text.replace("memory_gb = 24.0", f"memory_gb = 24.0\n{servers}")
    return parse_scenario(text + service, "small plant")


def drive(scenario: Scenario, slots: int = 200, seed: int = 3) -> tuple[Records, Outcome, State, np.ndarray]:
    """Random allowed actions, then empty slots until everything has ended; also the speed of the servers by slot."""
    environment = Environment.from_scenario(scenario)

    def slot(state: State, key: jax.Array) -> tuple[State, tuple[Outcome, Any]]:
        busy = state.slot < slots
        state = state._replace(requests=state.requests._replace(present=state.requests.present & busy))
        mask = environment.observe(state).mask
        action = jax.random.categorical(key, jnp.where(mask, 0.0, -jnp.inf)).astype(jnp.int32)
        after, _, outcome = environment.step(state, action)
        return after, (outcome, state.speed)

    @eqx.filter_jit
    def episode() -> tuple[State, tuple[Outcome, Any]]:
        keys = jax.random.split(jax.random.key(seed), slots + DRAIN_SLOTS)
        return jax.lax.scan(slot, environment.reset(seeds(seed, 1)[0]), keys)

    last, (outcome, speed) = jax.device_get(episode())
    assert int(last.lost) == 0
    return task_records(outcome, scenario.slot.length_s), outcome, last, np.asarray(speed)


VARIANTS = {
    "sharing": shared_plant('[service]\ndiscipline = "sharing"', gpus=(2, 1, 1)),
    "batching": shared_plant('[service]\ndiscipline = "batching"', "concurrency = 4\nround_share = 0.4"),
    "failures": shared_plant("[failures]\nmean_up_s = 20.0\nmean_down_s = 4.0\nstraggle = 0.1"),
    "switching": shared_plant(
        '[service]\ndiscipline = "sharing"\n[failures]\nmean_up_s = 30.0\nmean_down_s = 3.0\non_failure = "resume"',
        "concurrency = 2",
        catalogue=True,
        switching=True,
        deadline="drop",
        deadline_s=(2.0, 8.0),
    ),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_every_task_ends_once_and_its_parts_add_up(name: str) -> None:
    scenario = VARIANTS[name]
    records, outcome, last, _ = drive(scenario)
    assert not last.uploads.present.any(), "drain longer"
    # One record for each task that was decided.
    keys = np.asarray(outcome.decided_slot)[outcome.final] * 1000 + np.asarray(outcome.row)[outcome.final]
    assert len(np.unique(keys)) == len(keys) == len(records) > 200
    served = ~records.dropped
    np.testing.assert_allclose(
        records.latency_s[served], (records.end_s + records.download_s - records.generated_s)[served], atol=2e-3
    )
    np.testing.assert_allclose(
        records.latency_s[~served], np.maximum(records.deadline_s, records.wait_to_slot_s)[~served]
    )
    for part in ("wait_to_slot_s", "upload_s", "queue_s", "switch_s", "service_s", "download_s"):
        assert (getattr(records, part) >= -1e-4).all(), part
    assert (records.start_s[served] >= records.upload_end_s[served] - 1e-4).all()


def test_with_the_fifo_limit_it_is_the_fifo_server_task_by_task() -> None:
    """Batching without a gain for the batch, one task at a time, is first in, first out: the two engines agree."""
    plain = drive(shared_plant("", max_uploads=60))[0]
    limited = drive(shared_plant('[service]\ndiscipline = "batching"', "concurrency = 1\nround_share = 1.0"))[0]
    assert len(plain) == len(limited) > 200
    np.testing.assert_array_equal(plain.option, limited.option)
    np.testing.assert_allclose(plain.latency_s, limited.latency_s, atol=1e-3)


def test_no_more_tasks_in_service_than_the_limit() -> None:
    records, *_ = drive(shared_plant('[service]\ndiscipline = "batching"', "concurrency = 2\nround_share = 0.5"))
    most = 0
    for server in (1, 2, 3):
        mine = records.where(records.option == server)
        edges = sorted([(t, 1) for t in mine.start_s] + [(t - 1e-4, -1) for t in mine.end_s])
        most = max(most, int(np.cumsum([step for _, step in edges]).max()))
    assert most == 2


def test_team_rewards_add_up_to_the_cost_of_all_tasks() -> None:
    """Projections change while tasks share a server; what is credited in the end is what they cost."""
    scenario = shared_plant('[service]\ndiscipline = "sharing"', reward="latency_scale_s = 1.0\nclip = 1000.0")
    environment = Environment.from_scenario(scenario)

    def slot(state: State, key: jax.Array) -> tuple[State, tuple[jax.Array, Outcome]]:
        state = state._replace(requests=state.requests._replace(present=state.requests.present & (state.slot < 60)))
        action = jax.random.randint(key, (environment.requests,), 0, 4)
        after, reward, outcome = environment.step(state, action)
        return after, (reward.team, outcome)

    run = eqx.filter_jit(lambda s: jax.lax.scan(slot, s, jax.random.split(jax.random.key(0), 140)))
    last, (team, outcome) = jax.device_get(run(compiled.reset(environment, seeds(1, 1)[0])))
    assert not last.uploads.present.any()
    records = task_records(outcome, 1.0)
    assert float(np.sum(team)) == pytest.approx(-records.latency_s.sum(), rel=1e-4)


def test_availability_is_that_of_the_chain() -> None:
    scenario = VARIANTS["failures"]
    environment = Environment.from_scenario(scenario)
    speed, up = jnp.ones(3), []

    step = jax.jit(lambda speed, slot: next_speed(environment.plant, jnp.array([5, 6], jnp.uint32), slot, speed))
    for slot in range(1, 4001):
        speed = step(speed, jnp.asarray(slot))
        up.append(np.asarray(speed))
    seen = np.stack(up)
    fails, repaired = 1 - np.exp(-1 / 20.0), 1 - np.exp(-1 / 4.0)
    expected = repaired / (fails + repaired)
    # A two-state chain: the variance of its mean is that of independent slots times (1 + r) / (1 - r).
    correlation = 1 - fails - repaired
    error = np.sqrt(expected * (1 - expected) * (1 + correlation) / (1 - correlation) / seen.size)
    assert abs((seen > 0).mean() - expected) < 4 * error
    slow = (seen == 0.25).sum() / (seen > 0).sum()
    assert stats.binomtest(int((seen == 0.25).sum()), int((seen > 0).sum()), 0.1).pvalue > 1e-4, slow


def test_a_server_that_is_down_serves_nothing_and_is_masked_once_it_is_known() -> None:
    records, _, _, speed = drive(VARIANTS["failures"])
    down = speed == 0
    assert 0.05 < down.mean() < 0.5
    for server in range(3):
        mine = records.where((records.option == server + 1) & ~records.dropped)
        # Nothing starts and nothing ends while the server is down.
        for when in (mine.start_s, mine.end_s):
            inside = when - np.floor(when)
            slots = np.floor(when).astype(int)
            clear = (inside > 1e-3) & (inside < 1 - 1e-3) & (slots < len(down))
            assert not down[slots[clear], server].any()
        # Known one slot later, it is not chosen: only those that decided in the slot it failed were caught.
        known = np.roll(down[:, server], 1)
        known[0] = False
        assert not known[mine.decided_slot].any()


def test_restart_loses_work_and_resume_does_not() -> None:
    service = "[failures]\nmean_up_s = 8.0\nmean_down_s = 4.0\non_failure = "
    restart = drive(shared_plant(service + '"restart"'))[0]
    resume = drive(shared_plant(service + '"resume"'))[0]
    np.testing.assert_array_equal(restart.option, resume.option)
    assert (restart.latency_s >= resume.latency_s - 1e-2).mean() > 0.95
    assert restart.latency_s.mean() > resume.latency_s.mean() + 0.05


@pytest.mark.parametrize(
    ("service", "servers", "message"),
    [
        ('[service]\ndiscipline = "batching"', "", "needs servers.concurrency"),
        ("", "concurrency = 2", "does not use"),
        ('[service]\ndiscipline = "sharing"', "concurrency = 1", "must not be below gpus = 2"),
        ('[service]\ndiscipline = "lifo"', "", "service.discipline"),
        ("[failures]\nmean_up_s = -1.0", "", "failures.mean_up_s"),
    ],
)
def test_what_cannot_be_is_named(service: str, servers: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        shared_plant(service, servers, gpus=(1, 2, 1))
