"""Scenarios for fuzzing, made from the schema itself: a field that is added there is fuzzed without a line here.

A scenario starts as one of `BASES` (small and valid) and has a few of its fields changed. What a field may become
follows from its annotation: type, bounds, choices, lengths, sections inside. Data are as in a TOML file: nested
dictionaries, absent where a value is None.
"""

import copy
import math
import re
from collections.abc import Callable
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from gmel.scenario.errors import InputError
from gmel.scenario.laws import Choice, Range, Spread
from gmel.scenario.load import load_scenario, preset_names
from gmel.scenario.schema import Scenario
from small_plants import RADIO, small_plant

__all__ = [
    "BASES",
    "EACH",
    "FIELD_NAMES",
    "LONGEST_MESSAGE",
    "PLACES",
    "Place",
    "at_its_bound",
    "kind_of",
    "said_in_one_line",
    "scenario_data",
    "with_value",
    "with_wrong_value",
]

Data = dict[str, Any]
Draw = Callable[[st.SearchStrategy[Any]], Any]
LONGEST_MESSAGE = 1000
"""Letters of the one line that says what is wrong."""
EACH = "each"
"""Step of a place into an entry of a list."""
ABSENT = object()
"""Value of a field that is left out."""


class Place(NamedTuple):
    """A field of the schema: the way to it, and what it is."""

    path: tuple[str, ...]
    annotation: Any
    metadata: tuple[Any, ...]

    def __str__(self) -> str:
        return ".".join(self.path).replace(f".{EACH}", "[]")


def _plain(annotation: Any, metadata: tuple[Any, ...]) -> tuple[Any, tuple[Any, ...], bool]:
    """An annotation without `Annotated` and `None`, with the bounds found on the way; and whether None is allowed."""
    optional = False
    while True:
        if get_origin(annotation) is Annotated:
            annotation, *more = get_args(annotation)
            for each in more:
                metadata += tuple(each.metadata) if isinstance(each, FieldInfo) else (each,)
        elif get_origin(annotation) in (Union, UnionType) and NoneType in get_args(annotation):
            (annotation,) = [each for each in get_args(annotation) if each is not NoneType]
            optional = True
        else:
            return annotation, metadata, optional


def kind_of(place: Place) -> Any:
    """Type of a field, without its bounds."""
    return _plain(place.annotation, place.metadata)[0]


def _bound(metadata: tuple[Any, ...], *names: str) -> Any:
    for each in metadata:
        for name in names:
            if getattr(each, name, None) is not None:
                return getattr(each, name)
    return None


def _is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _places(annotation: Any, metadata: tuple[Any, ...], path: tuple[str, ...]) -> list[Place]:
    annotation, metadata, _ = _plain(annotation, metadata)
    inner: list[Place] = []
    if _is_section(annotation):
        for name, field in annotation.model_fields.items():
            inner.append(Place((*path, name), field.annotation, tuple(field.metadata)))
            inner += _places(field.annotation, tuple(field.metadata), (*path, name))
    elif get_origin(annotation) in (list, tuple):
        entry = get_args(annotation)[0]
        if _is_section(_plain(entry, ())[0]):
            inner.append(Place((*path, EACH), entry, ()))
            inner += _places(entry, (), (*path, EACH))
    return inner


PLACES = _places(Scenario, (), ())
FIELD_NAMES = sorted({place.path[-1] for place in PLACES} - {EACH})
A_FIELD = re.compile(r"\b(" + "|".join(sorted(FIELD_NAMES, key=len, reverse=True)) + r")\b")


def values(annotation: Any, metadata: tuple[Any, ...] = (), now: Any = ABSENT, most: int = 4) -> st.SearchStrategy[Any]:
    """Values that look valid: of the type and inside the bounds, the bounds themselves among them."""
    annotation, metadata, _ = _plain(annotation, metadata)
    if _is_section(annotation):
        return st.integers(1, most).flatmap(_choice) if annotation is Choice else _section(annotation)
    if get_origin(annotation) in (list, tuple):
        return _sequences(annotation, metadata, most)
    return _scalars(annotation, metadata, now)


def _sequences(annotation: Any, metadata: tuple[Any, ...], most: int) -> st.SearchStrategy[Any]:
    if get_origin(annotation) is list or Ellipsis in get_args(annotation):
        least, longest = _bound(metadata, "min_length") or 0, _bound(metadata, "max_length") or most
        return st.lists(values(get_args(annotation)[0]), min_size=least, max_size=max(least, min(longest, most)))
    entries = st.tuples(*(values(each) for each in get_args(annotation))).map(list)
    # Most pairs of a scenario are [low, high].
    return st.one_of(entries.map(sorted), entries)


def _scalars(annotation: Any, metadata: tuple[Any, ...], now: Any) -> st.SearchStrategy[Any]:
    if get_origin(annotation) is Literal:
        return st.sampled_from(get_args(annotation))
    if annotation is bool:
        return st.booleans()
    if annotation is int:
        return _integers(metadata, now)
    if annotation is float:
        return _floats(metadata, now)
    if annotation is str:
        pattern = _bound(metadata, "pattern")
        text = st.text(max_size=8) if pattern is None else st.from_regex(re.compile(pattern, re.ASCII), fullmatch=True)
        longest = _bound(metadata, "max_length") or 200
        return st.one_of(text.map(lambda each: each[:longest]), st.sampled_from(["a", "b-2", "c.d"]))
    raise TypeError(f"the walk over the schema does not know {annotation!r}; teach it")


def _integers(metadata: tuple[Any, ...], now: Any) -> st.SearchStrategy[int]:
    low, high = _whole_ends(metadata)
    small = st.integers(low, min(high, low + 7))
    near = [each for each in (now - 1, now + 1, 2 * now) if low <= each <= high] if isinstance(now, int) else []
    return st.one_of(small, small, small, st.sampled_from([low, high, *near]))


def _whole_ends(metadata: tuple[Any, ...]) -> tuple[int, int]:
    """The least and the largest whole number inside the bounds."""
    low, high = _bound(metadata, "ge"), _bound(metadata, "le")
    return 0 if low is None else low, 2**62 if high is None else high


def _ends(metadata: tuple[Any, ...]) -> tuple[float, float]:
    """The least and the largest number inside the bounds."""
    low, high = _bound(metadata, "ge"), _bound(metadata, "le")
    low_open, high_open = _bound(metadata, "gt"), _bound(metadata, "lt")
    least = low if low is not None else math.nextafter(low_open, math.inf) if low_open is not None else -1e6
    most = high if high is not None else math.nextafter(high_open, -math.inf) if high_open is not None else 1e6
    return float(least), float(most)


def _floats(metadata: tuple[Any, ...], now: Any) -> st.SearchStrategy[float]:
    least, most = _ends(metadata)

    def inside(*numbers: float) -> list[float]:
        return [number for number in numbers if least <= number <= most] or [least]

    usual = st.sampled_from(
        inside(*(sign * 10**power for power in range(-3, 4) for sign in (1.0, -1.0)), 0.0, 0.3, 0.6)
    )
    ways = [usual, usual, st.floats(max(least, -100.0), min(most, 100.0)), st.sampled_from([least, most])]
    if isinstance(now, int | float) and now:
        near = st.sampled_from(inside(*(now * factor for factor in (0.1, 0.5, 0.9, 1.1, 2.0, 10.0))))
        ways += [near, near, near]
    return st.one_of(ways)


def _choice(length: int) -> st.SearchStrategy[Data]:
    def several(name: str) -> st.SearchStrategy[list[Any]]:
        entry = get_args(Choice.model_fields[name].annotation)[0]
        return st.lists(values(entry), min_size=length, max_size=length)

    return st.fixed_dictionaries({name: several(name) for name in Choice.model_fields})


def _section(model: type[BaseModel]) -> st.SearchStrategy[Any]:
    fields = {name: values(field.annotation, tuple(field.metadata)) for name, field in model.model_fields.items()}
    if issubclass(model, Range):
        numbers = st.tuples(*fields.values()).map(sorted).map(lambda pair: dict(zip(fields, pair, strict=True)))
        return st.one_of(fields["low"], numbers) if issubclass(model, Spread) else numbers
    needed = {name for name, field in model.model_fields.items() if field.is_required()}
    free = [name for name in fields if name not in needed]
    return _written(model, needed, fields, free)


@st.composite
def _written(draw: Draw, model: type[BaseModel], needed: set[str], fields: Data, free: list[str]) -> Data:
    """A section as users write it: what is needed and a few fields more, mostly such that it is valid by itself."""
    data: Data = {}
    for _ in range(6):
        chosen = draw(st.lists(st.sampled_from(free), max_size=3, unique=True)) if free else []
        data = {name: draw(fields[name]) for name in fields if name in needed or name in chosen}
        try:
            model.model_validate(data)
        except ValidationError:
            continue
        break
    return data


def wrong_values(annotation: Any, metadata: tuple[Any, ...]) -> st.SearchStrategy[Any]:
    """Values that are most likely not allowed: of another type, beyond the bounds, not a number, empty."""
    annotation, metadata, _ = _plain(annotation, metadata)
    wrong: list[Any] = [
        "",
        "x",
        [],
        {},
        [[]],
        [1.0],
        {"zzz": 1},
        True,
        -1,
        0,
        0.5,
        2**70,
        math.nan,
        math.inf,
        -math.inf,
    ]
    wrong += [1e300, -1e300, 1e12, -5e-324, "line\nbreak", "1", "\x00", [math.nan], [None], {"low": 2.0, "high": 1.0}]
    for name in ("ge", "gt", "le", "lt"):
        bound = _bound(metadata, name)
        if bound is not None:
            sign = 1 if name in ("le", "lt") else -1
            wrong += [bound, bound + sign, math.nextafter(bound, sign * math.inf), 1000 * (bound + sign)]
    return st.sampled_from(wrong)


def _cut_down(scenario: Scenario) -> Data:
    """The data of a scenario with few devices, servers, requests and slots, so that it compiles and runs quickly."""
    data = scenario.model_dump(mode="json", exclude_none=True)
    devices = data["devices"]
    devices["count"] = min(devices["count"], 5)
    if "positions_m" in devices:
        devices["positions_m"] = devices["positions_m"][: devices["count"]]
    data["servers"] = data["servers"][:3]
    data["models"] = data["models"][:3]
    most = max((server["gpus"] for server in data["servers"]), default=1)
    for model in data["models"]:
        model["gangs"] = [gang for gang in model["gangs"] if gang["gpus"] <= most]
    for server in data["servers"]:
        server["services"] = server["services"][:2]
        for service in server["services"]:
            service["base"] = service["base"][: len(data["models"])]
    tasks = data["tasks"]
    choices = ((tasks, "step_options"), (devices, "power_options_dbm"), (devices, "band_weights"))
    for holder, name in (*choices, (tasks, "cpu_weights")):
        if name in holder:
            holder[name] = holder[name][:2]
    if "split_options" in data["tasks"]:
        data["tasks"]["split_options"] = [each for each in data["tasks"]["split_options"] if each <= 3]
    visible = data["radio"].get("visible_servers")
    if visible is not None:
        data["radio"]["visible_servers"] = min(visible, len(data["servers"]))
    data["arrivals"]["max_per_slot"] = 4
    data["max_uploads"] = 10
    data["episode"] = {"slots": 20, "warmup_slots": 2}
    return data


MOVING = """
model = "log-distance"
shadowing_db = 3.0
rate = "shannon"
efficiency_cap = 6.0
fading = "ar1"
floor = "clip"
[devices.mobility]
pause_s = { low = 0.0, high = 5.0 }
"""
FIXED = """
model = "fixed"
rate_bps = { low = 1e6, high = 4e6 }
sharing = "none"
download = false
"""
CROWDED = f"""
{RADIO}
interference = true
one_at_a_time = true
access = "home"
"""
SHARED = """
[service]
discipline = "sharing"
[failures]
mean_up_s = 20.0
mean_down_s = 3.0
straggle = 0.1
"""


def _small_plants() -> dict[str, Data]:
    """Features that no preset has together."""
    outage = RADIO.replace('"clip"', '"outage"').replace('"none"', '"equal"').replace("download = false", "")
    bursts = 'kind = "mmpp"\nrate_per_s = 4.0\nburst = { ratio = 4.0 }\nday = { amplitude = 0.3 }'
    plants = {
        "uniform": small_plant(),
        "uniform-drop": small_plant(deadline="drop", gpus=(1, 2, 3), radio=outage, age=0),
        "sharing-failures": small_plant(radio=outage + SHARED),
        "catalogue": small_plant(catalogue=True, reward="miss = 1.0\nenergy = 0.1"),
        "switching": small_plant(catalogue=True, switching=True, gpus=(1, 2, 1), tasks="noise_sigma = 0.3"),
        "cached": small_plant(catalogue=True, switching=True, gpus=(2, 1, 1)),
        "weights": small_plant(radio=outage + SHARED, gpus=(1, 2, 3)),
        "fixed": small_plant(radio=FIXED + SHARED),
        "moving": small_plant(radio=MOVING, bandwidth_hz=5e6, arrivals=bursts),
        "routed": small_plant(radio=MOVING, bandwidth_hz=5e6),
        "crowded": small_plant(radio=CROWDED, catalogue=True, arrivals='kind = "gamma"\ncv = 2.0\nload = 0.8'),
    }
    data = {name: _cut_down(plant) for name, plant in plants.items()}
    data["moving"]["devices"] |= {"battery_j": {"low": 20.0, "high": 200.0}, "standby_power_w": 0.5}
    routes = [[[0.0, 0.0], [40.0, 0.0], [40.0, 30.0]], [[5.0, 5.0], [60.0, 5.0]]]
    data["routed"]["devices"]["mobility"] = {"kind": "route", "routes_m": routes}
    data["cached"]["cache"] = {"decision_slots": 2, "policy": "random"}
    data["cached"]["servers"][0]["present"] = [{"to_s": 2.5}, {"from_s": 4.25, "to_s": 12.0}]
    data["cached"]["servers"][1]["present"] = [{"from_s": 3.5}]
    data["fixed"]["servers"][0] |= {"places": 6, "concurrency": 3}
    data["weights"]["devices"]["band_weights"] = [0.5, 2.0]
    data["weights"]["tasks"]["cpu_weights"] = [1.0, 4.0]
    data["crowded"]["devices"]["power_options_dbm"] = [10.0, 20.0]
    places = range(data["crowded"]["devices"]["count"])
    data["crowded"]["devices"]["positions_m"] = [[10.0 * place, 5.0] for place in places]
    data["crowded"]["servers"][2] |= {"cell": False, "backhaul_bps": 1e8, "backhaul_delay_s": 0.02}
    return data


BASES: dict[str, Data] = _small_plants() | {name: _cut_down(load_scenario(name)) for name in preset_names()}


def _reach(draw: Draw, data: Data, path: tuple[str, ...]) -> tuple[Any, Any] | None:
    """The table or list that holds the last step of a path, and the key there. What is missing on the way is made."""
    holder: Any = data
    model: Any = Scenario
    metadata: tuple[Any, ...] = ()
    for step, following in zip(path, (*path[1:], None), strict=True):
        if step == EACH:
            (model, metadata), key = (get_args(model)[0], ()), draw(st.integers(0, len(holder) - 1))
        else:
            field, key = model.model_fields[step], step
            model, metadata = field.annotation, tuple(field.metadata)
        model, metadata, _ = _plain(model, metadata)
        if following is None:
            return holder, key
        inner = holder.get(key) if isinstance(holder, dict) else holder[key]
        if following == EACH:
            if not isinstance(inner, list) or not inner:
                inner = [draw(values(get_args(model)[0]))]
        elif not isinstance(inner, dict):
            inner = draw(values(model))
            if not isinstance(inner, dict):  # a range that is a number
                inner = {"low": inner, "high": inner}
        holder[key] = inner
        holder = inner
    return None


def _extremes(annotation: Any, metadata: tuple[Any, ...], now: Any = ABSENT) -> st.SearchStrategy[Any] | None:
    """Numbers at the ends of what their bounds allow, of a list one or as many as now; None for what holds none."""
    annotation, metadata, _ = _plain(annotation, metadata)
    if annotation is int:
        return st.sampled_from(_whole_ends(metadata))
    if annotation is float:
        return st.sampled_from(_ends(metadata))
    if get_origin(annotation) not in (list, tuple):
        return None
    first = now[0] if isinstance(now, list) and now else ABSENT
    inner = [_extremes(each, (), first) for each in get_args(annotation) if each is not Ellipsis]
    entries = [each for each in inner if each is not None]
    if len(entries) != len(inner):
        return None
    if get_origin(annotation) is list or Ellipsis in get_args(annotation):
        as_many = len(now) if isinstance(now, list) and now else 2
        lengths = sorted({_bound(metadata, "min_length") or 1, as_many})
        # The last way is the most usual one: it keeps the shape of what is there.
        return st.one_of(*(st.lists(entries[0], min_size=each, max_size=each) for each in (*lengths, as_many)))
    return st.tuples(*entries).map(sorted)


@st.composite
def _changed(draw: Draw, data: Data, place: Place, source: Callable[[Any], st.SearchStrategy[Any]]) -> Data:
    """A copy of the data with another value at a place; `source` gives them from the value that is there."""
    data = copy.deepcopy(data)
    found = _reach(draw, data, place.path)
    assert found is not None
    holder, key = found
    now = holder.get(key, ABSENT) if isinstance(holder, dict) else holder[key]
    value = draw(source(now))
    if value is not ABSENT:
        holder[key] = value
    elif isinstance(holder, dict):
        holder.pop(key, None)
    return data


def _another_value(data: Data, place: Place) -> st.SearchStrategy[Data]:
    """The data with a value at a place that looks valid, now and then left out where it may be."""
    optional = _plain(place.annotation, place.metadata)[2]

    def source(now: Any) -> st.SearchStrategy[Any]:
        allowed = values(place.annotation, place.metadata, now)
        return st.one_of(allowed, allowed, allowed, st.just(ABSENT)) if optional and now is not ABSENT else allowed

    return _changed(data, place, source)


def _wrong_value(data: Data, place: Place) -> st.SearchStrategy[Data]:
    """The data with a value at a place that is hardly allowed, or one left out, or a key that nobody knows."""
    wrong = wrong_values(place.annotation, place.metadata)
    keys = st.sampled_from(["zzz", f"{place.path[-1]}s", "line\nbreak", ""])
    section = Place(place.path[:-1], None, ())
    ways = [_changed(data, place, lambda _: st.one_of(wrong, wrong, wrong, st.just(ABSENT)))]
    if section.path:
        ways.append(_changed(data, section, lambda now: keys.map(lambda key: _with_key(now, key))))
    return st.one_of(ways[0], ways[0], ways[0], *ways[1:])


def _with_key(section: Any, key: str) -> Any:
    return {**section, key: 1.0} if isinstance(section, dict) else section


def _some_data(place: Place) -> st.SearchStrategy[Data]:
    """A base that has a place, or any where none has."""
    having = [data for data in BASES.values() if _has(data, place.path)]
    return st.sampled_from(having or list(BASES.values()))


def _has(data: Any, path: tuple[str, ...]) -> bool:
    if not path:
        return True
    if path[0] == EACH:
        return bool(data) and _has(data[0], path[1:])
    return isinstance(data, dict) and path[0] in data and _has(data[path[0]], path[1:])


def with_wrong_value(place: Place) -> st.SearchStrategy[Data]:
    """Data that are valid but for one place, which has a value that is hardly allowed."""
    return _some_data(place).flatmap(
        lambda data: _changed(data, place, lambda _: wrong_values(place.annotation, place.metadata))
    )


def with_value(place: Place, value: Any) -> st.SearchStrategy[Data]:
    """Data that are valid but for one place, which has this value."""
    return _some_data(place).flatmap(lambda data: _changed(data, place, lambda _: st.just(value)))


def at_its_bound(place: Place) -> st.SearchStrategy[Data] | None:
    """Data with one number at an end of what its bounds allow; None for a place that holds no number."""
    if _extremes(place.annotation, place.metadata) is None:
        return None

    def source(now: Any) -> st.SearchStrategy[Any]:
        numbers = _extremes(place.annotation, place.metadata, now)
        assert numbers is not None
        return numbers

    return _some_data(place).flatmap(lambda data: _changed(data, place, source))


@st.composite
def scenario_data(draw: Draw, bases: tuple[str, ...] = tuple(BASES), wrong: bool = True) -> Data:
    """Data of a scenario: a base, sometimes with sections of another, with up to four fields changed."""
    data = copy.deepcopy(BASES[draw(st.sampled_from(bases))])
    if draw(st.integers(0, 2)) == 0:
        other = BASES[draw(st.sampled_from(bases))]
        for section in draw(st.lists(st.sampled_from(sorted(Scenario.model_fields)), max_size=2, unique=True)):
            data.pop(section, None)
            if section in other:
                data[section] = copy.deepcopy(other[section])
    if wrong and "max_per_slot" in data.get("arrivals", {}) and draw(st.integers(0, 3)) == 0:
        del data["arrivals"]["max_per_slot"]  # the table then follows from the law of the arrivals
    spoilt = wrong and draw(st.integers(0, 3)) == 0
    count = draw(st.integers(1, 4))
    for number in range(count):
        change = _wrong_value if spoilt and number == count - 1 else _another_value
        data = draw(change(data, draw(st.sampled_from(PLACES))))
    return data


def said_in_one_line(error: InputError) -> None:
    message = str(error)
    assert message.isprintable(), "more than one line"
    assert A_FIELD.search(message.removeprefix("plant.toml: ")), "no field is named"
    assert len(message) < LONGEST_MESSAGE
