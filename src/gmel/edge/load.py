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


def trace_of_scenario(scenario: Scenario, seconds: float, load: float, seed: int, path: Path) -> None:
    """Draws Poisson requests and writes them as a trace; what they ask for is filled by the scenario later.

    Args:
        scenario: the plant.
        seconds: how long.
        load: offered work over the capacity of all servers.
        seed: of the draw.
        path: of the trace.

    Raises:
        InputError: nothing would come.
    """
    weights = np.array([model.popularity for model in scenario.models])
    work = float(np.average([model.mean_work() for model in scenario.models], weights=weights))
    capacity = sum(server.speed * server.gpus for server in scenario.servers)
    rate = load * capacity / work
    rng = np.random.default_rng(seed)
    count = int(rng.poisson(rate * seconds))
    if not count:
        raise InputError(f"load {load:g} for {seconds:g} s: no request comes; give more of one of them")
    write_trace({"time_s": np.sort(rng.uniform(0.0, seconds, count))}, path)


def tasks_of_trace(path: Path, scenario: Scenario, labels: tuple[str, ...], seed: int) -> list[tuple[float, Task]]:
    """Tasks of a trace with their times.

    Args:
        path: the trace.
        scenario: fills what it does not say.
        labels: classes to draw, in turn; none for the first of each generator.
        seed: of the samples.

    Raises:
        InputError: a trace that cannot be read.
    """
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
