"""A plant of real processes on loopback that tests may break, and what clients see of it meanwhile.

Servers are those of the command line, except that each writes down every task that it begins and ends: a process that is
killed cannot be asked. A result is the id of its task, so that one that is swapped shows.
"""

import asyncio
import contextlib
import os
import queue
import random
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx

__all__ = ["Client", "Live", "Toll", "scenario", "toll_of"]

EXECUTIONS = "GMEL_TEST_EXECUTIONS"
STALL_S = 2.0
_START_S = 90.0

_SCENARIO = """
format = 1
name = "faults"
title = "servers that sleep"
work_unit = "seconds"
switching = true

[slot]
length_s = 0.5
broadcast_age_slots = 2
latency_from = "generated"

[episode]
slots = 100
warmup_slots = 0

[devices]
count = 4
speed = 0.1
local = false

{servers}
[radio]
model = "wired"
access = "home"
download = false

[tasks]
kind = "catalogue"
deadline_s = {{ low = 60.0, high = 60.0 }}

[arrivals]
kind = "poisson"
load = 0.5

[reward]
latency_scale_s = 1.0
clip = 20.0

[[models]]
name = "part"
popularity = 1.0
fixed_work = {work}
memory_gb = 0.05
steps = {{ values = [1.0], weights = [1.0] }}
images = {{ values = [1.0], weights = [1.0] }}
bits_in = {{ low = 0.0, high = 0.0 }}
bits_out_per_image = 1e3
load = {{ warm_share = 1.0, warm_median_s = 0.01, cold_median_s = 0.01, sigma = 0.0 }}
"""


def scenario(path: Path, speeds: dict[str, float], work: float = 0.04) -> Path:
    """A scenario file: servers by name with their speed, one model `part` of so much work an image."""
    servers = "".join(
        f'[[servers]]\nname = "{name}"\nspeed = {speed}\nmemory_gb = 1.0\n\n' for name, speed in speeds.items()
    )
    path.write_text(_SCENARIO.format(servers=servers, work=work), encoding="utf-8")
    return path


def free_port() -> int:
    """A port that is free now."""
    with socket.socket() as door:
        door.bind(("127.0.0.1", 0))
        return int(door.getsockname()[1])


class Process:
    """A command of `gmel` in a process of its own, known by the address that it prints."""

    def __init__(self, folder: Path, name: str, words: Sequence[str], before: Sequence[str] = (), **env: str) -> None:
        self.log = folder / f"{name}.log"
        command = [*before, sys.executable, str(Path(__file__).resolve()), *words]
        with self.log.open("a", encoding="utf-8") as log:
            self.popen = subprocess.Popen(
                command,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                start_new_session=True,
                env={**os.environ, "PYTHONUNBUFFERED": "1", EXECUTIONS: str(folder / "executions"), **env},
            )
        self._lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self.said: list[str] = []
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.popen.stdout is not None
        for line in self.popen.stdout:
            self._lines.put(line)
        self._lines.put(None)

    def address(self) -> str:
        """Waits for the address."""
        until = time.monotonic() + _START_S
        while time.monotonic() < until:
            with contextlib.suppress(queue.Empty):
                line = self._lines.get(timeout=1.0)
                if line is None:
                    break
                self.said.append(line.strip())
                if " at http" in line:
                    return line.rsplit(" at ", 1)[1].strip()
        raise AssertionError(f"did not start: {self.log.read_text(encoding='utf-8')[-2000:]}")

    def send(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.popen.send_signal(number)

    def kill(self) -> None:
        """As a power cut of this process alone."""
        self.send(signal.SIGKILL)
        self.popen.wait(20)

    def end(self) -> None:
        if self.popen.poll() is None:
            self.send(signal.SIGCONT)
            self.kill()


@dataclass
class Live:
    """A gateway and its servers; on leaving all of them are ended."""

    folder: Path
    plant: Path
    stall_s: float = STALL_S
    options: tuple[str, ...] = ()
    gateway: Process | None = None
    servers: dict[str, Process] = field(default_factory=dict[str, Process])
    words: dict[str, tuple[str, ...]] = field(default_factory=dict[str, tuple[str, ...]])
    port: int = field(default_factory=free_port)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in [*self.servers.values(), *([self.gateway] if self.gateway else [])]:
            process.end()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def ledger(self) -> Path:
        return self.folder / "gateway" / "ledger.sqlite"

    def start_gateway(self, *more: str) -> Process:
        words = ("gateway", str(self.plant), "--folder", str(self.folder / "gateway"), "--port", str(self.port))
        stall = ("--stall", str(self.stall_s))
        self.gateway = Process(self.folder, "gateway", [*words, *stall, *self.options, *more])
        self.gateway.address()
        return self.gateway

    def begin_server(self, name: str, *more: str) -> Process:
        """Starts a server without waiting for it; started again, it is the same one."""
        if more or name not in self.words:
            self.words[name] = more
        words = ("server", name, "--gateway", self.url, *self.words[name])
        self.servers[name] = Process(self.folder, name, words)
        return self.servers[name]

    def start_servers(self, *names: str) -> None:
        """Starts servers and waits until the gateway hears them."""
        for name in names:
            self.begin_server(name)
        self.wait_alive(*names)

    def wait_alive(self, *names: str) -> None:
        self.wait(lambda: all(self.server(name)["alive"] for name in names), f"{names} alive")

    def get(self, path: str) -> Any:
        return httpx.get(f"{self.url}{path}", timeout=20, trust_env=False).json()

    def server(self, name: str) -> dict[str, Any]:
        """What the gateway knows of a server."""
        return next(each for each in self.get("/v1/servers")["servers"] if each["name"] == name)

    def wait(self, until: Any, what: str, most_s: float = 60.0) -> float:
        """Waits until something is so; how long that took."""
        began = time.monotonic()
        while time.monotonic() - began < most_s:
            with contextlib.suppress(httpx.HTTPError, StopIteration):
                if until():
                    return time.monotonic() - began
            time.sleep(0.05)
        raise AssertionError(f"not after {most_s:g} s: {what}")


@dataclass
class Client:
    """Devices that never give up: each submits an id until it is acknowledged, then waits for its end.

    Attributes:
        url: of the gateway.
        acknowledged: ids for which 200 or 202 came, and when.
        ended: what was told of each task that has ended, and the seconds from its first sending.
    """

    url: str
    acknowledged: dict[str, float] = field(default_factory=dict[str, float])
    ended: dict[str, dict[str, Any]] = field(default_factory=dict[str, dict[str, Any]])
    latency_s: dict[str, float] = field(default_factory=dict[str, float])
    twice: int = 0
    """Tasks of which two ends were told that are not the same."""
    over: bool = False

    async def run(self, ids: Sequence[str], together: int = 32, most_s: float = 120.0, **more: Any) -> None:
        """Sends tasks, so many at a time; returns when all have ended, or `over` is set."""
        waiting = list(reversed(ids))
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=self.url, timeout=25.0, limits=limits, trust_env=False) as client:

            async def device(number: int) -> None:
                while waiting and not self.over:
                    await self._task(client, waiting.pop(), f"device-{number}", more)

            async with asyncio.timeout(most_s):
                await asyncio.gather(*(device(number) for number in range(together)))

    async def _task(self, client: httpx.AsyncClient, task_id: str, device: str, more: dict[str, Any]) -> None:
        began = time.monotonic()
        body = {"id": task_id, "device": device, "model": "part", **more}
        while True:
            answer = await _asked(client, "POST", "/v1/tasks", json=body)
            if answer is not None and answer.status_code in (200, 202):
                break
            assert answer is None or answer.status_code in (404, 429, 503), answer.text
            await asyncio.sleep(0.1 + 0.1 * random.random())
        self.acknowledged[task_id] = time.monotonic()
        while True:
            answer = await _asked(client, "GET", f"/v1/tasks/{task_id}?wait_s=10")
            if answer is not None:
                assert answer.status_code == 200, f"{task_id}: acknowledged, then {answer.status_code} {answer.text}"
                entry = answer.json()
                if entry["state"] not in ("accepted", "leased"):
                    break
            else:
                await asyncio.sleep(0.1 + 0.1 * random.random())
        self.latency_s[task_id] = time.monotonic() - began
        before = self.ended.setdefault(task_id, entry)
        self.twice += (before["state"], before["result"]) != (entry["state"], entry["result"])


async def _asked(client: httpx.AsyncClient, method: str, path: str, **more: Any) -> httpx.Response | None:
    try:
        return await client.request(method, path, **more)
    except httpx.HTTPError:
        return None


@dataclass(frozen=True)
class Toll:
    """What a run has cost, counted from the ledger, the clients and the notes of the servers.

    Attributes:
        accepted: ids that were acknowledged.
        lost: of these, those that are not done in the ledger, or whose result is not theirs.
        results: rows with a result.
        ids: different ids among them.
        begun: executions that were begun.
        ended: executions that came to an end.
        repeated: ids that were begun more than once.
        late_results: results that came after the one that counts.
        changed: ids whose end, as the client was told, is not that of the ledger.
        second: tasks that needed more than one attempt.
        most_attempts: of one task.
    """

    accepted: int
    lost: int
    results: int
    ids: int
    begun: int
    ended: int
    repeated: int
    late_results: int
    changed: int
    second: int
    most_attempts: int


def toll_of(live: Live, client: Client) -> Toll:
    """Counts. The gateway must have ended or be idle."""
    begun, ended = Counter[str](), Counter[str]()
    notes = live.folder / "executions"
    for line in notes.read_text(encoding="utf-8").splitlines() if notes.exists() else ():
        event, _, task_id = line.partition(" ")
        (begun if event == "begun" else ended)[task_id] += 1
    with contextlib.closing(sqlite3.connect(live.ledger)) as connection:
        rows = connection.execute(
            "SELECT task.id, state, result, blob.data, attempt FROM task LEFT JOIN blob ON blob.name = task.result"
        ).fetchall()
        counts = dict(connection.execute("SELECT name, value FROM count").fetchall())
    sound = {row[0] for row in rows if row[1] == "done" and row[3] is not None and bytes(row[3]).decode() == row[0]}
    told = {row[0]: (row[1], row[2]) for row in rows}
    with_result = [row[0] for row in rows if row[2] is not None]
    return Toll(
        accepted=len(client.acknowledged),
        lost=len(set(client.acknowledged) - sound),
        results=len(with_result),
        ids=len(set(with_result)),
        begun=sum(begun.values()),
        ended=sum(ended.values()),
        repeated=sum(count > 1 for count in begun.values()),
        late_results=int(counts.get("duplicates", 0)),
        changed=client.twice
        + sum(told.get(each) != (entry["state"], entry["result"]) for each, entry in client.ended.items()),
        second=sum(row[4] > 1 for row in rows),
        most_attempts=max((row[4] for row in rows), default=0),
    )


def _note(event: str, task_id: str) -> None:
    """One line with one write: whole lines also where several processes write."""
    path = os.open(os.environ[EXECUTIONS], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    try:
        os.write(path, f"{event} {task_id}\n".encode())
    finally:
        os.close(path)


def _counted_server() -> None:
    """The command line, with work that is written down."""
    from gmel.edge.server import process
    from gmel.edge.server.work import Loaded, Product, Sleeping, Tell
    from gmel.edge.task import Task

    class Noted:
        def __init__(self, model: Loaded) -> None:
            self._model = model
            self.memory_gb = model.memory_gb

        def run(self, task: Task, tell: Tell, stop: threading.Event) -> Product:
            _note("begun", task.id)
            self._model.run(task, tell, stop)
            _note("ended", task.id)
            return Product(task.id.encode(), "text/plain")

    class NotedSource(Sleeping):
        def load(self, name: str) -> Loaded:
            return Noted(super().load(name))

    process.Sleeping = NotedSource
    from gmel.cli.main import main

    main()


if __name__ == "__main__":
    sys.path.remove(str(Path(__file__).resolve().parent))  # names of tests hide nothing
    _counted_server()
