"""The environment beside an independent event-driven simulator: every task, every time stamp."""

from dataclasses import dataclass
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gmel.scenario.load import load_scenario
from gmel.scenario.schema import Scenario
from gmel.simulator.environment import Environment
from gmel.simulator.state import Outcome, Requests, State
from reference_simulator import Record, Server, Task, simulate
from small_plants import RADIO, small_plant

DRAIN_SLOTS = 60


@dataclass(frozen=True)
class Run:
    """What a run showed: per slot the requests before the step and the outcome after it, as host arrays."""

    scenario: Scenario
    requests: Requests
    actions: np.ndarray
    outcome: Outcome
    lost: int
    in_flight: int
    first_residents: np.ndarray


def drive(scenario: Scenario, slots: int, seed: int = 5, drain: int = DRAIN_SLOTS) -> Run:
    """Random allowed actions for `slots` slots, then empty slots until every upload has arrived."""
    environment = Environment.from_scenario(scenario)
    options = environment.servers + 1
    actions = np.random.default_rng(seed).integers(0, options, (slots + drain, environment.requests), dtype=np.int32)

    def one_slot(state: State, action: jax.Array) -> tuple[State, Any]:
        busy = state.slot < slots
        state = state._replace(requests=state.requests._replace(present=state.requests.present & busy))
        after, _, outcome = environment.step(state, action)
        # Index types are the business of test_environment.py; here they must not stop the scan.
        after = jax.tree.map(lambda new, old: new.astype(old.dtype), after, state)
        return after, (state.requests, outcome)

    @eqx.filter_jit
    def episode(state: State, actions: jax.Array) -> tuple[State, Any]:
        return jax.lax.scan(one_slot, state, actions)

    state = environment.reset(jnp.array([seed, 0], jnp.uint32))
    last, (requests, outcome) = jax.device_get(episode(state, jnp.asarray(actions)))
    return Run(
        scenario,
        requests,
        actions,
        outcome,
        int(last.lost),
        int(last.uploads.present.sum()),
        np.asarray(state.servers.resident),
    )


Columns = dict[str, np.ndarray]


def observed_records(run: Run) -> Columns:
    """The records of the environment as columns in absolute seconds, ordered by the slot of decision and the row."""
    outcome = run.outcome
    slot, place = np.nonzero(outcome.final)
    columns = {name: np.asarray(getattr(outcome, name))[slot, place] for name in WHAT}
    parts = {name: np.asarray(getattr(outcome.account, name))[slot, place] for name in outcome.account._fields}
    clock_s = slot * run.scenario.slot.length_s
    times = {name: clock_s + np.asarray(getattr(outcome, name), float)[slot, place] for name in TIMES}
    latency_s = sum(np.asarray(part, float) for name, part in parts.items() if name != "energy_j")
    order = np.lexsort((columns["row"], columns["decided_slot"]))
    return {name: column[order] for name, column in {**columns, **parts, **times, "latency_s": latency_s}.items()}


WHAT = ("decided_slot", "row", "option", "device", "model", "dropped")
TIMES = ("generated_s", "decided_s", "upload_start_s", "upload_end_s", "start_s", "end_s")


def generated_tasks(run: Run, upload_end_s: np.ndarray, download_s: np.ndarray) -> list[Task]:
    """The tasks in the same order: uploads and downloads as observed, all else from the requests."""
    scenario, requests = run.scenario, run.requests
    at = np.nonzero(requests.present)
    decided_s = at[0] * scenario.slot.length_s
    speeds = np.array([scenario.devices.speed.mean, *(server.speed for server in scenario.servers)])
    option = run.actions[at]
    work = np.asarray(requests.work, float)[at] * np.asarray(requests.noise, float)[at]
    columns = (
        decided_s + np.asarray(requests.generated_s, float)[at],
        decided_s,
        at[1],
        requests.device[at],
        option,
        upload_end_s - decided_s,
        work / speeds[option],
        download_s,
        np.asarray(requests.deadline_s, float)[at],
        requests.model[at],
        np.asarray(requests.load_s, float)[at],
    )
    return [Task(*values) for values in zip(*(column.tolist() for column in columns), strict=True)]


def reference_records(run: Run, tasks: list[Task]) -> list[Record]:
    scenario = run.scenario
    # At the start all residents are equally old; of those the later in the catalogue leave first.
    residents = [tuple(np.nonzero(held)[0][::-1].tolist()) for held in run.first_residents]
    servers = [
        Server(server.gpus, server.memory_gb, held) for server, held in zip(scenario.servers, residents, strict=True)
    ]
    memory_gb = [model.memory_gb for model in scenario.models]
    drop = scenario.tasks.deadline == "drop"
    return simulate(tasks, servers, memory_gb, switching=scenario.switching, drop=drop)


def assert_agreement(run: Run, tolerance_s: float, relative: float = 0.0) -> tuple[list[Task], list[Record]]:
    assert run.lost == 0
    assert run.in_flight == 0, "drain longer"
    seen = observed_records(run)
    slots, rows = np.nonzero(run.requests.present)
    # Every task has exactly one record, and no record is without its task.
    np.testing.assert_array_equal(np.stack([seen["decided_slot"], seen["row"]]), np.stack([slots, rows]))
    tasks = generated_tasks(run, seen["upload_end_s"], seen["download_s"])
    records = reference_records(run, tasks)
    for name in ("option", "device", "model"):
        np.testing.assert_array_equal(seen[name], [getattr(task, name) for task in tasks], name)
    np.testing.assert_array_equal(seen["dropped"], [record.dropped for record in records], "dropped")
    for name in ("generated_s", "decided_s"):
        expected = [getattr(task, name) for task in tasks]
        np.testing.assert_allclose(seen[name], expected, rtol=0, atol=tolerance_s, err_msg=name)
    served = ~seen["dropped"]
    for name, which in (("latency_s", served | True), ("start_s", served), ("end_s", served), ("switch_s", served)):
        expected = np.array([getattr(record, name) for record in records])
        np.testing.assert_allclose(seen[name][which], expected[which], rtol=relative, atol=tolerance_s, err_msg=name)
    return tasks, records


SHARED_OUTAGE = (
    RADIO.replace('sharing = "none"', 'sharing = "equal"')
    .replace('"clip"', '"outage"')
    .replace("download = false", "download = true")
)
SMALL_MEMORY = {"memory_gb": (10.0, 12.0, 24.0)}
VARIANTS: dict[str, dict[str, Any]] = {
    "one-gpu": {"age": 0},
    "short-slots-equal-sharing-outage": {"slot_s": 0.1, "age": 3, "radio": SHARED_OUTAGE, "bandwidth_hz": 10e6},
    "gpus": {"gpus": (2, 3, 1), "slot_s": 0.5, "arrivals": "load = 0.8\ndevice_skew = 1.0", "max_per_slot": 12},
    "drop-one-gpu": {"deadline": "drop", "deadline_s": (2.0, 5.0), "slot_s": 2.0, "arrivals": "load = 1.2"},
    "drop-gpus": {"deadline": "drop", "deadline_s": (1.0, 3.0), "gpus": (2, 1, 3), "arrivals": "load = 1.3"},
    "switching": {"catalogue": True, "switching": True, **SMALL_MEMORY, "arrivals": "load = 0.4"},
    "switching-drop-gpus": {
        "catalogue": True,
        "switching": True,
        **SMALL_MEMORY,
        "gpus": (2, 1, 3),
        "deadline": "drop",
        "deadline_s": (2.0, 6.0),
        "slot_s": 0.5,
        "arrivals": "load = 0.9",
        "tasks": "noise_sigma = 0.2",
        "radio": SHARED_OUTAGE,
        "bandwidth_hz": 10e6,
    },
    "catalogue-noise": {"catalogue": True, "tasks": "noise_sigma = 0.5", "slot_s": 2.0, "latency_from": "decided"},
}


# These go through every branch of the code; the others are one feature at a time, to find a fault.
QUICK = {"short-slots-equal-sharing-outage", "gpus", "drop-one-gpu", "switching-drop-gpus"}
BY_WEIGHT = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in VARIANTS]


def variant(name: str) -> Scenario:
    choices = {"max_per_slot": 10, "max_uploads": 40, **VARIANTS[name]}
    return small_plant(**choices)


@pytest.mark.parametrize("name", BY_WEIGHT)
def test_every_task_agrees_in_double_precision(name: str) -> None:
    with jax.enable_x64(True):
        run = drive(variant(name), slots=400)
    assert run.outcome.end_s.dtype == np.float64
    tasks, records = assert_agreement(run, tolerance_s=1e-9)
    # The variant must do what it is there for.
    assert len(records) > 100
    if run.scenario.tasks.deadline == "drop":
        assert 0.02 < np.mean([record.dropped for record in records]) < 0.9
    if run.scenario.switching:
        at_server = [record.switch_s > 0 for task, record in zip(tasks, records, strict=True) if task.option]
        assert 0.05 < np.mean(at_server) < 0.95
    crossing = [task.upload_s > run.scenario.slot.length_s for task in tasks if task.option]
    assert np.mean(crossing) > 0.02, "uploads must cross slot starts"


def test_thousands_of_slots_agree_in_single_precision() -> None:
    run = drive(load_scenario("hall-20x5"), slots=4000)
    assert run.outcome.end_s.dtype == np.float32
    assert_agreement(run, tolerance_s=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_thousands_of_slots_agree_in_single_precision_for_every_feature(name: str) -> None:
    run = drive(variant(name), slots=3000)
    assert run.outcome.end_s.dtype == np.float32
    # Queues of overloaded devices grow to minutes here: a long backlog that shrinks slot by slot rounds every time.
    assert_agreement(run, tolerance_s=1e-3, relative=1e-4)
