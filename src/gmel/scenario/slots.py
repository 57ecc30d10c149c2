"""Requests of a trace laid out in the slots in which they are decided."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from gmel.scenario.errors import InputError
from gmel.scenario.trace import Floats, Indices, Ints, Trace

__all__ = ["MAX_CELLS", "SlotTable", "slot_table"]

MAX_CELLS = 2**24
"""Most cells (slots x rows) of a slot table: about 1 GB."""

# How far after a slot start, in slots, a request still counts as at it: times carry rounding of the decimal
# fraction and of the stretching.
_AT_START = 1e-9


@dataclass(frozen=True, eq=False)
class SlotTable:
    """Requests by the slot in which they are decided: arrays [T slots, R rows], zero where `present` is false.

    The rows of a slot are filled from 0 on, in order of generation; several rows of a slot may be of one device.

    Attributes:
        present: whether the row holds a request.
        request: number of the request in the trace; -1 where absent.
        device, model, images, steps: as in :class:`Trace`.
        generated_s: when the request was generated, relative to the slot start at which it is decided; <= 0.
        size_bit: upload in bits.
        bits_out: result in bits.
        work: nominal work in work units.
        deadline_s: seconds allowed.
        slot_s: slot length in seconds.
        delayed: requests decided in a later slot than the first at or after their generation, for want of rows.
    """

    present: npt.NDArray[np.bool_]
    request: Indices
    device: Indices
    model: Indices
    images: Indices
    steps: Indices
    generated_s: Floats
    size_bit: Floats
    bits_out: Floats
    work: Floats
    deadline_s: Floats
    slot_s: float
    delayed: int


def slot_table(trace: Trace, slot_s: float, capacity: int | None = None) -> SlotTable:
    """Lays requests out in slots: each is decided at the first slot start at or after its generation.

    Slot k starts at k x `slot_s`. With fewer rows than requests, the surplus waits for the next slots, first in, first
    out: with C rows, request i is decided in slot s_i = max(k_i, s_{i-C} + 1), which is Lindley's recursion
    on each of the C interleaved chains.

    Args:
        trace: the trace.
        slot_s: slot length in seconds, > 0.
        capacity: rows of a slot; by default as many as the fullest slot needs.

    Raises:
        InputError: `slot_s` or `capacity` out of range, or more than :data:`MAX_CELLS` cells.
    """
    if not (math.isfinite(slot_s) and slot_s > 0):
        raise InputError(f"slot.length_s = {slot_s:g}: must be a number of seconds > 0")
    if capacity is not None and capacity < 1:
        raise InputError(f"arrivals.max_per_slot = {capacity}: must be a whole number >= 1")
    exact = np.ceil(trace.time_s / slot_s - _AT_START)
    if exact[-1] >= MAX_CELLS:
        raise InputError(_too_large(f"{exact[-1] + 1:.3g} slots", slot_s))
    due = np.maximum(exact, 0).astype(np.int64)
    slot = due if capacity is None else _first_in_first_out(due, capacity)
    place = np.arange(len(slot)) - np.searchsorted(slot, slot, side="left")
    slots, rows = int(slot[-1]) + 1, int(place.max()) + 1 if capacity is None else capacity
    if slots * rows > MAX_CELLS:
        raise InputError(_too_large(f"{slots} slots x {rows} rows", slot_s))
    cell = slot * rows + place

    def laid(values: npt.NDArray[Any], absent: int = 0) -> npt.NDArray[Any]:
        table = np.full(slots * rows, absent, dtype=values.dtype)
        table[cell] = values
        return table.reshape(slots, rows)

    return SlotTable(
        present=laid(np.ones(len(trace), dtype=np.bool_)),
        request=laid(np.arange(len(trace), dtype=np.int32), absent=-1),
        device=laid(trace.device),
        model=laid(trace.model),
        images=laid(trace.images),
        steps=laid(trace.steps),
        generated_s=laid(np.minimum(trace.time_s - slot * slot_s, 0.0)),
        size_bit=laid(trace.bits_in),
        bits_out=laid(trace.bits_out),
        work=laid(trace.work),
        deadline_s=laid(trace.deadline_s),
        slot_s=float(slot_s),
        delayed=int(np.count_nonzero(slot > due)),
    )


def _first_in_first_out(due: Ints, capacity: int) -> Ints:
    """Slots of requests due in slots `due` (rising), at most `capacity` in each."""
    rounds = -(-len(due) // capacity)
    chains = np.pad(due, (0, rounds * capacity - len(due)), mode="edge").reshape(rounds, capacity)
    step = np.arange(rounds)[:, None]
    return (np.maximum.accumulate(chains - step, axis=0) + step).reshape(-1)[: len(due)]


def _too_large(size: str, slot_s: float) -> str:
    return (
        f"trace in slots of slot.length_s = {slot_s:g} s needs {size}, more than {MAX_CELLS:,} cells in all; "
        "use longer slots, a smaller arrivals.max_per_slot, or a shorter trace"
    )
