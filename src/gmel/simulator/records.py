"""One record per task, on the host, in absolute time."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from gmel.simulator.state import Outcome

__all__ = ["DONE", "DROPPED", "LATE", "Records", "task_records"]

DONE, LATE, DROPPED = "done", "late", "dropped"

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]


@dataclass(frozen=True)
class Records:
    """Tasks whose fate is known, in order of decision; every field has one entry per task.

    Times are seconds since the start of the episode (float64). `option` 0 is the device itself, j server j - 1. The six
    parts of the latency add up to `latency_s`, which counts from generation; a dropped task counts its deadline. Times
    of a task that was split are those of the part that ended last.
    """

    generated_s: Floats
    decided_s: Floats
    decided_slot: Integers
    device: Integers
    option: Integers
    model: Integers
    upload_start_s: Floats
    upload_end_s: Floats
    start_s: Floats
    end_s: Floats
    deadline_s: Floats
    dropped: NDArray[np.bool_]
    wait_to_slot_s: Floats
    upload_s: Floats
    queue_s: Floats
    switch_s: Floats
    service_s: Floats
    download_s: Floats
    energy_j: Floats
    quality: Floats
    """Of the result; not a number where it is not modelled."""
    parts: Integers | None = None
    """Over how many servers the task was split; None where tasks cannot be."""

    def __len__(self) -> int:
        return len(self.generated_s)

    @property
    def latency_s(self) -> Floats:
        """Time from generation to the result."""
        before_s = self.wait_to_slot_s + self.upload_s + self.queue_s
        return before_s + self.switch_s + self.service_s + self.download_s

    @property
    def in_time(self) -> NDArray[np.bool_]:
        """Done by the deadline. The tolerance is that of float32 sums: a task on the deadline is in time."""
        return ~self.dropped & (self.latency_s <= self.deadline_s * (1 + 1e-6))

    @property
    def status(self) -> NDArray[Any]:
        """`done`, `late` or `dropped`."""
        return np.where(self.dropped, DROPPED, np.where(self.in_time, DONE, LATE))

    def where(self, chosen: NDArray[np.bool_]) -> "Records":
        """The chosen tasks."""
        return Records(**{name: column[chosen] for name, column in self._columns().items()})

    def table(self, more: Mapping[str, NDArray[np.generic]] | None = None) -> Any:
        """As an Arrow table with the derived columns, for Parquet files."""
        columns = self._columns()
        columns |= {"latency_s": self.latency_s, "status": self.status, **(more or {})}
        return pa.table(columns)

    def _columns(self) -> dict[str, NDArray[Any]]:
        columns = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: column for name, column in columns.items() if column is not None}


def task_records(outcome: Outcome, slot_s: float) -> Records:
    """Records of one episode from the outcomes of its slots (leading axis: slots, starting with slot 0)."""
    final = np.asarray(outcome.final)
    slots = np.broadcast_to(np.arange(final.shape[0])[:, None], final.shape)[final]
    base_s = slots * float(slot_s)
    decided_slot = np.asarray(outcome.decided_slot)[final].astype(np.int64)
    order = np.lexsort((np.asarray(outcome.row)[final], decided_slot))

    def number(field: object) -> Floats:
        return np.asarray(field)[final].astype(np.float64)[order]

    def integer(field: object) -> Integers:
        return np.asarray(field)[final].astype(np.int64)[order]

    def time(field: object) -> Floats:
        return base_s[order] + number(field)

    account = outcome.account
    return Records(
        generated_s=time(outcome.generated_s),
        decided_s=time(outcome.decided_s),
        decided_slot=decided_slot[order],
        device=integer(outcome.device),
        option=integer(outcome.option),
        model=integer(outcome.model),
        upload_start_s=time(outcome.upload_start_s),
        upload_end_s=time(outcome.upload_end_s),
        start_s=time(outcome.start_s),
        end_s=time(outcome.end_s),
        deadline_s=number(outcome.deadline_s),
        dropped=np.asarray(outcome.dropped)[final][order],
        wait_to_slot_s=number(account.wait_to_slot_s),
        upload_s=number(account.upload_s),
        queue_s=number(account.queue_s),
        switch_s=number(account.switch_s),
        service_s=number(account.service_s),
        download_s=number(account.download_s),
        energy_j=number(account.energy_j),
        quality=number(np.full(final.shape, np.nan) if outcome.quality is None else outcome.quality),
        parts=None if outcome.parts is None else integer(outcome.parts),
    )
