"""What a policy looks at, built from what is known live: the columns of `gmel.policies.exported`, in its units.

The same columns as in the simulator (docs/model.md, what a device sees). What a gateway knows is fresh: the age of its
count is 0, and nothing of its own is unseen.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from gmel.edge.fleet import Fleet, ServerState
from gmel.edge.task import Task
from gmel.policies.exported import OPTION_UNITS, TASK_UNITS

__all__ = ["expected_s", "observe"]

_OPTIONS = {name: place for place, name in enumerate(OPTION_UNITS)}
_TASKS = {name: place for place, name in enumerate(TASK_UNITS)}
_LEAST_SPEED = 1e-6

Floats = NDArray[np.float32]


def observe(
    task: Task,
    servers: Sequence[ServerState],
    fleet: Fleet,
    now: float,
    waited_s: float,
    own_backlog_s: float = 0.0,
    own_pace: float = 1.0,
) -> tuple[Floats, Floats]:
    """One task before its options.

    Args:
        task: the task.
        servers: that it may be sent to.
        fleet: what models cost.
        now: of the monotonic clock.
        waited_s: seconds since it was accepted.
        own_backlog_s: seconds until the processor of the device is free.
        own_pace: what tasks take there, measured over expected.

    Returns:
        `task` [1, 6] and `options` [1, 1 + servers, 11]. Option 0 is the device itself, which a gateway cannot choose.
    """
    model = fleet.plant.models.get(task.model)
    work = float(task.images) if model is None else model.work(task.images, task.steps, task.size_bit)
    row = np.zeros((1, len(_TASKS)), np.float32)
    row[0, _TASKS["work"]] = work
    row[0, _TASKS["size_bit"]] = task.size_bit
    row[0, _TASKS["deadline_s"]] = task.deadline_s - waited_s
    row[0, _TASKS["waited_s"]] = waited_s
    row[0, _TASKS["own_requests"]] = 1.0
    row[0, _TASKS["own_backlog_s"]] = own_backlog_s
    options = np.zeros((1, 1 + len(servers), len(_OPTIONS)), np.float32)
    device_speed = max(fleet.plant.device_speed / own_pace, _LEAST_SPEED)
    options[0, 0, [_OPTIONS["local"], _OPTIONS["gpus"]]] = 1.0
    options[0, 0, _OPTIONS["speed"]] = device_speed
    options[0, 0, [_OPTIONS["backlog_s"], _OPTIONS["previous_s"]]] = own_backlog_s
    options[0, 0, _OPTIONS["service_s"]] = work / device_speed
    for place, server in enumerate(servers, start=1):
        flight = fleet.expect(task, server)
        backlog_s, previous_s = server.look(now, fleet.plant.slot_s)
        column = options[0, place]
        column[_OPTIONS["speed"]] = max(server.speed / server.pace, _LEAST_SPEED)
        column[_OPTIONS["gpus"]] = server.gpus
        column[_OPTIONS["upload_s"]] = flight.upload_s
        column[_OPTIONS["backlog_s"]] = backlog_s
        column[_OPTIONS["previous_s"]] = previous_s
        column[_OPTIONS["switch_s"]] = flight.switch_s
        column[_OPTIONS["service_s"]] = flight.service_s
        rate = task.links_bps.get(server.name)
        bits = 0.0 if model is None else model.bits_out_per_image * task.images
        column[_OPTIONS["download_s"]] = 0.0 if rate is None else bits / rate
    return row, options


def expected_s(options: Floats) -> Floats:
    """Expected latency of every option, [options]: the wait overlaps the upload (`gmel.policies.rules`)."""
    each = options[0]
    start_s = np.maximum(each[:, _OPTIONS["upload_s"]], each[:, _OPTIONS["backlog_s"]])
    return start_s + each[:, _OPTIONS["switch_s"]] + each[:, _OPTIONS["service_s"]] + each[:, _OPTIONS["download_s"]]
