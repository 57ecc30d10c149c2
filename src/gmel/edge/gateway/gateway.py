"""What the routes of a gateway share: who may do what, which tasks are taken, what is told of it all."""

import asyncio
import contextlib
import json
import time
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastapi import Request
from prometheus_client import generate_latest

from gmel import __version__
from gmel.edge.deciding import RULES, Decider
from gmel.edge.dispatch import Dispatcher
from gmel.edge.engines.engine import Engine
from gmel.edge.engines.http import HttpEngine
from gmel.edge.engines.pull import EitherEngine, PullEngine
from gmel.edge.engines.transport import AiohttpTransport, Links
from gmel.edge.fleet import Fleet
from gmel.edge.inputs import Inputs
from gmel.edge.keeping import Keeper
from gmel.edge.keys import OPEN, Caller, Keys
from gmel.edge.ledger import Entry, Ledger
from gmel.edge.metrics import Metrics
from gmel.edge.plant import Plant
from gmel.edge.recent import Recent
from gmel.edge.store import store_at
from gmel.edge.task import DONE, FINAL, Task, check_name
from gmel.edge.traces import OFF, Traces

__all__ = ["INPUTS", "LEDGER", "MOST_BODY", "MOST_WAIT_S", "RESULTS", "Gateway", "RefusalError", "Settings"]

LEDGER, RESULTS, INPUTS = "ledger.sqlite", "results", "inputs"
"""In the folder of a gateway; the last two, where it has a store elsewhere, there."""
MOST_BODY = 64 * 1024
"""Bytes of a request, but for results."""
MOST_WAIT_S = 60.0
"""Longest wait of a request for something to happen."""
BEAT_S = 1.0
"""Between heartbeats."""
_MOST_WATCHERS = 100
_MOST_DEVICES = 100_000
_LOOK_EVERY_S = 0.5
_MOST_UNSTORED = 2**30
"""Bytes of results in memory, waiting for the store, above which no more tasks are taken."""
_COUNTING = 0.02
"""Largest share of the time that goes into counting the tasks of the ledger, however many pages are open."""


@dataclass(frozen=True)
class Settings:
    """How a gateway is run.

    Attributes:
        folder: of the ledger and the results.
        policies: folder of exported policies, each in a folder of its own; none for rules alone.
        policy: in charge at the start.
        most_open: tasks without an end; one more is turned away.
        rate_per_s: tasks of one device per second that are accepted on average.
        burst: tasks of one device that are accepted at once.
        stall_s: silence of a server after which its tasks go elsewhere.
        keys: file of keys; none: everybody may do everything (on this machine only).
        server_key: what servers are shown.
        verify: certificates of servers that are trusted: false, or a file.
        seed: of rules that draw.
        lease_s: beyond what was expected of it, after which a task that does not end goes elsewhere.
        store: URL of results and inputs (`gmel.edge.store.store_at`); none for the folder.
        inputs_bytes: most of all inputs together.
        most_losses: servers that may break off while they run a task; then it has failed.
        keep_days: that a task is kept after its end; 0 for ever.
        keep_gb: results of at most so many gigabytes are kept; none: any number.
    """

    folder: Path
    policies: Path | None = None
    policy: str = "earliest-finish"
    most_open: int = 2000
    rate_per_s: float = 1000.0
    burst: int = 2000
    stall_s: float = 5.0
    keys: Path | None = None
    server_key: str | None = None
    verify: bool | str = True
    seed: int = 0
    lease_s: float = 60.0
    store: str | None = None
    inputs_bytes: int = 4 * 2**30
    most_losses: int = 10
    keep_days: float = 30.0
    keep_gb: float | None = None


class RefusalError(Exception):
    """An answer that is no result."""

    def __init__(self, status: int, message: str, after_s: float | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.after_s = status, message, after_s


class Gateway:
    """What the routes share. Made before the loop runs; `open` and `close` belong to the life of the application."""

    def __init__(self, plant: Plant, settings: Settings, engine: Engine | None = None, traces: Traces = OFF) -> None:
        """Checks all that can be checked before the first request.

        Raises:
            InputError: keys or a policy that cannot be used.
        """
        self.plant, self.settings = plant, settings
        self.keys = None if settings.keys is None else Keys(settings.keys)
        self.fleet = Fleet(plant)
        self.decider = Decider(self.fleet, settings.policies, settings.seed)
        self.decider.change(settings.policy, time.time())
        self.metrics = Metrics()
        self.recent = Recent()
        self.pull = PullEngine(settings.stall_s, self.fleet.listened_s)
        self._engine, self._traces = engine, traces
        self.began_s = time.time()
        self._watchers: set[asyncio.Queue[str]] = set()
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()
        self._counted: tuple[float, dict[str, int]] | None = None

    async def open(self) -> None:
        """Opens the ledger and takes up what is unfinished."""
        settings = self.settings
        settings.folder.mkdir(parents=True, exist_ok=True)
        self.ledger = Ledger(settings.folder / LEDGER)
        self.store = store_at(settings.store, settings.folder, RESULTS)
        self.inputs = Inputs(store_at(settings.store, settings.folder, INPUTS), settings.inputs_bytes)
        push = self._engine or HttpEngine(
            AiohttpTransport(Links(settings.stall_s, settings.server_key, settings.verify))
        )
        self.engine = EitherEngine(push, self.pull)
        self.dispatcher = Dispatcher(
            self.ledger,
            self.store,
            self.fleet,
            self.decider,
            self.engine,
            self.metrics,
            self.tell,
            settings.lease_s,
            self._traces,
            settings.most_losses,
        )
        self.dispatcher.start()
        self.keeper = Keeper(
            self.ledger,
            self.store,
            self.dispatcher.writing,
            self.dispatcher.leaving,
            settings.keep_days,
            settings.keep_gb,
        )
        looks = [self._look(), self.inputs.keep_tidy(self._named), self.keeper.keep()]
        looks += [self._ask(name) for name in self.engine.servers]
        self._looking = [asyncio.create_task(each) for each in looks]

    async def close(self) -> None:
        """Ends what is under way; tasks without an end are taken up at the next start."""
        for each in self._looking:
            each.cancel()
        await asyncio.gather(*self._looking, return_exceptions=True)
        await self.dispatcher.close()
        await self.engine.close()
        await self.ledger.close()
        await asyncio.to_thread(self._traces.close)

    def _named(self) -> set[str]:
        """Inputs of tasks without an end."""
        return {job.task.input for job in self.dispatcher.jobs.values()}

    async def _ask(self, name: str) -> None:
        """Asks a server for its heartbeat, where it does not say it on its own."""
        while True:
            beat = await self.engine.heartbeat(self.fleet.servers[name])
            if beat is not None:
                self.fleet.hear(name, beat, self.fleet.now())
            await asyncio.sleep(BEAT_S)

    def tell(self, event: dict[str, Any]) -> None:
        """Tells all who watch; who is too slow misses some."""
        event = event | {"at_s": round(time.time(), 3)}
        self.recent.hear(event)
        if self._watchers:
            line = json.dumps(event)
            for watcher in self._watchers:
                with contextlib.suppress(asyncio.QueueFull):
                    watcher.put_nowait(line)

    def check_watchers(self) -> None:
        """Turns those away who are too many."""
        if len(self._watchers) >= _MOST_WATCHERS:
            raise RefusalError(429, f"events: {_MOST_WATCHERS} are watching", 5.0)

    def watch(self) -> "asyncio.Queue[str]":
        """A queue of all that happens from now on."""
        watcher: asyncio.Queue[str] = asyncio.Queue(1000)
        self._watchers.add(watcher)
        return watcher

    def leave(self, watcher: "asyncio.Queue[str]") -> None:
        """Nobody reads this queue any more."""
        self._watchers.discard(watcher)

    def caller(self, request: Request) -> Caller:
        """Who calls."""
        if self.keys is None:
            return OPEN
        caller = self.keys.caller(request.headers.get("authorization"))
        if caller is None:
            raise RefusalError(401, "no key, or one that is not known: send `Authorization: Bearer KEY`")
        return caller

    def operator(self, request: Request) -> None:
        """Lets operators alone through."""
        if self.caller(request).role != "operator":
            raise RefusalError(403, "this is for operators")

    def server(self, request: Request, name: str) -> None:
        """Lets the server of a name through."""
        check_name(name, "server")
        if not self.caller(request).may("server", name):
            raise RefusalError(403, f"this is for the server {name}")

    async def accept(self, task: Task, caller: Caller, header: str = "") -> tuple[Entry, bool]:
        """Takes a task on, or finds it; True where it is new. `header` is the `traceparent` of who asks."""
        if not caller.may("device", task.device):
            raise RefusalError(403, f"the key is not that of the device {task.device}")
        job = self.dispatcher.jobs.get(task.id)
        known = job.entry if job is not None else None
        if known is None:
            known = self._reason_against(task)
        if known is None and task.input:
            known = await self._without_input(task)
        if known is not None:
            return self._same(known, task.digest), False
        accepted = time.monotonic()
        # Spans without an end are never sent: those of a task that was here already.
        span = self._traces.begin("task", header, id=task.id, device=task.device, model=task.model)
        accepting = self._traces.begin("accept", span)
        verdict, entry = await self.ledger.accept(task)
        if verdict != "new":
            return self._same(entry, task.digest), False
        accepting.end()
        self.metrics.accepted.inc()
        self.dispatcher.take(entry, accepted, span)
        return entry, True

    def _reason_against(self, task: Task) -> Entry | None:
        """Turns a task away; or gives the entry of one that is here already, which costs nothing."""
        refusal: RefusalError | None = None
        state = self.fleet.state(task.model, self.fleet.now())
        if state == "none alive":
            refusal = RefusalError(503, "no server is alive", 5.0)
        elif state == "not offered":
            refusal = RefusalError(404, f"model {task.model!r}: no server that is alive has it")
        elif self.dispatcher.unstored > _MOST_UNSTORED:
            refusal = RefusalError(503, "the store takes nothing, and too many results wait for it", 5.0)
        elif len(self.dispatcher.jobs) >= self.settings.most_open:
            now = self.fleet.now()
            alive = [each.backlog_s(now) for each in self.fleet.servers.values() if each.alive(now)]
            refusal = RefusalError(429, f"all servers are busy: {self.settings.most_open} tasks are open", min(alive))
        elif not self._within_rate(task.device):
            refusal = RefusalError(
                429, f"device {task.device}: more than {self.settings.rate_per_s:g} tasks per second", 1.0
            )
        if refusal is None:
            return None
        known = self.ledger.get(task.id)
        if known is None:
            self.metrics.turned_away.labels(str(refusal.status)).inc()
            self.recent.turned_away[str(refusal.status)] += 1
            raise refusal
        return known

    async def _without_input(self, task: Task) -> Entry | None:
        """Turns a task away whose input is not here; or gives the entry of one that was accepted when it was."""
        if await self.inputs.has(task.input):
            return None
        known = self.ledger.get(task.id)
        if known is None:
            raise RefusalError(400, f"input {task.input}: is not here; upload it first, PUT /v1/inputs/{task.input}")
        return known

    @staticmethod
    def _same(known: Entry, digest: str) -> Entry:
        if known.digest != digest:
            raise RefusalError(409, f"id {known.task.id!r}: is the id of another task; choose a new one")
        return known

    def check_rate(self, caller: Caller) -> None:
        """Turns away who asks too often."""
        if not self._within_rate(caller.name):
            raise RefusalError(429, f"{caller.name}: more than {self.settings.rate_per_s:g} requests per second", 1.0)

    def _within_rate(self, device: str) -> bool:
        """A bucket of `burst` tokens for each device, refilled at `rate_per_s`."""
        now = time.monotonic()
        tokens, when = self._buckets.pop(device, (float(self.settings.burst), now))
        tokens = min(tokens + (now - when) * self.settings.rate_per_s, float(self.settings.burst))
        enough = tokens >= 1.0
        self._buckets[device] = (tokens - enough, now)
        if len(self._buckets) > _MOST_DEVICES:
            self._buckets.popitem(last=False)
        return enough

    async def ended(self, task_id: str, wait_s: float) -> Entry | None:
        """Waits for the end of a task; None where that has not come in time, or where the task is no longer here."""
        job = self.dispatcher.jobs.get(task_id)
        if job is None:
            return self.ledger.get(task_id)
        if wait_s > 0:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait_s):
                    await job.ended.wait()
        if not job.ended.is_set():
            return None
        # What was done is known without asking the disk for it.
        return job.entry if job.entry.state == DONE else self.ledger.get(task_id)

    def result(self, entry: Entry) -> bytes:
        """The bytes of a result."""
        if entry.state != DONE or entry.result is None:
            raise RefusalError(
                409 if entry.state in FINAL else 404, f"task {entry.task.id}: {entry.state}, has no result"
            )
        data = self.ledger.blob(entry.result)
        if data is None:
            data = self.store.get(entry.result)
        if data is None:
            raise RefusalError(410, f"task {entry.task.id}: its result is no longer in the store, or damaged")
        return data

    def state(self) -> dict[str, Any]:
        """All that the page of an operator shows."""
        now = self.fleet.now()
        return {
            "gmel": __version__,
            "plant": self.plant.name,
            "up_s": time.time() - self.began_s,
            "open": len(self.dispatcher.jobs),
            "parked": len(self.dispatcher.parked),
            "counts": self._counts(now),
            "latency": self.metrics.recent(),
            "policy": self.policy(),
            "servers": self.servers(now),
            **self.recent.as_json(time.time()),
        }

    def _counts(self, now: float) -> dict[str, int]:
        """Tasks by state. Counting reads the whole index, so a long ledger is counted more rarely."""
        if self._counted is None or now >= self._counted[0]:
            counts = self.ledger.counts()
            took_s = time.monotonic() - now
            self._counted = (now + took_s / _COUNTING, counts)
        return self._counted[1]

    async def _look(self) -> None:
        """Tells when a server falls silent, drains, or is back."""
        before = dict[str, bool]()
        while True:
            now = self.fleet.now()
            for server in self.fleet.servers.values():
                alive = server.alive(now)
                if before.get(server.name, False) != alive:
                    drains = bool(server.beat and server.beat.draining)
                    self.tell({"event": "server", "server": server.name, "alive": alive, "draining": drains})
                before[server.name] = alive
            await asyncio.sleep(_LOOK_EVERY_S)

    def servers(self, now: float) -> list[dict[str, Any]]:
        """What is known of each server."""
        return [
            {
                "name": server.name,
                "alive": server.alive(now),
                "usable": server.usable(now),
                "draining": bool(server.beat and server.beat.draining),
                "heard_s": None if server.beat is None else round(now - server.heard, 3),
                "mode": None if server.beat is None else ("push" if server.beat.url else "pull"),
                "speed": server.speed,
                "gpus": server.gpus,
                "pace": round(server.pace, 4),
                "backlog_s": round(server.backlog_s(now), 4),
                "tasks": len(server.flights),
                "waiting": self.dispatcher.lane(server.name),
                "resident": [] if server.beat is None else list(server.beat.resident),
                "models": None if server.beat is None or server.beat.models is None else list(server.beat.models),
                "memory_gb": None if server.beat is None else server.beat.memory_gb,
                "done": server.done,
                "lost": server.lost,
                "position_m": None if server.described is None else server.described.position_m,
            }
            for server in self.fleet.servers.values()
        ]

    def policy(self) -> dict[str, Any]:
        """Which policy is in charge, and which were."""
        decider = self.decider
        return {
            "current": decider.current.as_json(),
            "history": [version.as_json() for version in decider.history],
            "shadow": None if decider.shadow is None else decider.shadow.as_json(),
            "known": [*RULES, *decider.names()],
            "fallbacks": decider.fallbacks,
            "reasons": list(decider.reasons)[-5:],
        }

    def exposition(self) -> bytes:
        """Metrics as Prometheus reads them."""
        now, metrics = self.fleet.now(), self.metrics
        metrics.waiting.set(len(self.dispatcher.jobs))
        metrics.parked.set(len(self.dispatcher.parked))
        metrics.fallbacks.set(self.decider.fallbacks)
        metrics.version.set(self.decider.current.number)
        for server in self.fleet.servers.values():
            metrics.alive.labels(server.name).set(server.alive(now))
            metrics.backlog.labels(server.name).set(server.backlog_s(now))
            metrics.pace.labels(server.name).set(server.pace)
        return generate_latest(metrics.registry)
