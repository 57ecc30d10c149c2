"""The row of a task that was done, with the names of `gmel.simulator.records` where they mean the same: as the gateway
saw it, or the device that decided itself."""

from dataclasses import dataclass
from typing import Any

from gmel.edge.engines.engine import Answer
from gmel.edge.task import Task

__all__ = ["Way", "record_of"]


@dataclass(frozen=True)
class Way:
    """When things happened to a task, in seconds of the monotonic clock: a wall clock that jumps does not bend them.

    Attributes:
        began: it was accepted, or the device wanted it done.
        decided: where it goes was chosen, the last time.
        sent: it was handed over.
        arrived: the server said so; none where nothing was said.
        ended: the result was there.
    """

    began: float
    decided: float
    sent: float
    arrived: float | None
    ended: float


def record_of(
    task: Task,
    server: str,
    answer: Answer,
    way: Way,
    wall_s: float,
    attempt: int,
    policy: str,
    version: int,
    expected_s: float,
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
        version: of the policy.
        expected_s: seconds that were expected when it was.
    """
    latency_s, sent_s = way.ended - way.began, way.sent - way.began
    at_server_s = answer.wait_s + answer.switch_s + answer.service_s
    on_the_way_s = max(way.ended - way.sent - at_server_s, 0.0)
    upload_s = on_the_way_s if way.arrived is None else min(way.arrived - way.sent, on_the_way_s)
    return {
        "id": task.id,
        "device": task.device,
        "server": server,
        "model": task.model,
        "images": task.images,
        "steps": task.steps,
        "size_bit": task.size_bit,
        "generated_s": wall_s,
        "decided_s": wall_s + way.decided - way.began,
        "upload_start_s": wall_s + sent_s,
        "upload_end_s": wall_s + sent_s + upload_s,
        "start_s": wall_s + sent_s + upload_s + answer.wait_s,
        "end_s": wall_s + latency_s,
        "wait_to_slot_s": sent_s,
        "upload_s": upload_s,
        "queue_s": answer.wait_s,
        "switch_s": answer.switch_s,
        "service_s": answer.service_s,
        "together": max(answer.together, task.images),
        "download_s": on_the_way_s - upload_s,
        "latency_s": latency_s,
        "deadline_s": task.deadline_s,
        "attempt": attempt,
        "policy": policy,
        "version": version,
        "expected_s": expected_s,
        "status": "done" if latency_s <= task.deadline_s else "late",
    }
