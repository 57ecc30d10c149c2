"""What a gateway asks of whatever runs the tasks."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from gmel.edge.fleet import Beat, ServerState
from gmel.edge.task import Task

__all__ = ["Answer", "Engine", "LostError", "RefusedError", "SilentError", "Told", "read_answer"]

_MOST_TOGETHER = 2**20
_KIND = re.compile(r"[A-Za-z0-9.+-]{1,40}/[A-Za-z0-9.+-]{1,40}")

Told = Callable[[str, dict[str, Any]], None]
"""Is told what happens to a task at the server: `queued`, `loading`, `running`, `progress`, with facts."""


class LostError(Exception):
    """The server broke off, cannot be reached, or fell silent: the task has to run elsewhere."""


class SilentError(LostError):
    """Nothing was heard for too long, or no end came: the server may be alive."""


class RefusedError(Exception):
    """The server is well, but does not take this task now (full, draining, or without the model)."""


@dataclass(frozen=True)
class Answer:
    """How a task ended at a server.

    Attributes:
        data: the result; none where it failed.
        error: why it failed.
        kind: media type of the result.
        wait_s: seconds in the queue of the server.
        switch_s: seconds until its model was in memory.
        service_s: seconds of work.
        together: photos that this work has made, those of tasks that were drawn with it among them; 0 where it does
            not say.
    """

    data: bytes | None
    error: str | None = None
    kind: str = "application/octet-stream"
    wait_s: float = 0.0
    switch_s: float = 0.0
    service_s: float = 0.0
    together: int = 0

    def own_s(self, task: Task) -> float:
        """Its share of the work, in seconds: by photos."""
        return self.service_s * task.images / max(self.together, task.images)


def read_answer(said: Mapping[str, Any], data: bytes | None) -> Answer:
    """An answer from what a server says of it; `data` is None where the task failed.

    Raises:
        ValueError: times that are no times, or photos that are no number. They would stay in the record of the task
            for ever.
    """
    times = [said.get(name, 0.0) for name in ("wait_s", "switch_s", "service_s")]
    for time_s in times:
        if isinstance(time_s, bool) or not isinstance(time_s, int | float) or not -1e9 <= time_s <= 1e9:
            raise ValueError("times must be numbers of seconds")
    together = said.get("together", 0)
    if isinstance(together, float) and together.is_integer():  # JSON does not tell 4 from 4.0
        together = int(together)
    if isinstance(together, bool) or not isinstance(together, int) or not 0 <= together <= _MOST_TOGETHER:
        raise ValueError("together must be a number of photos")
    wait_s, switch_s, service_s = (max(float(time_s), 0.0) for time_s in times)
    kind = str(said.get("kind", ""))
    if not _KIND.fullmatch(kind):  # it becomes a header
        kind = "application/octet-stream"
    error = (str(said.get("error") or "") or "failed")[:500] if data is None else None
    return Answer(data, error, kind, wait_s, switch_s, service_s, together)


class Engine(Protocol):
    """Runs tasks at servers. Every call ends within a time of its own, whatever the server does."""

    async def submit(self, server: ServerState, task: Task, attempt: int, told: Told) -> Answer:
        """Runs a task to its end. Sending the same id to the same server again does not run it twice.

        Raises:
            LostError: nothing will come any more.
            RefusedError: it was not taken.
        """
        ...

    async def cancel(self, server: ServerState, task_id: str) -> None:
        """Tells a server that nobody wants a task any more; that it hears it is not certain."""
        ...

    async def heartbeat(self, server: ServerState) -> Beat | None:
        """What a server says of itself, for engines whose servers do not say it on their own; None for nothing."""
        ...

    @property
    def servers(self) -> Sequence[str]:
        """Servers that this engine has to ask for their heartbeats; none where they say it on their own."""
        ...

    async def close(self) -> None:
        """Ends all connections."""
        ...
