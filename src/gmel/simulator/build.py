"""From a scenario to environments: one to train on, one to be judged on."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from gmel.scenario.errors import InputError
from gmel.scenario.filling import catalogue_work, fill_trace
from gmel.scenario.schema import Scenario
from gmel.scenario.slots import SlotTable, slot_table
from gmel.scenario.trace import Trace, read_trace, split_trace
from gmel.simulator.environment import Environment
from gmel.simulator.traffic import TraceArrays

__all__ = ["Environments", "build_environments", "offered_load", "replay_environment"]

LEAST_SLOTS = 32
"""A part of a trace with fewer slots cannot be trained or judged on."""


class Environments(NamedTuple):
    """The plant with training traffic and with held-out traffic.

    With drawn requests both are the same and only the seeds differ; a trace is split in time. `load` is offered work
    over capacity of the held-out part. `notes` say what was filled in or stretched.
    """

    train: Environment
    test: Environment
    load: float
    notes: tuple[str, ...]


def build_environments(scenario: Scenario, trace: str | None = None, seed: int = 0) -> Environments:
    """Environments of a scenario; `trace` (a shipped name or a file) replaces its arrivals.

    Raises:
        InputError: the trace is missing, malformed, empty or too short.
    """
    name = trace if trace is not None else scenario.arrivals.trace
    if name is None or (trace is None and scenario.arrivals.drawn):
        environment = Environment.from_scenario(scenario)
        rate = scenario.arrival_rate_per_s
        assert rate is not None  # Arrivals demands it where requests are drawn
        return Environments(environment, environment, rate * scenario.mean_work / scenario.capacity, ())
    filled = fill_trace(read_trace(name), scenario, seed)
    first, second = split_trace(filled, scenario.arrivals.train_share)
    whole, held_out = offered_load(filled, scenario), offered_load(second, scenario)
    note = f"load of the held-out part: {held_out:.3f} (whole trace: {whole:.3f})"
    return Environments(
        replay_environment(scenario, first, f"{name} (first part)"),
        replay_environment(scenario, second, f"{name} (held-out part)"),
        held_out,
        (*filled.notes, note),
    )


def offered_load(trace: Trace, scenario: Scenario) -> float:
    """Offered work of a trace over the capacity of all servers, model loading not counted."""
    duration_s = max(float(trace.time_s[-1] - trace.time_s[0]), scenario.slot.length_s)
    noise = float(np.exp(0.5 * scenario.tasks.noise_sigma**2))
    return float(trace.work.sum()) * noise / duration_s / scenario.capacity


def replay_environment(scenario: Scenario, trace: Trace, source: str) -> Environment:
    """The plant with the requests of a trace, starting again at its end.

    Raises:
        InputError: the trace has too few slots.
    """
    table = slot_table(trace, scenario.slot.length_s, scenario.arrivals.max_per_slot)
    if table.present.shape[0] < LEAST_SLOTS:
        raise InputError(
            f"trace {source}: {table.present.shape[0]} slots of {scenario.slot.length_s:g} s, at least {LEAST_SLOTS} "
            "are needed: use a longer trace or a shorter slot.length_s"
        )
    if scenario.tasks.step_options and not _work_follows(trace, scenario):
        raise InputError(
            f"trace {source} has work of its own: with tasks.step_options the work follows from the steps; "
            "remove its column work"
        )
    return Environment.from_scenario(scenario, _arrays(table, scenario))


def _work_follows(trace: Trace, scenario: Scenario) -> bool:
    """Whether the work of a trace is that of its models, images and steps, not of its own."""
    steps = trace.steps.astype(float)
    return np.allclose(trace.work, catalogue_work(scenario, trace.model, trace.images, steps, trace.bits_in))


def _arrays(table: SlotTable, scenario: Scenario) -> TraceArrays:
    number = jnp.result_type(float)
    steps, work_per_step, gang = None, None, None
    if scenario.service.discipline == "gang":
        # A trace knows nothing of gangs: its requests ask for them in turn, by weight.
        u = np.random.default_rng(0).random(table.model.shape)
        cdfs = [
            np.cumsum([g.weight for g in model.gangs]) / sum(g.weight for g in model.gangs) for model in scenario.models
        ]
        gang = jnp.asarray(sum((table.model == m) * np.searchsorted(cdf, u) for m, cdf in enumerate(cdfs)), jnp.int32)
    if scenario.asks_steps:
        steps = jnp.asarray(table.steps, number)
    if scenario.tasks.step_options:
        of_model = np.array([model.step_work.mean if model.step_work else 0.0 for model in scenario.models])
        work_per_step = jnp.asarray(table.images * of_model[table.model], number)
    return TraceArrays(
        present=jnp.asarray(table.present),
        device=jnp.asarray(table.device, jnp.int32),
        generated_s=jnp.asarray(table.generated_s, number),
        size_bit=jnp.asarray(table.size_bit, number),
        bits_out=jnp.asarray(table.bits_out, number),
        work=jnp.asarray(table.work, number),
        model=jnp.asarray(table.model, jnp.int32),
        deadline_s=jnp.asarray(table.deadline_s, number),
        steps=steps,
        work_per_step=work_per_step,
        gang=gang,
    )
