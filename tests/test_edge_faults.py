"""A plant of real processes that is broken in every way that is likely; the long run stands at the end.

One plant for all quick tests, since each process takes seconds to start: every test leaves it whole.
"""

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.edge_chaos import chaos
from tests.edge_plants import damage
from tests.edge_processes import STALL_S, Client, Live, Process, free_port, scenario, toll_of

from gmel.edge.keys import add_key

SLACK_S = 10.0
"""The machine may be busy."""
SPEEDS = {"push-a": 1.0, "push-b": 1.0, "pull-c": 1.0}


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    folder = tmp_path_factory.mktemp("plant")
    with Live(folder, scenario(folder / "plant.toml", SPEEDS, work=0.025)) as plant:
        plant.start_gateway()
        for name in SPEEDS:
            plant.begin_server(name, *(("--pull",) if name.startswith("pull") else ()))
        plant.wait_alive(*SPEEDS)
        yield plant


def under_load(live: Live, prefix: str, tasks: int, broken: Callable[[], None], **more: Any) -> Client:
    """Sends tasks and breaks something when a quarter of them has ended; all of them end, with what is theirs."""
    client = Client(live.url)

    def when_it_runs() -> None:
        until = time.monotonic() + 60.0
        while len(client.ended) < tasks // 4 and time.monotonic() < until:
            time.sleep(0.01)
        broken()

    async def both() -> None:
        await asyncio.gather(
            client.run([f"{prefix}-{number}" for number in range(tasks)], 24, **more), asyncio.to_thread(when_it_runs)
        )

    asyncio.run(both())
    toll = toll_of(live, client)
    assert (toll.accepted, toll.lost, toll.changed) == (tasks, 0, 0), asdict(toll)
    assert toll.results == toll.ids
    return client


@pytest.mark.parametrize("name", ["push-a", pytest.param("pull-c", marks=pytest.mark.slow)])
def test_a_server_is_killed(live: Live, name: str) -> None:
    client = under_load(live, f"kill-{name}", 80, live.servers[name].kill)
    # What it had was missed after at most the silence that is allowed, and then done elsewhere.
    assert max(client.latency_s.values()) < STALL_S + SLACK_S
    live.start_servers(name)
    before = live.server(name)["done"]
    under_load(live, f"back-{name}", 40, lambda: None)
    assert live.server(name)["done"] > before, "it is used again"


def test_the_gateway_is_killed(live: Live) -> None:
    def kill() -> None:
        assert live.gateway is not None
        live.gateway.kill()
        live.start_gateway()

    under_load(live, "gateway", 80, kill)
    live.wait_alive(*SPEEDS)


@pytest.mark.parametrize("name", ["push-a", pytest.param("pull-c", marks=pytest.mark.slow)])
def test_a_server_stops_without_dying(live: Live, name: str) -> None:
    times: dict[str, float] = {}

    def stop() -> None:
        live.wait(lambda: live.server(name)["tasks"] > 0, f"tasks at {name}")
        live.servers[name].send(signal.SIGSTOP)
        times["left"] = live.wait(lambda: live.server(name)["tasks"] == 0, f"{name} left")

    client = under_load(live, f"stop-{name}", 80, stop)
    assert times["left"] < STALL_S + SLACK_S
    assert max(client.latency_s.values()) < STALL_S + SLACK_S
    before = live.server(name)["done"]
    live.servers[name].send(signal.SIGCONT)
    live.wait_alive(name)
    under_load(live, f"cont-{name}", 40, lambda: None)
    assert live.server(name)["done"] > before, "it is used again"


def notes(live: Live) -> tuple[int, int]:
    lines = (live.folder / "executions").read_text(encoding="utf-8").splitlines()
    begun = sum(line.startswith("begun") for line in lines)
    return begun, len(lines) - begun


@pytest.mark.parametrize("name", ["push-b", pytest.param("pull-c", marks=pytest.mark.slow)])
def test_a_server_drains(live: Live, name: str) -> None:
    """SIGTERM under load: what it has begun it finishes and delivers, nothing runs twice for it."""
    unfinished = notes(live)[0] - notes(live)[1]
    ended: list[int] = []

    def drain() -> None:
        live.servers[name].send(signal.SIGTERM)
        ended.append(live.servers[name].popen.wait(30))

    client = under_load(live, f"drain-{name}", 80, drain)
    assert ended == [0]
    begun, done = notes(live)
    assert begun - done == unfinished, "nothing that it had begun was dropped"
    toll = toll_of(live, Client(live.url, acknowledged=client.acknowledged))
    ran = (live.folder / "executions").read_text(encoding="utf-8").splitlines()
    twice = [each for each in client.acknowledged if ran.count(f"begun {each}") > 1]
    assert not twice, asdict(toll)
    live.start_servers(name)


def test_a_server_joins_under_load(live: Live) -> None:
    def join() -> None:
        live.begin_server("joins", "--speed", "8")
        live.wait_alive("joins")

    for round_ in range(2):
        under_load(live, f"join-{round_}", 80, join if round_ == 0 else lambda: None)
    assert live.server("joins")["done"] > 0
    live.servers["joins"].send(signal.SIGTERM)
    assert live.servers["joins"].popen.wait(30) == 0
    last = live.server("joins")
    assert (last["alive"], last["draining"]) == (False, True), "it has said so, nobody waits for its silence"


def test_the_gateway_stops_without_dying(live: Live) -> None:
    """Longer than it takes to miss a server, and than `--stall`: no server is taken for gone, nothing runs twice."""
    live.wait_alive(*SPEEDS)
    lost = {name: live.server(name)["lost"] for name in SPEEDS}

    def stop() -> None:
        assert live.gateway is not None
        live.gateway.send(signal.SIGSTOP)
        time.sleep(3.5)
        live.gateway.send(signal.SIGCONT)
        servers = {each["name"]: each for each in live.get("/v1/servers")["servers"]}
        assert all(servers[name]["alive"] for name in SPEEDS)

    client = under_load(live, "pause", 120, stop)
    assert {name: live.server(name)["lost"] for name in SPEEDS} == lost
    ran = (live.folder / "executions").read_text(encoding="utf-8").splitlines()
    assert not [each for each in client.acknowledged if ran.count(f"begun {each}") > 1]


def test_slow_and_silent_clients_hold_nobody_up(live: Live) -> None:
    doors = [socket.create_connection(("127.0.0.1", live.port)) for _ in range(300)]
    try:
        for number, door in enumerate(doors):
            if number % 3 == 1:
                door.sendall(b"POST /v1/tasks HTTP/1.1\r\nhost: x\r\n")
            elif number % 3 == 2:
                door.sendall(b'POST /v1/tasks HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{"id"')
        under_load(live, "loris", 40, lambda: None)
        # Clients that leave in the middle of everything.
        for door in doors:
            door.close()
        under_load(live, "after", 40, lambda: None)
    finally:
        for door in doors:
            door.close()
    assert live.gateway is not None
    assert "Traceback" not in live.gateway.log.read_text(encoding="utf-8")


def test_a_healthy_server_was_never_left_alone(live: Live) -> None:
    """Hundreds of tasks wait; nothing is broken."""
    # One that another test has ended may have been sent to once more before its silence showed.
    before = {name: live.server(name)["lost"] for name in SPEEDS}
    usable: list[bool] = []

    def look() -> None:
        for _ in range(20):
            usable.extend(server["usable"] for server in live.get("/v1/servers")["servers"] if server["name"] in SPEEDS)
            time.sleep(0.05)

    under_load(live, "healthy", 120, look)
    after = {name: live.server(name)["lost"] for name in SPEEDS}
    assert after == before
    assert all(usable)


# Gateways of their own, with a server that is only said to be there.


def said_alive(live: Live) -> None:
    live.wait(lambda: beat(live).status_code == 200, "a heartbeat")


def beat(live: Live) -> httpx.Response:
    return httpx.put(f"{live.url}/v1/servers/nobody", json={"url": None}, timeout=20, trust_env=False)


def submit(live: Live, task_id: str) -> int:
    beat(live)
    body = {"id": task_id, "device": "d", "model": "part", "label": "x" * 60}
    return httpx.post(f"{live.url}/v1/tasks", json=body, timeout=20, trust_env=False).status_code


def test_a_damaged_ledger_is_told_in_one_line_and_taken_back(tmp_path: Path) -> None:
    with Live(tmp_path, scenario(tmp_path / "plant.toml", {"a": 1.0})) as live:
        gateway = live.start_gateway()
        said_alive(live)
        assert {submit(live, f"t{number}") for number in range(60)} == {202}
        # A second gateway on the same ledger would run everything twice.
        words = ("gateway", str(live.plant), "--folder", str(tmp_path / "gateway"), "--port", "0")
        second = Process(tmp_path, "second", words)
        assert second.popen.wait(60) == 2
        assert "in use by another gateway" in second.log.read_text("utf-8")
        gateway.send(signal.SIGTERM)
        assert gateway.popen.wait(30) == 0
        damage(live.ledger, 0.5)
        broken = Process(tmp_path, "broken", words)
        assert broken.popen.wait(60) == 2
        (line,) = broken.log.read_text("utf-8").splitlines()
        assert line.startswith("gmel: error: ")
        assert "--recover" in line
        recovering = live.start_gateway("--recover")
        (took,) = [line for line in recovering.said if line.startswith("ledger: ")]
        kept = int(took.split()[2])
        assert 40 <= kept <= 60
        assert (tmp_path / "gateway" / "ledger.sqlite.damaged-1").is_file()
        assert len(live.get("/v1/tasks?limit=100")["tasks"]) == kept
        assert submit(live, "new") == 202


def _permitted(*command: str) -> bool:
    try:
        return subprocess.run(command, capture_output=True, timeout=20, check=False).returncode == 0
    except OSError:
        return False


def test_a_full_disk(tmp_path: Path) -> None:
    """A file system of its own that is filled up: 503, nothing lost, and on with it when there is room."""
    disk = tmp_path / "gateway"
    disk.mkdir()
    if not _permitted("mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(disk)):
        pytest.skip("may not mount a file system here")
    try:
        with Live(tmp_path, scenario(tmp_path / "plant.toml", {"a": 1.0})) as live:
            live.start_gateway()
            said_alive(live)
            accepted = [f"t{number}" for number in range(20) if submit(live, f"t{number}") == 202]
            assert len(accepted) == 20
            fill(disk / "filler")
            statuses = [submit(live, f"full{number}") for number in range(80)]
            accepted += [f"full{number}" for number, status in enumerate(statuses) if status == 202]
            assert set(statuses) <= {202, 503}
            assert statuses[-1] == 503
            ready = httpx.get(f"{live.url}/healthz", timeout=20, trust_env=False)
            assert ready.status_code == 200
            (disk / "filler").unlink()
            live.wait(lambda: submit(live, "room") == 202, "there is room again")
            assert live.gateway is not None
            live.gateway.kill()
            live.start_gateway()
            found = {entry["id"] for entry in live.get("/v1/tasks?limit=1000")["tasks"]}
            assert found == {*accepted, "room"}, "what was accepted, and nothing that was refused"
    finally:
        subprocess.run(["umount", str(disk)], check=False)


def fill(path: Path) -> None:
    with path.open("wb", buffering=0) as file:
        for size in (65536, 4096, 1):
            with contextlib.suppress(OSError):
                while True:
                    file.write(b"\0" * size)


@contextlib.contextmanager
def apart(number: int) -> Iterator[tuple[str, str, Callable[[bool], None]]]:
    """A network name space with a cable to here: (its name, our address, a switch for the cable)."""
    space, here, there = f"gmel{number}", f"gm{number}a", f"gm{number}b"
    net = f"10.{200 + number % 50}.{number // 50 % 250}"

    def ip(*words: str) -> bool:
        return _permitted("ip", *words)

    try:
        made = ip("netns", "add", space) and ip("link", "add", here, "type", "veth", "peer", "name", there)
        if not made or not ip("link", "set", there, "netns", space):
            pytest.skip("may not make a network name space here")
        inside = ("netns", "exec", space, "ip")
        assert ip("addr", "add", f"{net}.1/24", "dev", here)
        assert ip("link", "set", here, "up")
        assert ip(*inside, "addr", "add", f"{net}.2/24", "dev", there)
        assert ip(*inside, "link", "set", there, "up")
        assert ip(*inside, "link", "set", "lo", "up")
        _permitted("tc", "qdisc", "add", "dev", here, "root", "netem", "delay", "10ms")  # where the kernel can
        yield space, net, lambda on: assert_(ip("link", "set", here, "up" if on else "down"))
    finally:
        ip("netns", "del", space)
        ip("link", "del", here)


def assert_(holds: bool) -> None:
    assert holds


def test_a_network_that_parts_gateway_and_server(tmp_path: Path) -> None:
    """The server lives and works, the gateway lives; no packet passes between them, nobody is told."""
    with apart(os.getpid() % 9973) as (space, net, cable):
        keys, server_keys = tmp_path / "keys.json", tmp_path / "server-keys.json"
        operator = add_key(server_keys, "operator", "gateway")
        own = {name: add_key(keys, "server", name) for name in ("far", "near")}
        device = add_key(keys, "device", "device-0")
        watcher = add_key(keys, "operator", "watcher")
        port = free_port()
        plant = scenario(tmp_path / "plant.toml", {"far": 4.0, "near": 1.0})
        words = (
            "gateway",
            str(plant),
            "--folder",
            str(tmp_path / "gateway"),
            "--host",
            f"{net}.1",
            "--port",
            str(port),
        )
        more = ("--keys", str(keys), "--stall", str(STALL_S))
        started: list[Process] = []
        try:
            started.append(Process(tmp_path, "gateway", [*words, *more], GMEL_KEY=operator))
            url = started[0].address()
            for name, host, before in (
                ("far", f"{net}.2", ("ip", "netns", "exec", space)),
                ("near", "127.0.0.1", ()),
            ):
                options = ("--gateway", url, "--host", host, "--keys", str(server_keys))
                started.append(Process(tmp_path, name, ["server", name, *options], before, GMEL_KEY=own[name]))
            live = Live(tmp_path, plant)
            ask = httpx.Client(
                base_url=url, timeout=20, trust_env=False, headers={"Authorization": f"Bearer {watcher}"}
            )

            def server(name: str) -> dict[str, Any]:
                return {each["name"]: each for each in ask.get("/v1/servers").json()["servers"]}[name]

            live.wait(lambda: server("far")["alive"] and server("near")["alive"], "both alive")

            def send(prefix: str, tasks: int) -> float:
                began = time.monotonic()
                with httpx.Client(base_url=url, timeout=30, trust_env=False) as client:
                    client.headers["Authorization"] = f"Bearer {device}"
                    names = [f"{prefix}{number}" for number in range(tasks)]
                    for name in names:
                        body = {"id": name, "device": "device-0", "model": "part", "images": 4}
                        assert client.post("/v1/tasks", json=body).status_code == 202
                    if prefix == "apart":
                        cable(False)
                    for name in names:
                        entry = client.get(f"/v1/tasks/{name}", params={"wait_s": 30}).json()
                        assert entry["state"] == "done"
                        assert client.get(f"/v1/tasks/{name}/result").content == name.encode()
                return time.monotonic() - began

            send("before", 10)
            assert server("far")["done"] > 0
            assert send("apart", 10) < STALL_S + 3 * SLACK_S
            live.wait(lambda: not server("far")["alive"], "far is missed")
            done = server("far")["done"]
            cable(True)
            live.wait(lambda: server("far")["alive"], "far is back")
            send("after", 10)
            assert server("far")["done"] > done
        finally:
            for process in started:
                process.end()


def test_the_chaos_run_in_small(tmp_path: Path) -> None:
    """What the long run does, so that it cannot rot."""
    found = chaos(tmp_path, tasks=150, server_kills=1, gateway_kills=1, stalls=0, together=24)
    assert found.toll is not None
    assert (found.toll.lost, found.toll.changed) == (0, 0)
    assert found.toll.accepted == found.toll.ids == found.toll.results >= 150
    assert (found.server_kills, found.gateway_kills) == (1, 1)
    json.dumps(found.as_json())


@pytest.mark.slow
def test_ten_thousand_tasks_twenty_servers_and_five_gateways_killed(tmp_path: Path) -> None:
    found = chaos(tmp_path, tasks=10_000, server_kills=20, gateway_kills=5, stalls=6)
    toll = found.toll
    assert toll is not None
    assert toll.accepted >= 10_000
    assert found.server_kills >= 20
    assert found.gateway_kills >= 5
    assert toll.lost == 0
    assert toll.changed == 0
    assert toll.results == toll.ids == toll.accepted
    assert toll.begun - toll.ids < 0.05 * toll.accepted, "few tasks run twice"
    assert max(found.left_s) < STALL_S + SLACK_S
    assert max(found.again_s) < SLACK_S
