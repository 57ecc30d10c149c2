"""Tasks at times: drawn as a scenario says, or read from a trace."""

import uuid
from pathlib import Path

import numpy as np

from gmel.edge.task import Task
from gmel.scenario.errors import InputError
from gmel.scenario.filling import fill_trace
from gmel.scenario.schema import Scenario
from gmel.scenario.trace import read_trace, write_trace

__all__ = ["tasks_of_trace", "trace_of_scenario"]


def trace_of_scenario(scenario: Scenario, seconds: float, seed: int, path: Path) -> None:
    """Draws Poisson requests at the rate of a scenario and writes them as a trace; what they ask for is filled by the
    scenario later.

    Args:
        scenario: the plant.
        seconds: how long.
        seed: of the draw.
        path: of the trace.

    Raises:
        InputError: the scenario has no rate, or nothing would come.
    """
    rate = scenario.arrival_rate_per_s
    if rate is None:
        raise InputError(f"scenario {scenario.name!r}: says neither load nor rate of its requests; give a load")
    rng = np.random.default_rng(seed)
    count = int(rng.poisson(rate * seconds))
    if not count:
        raise InputError(f"{rate:.3g} requests a second for {seconds:g} s: none comes; give more load or time")
    write_trace({"time_s": np.sort(rng.uniform(0.0, seconds, count))}, path)


def tasks_of_trace(
    path: Path, scenario: Scenario, labels: tuple[str, ...], seed: int, own_time: bool = False
) -> list[tuple[float, Task]]:
    """Tasks of a trace with their times.

    Args:
        path: the trace.
        scenario: fills what it does not say.
        labels: classes to draw, in turn; none for the first of each generator.
        seed: of the samples.
        own_time: requests come when the trace says, and are not stretched to the load of the scenario.

    Raises:
        InputError: a trace that cannot be read.
    """
    if own_time:
        arrivals = scenario.arrivals.model_copy(update={"load": None, "rate_per_s": None})
        scenario = scenario.model_copy(update={"arrivals": arrivals})
    trace = fill_trace(read_trace(path), scenario)
    run = uuid.uuid4().hex[:8]  # the same trace may be sent twice to one gateway
    tasks: list[tuple[float, Task]] = []
    for number in range(len(trace)):
        model = scenario.models[int(trace.model[number])]
        task = Task(
            id=f"{run}-{number:05d}",
            device=f"device-{int(trace.device[number]):02d}",
            model=model.name,
            label=labels[number % len(labels)] if labels else "",
            images=max(1, round(float(trace.images[number]))),
            steps=None if model.step_work is None else max(1, round(float(trace.steps[number]))),
            seed=seed + number,
            deadline_s=float(trace.deadline_s[number]),
            size_bit=float(trace.bits_in[number]),
        )
        tasks.append((float(trace.time_s[number] - trace.time_s[0]), task))
    return tasks
