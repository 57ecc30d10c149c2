"""A device: sends its tasks to the gateway, or decides itself and sends them straight to a server.

It needs numpy, httpx and, for a learned policy, onnxruntime; neither JAX nor the rest of the package.

In both modes a task is sent until somebody has it: the id makes sure that it runs once. In decentralised mode it sees
what the paper lets it see: its own task and queue, and what each server said last, with its age. There it may also run
a task itself, where the scenario lets it (`gmel.edge.local`).
"""

import asyncio
import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import httpx
import numpy as np

from gmel.edge.engines.engine import Answer, LostError, RefusedError
from gmel.edge.engines.http import HttpEngine
from gmel.edge.fleet import Beat, Fleet, ServerState
from gmel.edge.local import LOCAL, LocalWork
from gmel.edge.observing import expected_s, observe
from gmel.edge.plant import Plant
from gmel.edge.task import MOST_INPUT_BYTES, Task
from gmel.edge.task_record import Way, record_of
from gmel.policies.exported import ExportedPolicy
from gmel.scenario.errors import InputError

__all__ = ["Device", "DirectDevice", "Outcome", "Sender", "read_photo", "run_load"]

_RETRY_S = (0.1, 5.0)
_WAIT_S = 20.0


@dataclass(frozen=True)
class Outcome:
    """How a task ended, as the device saw it.

    Attributes:
        task: the task.
        state: `done`, `failed`, `expired`, `cancelled`, or `given up` where nobody took it in time.
        latency_s: from the first attempt to send it to the result.
        server: who did it.
        sends: attempts to hand it over.
        error: why it failed.
    """

    task: Task
    state: str
    latency_s: float
    server: str | None
    sends: int
    error: str | None = None


def read_photo(path: Path) -> bytes:
    """The bytes of a photo to draw on; the gateway looks at what is in them.

    Raises:
        InputError: it cannot be read, or is longer than what a gateway takes.
    """
    try:
        size = path.stat().st_size
        if size > MOST_INPUT_BYTES:
            raise InputError(f"{path}: {size:,} bytes, at most {MOST_INPUT_BYTES:,} are taken; save it as PNG")
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); check the name") from error


class Sender(Protocol):
    """Whoever brings a task to its end."""

    async def run(self, task: Task) -> Outcome:
        """Hands a task over and waits for its end."""
        ...


class Device:
    """Sends to a gateway.

    Args:
        gateway: its address.
        key: of the device.
        patience_s: after which a task that nobody takes is given up.
        verify: false, or a file of certificates.
    """

    def __init__(
        self, gateway: str, key: str | None = None, patience_s: float = 300.0, verify: bool | str = True
    ) -> None:
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
        timeout = httpx.Timeout(10.0, read=_WAIT_S + 10.0)
        self._client = httpx.AsyncClient(
            base_url=gateway, headers=headers, timeout=timeout, limits=limits, verify=verify, trust_env=False
        )
        self._patience_s = patience_s

    async def run(self, task: Task) -> Outcome:
        """Hands a task over and waits for its end. A gateway that is away, or busy, is asked again.

        Raises:
            InputError: the task was refused for good.
        """
        began = time.monotonic()
        sends, pause = 0, _RETRY_S[0]
        state: str | None = None
        while time.monotonic() - began < self._patience_s:
            sends += 1
            answer = await self._ask("POST", "/v1/tasks", json=task.as_json())
            if answer is not None and answer.status_code in (200, 202):
                state = "accepted"
                break
            if answer is not None and answer.status_code not in (404, 408, 429) and answer.status_code < 500:
                raise InputError(f"task {task.id}: {answer.status_code} {answer.text[:200]}")
            asked = 0.0 if answer is None else float(answer.headers.get("retry-after", 0.0))
            await asyncio.sleep(max(pause, min(asked, _RETRY_S[1])))
            pause = min(2 * pause, _RETRY_S[1])
        if state is None:
            return Outcome(task, "given up", time.monotonic() - began, None, sends)
        while True:
            answer = await self._ask("GET", f"/v1/tasks/{task.id}", params={"wait_s": _WAIT_S})
            if answer is not None and answer.status_code == 200:
                said = answer.json()
                if said["state"] not in ("accepted", "leased"):
                    latency_s = time.monotonic() - began
                    return Outcome(task, said["state"], latency_s, said["server"], sends, said.get("error"))
            elif time.monotonic() - began > self._patience_s:
                return Outcome(task, "given up", time.monotonic() - began, None, sends)
            else:
                await asyncio.sleep(_RETRY_S[0])

    async def upload(self, data: bytes) -> str:
        """Brings a photo to the gateway for tasks to be drawn on; its name there. One that is there is not sent.

        Raises:
            InputError: it was refused, or nobody answered in time.
        """
        name = hashlib.sha256(data).hexdigest()
        began, pause, said = time.monotonic(), _RETRY_S[0], "no answer"
        while True:
            answer = await self._ask("HEAD", f"/v1/inputs/{name}")
            if answer is not None and answer.status_code == 404:
                answer = await self._ask("PUT", f"/v1/inputs/{name}", content=data)
            if answer is not None and answer.status_code in (200, 201):
                return name
            if answer is not None:
                said = f"{answer.status_code} {answer.text[:200]}"
                if answer.status_code not in (404, 408, 429) and answer.status_code < 500:
                    raise InputError(f"input {name}: {said}")
            if time.monotonic() - began > self._patience_s:
                raise InputError(f"input {name}: not taken in {self._patience_s:g} s ({said})")
            await asyncio.sleep(pause)
            pause = min(2 * pause, _RETRY_S[1])

    async def result(self, task_id: str) -> bytes:
        """What a task has made.

        Raises:
            InputError: there is nothing.
        """
        answer = await self._ask("GET", f"/v1/tasks/{task_id}/result")
        if answer is None or answer.status_code != 200:
            raise InputError(f"task {task_id}: no result ({'no answer' if answer is None else answer.text[:200]})")
        return answer.content

    async def close(self) -> None:
        """Ends all connections."""
        await self._client.aclose()

    async def _ask(self, method: str, path: str, **how: Any) -> httpx.Response | None:
        try:
            return await self._client.request(method, path, **how)
        except httpx.HTTPError:
            return None


@dataclass
class DirectDevice:
    """Decides itself and sends straight to servers.

    Attributes:
        plant: what models cost, and how fast servers are.
        urls: address of each server by name.
        engine: how they are reached.
        policy: the exported actor; none: the earliest expected end.
        every_s: how often it asks servers for their news. They are as old as that when it decides.
        greedy: takes the best option in place of drawing one by the softmax; devices that decide at once should draw.
        rng: for the draw.
        key: what servers are shown.
        local: its own processor; none: it runs nothing itself.

    Raises:
        InputError: a server has the name that stands for the device itself.
    """

    plant: Plant
    urls: dict[str, str]
    engine: HttpEngine
    policy: ExportedPolicy | None = None
    every_s: float = 1.0
    greedy: bool = False
    rng: np.random.Generator = field(default_factory=np.random.default_rng)
    key: str | None = None
    local: LocalWork | None = None
    records: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    """Of tasks that were done, in order of their end."""

    def __post_init__(self) -> None:
        if LOCAL in self.urls:
            raise InputError(f"server {LOCAL!r}: is the name of the device itself; call the server something else")
        self._asked = not self.urls
        self.fleet = Fleet(self.plant)
        headers = {} if self.key is None else {"Authorization": f"Bearer {self.key}"}
        self._client = httpx.AsyncClient(timeout=2.0, headers=headers, trust_env=False)

    async def listen(self) -> None:
        """Keeps asking all servers what they say of themselves, until it is cancelled."""
        while True:
            await asyncio.gather(*(self._news(name, url) for name, url in self.urls.items()))
            self._asked = True
            await asyncio.sleep(self.every_s)

    async def run(self, task: Task, patience_s: float = 300.0) -> tuple[Outcome, Answer | None]:
        """Decides, sends, and sends elsewhere when a server breaks; or runs it itself."""
        began, wall_s = time.monotonic(), time.time()
        avoid: list[str] = []
        sends = 0
        while time.monotonic() - began < patience_s:
            now = time.monotonic()
            servers = self.fleet.usable(task.model, now, avoid) or self.fleet.usable(task.model, now)
            itself = self.local is not None and self.local.offers(task.model)
            # Before all were asked for the first time it would find nobody there but itself.
            if not servers and not (itself and self._asked):
                avoid = []
                await asyncio.sleep(_RETRY_S[0])
                continue
            place, expected = self._choose(task, servers, itself, now, now - began)
            arrived: list[float] = []
            server: ServerState | None = None
            try:
                if place == 0:
                    assert self.local is not None
                    answer, name = await self.local.run(task), LOCAL
                else:
                    server = servers[place - 1]
                    flight, name = self.fleet.expect(task, server), server.name
                    server.send(flight, self.fleet.memory_of)
                    sends += 1
                    answer = await self.engine.submit(
                        server, task, 0, lambda event, said, times=arrived: times.append(time.monotonic())
                    )
                    server.succeed(flight, answer.service_s)
            except LostError:
                assert server is not None
                server.fail(time.monotonic())
                avoid = [*avoid, server.name]
                continue
            except RefusedError:
                assert server is not None
                avoid = [*avoid, server.name]
                await asyncio.sleep(_RETRY_S[0])
                continue
            finally:
                if server is not None:
                    server.flights.pop(task.id, None)
            ended = time.monotonic()
            if answer.data is not None:
                policy = "earliest-finish" if self.policy is None else "policy"
                # To itself a device sends nothing.
                way = Way(began, now, now, now if server is None else arrived[0] if arrived else None, ended)
                self.records.append(record_of(task, name, answer, way, wall_s, sends, policy, 1, expected))
            state = "failed" if answer.data is None else "done"
            return Outcome(task, state, ended - began, name, sends, answer.error), answer
        return Outcome(task, "given up", time.monotonic() - began, None, sends), None

    async def close(self) -> None:
        """Ends all connections."""
        await self._client.aclose()
        await self.engine.close()
        if self.local is not None:
            await self.local.close()

    def _choose(
        self, task: Task, servers: Sequence[ServerState], itself: bool, now: float, waited_s: float
    ) -> tuple[int, float]:
        """The option (0 for the device itself, then the servers), and the seconds expected there."""
        own_s, pace = (0.0, 1.0) if self.local is None else (self.local.backlog_s(now), self.local.pace)
        row, options = observe(task, servers, self.fleet, now, waited_s, own_s, pace)
        for place, server in enumerate(servers, start=1):
            options[0, place, _AGE] = max(now - server.heard, 0.0)
        expected = expected_s(options)
        if self.policy is None:
            best = int(np.argmin(expected if itself else expected[1:])) + (not itself)
        else:
            mask = np.ones(options.shape[:2], np.bool_)
            mask[:, 0] = itself
            best = int(self.policy.act(row, options, mask, self.rng, self.greedy)[0])
        return best, float(expected[best])

    async def _news(self, name: str, url: str) -> None:
        try:
            said = (await self._client.get(f"{url}/v1/state")).json()
            # What it has sent itself it counts itself.
            known = self.fleet.servers.get(name)
            own_s = 0.0 if known is None else sum(flight.work_s for flight in known.flights.values())
            beat = Beat(
                url=url,
                speed=self.plant.servers[name].speed if name in self.plant.servers else 0.0,
                gpus=int(said["gpus"]),
                memory_gb=float(said["memory_gb"]),
                resident=tuple(said["resident"]),
                foreign_s=max(float(said["backlog_s"]) - own_s, 0.0),
                draining=bool(said["draining"]),
            )
        except (httpx.HTTPError, json.JSONDecodeError, KeyError, TypeError, ValueError):
            return
        self.fleet.hear(name, beat, time.monotonic())


_AGE = 5
"""Column of `gmel.policies.exported.OPTION_UNITS`: `age_s`."""


async def run_load(
    device: Sender,
    timed: Sequence[tuple[float, Task]],
    told: Callable[[int, int, Outcome | None], None],
    stop: asyncio.Event | None = None,
) -> list[Outcome]:
    """Sends tasks at their times and waits for all of them.

    Args:
        device: who sends.
        timed: seconds from now, and tasks, in order of time.
        told: is told how many were sent and how many have ended, at each of both.
        stop: set: sends no more, and waits for what was sent.
    """
    began = time.monotonic()
    outcomes: list[Outcome] = []
    running: set[asyncio.Task[None]] = set()
    sent = 0

    async def one(task: Task) -> None:
        outcome = await device.run(task)
        outcomes.append(outcome)
        told(sent, len(outcomes), outcome)

    for at_s, task in timed:
        left_s = began + at_s - time.monotonic()
        if stop is not None:
            try:
                async with asyncio.timeout(max(left_s, 0.0)):
                    await stop.wait()
                break
            except TimeoutError:
                pass
        elif left_s > 0:
            await asyncio.sleep(left_s)
        sent += 1
        told(sent, len(outcomes), None)
        each = asyncio.create_task(one(task))
        running.add(each)
        each.add_done_callback(running.discard)
    await asyncio.gather(*running)
    return outcomes
