"""Ways from devices to servers: fixed and wired links, forwarding, clouds, visible servers, lost broadcasts."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import compiled
from gmel.scenario.errors import InputError
from gmel.scenario.load import parse_scenario, to_toml
from gmel.scenario.schema import Scenario
from gmel.simulator.environment import Environment, seeds
from gmel.simulator.links import draw_positions_m
from gmel.simulator.records import Records, task_records
from gmel.simulator.state import Outcome, State, option
from small_plants import plant_text, small_plant

WIRED_BOTH_WAYS = 'model = "wired"\naccess = "home"\nsharing = "none"'
FIXED = 'model = "fixed"\nrate_bps = 2e6\nsharing = "none"'


def plant(radio: str, servers: Callable[[int], str] = lambda number: "", **choices: object) -> Scenario:
    """A small plant with more keys in its servers."""
    lines = plant_text(radio=radio, **choices).split("\n")  # type: ignore[arg-type]
    number = -1
    for at, line in enumerate(lines):
        if line.startswith('name = "S'):
            number += 1
            lines[at] = f"{line}\n{servers(number)}"
    return parse_scenario("\n".join(lines), "test")


Choice = Callable[[Environment, State], jax.Array]


def run(scenario: Scenario, choice: Choice, slots: int = 60) -> tuple[Records, State]:
    environment = Environment.from_scenario(scenario)

    def slot(state: State, _: None) -> tuple[State, tuple[Outcome, State]]:
        after, _, outcome = environment.step(state, choice(environment, state))
        return after, (outcome, state)

    outcome, states = jax.jit(lambda seed: jax.lax.scan(slot, environment.reset(seed), length=slots)[1])(seeds(3, 1)[0])
    return task_records(outcome, scenario.slot.length_s), states


def to(server: int) -> Choice:
    return lambda environment, state: jnp.full(environment.requests, server + 1)


def test_a_fixed_link_carries_its_rate_whatever_the_band() -> None:
    records, _ = run(plant(FIXED, bandwidth_hz=1.0), to(1))
    size = records.upload_s * 2e6
    assert (size >= 1e6 - 1).all()
    assert (size <= 8e6 + 8).all()
    assert size.std() > 1e6


def test_a_fixed_link_is_shared() -> None:
    fast = FIXED.replace("2e6", "1e9")
    alone, _ = run(plant(fast), to(1))
    shared, _ = run(plant(fast.replace("none", "equal")), to(1))
    ratio = shared.upload_s / alone.upload_s
    assert (ratio > 1 - 1e-5).all()
    np.testing.assert_allclose(ratio, np.round(ratio), rtol=1e-5)
    assert ratio.max() > 1.5


def test_a_wired_device_sends_to_its_own_server_in_no_time_and_to_others_over_the_backhaul() -> None:
    scenario = plant(WIRED_BOTH_WAYS, lambda number: f"backhaul_bps = {(number + 1) * 1e7}\nbackhaul_delay_s = 0.25")
    records, _ = run(scenario, to(2))
    home = records.device % 3 == 2
    assert home.any()
    assert (records.upload_s[home] == 0).all()
    seconds = records.upload_s[~home] - 0.25
    assert (seconds >= 1e6 / 3e7 - 1e-6).all()
    assert (seconds <= 8e6 / 3e7 + 1e-6).all()


def test_a_cloud_is_reached_over_the_best_cell() -> None:
    cloud = plant(
        'model = "uniform-snr"\nrate = "shannon"\nfading = "none"\nfloor = "clip"\nsharing = "none"',
        lambda number: "cell = false\nbackhaul_delay_s = 0.5" if number == 2 else "",
    )
    environment = Environment.from_scenario(cloud)
    state = compiled.reset(environment, seeds(1, 1)[0])
    seen = compiled.observe(environment, state)
    upload_s = np.asarray(option(seen, "upload_s"))[np.asarray(seen.present)]
    np.testing.assert_allclose(upload_s[:, 3], upload_s[:, 1:3].min(axis=1) + 0.5, rtol=1e-5)
    records, states = run(cloud, to(2))
    records = records.where(records.decided_slot < 50)
    size = np.asarray(states.requests.size_bit)[np.asarray(states.requests.present)][: len(records)]
    snr = np.asarray(states.links.uplink_snr)[0, :, :2].max(axis=1)[records.device]
    np.testing.assert_allclose(records.upload_s, size / (1e6 * np.log2(1 + snr)) + 0.5, rtol=1e-4)


def test_the_backhaul_takes_no_power_of_the_device() -> None:
    radio = FIXED + '\naccess = "home"'
    near = plant(radio, max_uploads=96)
    far = plant(radio, lambda number: "backhaul_delay_s = 2.0", max_uploads=96)
    (slow, _), (fast, _) = run(far, to(2)), run(near, to(2))
    early = min(int((one.decided_slot < 30).sum()) for one in (slow, fast))
    assert (slow.upload_s[:early] > 1.9).any()
    # The device only waits longer for its result.
    longer_s = slow.latency_s[:early] - fast.latency_s[:early]
    np.testing.assert_allclose(slow.energy_j[:early] - fast.energy_j[:early], 0.1 * longer_s, atol=1e-3)


def test_forwarded_uploads_leave_the_cell_before_they_arrive() -> None:
    """A long way behind a short upload: the next slot has the cell for itself."""
    radio = FIXED.replace("none", "equal").replace("2e6", "1e8") + '\naccess = "home"'
    far = plant(radio, lambda number: "backhaul_delay_s = 5.0" if number == 2 else "", max_uploads=96)
    _, states = run(far, to(2))
    assert np.asarray(states.uploads.present).sum(axis=-1).max() > 10
    assert float(np.asarray(states.broadcasts.uploads).max()) == 0.0


def test_without_local_a_device_never_runs_a_task() -> None:
    scenario = parse_scenario(to_toml(plant(FIXED)).replace("local = true", "local = false"), "test")
    environment = Environment.from_scenario(scenario)
    state = compiled.reset(environment, seeds(1, 1)[0])
    seen = compiled.observe(environment, state)
    mask, present = np.asarray(seen.mask), np.asarray(seen.present)
    assert not mask[present, 0].any()
    assert mask[present, 1:].all()
    assert mask[~present, 0].all()


def test_only_the_best_servers_are_visible() -> None:
    radio = 'model = "uniform-snr"\nrate = "shannon"\nfading = "none"\nfloor = "clip"\nvisible_servers = 2'
    environment = Environment.from_scenario(plant(radio))
    state = compiled.reset(environment, seeds(1, 1)[0])
    seen = compiled.observe(environment, state)
    present = np.asarray(seen.present)
    assert present.sum() > 1
    mask = np.asarray(seen.mask)[present, 1:]
    assert (mask.sum(axis=1) == 2).all()
    snr = np.asarray(state.links.uplink_snr)[np.asarray(seen.device)[present]]
    assert (np.argmin(snr, axis=1) == np.argmin(mask, axis=1)).all()


def test_devices_have_speeds_of_their_own_for_an_episode() -> None:
    scenario = parse_scenario(
        to_toml(plant(FIXED)).replace("speed = 0.5", "speed = { low = 0.5, high = 2.0 }", 1), "test"
    )
    records, states = run(scenario, lambda environment, state: jnp.zeros(environment.requests, jnp.int32), 200)
    work = np.asarray(states.requests.work)[np.asarray(states.requests.present)][: len(records)]
    speed = work / records.service_s
    of_device = [speed[records.device == device] for device in range(6)]
    assert all(own.std() < 1e-3 for own in of_device)
    means = np.array([own.mean() for own in of_device])
    assert means.min() > 0.5 - 1e-4
    assert means.max() < 2.0 + 1e-3
    assert means.std() > 0.1


@pytest.mark.parametrize("age", [0, 2])
def test_lost_broadcasts_leave_the_one_before(age: int) -> None:
    loss = 0.4
    text = to_toml(plant(FIXED, age=age)).replace("broadcast_loss = 0.0", f"broadcast_loss = {loss}")
    environment = Environment.from_scenario(parse_scenario(text, "test"))

    def slot(state: State, _: None) -> tuple[State, tuple[jax.Array, ...]]:
        seen = environment.observe(state)
        after, _, _ = environment.step(state, jnp.ones(environment.requests, jnp.int32))
        shown = option(seen, "age_s")[0, 1:], option(seen, "backlog_s")[0, 1:], option(seen, "own_unseen_s")
        return after, (*shown, state.broadcasts.wait_s[0], state.requests.device, seen.device)

    out = jax.jit(lambda seed: jax.lax.scan(slot, environment.reset(seed), length=3000)[1])(seeds(1, 1)[0])
    ages, backlog, _, truth, *_ = (np.asarray(field) for field in out)
    late = np.round(ages[100:]).astype(int)
    assert late.min() == age
    # The age in excess is geometric: P(excess >= k) = loss^k, and servers are lost one by one.
    for k in (1, 2, 3):
        assert (late >= age + k).mean() == pytest.approx(loss**k, abs=0.02)
    assert (late[:, 0] != late[:, 1]).any()
    index = np.arange(100, 3000)[:, None] - late
    np.testing.assert_array_equal(backlog[100:], np.take_along_axis(truth, index, axis=0))


def test_unseen_work_covers_the_slots_since_the_last_heard_broadcast() -> None:
    text = to_toml(plant(FIXED, devices=1, age=1)).replace("broadcast_loss = 0.0", "broadcast_loss = 0.5")
    environment = Environment.from_scenario(parse_scenario(text, "test"))

    def slot(state: State, _: None) -> tuple[State, tuple[jax.Array, ...]]:
        seen = environment.observe(state)
        after, _, _ = environment.step(state, jnp.ones(environment.requests, jnp.int32))
        work = jnp.sum(jnp.where(state.requests.present, state.requests.work, 0.0)) / environment.plant.server_speed[0]
        return after, (option(seen, "age_s")[0, 1], option(seen, "own_unseen_s")[0, 1], work)

    out = jax.jit(lambda seed: jax.lax.scan(slot, environment.reset(seed), length=400)[1])(seeds(1, 1)[0])
    ages, unseen_s, work_s = (np.asarray(field, float) for field in out)
    for now in range(50, 400):
        late = round(ages[now])
        assert unseen_s[now] == pytest.approx(work_s[now - late : now].sum(), rel=1e-4, abs=1e-5)


@pytest.mark.parametrize(
    ("radio", "part"),
    [
        ('model = "fixed"', "needs rate_bps"),
        ('model = "wired"', 'needs access = "home"'),
        ("rate_bps = 1e6", "rate_bps is for"),
        ('rate = "nr-mcs"\nefficiency_cap = 7.4', "efficiency_cap is for"),
        ('access = "home"\nvisible_servers = 2', "visible_servers is for"),
    ],
)
def test_impossible_links_are_named(radio: str, part: str) -> None:
    with pytest.raises(InputError) as refused:
        small_plant(radio=radio)
    assert part in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_plant_needs_a_cell() -> None:
    with pytest.raises(InputError, match="at least one needs a cell"):
        plant(FIXED, lambda number: "cell = false")


def test_the_log_distance_loss_is_its_formula() -> None:
    radio = 'model = "log-distance"\nrate = "shannon"\nfading = "none"\nfloor = "clip"\nefficiency_cap = 7.4'
    scenario = plant(radio)
    environment = Environment.from_scenario(scenario)
    state = compiled.reset(environment, seeds(5, 1)[0])
    places = np.asarray(draw_positions_m(environment.plant, state.seed))
    servers = np.asarray(environment.plant.server_position_m)
    apart = np.sqrt(((places[:, None] - servers[None]) ** 2).sum(-1) + (8.0 - 1.5) ** 2)
    loss_db = 33 + 25.5 * np.log10(apart) + 20 * np.log10(3.5)
    noise_dbm = -174 + 10 * np.log10(1e6) + 5.0
    snr_db = 23.0 - loss_db - noise_dbm
    np.testing.assert_allclose(10 * np.log10(np.asarray(state.links.uplink_snr)), snr_db, atol=1e-3)
