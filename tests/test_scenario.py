"""Scenarios: presets load, text survives the round trip, and whatever is wrong is said in one line that names it."""

import itertools
import math
import re
from typing import Any, get_args

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from gmel.scenario.compare import ABSENT, Difference, differences
from gmel.scenario.errors import InputError
from gmel.scenario.load import digest, load_scenario, load_warning, parse_scenario, preset_names, to_toml, with_load
from gmel.scenario.schema import Scenario
from small_plants import plant_text, small_plant

TEXT = plant_text(catalogue=True, switching=True)


def data_of(scenario: Scenario) -> dict[str, Any]:
    return scenario.model_dump(mode="json", exclude_none=True)


def text_with(changes: dict[tuple[str | int, ...], Any], text: str = TEXT) -> str:
    """The text of a scenario with the fields at the given places replaced (`None`: removed)."""
    data = data_of(parse_scenario(text, "test"))
    for place, value in changes.items():
        table: Any = data
        for step in place[:-1]:
            table = table[step]
        if value is None:
            table.pop(place[-1], None)
        else:
            table[place[-1]] = value
    return "".join(f"{key} = {inline(value)}\n" for key, value in data.items())


def inline(value: Any) -> str:
    """TOML in one line; independent of `to_toml`."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{key} = {inline(entry)}" for key, entry in value.items()) + " }"
    if isinstance(value, list):
        return "[" + ", ".join(map(inline, value)) + "]"
    if isinstance(value, str):
        return '"' + "".join(f"\\U{ord(c):08x}" for c in value) + '"'
    return repr(value)


def refused(text: str) -> str:
    """The message for a scenario that must be refused: one line, beginning with its source."""
    with pytest.raises(InputError) as caught:
        parse_scenario(text, "plant.toml")
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith("plant.toml: ")
    assert len(message) < 400
    return message


@pytest.mark.parametrize("name", preset_names())
def test_preset_loads_and_survives_the_round_trip(name: str) -> None:
    scenario = load_scenario(name)
    assert scenario.name == name
    again = parse_scenario(to_toml(scenario), "again")
    assert again == scenario
    assert digest(again) == digest(scenario)


def test_there_are_presets() -> None:
    assert "hall-20x5" in preset_names()


def test_scenario_file_is_read_and_named_in_errors(tmp_path: Any) -> None:
    path = tmp_path / "plant.toml"
    path.write_text(TEXT, "utf-8")
    assert load_scenario(str(path)) == parse_scenario(TEXT, "test")
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match="UTF-8"):
        load_scenario(str(path))
    with pytest.raises(InputError, match=r"'hall-20x6'.*did you mean 'hall-20x5'.*presets are "):
        load_scenario("hall-20x6")
    with pytest.raises(InputError, match="no such file"):
        load_scenario(str(tmp_path))


def test_text_that_is_no_toml_is_refused() -> None:
    assert "not valid TOML" in refused("name = \n")
    assert "not valid TOML" in refused('name = "a"\nname = "b"\n')


def test_full_scenario_survives_the_round_trip() -> None:
    scenario = parse_scenario(
        text_with({("servers", 0, "position_m"): [1.5, -2.0], ("title",): 'quo"te \\ ü\n\t'}), "x"
    )
    assert scenario.servers[0].position_m == (1.5, -2.0)
    assert parse_scenario(to_toml(scenario), "again") == scenario


@settings(max_examples=100, deadline=None)
@example("\x7f", 1.0, 0.0, 1, False)
@given(
    st.text(max_size=40),
    st.floats(1e-12, 1e12, exclude_min=True),
    st.floats(-100.0, 100.0),
    st.integers(1, 100_000),
    st.booleans(),
)
def test_any_valid_values_survive_the_round_trip(
    title: str, speed: float, noise_db: float, devices: int, download: bool
) -> None:
    scenario = parse_scenario(TEXT, "test")
    data = data_of(scenario)
    data |= {"title": title, "devices": {"count": devices, "speed": speed}}
    data["radio"] |= {"noise_figure_db": noise_db, "download": download}
    scenario = Scenario.model_validate(data)
    again = parse_scenario(to_toml(scenario), "again")
    assert again == scenario
    assert digest(again) == digest(scenario)


def test_digest_is_stable_and_sensitive() -> None:
    scenario = parse_scenario(TEXT, "test")
    assert digest(scenario) == digest(parse_scenario("# a comment\n" + TEXT, "other source"))
    assert re.fullmatch(r"[0-9a-f]{12}", digest(scenario))
    others = [
        text_with({("devices", "speed"): 0.500001}),
        text_with({("servers", 1, "gpus"): 2}),
        text_with({("models", 0, "steps", "weights", 1): 2.5}),
        text_with({("switching",): False}),
        text_with({("name",): "other"}),
    ]
    assert len({digest(parse_scenario(text, "x")) for text in others} | {digest(scenario)}) == 6


def test_defaults_written_out_are_the_same_scenario() -> None:
    assert digest(parse_scenario(text_with({("slot", "length_s"): None}), "x")) == digest(
        parse_scenario(text_with({("slot", "length_s"): 1.0}), "x")
    )


@pytest.mark.parametrize(
    ("place", "near"),
    [
        (("servrs",), "servers"),
        (("slot", "lenght_s"), "length_s"),
        (("devices", "cuont"), "count"),
        (("servers", 1, "gpu"), "gpus"),
        (("models", 2, "step_wrok"), "step_work"),
        (("models", 0, "load", "sigmaa"), "sigma"),
        (("tasks", "deadline_s", "hgh"), "high"),
        (("arrivals", "rate_per_sec"), "rate_per_s"),
    ],
)
def test_unknown_key_names_the_nearest_one(place: tuple[str | int, ...], near: str) -> None:
    message = refused(text_with({place: 1.0}))
    dotted = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place).lstrip(".")
    assert f"unknown key '{dotted}'" in message
    assert f"did you mean '{near}'?" in message


def test_unknown_key_unlike_any_other_lists_what_is_allowed() -> None:
    message = refused(text_with({("slot", "zzz"): 1.0}))
    assert "unknown key 'slot.zzz'; allowed: length_s, broadcast_age_slots, broadcast_loss, latency_from" in message


def test_misspelt_key_is_named_before_the_missing_one() -> None:
    text = text_with({("devices", "count"): None, ("devices", "cuont"): 5})
    assert "unknown key 'devices.cuont'; did you mean 'count'? (and 1 more)" in refused(text)


@pytest.mark.parametrize(
    "place", [("devices",), ("devices", "count"), ("servers",), ("servers", 0, "speed"), ("name",)]
)
def test_missing_field_is_named(place: tuple[str | int, ...]) -> None:
    dotted = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place).lstrip(".")
    assert f"{dotted} is missing; add it" in refused(text_with({place: None}))


def number_fields(model: type[BaseModel], place: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
    """Places of all fields that hold a real number, with the first entry of lists."""
    places: list[tuple[str | int, ...]] = []
    for name, field in model.model_fields.items():
        here = (*place, name)
        candidates = [field.annotation, *get_args(field.annotation)]
        sections = [c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)]
        if sections:
            is_list = getattr(field.annotation, "__origin__", None) in (list, tuple)
            places += number_fields(sections[0], (*here, 0) if is_list else here)
        elif "float" in str(field.annotation):
            is_list = "list[" in str(field.annotation) or "tuple[" in str(field.annotation)
            places.append((*here, 0) if is_list else here)
    return places


NUMBERS = number_fields(Scenario)


def scenario_data_with(place: tuple[str | int, ...], value: float) -> str:
    uniform = place[:2] in {("tasks", "work"), ("tasks", "bits_in")}
    text = plant_text() if uniform else TEXT
    data = data_of(parse_scenario(text, "test"))
    data["servers"][0]["position_m"] = [1.0, 2.0]
    data["devices"]["positions_m"] = [[1.0, 2.0]] * data["devices"]["count"]
    data["reward"]["latency_scale_s"] = 1.0
    if place[-1] == "rate_per_s":
        data["arrivals"].pop("load")
    table: Any = data
    for step, following in itertools.pairwise(place):
        inner = table.get(step) if isinstance(table, dict) else table[step]
        if not isinstance(inner, dict | list) or not inner:
            # A number that may be a range, or a list or a section that is not there.
            inner = {"low": 1.0, "high": 2.0} if following in ("low", "high") else {}
            if isinstance(following, int):
                entry = {"name": "A"} if step == "services" else {"gpus": 1}
                inner = [1.0] if (step, following) == place[-2:] else [entry]
            table[step] = inner
        table = inner
    table[place[-1]] = value
    return "".join(f"{key} = {inline(entry)}\n" for key, entry in data.items())


def test_the_walk_over_the_schema_finds_the_numbers() -> None:
    assert len(NUMBERS) > 50
    assert {("slot", "length_s"), ("servers", 0, "position_m", 0), ("models", 0, "steps", "values", 0)} <= set(NUMBERS)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=["nan", "inf", "-inf"])
@pytest.mark.parametrize("place", NUMBERS, ids=lambda place: ".".join(map(str, place)))
def test_every_number_must_be_finite(place: tuple[str | int, ...], value: float) -> None:
    message = refused(scenario_data_with(place, value))
    names = [part for part in place if isinstance(part, str)]
    assert names[-1] in message
    assert names[0] in message


@pytest.mark.parametrize("place", NUMBERS, ids=lambda place: ".".join(map(str, place)))
def test_every_number_is_checked_against_its_range(place: tuple[str | int, ...]) -> None:
    """-1e9 is out of range of everything, with and without sign."""
    message = refused(scenario_data_with(place, -1e9))
    assert [part for part in place if isinstance(part, str)][-1] in message
    assert "-1000000000" in message


FAULTS: dict[str, tuple[dict[tuple[str | int, ...], Any], str]] = {
    "no servers": ({("servers",): []}, "servers"),
    "no devices": ({("devices", "count"): 0}, "devices.count = 0"),
    "half a device": ({("devices", "count"): 1.5}, "devices.count = 1.5"),
    "no GPU": ({("servers", 0, "gpus"): 0}, "servers[0].gpus = 0"),
    "servers alike in name": ({("servers", 1, "name"): "S0"}, "servers with the same name: S0"),
    "models alike in name": ({("models", 1, "name"): "small"}, "models with the same name: small"),
    "range upside down": ({("tasks", "deadline_s", "low"): 9.0}, "tasks.deadline_s: low = 9 must not exceed high = 6"),
    "deadline of zero": ({("tasks", "deadline_s"): {"low": 0.0, "high": 1.0}}, "deadline_s.low must be greater than 0"),
    "weights of none": ({("models", 0, "steps", "weights"): [0.0, 0.0]}, "models[0].steps"),
    "weights too few": ({("models", 0, "steps", "weights"): [1.0]}, "models[0].steps: 2 values but 1 weights"),
    "no rate": ({("arrivals", "load"): None}, "arrivals: "),
    "two rates": ({("arrivals", "rate_per_s"): 2.0}, "give load or rate_per_s, not both"),
    "trace without a name": ({("arrivals", "kind"): "trace"}, 'kind = "trace" needs'),
    "unknown kind": ({("arrivals", "kind"): "burst"}, "arrivals.kind = 'burst'"),
    "uniform without work": ({("tasks", "kind"): "uniform"}, "tasks: "),
    "catalogue without models": ({("models",): []}, "[[models]]"),
    "model larger than a server": ({("servers", 1, "memory_gb"): 9.0}, "server 'S1' has memory_gb = 9"),
    "warm-up as long as the episode": ({("episode",): {"slots": 10, "warmup_slots": 10}}, "episode: warmup_slots = 10"),
    "SNR upside down": ({("radio", "snr_db"): [9.0, 1.0]}, "radio: snr_db = [9.0, 1.0]"),
    "clutter below the devices": (
        {("radio", "model"): "inf", ("radio", "clutter_height_m"): 1.0},
        "clutter_height_m = 1 must exceed device_height_m",
    ),
    "another format": ({("format",): 2}, "format = 2"),
    "name with a slash": ({("name",): "../x"}, "name = '../x'"),
    "text for a number": ({("devices", "speed"): "fast"}, "devices.speed = 'fast'"),
    "table for a number": ({("devices", "speed"): {"low": 1.0}}, "devices.speed"),
    "number for a table": ({("slot",): 1.0}, "slot = 1.0"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_is_said_in_one_line(fault: str) -> None:
    changes, said = FAULTS[fault]
    assert said in refused(text_with(changes))


def test_switching_needs_a_catalogue() -> None:
    assert "switching = true needs" in refused(text_with({("switching",): True}, plant_text()))


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(NUMBERS),
    st.one_of(st.floats(), st.integers(-(2**70), 2**70), st.booleans(), st.text(max_size=5), st.just([]), st.just({})),
)
def test_any_value_is_taken_or_refused_by_name(place: tuple[str | int, ...], value: Any) -> None:
    """Never a traceback, and never a scenario with a number that is not finite."""
    text = scenario_data_with(place, value)
    try:
        scenario = parse_scenario(text, "plant.toml")
    except InputError as error:
        message = str(error)
        assert "\n" not in message
        # TOML itself refuses integers beyond 64 bits in some readers.
        names = [part for part in place if isinstance(part, str)]
        assert names[0] in message or names[-1] in message or "not valid TOML" in message
        return
    table: Any = data_of(scenario)
    for step in place:
        # A range of one number is that number.
        table = table[step] if isinstance(table, dict | list) else table
    assert math.isfinite(table)
    assert parse_scenario(to_toml(scenario), "again") == scenario


@settings(max_examples=30, deadline=None)
@given(st.floats(0.01, 10.0))
def test_with_load_changes_the_load_alone(load: float) -> None:
    scenario = small_plant(arrivals="rate_per_s = 2.0")
    loaded = with_load(scenario, load)
    assert loaded.arrivals.rate_per_s is None
    assert loaded.arrival_rate_per_s == pytest.approx(load * loaded.capacity / loaded.mean_work)
    kept = {"arrivals": scenario.arrivals}
    assert loaded.model_copy(update=kept) == scenario
    assert digest(loaded) != digest(scenario)


@pytest.mark.parametrize("load", [0.0, -1.0, 11.0, math.nan, math.inf])
def test_load_out_of_range_is_refused(load: float) -> None:
    with pytest.raises(InputError, match=r"arrivals\.load = "):
        with_load(small_plant(), load)
    with pytest.raises(InputError, match=r"arrivals\.load = "):
        load_scenario("hall-20x5", load)


def test_capacity_and_mean_work_by_hand() -> None:
    scenario = small_plant(gpus=(2, 1, 3), arrivals="load = 0.5")
    assert scenario.capacity == 2.0 * 2 + 3.0 + 1.0 * 3
    assert scenario.mean_work == 1.25
    assert scenario.arrival_rate_per_s == pytest.approx(0.5 * 10.0 / 1.25)
    catalogue = small_plant(catalogue=True, tasks="noise_sigma = 0.5")
    # images x (fixed + steps x step): 1.25 (0.1 + 0.02 x 100/3), 0.03 x 30, 0.025 x 30; popularity 2 : 1 : 3.
    work = (2 * 1.25 * (0.1 + 0.02 * 100 / 3) + 0.9 + 3 * 0.75) / 6
    assert catalogue.mean_work == pytest.approx(work * math.exp(0.125))


def test_differences_name_each_field_with_both_values() -> None:
    a = parse_scenario(TEXT, "a")
    assert differences(a, a) == []
    data = data_of(a)
    data["slot"]["length_s"] = 2.0
    data["servers"][1]["speed"] = 9.0
    data["models"][2]["steps"]["values"] = [31.0]
    b = Scenario.model_validate(data)
    assert differences(a, b) == [
        Difference("slot.length_s", 1.0, 2.0),
        Difference("servers[S1].speed", 3.0, 9.0),
        Difference("models[medium].steps.values", [30.0], [31.0]),
    ]


def test_differences_match_servers_by_name_not_by_place() -> None:
    a = parse_scenario(TEXT, "a")
    data = data_of(a)
    data["servers"] = [data["servers"][2], data["servers"][0]]
    found = {each.field: each for each in differences(a, Scenario.model_validate(data))}
    assert set(found) == {"servers[S1]", "servers.order"}
    assert found["servers[S1]"].a["speed"] == 3.0
    assert found["servers[S1]"].b is ABSENT
    assert (found["servers.order"].a, found["servers.order"].b) == (["S0", "S2"], ["S2", "S0"])


def test_an_offered_load_of_one_is_warned_of() -> None:
    assert load_warning(0.999) is None
    assert "offered load 1.24" in str(load_warning(1.24))


def test_places_of_devices_are_one_each_and_count_for_the_identity() -> None:
    plain = small_plant()
    data = data_of(plain)
    data["devices"]["positions_m"] = [[0.0, 1.0]] * 6
    placed = Scenario.model_validate(data)
    assert digest(placed) != digest(plain)
    assert parse_scenario(to_toml(placed), "again") == placed
    data["devices"]["positions_m"].pop()
    with pytest.raises(ValueError, match="5 places for count = 6"):
        Scenario.model_validate(data)


def test_an_optional_field_that_is_unset_leaves_the_identity_of_a_plant_as_it_was() -> None:
    # The tuned rungs of the package are found by it.
    assert digest(load_scenario("hall-20x5")) == "74ab3ddbeda5"
    assert digest(load_scenario("factory")) == "6c93baa56a3c"
