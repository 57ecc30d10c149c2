"""Devices that move, fading that lasts, batteries that run empty: in the environment."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import compiled
from gmel.physics.channel import doppler_hz, jakes_correlation
from gmel.scenario.errors import InputError
from gmel.scenario.load import parse_scenario, to_toml
from gmel.scenario.schema import Scenario
from gmel.simulator.environment import Environment, seeds
from gmel.simulator.motion import positions_m
from gmel.simulator.records import task_records
from gmel.simulator.state import Outcome, State
from small_plants import plant_text

HALL = 'model = "inf"\nhall_m = [60.0, 40.0]\nfloor = "clip"\nrate = "shannon"\nfading = "none"\nsharing = "none"'
WALK = "mobility = { speed_m_s = { low = 1.0, high = 2.0 }, pause_s = { low = 0.0, high = 3.0 } }"
CORNERS = "[[[5, 5], [55, 5], [55, 35], [5, 35]], [[10, 20], [50, 20]]]"
ROUTE = f'mobility = {{ kind = "route", speed_m_s = 1.5, routes_m = {CORNERS} }}'


def plant(more: str, radio: str = HALL, **choices: object) -> Scenario:
    """A small plant with more keys in its devices."""
    text = plant_text(radio=radio, **choices)  # type: ignore[arg-type]
    return parse_scenario(text.replace("[devices]", f"[devices]\n{more}"), "test")


def run(scenario: Scenario, slots: int = 200, option: int = 1, seed: int = 1) -> tuple[Outcome, State]:
    environment = Environment.from_scenario(scenario)

    def slot(state: State, _: None) -> tuple[State, tuple[Outcome, State]]:
        after, _, outcome = environment.step(state, jnp.full(environment.requests, option))
        return after, (outcome, state)

    start = compiled.reset(environment, seeds(seed, 1)[0])
    return jax.jit(lambda state: jax.lax.scan(slot, state, length=slots)[1])(start)


def distances_m(scenario: Scenario, states: State) -> tuple[np.ndarray, np.ndarray]:
    """Length of each link on the floor and through the air, [slots, devices, servers]."""
    servers_m = np.asarray(Environment.from_scenario(scenario).plant.server_position_m, float)
    place = np.asarray(states.motion.position_m, float)
    floor_m = np.linalg.norm(place[:, :, None] - servers_m, axis=-1)
    return floor_m, np.maximum(np.hypot(floor_m, scenario.radio.server_height_m - scenario.radio.device_height_m), 1.0)


def loss_db(scenario: Scenario, states: State) -> np.ndarray:
    """What an upload loses on each link, from its SNR: power - noise at -174 dBm/Hz, band and figure - loss."""
    radio = scenario.radio
    noise_dbm = -174.0 + 10 * np.log10(radio.bandwidth_hz) + radio.noise_figure_db
    snr_db = 10 * np.log10(np.asarray(states.links.uplink_snr, float))
    return scenario.devices.tx_power_dbm - noise_dbm - snr_db


@pytest.mark.parametrize("mobility", [WALK, ROUTE], ids=["waypoint", "route"])
def test_links_follow_the_places(mobility: str) -> None:
    scenario = plant(mobility, devices=8, max_uploads=96)
    _, states = run(scenario)
    place = np.asarray(states.motion.position_m)
    assert (place >= -1e-3).all()
    assert (place <= np.array([60.0, 40.0]) + 1e-3).all()
    moved = np.linalg.norm(np.diff(place, axis=0), axis=-1)
    assert moved.max() <= 2.0 + 1e-3
    assert moved.mean() > 0.5
    # From slot to slot the SNR moves little, over minutes a lot.
    snr_db = 10 * np.log10(np.asarray(states.links.uplink_snr))
    near, far = np.abs(np.diff(snr_db, axis=0)), np.abs(snr_db[100:] - snr_db[:-100])
    assert near.mean() < 0.5 * far.mean()


@pytest.mark.parametrize("mobility", [WALK, ROUTE], ids=["waypoint", "route"])
def test_without_shadowing_a_link_is_a_function_of_the_place(mobility: str) -> None:
    radio = HALL.replace('"inf"', '"log-distance"')
    scenario = plant(mobility, radio=radio, devices=8, max_uploads=96)
    _, states = run(scenario, slots=50)
    _, apart_m = distances_m(scenario, states)
    expected_db = 33.0 + 25.5 * np.log10(apart_m) + 20.0 * np.log10(3.5)
    np.testing.assert_allclose(loss_db(scenario, states), expected_db, atol=2e-3)
    assert np.ptp(expected_db[:, 0], axis=0).min() > 1.0


def test_the_marginal_law_of_the_links_is_that_of_devices_that_stand() -> None:
    """Along a route the shadowing around the path loss of the present place keeps its law."""
    radio = HALL.replace('"inf"', '"log-distance"') + "\nshadowing_db = 6.0"
    scenario = plant(ROUTE, radio=radio, devices=30, max_uploads=96)
    _, states = run(scenario, slots=600)
    _, apart_m = distances_m(scenario, states)
    path_db = 33.0 + 25.5 * np.log10(apart_m) + 20.0 * np.log10(3.5)
    shadow = (loss_db(scenario, states) - path_db) / 6.0
    assert abs(shadow.mean()) < 0.1
    assert shadow.std() == pytest.approx(1.0, abs=0.05)
    # 1.5 m a slot, correlation exp(-1.5 / 10) where the route is straight.
    rho = (shadow[1:] * shadow[:-1]).mean()
    assert rho == pytest.approx(np.exp(-0.15), abs=0.02)


@pytest.mark.slow
def test_the_share_in_sight_is_its_probability() -> None:
    """Which links are in sight is told from what they lose: TR 38.901, InF-DH, Tables 7.4.1-1 and 7.4.2-1."""
    scenario = plant(WALK, devices=40, max_uploads=200)
    assert scenario.radio.subscenario == "DH"
    _, states = run(scenario, slots=400)
    floor_m, apart_m = distances_m(scenario, states)
    far, shadow = np.log10(apart_m), np.asarray(states.motion.shadow, float)
    sight_db = 31.84 + 21.5 * far + 19.0 * np.log10(3.5)
    hidden_db = np.maximum(33.63 + 21.9 * far + 20.0 * np.log10(3.5), sight_db)
    lost_db = loss_db(scenario, states)
    in_sight = np.abs(lost_db - (sight_db + 4.3 * shadow)) < 5e-3
    hidden = np.abs(lost_db - (hidden_db + 4.0 * shadow)) < 5e-3
    assert (in_sight | hidden).all()
    told = in_sight != hidden
    assert told.mean() > 0.99
    # Clutter of 2 m, density 0.6, height 6 m; device 1.5 m, server 8 m.
    chance = np.exp(floor_m * np.log(1 - 0.6) / 2.0 * (6.0 - 1.5) / (8.0 - 1.5))
    for nearer, farther in ((0, 3), (3, 6), (6, 12), (12, 80)):
        here = told & (floor_m >= nearer) & (floor_m < farther)
        assert here.sum() > 300
        assert in_sight[here].mean() == pytest.approx(chance[here].mean(), abs=0.05), (nearer, farther)


def test_devices_that_stand_cost_nothing() -> None:
    _, states = run(plant("", max_uploads=96), slots=3)
    assert states.motion is None
    assert states.battery_j is None
    assert states.links.fading is None


def test_places_at_the_reset_are_those_of_the_picture() -> None:
    for mobility in (WALK, ROUTE):
        environment = Environment.from_scenario(plant(mobility))
        state = compiled.reset(environment, seeds(3, 1)[0])
        # One is compiled, the other not: a fused multiply-add may round differently.
        np.testing.assert_allclose(positions_m(environment.plant, state.seed), state.motion.position_m, rtol=1e-6)


def test_motion_does_not_depend_on_the_actions() -> None:
    scenario = plant(WALK, max_uploads=96)
    _, one = run(scenario, option=1)
    _, other = run(scenario, option=0)
    np.testing.assert_array_equal(one.links.uplink_snr, other.links.uplink_snr)
    np.testing.assert_array_equal(one.requests.work, other.requests.work)


@pytest.mark.slow
def test_correlated_fading_lasts_as_long_as_jakes_says() -> None:
    slot_s, speed = 0.005, 0.8
    radio = (
        'model = "uniform-snr"\nsnr_db = [20.0, 20.0]\nrate = "shannon"\nfading = "ar1"\nfloor = "clip"\n'
        f'floor_snr_db = -60.0\nsharing = "none"\nfading_speed_m_s = {speed}'
    )
    scenario = plant("", radio=radio, devices=20, slot_s=slot_s, arrivals="rate_per_s = 5.0", max_uploads=300)
    _, states = run(scenario, slots=2000)
    re, im = (np.asarray(part) for part in states.links.fading)
    power = 0.5 * (re**2 + im**2)
    assert power.mean() == pytest.approx(1.0, abs=0.1)
    rho = float(jakes_correlation(doppler_hz(speed, 3.5), slot_s))
    assert 0.5 < rho < 1.0
    assert (re[1:] * re[:-1]).mean() / (re**2).mean() == pytest.approx(rho, abs=0.02)
    centred = power - power.mean()
    assert (centred[1:] * centred[:-1]).mean() / centred.var() == pytest.approx(rho**2, abs=0.05)


def test_an_upload_meets_the_fade_of_its_slot() -> None:
    radio = HALL.replace('"inf"', '"uniform-snr"').replace('"none"\nsharing', '"ar1"\nsharing') + "\nfloor_snr_db = 0.0"
    scenario = plant("", radio=radio, max_uploads=128)
    outcome, states = run(scenario, slots=100)
    records = task_records(outcome, 1.0)
    records = records.where(records.decided_slot < 60)
    present = np.asarray(states.requests.present)
    size = np.asarray(states.requests.size_bit)[present][: len(records)]
    re, im = (np.asarray(part)[records.decided_slot, records.device, 0] for part in states.links.fading)
    snr = np.asarray(states.links.uplink_snr)[records.decided_slot, records.device, 0]
    rate = 1e6 * np.log2(1 + np.maximum(snr * 0.5 * (re**2 + im**2), 1.0))
    np.testing.assert_allclose(records.upload_s, size / rate, rtol=1e-3)


def test_an_empty_battery_asks_no_more() -> None:
    scenario = plant("battery_j = { low = 20.0, high = 60.0 }\ncompute_power_w = 10.0", max_uploads=96)
    outcome, states = run(scenario, slots=150, option=0)
    battery = np.asarray(states.battery_j)
    assert (battery[0] >= 20).all()
    assert (battery[0] <= 60).all()
    assert (np.diff(battery, axis=0) <= 0).all()
    assert (battery[-1] == 0).all()
    # Whoever is empty at a slot start has no request in it.
    present, device = np.asarray(states.requests.present), np.asarray(states.requests.device)
    for slot in range(150):
        assert (battery[slot][device[slot][present[slot]]] > 0).all()
    # What a device spent is what its tasks took, but for the last one, which the battery could not pay in full.
    records = task_records(outcome, 1.0)
    for number in range(6):
        own = records.where(records.device == number)
        spent = 10.0 * own.service_s
        assert spent.sum() >= battery[0][number] - 1e-2
        assert spent[:-1].sum() <= battery[0][number] + 10.0 * own.service_s.max()


def test_standing_by_drains_a_battery_too() -> None:
    scenario = plant("battery_j = 50.0\nstandby_power_w = 2.0", max_uploads=96, arrivals="rate_per_s = 0.001")
    _, states = run(scenario, slots=40)
    np.testing.assert_allclose(np.asarray(states.battery_j)[:, 0], np.maximum(50.0 - 2.0 * np.arange(40), 0), atol=0.5)


@pytest.mark.parametrize(
    ("devices", "radio", "part"),
    [
        (WALK, 'model = "uniform-snr"', "devices.mobility needs radio.model"),
        ('mobility = { kind = "route" }', HALL, "routes_m"),
        ("standby_power_w = 1.0", HALL, "needs devices.battery_j"),
        ("", 'model = "uniform-snr"\nfading = "ar1"\nfloor = "outage"', 'needs floor = "clip"'),
    ],
)
def test_impossible_motion_is_named(devices: str, radio: str, part: str) -> None:
    with pytest.raises(InputError, match=part) as refused:
        plant(devices, radio=radio)
    assert "\n" not in str(refused.value)


def test_a_plant_that_moves_survives_its_file() -> None:
    for mobility in (WALK, ROUTE):
        scenario = plant(mobility)
        assert parse_scenario(to_toml(scenario), "again") == scenario
