"""Records of tasks that a device has decided on itself: the rows of `gmel.edge.records`, as the device saw it."""

from dataclasses import dataclass
from typing import Any

from gmel.edge.engines.engine import Answer
from gmel.edge.task import Task

__all__ = ["Way", "record_of"]


@dataclass(frozen=True)
class Way:
    """When things happened to a task, in seconds of the monotonic clock.

    Attributes:
        began: the device wanted it done.
        decided: it chose where, the last time.
        arrived: the server said so; none where nothing was on the way, or nothing was said.
        ended: the result was there.
    """

    began: float
    decided: float
    arrived: float | None
    ended: float


def record_of(
    task: Task, server: str, answer: Answer, way: Way, wall_s: float, attempt: int, policy: str, expected_s: float
) -> dict[str, Any]:
    """One row. The six parts add up to the latency.

    Args:
        task: that was done.
        server: who did it.
        answer: what it said.
        way: when.
        wall_s: seconds since 1970 at `way.began`.
        attempt: how often it was handed over.
        policy: by which it was decided.
        expected_s: seconds that were expected when it was.
    """
    latency_s, sent_s = way.ended - way.began, way.decided - way.began
    at_server_s = answer.wait_s + answer.switch_s + answer.service_s
    on_the_way_s = max(way.ended - way.decided - at_server_s, 0.0)
    upload_s = min(0.0 if way.arrived is None else way.arrived - way.decided, on_the_way_s)
    return {
        "id": task.id,
        "device": task.device,
        "server": server,
        "model": task.model,
        "images": task.images,
        "steps": task.steps,
        "size_bit": task.size_bit,
        "generated_s": wall_s,
        "decided_s": wall_s + sent_s,
        "upload_start_s": wall_s + sent_s,
        "upload_end_s": wall_s + sent_s + upload_s,
        "start_s": wall_s + sent_s + upload_s + answer.wait_s,
        "end_s": wall_s + latency_s,
        "wait_to_slot_s": sent_s,
        "upload_s": upload_s,
        "queue_s": answer.wait_s,
        "switch_s": answer.switch_s,
        "service_s": answer.service_s,
        "download_s": on_the_way_s - upload_s,
        "latency_s": latency_s,
        "deadline_s": task.deadline_s,
        "attempt": attempt,
        "policy": policy,
        "version": 1,
        "expected_s": expected_s,
        "status": "done" if latency_s <= task.deadline_s else "late",
    }
