"""Bad input: whatever the fields of a scenario are set to, it is a plant that runs, or one line says what is wrong.

The examples come from the schema itself (`scenario_strategies.py`), so a new field is fuzzed without a line here.
"""

import copy
import math
import re
from collections import Counter
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from gmel.physics import radio
from gmel.scenario import network
from gmel.scenario.errors import InputError
from gmel.scenario.load import digest, load_scenario, parse_scenario, preset_names, to_toml, validate_scenario
from gmel.scenario.schema import Scenario
from gmel.simulator.arrivals import request_capacity
from gmel.simulator.build import build_environments
from gmel.simulator.environment import Environment, seeds
from gmel.simulator.records import task_records
from gmel.simulator.state import Observation
from scenario_strategies import BASES, FIELD_NAMES, PLACES, Place, at_its_bound, scenario_data, with_wrong_value

SLOTS = 6
MOST_DEVICES, MOST_SERVERS, MOST_ROWS, MOST_LEVELS = 60, 12, 200, 32
LONGEST_MESSAGE = 1000

FAST = settings(
    max_examples=400,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
)
PARTS = ("wait_to_slot_s", "upload_s", "queue_s", "switch_s", "service_s", "download_s")
NUMBERS = [place for place in PLACES if at_its_bound(place) is not None]
A_FIELD = re.compile(r"\b(" + "|".join(sorted(FIELD_NAMES, key=len, reverse=True)) + r")\b")


def valid(data: dict[str, Any], counts: Counter[str]) -> Scenario | None:
    """The scenario, which must survive the round trip; None where one line refuses it."""
    try:
        scenario = validate_scenario(data, "plant.toml")
    except InputError as error:
        said_in_one_line(error)
        counts["refused"] += 1
        return None
    again = parse_scenario(to_toml(scenario), "again")
    assert again == scenario
    assert digest(again) == digest(scenario)
    counts["valid"] += 1
    return scenario


def said_in_one_line(error: InputError) -> None:
    message = str(error)
    assert message.isprintable(), "more than one line"
    assert A_FIELD.search(message.removeprefix("plant.toml: ")), "no field is named"
    assert len(message) < LONGEST_MESSAGE


def too_large(scenario: Scenario) -> bool:
    """Whether the plant would take long to compile. Nothing is wrong with that."""
    large = scenario.devices.count > MOST_DEVICES or len(scenario.servers) > MOST_SERVERS
    large = large or (scenario.max_uploads or 0) > MOST_ROWS or scenario.levels > MOST_LEVELS
    if large or not scenario.arrivals.drawn:
        return large
    try:
        return request_capacity(scenario) > MOST_ROWS
    except InputError as error:
        said_in_one_line(error)
        return True


def built(scenario: Scenario, counts: Counter[str]) -> Environment | None:
    """The environment; None where one line refuses it."""
    if too_large(scenario):
        counts["too large"] += 1
        return None
    try:
        environment = build_environments(scenario).train
    except InputError as error:
        said_in_one_line(error)
        counts["refused when built"] += 1
        return None
    counts["built"] += 1
    return environment


def test_the_walk_over_the_schema_finds_every_field() -> None:
    names = {str(place) for place in PLACES}
    assert {"slot.length_s", "servers[].quality.law", "devices.mobility.routes_m", "models[].gangs[].gpus"} <= names
    for name in ("models[].steps.values", "tasks.work.low", "devices.speed.high", "arrivals.count"):
        assert name in names
    assert set(Scenario.model_fields) <= set(FIELD_NAMES)
    for name, data in BASES.items():
        validate_scenario(data, name)
    assert set(preset_names()) <= set(BASES)


def test_any_scenario_is_built_or_refused_in_one_line() -> None:
    counts: Counter[str] = Counter()

    @FAST
    @given(scenario_data())
    def run(data: dict[str, Any]) -> None:
        scenario = valid(data, counts)
        if scenario is not None:
            built(scenario, counts)

    run()
    # Where nearly all is refused, or too large, nothing is tried.
    assert counts["valid"] > 0.3 * (counts["valid"] + counts["refused"])
    assert counts["built"] > 0.9 * counts["valid"]


@pytest.mark.parametrize("place", PLACES, ids=str)
def test_a_wrong_value_is_said_of_its_field(place: Place) -> None:
    @settings(FAST, max_examples=8)
    @given(with_wrong_value(place))
    def run(data: dict[str, Any]) -> None:
        try:
            scenario = validate_scenario(data, "plant.toml")
        except InputError as error:
            said_in_one_line(error)
            assert any(step.lower() in str(error).lower() for step in place.path)
        else:
            assert parse_scenario(to_toml(scenario), "again") == scenario

    run()


@pytest.mark.parametrize("place", NUMBERS, ids=str)
def test_a_number_at_its_bounds_is_built_or_refused_in_one_line(place: Place) -> None:
    counts: Counter[str] = Counter()

    @settings(FAST, max_examples=6)
    @given(at_its_bound(place))
    def run(data: dict[str, Any]) -> None:
        scenario = valid(data, counts)
        if scenario is not None:
            built(scenario, counts)

    run()


def episode(environment: Environment) -> Any:
    """A few slots with options drawn from those that the observations allow."""
    arrays, rest = eqx.partition(environment, eqx.is_array)

    def run(arrays: Environment, seed: jax.Array, key: jax.Array) -> Any:
        environment = eqx.combine(arrays, rest)

        def slot(state: Any, key: jax.Array) -> Any:
            seen = environment.observe(state)
            chance = jax.random.uniform(key, seen.mask.shape)
            action = jnp.argmax(jnp.where(seen.mask, chance, -1.0), axis=1).astype(jnp.int32)
            projection = environment.project(state, action)
            state, reward, outcome = environment.step(state, action)
            return state, (seen, projection, reward, outcome)

        state, history = jax.lax.scan(slot, environment.reset(seed), jax.random.split(key, SLOTS))
        return environment.observe(state, fresh=True), history

    # It runs once: what good code would save there is less than it takes to make.
    quickly = jax.jit(run, compiler_options={"xla_backend_optimization_level": 0})
    return jax.device_get(quickly(arrays, seeds(3, 1)[0], jax.random.key(1)))


def is_sound(seen: Observation) -> None:
    """Every request has an option, and of those it has all is known."""
    assert seen.mask.any(axis=-1).all()
    assert np.isfinite(seen.task[seen.present]).all()
    assert not np.isnan(seen.task).any()
    assert not np.isnan(seen.options).any()
    assert np.isfinite(seen.options[seen.mask & seen.present[..., None]]).all()


def runs(environment: Environment) -> int:
    """Runs a plant for a few slots and checks all numbers that come out; the number of tasks that became final."""
    fresh, (seen, projection, reward, outcome) = episode(environment)
    is_sound(seen)
    is_sound(fresh)
    for each in (projection, reward):
        for name, field in zip(each._fields, each, strict=True):
            assert np.isfinite(field).all(), name
    assert np.isfinite(outcome.backlog_s).all()
    assert np.isfinite(outcome.server_wait_s).all()
    records = task_records(outcome, float(environment.plant.slot_s))
    for name, field in vars(records).items():
        assert np.isfinite(field).all() or (name == "quality" and outcome.quality is None), name
    times = (records.generated_s, records.upload_end_s, records.start_s, records.end_s, records.latency_s)
    tolerance_s = 1e-3 + 1e-5 * np.abs(times).max(axis=0)
    for name in (*PARTS, "energy_j"):
        assert (getattr(records, name) >= -tolerance_s).all(), name
    assert (records.latency_s >= 0).all()
    whole_s = records.end_s - records.generated_s + records.download_s
    whole_s = np.where(records.dropped, records.deadline_s, whole_s)
    assert (np.abs(records.latency_s - whole_s) <= tolerance_s).all()
    return len(records)


def any_scenario_runs(profile: settings) -> None:
    counts: Counter[str] = Counter()

    @profile
    @given(scenario_data(wrong=False))
    def run(data: dict[str, Any]) -> None:
        scenario = valid(data, counts)
        assume(scenario is not None)
        assert scenario is not None
        environment = built(scenario, counts)
        assume(environment is not None)
        assert environment is not None
        counts["tasks"] += runs(environment)

    run()
    assert counts["valid"] > 0.25 * (counts["valid"] + counts["refused"])
    assert counts["built"] > 0.8 * counts["valid"]
    assert counts["tasks"] > 3 * counts["built"]


def test_any_valid_scenario_runs() -> None:
    any_scenario_runs(settings(FAST, max_examples=12))


@pytest.mark.slow
def test_many_valid_scenarios_run() -> None:
    any_scenario_runs(settings(FAST, max_examples=300, derandomize=False))


@pytest.mark.slow
@pytest.mark.parametrize("place", NUMBERS, ids=str)
def test_a_plant_with_a_number_at_its_bounds_runs(place: Place) -> None:
    counts: Counter[str] = Counter()

    @settings(FAST, max_examples=4)
    @given(at_its_bound(place))
    def run(data: dict[str, Any]) -> None:
        scenario = valid(data, counts)
        environment = None if scenario is None else built(scenario, counts)
        if environment is not None:
            runs(environment)

    run()


LINK = {"devices.local": False}
RATES = {"radio.model": "fixed", "radio.rate_bps": 1e6}
QUALITY: dict[str, Any] = {"law": "power"}
UNREADABLE = {
    "arrays inside arrays": "name = " + "[" * 100_000,
    "tables inside tables": "name = " + "{ a = " * 10_000,
    "a number of many digits": "max_uploads = " + "9" * 5_000,
    "a long name": f'name = "{"x" * 100_000}"',
    "nothing": "",
    "a date": "name = 1979-05-27",
}


@pytest.mark.parametrize("text", UNREADABLE.values(), ids=UNREADABLE)
def test_text_that_cannot_be_read_is_refused_in_one_line(text: str) -> None:
    with pytest.raises(InputError) as caught:
        parse_scenario(text, "plant.toml")
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < LONGEST_MESSAGE


PIECES = ["[[", "]]", "=", "\n[x]\n", '"', '"""', "{", "nan", "'"]


@settings(FAST, max_examples=100)
@given(st.sampled_from(list(BASES)), st.data())
def test_spoilt_text_is_read_or_refused_in_one_line(base: str, data: st.DataObject) -> None:
    text = to_toml(validate_scenario(BASES[base], base))
    start = data.draw(st.integers(0, len(text)))
    end = start + data.draw(st.integers(0, 20))
    piece = data.draw(st.one_of(st.text(max_size=8), st.sampled_from(PIECES)))
    try:
        parse_scenario(text[:start] + piece + text[end:], "plant.toml")
    except InputError as error:
        assert str(error).isprintable()
        assert len(str(error)) < LONGEST_MESSAGE


@pytest.mark.parametrize("name", ["x" * 5_000, "\0", "", ".", "a\nb"], ids=["long", "null", "empty", "folder", "lines"])
def test_a_name_that_no_file_has_is_refused_in_one_line(name: str) -> None:
    with pytest.raises(InputError) as caught:
        load_scenario(name)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < LONGEST_MESSAGE


# Base, changed fields (None: left out), and what the one line says.
IMPOSSIBLE: dict[str, tuple[str, dict[str, Any], str]] = {
    "batching with gangs": (
        "eat",
        {"service.discipline": "batching", "servers.0.concurrency": 8},
        "models.gangs and service.discipline = \"gang\" need each other; the discipline is 'batching'",
    ),
    "gang service without gangs": (
        "catalogue",
        {"service.discipline": "gang"},
        "models.gangs and service.discipline = \"gang\" need each other; the discipline is 'gang'",
    ),
    "gang service with a concurrency": ("eat", {"servers.0.concurrency": 8}, "'cluster' has concurrency, which"),
    "gangs of uniform tasks": ("uniform", {"service.discipline": "gang"}, 'needs tasks.kind = "catalogue"'),
    "gang that no server fits": ("eat", {"servers.0.gpus": 2}, "asks for more GPUs than any server has (2)"),
    "gang service with switching": (
        "eat",
        {"switching": True},
        'switching = true does not go with service.discipline = "gang": a gang loads its model itself',
    ),
    "gang service with failures": (
        "eat",
        {"failures.straggle": 0.1},
        'failures do not go with service.discipline = "g',
    ),
    "capacity of uniform tasks": (
        "uniform",
        {"service.discipline": "capacity", "servers": [{"name": "S", "speed": 1.0, "capacity": 9.0}]},
        'service.discipline = "capacity" needs tasks.kind = "catalogue"',
    ),
    "capacity with drop": ("agod", {"tasks.deadline": "drop"}, 'has no queue: no tasks.deadline = "drop", no max_wait'),
    "capacity with admission": ("agod", {"service.max_wait_s": 1.0}, 'no tasks.deadline = "drop", no max_wait_s'),
    "capacity with switching": ("agod", {"switching": True}, 'does not go with service.discipline = "capacity"'),
    "capacity with failures": ("agod", {"failures.mean_up_s": 9.0}, "failures do not go with service.discipline"),
    "capacity of a server missing": (
        "agod",
        {"servers.1.capacity": None},
        "needs servers.capacity; server 'ASP02' has",
    ),
    "capacity without its discipline": (
        "catalogue",
        {"servers.0.capacity": 50.0},
        "'S0' has capacity, which service.discipline = \"fifo\" does not use; remove it, or choose capacity",
    ),
    "concurrency with fifo": (
        "uniform",
        {"servers.2.concurrency": 4},
        'concurrency, which service.discipline = "fifo" does not use; remove it, or choose sharing or batching',
    ),
    "places with fifo": ("uniform", {"servers.0.places": 4}, "'S0' has places, which service.discipline = \"fifo\""),
    "batching without a concurrency": (
        "uniform",
        {"service.discipline": "batching"},
        "needs servers.concurrency; server 'S0' has none",
    ),
    "concurrency below the GPUs": (
        "sharing-failures",
        {"servers.0.gpus": 4, "servers.0.concurrency": 2},
        "'S0': concurrency = 2 must not be below gpus = 4",
    ),
    "one at a time in a shared cell": (
        "uniform",
        {"radio.one_at_a_time": True, "radio.sharing": "equal"},
        'radio: one_at_a_time needs sharing = "none"',
    ),
    "interference without a radio": (
        "uniform",
        {**RATES, "radio.interference": True},
        "radio: interference needs a radio; model = 'fixed' has none",
    ),
    "fixed rates without rates": ("uniform", {"radio.model": "fixed"}, 'radio: model = "fixed" needs rate_bps'),
    "rates of a radio model": ("uniform", {"radio.rate_bps": 1e6}, 'radio: rate_bps is for model = "fixed"'),
    "efficiency cap of a modem": (
        "uniform",
        {"radio.rate": "nr-mcs", "radio.efficiency_cap": 5.0},
        "radio: efficiency_cap is for rate = \"shannon\"; 'nr-mcs' has a cap of its own",
    ),
    "lasting fading with outage": (
        "uniform",
        {"radio.fading": "ar1", "radio.floor": "outage"},
        'radio: fading = "ar1" needs floor = "clip"',
    ),
    "wires to every server": ("uniform", {"radio.model": "wired"}, 'radio: model = "wired" needs access = "home"'),
    "visible servers of a home cell": (
        "uniform",
        {"radio.visible_servers": 2, "radio.access": "home"},
        'radio: visible_servers is for access = "direct"',
    ),
    "servers below the devices": (
        "uniform",
        {"radio.model": "log-distance", "radio.server_height_m": 1.0},
        "radio: server_height_m = 1 must not be below device_height_m = 1.5",
    ),
    "no cell at all": ("uniform", {f"servers.{n}.cell": False for n in range(3)}, "servers: at least one needs a cell"),
    "links that may fail, no local tasks": (
        "uniform-drop",
        LINK,
        "devices.local = false needs links that always carry something",
    ),
    "steps to choose without a catalogue": (
        "uniform",
        {"tasks.step_options": [5.0, 10.0]},
        'tasks: step_options needs kind = "catalogue"',
    ),
    "steps to choose that cost nothing": (
        "catalogue",
        {"tasks.step_options": [5.0], "models.1.step_work": None, "models.1.fixed_work": 1.0},
        "tasks.step_options needs models.step_work of every model",
    ),
    "steps to choose with a square": (
        "catalogue",
        {"tasks.step_options": [5.0], "models.1.square_work": 1.0},
        "tasks.step_options needs work that is linear in the steps: no models.square_work",
    ),
    "reward for a quality that is not there": (
        "catalogue",
        {"reward.quality": 1.0},
        "reward.quality and tasks.least_quality need models.quality of every model",
    ),
    "least quality of one model only": (
        "catalogue",
        {"tasks.least_quality": 0.5, "models.0.quality": QUALITY},
        "reward.quality and tasks.least_quality need models.quality of every model",
    ),
    "quality of servers beside local tasks": (
        "uniform",
        {"reward.quality": 1.0, **{f"servers.{n}.quality": QUALITY for n in range(3)}},
        "reward.quality and tasks.least_quality need models.quality of every model",
    ),
    "repeated models that are drawn": ("switching", {"tasks.repeat_model": 0.5}, 'needs arrivals.kind = "trace"'),
    "switching without a catalogue": (
        "uniform",
        {"switching": True},
        'switching = true needs tasks.kind = "catalogue"',
    ),
    "model that a server cannot hold": (
        "switching",
        {"servers.1.memory_gb": 8.0},
        "'S1' has memory_gb = 8, the largest",
    ),
    "catalogue without models": ("catalogue", {"models": []}, "needs at least one [[models]] entry"),
    "uniform tasks without work": (
        "uniform",
        {"tasks.work": None},
        'kind = "uniform" needs tasks.work and tasks.bits_in',
    ),
    "model without work": ("catalogue", {"models.1.step_work": None}, "the smallest request would have 0 work units"),
    "quality that falls": (
        "eat",
        {"models.0.quality.last_steps": 2.0},
        "models[0].quality: last_steps = 2 must exceed first_steps = 5",
    ),
    "moving devices without a hall": ("uniform", {"devices.mobility": {}}, "devices.mobility needs radio.model"),
    "moving devices that stand": (
        "factory",
        {"devices.mobility": {}, "devices.positions_m": [[1.0, 1.0]] * 5},
        "devices.mobility and devices.positions_m exclude each other",
    ),
    "route that is none": (
        "factory",
        {"devices.mobility": {"kind": "route"}},
        'devices.mobility: routes_m and kind = "route" need each other',
    ),
    "stops on a route": (
        "hall-20x5",
        {
            "devices.mobility": {
                "kind": "route",
                "routes_m": [[[0.0, 0.0], [9.0, 0.0]]],
                "pause_s": {"low": 0, "high": 1},
            }
        },
        'devices.mobility: pause_s is for kind = "waypoint"',
    ),
    "standby without a battery": (
        "uniform",
        {"devices.standby_power_w": 1.0},
        "standby_power_w needs devices.battery_j",
    ),
    "places of too few devices": (
        "uniform",
        {"devices.positions_m": [[0.0, 0.0]]},
        "positions_m has 1 places for count",
    ),
    "load and rate": ("uniform", {"arrivals.rate_per_s": 1.0}, "arrivals: give load or rate_per_s, not both"),
    "renewals without a variation": ("uniform", {"arrivals.kind": "gamma"}, 'arrivals: kind = "gamma" needs cv'),
    "bursts of a Poisson process": ("uniform", {"arrivals.burst": {}}, "arrivals: burst is for kind = 'mmpp'"),
    "day of a renewal process": (
        "uniform",
        {"arrivals.kind": "gamma", "arrivals.cv": 2.0, "arrivals.day": {}},
        "arrivals: day is for kind = 'poisson' and 'mmpp'",
    ),
    "unlike devices that draw their own": (
        "uniform",
        {"arrivals.kind": "bernoulli", "arrivals.device_skew": 1.0},
        "arrivals: device_skew has no effect with kind = 'bernoulli'",
    ),
    "more requests than devices can have": (
        "uniform",
        {"arrivals.kind": "bernoulli", "arrivals.load": 10.0},
        "arrivals: the load asks for a request with probability",
    ),
    "count and rate": (
        "uniform",
        {"arrivals.kind": "uniform", "arrivals.count": [1, 2]},
        'arrivals: kind = "uniform" needs count, and neither load nor rate_per_s',
    ),
    "warm-up of a whole episode": ("uniform", {"episode.warmup_slots": 20}, "episode: warmup_slots = 20 must be below"),
    # 10^6 bits at 10^6 bit/s take a second.
    "deadline below the upload, fixed rates": (
        "uniform",
        {**RATES, "tasks.deadline_s": {"low": 0.1, "high": 0.9}},
        "tasks.deadline_s.high = 0.9 is shorter than the smallest upload, 1 s",
    ),
    # 10^6 bits over 10^6 Hz at 7.4062 bit/s/Hz.
    "deadline below the upload, modem": (
        "uniform",
        {"radio.rate": "nr-mcs", "tasks.deadline_s": {"low": 0.1, "high": 0.1}},
        "tasks.deadline_s.high = 0.1 is shorter than the smallest upload, 0.135 s",
    ),
    "deadline below the upload, capped": (
        "catalogue",
        {"radio.efficiency_cap": 4.0, "tasks.deadline_s": {"low": 0.1, "high": 0.2}},
        "tasks.deadline_s.high = 0.2 is shorter than the smallest upload, 0.25 s",
    ),
}


@pytest.mark.parametrize("case", IMPOSSIBLE)
def test_what_cannot_be_is_named_in_one_line(case: str) -> None:
    base, changes, said = IMPOSSIBLE[case]
    validate_scenario(BASES[base], "base")
    with pytest.raises(InputError) as caught:
        validate_scenario(changed(BASES[base], changes), "plant.toml")
    said_in_one_line(caught.value)
    assert said in str(caught.value)


def changed(data: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """The data with other values at dotted places; sections on the way are made, None leaves a field out."""
    data = copy.deepcopy(data)
    for place, value in changes.items():
        *way, last = place.split(".")
        holder: Any = data
        for step in way:
            holder = holder[int(step)] if isinstance(holder, list) else holder.setdefault(step, {})
        if value is None:
            holder.pop(last, None)
        else:
            holder[last] = copy.deepcopy(value)
    return data


@pytest.mark.parametrize(
    ("base", "changes"),
    [
        ("uniform", {**RATES, "tasks.deadline_s": {"low": 0.1, "high": 1.0}}),
        ("uniform", {"radio.rate": "nr-mcs", "tasks.deadline_s": {"low": 0.01, "high": 0.14}}),
        ("uniform", {"tasks.deadline_s": {"low": 0.01, "high": 0.01}}),
        ("eat", {"tasks.deadline_s": {"low": 1e-3, "high": 1e-3}}),
        ("factory", {"tasks.deadline_s": {"low": 1e-3, "high": 1e-3}}),
    ],
    ids=["fixed rates", "modem", "no cap", "wires", "trace"],
)
def test_a_deadline_that_some_upload_meets_is_allowed(base: str, changes: dict[str, Any]) -> None:
    validate_scenario(changed(BASES[base], changes), "plant.toml")


def test_the_most_bits_per_hertz_are_those_of_the_rate_models() -> None:
    """The scenario names them itself: it may not import the physics above it."""
    truncation = radio.UPLINK_TRUNCATION
    bound = truncation.attenuation * math.log2(1.0 + 10.0 ** (0.1 * truncation.snr_max_db))
    assert pytest.approx(bound) == network.MOST_TRUNCATED_SHANNON
    assert max(radio.MCS_EFFICIENCIES) == network.MOST_NR_MCS
