"""The preset adsac beside its source, recomputed in plain Python (`reference_adsac.py`)."""

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gmel.policies.central import EarliestFinish
from gmel.scenario.load import load_scenario
from gmel.simulator.environment import Environment, seeds
from gmel.simulator.records import Records, task_records
from gmel.simulator.state import State
from placing_by_room import one_by_one
from reference_adsac import (
    RULES,
    SERVERS,
    SERVICES,
    TYPES,
    EdgeServer,
    Played,
    Task,
    draw_servers,
    draw_tasks,
    play,
    run_time,
)

SLOT = 100.0
PLACES = 1 + SERVERS

Chooser = Callable[[Environment, State, jax.Array, jax.Array], jax.Array]
"""Options of a slot, from the number of tasks before it and a key."""


class Episodes(NamedTuple):
    """Episodes of the preset, leading axes episode and slot."""

    present: np.ndarray
    kind: np.ndarray
    steps: np.ndarray
    action: np.ndarray
    team: np.ndarray
    records: list[Records]

    @property
    def kept(self) -> np.ndarray:
        """Reward of each episode; tasks that run at its end count as done."""
        return self.team.sum(axis=1)

    @property
    def paid(self) -> np.ndarray:
        """The same as the source counts it, where the quality of a task that was accepted stays paid."""
        again = [one.quality[one.dropped & (one.end_s > one.start_s + 1e-3)].sum() for one in self.records]
        return self.kept + np.array(again)


def ran(choose: Chooser, episodes: int, slots: int = 10_000, first_seed: int = 1) -> Episodes:
    environment = Environment.from_scenario(load_scenario("adsac"))

    def slot(carry, key):
        state, turn = carry
        action = choose(environment, state, turn, key)
        after, reward, outcome = environment.step(state, action)
        requests = state.requests
        seen = (requests.present, requests.model, requests.steps, action, reward.team, state.lost)
        return (after, turn + jnp.sum(requests.present)), (seen, outcome)

    def episode(seed, key):
        keys = jax.random.split(key, slots)
        return jax.lax.scan(slot, (environment.reset(seed), jnp.zeros((), jnp.int32)), keys)[1]

    keys = jax.random.split(jax.random.key(1), episodes)
    seen, outcome = jax.device_get(
        jax.jit(lambda s, k: jax.lax.map(lambda x: episode(*x), (s, k)))(seeds(first_seed, episodes), keys)
    )
    *seen, lost = seen
    assert int(lost.max()) == 0
    records = [task_records(jax.tree.map(lambda field, n=n: field[n], outcome), SLOT) for n in range(episodes)]
    return Episodes(*seen[:4], seen[4].astype(np.float64), records)


def as_option(number: jax.Array) -> jax.Array:
    """The source counts server x 4 + service."""
    return 1 + number // SERVICES + PLACES * (number % SERVICES)


def at_random(environment: Environment, state: State, turn: jax.Array, key: jax.Array) -> jax.Array:
    del state, turn
    return as_option(jax.random.randint(key, (environment.requests,), 0, SERVERS * SERVICES))


def round_robin(environment: Environment, state: State, turn: jax.Array, key: jax.Array) -> jax.Array:
    del environment, key
    return as_option((turn + jnp.cumsum(state.requests.present) - 1) % (SERVERS * SERVICES))


def most_room(environment: Environment, state: State, turn: jax.Array, key: jax.Array) -> jax.Array:
    del turn, key
    return as_option(one_by_one(environment, state, lambda room, row: jnp.argmax(room) * SERVICES, SERVICES))


def prophet(environment: Environment, state: State, turn: jax.Array, key: jax.Array) -> jax.Array:
    del turn, key
    requests = state.requests
    table = environment.plant.catalogue.quality[1:].reshape(SERVERS, SERVICES, TYPES, -1)

    def best(room: jax.Array, row: jax.Array) -> jax.Array:
        worth = table[:, :, requests.model[row], requests.steps[row].astype(jnp.int32)]
        return jnp.argmax(jnp.where((room >= requests.steps[row])[:, None], worth, -1.0).reshape(-1))

    return as_option(one_by_one(environment, state, best, SERVICES))


def earliest_finish(environment: Environment, state: State, turn: jax.Array, key: jax.Array) -> jax.Array:
    del turn
    return EarliestFinish().assign(environment, state, key)


CHOOSERS: dict[str, Chooser] = {
    "random": at_random,
    "round robin": round_robin,
    "most room": most_room,
    "prophet": prophet,
}


def replayed(episodes: Episodes, number: int) -> tuple[list[Task], Played]:
    """The tasks of an episode, where they were sent, played again by the source's rules."""
    slot, row = np.nonzero(episodes.present[number])
    tasks = [
        Task(SLOT * s, int(episodes.kind[number, s, r]), int(episodes.steps[number, s, r]))
        for s, r in zip(slot.tolist(), row.tolist(), strict=True)
    ]
    options = episodes.action[number][slot, row]
    where = [((o - 1) % PLACES, o // PLACES) for o in options.tolist()]
    return tasks, play(draw_servers(), tasks, lambda *given: where[given[3]], np.random.default_rng(0))


def test_the_servers_are_those_of_the_source() -> None:
    """Its fixed seed, drawn again."""
    scenario = load_scenario("adsac")
    servers = draw_servers()
    assert [server.capacity for server in scenario.servers] == [server.total for server in servers]
    assert (len(scenario.servers), len(scenario.models), scenario.services) == (SERVERS, TYPES, SERVICES)
    table = np.asarray(Environment.from_scenario(scenario).plant.catalogue.quality)
    for j, server in enumerate(servers):
        for m, service in enumerate(server.services):
            for kind in range(TYPES):
                for steps in range(100, 250, 10):
                    found = table[1 + j, m * TYPES + kind, steps]
                    assert found == pytest.approx(service.worth(Task(0.0, kind, steps)), abs=1e-6)
    for model in scenario.models:
        assert model.mean_work(100.0) == pytest.approx(run_time(100))
        assert model.mean_work(240.0) == pytest.approx(run_time(240))
    # The steps that are asked for at once, over those that fit: about 0.70.
    asked = np.arange(100, 250, 10)
    load = 0.0015 * np.mean([t * run_time(t) for t in asked]) / sum(server.total for server in servers)
    assert load == pytest.approx(0.696, abs=1e-3)


@pytest.mark.parametrize("rule", ["random", "prophet"])
def test_every_task_fares_as_in_the_source(rule: str) -> None:
    """The same tasks sent to the same services: crashes, losses and qualities task by task, and the reward."""
    episodes = ran(CHOOSERS[rule], episodes=1, slots=2_500, first_seed=7)
    tasks, played = replayed(episodes, 0)
    assert len(tasks) > 250
    records = episodes.records[0]
    slot, row = np.nonzero(episodes.present[0])
    at = {(s, r): n for n, (s, r) in enumerate(zip(slot.tolist(), row.tolist(), strict=True))}
    done = ~np.array(played.lost)
    # Tasks that still run have no record; what has one is in order of decision.
    ended = [n for n, task in enumerate(tasks) if not done[n] or task.time + run_time(task.steps) < 2_500 * SLOT]
    assert len(at) == len(tasks)
    assert len(records) == len(ended)
    np.testing.assert_array_equal(records.dropped, np.array(played.lost)[ended])
    np.testing.assert_allclose(records.quality, np.array(played.quality)[ended], atol=1e-6)
    assert float(episodes.kept[0]) == pytest.approx(played.kept, abs=0.02)
    assert float(episodes.paid[0]) == pytest.approx(played.paid, abs=0.02)
    assert (played.crashes > 5) == (rule == "random")


@cache
def source(rule: str, episodes: int = 24) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Reward as paid and as kept, and crashes, of each episode of a rule, in plain Python."""
    servers: list[EdgeServer] = draw_servers()
    played: list[Played] = []
    for seed in range(episodes):
        rng = np.random.default_rng(seed)
        played.append(play(servers, draw_tasks(rng), RULES[rule], rng))
    paid, kept, crashes = ([getattr(one, name) for one in played] for name in ("paid", "kept", "crashes"))
    return np.array(paid), np.array(kept), np.array(crashes, float)


@pytest.mark.slow
@pytest.mark.parametrize("rule", sorted(CHOOSERS))
def test_rules_earn_what_they_earn_in_the_source(rule: str) -> None:
    """Other tasks, so means agree within three standard errors."""
    count = 6
    episodes = ran(CHOOSERS[rule], count)
    paid, kept, _ = source(rule)
    for found, expected in ((episodes.paid, paid), (episodes.kept, kept)):
        error = expected.std(ddof=1) * np.sqrt(1 / count + 1 / len(expected))
        assert abs(found.mean() - expected.mean()) < 3 * error


@pytest.mark.slow
def test_the_earliest_finish_sees_the_hidden_quality() -> None:
    """A central reference decides by what the environment projects, so it does as the prophet does."""
    slots = 2_000
    seen, best = (ran(choose, 2, slots) for choose in (earliest_finish, prophet))
    np.testing.assert_array_equal(seen.present, best.present)
    np.testing.assert_allclose(seen.kept, best.kept, rtol=0.02)
