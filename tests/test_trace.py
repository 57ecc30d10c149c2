"""Traces: reading and refusing, filling, stretching, splitting, slots, writing, and the shipped data."""

import gzip
import math
from collections import Counter, deque
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gmel.scenario import importers, trace
from gmel.scenario.errors import InputError
from gmel.scenario.importers import RawTrace
from gmel.scenario.load import parse_scenario
from gmel.scenario.schema import Scenario
from gmel.scenario.trace import (
    Trace,
    fill_trace,
    read_trace,
    shipped_traces,
    slot_table,
    split_trace,
    write_trace,
)

CATALOGUE = """
[[models]]
name = "small"
popularity = 1.0
step_work = 0.1
fixed_work = 0.5
steps = { values = [4.0], weights = [1.0] }
images = { values = [1.0], weights = [1.0] }
memory_gb = 4.0
bits_in = { low = 1e5, high = 2e5 }
bits_out_per_image = 1e6
[[models]]
name = "large"
popularity = 6.0
step_work = 0.3
fixed_work = 1.0
steps = { values = [30.0, 40.0], weights = [0.9, 0.1] }
images = { values = [1.0, 4.0], weights = [0.7, 0.3] }
memory_gb = 10.0
bits_in = { low = 1e6, high = 2e6 }
bits_out_per_image = 8e6
[[models]]
name = "medium"
popularity = 3.0
step_work = 0.2
steps = { values = [20.0], weights = [1.0] }
images = { values = [2.0], weights = [1.0] }
memory_gb = 6.0
bits_in = { low = 1e6, high = 1e6 }
"""
UNIFORM = """
work = { low = 1.0, high = 4.0 }
bits_in = { low = 1e6, high = 8e6 }
bits_out = 5e5
"""


def plant(arrivals: str = "", tasks: str = "", devices: int = 8, kind: str = "catalogue") -> Scenario:
    """Eight devices and two servers of together 5 work units per second, fed by a trace."""
    return parse_scenario(
        f"""
        name = "plant"
        [devices]
        count = {devices}
        speed = 0.5
        [[servers]]
        name = "A"
        speed = 1.0
        gpus = 2
        [[servers]]
        name = "B"
        speed = 3.0
        [arrivals]
        kind = "trace"
        trace = "azure-code-2023"
        {arrivals}
        [tasks]
        kind = "{kind}"
        deadline_s = {{ low = 10.0, high = 60.0 }}
        {UNIFORM if kind == "uniform" else ""}
        {tasks}
        {CATALOGUE if kind == "catalogue" else ""}
        """,
        "plant",
    )


def raw(**columns: object) -> RawTrace:
    return RawTrace({name: np.asarray(values) for name, values in columns.items()}, "mine")


def at(times: list[float]) -> Trace:
    return fill_trace(raw(time_s=times), plant())


def lines(folder: Path, *rows: str, name: str = "my.csv") -> Path:
    path = folder / name
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return path


def refusal(path: Path | str) -> str:
    with pytest.raises(InputError) as caught:
        read_trace(path)
    message = str(caught.value)
    assert "\n" not in message
    return message


# ---------------------------------------------------------------- reading


COMPLETE = (
    "time_s,device,model,images,steps,bits_in,bits_out,deadline_s",
    "100.5,0,large,1,30,1e6,8e6,20",
    "101.25,7,small,4,4,2e5,4e6,30.5",
)


def check_complete(read: RawTrace) -> None:
    assert read.columns["time_s"].tolist() == [100.5, 101.25]
    assert read.columns["device"].tolist() == [0, 7]
    assert read.columns["model"].tolist() == ["large", "small"]
    assert read.columns["images"].tolist() == [1, 4]
    assert read.columns["bits_in"].tolist() == [1e6, 2e5]
    assert read.columns["deadline_s"].tolist() == [20.0, 30.5]


def test_a_complete_trace_is_taken_as_it_is(tmp_path: Path) -> None:
    read = read_trace(lines(tmp_path, *COMPLETE))
    check_complete(read)
    filled = fill_trace(read, plant())
    assert filled.filled == ()
    assert filled.time_s.tolist() == [0.0, 0.75]
    assert filled.device.tolist() == [0, 7]
    assert filled.model.tolist() == [1, 0]
    # Work follows from model, images and steps: 1 x (1 + 30 x 0.3), 4 x (0.5 + 4 x 0.1).
    np.testing.assert_allclose(filled.work, [10.0, 3.6])


def test_gzip_byte_order_mark_windows_lines_and_spaces_are_read(tmp_path: Path) -> None:
    text = "\ufeff" + "\r\n".join([COMPLETE[0].replace(",", " , "), *COMPLETE[1:]]) + "\r\n"
    path = tmp_path / "my.csv.gz"
    path.write_bytes(gzip.compress(text.encode()))
    check_complete(read_trace(path))


def test_spaces_around_cells_do_no_harm(tmp_path: Path) -> None:
    read = read_trace(lines(tmp_path, "time_s, device, model", " 1 , 7 , large ", "2,8,small"))
    assert read.columns["time_s"].tolist() == [1.0, 2.0]
    assert read.columns["device"].tolist() == [7, 8]
    assert read.columns["model"].tolist() == ["large", "small"]


def test_control_characters_of_a_file_reach_no_terminal(tmp_path: Path) -> None:
    assert "\x1b" not in refusal(lines(tmp_path, "time,\x1b[31mred", "0,1"))
    assert "\x1b" not in refusal(lines(tmp_path, "time_s,steps", "0,\x1b[31m"))
    read = read_trace(lines(tmp_path, "time_s,\x1b[31mred,model", "0,1,\x1b[31m"))
    assert "\x1b" not in "".join(fill_trace(read, plant()).notes)


def test_unknown_columns_are_listed(tmp_path: Path) -> None:
    read = read_trace(lines(tmp_path, "time_s,prompt,colour", "0,a,red"))
    assert list(read.columns) == ["time_s"]
    assert any("prompt, colour" in note for note in read.notes)


@pytest.mark.parametrize(
    ("header", "near"),
    [("deadline", "deadline_s"), ("image", "images"), ("Device", "device"), ("bits_on", "bits_in"), ("step", "steps")],
)
def test_misspelt_columns_are_refused(tmp_path: Path, header: str, near: str) -> None:
    message = refusal(lines(tmp_path, f"time_s,{header}", "0,1"))
    assert repr(header) in message
    assert repr(near) in message


def test_a_column_like_one_that_is_there_is_no_misspelling(tmp_path: Path) -> None:
    read = read_trace(lines(tmp_path, "time_s,device,device_id", "0,1,2"))
    assert read.columns["device"].tolist() == [1]


def test_missing_time_names_the_columns_and_the_nearest(tmp_path: Path) -> None:
    message = refusal(lines(tmp_path, "time,steps", "0,3"))
    assert "'time_s'" in message
    assert "found: time, steps" in message
    assert "did you mean 'time'" in message


@pytest.mark.parametrize(
    ("column", "cell"),
    [
        ("time_s", "soon"),
        ("time_s", "nan"),
        ("time_s", "inf"),
        ("time_s", "-1"),
        ("images", "0"),
        ("images", "1.5"),
        ("images", ""),
        ("steps", "-3"),
        ("steps", "many"),
        ("steps", "1e9"),
        ("bits_in", "-1"),
        ("bits_in", "nan"),
        ("bits_out", "inf"),
        ("deadline_s", "0"),
        ("deadline_s", "-inf"),
        ("group", "-1"),
        ("work", "0"),
        ("device", "-2"),
        ("device", ""),
        ("model", ""),
    ],
)
def test_a_bad_cell_is_named(tmp_path: Path, column: str, cell: str) -> None:
    good = {"time_s": "1", "images": "1", "steps": "3", "bits_in": "5", "device": "1"}
    good |= {"bits_out": "5", "deadline_s": "5", "group": "0", "work": "1", "model": "small"}
    bad = good | {column: cell}
    path = lines(tmp_path, ",".join(good), ",".join(good.values()), ",".join(bad.values()))
    message = refusal(path)
    assert f"column {column!r}, data row 2" in message
    if cell:
        assert cell.strip("-") in message or str(float(cell)) in message or f"{float(cell):.12g}" in message


def test_falling_times_name_the_first_row(tmp_path: Path) -> None:
    message = refusal(lines(tmp_path, "time_s", "0", "2", "1.5", "1"))
    assert "'time_s', data row 3" in message
    assert "sort the file by time_s" in message


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.csv", b"", "cannot be read"),
        ("a.csv", b"time_s\n", "no rows"),
        ("a.csv", b"time_s,steps\n1,2\n1\n", "cannot be read"),
        ("a.csv", b"time_s,time_s\n1,2\n", "occurs twice"),
        ("a.csv", b"time_s;steps\n1;2\n", "separate the cells by commas"),
        ("a.csv", b"time_s,device\n1,\xff\xfe\n", "cannot be read"),
        ("a.csv.gz", b"time_s\n1\n", "cannot be read"),
        ("a.csv.gz", gzip.compress(b"time_s\n1\n" * 500, mtime=0)[:-20], "cannot be read"),
        ("a.parquet", b"PAR1 not really PAR1", "cannot be read"),
        ("a.parquet", b"", "cannot be read"),
        ("a.pickle", b"\x80\x04.", ".parquet"),
    ],
)
def test_unreadable_files_are_refused(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    message = refusal(path)
    assert said in message
    assert name in message


def test_parquet_cut_short_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"time_s": np.arange(1000.0)}), path)
    content = bytearray(path.read_bytes())
    path.write_bytes(bytes(content[: len(content) // 2]))
    assert "cannot be read" in refusal(path)
    content[4:200] = bytes(196)  # the footer is whole, the pages are not
    path.write_bytes(bytes(content))
    assert "cannot be read" in refusal(path)


@pytest.mark.parametrize(
    ("column", "values"),
    [
        ("time_s", pa.array([1.0, None])),
        ("time_s", pa.array([[1.0], [2.0]])),
        ("time_s", pa.array([0, 1], type=pa.timestamp("s"))),
        ("steps", pa.array([True, False])),
        ("device", pa.array([0.5, 1.5])),
        ("model", pa.array(["a", None])),
    ],
)
def test_parquet_of_wrong_types_is_refused(tmp_path: Path, column: str, values: pa.Array) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"time_s": pa.array([0.0, 1.0])} | {column: values}), path)
    assert repr(column) in refusal(path)


def test_too_long_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importers, "MAX_REQUESTS", 3)
    rows = ["time_s", "0", "1", "2", "3"]
    assert len(read_trace(lines(tmp_path, *rows[:-1]))) == 3
    # Refused while reading, before all of it is held.
    monkeypatch.delattr(importers, "RawTrace")
    assert "more than 3 rows" in refusal(lines(tmp_path, *rows))
    pq.write_table(pa.table({"time_s": np.arange(4.0)}), tmp_path / "a.parquet")
    assert "more than 3 rows" in refusal(tmp_path / "a.parquet")


def test_too_long_is_refused_by_code_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importers, "MAX_REQUESTS", 3)
    with pytest.raises(InputError, match="more than 3 rows"):
        raw(time_s=np.arange(4.0))


def test_labels_with_line_breaks_are_read_in_long_files_too(tmp_path: Path) -> None:
    n, label = 40_000, "a" + "\n" * 40 + "b"  # over a megabyte, read in blocks that end anywhere
    write_trace({"time_s": np.arange(n), "device": np.full(n, label, dtype=object)}, tmp_path / "a.csv")
    assert set(read_trace(tmp_path / "a.csv").columns["device"]) == {label}


def test_milliseconds_taken_for_seconds_are_refused(tmp_path: Path) -> None:
    message = refusal(lines(tmp_path, "time_s", "0", "4e11"))
    assert "'time_s' spans 4e+11 s" in message


def test_unknown_names_are_refused_with_the_nearest() -> None:
    message = refusal("azure-code-2024")
    assert "did you mean 'azure-code-2023'" in message
    for name in ("", "x" * 5000, "a\0b", "/"):
        assert "no shipped trace" in refusal(name)


# ---------------------------------------------------------------- filling


def test_filling_is_the_same_for_a_seed_and_another_for_another() -> None:
    requests, scenario = raw(time_s=np.arange(500.0)), plant()
    one, two, other = (fill_trace(requests, scenario, seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(one.model, two.model)
    np.testing.assert_array_equal(one.deadline_s, two.deadline_s)
    assert not np.array_equal(one.model, other.model)
    assert set(one.filled) == {"device", "model", "images", "steps", "bits_in", "bits_out", "deadline_s"}
    assert any("filled from scenario 'plant': device, model" in note for note in one.notes)
    with pytest.raises(InputError, match="seed = -1"):
        fill_trace(requests, scenario, -1)


def test_giving_a_column_leaves_the_others_as_they_were() -> None:
    times, scenario = np.arange(300.0), plant(tasks="repeat_model = 0.5")
    free = fill_trace(raw(time_s=times), scenario)
    given_model = fill_trace(raw(time_s=times, model=free.model), scenario)
    given_deadline = fill_trace(raw(time_s=times, deadline_s=np.full(300, 7.0)), scenario)
    for name in ("device", "model", "images", "steps", "bits_in", "bits_out", "deadline_s", "work"):
        np.testing.assert_array_equal(getattr(given_model, name), getattr(free, name))
        if name != "deadline_s":
            np.testing.assert_array_equal(getattr(given_deadline, name), getattr(free, name))
    assert "model" not in given_model.filled
    assert given_deadline.deadline_s.tolist() == [7.0] * 300


def test_filled_columns_follow_the_laws_of_the_scenario() -> None:
    n = 40_000
    filled = fill_trace(raw(time_s=np.arange(n)), plant(arrivals="device_skew = 1.0"))
    shares = np.bincount(filled.model, minlength=3) / n
    np.testing.assert_allclose(shares, [0.1, 0.6, 0.3], atol=0.01)
    weights = 1 / np.arange(1, 9)
    np.testing.assert_allclose(np.bincount(filled.device) / n, weights / weights.sum(), atol=0.01)
    large = filled.model == 1
    assert np.mean(filled.steps[large] == 40) == pytest.approx(0.1, abs=0.01)
    assert np.mean(filled.images[large] == 4) == pytest.approx(0.3, abs=0.015)
    assert set(filled.steps[filled.model == 0]) == {4}
    assert 1e6 <= filled.bits_in[large].min() < 1.01e6
    assert 1.99e6 < filled.bits_in[large].max() <= 2e6
    np.testing.assert_array_equal(filled.bits_out[large], filled.images[large] * 8e6)
    np.testing.assert_allclose(filled.work[large], filled.images[large] * (1 + 0.3 * filled.steps[large]))
    assert filled.deadline_s.mean() == pytest.approx(35.0, abs=0.3)
    # One stream each: what is drawn for one column says nothing of another.
    assert abs(np.corrcoef(filled.deadline_s[large], filled.bits_in[large])[0, 1]) < 0.03


def test_models_repeat_with_the_asked_probability() -> None:
    n, repeat = 40_000, 0.6
    filled = fill_trace(raw(time_s=np.arange(n)), plant(tasks=f"repeat_model = {repeat}"))
    same = np.mean(filled.model[1:] == filled.model[:-1])
    assert same == pytest.approx(repeat + (1 - repeat) * (0.1**2 + 0.6**2 + 0.3**2), abs=0.015)
    np.testing.assert_allclose(np.bincount(filled.model) / n, [0.1, 0.6, 0.3], atol=0.02)


def test_models_repeat_per_device_where_the_trace_names_devices() -> None:
    n = 400
    filled = fill_trace(raw(time_s=np.arange(n), device=np.arange(n) % 4), plant(tasks="repeat_model = 1.0"))
    kept = [set(filled.model[filled.device == device].tolist()) for device in range(4)]
    assert all(len(models) == 1 for models in kept)
    # One chain for all would give one model in all; four first requests seldom agree, and with seed 0 do not.
    assert len(set.union(*kept)) > 1


def test_uniform_tasks_draw_work_and_size() -> None:
    filled = fill_trace(raw(time_s=np.arange(4000.0), model=["x"] * 4000), plant(kind="uniform"))
    assert filled.work.mean() == pytest.approx(2.5, abs=0.05)
    assert 1.0 <= filled.work.min() <= filled.work.max() <= 4.0
    assert filled.bits_in.mean() == pytest.approx(4.5e6, rel=0.02)
    assert set(filled.bits_out) == {5e5}
    assert set(filled.model) == {0}
    assert "work" in filled.filled
    assert any("without effect: model" in note for note in filled.notes)


def test_device_labels_are_numbered_in_order_of_appearance() -> None:
    filled = fill_trace(raw(time_s=np.arange(4.0), device=["cam", "agv", "cam", "arm"]), plant())
    assert filled.device.tolist() == [0, 1, 0, 2]


def test_too_many_devices_are_folded_and_said() -> None:
    filled = fill_trace(raw(time_s=np.arange(20.0), device=[f"d{i}" for i in range(20)]), plant())
    assert filled.device.tolist() == [i % 8 for i in range(20)]
    assert any("20 devices of the trace folded onto 8" in note for note in filled.notes)


def test_large_device_numbers_are_labels() -> None:
    filled = fill_trace(raw(time_s=np.arange(3.0), device=[900, 5, 900]), plant())
    assert filled.device.tolist() == [0, 1, 0]
    assert any("numbered anew" in note for note in filled.notes)


def test_model_labels_are_matched_by_popularity() -> None:
    labels = ["rare", "often", "often", "some", "often", "some"]
    filled = fill_trace(raw(time_s=np.arange(6.0), model=labels), plant())
    assert filled.model.tolist() == [0, 1, 1, 2, 1, 2]  # popularity: large (1), medium (2), small (0)
    assert any("often -> large" in note for note in filled.notes)


def test_catalogue_names_stay_and_unknown_labels_take_what_is_left() -> None:
    filled = fill_trace(raw(time_s=np.arange(4.0), model=["large", "x", "x", "y"]), plant())
    assert filled.model.tolist() == [1, 2, 2, 0]


def test_more_model_labels_than_entries_are_folded() -> None:
    labels = [label for rank in range(5) for label in [f"m{rank}"] * (5 - rank)]
    filled = fill_trace(raw(time_s=np.arange(15.0), model=labels), plant())
    by_label = dict(zip(labels, filled.model.tolist(), strict=True))
    assert [by_label[f"m{rank}"] for rank in range(5)] == [1, 2, 0, 1, 2]


def test_groups_have_devices_in_proportion_to_their_requests() -> None:
    group = np.repeat([3, 5], [300, 100])
    filled = fill_trace(raw(time_s=np.arange(400.0), group=group), plant())
    assert set(filled.device[group == 3]) == set(range(6))
    assert set(filled.device[group == 5]) == {6, 7}
    assert any("group 3: 6, group 5: 2" in note for note in filled.notes)


@given(
    st.lists(st.integers(1, 10_000), min_size=1, max_size=12),
    st.integers(0, 100),
)
def test_every_group_has_a_device_and_none_is_left_over(requests: list[int], more: int) -> None:
    count = len(requests) + more
    sizes = trace._proportional(np.asarray(requests), count)
    assert sizes.sum() == count
    assert sizes.min() >= 1
    exact = count * np.asarray(requests) / sum(requests)
    if exact.min() >= 1:
        assert np.abs(sizes - exact).max() < 1


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


def rows_of(table: trace.SlotTable) -> np.ndarray:
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


# ---------------------------------------------------------------- writing


@pytest.mark.parametrize("name", ["my.csv", "my.csv.gz", "my.parquet"])
@pytest.mark.parametrize("kind", ["catalogue", "uniform"])
def test_a_written_trace_reads_back_equal(tmp_path: Path, name: str, kind: str) -> None:
    scenario = plant(kind=kind, arrivals="load = 0.6")
    whole = fill_trace(read_trace("azure-code-2023"), scenario, seed=3)
    whole = split_trace(whole, 0.05)[0]
    write_trace(whole, tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    back = fill_trace(read_trace(tmp_path / name), plant(kind=kind), seed=4)
    for column in ("time_s", "device", "images", "steps", "bits_in", "bits_out", "deadline_s", "work", "model"):
        np.testing.assert_array_equal(getattr(back, column), getattr(whole, column))


def test_labels_and_attribution_survive_parquet(tmp_path: Path) -> None:
    given_raw = replace(raw(time_s=[0.0, 1.0], device=["a,b", 'c"d'], model=["x\ny", "z"]), attribution="by Ann")
    for name in ("my.parquet", "my.csv"):
        write_trace(given_raw, tmp_path / name)
        back = read_trace(tmp_path / name)
        assert back.columns["device"].tolist() == ["a,b", 'c"d']
        assert back.columns["model"].tolist() == ["x\ny", "z"]
    assert read_trace(tmp_path / "my.parquet").attribution == "by Ann"


def test_a_reader_of_the_old_file_is_not_disturbed(tmp_path: Path) -> None:
    old = lines(tmp_path, *COMPLETE)
    with old.open(encoding="utf-8") as reader:
        write_trace({"time_s": [0.0]}, old)
        assert reader.read().splitlines() == list(COMPLETE)
    assert list(read_trace(old).columns) == ["time_s"]


def test_writing_that_breaks_off_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: object, part: Path) -> None:
        part.write_text("time_s\n0", encoding="utf-8")
        raise OSError(28, "No space left on device")

    old = lines(tmp_path, *COMPLETE)
    monkeypatch.setattr(trace, "_write_csv", full)
    with pytest.raises(InputError, match="No space left"):
        write_trace({"time_s": [0.0]}, old)
    assert list(tmp_path.iterdir()) == [old]
    check_complete(read_trace(old))


def test_writing_refuses_and_leaves_nothing_behind(tmp_path: Path) -> None:
    old = lines(tmp_path, *COMPLETE)
    with pytest.raises(InputError, match=r"suffix '\.txt'"):
        write_trace({"time_s": [0.0]}, tmp_path / "a.txt")
    with pytest.raises(InputError, match="'time_s', data row 2"):
        write_trace({"time_s": [1.0, 0.0]}, old)
    with pytest.raises(InputError, match="cannot be written"):
        write_trace({"time_s": [0.0]}, tmp_path / "absent" / "a.csv")
    assert list(tmp_path.iterdir()) == [old]
    check_complete(read_trace(old))


# ---------------------------------------------------------------- what is shipped


@pytest.mark.parametrize(
    ("name", "requests", "seconds", "variation"),
    [
        ("azure-code-2023", 8_819, 3_436, 13.2),
        ("azure-conversation-2023", 19_366, 3_502, 1.09),
    ],
)
def test_shipped_traces_have_their_published_statistics(
    name: str, requests: int, seconds: float, variation: float
) -> None:
    read = read_trace(name)
    gaps = np.diff(read.columns["time_s"])
    assert len(read) == requests
    assert read.columns["time_s"][-1] == pytest.approx(seconds, abs=0.5)
    assert gaps.std() / gaps.mean() == pytest.approx(variation, rel=0.005)
    assert "CC-BY 4.0" in read.attribution
    assert "Splitwise" in read.attribution


def test_the_mix_is_both_traces_over_their_common_duration() -> None:
    mix = read_trace("azure-mix-2023").columns
    code, conversation = (read_trace(f"azure-{name}-2023").columns["time_s"] for name in ("code", "conversation"))
    np.testing.assert_array_equal(mix["time_s"][mix["group"] == 1], code)
    np.testing.assert_array_equal(mix["time_s"][mix["group"] == 0], conversation[conversation <= code[-1]])
    filled = fill_trace(read_trace("azure-mix-2023"), plant(devices=20))
    share = np.mean(mix["group"] == 1)
    assert set(filled.device[mix["group"] == 1]) == set(range(20 - round(20 * share), 20))


def test_every_shipped_trace_can_be_read_and_is_small() -> None:
    assert shipped_traces() == ["azure-code-2023", "azure-conversation-2023", "azure-mix-2023"]
    folder = Path(trace.__file__).parent / "traces"
    for path in folder.glob("*.parquet"):
        assert path.stat().st_size < 150_000
    text = (folder / "README.md").read_text(encoding="utf-8")
    for needed in ("CC-BY 4.0", "b469a113cedca53ddc3bdea71a143dc4b7d8700c", "Splitwise", "What was changed"):
        assert needed in text
    for name in shipped_traces():
        assert name in text
        assert len(read_trace(name)) > 1000
