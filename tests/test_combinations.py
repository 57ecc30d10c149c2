"""Combinations of features that cannot be: each is named in one line. And those that nearly cannot, but can."""

import copy
import math
from typing import Any

import pytest

from gmel.physics import radio
from gmel.scenario import network
from gmel.scenario.errors import InputError
from gmel.scenario.load import validate_scenario
from scenario_strategies import BASES, said_in_one_line

LINK = {"devices.local": False}
RATES = {"radio.model": "fixed", "radio.rate_bps": 1e6}
SPLIT = {"tasks.split_options": [1, 2]}
QUALITY: dict[str, Any] = {"law": "power"}

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
    "weights of a band that is not shared": (
        "uniform",
        {"devices.band_weights": [0.5, 1.0]},
        "devices.band_weights needs radio.sharing = \"equal\": with 'none' no band is shared",
    ),
    "weights of a band where there is none": (
        "uniform",
        {
            "devices.band_weights": [0.5, 1.0],
            "radio.model": "wired",
            "radio.access": "home",
            "radio.sharing": "equal",
        },
        'devices.band_weights needs a radio: with radio.model = "wired" no band is shared',
    ),
    "weights in a queue": (
        "uniform",
        {"tasks.cpu_weights": [1.0, 4.0]},
        "tasks.cpu_weights needs service.discipline = \"sharing\": with 'fifo' tasks do not share a GPU by weight",
    ),
    "weights in a batch": (
        "uniform",
        {
            "tasks.cpu_weights": [1.0, 4.0],
            "service.discipline": "batching",
            **{f"servers.{n}.concurrency": 4 for n in range(3)},
        },
        "tasks.cpu_weights needs service.discipline = \"sharing\": with 'batching' tasks do not share a GPU by weight",
    ),
    "split over more servers than there are": (
        "amcoedge",
        {"tasks.split_options": [1, 4]},
        "tasks.split_options = [1, 4]: there are 3 servers",
    ),
    "more ways to do a task than can be looked at": (
        "uniform",
        {
            "devices.power_options_dbm": [float(dbm) for dbm in range(8)],
            "tasks.split_options": [1, 2, 3],
            "devices.band_weights": [float(weight) for weight in range(1, 9)],
            "radio.sharing": "equal",
            "tasks.cpu_weights": [1.0, 2.0],
        },
        "384 ways to do a task at a place (power_dbm 8, band_weight 8, cpu_weight 2, split 3), at most 256",
    ),
    "splits out of order": ("uniform", {"tasks.split_options": [3, 1]}, "tasks: split_options = [3, 1] must rise"),
    "split where servers share their time": (
        "uniform",
        {**SPLIT, "service.discipline": "sharing"},
        'tasks.split_options above 1 needs service.discipline = "fifo" and no failures',
    ),
    "split where servers fail": ("uniform", {**SPLIT, "failures.straggle": 0.1}, "and no failures: elsewhere a part"),
    "split where tasks are discarded": (
        "uniform-drop",
        SPLIT,
        'tasks.split_options above 1 needs tasks.deadline = "late" and no service.max_wait_s',
    ),
    "split with admission": ("uniform", {**SPLIT, "service.max_wait_s": 2.0}, "no service.max_wait_s: a part could be"),
    "split with batteries": ("uniform", {**SPLIT, "devices.battery_j": 9.0}, "does not go with devices.battery_j"),
    "split over servers of their own quality": (
        "amcoedge",
        {f"servers.{n}.quality": QUALITY for n in range(3)},
        "tasks.split_options above 1 does not go with servers.quality",
    ),
    "split where one task is sent at a time": (
        "uniform",
        {**SPLIT, "radio.one_at_a_time": True},
        "does not go with radio.one_at_a_time: all parts are sent at once",
    ),
    "split in a shared home cell": (
        "uniform",
        {**SPLIT, "radio.access": "home", "radio.sharing": "equal"},
        'tasks.split_options above 1 needs radio.sharing = "none" where tasks go over a home cell',
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
    "services without a quality": (
        "catalogue",
        {"servers.1.services": [{"name": "A"}, {"name": "B"}]},
        "server 'S1' has services, but results have no quality to choose by",
    ),
    "services of which one has no quality": (
        "agod",
        {"servers.2.quality": None, "servers.2.services": [{"name": "A", "quality": QUALITY}, {"name": "B"}]},
        "need models.quality of every model",
    ),
    "services with the same name": (
        "adsac",
        {"servers.1.services.1.name": "AIGC1"},
        "server 'ES02' has services with the same name: AIGC1",
    ),
    "bases of other models": (
        "adsac",
        {"servers.0.services.1.base": [0.5]},
        "service 'AIGC2': services.base has 1 numbers for 3 models; give one for each of [[models]], or none",
    ),
    "hidden quality that nobody counts": (
        "adsac",
        {"reward.quality": 0.0},
        "slot.quality_known = false needs reward.quality above 0",
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
    "cache without switching": (
        "catalogue",
        {"cache": {"decision_slots": 5}},
        "cache needs switching = true: else no model is ever loaded",
    ),
    "cache of servers that share": (
        "switching",
        {"cache": {"decision_slots": 5}, "service.discipline": "sharing"},
        'cache does not go with service.discipline = "sharing"',
    ),
    "cache of servers that fail": (
        "switching",
        {"cache": {"decision_slots": 5}, "failures.mean_up_s": 9.0},
        "cache does not go with failures: models are loaded on GPUs that take one task each",
    ),
    "stays out of order": (
        "uniform",
        {"servers.1.present": [{"from_s": 5.0, "to_s": 9.0}, {"to_s": 4.0}]},
        "present: the stay from_s = 0 begins before the one before it ends",
    ),
    "stay that ends before it begins": (
        "uniform",
        {"servers.0.present": [{"from_s": 5.0, "to_s": 4.0}]},
        "servers[0].present[0]: to_s = 4 must exceed from_s = 5",
    ),
    "nobody ever there": (
        "uniform",
        {f"servers.{n}.present": [{"from_s": 20.0}] for n in range(3)},
        "servers.present: no server is ever there in an episode of 20 s",
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
