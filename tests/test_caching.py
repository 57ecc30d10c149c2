"""Models that servers hold by choice: times by a plain-Python replay, memory, long slots, the rules that choose."""

from typing import Any, NamedTuple, get_args

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gmel.evaluation.episodes import Episodes, run_episodes
from gmel.evaluation.evaluate import metrics_of
from gmel.policies.rules import Greedy
from gmel.scenario.errors import InputError
from gmel.scenario.load import load_scenario, parse_scenario
from gmel.scenario.schema import Cache, Scenario
from gmel.simulator.caching import CACHE_POLICIES, first_residents, within_memory
from gmel.simulator.environment import Environment, seeds
from gmel.simulator.plant import build_plant
from gmel.simulator.records import Records, task_records
from gmel.simulator.state import Outcome, State
from small_plants import RADIO, WIRED, plant_text

MODELS = 6
MEMORY_GB = (4.0, 5.0, 3.0, 6.0, 4.0, 2.0)
LOAD_S = (0.8, 1.7, 1.1, 2.3, 0.4, 0.9)
POPULARITY = tuple((1 + rank) ** -1.2 for rank in (2, 0, 1, 3, 4, 5))
ROOM_GB = (9.0, 7.0, 12.0)
SLOTS, DRAIN_SLOTS, EACH = 60, 40, 7


def plant(
    policy: str | None = "popular", every: int = EACH, room_gb: tuple[float, ...] = ROOM_GB, **choices: Any
) -> Scenario:
    """A small plant whose load times are known: those of a model are always the same."""
    given = {"arrivals": "load = 0.6", "max_uploads": 64, "gpus": (1, 2, 1), "radio": RADIO, **choices}
    text = plant_text(memory_gb=room_gb, switching=True, catalogue=True, **given)
    head, _, rest = text.partition("[[models]]")
    tail = rest[rest.index("[tasks]") :]
    models = "\n".join(
        f'[[models]]\nname = "m{number}"\npopularity = {POPULARITY[number]}\nstep_work = {0.02 + 0.01 * number}\n'
        "steps = { values = [30.0], weights = [1.0] }\nimages = { values = [1.0, 2.0], weights = [3.0, 1.0] }\n"
        f"memory_gb = {MEMORY_GB[number]}\nbits_in = {{ low = 1e6, high = 4e6 }}\n"
        f"load = {{ warm_share = 1.0, warm_median_s = {LOAD_S[number]}, sigma = 0.0 }}"
        for number in range(MODELS)
    )
    cache = "" if policy is None else f'[cache]\ndecision_slots = {every}\npolicy = "{policy}"\n'
    return parse_scenario(f"{head}{models}\n{tail}\n{cache}", "test")


class Driven(NamedTuple):
    """What a run left: records, outcomes, the states at slot starts, and what each device saw."""

    records: Records
    outcome: Outcome
    states: State
    masks: np.ndarray


def drive(scenario: Scenario, seed: int = 3, masked: bool = True, chosen: np.ndarray | None = None) -> Driven:
    """Random options (with `masked` allowed ones), then slots without requests. `chosen`: handed in at every slot."""
    environment = Environment.from_scenario(scenario)
    cache = None if chosen is None else jnp.asarray(chosen)

    def slot(state: State, key: jax.Array) -> tuple[State, tuple[Outcome, State, jax.Array]]:
        state = state._replace(requests=state.requests._replace(present=state.requests.present & (state.slot < SLOTS)))
        mask = environment.observe(state).mask
        allowed = mask if masked else jnp.ones_like(mask)
        action = jax.random.categorical(key, jnp.where(allowed, 0.0, -jnp.inf)).astype(jnp.int32)
        after, _, outcome = environment.step(state, action, cache=cache)
        return after, (outcome, state, mask)

    @eqx.filter_jit
    def episode() -> Any:
        keys = jax.random.split(jax.random.key(seed), SLOTS + DRAIN_SLOTS)
        return jax.lax.scan(slot, environment.reset(seeds(seed, 1)[0], cache=cache), keys)

    last, (outcome, states, masks) = jax.device_get(episode())
    assert int(last.lost) == 0
    return Driven(task_records(outcome, scenario.slot.length_s), outcome, states, np.asarray(masks))


def replayed(
    records: Records, gpus: tuple[int, ...], held: np.ndarray, slot_s: float
) -> tuple[np.ndarray, np.ndarray, float]:
    """Start and load time of each offloaded task in plain Python, from the sets held at each slot start.

    At a slot start where the set changes each new model is loaded, in the order of the catalogue, on the GPU that is
    free first, behind the tasks that were at the server before; a task starts when it is there, a GPU is free, and its
    model loaded; if its server does not hold the model when it comes, it loads it itself. Also all time of loading by
    choice.
    """
    start_s, switch_s, loading_s = np.zeros(len(records)), np.zeros(len(records)), 0.0
    for server, count in enumerate(gpus):
        free_s, loaded_s = [0.0] * count, dict.fromkeys(range(MODELS), 0.0)
        events = [(records.upload_end_s[task], 1, task) for task in np.flatnonzero(records.option == server + 1)]
        for slot in range(1, held.shape[0]):
            new = np.flatnonzero(held[slot, server] & ~held[slot - 1, server])
            events += [(slot * slot_s, 0, model) for model in new]
        for time_s, kind, which in sorted(events):
            gpu = int(np.argmin(free_s))
            begin_s = max(time_s, free_s[gpu])
            if kind == 0:
                free_s[gpu] = loaded_s[which] = begin_s + LOAD_S[which]
                loading_s += LOAD_S[which]
                continue
            model = int(records.model[which])
            if held[int(time_s // slot_s), server, model]:
                begin_s = max(begin_s, loaded_s[model])
            else:
                switch_s[which] = LOAD_S[model]
            start_s[which] = begin_s
            free_s[gpu] = begin_s + switch_s[which] + records.service_s[which]
    return start_s, switch_s, loading_s


@pytest.mark.parametrize(
    ("policy", "masked"), [("popular", False), ("spread", True), ("recent", True), ("random", True), ("random", False)]
)
def test_tasks_wait_for_their_model_or_load_it_themselves(policy: str, masked: bool) -> None:
    scenario = plant(policy)
    records, outcome, states, _ = drive(scenario, masked=masked)
    start_s, switch_s, loading_s = replayed(records, (1, 2, 1), states.servers.resident, 1.0)
    offloaded = records.option > 0
    assert offloaded.sum() > 80
    np.testing.assert_allclose(records.start_s[offloaded], start_s[offloaded], atol=3e-4)
    np.testing.assert_allclose(records.switch_s[offloaded], switch_s[offloaded], rtol=1e-5)
    assert outcome.cache is not None
    assert outcome.cache.load_s.sum() == pytest.approx(loading_s, rel=1e-5)
    np.testing.assert_allclose(outcome.cache.energy_j, 5.0 * outcome.cache.load_s, rtol=1e-6)
    if not masked:
        assert (switch_s > 0).sum() > 10
    if policy in ("popular", "spread"):
        assert loading_s == 0
    else:
        assert loading_s > 5


def test_a_task_for_a_model_that_another_gpu_still_loads_waits_for_it() -> None:
    """Two GPUs, one of which loads m3 for 2.3 s: the task at 0.25 s starts then, not before, and loads nothing."""
    scenario = plant("popular", every=1, devices=1, speeds=(2.0,), gpus=(2,), room_gb=(6.0,), radio=WIRED)
    environment = Environment.from_scenario(scenario)
    only = np.arange(MODELS)[None, :] == 3
    state = eqx.filter_jit(environment.reset)(seeds(3, 1)[0])
    nothing = state._replace(requests=state.requests._replace(present=jnp.zeros_like(state.requests.present)))
    action = jnp.zeros(environment.requests, jnp.int32)
    state, _, outcome = eqx.filter_jit(environment.step)(nothing, action, cache=jnp.asarray(only))
    assert outcome.cache is not None
    assert outcome.cache.load_s[0] == pytest.approx(2.3)
    np.testing.assert_array_equal(state.servers.resident, only)
    np.testing.assert_allclose(np.sort(state.servers.free_s[0]), [0.0, 2.3], rtol=1e-6)
    first = jnp.arange(environment.requests) == 0
    asked = state.requests._replace(present=first, model=jnp.full_like(state.requests.model, 3))
    projected = eqx.filter_jit(environment.project)(state._replace(requests=asked), 1 + action)
    service_s = float(asked.work[0] * asked.noise[0]) / 2.0
    waited_s = -float(asked.generated_s[0])
    assert projected.latency_s[0] == pytest.approx(waited_s + 2.3 + service_s, rel=1e-5)


@pytest.mark.parametrize("policy", CACHE_POLICIES)
def test_sets_fit_the_memory_and_change_at_long_slots_alone(policy: str) -> None:
    states = drive(plant(policy)).states
    held = np.asarray(states.servers.resident)
    assert (held @ np.array(MEMORY_GB) <= np.array(ROOM_GB)[None, :]).all()
    changed = np.flatnonzero((held[1:] != held[:-1]).any(axis=(1, 2))) + 1
    assert (changed % EACH == 0).all()
    if policy == "random":
        assert len(changed) > 0.7 * (SLOTS + DRAIN_SLOTS) / EACH
    if policy in ("popular", "spread"):
        assert len(changed) == 0


def greedily(order: list[int], room_gb: float) -> set[int]:
    """The rule of the page in plain Python: in this order, those that fit."""
    taken: set[int] = set()
    for model in order:
        if sum(MEMORY_GB[m] for m in taken) + MEMORY_GB[model] <= room_gb:
            taken.add(model)
    return taken


def by_popularity() -> list[int]:
    return sorted(range(MODELS), key=lambda model: -POPULARITY[model])


def test_popular_takes_the_most_popular_that_fit() -> None:
    held = np.asarray(drive(plant("popular")).states.servers.resident)[0]
    for server, room_gb in enumerate(ROOM_GB):
        assert set(np.flatnonzero(held[server])) == greedily(by_popularity(), room_gb)
    # Memory differs, so do the sets; where one model does not fit the next that does is taken.
    assert set(np.flatnonzero(held[1])) == {1, 5}


def test_spread_puts_every_model_somewhere_and_then_again() -> None:
    held = np.asarray(drive(plant("spread")).states.servers.resident)[0]
    room_gb, placed = list(ROOM_GB), [set[int](), set[int](), set[int]()]
    for _ in ROOM_GB:
        for model in by_popularity():
            fit = [s for s in range(3) if model not in placed[s] and MEMORY_GB[model] <= room_gb[s]]
            if fit:
                best = max(fit, key=lambda s: (room_gb[s], -s))
                placed[best].add(model)
                room_gb[best] -= MEMORY_GB[model]
    assert [set(np.flatnonzero(row)) for row in held] == placed
    assert held.any(axis=0).all()
    assert held.sum() > MODELS


def test_recent_counts_what_the_devices_of_a_cell_asked_for_in_the_last_long_slot() -> None:
    states = drive(plant("recent")).states
    held, requests = np.asarray(states.servers.resident), states.requests
    home = np.argmax(np.asarray(states.links.uplink_snr), axis=-1)
    seen = 0
    for due in range(EACH, SLOTS, EACH):
        asked = np.zeros((3, MODELS), int)
        for slot in range(due - EACH, due):
            for row in np.flatnonzero(requests.present[slot]):
                asked[home[slot, requests.device[slot, row]], requests.model[slot, row]] += 1
        for server, room_gb in enumerate(ROOM_GB):
            order = sorted(range(MODELS), key=lambda m, s=server: (-asked[s, m], -POPULARITY[m]))
            assert set(np.flatnonzero(held[due, server])) == greedily(order, room_gb), (due, server)
            seen += asked[server].sum()
    assert seen > 100


@pytest.mark.slow
def test_a_choice_from_outside_counts_where_it_is_due_and_is_cut_to_the_memory() -> None:
    everything = np.ones((3, MODELS), bool)
    some = np.zeros((3, MODELS), bool)
    some[[0, 1, 1, 2], [3, 2, 5, 0]] = True
    held = np.asarray(drive(plant("random"), chosen=some).states.servers.resident)
    assert (held == some).all()
    held = np.asarray(drive(plant("random"), chosen=everything).states.servers.resident)
    for server, room_gb in enumerate(ROOM_GB):
        assert set(np.flatnonzero(held[-1, server])) == greedily(by_popularity(), room_gb)

    environment = Environment.from_scenario(plant("popular"))
    state = eqx.filter_jit(environment.reset)(seeds(1, 1)[0])
    action = jnp.zeros(environment.requests, jnp.int32)
    step = eqx.filter_jit(lambda state, cache: environment.step(state, action, cache=cache))
    first = np.asarray(state.servers.resident)
    for slot in range(1, 2 * EACH + 1):
        assert bool(environment.cache_is_due(state)) == (slot % EACH == 0)
        state, _, _ = step(state, jnp.asarray(some))
        np.testing.assert_array_equal(state.servers.resident, first if slot < EACH else some)


@pytest.mark.parametrize("age", [0, 1, 3])
def test_devices_go_where_their_model_was_last_heard_to_be(age: int) -> None:
    scenario = plant("random", age=age)
    driven = drive(scenario)
    held, requests = np.asarray(driven.states.servers.resident), driven.states.requests
    rows = 0
    for slot in range(SLOTS):
        known = held[max(0, slot - age)]
        for row in np.flatnonzero(requests.present[slot]):
            rows += 1
            # The memory of the devices has no limit here: they can always do it themselves.
            np.testing.assert_array_equal(driven.masks[slot, row, 1:], known[:, requests.model[slot, row]])
            assert driven.masks[slot, row, 0]
    assert rows > 100
    if age == 0:
        # What is known is true, so nobody comes for nothing unless the set changes on the way.
        assert (driven.records.switch_s > 0).mean() < 0.15


def test_what_nobody_holds_may_be_asked_of_anybody() -> None:
    """Devices of 1 GB hold nothing: where no server has the model either, each loads it for the task."""
    scenario = plant("popular", room_gb=(6.0, 6.0, 6.0), device_memory_gb=1.0)
    driven = drive(scenario)
    held = np.asarray(driven.states.servers.resident)[0].any(axis=0)
    assert 0 < held.sum() < MODELS
    requests = driven.states.requests
    for slot in range(SLOTS):
        for row in np.flatnonzero(requests.present[slot]):
            expected = [False, True, True, True]  # popular is the same everywhere
            np.testing.assert_array_equal(driven.masks[slot, row], expected)
    absent = ~held[driven.records.model]
    assert absent.sum() > 10
    assert (driven.records.switch_s[absent] > 0).all()
    assert (driven.records.switch_s[~absent] == 0).all()


def zipf(policy: str | None) -> dict[str, float]:
    """Greedy on a catalogue of which a server holds a third: means over eight episodes."""
    scenario = plant(policy, every=20, room_gb=(9.0, 9.0, 9.0), gpus=(1, 1, 1), device_memory_gb=1.0, device_speed=0.05)
    environment = Environment.from_scenario(scenario)
    measured = run_episodes(environment, Greedy(), Episodes(8, 300, 20, 1000), jax.random.key(0))
    return {name: float(np.mean(values)) for name, values in metrics_of(measured).items()}


@pytest.mark.slow
def test_on_a_long_catalogue_spreading_loads_less_than_the_same_everywhere() -> None:
    popular, spread = zipf("popular"), zipf("spread")
    assert spread["switches_per_offloaded_task"] < 0.02
    assert popular["switches_per_offloaded_task"] > 0.2
    assert spread["mean_latency_s"] < popular["mean_latency_s"]


def test_loads_by_choice_cost_their_energy_and_are_in_the_figures() -> None:
    reward = "latency = 1.0\nenergy = 2.0\nenergy_scale_j = 10.0\ncooperation = 0.25"
    environment = Environment.from_scenario(plant("random", every=1, reward=reward))
    state = eqx.filter_jit(environment.reset)(seeds(1, 1)[0])
    state = state._replace(requests=state.requests._replace(present=jnp.zeros_like(state.requests.present)))
    _, reward_, outcome = eqx.filter_jit(environment.step)(state, jnp.zeros(environment.requests, jnp.int32))
    assert outcome.cache is not None
    load_s = float(outcome.cache.load_s.sum())
    assert load_s > 1
    assert float(reward_.team) == pytest.approx(-2.0 * 5.0 * load_s / 10.0, rel=1e-5)
    np.testing.assert_allclose(reward_.mixed, 0.25 * reward_.team, rtol=1e-6)
    np.testing.assert_array_equal(reward_.own, 0.0)

    traffic = Episodes(2, 40, 10, 1000)
    measured = run_episodes(environment, Greedy(), traffic, jax.random.key(0))
    metrics = metrics_of(measured)
    assert measured.cache_loads is not None
    assert measured.cache_load_j is not None
    for number, records in enumerate(measured.records):
        assert measured.cache_loads[number] > 30
        more = measured.cache_load_j[number] / len(records)
        assert metrics["energy_j"][number] == pytest.approx(records.energy_j.mean() + more)
        offloaded = (records.option > 0).sum()
        expected = ((records.switch_s > 0).sum() + measured.cache_loads[number]) / offloaded
        assert metrics["switches_per_offloaded_task"][number] == pytest.approx(expected)


def test_load_times_are_drawn_for_slot_server_and_model() -> None:
    """Whatever else is loaded: they are differences of what the models of a server are loaded by, one after another."""
    scenario = plant("random", every=1, gpus=(1, 1, 1), room_gb=(24.0, 24.0, 24.0))
    wide = [model.load.model_copy(update={"sigma": 0.5}) for model in scenario.models]
    models = [model.model_copy(update={"load": load}) for model, load in zip(scenario.models, wide, strict=True)]
    environment = Environment.from_scenario(scenario.model_copy(update={"models": models}))
    step = eqx.filter_jit(environment.step)
    state = eqx.filter_jit(environment.reset)(seeds(1, 1)[0], cache=jnp.zeros((3, MODELS), bool))
    state = state._replace(requests=state.requests._replace(present=jnp.zeros_like(state.requests.present)))
    action = jnp.zeros(environment.requests, jnp.int32)

    def times_s(*numbers: int) -> np.ndarray:
        wanted = jnp.zeros((3, MODELS), bool).at[:, jnp.array(numbers)].set(True)
        after, _, outcome = step(state, action, cache=wanted)
        assert after.servers.loaded_s is not None
        assert outcome.cache is not None
        ends_s = np.asarray(after.servers.loaded_s)[:, list(numbers)]
        np.testing.assert_allclose(outcome.cache.load_s, ends_s[:, -1], rtol=1e-5)
        return np.diff(ends_s, axis=1, prepend=0.0)

    every = times_s(*range(MODELS))
    np.testing.assert_allclose(times_s(1, 4), every[:, [1, 4]], rtol=1e-4)
    np.testing.assert_allclose(times_s(2), every[:, [2]], rtol=1e-5)
    spread = np.log(every / np.array(LOAD_S))
    assert 0.25 < spread.std() < 0.8
    assert abs(spread.mean()) < 0.5
    assert len(np.unique(spread.round(4))) == 3 * MODELS


def test_many_environments_at_once_choose_as_each_alone() -> None:
    environment = Environment.from_scenario(plant("recent", every=3))

    def run(seed: jax.Array) -> jax.Array:
        def slot(state: State, _: None) -> tuple[State, jax.Array]:
            after = environment.step(state, jnp.ones(environment.requests, jnp.int32))[0]
            return after, after.servers.resident

        return jax.lax.scan(slot, environment.reset(seed), length=12)[1]

    together = jax.jit(jax.vmap(run))(seeds(5, 3))
    for number in range(3):
        np.testing.assert_array_equal(together[number], jax.jit(run)(seeds(5, 3)[number]))
    assert (np.asarray(together)[0] != np.asarray(together)[1]).any()


def test_without_a_choice_nothing_of_it_is_there() -> None:
    environment = Environment.from_scenario(plant(None))
    state = eqx.filter_jit(environment.reset)(seeds(1, 1)[0])
    assert state.asked is None
    assert state.servers.loaded_s is None
    _, _, outcome = eqx.filter_jit(environment.step)(state, jnp.zeros(environment.requests, jnp.int32))
    assert outcome.cache is None
    assert not bool(environment.cache_is_due(state))


def test_the_scenario_names_the_rules_that_there_are() -> None:
    assert set(get_args(Cache.model_fields["policy"].annotation)) == set(CACHE_POLICIES)


def test_a_score_decides_and_popularity_where_it_ties() -> None:
    environment = Environment.from_scenario(plant())
    score = jnp.zeros((3, MODELS)).at[:, 3].set(1.0)
    held = np.asarray(within_memory(environment.plant, jnp.ones((3, MODELS), bool), score))
    order = [3, *(model for model in by_popularity() if model != 3)]
    for server, room_gb in enumerate(ROOM_GB):
        assert set(np.flatnonzero(held[server])) == greedily(order, room_gb)


def test_a_choice_where_nothing_is_chosen_is_refused() -> None:
    environment = Environment.from_scenario(load_scenario("factory"))
    sizes = environment.plant.switches
    with pytest.raises(InputError, match=r"cache: the scenario loads models on demand"):
        environment.reset(seeds(1, 1)[0], cache=jnp.zeros((sizes.servers, sizes.models), bool))


def test_models_asked_for_alike_are_ranked_by_the_catalogue() -> None:
    """Ten of a tenth each: sums of tenths in single precision do not decide."""
    text = plant_text(catalogue=True, switching=True)
    scenario = parse_scenario(text, "alike")
    models = [scenario.models[0].model_copy(update={"name": f"m{n}", "popularity": 0.1}) for n in range(10)]
    plant = build_plant(scenario.model_copy(update={"models": models}))
    held = np.asarray(first_residents(plant))
    counts = held.sum(axis=1)
    assert (counts > 0).all()
    for row, count in zip(held, counts, strict=True):
        assert row[:count].all()
