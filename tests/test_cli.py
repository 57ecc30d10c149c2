"""The command line as a user types it."""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from gmel.cli.main import main
from gmel.scenario.files import replace_file
from gmel.scenario.load import parse_scenario, to_toml
from small_plants import plant_text

SMALL = ["--updates", "4", "--episodes", "2", "--slots", "40", "--tuning", "1", "--set", "environments=16"]


@pytest.fixture
def plant(tmp_path: Path) -> Path:
    path = tmp_path / "plant.toml"
    path.write_text(to_toml(parse_scenario(plant_text(), "small")))
    return path


def gmel(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of the command."""
    before = sys.argv
    sys.argv = ["gmel", *map(str, words)]
    try:
        with pytest.raises(SystemExit) as stop:
            main()
    finally:
        sys.argv = before
    shown = capsys.readouterr()
    return int(stop.value.code or 0), shown.out, shown.err


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder made by the command itself: by one of the workers, since it takes the longest of all; each has a
    copy of its own to change."""
    base = tmp_path_factory.getbasetemp()
    place = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "run-for-all"
    made = place / "made"
    try:
        place.mkdir()
    except FileExistsError:
        ends = time.monotonic() + 600
        while not made.exists() and time.monotonic() < ends:
            time.sleep(0.2)
        assert made.exists(), "the other worker made no run"
    else:
        (place / "plant.toml").write_text(to_toml(parse_scenario(plant_text(), "small")))
        done = command(place, "run", "plant.toml", *SMALL, "--seeds", "2", "--out", "run", "--json")
        assert done.returncode == 0, done.stderr
        evaluation = json.loads(done.stdout)
        assert {p["name"] for p in evaluation["policies"]} >= {"proportional", "led2", "softmax7", "optimum", "amarl"}
        made.touch()
    own = tmp_path_factory.mktemp("finished") / "run"
    shutil.copytree(place / "run", own)
    return own


def command(place: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "gmel.cli.main", *words],
        cwd=place,
        capture_output=True,
        text=True,
        timeout=600,
        env=environment(place),
        check=False,
    )


def environment(place: Path) -> dict[str, str]:
    """Compiled programs are shared by the commands of a test session, and by nothing else."""
    return {**os.environ, "XDG_CACHE_HOME": str(place.parent / "cache")}


def test_help_is_a_page_and_quick() -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "gmel.cli.main", "--help"],
        capture_output=True,
        text=True,
        check=True,
    )
    for verb in ("run", "simulate", "export", "report", "scenario", "benchmark"):
        assert verb in done.stdout
    # The verbs import JAX when they run, not when the page is shown.
    assert not any(line.rstrip().endswith("| jax") for line in done.stderr.splitlines())


def test_run_leaves_a_complete_folder(finished: Path) -> None:
    names = {path.name for path in finished.iterdir()}
    assert names >= {
        "scenario.toml",
        "config.toml",
        "metrics.parquet",
        "checkpoints",
        "policy",
        "report.html",
        "manifest.json",
        "evaluation.json",
    }
    manifest = json.loads((finished / "manifest.json").read_text())
    assert manifest["interrupted"] is False
    assert manifest["wall_s"] > 0
    assert not list(finished.parent.glob(".run*"))
    page = (finished / "report.html").read_text()
    assert "AMARL" in page
    assert "2 training seeds" in page


def test_every_policy_met_the_same_traffic(finished: Path) -> None:
    evaluation = json.loads((finished / "evaluation.json").read_text())
    assert evaluation["training_seeds"] == 2
    for policy in evaluation["policies"]:
        assert len(policy["metrics"]["mean_latency_s"]["values"]) == 2
        parts, mean = policy["decomposition_s"], policy["metrics"]["mean_latency_s"]["mean"]
        if policy["name"] != "amarl":  # of amarl the decomposition is that of the first seed
            assert sum(parts.values()) == pytest.approx(mean, rel=1e-5)
        assert parts["wait_to_slot"] == pytest.approx(evaluation["policies"][0]["decomposition_s"]["wait_to_slot"])


def test_export_and_report(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = gmel(capsys, "export", finished, "--out", tmp_path / "policy")
    assert code == 0
    assert "largest difference" in out
    assert {p.name for p in (tmp_path / "policy").iterdir()} == {"actor.onnx", "actor.safetensors", "policy.json"}
    code, _, err = gmel(capsys, "export", finished, "--out", tmp_path / "policy")
    assert code == 2
    assert "exists" in err
    (finished / "report.html").unlink()
    code, out, _ = gmel(capsys, "report", finished, "--markdown")
    assert code == 0
    assert "| L5 |" in out
    assert (finished / "report.html").is_file()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("count = 6 -> count = -6", ["devices.count"]),
        ("speed = 2.0 -> speed = nan", ["servers[0].speed"]),
        ("length_s = 1.0 -> lenght_s = 1.0", ["slot.lenght_s", "length_s"]),
        ("load = 0.7 -> load = inf", ["arrivals.load"]),
    ],
)
def test_bad_scenarios(plant: Path, capsys: pytest.CaptureFixture[str], change: str, words: list[str]) -> None:
    old, _, new = change.partition(" -> ")
    assert old in plant.read_text()
    plant.write_text(plant.read_text().replace(old, new, 1))
    code, _, err = gmel(capsys, "run", plant, "--out", plant.parent / "run")
    assert_refused(code, err, words, plant.parent)


TRACES = {
    "missing column": ("device,model\n1,small\n", ["time_s"]),
    "unsorted": ("time_s\n0.0\n5.0\n3.0\n", ["time_s"]),
    "empty": ("time_s\n", ["empty"]),
    "not a number": ("time_s\n0.0\nnan\n", ["time_s"]),
}


@pytest.mark.parametrize("case", TRACES)
def test_bad_traces(plant: Path, capsys: pytest.CaptureFixture[str], case: str) -> None:
    text, words = TRACES[case]
    (plant.parent / "trace.csv").write_text(text)
    code, _, err = gmel(capsys, "run", plant, "--trace", plant.parent / "trace.csv", "--out", plant.parent / "run")
    assert_refused(code, err, words, plant.parent)


def test_zero_servers(plant: Path, capsys: pytest.CaptureFixture[str]) -> None:
    head, _, tail = plant.read_text().partition("[[servers]]")
    rest = tail[tail.index("\n[radio]") :] if "\n[radio]" in tail else ""
    plant.write_text("servers = []\n" + head + rest)
    code, _, err = gmel(capsys, "run", plant, "--out", plant.parent / "run")
    assert_refused(code, err, ["servers"], plant.parent)


def test_bad_places(plant: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (plant.parent / "file").write_text("in the way")
    code, _, err = gmel(capsys, "run", plant, "--out", plant.parent / "file" / "run")
    assert_refused(code, err, ["--out", "cannot be written"], plant.parent)
    (plant.parent / "there").mkdir()
    code, _, err = gmel(capsys, "run", plant, "--out", plant.parent / "there")
    assert_refused(code, err, ["exists", "--resume"], plant.parent)
    code, _, err = gmel(capsys, "run", "--resume", "--out", plant.parent / "nothing")
    assert_refused(code, err, ["no such run folder"], plant.parent)


@pytest.mark.parametrize(
    ("failure", "words"), [(errno.ENOSPC, "No space left"), (errno.EROFS, "Read-only"), (errno.EDQUOT, "quota")]
)
def test_a_full_disk_is_one_line_and_the_old_file_stays(
    plant: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, failure: int, words: str
) -> None:
    out = plant.parent / "placed.toml"
    out.write_text("old")

    def write(self: Path, data: bytes) -> int:
        raise OSError(failure, os.strerror(failure))  # as `write(2)` fails: without a name

    monkeypatch.setattr(Path, "write_bytes", write)
    with pytest.raises(OSError, match=re.escape(str(out))):
        replace_file(out, b"new")
    assert out.read_text() == "old"
    assert [path.name for path in plant.parent.iterdir() if ".part" in path.name] == []
    monkeypatch.setattr("gmel.cli.main.app", lambda **_: replace_file(out, b"new"))
    code, _, err = gmel(capsys)
    assert code == 2
    assert err.count("\n") == 1
    assert str(out) in err
    assert words in err


def test_a_failure_of_ours_is_not_taken_for_a_full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(**_: object) -> None:
        raise OSError(errno.EBADF, os.strerror(errno.EBADF))

    monkeypatch.setattr("gmel.cli.main.app", fail)
    with pytest.raises(OSError, match="descriptor"):
        main()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--seeds", "0"], ["--seeds"]),
        (["--budget", "-1"], ["--budget"]),
        (["--algorithm", "amral"], ["amral", "amarl"]),
        (["--load", "-1"], ["arrivals.load"]),
        (["--updates", "many"], ["--updates"]),
        (["--set", "learning_rat=0.1"], ["learning_rat", "learning_rate"]),
        (["--set", "learning_rate"], ["NAME=VALUE"]),
    ],
)
def test_bad_options(plant: Path, capsys: pytest.CaptureFixture[str], options: list[str], words: list[str]) -> None:
    code, _, err = gmel(capsys, "run", plant, *options, "--out", plant.parent / "run")
    assert_refused(code, err, words, plant.parent)


def test_nothing_is_left_of_a_refused_run_not_even_the_folder_around_it(
    plant: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = gmel(capsys, "run", plant, "--set", "learning_rat=0.1", "--out", tmp_path / "runs" / "one")
    assert_refused(code, err, ["learning_rat"], tmp_path)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("command", [["run", "--resume", "--out"], ["report"]])
def test_run_folder_of_another_version(finished: Path, capsys: pytest.CaptureFixture[str], command: list[str]) -> None:
    manifest = finished / "manifest.json"
    before = manifest.read_text()
    try:
        manifest.write_text(json.dumps({**json.loads(before), "run_format": 99}))
        code, _, err = gmel(capsys, *command, finished)
    finally:
        manifest.write_text(before)
    assert_refused(code, err, ["run_format", "99"], finished.parent)
    assert (finished / "report.html").exists() or (finished / "evaluation.json").exists()


def test_resume_with_a_corrupt_checkpoint_leaves_the_run_as_it_was(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "copy"
    shutil.copytree(finished, run)
    checkpoint = next((run / "checkpoints").iterdir())
    checkpoint.write_bytes(checkpoint.read_bytes()[:100])
    before = sorted(path.name for path in run.iterdir())
    code, _, err = gmel(capsys, "run", "--resume", "--out", run)
    assert_refused(code, err, ["checkpoint", "corrupt"], tmp_path)
    assert sorted(path.name for path in run.iterdir()) == before


def assert_refused(code: int, err: str, words: list[str], place: Path) -> None:
    """Exit 2, one line that names the fault, and nothing left behind."""
    assert code == 2, err
    lines = [line for line in err.splitlines() if line.startswith("gmel: error:")]
    assert len(lines) == 1, err
    for word in words:
        assert word in lines[0]
    assert "Traceback" not in err
    assert not (place / "run" / "report.html").exists() or place.name.startswith("finished")
    assert not list(place.glob(".run*"))


@pytest.mark.slow
def test_ctrl_c_leaves_a_report_and_resume_ends_where_it_would_have(tmp_path: Path) -> None:
    (tmp_path / "plant.toml").write_text(to_toml(parse_scenario(plant_text(), "small")))
    size = ["--updates", "24", "--episodes", "2", "--slots", "40", "--tuning", "1"]
    whole = command(tmp_path, "run", "plant.toml", *size, "--out", "whole")
    assert whole.returncode == 0, whole.stderr
    process = subprocess.Popen(
        [sys.executable, "-m", "gmel.cli.main", "run", "plant.toml", *size, "--out", "cut"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(tmp_path),
    )
    assert process.stderr is not None
    for line in process.stderr:
        if "M decisions" in line:
            process.send_signal(signal.SIGINT)
            break
    _, rest = process.communicate(timeout=300)
    assert process.returncode == 130, rest
    cut = tmp_path / "cut"
    assert (cut / "report.html").is_file()
    assert json.loads((cut / "manifest.json").read_text())["interrupted"] is True
    assert list((cut / "checkpoints").glob("*.safetensors"))
    time.sleep(0.1)
    again = command(tmp_path, "run", "--resume", "--out", "cut")
    assert again.returncode == 0, again.stderr
    one, other = (load_file(tmp_path / name / "policy" / "actor.safetensors") for name in ("whole", "cut"))
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_array_equal(one[name], other[name])
    first, second = (json.loads((tmp_path / name / "evaluation.json").read_text()) for name in ("whole", "cut"))
    assert first == second
