"""Servers that join and leave by schedule: replayed in plain Python, masked as heard, and not there when they are."""

import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gmel.cli.main import main
from gmel.cli.progress import ConsoleReporter
from gmel.evaluation.episodes import Episodes, run_episodes
from gmel.evaluation.render.html import scene_html
from gmel.evaluation.render.scene import film
from gmel.evaluation.simulate import simulate
from gmel.policies.rules import LeastExpectedDelay
from gmel.scenario.errors import InputError
from gmel.scenario.load import parse_scenario, to_toml
from gmel.scenario.schema import Episode, Scenario
from gmel.simulator.build import build_environments
from gmel.simulator.environment import Environment, seeds
from gmel.simulator.presence import presence_of, stays_at
from gmel.simulator.records import Records, task_records
from gmel.simulator.state import Outcome, State, option
from small_plants import WIRED, plant_text

Plan = list[tuple[float, float]]
ALWAYS: Plan = [(0.0, math.inf)]
# Ends inside slots and at slot starts; away at first; away for good at last.
PLANS: list[Plan] = [[(0.0, 7.3), (15.55, 22.0), (31.0, math.inf)], ALWAYS, [(9.25, 40.5)]]
SLOTS, DRAIN_SLOTS = 60, 60


def plant(plans: list[Plan] = PLANS, service: str = "", server: str = "", **choices: Any) -> Scenario:
    """A small plant whose servers come and go; `server` is added to each of them."""
    given = {"arrivals": "load = 0.5", "max_uploads": 64, "gpus": (1, 2, 1), **choices}
    text = f"{plant_text(**given)}\n[episode]\nslots = {SLOTS}\nwarmup_slots = 0\n{service}"
    for number, plan in enumerate(plans):
        stays = ", ".join(
            f"{{ from_s = {a} }}" if math.isinf(b) else f"{{ from_s = {a}, to_s = {b} }}" for a, b in plan
        )
        line = f'name = "S{number}"\n'
        assert line in text
        text = text.replace(line, f"{line}present = [{stays}]\n{server}\n")
    return parse_scenario(text, "test")


def drive(scenario: Scenario, seed: int = 3, only: int | None = None) -> tuple[Records, np.ndarray, State]:
    """Random allowed actions (or all to one server), then slots without requests; and the masks of the places
    (-1: nobody asks)."""
    environment = Environment.from_scenario(scenario)

    def slot(state: State, key: jax.Array) -> tuple[State, tuple[Outcome, jax.Array]]:
        state = state._replace(requests=state.requests._replace(present=state.requests.present & (state.slot < SLOTS)))
        mask = environment.observe(state).mask
        action = jax.random.categorical(key, jnp.where(mask, 0.0, -jnp.inf)).astype(jnp.int32)
        if only is not None:
            action = jnp.full_like(action, 1 + only)
        after, _, outcome = environment.step(state, action)
        allowed = jnp.where(state.requests.present[:, None], mask, True).all(axis=0).astype(jnp.int8)
        return after, (outcome, jnp.where(state.requests.present.any(), allowed, -1))

    @eqx.filter_jit
    def episode() -> tuple[State, tuple[Outcome, jax.Array]]:
        keys = jax.random.split(jax.random.key(seed), SLOTS + DRAIN_SLOTS)
        return jax.lax.scan(slot, environment.reset(seeds(seed, 1)[0]), keys)

    last, (outcome, masks) = jax.device_get(episode())
    assert int(last.lost) == 0
    return task_records(outcome, scenario.slot.length_s), np.asarray(masks), last


def next_there(plan: Plan, time_s: float) -> float:
    """The rule in plain Python."""
    for begin, end in plan:
        if time_s < end:
            return max(time_s, begin)
    return math.inf


def replayed_starts(
    records: Records, gpus: tuple[int, ...], plans: list[Plan], latest_s: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Start of each offloaded task, first in, first out on the GPU that is free first, and who is discarded."""
    start_s, lost = np.zeros(len(records)), np.zeros(len(records), bool)
    for server, plan in enumerate(plans):
        free_s = [0.0] * gpus[server]
        mine = np.flatnonzero(records.option == server + 1)
        for task in mine[np.argsort(records.upload_end_s[mine], kind="stable")]:
            gpu = int(np.argmin(free_s))
            start_s[task] = next_there(plan, max(records.upload_end_s[task], free_s[gpu]))
            if math.isinf(start_s[task]) or (latest_s is not None and start_s[task] > latest_s[task]):
                lost[task] = True
                continue
            free_s[gpu] = start_s[task] + records.switch_s[task] + records.service_s[task]
    return start_s, lost


@pytest.mark.parametrize(
    "choices",
    [
        {"gpus": (1, 1, 1)},
        {"gpus": (1, 2, 1)},
        {"gpus": (2, 1, 3), "slot_s": 0.7, "catalogue": True, "switching": True, "age": 0},
    ],
    ids=["one GPU", "several", "switching"],
)
def test_tasks_start_when_a_gpu_is_free_and_the_server_there(choices: dict[str, Any]) -> None:
    records, _, _ = drive(plant(**choices))
    start_s, lost = replayed_starts(records, choices["gpus"], PLANS)
    offloaded = records.option > 0
    np.testing.assert_array_equal(records.dropped[offloaded], lost[offloaded])
    served = offloaded & ~lost
    assert served.sum() > 80
    np.testing.assert_allclose(records.start_s[served], start_s[served], atol=2e-4)
    # It says something: some wait for a server to come back, and some are begun before it leaves and end after.
    waited = [any(abs(start - begin) < 1e-4 for begin in (15.55, 31.0)) for start in records.start_s[served]]
    assert any(waited)
    first = records.where(served & (records.option == 1))
    assert ((first.start_s < 7.3) & (first.end_s > 7.3)).any() or ((first.start_s < 22) & (first.end_s > 22)).any()


def test_what_a_server_that_does_not_come_back_has_not_begun_is_lost() -> None:
    plans = [[(0.0, 20.5)], ALWAYS, ALWAYS]
    records, _, last = drive(plant(plans, gpus=(1, 1, 1), arrivals="rate_per_s = 3.0"), only=0)
    start_s, lost = replayed_starts(records, (1, 1, 1), plans)
    np.testing.assert_array_equal(records.dropped, lost)
    assert not last.uploads.present.any()
    assert 0.2 < lost.mean() < 0.9
    np.testing.assert_allclose(records.latency_s[lost], records.deadline_s[lost], rtol=1e-5)
    assert not records.in_time[lost].any()
    assert (records.start_s[~lost] < 20.5).all()
    np.testing.assert_allclose(records.start_s[~lost], start_s[~lost], atol=2e-4)


def test_a_task_that_must_start_in_time_is_discarded_if_its_server_comes_back_too_late() -> None:
    scenario = plant(deadline="drop", deadline_s=(4.0, 9.0), devices=3)
    records, _, _ = drive(scenario)
    start_s, lost = replayed_starts(records, (1, 2, 1), PLANS, records.generated_s + records.deadline_s)
    offloaded = records.option > 0
    np.testing.assert_array_equal(records.dropped[offloaded], lost[offloaded])
    served = offloaded & ~lost
    np.testing.assert_allclose(records.start_s[served], start_s[served], atol=2e-4)
    assert lost[offloaded & (records.option == 1)].any()


def shared_replay(
    records: Records, speed: float, gpus: int, limit: float, beta: float, plan: Plan
) -> dict[int, tuple[float, float]]:
    """Start and end of the tasks of one server that works on several at once, event by event in plain Python."""
    order = sorted(range(len(records)), key=lambda task: records.upload_end_s[task])
    coming, waiting, left = list(order), [], dict[int, float]()
    found: dict[int, tuple[float, float]] = {}
    started: dict[int, float] = {}
    now = 0.0
    while coming or waiting or left:
        while waiting and len(left) < limit and next_there(plan, now) == now:
            task = waiting.pop(0)
            started[task], left[task] = now, float(records.energy_j[task]) / 5.0  # P_j = 5 W of work at full rate
        rate = 1.0 / (1.0 + beta * max(len(left) - gpus, 0) / gpus)
        ends = now + min(left.values()) / rate if left else math.inf
        comes = records.upload_end_s[coming[0]] if coming else math.inf
        back = next_there(plan, now) if waiting and len(left) < limit else math.inf
        then = min(ends, comes, back)
        assert math.isfinite(then)
        for task in left:
            left[task] -= rate * (then - now)
        now = then
        if back == then:
            continue
        if ends == then:
            task = min(left, key=lambda each: left[each])
            del left[task]
            found[task] = (started[task], now)
        else:
            waiting.append(coming.pop(0))
    return found


@pytest.mark.parametrize(
    ("service", "server", "limit", "beta"),
    [
        ('[service]\ndiscipline = "sharing"', "", math.inf, 1.0),
        ('[service]\ndiscipline = "batching"', "concurrency = 2\nround_share = 0.4", 2, 0.4),
    ],
    ids=["sharing", "batching"],
)
def test_servers_that_hold_several_tasks_take_them_in_while_they_are_there(
    service: str, server: str, limit: float, beta: float
) -> None:
    plan = [(3.5, 8.3), (15.55, 22.0), (31.0, math.inf)]
    scenario = plant([plan, ALWAYS, ALWAYS], service, server, gpus=(1, 1, 1), arrivals="rate_per_s = 1.5", radio=WIRED)
    # Without power but that of the server at work, the energy of a task is its work at full rate.
    scenario = scenario.model_copy(
        update={"devices": scenario.devices.model_copy(update={"idle_power_w": 0.0, "tx_power_dbm": -100.0})}
    )
    records, _, _ = drive(scenario, only=0)
    assert not records.dropped.any()
    found = shared_replay(records, 2.0, 1, limit, beta, plan)
    assert len(found) == len(records) > 50
    for task, (start_s, end_s) in found.items():
        assert records.start_s[task] == pytest.approx(start_s, abs=2e-3)
        assert records.end_s[task] == pytest.approx(end_s, abs=5e-3)
    assert (np.abs(records.start_s - 15.55) < 1e-3).sum() >= 2


@pytest.mark.parametrize("discipline", ["sharing", "batching"])
def test_a_shared_server_that_does_not_come_back_ends_what_it_began_and_loses_the_rest(discipline: str) -> None:
    server = "concurrency = 1\nround_share = 1.0"
    plans = [[(0.0, 20.5)], ALWAYS, ALWAYS]
    records, _, last = drive(
        plant(plans, f'[service]\ndiscipline = "{discipline}"', server, gpus=(1, 1, 1), max_uploads=100), only=0
    )
    assert not last.uploads.present.any()
    assert 0.2 < records.dropped.mean() < 0.9
    assert (records.start_s[~records.dropped] < 20.5).all()
    # One at a time it is first in, first out.
    start_s, lost = replayed_starts(records, (1, 1, 1), plans)
    np.testing.assert_array_equal(records.dropped, lost)
    np.testing.assert_allclose(records.start_s[~lost], start_s[~lost], atol=2e-3)


def test_gangs_of_one_gpu_that_load_nothing_are_first_in_first_out() -> None:
    text = to_toml(plant(catalogue=True)).replace("gangs = []", "gangs = [{ gpus = 1 }]")
    gangs = parse_scenario(text.replace('discipline = "fifo"', 'discipline = "gang"'), "gang")
    assert gangs.service.discipline == "gang"
    plain, _, last = drive(plant(catalogue=True))
    mine, _, gang_last = drive(gangs)
    np.testing.assert_array_equal(plain.option, mine.option)
    np.testing.assert_array_equal(plain.dropped, mine.dropped)
    served = ~plain.dropped
    np.testing.assert_allclose(plain.start_s[served], mine.start_s[served], atol=2e-4)
    # The last server has left for good: both say a day.
    for scenario, state in ((plant(catalogue=True), last), (gangs, gang_last)):
        seen = Environment.from_scenario(scenario).observe(jax.tree.map(jnp.asarray, state))
        np.testing.assert_array_equal(option(seen, "backlog_s")[:, 3], 86_400.0)


@pytest.mark.parametrize("overload", ["crash", "reject"])
def test_a_server_with_a_capacity_loses_alone_who_comes_while_it_is_away(overload: str) -> None:
    service = f'[service]\ndiscipline = "capacity"\non_overload = "{overload}"'
    choices: dict[str, Any] = {"catalogue": True, "radio": WIRED, "arrivals": "rate_per_s = 2.0", "max_uploads": 100}
    plan: Plan = [(0.0, 15.5), (30.25, math.inf)]
    roomy = plant([plan, ALWAYS, ALWAYS], service, "capacity = 1e6", **choices)
    records, _, _ = drive(roomy, only=0)
    away = np.array([next_there(plan, at) != at for at in records.upload_end_s])
    assert 5 < away.sum() < len(away) - 5
    np.testing.assert_array_equal(records.dropped, away)
    ran = records.where(~records.dropped)
    np.testing.assert_allclose(ran.end_s - ran.start_s, ran.service_s, atol=1e-3)


@pytest.mark.parametrize("age", [0, 1, 3])
def test_a_server_is_masked_as_soon_as_its_broadcast_says_that_it_is_away(age: int) -> None:
    _, masks, _ = drive(plant(age=age))
    for slot in range(SLOTS):
        heard_s = float(max(0, slot - age))
        for server, plan in enumerate(PLANS):
            there = next_there(plan, heard_s) == heard_s
            assert masks[slot, 1 + server] in (int(there), -1), (slot, server)
    for server in (1, 3):
        assert (masks[:SLOTS, server] == 0).sum() > 5


def test_all_away_the_devices_do_it_themselves() -> None:
    late: Plan = [(10.0, 20.0)]
    records, masks, _ = drive(plant([late, late, late]))
    early = records.decided_slot <= 10  # that of slot 9 is the last broadcast heard
    assert early.sum() > 5
    assert (records.option[early] == 0).all()
    assert (records.option[(records.decided_slot > 10) & (records.decided_slot < 20)] > 0).any()
    assert (records.option[records.decided_slot > 21] == 0).all()
    assert masks[:, 0].all()


def test_all_away_and_no_local_work_tasks_wait_for_the_first_that_comes_back() -> None:
    plans: list[Plan] = [[(12.5, 90.0)], [(20.0, 90.0)], [(14.0, 90.0)]]
    text = to_toml(plant(plans, radio=WIRED, gpus=(1, 1, 1)))
    scenario = parse_scenario(text.replace("local = true", "local = false"), "test")
    assert not scenario.devices.local
    environment = Environment.from_scenario(scenario)
    # Nobody is there: any may be chosen, and each says when it is back.
    state = eqx.filter_jit(environment.reset)(seeds(3, 1)[0])
    rows = state.requests._replace(present=jnp.ones_like(state.requests.present))
    seen = eqx.filter_jit(environment.observe)(state._replace(requests=rows))
    np.testing.assert_array_equal(seen.mask[0], [False, True, True, True])
    np.testing.assert_allclose(option(seen, "backlog_s")[0, 1:], [12.5, 20.0, 14.0])
    records, _, _ = drive(scenario)
    start_s, lost = replayed_starts(records, (1, 1, 1), plans)
    assert not records.dropped.any()
    assert not lost.any()
    np.testing.assert_allclose(records.start_s, start_s, atol=2e-4)
    assert (records.start_s >= 12.5 - 1e-4).all()


def test_what_a_server_announces_is_when_a_task_could_start() -> None:
    """At slot 6 a server with 5 s of work left leaves at 7.3 and is back at 15.55; one that does not come back says a
    day."""
    environment = Environment.from_scenario(plant([[(0.0, 7.3), (15.55, 30.0)], [(0.0, 6.5)], ALWAYS], gpus=(1, 1, 1)))
    state = eqx.filter_jit(environment.reset)(seeds(3, 1)[0])._replace(slot=jnp.asarray(5, jnp.int32))
    busy = state.servers._replace(free_s=jnp.array([[6.0], [2.0], [4.0]]))
    action = jnp.zeros(environment.requests, jnp.int32)
    after, _, _ = eqx.filter_jit(environment.step)(state._replace(servers=busy), action)
    np.testing.assert_allclose(after.broadcasts.wait_s[0], [15.55 - 6.0, 86_400.0, 3.0], rtol=1e-6)
    np.testing.assert_array_equal(after.broadcasts.up[0], [True, True, True])


def test_a_schedule_that_is_always_on_changes_nothing() -> None:
    plain = parse_scenario(plant_text(arrivals="load = 0.5", max_uploads=64, gpus=(1, 2, 1)), "plain")
    records, masks, _ = drive(plant([ALWAYS] * 3))
    bare, _, _ = drive(plain)
    for part in ("option", "dropped"):
        np.testing.assert_array_equal(getattr(records, part), getattr(bare, part), part)
    # Two programs: the compiler may round their sums in another order.
    for part in ("start_s", "end_s", "latency_s", "energy_j"):
        np.testing.assert_allclose(getattr(records, part), getattr(bare, part), rtol=1e-6, atol=1e-6, err_msg=part)
    assert masks.all()
    # Nothing of it is in a plant without a schedule.
    assert Environment.from_scenario(plain).plant.presence is None
    assert Environment.from_scenario(plain).reset(seeds(0, 1)[0]).broadcasts.up is None


def test_absence_and_failures_together() -> None:
    service = "[failures]\nmean_up_s = 20.0\nmean_down_s = 4.0"
    records, _, _ = drive(plant(service=service, gpus=(1, 1, 1), max_uploads=100))
    for server, plan in enumerate(PLANS):
        mine = records.where((records.option == server + 1) & ~records.dropped)
        assert len(mine) > 5
        for start in mine.start_s:
            assert abs(next_there(plan, start) - start) < 1e-3


def test_times_are_exact_however_long_the_episode() -> None:
    scenario = plant([[(0.0, 10_000.05), (99_999.99, 200_000.0)], ALWAYS, ALWAYS], slot_s=0.1)
    presence = presence_of(scenario)
    slot_s = jnp.asarray(0.1)
    for slot, end_s, begin_s in ((100_000, 0.05, None), (999_999, None, 0.09)):
        stays = stays_at(presence, jnp.asarray(slot, jnp.int32), slot_s)
        assert stays is not None
        if end_s is not None:
            assert float(stays.to_s[0, 0]) == pytest.approx(end_s, abs=1e-5)
        if begin_s is not None:
            assert float(stays.from_s[0, 1]) == pytest.approx(begin_s, abs=1e-5)


def test_a_mean_is_offered_to_those_who_are_there() -> None:
    """Load counts capacity over the episode: two GPUs of 2.0 for a quarter of it, one of 3.0 for all of it."""
    scenario = plant([[(0.0, 15.0)], ALWAYS, [(50.0, 90.0)]], gpus=(2, 1, 1))
    assert scenario.capacity == pytest.approx(2 * 2.0 * 0.25 + 3.0 + 1.0 * 10.0 / 60.0)


@pytest.mark.parametrize(
    ("plans", "said"),
    [
        ([[(70.0, 80.0)], [(60.0, math.inf)], [(1e6, math.inf)]], "servers.present: no server is ever there"),
        ([[(5.0, 5.0)], ALWAYS, ALWAYS], "to_s = 5 must exceed from_s = 5"),
        ([[(0.0, 5.0), (4.0, 9.0)], ALWAYS, ALWAYS], "from_s = 4 begins before the one before it ends"),
        ([[(0.0, math.inf), (4.0, 9.0)], ALWAYS, ALWAYS], "from_s = 4 begins before the one before it ends"),
        ([[], ALWAYS, ALWAYS], "servers[0].present"),
    ],
    ids=["never", "empty stay", "overlap", "after the last", "no stay"],
)
def test_what_cannot_be_is_named(plans: list[Plan], said: str) -> None:
    with pytest.raises(InputError) as caught:
        plant(plans)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("from_s", "code", "said"), [(10.0, 0, "valid"), (61.0, 2, "no server is ever there in an ep")]
)
def test_scenario_check_says_that_no_server_is_ever_there(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    from_s: float,
    code: int,
    said: str,
) -> None:
    path = tmp_path / "plant.toml"
    path.write_text(to_toml(plant([[(10.0, 80.0)]] * 3)).replace("from_s = 10.0", f"from_s = {from_s}"))
    monkeypatch.setattr("sys.argv", ["gmel", "scenario", "check", str(path)])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == code
    shown = capsys.readouterr()
    assert said in shown.out + shown.err


def test_a_picture_shows_a_server_that_comes_and_goes() -> None:
    result = simulate(plant(), "uniform", 1, ConsoleReporter(), slots=SLOTS)
    scene = film(result)
    assert len(scene.tasks) > 50
    for server, gpus in enumerate((1, 2, 1)):
        for lane in range(gpus):
            mine = [task for task in scene.of_server(server) if task.lane == lane]
            for before, after in pairwise(mine):
                assert after.start_s >= before.end_s - 1e-3
    assert "<canvas" in scene_html(scene)


# Whether there is a mean to speak of


LATE: list[Plan] = [ALWAYS, [(0.0, 200.0)]]


def late_leaver(rate_per_s: float) -> Scenario:
    """Two servers of speed 1, mean work 1.25; the second leaves at two thirds of the episode."""
    plain = plant(LATE, speeds=(1.0, 1.0), gpus=(1, 1), device_speed=0.01, arrivals=f"rate_per_s = {rate_per_s}")
    return plain.model_copy(update={"episode": Episode(slots=300, warmup_slots=20)})


@pytest.mark.parametrize(("rate_per_s", "steadily"), [(0.72, False), (2.0, True)])
def test_a_server_that_leaves_late_overloads_nobody(rate_per_s: float, steadily: bool) -> None:
    """At 0.72 requests a second one server has a load of 0.9, two of 0.45; at 2 both together have 1.25."""
    scenario = late_leaver(rate_per_s)
    environments = build_environments(scenario)
    assert environments.load == pytest.approx(rate_per_s * 1.25 / (1.0 + 2.0 / 3.0))
    traffic = Episodes(16, 300, 20, first_seed=5)
    measured = run_episodes(environments.test, LeastExpectedDelay(), traffic, jax.random.key(0))
    assert measured.steady == (0, 200)
    assert measured.overloaded(0.54) is steadily
    # The backlog does grow when the server leaves, whatever the load.
    assert replace(measured, steady=None).overloaded(0.54)


def test_the_steady_time_is_the_longest_and_of_two_the_later() -> None:
    traffic = Episodes(1, SLOTS, 0, first_seed=5)
    for plans, steady in (
        ([ALWAYS, [(0.0, 10.5), (30.0, math.inf)]], (30, 60)),
        ([ALWAYS, [(0.0, 30.0)]], (30, 60)),
        ([ALWAYS, [(12.3, 12.9), (20.0, 50.0)]], (20, 50)),
        ([ALWAYS, [(100.0, math.inf)]], (0, 60)),
    ):
        environment = Environment.from_scenario(plant(plans, speeds=(1.0, 1.0), gpus=(1, 1)))
        assert run_episodes(environment, LeastExpectedDelay(), traffic, jax.random.key(0)).steady == steady


@pytest.mark.slow
def test_the_load_of_shorter_episodes_counts_the_servers_that_are_there() -> None:
    scenario = late_leaver(0.64)
    for slots, servers in ((300, 1.0 + 2.0 / 3.0), (200, 2.0), (250, 1.8)):
        simulation = simulate(scenario, "led2", 1, ConsoleReporter(), slots=slots)
        assert simulation.load == pytest.approx(0.64 * 1.25 / servers)
    absent = plant([[(40.0, math.inf)]], speeds=(1.0,), gpus=(1,), arrivals="rate_per_s = 0.1")
    with pytest.raises(InputError, match="--slots 30: no server is there"):
        simulate(absent, "led2", 1, ConsoleReporter(), slots=30)
