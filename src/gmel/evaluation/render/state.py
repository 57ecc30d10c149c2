"""What happens at one instant of a scene: who sends, who waits, what runs, how much work is left."""

from dataclasses import dataclass

import numpy as np

from gmel.evaluation.render.scene import Floats, Scene, Task

__all__ = ["Instant", "backlog_s", "deepest_s", "instant", "rate_limits_bps"]


@dataclass(frozen=True)
class Instant:
    """Tasks by what they do at one time."""

    sending: list[Task]
    waiting: list[Task]
    running: list[Task]
    returning: list[Task]
    local: list[Task]


def instant(scene: Scene, time_s: float) -> Instant:
    """The tasks of a scene at a time; a task waits between the end of its upload and its start."""
    now = Instant([], [], [], [], [])
    for task in scene.tasks:
        if task.server < 0:
            if task.decided_s <= time_s < task.end_s and not task.dropped:
                now.local.append(task)
        elif task.upload_start_s <= time_s < task.upload_end_s:
            now.sending.append(task)
        elif task.upload_end_s <= time_s < (task.finish_s if task.dropped else task.start_s):
            now.waiting.append(task)
        elif not task.dropped and task.start_s <= time_s < task.end_s:
            now.running.append(task)
        elif not task.dropped and task.end_s <= time_s < task.finish_s:
            now.returning.append(task)
    return now


def backlog_s(scene: Scene, time_s: float) -> Floats:
    """Seconds of work that each server still holds at a time, shared among its GPUs; where tasks run side by side the
    seconds until the last of those there ends, since how far each has come is not in the records."""
    left_s = np.zeros(len(scene.servers))
    for task in scene.tasks:
        if task.server >= 0 and not task.dropped and task.upload_end_s <= time_s < task.end_s:
            if scene.shared:
                left_s[task.server] = max(left_s[task.server], task.end_s - time_s)
            else:
                left_s[task.server] += task.end_s - max(task.start_s, time_s)
    return left_s if scene.shared else left_s / np.array([server.gpus for server in scene.servers])


def deepest_s(scene: Scene) -> float:
    """The deepest queue of the window in seconds, which fills its bar."""
    times = np.linspace(scene.start_s, scene.end_s, 200)
    return max(1e-3, *(float(backlog_s(scene, float(time)).max(initial=0.0)) for time in times))


def rate_limits_bps(scene: Scene) -> tuple[float, float]:
    """The 5th and 95th percentile of the rates: the ends of the colour scale, which outliers must not stretch."""
    rates = np.array([task.rate_bps for task in scene.tasks if task.rate_bps > 0])
    if not rates.size:
        return 1e6, 1e7
    low, high = (float(np.percentile(rates, share)) for share in (5, 95))
    return low, max(high, 1.01 * low)
