"""`gmel live` from its first line to its last, on loopback, and what devices need."""

import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import httpx
import numpy as np
import pytest
from tests.reporters import Silent

from gmel.edge.live import LiveOptions, _planned, _requests, run_live
from gmel.edge.load import tasks_of_trace, trace_of_scenario
from gmel.edge.records import read_records
from gmel.edge.store import FolderStore
from gmel.edge.task import Task
from gmel.scenario.errors import InputError
from gmel.scenario.load import load_scenario


def command(*words: str, folder: Path) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", "gmel.cli.main", *words],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "HOME": str(folder)},
    )


def test_a_plant_that_really_generates(tmp_path: Path) -> None:
    done = command("live", "--seconds", "4", "--port", "0", "--out", "run", "--json", folder=tmp_path)
    out, errors = done.communicate(timeout=150)
    assert done.returncode == 0, errors
    summary = json.loads(out)
    assert summary["ended"] == {"done": summary["tasks"]}
    assert summary["tasks"] > 0
    assert summary["lost"] == 0
    assert "dashboard at http://127.0.0.1:" in errors
    records = read_records(tmp_path / "run" / "records.parquet")
    assert len(records["id"]) == summary["tasks"]
    parts = sum(records[f"{name}_s"] for name in ("wait_to_slot", "upload", "queue", "switch", "service", "download"))
    assert parts == pytest.approx(records["latency_s"], abs=1e-6)
    assert summary["images"] == records["images"].sum()
    # Servers are as slow as the plant says, so that its load is the load on any machine.
    speed = {server.name: server.speed for server in load_scenario("live").servers}
    least_s = [0.06 * images / speed[name] for images, name in zip(records["images"], records["server"], strict=True)]
    assert (records["service_s"] > 0.99 * np.asarray(least_s)).all()
    # The results are in the store, under what they hold, and hold photos.
    store = FolderStore(tmp_path / "run" / "gateway" / "results")
    names = [path.name for path in store.folder.glob("*/*")]
    data = store.get(names[0])
    assert data is not None
    (tmp_path / "result.zip").write_bytes(data)
    with zipfile.ZipFile(tmp_path / "result.zip") as archive:
        assert {"000.png", "000.mask.png", "task.json"} <= set(archive.namelist())
        assert archive.read("000.png").startswith(b"\x89PNG")


def test_ctrl_c_ends_all_processes_and_keeps_what_was_done(tmp_path: Path) -> None:
    run = command("live", "--seconds", "600", "--sleep", "--port", "0", "--out", "run", folder=tmp_path)
    assert run.stderr is not None
    said = next(line for line in run.stderr if "dashboard at " in line)
    state = said.rsplit("dashboard at ", 1)[1].strip() + "v1/state"
    until = time.monotonic() + 60
    while time.monotonic() < until and not httpx.get(state).json()["counts"].get("done"):
        time.sleep(0.1)
    children = _children_of(run.pid)
    assert len(children) >= 4
    run.send_signal(signal.SIGINT)
    out, errors = run.communicate(timeout=90)
    assert run.returncode == 0, errors
    assert "0 lost" in out
    assert (tmp_path / "run" / "records.parquet").is_file()
    assert not [pid for pid in children if Path(f"/proc/{pid}").exists()]


def _children_of(pid: int) -> list[int]:
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        found += [int(each) for each in task.read_text().split()]
    return found


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (LiveOptions(seconds=0), "seconds is 0"),
        (LiveOptions(scenario="hall-20x5"), r"has the models|has no \[\[models\]\]"),
        (LiveOptions(scenario="factory"), "give --models FOLDER"),
    ],
)
def test_bad_options(tmp_path: Path, options: LiveOptions, said: str) -> None:
    from dataclasses import replace

    with pytest.raises(InputError, match=said):
        run_live(replace(options, out=tmp_path / "run", port=0), Silent(), lambda text: None)


def test_a_folder_that_holds_something_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(InputError, match="is not empty"):
        run_live(LiveOptions(out=tmp_path, port=0), Silent(), lambda text: None)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def offered(tasks: list[tuple[float, Task]], seconds: float) -> float:
    """Work of tasks over what the servers of the plant can do in a time."""
    scenario = load_scenario("live")
    return sum(task.images for _, task in tasks) * scenario.models[0].fixed_work / scenario.capacity / seconds


def test_the_load_is_the_one_that_was_asked_for(tmp_path: Path) -> None:
    for load in (0.5, 1.5):
        options = LiveOptions(out=tmp_path, seconds=300, load=load)
        drawn = _requests(options, _planned(options), ("pit",))
        assert offered(drawn, 300.0) == pytest.approx(load, rel=0.15)
        assert drawn[-1][0] > 290.0
    # A trace is stretched to the load of the scenario, or to the one asked for; one that a device replays is not.
    path = tmp_path / "requests.csv"
    for load in (None, 0.25):
        options = LiveOptions(seconds=9000, load=load, trace=path)
        given = _requests(options, _planned(options), ("pit",))
        assert offered(given, given[-1][0]) == pytest.approx(load or 0.5, rel=0.01)
    own = tasks_of_trace(path, load_scenario("live"), (), 0, own_time=True)
    assert [at_s for at_s, _ in own] == pytest.approx([at_s for at_s, _ in drawn])


def test_tasks_of_a_trace_are_those_of_the_scenario(tmp_path: Path) -> None:
    scenario = load_scenario("live")
    trace_of_scenario(scenario, 100.0, 7, tmp_path / "t.csv")
    tasks = tasks_of_trace(tmp_path / "t.csv", scenario, ("crack", "pit"), 0)
    assert offered(tasks, 100.0) == pytest.approx(0.5, rel=0.2)  # that of the scenario
    assert {task.label for _, task in tasks} == {"crack", "pit"}
    assert len({task.id for _, task in tasks}) == len(tasks)
    again = tasks_of_trace(tmp_path / "t.csv", scenario, ("crack", "pit"), 0)
    assert [task.seed for _, task in again] == [task.seed for _, task in tasks]
    assert not {task.id for _, task in again} & {task.id for _, task in tasks}


@pytest.mark.parametrize(
    ("module", "without"),
    [
        ("gmel.edge.device", ("aiohttp", "fastapi", "pyarrow", "pydantic")),
        ("gmel.edge.gateway.process", ("pyarrow",)),
        ("gmel.edge.server.process", ("aiohttp", "fastapi", "numpy", "pyarrow", "pydantic")),
    ],
)
def test_no_process_of_a_plant_imports_what_it_does_not_need(module: str, without: tuple[str, ...]) -> None:
    heavy = ("jax", "torch", "sklearn", "matplotlib", *without)
    code = f"import sys, gmel.cli.main, {module}; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"
