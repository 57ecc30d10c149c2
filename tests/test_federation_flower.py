"""The rounds through Flower: the same average as in this process, whatever sites do; and what is said without it.

The server's side is tried on a grid of our own, quickly; the slow tests start a real SuperLink and real SuperNodes.
"""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load as parse_arrays

from gmel.federation import flower
from gmel.federation.average import Rule
from gmel.federation.flower import FlowerSettings, Tls, elsewhere_of, train_over_flower
from gmel.federation.flower_apps import HEAD, RESULT, Job, serve, train_at_home
from gmel.federation.site_file import rows_from_bytes, rows_to_bytes
from gmel.federation.training import Plan, SiteRows, Trained, local_head, mass_of, train_head
from gmel.scenario.errors import InputError
from reporters import Silent
from site_rows import SITES, site_rows

PRESENT = importlib.util.find_spec("flwr") is not None
needs_flower = pytest.mark.skipif(not PRESENT, reason="Flower is not installed; pip install 'gmel[flower]'")


def same_head(first: Trained, second: Trained) -> None:
    assert first.classes == second.classes
    np.testing.assert_allclose(first.weights, second.weights, atol=1e-6)
    np.testing.assert_allclose(first.bias, second.bias, atol=1e-6)


# Without Flower


def test_without_the_extra_its_name_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flower, "find_spec", lambda name: None)
    for call in (lambda: elsewhere_of("flower"), lambda: train_over_flower(SITES, Plan(), 0, Silent())):
        with pytest.raises(InputError, match=r"^over: Flower is not installed; pip install 'gmel\[flower\]'$"):
            call()
    assert elsewhere_of("process") is None


def test_words_and_files_that_cannot_be(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(flower, "check_installed", lambda: None)
    with pytest.raises(InputError, match="over: 'mail'"):
        elsewhere_of("mail")
    with pytest.raises(InputError, match="or none of them"):
        elsewhere_of("flower", authority=tmp_path / "ca.pem")
    with pytest.raises(InputError, match="is no file"):
        Tls(tmp_path / "a", tmp_path / "b", tmp_path / "c")
    with pytest.raises(InputError, match="round_s: 0"):
        FlowerSettings(round_s=0.0)
    with pytest.raises(InputError, match="a name of its own"):
        train_over_flower([SITES[0], SITES[0]], Plan(), 0, Silent())


def test_rows_of_a_site_survive_their_file(tmp_path: Path) -> None:
    for site in SITES:
        again = rows_from_bytes(rows_to_bytes(site), "here")
        assert again.name == site.name
        assert np.array_equal(again.features, site.features)
        assert np.array_equal(again.labels, site.labels)
        assert np.array_equal(again.weights, site.weights)
    for garbage in (b"", b"garbage", rows_to_bytes(SITES[0])[:-9]):
        with pytest.raises(InputError, match="here: corrupt rows"):
            rows_from_bytes(garbage, "here")
    short = replace(SITES[0], weights=SITES[0].weights[:3])
    with pytest.raises(InputError, match="do not fit"):
        rows_from_bytes(rows_to_bytes(short), "here")


def test_a_job_survives_its_text() -> None:
    job = Job(("a", "b"), Plan("fedadam", rounds=3, drop_out=0.25), 7, Rule("trimmed", trim=2), 1.0, 2.0)
    assert Job.from_text(job.to_text()) == job


# The server's side, on a grid in this process


@pytest.fixture
def in_a_task(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flower's messages can only be made in one of its processes, which know what they run."""
    from flwr.supercore.task_identity import TaskIdentity  # pyright: ignore[reportMissingImports]

    for name in ("_run_id", "_node_id", "_task_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)


class Grid:
    """Flower's way to the sites, without the way. Node 10 is the first site, 11 the second."""

    def __init__(self, sites: list[SiteRows], answer: Callable[[SiteRows, Any], Any]) -> None:
        self.sites = dict(enumerate(sites, start=10))
        self.answer = answer
        self.waiting: dict[str, Any] = {}
        self.asked: list[tuple[str, int]] = []

    def get_node_ids(self) -> list[int]:
        return list(self.sites)

    def push_messages(self, messages: Iterable[Any]) -> list[str]:
        from flwr.app import Message  # pyright: ignore[reportMissingImports]

        ids: list[str] = []
        for message in messages:
            node = message.metadata.dst_node_id
            ids.append(f"{len(self.asked)}")
            self.asked.append((message.metadata.message_type, node))
            message.metadata.__dict__["_message_id"] = ids[-1]
            content = self.answer(self.sites[node], message)
            if content is not None:
                self.waiting[ids[-1]] = content if isinstance(content, Message) else Message(content, reply_to=message)
        return ids

    def pull_messages(self, ids: Iterable[str]) -> list[Any]:
        return [self.waiting.pop(each) for each in ids if each in self.waiting]


def honest(site: SiteRows, message: Any) -> Any:
    from flwr.app import ConfigRecord, RecordDict  # pyright: ignore[reportMissingImports]

    if message.metadata.message_type == "train":
        return train_at_home(site, message.content, local_head)
    said = {"name": site.name, "classes": sorted(set(site.labels.tolist())), "features": site.features.shape[1]}
    return RecordDict({"site": ConfigRecord({**said, "mass": mass_of(site)})})


def served(
    tmp_path: Path, sites: list[SiteRows], answer: Callable[[SiteRows, Any], Any], plan: Plan, **job: Any
) -> tuple[Trained, Grid]:
    grid = Grid(sites, answer)
    facts: dict[str, Any] = {"rule": Rule(), "start_s": 0.5, "round_s": 0.3, **job}
    serve(grid, Job(tuple(site.name for site in sites), plan, 3, **facts), tmp_path)
    assert set(parse_arrays((tmp_path / HEAD).read_bytes())) == {"weights", "bias"}
    assert json.loads((tmp_path / RESULT).read_text("utf-8"))["log"]
    return flower._outcome(tmp_path), grid  # pyright: ignore[reportPrivateUsage]


@needs_flower
@pytest.mark.usefixtures("in_a_task")
@pytest.mark.parametrize("algorithm", ["fedavg", "fedprox", "fedadam"])
def test_the_server_averages_as_this_process_does(tmp_path: Path, algorithm: str) -> None:
    plan = Plan(algorithm, rounds=4, drop_out=0.2, straggler=0.4)
    through, grid = served(tmp_path, SITES, honest, plan)
    here = train_head(SITES, plan, 3)
    same_head(through, here)
    assert through.log == here.log
    assert [kind for kind, _ in grid.asked[:3]] == ["query"] * 3
    assert through.sent_bytes > 0


@needs_flower
@pytest.mark.usefixtures("in_a_task")
def test_a_robust_rule_is_used(tmp_path: Path) -> None:
    same = site_rows({name: ["a", "b", "c"] for name in ("east", "north", "west")})
    plan = Plan(rounds=3)
    through, _ = served(tmp_path, same, honest, plan, rule=Rule("median"))
    same_head(through, train_head(same, plan, 3, Rule("median")))


@needs_flower
@pytest.mark.usefixtures("in_a_task")
def test_garbage_is_left_out_by_name_and_the_rest_goes_on(tmp_path: Path) -> None:
    from flwr.app import ConfigRecord, Error, Message, RecordDict  # pyright: ignore[reportMissingImports]

    names = ("east", "lost", "nan", "raises", "shape", "stale", "text", "west")
    sites = site_rows({name: ["a", "b"] for name in names})

    def answer(site: SiteRows, message: Any) -> Any:
        if message.metadata.message_type != "train":
            return honest(site, message)
        if site.name == "lost":
            return None
        if site.name == "raises":
            return Message(Error(1, "out of\nmemory"), reply_to=message)
        if site.name == "text":
            return RecordDict({"head": ConfigRecord({"weights": "hello"})})
        content = honest(site, message)
        if site.name in ("nan", "shape"):
            record = content["head"]
            array = record["weights"].numpy()
            spoiled = np.full_like(array, np.nan) if site.name == "nan" else array[:, :2]
            record["weights"] = type(record["weights"])(spoiled)
        if site.name == "stale":
            content["said"]["round"] = int(content["said"]["round"]) - 1
        return content

    through, grid = served(tmp_path, sites, answer, Plan(rounds=3))
    for entry in through.log:
        assert entry.used == ("east", "west")
        assert entry.absent == ("lost",)
        said = {refusal.site: refusal.reason for refusal in entry.refusals}
        assert "not finite" in said["nan"]
        assert "of shape (2, 2), must be (2, 6)" in said["shape"]
        assert "now is round" in said["stale"]
        assert said["raises"] == "out of memory"
        assert "no head" in said["text"]
    # Two rounds of silence, then it is not waited for.
    assert grid.asked.count(("train", 10 + names.index("lost"))) == 2
    clean = [site for site in sites if site.name in ("east", "west")]
    same_head(through, train_head(clean, Plan(rounds=3), 3))


@needs_flower
@pytest.mark.usefixtures("in_a_task")
def test_sites_that_do_not_fit_are_not_let_in(tmp_path: Path) -> None:
    from flwr.app import ConfigRecord, RecordDict  # pyright: ignore[reportMissingImports]

    narrow = replace(SITES[2], name="narrow", features=SITES[2].features[:, :4])
    mute, liar = replace(SITES[2], name="mute"), replace(SITES[2], name="liar")

    def answer(site: SiteRows, message: Any) -> Any:
        if site.name == "mute":
            return RecordDict({"what": ConfigRecord({})})
        content = honest(site, message)
        if site.name == "liar" and message.metadata.message_type == "query":
            content["site"]["mass"] = float("inf")
        return content

    through, _ = served(tmp_path, [*SITES[:2], narrow, mute, liar], answer, Plan(rounds=2))
    said = {refusal.site: refusal.reason for refusal in through.log[0].refusals}
    assert "agreed are 6" in said["narrow"]
    assert "mass" in said["liar"]
    assert any("does not say who it is" in reason for reason in said.values())
    assert through.log[0].used == ("east", "north")
    assert through.classes == ("a", "b", "c", "d")
    with pytest.raises(InputError, match="none of 1 sites can take part"):
        served(tmp_path, [mute], answer, Plan(rounds=2))


# Real processes


def left_behind() -> list[str]:
    """Command lines of processes that belong to any run of ours through Flower."""
    found: list[str] = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and b"/gmel-flower-" in (entry / "environ").read_bytes():
                found.append((entry / "cmdline").read_bytes().replace(b"\0", b" ").decode())
        except OSError:
            continue
    return found


@needs_flower
@pytest.mark.slow
def test_real_processes_give_the_same_average(tmp_path: Path) -> None:
    from tls_files import write_certificates

    plan = Plan(rounds=2, straggler=0.5)
    here = train_head(SITES, plan, 3)
    tls = Tls(*write_certificates(tmp_path))
    for settings in (FlowerSettings(), FlowerSettings(tls=tls)):
        through = train_over_flower(SITES, plan, 3, Silent(), settings=settings)
        same_head(through, here)
        assert through.log == here.log
        assert not left_behind()


@needs_flower
@pytest.mark.slow
def test_real_sites_that_spoil_or_die_do_not_stop_the_run() -> None:
    sites = site_rows({name: ["a", "b"] for name in ("dies", "east", "not finite", "raises", "west", "wrong shape")})
    settings = FlowerSettings(round_s=150.0, client="spoiled_flower_client:spoiled_app")
    through = train_over_flower(sites, Plan(rounds=2), 0, Silent(), settings=settings)
    assert through.log[0].used == ("dies", "east", "west")
    assert through.log[1].used == ("east", "west")
    for entry in through.log:
        said = {refusal.site: refusal.reason for refusal in entry.refusals}
        assert "must be (2, 6)" in said["wrong shape"]
        assert "not finite" in said["not finite"]
        assert "no photos here today" in said["raises"]
    last = through.log[1]
    assert "dies" in {*last.absent, *(refusal.site for refusal in last.refusals)}
    assert not left_behind()


@needs_flower
@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_ends_every_process(number: signal.Signals, tmp_path: Path) -> None:
    script = tmp_path / "run.py"
    script.write_text(
        "from gmel.federation.flower import train_over_flower\n"
        "from gmel.federation.training import Plan\n"
        "from reporters import Silent\n"
        "from site_rows import SITES\n"
        "train_over_flower(SITES, Plan(rounds=50), 0, Silent())\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    running = subprocess.Popen([sys.executable, str(script)], env=environment, stderr=subprocess.PIPE)
    end = time.monotonic() + 120
    while sum("flower-supernode" in line for line in left_behind()) < 3:
        assert running.poll() is None, running.communicate()
        assert time.monotonic() < end
        time.sleep(0.2)
    running.send_signal(number)
    _, said = running.communicate(timeout=60)
    assert b"KeyboardInterrupt" in said
    assert not left_behind()
