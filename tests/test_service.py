"""Disciplines beyond first in, first out, in the environment: places, admission, capacity, gangs; own send queue and
interference on the way there."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import compiled
from gmel.scenario.errors import InputError
from gmel.scenario.load import parse_scenario
from gmel.scenario.schema import Scenario
from gmel.simulator.environment import Environment, seeds
from gmel.simulator.records import Records, task_records
from gmel.simulator.state import Outcome, State, option
from small_plants import WIRED, plant_text

RADIO = 'model = "uniform-snr"\nrate = "shannon"\nfading = "none"\nfloor = "clip"\ndownload = false'
Choice = Callable[[Environment, State], jax.Array]


def plant(service: str = "", server: str = "", models: str = "", **choices: object) -> Scenario:
    """A small plant with a service section, and more keys in its servers and models."""
    text = plant_text(**choices)  # type: ignore[arg-type]
    text = text.replace('\nname = "S', f'\n{server}\nname = "S').replace("\nstep_work", f"\n{models}\nstep_work")
    return parse_scenario(f"{text}\n[service]\n{service}", "test")


def to(server: int) -> Choice:
    return lambda environment, state: jnp.full(environment.requests, server + 1)


def run(scenario: Scenario, choice: Choice, slots: int = 60, episodes: int = 1) -> tuple[list[Records], State]:
    environment = Environment.from_scenario(scenario)

    def slot(state: State, _: None) -> tuple[State, tuple[Outcome, State]]:
        after, _, outcome = environment.step(state, choice(environment, state))
        return after, (outcome, state)

    def episode(seed: jax.Array) -> tuple[Outcome, State]:
        return jax.lax.scan(slot, environment.reset(seed), length=slots)[1]

    outcome, states = jax.jit(jax.vmap(episode))(seeds(3, episodes))
    assert int(np.asarray(states.lost).max()) == 0
    each = [jax.tree.map(lambda field, e=e: field[e], outcome) for e in range(episodes)]
    return [task_records(one, scenario.slot.length_s) for one in each], states


def test_one_place_keeps_one_task() -> None:
    """Of those that come together at an idle server the first is served, the others are turned away."""
    scenario = plant(
        'discipline = "sharing"',
        "places = 1",
        radio=WIRED,
        devices=1,
        speeds=(1.0,),
        arrivals="rate_per_s = 1.0",
        max_per_slot=None,
        max_uploads=32,
    )
    (records,), _ = run(scenario, to(0), slots=1000)
    served = records.where(~records.dropped)
    assert (served.queue_s < 1e-4).all()
    assert (served.start_s[1:] >= served.end_s[:-1] - 1e-3).all()
    # Whoever is turned away found somebody there.
    for at in records.start_s[records.dropped]:
        assert ((served.start_s <= at + 1e-3) & (at < served.end_s)).any()
    assert 0.3 < records.dropped.mean() < 0.9


@pytest.mark.parametrize("discipline", ["fifo", "sharing"])
def test_nobody_waits_longer_than_admission_allows(discipline: str) -> None:
    service = f'discipline = "{discipline}"\nmax_wait_s = 0.7'
    server = "concurrency = 1" if discipline == "sharing" else ""
    scenario = plant(service, server, radio=WIRED, arrivals="rate_per_s = 3.0", speeds=(2.0, 3.0, 1.0), max_uploads=64)
    (records,), _ = run(scenario, to(0), slots=200)
    served = ~records.dropped
    assert 0.05 < records.dropped.mean() < 0.9
    assert records.queue_s[served].max() <= 0.7 + 1e-5
    assert records.queue_s[served].max() > 0.5
    # A task that is turned away counts its deadline.
    np.testing.assert_allclose(records.latency_s[~served], records.deadline_s[~served], rtol=1e-5)


def test_who_is_turned_away_is_lost_whole() -> None:
    """First in, first out, nothing that is discarded was begun: each costs the full loss."""
    scenario = plant("max_wait_s = 0.7", radio=WIRED, arrivals="rate_per_s = 3.0", max_uploads=64)
    scenario = scenario.model_copy(update={"reward": scenario.reward.model_copy(update={"latency": 0.0, "loss": 2.0})})
    environment = Environment.from_scenario(scenario)

    def slot(state: State, _: None) -> tuple[State, tuple[jax.Array, Outcome]]:
        after, reward, outcome = environment.step(state, jnp.ones(environment.requests, jnp.int32))
        return after, (reward.team, outcome)

    team, outcome = jax.jit(lambda s: jax.lax.scan(slot, s, length=100)[1])(compiled.reset(environment, seeds(3, 1)[0]))
    lost = task_records(outcome, 1.0).dropped.sum()
    assert lost > 10
    assert -float(np.asarray(team, float).sum()) == pytest.approx(2.0 * lost)


def test_admission_makes_room_for_those_who_come_later() -> None:
    scenario = plant("max_wait_s = 0.7", radio=WIRED, arrivals="rate_per_s = 3.0", max_uploads=64)
    (records,), _ = run(scenario, to(0), slots=300)
    served = records.where(~records.dropped)
    order = np.argsort(served.start_s)
    assert (served.start_s[order][1:] >= served.end_s[order][:-1] - 1e-3).all()
    busy = served.service_s.sum() / 300
    assert busy > 0.8


class TestCapacity:
    SERVER = "capacity = 100.0"
    SERVICE = 'discipline = "capacity"'

    def scenario(self, service: str = "", **choices: object) -> Scenario:
        return plant(
            f"{self.SERVICE}\n{service}",
            self.SERVER,
            catalogue=True,
            radio=WIRED,
            **{"max_uploads": 128, "arrivals": "rate_per_s = 3.0", "latency_from": "decided", **choices},
        )

    def test_tasks_run_side_by_side_at_their_own_pace(self) -> None:
        (records,), _ = run(self.scenario(), lambda environment, state: 1 + jnp.arange(environment.requests) % 3)
        alone = records.where(~records.dropped)
        assert (alone.queue_s == 0).all()
        speed = np.array([2.0, 3.0, 1.0])
        np.testing.assert_allclose(alone.end_s - alone.start_s, alone.service_s, rtol=1e-4, atol=1e-4)
        assert set(np.unique(alone.option)) == {1, 2, 3}
        assert (alone.service_s > 0.1 / speed.max()).all()

    def test_never_more_steps_in_progress_than_the_capacity(self) -> None:
        (records,), states = run(self.scenario(), to(2), slots=150)
        steps = np.asarray(states.requests.steps)[0]
        present = np.asarray(states.requests.present)[0]
        rows = np.concatenate([np.flatnonzero(row) for row in present])
        slots = np.concatenate([np.full(row.sum(), slot) for slot, row in enumerate(present)])
        known = len(records)
        mine = {(s, r): steps[s, r] for s, r in zip(slots, rows, strict=True)}
        assert records.dropped.mean() > 0.2
        # Records are in order of decision, one by one those of the slots.
        units = np.array([mine[key] for key in list(mine)[:known]])
        for at in records.start_s:
            here = (records.start_s <= at) & (at < records.end_s)
            assert units[here].sum() <= 100 + 1e-6

    def test_a_crash_loses_everything_a_rejection_only_the_last(self) -> None:
        (crashed,), _ = run(self.scenario(), to(2), slots=150)
        (rejected,), _ = run(self.scenario('on_overload = "reject"'), to(2), slots=150)
        assert (rejected.end_s - rejected.start_s)[rejected.dropped].max() < 1e-6
        assert (crashed.end_s - crashed.start_s)[crashed.dropped].max() > 0.1
        assert crashed.dropped.mean() > rejected.dropped.mean()

    def test_what_is_lost_costs_the_share_left(self) -> None:
        """Slots are short against the service, so that a crash finds tasks that are partly done."""
        scenario = self.scenario(reward="latency = 0.0\nloss = 2.0", slot_s=0.1)
        environment = Environment.from_scenario(scenario)

        def slot(state: State, _: None) -> tuple[State, tuple[jax.Array, Outcome, jax.Array]]:
            present = state.requests.present & (state.slot < 760)
            state = state._replace(requests=state.requests._replace(present=present))
            after, reward, outcome = environment.step(state, jnp.full(environment.requests, 3))
            return after, (reward.team, outcome, state.requests.work)

        start = compiled.reset(environment, seeds(3, 1)[0])
        last, (team, outcome, work) = jax.jit(lambda state: jax.lax.scan(slot, state, length=800))(start)
        assert not np.asarray(last.uploads.present).any()
        lost = np.asarray(outcome.final & outcome.dropped)
        # The server does one work unit a second: a task takes as many seconds as it has work.
        service_s = np.asarray(work)[np.asarray(outcome.decided_slot)[lost], np.asarray(outcome.row)[lost]]
        ran_s = np.asarray(outcome.end_s - outcome.start_s)[lost]
        never = ran_s < 1e-6
        assert 20 < never.sum() < len(ran_s) - 20
        assert (ran_s <= service_s + 1e-3).all()
        total = -float(np.asarray(team, float).sum())
        assert total == pytest.approx(2.0 * (1.0 - ran_s / service_s).sum(), rel=1e-4)

    @pytest.mark.parametrize(
        ("change", "part"),
        [
            ({"switching": True}, "switching"),
            ({"deadline": "drop"}, "has no queue"),
            ({"catalogue": False}, "catalogue"),
        ],
    )
    def test_impossible_combinations_are_named(self, change: dict[str, object], part: str) -> None:
        with pytest.raises(InputError, match=part):
            plant(self.SERVICE, self.SERVER, **{"catalogue": True, "radio": WIRED, **change})


class TestGangs:
    GANGS = (
        "gangs = [{ gpus = 1, weight = 2.0, load_s = 3.0 }, { gpus = 2, speedup = 1.6, load_s = 4.0 }, "
        "{ gpus = 4, speedup = 2.2, load_s = 5.0 }]"
    )

    def scenario(self, **choices: object) -> Scenario:
        return plant(
            'discipline = "gang"',
            models=self.GANGS,
            **{
                "catalogue": True,
                "radio": WIRED,
                "gpus": (4, 2, 4),
                "arrivals": "rate_per_s = 0.5",
                "max_uploads": 64,
                **choices,
            },
        )

    def test_a_gang_needs_its_gpus_and_loads_where_it_is_cold(self) -> None:
        (records,), states = run(self.scenario(), to(0), slots=300)
        gang = np.asarray(states.requests.gang)[0][np.asarray(states.requests.present)[0]][: len(records)]
        speedup, load_s = np.array([1.0, 1.6, 2.2]), np.array([3.0, 4.0, 5.0])
        work = np.asarray(states.requests.work)[0][np.asarray(states.requests.present)[0]][: len(records)]
        np.testing.assert_allclose(records.service_s, work / 2.0 / speedup[gang], rtol=1e-4)
        cold = records.switch_s > 0
        assert cold.any()
        assert (~cold).any()
        np.testing.assert_allclose(records.switch_s[cold], load_s[gang][cold], rtol=1e-5)
        gpus = np.array([1, 2, 4])[gang]
        for at in records.start_s + 1e-4:
            busy = (records.start_s <= at) & (at < records.end_s - 1e-4)
            assert gpus[busy].sum() <= 4
        # First in, first out: nobody starts before who came earlier.
        assert (np.diff(records.start_s[np.argsort(records.upload_end_s, kind="stable")]) >= -1e-3).all()

    def test_a_server_with_too_few_gpus_is_masked(self) -> None:
        environment = Environment.from_scenario(self.scenario(arrivals="rate_per_s = 6.0"))
        state = compiled.reset(environment, seeds(2, 1)[0])
        seen = compiled.observe(environment, state)
        present, gang = np.asarray(seen.present), np.asarray(state.requests.gang)
        assert (gang[present] == 2).any()
        np.testing.assert_array_equal(np.asarray(seen.mask)[present, 2], gang[present] < 2)
        np.testing.assert_array_equal(
            np.asarray(option(seen, "backlog_s"))[present, 2], 86_400.0 * (gang[present] == 2)
        )
        assert np.asarray(seen.mask)[present][:, [1, 3]].all()

    def test_devices_expect_the_wait_and_the_load_of_their_gang(self) -> None:
        """With fresh news and one request at a time, what is expected happens."""
        environment = Environment.from_scenario(self.scenario(age=0))

        def slot(state: State, _: None) -> tuple[State, tuple[jax.Array, ...]]:
            one = state._replace(
                requests=state.requests._replace(
                    present=state.requests.present & (jnp.arange(environment.requests) == 0),
                    noise=jnp.ones(environment.requests),
                )
            )
            seen = environment.observe(one)
            expected = [option(seen, name)[0, 1] for name in ("backlog_s", "switch_s", "service_s")]
            action = jnp.ones(environment.requests, jnp.int32)
            told = environment.project(one, action).latency_s[0] + one.requests.generated_s[0]
            after, _, _ = environment.step(one, action)
            at = jnp.stack([one.requests.present[0].astype(told.dtype), told, *expected])
            return after, (at,)

        state = compiled.reset(environment, seeds(2, 1)[0])
        (told,) = jax.jit(lambda s: jax.lax.scan(slot, s, length=400)[1])(state)
        rows = np.asarray(told, float)
        rows = rows[rows[:, 0] > 0]
        exact = np.abs(rows[:, 1] - rows[:, 2:].sum(axis=1)) < 1e-3
        # A group may be loaded but busy: then it is cold after all, or taken by another.
        assert exact.mean() > 0.8
        assert (rows[:, 2] > 0).any()

    @pytest.mark.parametrize(
        ("models", "gpus", "part"),
        [
            ("", (4, 4, 4), "need each other"),
            ("gangs = [{ gpus = 8 }]", (4, 4, 4), "more GPUs than any server"),
        ],
    )
    def test_impossible_gangs_are_named(self, models: str, gpus: tuple[int, ...], part: str) -> None:
        with pytest.raises(InputError, match=part):
            plant('discipline = "gang"', models=models, catalogue=True, radio=WIRED, gpus=gpus)


def test_one_at_a_time_a_device_sends() -> None:
    slow = 'model = "fixed"\nrate_bps = 4e6\nsharing = "none"\none_at_a_time = true\ndownload = false'
    scenario = plant(radio=slow, devices=2, arrivals="rate_per_s = 1.2", max_uploads=64)
    (records,), states = run(scenario, lambda environment, state: 1 + jnp.arange(environment.requests) % 3, 200)
    for device in range(2):
        own = records.where(records.device == device)
        own = own.where(own.decided_slot < 150)
        order = np.argsort(own.upload_start_s, kind="stable")
        assert (own.upload_start_s[order][1:] >= own.upload_end_s[order][:-1] - 1e-3).all()
        # It never idles while something waits: a task starts at its decision or when the one before it is sent.
        begins = np.maximum(own.decided_s[order][1:], own.upload_end_s[order][:-1])
        np.testing.assert_allclose(own.upload_start_s[order][1:], begins, atol=2e-3)
    assert (records.upload_start_s > records.decided_s + 0.1).any()
    size = np.asarray(states.requests.size_bit)[0][np.asarray(states.requests.present)[0]][: len(records)]
    early = records.decided_slot < 150
    took_s = (records.upload_end_s - records.upload_start_s)[early]
    np.testing.assert_allclose(took_s, (size / 4e6)[early], atol=2e-3)


@pytest.mark.slow
def test_a_device_knows_what_it_still_sends() -> None:
    slow = 'model = "fixed"\nrate_bps = 1e6\nsharing = "none"\none_at_a_time = true\ndownload = false'
    environment = Environment.from_scenario(plant(radio=slow, devices=1, arrivals="rate_per_s = 1.0", max_uploads=64))
    state = compiled.reset(environment, seeds(2, 1)[0])
    for _ in range(8):
        seen = compiled.observe(environment, state)
        first = int(np.argmax(np.asarray(seen.present)))
        if bool(seen.present[first]):
            told = float(option(seen, "upload_s")[first, 1])
            only = state._replace(requests=state.requests._replace(present=jnp.arange(environment.requests) == first))
            _, _, outcome = compiled.step(environment, only, jnp.ones(environment.requests, jnp.int32))
            sent = np.asarray(outcome.upload_end_s)[np.asarray(outcome.decided_slot) == int(state.slot)]
            assert np.isclose(sent, told, atol=1e-3).any()
        state, _, _ = compiled.step(environment, state, jnp.ones(environment.requests, jnp.int32))


def test_interference_is_the_power_of_the_other_cells() -> None:
    scenario = plant(
        radio=f'{RADIO}\ninterference = true\nsharing = "equal"', arrivals="rate_per_s = 2.0", max_uploads=64
    )
    environment = Environment.from_scenario(scenario)
    state = compiled.reset(environment, seeds(4, 1)[0])
    count = environment.requests
    state = state._replace(requests=state.requests._replace(present=jnp.arange(count) < 3))
    action = jnp.array([1, 1, 2] + [0] * (count - 3))
    _, _, outcome = compiled.step(environment, state, action)
    snr = np.asarray(state.links.uplink_snr, float)
    device = np.asarray(state.requests.device)[:3]
    bits = np.asarray(state.requests.size_bit, float)[:3]
    at_first = snr[device[2], 0]
    at_second = snr[device[0], 1] + snr[device[1], 1]
    rates = [
        1e6 / 2 * np.log2(1 + 2 * snr[device[0], 0] / (1 + at_first)),
        1e6 / 2 * np.log2(1 + 2 * snr[device[1], 0] / (1 + at_first)),
        1e6 * np.log2(1 + snr[device[2], 1] / (1 + at_second)),
    ]
    first = environment.plant.switches.uploads
    found = np.asarray(outcome.upload_end_s)[first : first + 3]
    np.testing.assert_allclose(found, bits / np.array(rates), rtol=1e-4)


def test_interference_only_slows_down() -> None:
    quiet = plant(radio=f'{RADIO}\nsharing = "none"', arrivals="rate_per_s = 0.4", max_uploads=64)
    loud = plant(radio=f'{RADIO}\nsharing = "none"\ninterference = true', arrivals="rate_per_s = 0.4", max_uploads=64)
    spread: Choice = lambda environment, state: 1 + jnp.arange(environment.requests) % 3  # noqa: E731
    (before,), _ = run(quiet, spread, 150)
    (after,), states = run(loud, spread, 150)
    early = min(int((before.decided_slot < 100).sum()), int((after.decided_slot < 100).sum()))
    slower = after.upload_s[:early] - before.upload_s[:early]
    assert (slower > -1e-4).all()
    assert (slower > 0.01).mean() > 0.1
    assert float(np.asarray(states.broadcasts.interference).max()) > 0


@pytest.mark.parametrize(
    ("radio", "part"),
    [
        ('model = "fixed"\nrate_bps = 1e6\ninterference = true', "interference needs a radio"),
        ('sharing = "equal"\none_at_a_time = true', "one_at_a_time needs"),
    ],
)
def test_impossible_sending_is_named(radio: str, part: str) -> None:
    with pytest.raises(InputError, match=part):
        plant(radio=radio)
