"""Bad input: whatever the fields of a scenario are set to, it is a plant that runs, or one line says what is wrong.

The examples come from the schema itself (`scenario_strategies.py`), so a new field is fuzzed without a line here.
"""

import re
from collections import Counter
from typing import Any, get_origin

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from gmel.scenario.errors import InputError
from gmel.scenario.laws import Range, Spread
from gmel.scenario.load import digest, load_scenario, parse_scenario, preset_names, to_toml, validate_scenario
from gmel.scenario.schema import Scenario
from gmel.simulator.arrivals import request_capacity
from gmel.simulator.build import build_environments
from gmel.simulator.environment import Environment, seeds
from gmel.simulator.records import task_records
from gmel.simulator.state import Observation
from scenario_strategies import (
    BASES,
    EACH,
    FIELD_NAMES,
    LONGEST_MESSAGE,
    PLACES,
    Place,
    at_its_bound,
    kind_of,
    said_in_one_line,
    scenario_data,
    with_value,
    with_wrong_value,
)

SLOTS = 6
MOST_DEVICES, MOST_SERVERS, MOST_ROWS, MOST_LEVELS = 60, 12, 200, 32

FAST = settings(
    max_examples=400,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
)
PARTS = ("wait_to_slot_s", "upload_s", "queue_s", "switch_s", "service_s", "download_s")
NUMBERS = [place for place in PLACES if at_its_bound(place) is not None]
SPREADS = [place for place in PLACES if kind_of(place) is Spread]
NEVER_AT_A_BOUND = {
    "tasks.work.low": "above 0, and not above high",
    "tasks.deadline_s.low": "above 0, and not above high",
}
"""Numbers whose bounds alone do not make a scenario; of all others one end at least is built."""


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


def names(error: InputError, place: Place) -> bool:
    """Whether the message names the field itself, as a word; of a range, whose ends are one thing, the range."""
    steps = [step for step in place.path if step != EACH]
    fields = steps[-2:] if steps[-1] in Range.model_fields else steps[-1:]
    return re.search(rf"\b({'|'.join(fields)})\b", str(error).removeprefix("plant.toml: ")) is not None


@pytest.mark.parametrize("place", PLACES, ids=str)
def test_a_wrong_value_is_said_of_its_field(place: Place) -> None:
    @settings(FAST, max_examples=8)
    @given(with_wrong_value(place))
    def run(data: dict[str, Any]) -> None:
        try:
            scenario = validate_scenario(data, "plant.toml")
        except InputError as error:
            said_in_one_line(error)
            assert names(error, place)
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
    assert (counts["built"] > 0) == (str(place) not in NEVER_AT_A_BOUND), counts


@pytest.mark.parametrize("wrong", [True, "1"], ids=["flag", "text"])
@pytest.mark.parametrize("place", [*NUMBERS, *SPREADS], ids=str)
def test_what_only_looks_like_a_number_is_none(place: Place, wrong: object) -> None:
    several = get_origin(kind_of(place)) in (list, tuple)

    @settings(FAST, max_examples=1)
    @given(with_value(place, [wrong] if several else wrong))
    def run(data: dict[str, Any]) -> None:
        with pytest.raises(InputError, match="give a number") as caught:
            validate_scenario(data, "plant.toml")
        said_in_one_line(caught.value)
        field = [step for step in place.path if step != EACH][-1]
        assert f"{field} = {[wrong] if several else wrong!r}: " in str(caught.value)

    run()


@pytest.mark.parametrize("place", [place for place in PLACES if kind_of(place) is bool], ids=str)
@pytest.mark.parametrize("wrong", [1, "yes"])
def test_what_only_looks_like_a_flag_is_none(place: Place, wrong: object) -> None:
    @settings(FAST, max_examples=1)
    @given(with_value(place, wrong))
    def run(data: dict[str, Any]) -> None:
        with pytest.raises(InputError, match="give true or false") as caught:
            validate_scenario(data, "plant.toml")
        said_in_one_line(caught.value)

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
        if field is None:
            continue
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
    any_scenario_runs(settings(FAST, max_examples=6))


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
    assert (counts["built"] > 0) == (str(place) not in NEVER_AT_A_BOUND), counts


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
