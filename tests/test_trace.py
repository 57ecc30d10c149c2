"""Traces: reading and refusing, filling, stretching, splitting, slots, writing, and the shipped data."""

import gzip
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gmel.scenario import columns, importers, trace
from gmel.scenario.errors import InputError
from gmel.scenario.filling import fill_trace
from gmel.scenario.importers import RawTrace
from gmel.scenario.load import parse_scenario
from gmel.scenario.schema import Scenario
from gmel.scenario.trace import (
    Trace,
    read_trace,
    shipped_traces,
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
    monkeypatch.setattr(columns, "MAX_REQUESTS", 3)
    rows = ["time_s", "0", "1", "2", "3"]
    assert len(read_trace(lines(tmp_path, *rows[:-1]))) == 3
    # Refused while reading, before all of it is held.
    monkeypatch.delattr(importers, "RawTrace")
    assert "more than 3 rows" in refusal(lines(tmp_path, *rows))
    pq.write_table(pa.table({"time_s": np.arange(4.0)}), tmp_path / "a.parquet")
    assert "more than 3 rows" in refusal(tmp_path / "a.parquet")


def test_too_long_is_refused_by_code_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(columns, "MAX_REQUESTS", 3)
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
