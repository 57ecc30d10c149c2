"""A trace stretched, split in time, and cut into slots."""

import math
from collections import Counter, deque

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gmel.scenario.errors import InputError
from gmel.scenario.filling import fill_trace
from gmel.scenario.slots import SlotTable, slot_table
from gmel.scenario.trace import split_trace
from test_trace import at, plant, raw

# ---------------------------------------------------------------- stretching and splitting


times_lists = st.lists(st.floats(0, 1e4), min_size=2, max_size=60).map(sorted).filter(lambda t: t[-1] - t[0] > 1e-3)


@given(times_lists, st.floats(0.1, 2.0), st.floats(0.0, 1.0))
@settings(max_examples=50)
def test_stretching_gives_exactly_the_asked_load(times: list[float], load: float, sigma: float) -> None:
    scenario = plant(arrivals=f"load = {load}", tasks=f"noise_sigma = {sigma}")
    filled = fill_trace(raw(time_s=times), scenario)
    rate = (len(times) - 1) / filled.time_s[-1]
    assert filled.time_s[0] == 0
    assert rate * filled.work.mean() * math.exp(sigma**2 / 2) / 5.0 == pytest.approx(load, rel=1e-9)
    # Only the scale of time changes.
    relative = (np.asarray(times) - times[0]) / (times[-1] - times[0])
    np.testing.assert_allclose(filled.time_s / filled.time_s[-1], relative, atol=1e-9)
    assert any("time stretched by" in note for note in filled.notes)


def test_stretching_to_a_rate_and_keeping_its_own_time() -> None:
    requests = raw(time_s=[5.0, 6.0, 9.0, 15.0])
    assert fill_trace(requests, plant(arrivals="rate_per_s = 2.0")).time_s.tolist() == [0.0, 0.15, 0.6, 1.5]
    assert fill_trace(requests, plant()).time_s.tolist() == [0.0, 1.0, 4.0, 10.0]


@pytest.mark.parametrize("times", [[3.0], [3.0, 3.0]])
def test_a_trace_without_duration_cannot_be_stretched(times: list[float]) -> None:
    with pytest.raises(InputError, match="'time_s' has no duration"):
        fill_trace(raw(time_s=times), plant(arrivals="load = 0.7"))
    assert len(fill_trace(raw(time_s=times), plant())) == len(times)


@given(times_lists, st.floats(0.01, 0.99))
@settings(max_examples=50)
def test_splitting_loses_nothing(times: list[float], share: float) -> None:
    whole = at(times)
    train, test = split_trace(whole, share)
    assert train.time_s[0] == test.time_s[0] == 0
    for name in ("device", "model", "images", "steps", "bits_in", "bits_out", "deadline_s", "work"):
        joined = np.concatenate([getattr(train, name), getattr(test, name)])
        np.testing.assert_array_equal(joined, getattr(whole, name))
    cut = share * whole.time_s[-1]
    np.testing.assert_array_equal(train.time_s, whole.time_s[whole.time_s < cut])
    np.testing.assert_array_equal(test.time_s, whole.time_s[whole.time_s >= cut] - whole.time_s[len(train)])


def test_splitting_refuses_what_has_no_parts() -> None:
    with pytest.raises(InputError, match="longer"):
        split_trace(at([1.0, 1.0]), 0.5)
    with pytest.raises(InputError, match="train_share = 1"):
        split_trace(at([1.0, 2.0]), 1.0)


# ---------------------------------------------------------------- slots


def test_a_request_at_a_slot_start_is_decided_there() -> None:
    table = slot_table(at([0.0, 0.1, 0.3, 0.35, 0.7, 1.1]), 0.1)
    assert np.flatnonzero(table.present.any(axis=1)).tolist() == [0, 1, 3, 4, 7, 11]
    np.testing.assert_allclose(table.generated_s[[1, 3, 7, 11], 0], 0, atol=1e-12)
    assert table.generated_s[4, 0] == pytest.approx(-0.05)
    assert table.delayed == 0
    assert table.slot_s == 0.1


slot_times = st.lists(
    st.one_of(st.floats(0, 30), st.integers(0, 60).map(lambda half: half / 2)), min_size=1, max_size=80
).map(sorted)


def rows_of(table: SlotTable) -> np.ndarray:
    """Requests in order of slot and row."""
    return table.request[table.present]


@given(slot_times, st.sampled_from([0.1, 0.25, 1.0, 3.0]))
def test_slots_conserve_requests_and_their_order(times: list[float], slot_s: float) -> None:
    whole = at(times)
    table = slot_table(whole, slot_s)
    np.testing.assert_array_equal(rows_of(table), np.arange(len(times)))
    for name, column in (("size_bit", "bits_in"), *((n, n) for n in ("device", "model", "images", "steps"))):
        np.testing.assert_array_equal(getattr(table, name)[table.present], getattr(whole, column))
    for name in ("bits_out", "work", "deadline_s"):
        np.testing.assert_array_equal(getattr(table, name)[table.present], getattr(whole, name))
        assert not getattr(table, name)[~table.present].any()
    assert (table.request[~table.present] == -1).all()
    # Rows are filled from 0 on; the fullest slot decides the width.
    assert (table.present[:, 1:] <= table.present[:, :-1]).all()
    assert table.present.sum(axis=1).max() == table.present.shape[1]
    generated = table.generated_s[table.present]
    assert (generated <= 0).all()
    assert (generated > -slot_s).all()
    starts = np.nonzero(table.present)[0] * slot_s
    np.testing.assert_allclose(starts + generated, whole.time_s, rtol=0, atol=1e-8)
    assert table.delayed == 0


@given(slot_times, st.sampled_from([0.25, 1.0, 3.0]), st.integers(1, 5))
def test_the_surplus_waits_first_in_first_out(times: list[float], slot_s: float, capacity: int) -> None:
    whole = at(times)
    table = slot_table(whole, slot_s, capacity)
    assert table.present.shape[1] == capacity
    np.testing.assert_array_equal(rows_of(table), np.arange(len(times)))
    # The same by a queue, slot after slot.
    due = Counter(math.ceil(t / slot_s - 1e-9) for t in whole.time_s.tolist())
    waiting: deque[tuple[int, int]] = deque()
    expected: list[int] = []
    delayed = slot = number = 0
    while number < len(times) or waiting:
        waiting.extend((number + i, slot) for i in range(due.get(slot, 0)))
        number += due.get(slot, 0)
        for _ in range(min(capacity, len(waiting))):
            _, came = waiting.popleft()
            expected.append(slot)
            delayed += came < slot
        slot += 1
    slots = np.nonzero(table.present)[0]
    assert slots.tolist() == expected
    assert table.delayed == delayed
    assert table.present.shape[0] == expected[-1] + 1
    np.testing.assert_allclose(slots * slot_s + table.generated_s[table.present], whole.time_s, rtol=0, atol=1e-8)


def test_slot_tables_refuse_what_they_cannot_hold() -> None:
    with pytest.raises(InputError, match=r"slot.length_s = 0"):
        slot_table(at([0.0]), 0.0)
    with pytest.raises(InputError, match="max_per_slot = 0"):
        slot_table(at([0.0]), 1.0, 0)
    with pytest.raises(InputError, match="slots"):
        slot_table(at([0.0, 3e8]), 1e-9)
    with pytest.raises(InputError, match=r"slots x 4096 rows"):
        slot_table(at([0.0, 1e6]), 1.0, 4096)
