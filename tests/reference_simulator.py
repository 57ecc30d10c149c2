"""An independent simulator: event by event, in plain Python and double precision, written from the rules alone.

Rules: a server serves first in, first out in order of upload completion (ties: decided earlier first, then the row),
each task on the GPU that is free first; a model that is not resident costs its load time, the least recently used
models leave until it fits; with `drop` a task that cannot start before its deadline is discarded and counts its
deadline as latency; a device runs its own tasks in the order in which they were decided. Times are absolute seconds.
"""

import heapq
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Server:
    """A server at time 0: its GPUs, its model memory and what it holds, least recently used first."""

    gpus: int
    memory_gb: float = 0.0
    resident: tuple[int, ...] = ()


@dataclass(frozen=True)
class Task:
    """A task with its decision. `option` 0 is the device itself, j the server j - 1; `upload_s` includes any outage."""

    generated_s: float
    decided_s: float
    row: int
    device: int
    option: int
    upload_s: float
    service_s: float
    download_s: float
    deadline_s: float
    model: int = 0
    load_s: float = 0.0


@dataclass(frozen=True)
class Record:
    """What became of a task. Of a discarded task `start_s` and `end_s` are when it was given up."""

    start_s: float
    end_s: float
    switch_s: float
    dropped: bool
    latency_s: float


@dataclass
class _Queue:
    """A server at work."""

    idle: int
    memory_gb: float
    resident: list[int]
    waiting: deque[int] = field(default_factory=deque)


_GPU_FREE, _UPLOAD_DONE = 0, 1


def simulate(
    tasks: Sequence[Task],
    servers: Sequence[Server],
    model_memory_gb: Sequence[float] = (),
    *,
    switching: bool = False,
    drop: bool = False,
) -> list[Record]:
    """One record per task, in the order of `tasks`."""
    records: dict[int, Record] = {}
    _run_devices(tasks, records, drop)
    queues = [_Queue(server.gpus, server.memory_gb, list(server.resident)) for server in servers]
    # Key: time, kind, decided, row; then what the event is about.
    events: list[tuple[float, int, float, int, int]] = [
        (task.decided_s + task.upload_s, _UPLOAD_DONE, task.decided_s, task.row, number)
        for number, task in enumerate(tasks)
        if task.option > 0
    ]
    heapq.heapify(events)
    while events:
        now, kind, _, _, number = heapq.heappop(events)
        if kind == _GPU_FREE:
            queue = queues[number]
            queue.idle += 1
        else:
            queue = queues[tasks[number].option - 1]
            queue.waiting.append(number)
        while queue.idle and queue.waiting:
            first = queue.waiting.popleft()
            task = tasks[first]
            if drop and now > task.generated_s + task.deadline_s:
                records[first] = Record(now, now, 0.0, True, task.deadline_s)
                continue
            switch_s = _switch(queue, task, model_memory_gb) if switching else 0.0
            end_s = now + switch_s + task.service_s
            records[first] = Record(now, end_s, switch_s, False, end_s + task.download_s - task.generated_s)
            queue.idle -= 1
            heapq.heappush(events, (end_s, _GPU_FREE, 0.0, 0, task.option - 1))
    return [records[number] for number in range(len(tasks))]


def _run_devices(tasks: Sequence[Task], records: dict[int, Record], drop: bool) -> None:
    free_s: dict[int, float] = {}
    local = [number for number, task in enumerate(tasks) if task.option == 0]
    for number in sorted(local, key=lambda n: (tasks[n].decided_s, tasks[n].row)):
        task = tasks[number]
        start_s = max(task.decided_s, free_s.get(task.device, 0.0))
        if drop and start_s > task.generated_s + task.deadline_s:
            records[number] = Record(start_s, start_s, 0.0, True, task.deadline_s)
            continue
        end_s = start_s + task.service_s
        free_s[task.device] = end_s
        records[number] = Record(start_s, end_s, 0.0, False, end_s - task.generated_s)


def _switch(queue: _Queue, task: Task, model_memory_gb: Sequence[float]) -> float:
    """Load time that the task spends; moves its model to the recent end."""
    if task.model in queue.resident:
        queue.resident.remove(task.model)
        queue.resident.append(task.model)
        return 0.0
    while sum(model_memory_gb[m] for m in queue.resident) + model_memory_gb[task.model] > queue.memory_gb:
        queue.resident.pop(0)
    queue.resident.append(task.model)
    return task.load_s
