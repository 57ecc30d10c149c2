"""The servers as their gateway knows them now: what they said last, and what it has sent them since.

What was sent is counted here at the moment of the decision and taken off when the answer comes, so tasks that arrive
together see each other and do not all run to the same server. Telemetry never wins over this count: a heartbeat only
adds what comes from elsewhere. All times are those of a monotonic clock that the caller reads: a wall clock that jumps
moves nothing here.
"""

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, cast
from urllib.parse import urlsplit

from gmel.edge.plant import Plant
from gmel.edge.plant import Server as Described
from gmel.edge.task import Task, check_name
from gmel.scenario.errors import InputError

__all__ = ["AHEAD", "LOOK_EVERY_S", "MOST_TOGETHER", "Beat", "Fleet", "Flight", "ServerState", "read_beat"]

STALE_S = 3.0
"""Age of the last heartbeat from which a server counts as not there: three were missed."""
_BREAK_S = (0.5, 10.0)
"""How long a server that failed is left alone: the first time, and at most."""
LOOK_EVERY_S = 0.25
"""How often a gateway looks at its fleet, at least."""
_PAUSE_S = 0.75
"""A look that comes later than that: the process stood still."""
AHEAD = 2
"""Tasks at a server beyond those that it works on."""
MOST_TOGETHER = 256
"""Photos of different tasks that a server may draw together."""
_LEARNING = 0.1
"""Weight of the newest task in the measured pace of a server."""
_PACE = (0.02, 50.0)
_LEAST_SPEED = 1e-6
_MOST_DOUBLINGS = 16
"""Of the time that a server is left alone; beyond, it would not be a number any more."""


@dataclass(frozen=True)
class Beat:
    """What a server says of itself once a second.

    Attributes:
        url: where it takes tasks; none for a server that fetches them (it may stand behind a firewall).
        speed: work units per second, 0 where it does not know.
        gpus: tasks that it works on at once.
        memory_gb: for models.
        resident: models in memory.
        models: models that it has; none for all.
        foreign_s: seconds of work that did not come through this gateway.
        draining: it takes no more.
        running: tasks that it holds.
        together: photos of different tasks that it draws together; 1 for each task alone.
    """

    url: str | None
    speed: float = 0.0
    gpus: int = 1
    memory_gb: float = 1.0
    resident: tuple[str, ...] = ()
    models: tuple[str, ...] | None = None
    foreign_s: float = 0.0
    draining: bool = False
    running: int = 0
    together: int = 1


@dataclass
class Flight:
    """A task on its way to, or at, a server: seconds that were expected when it was decided, and when it began."""

    task: Task
    upload_s: float
    switch_s: float
    service_s: float
    pace: float = 1.0
    """Of the server, when it was decided; `service_s` has it in it."""
    began: float | None = None

    @property
    def work_s(self) -> float:
        """Seconds that it keeps a GPU."""
        return self.switch_s + self.service_s


@dataclass
class ServerState:
    """One server (see the module)."""

    name: str
    described: Described | None
    beat: Beat | None = None
    heard: float = -1e9
    flights: dict[str, Flight] = field(default_factory=dict[str, Flight])
    resident: dict[str, None] = field(default_factory=dict[str, None])
    """Models that it will hold once it has done what it was sent, the least recently used first."""
    pace: float = 1.0
    """Measured over expected seconds of service, an exponential average."""
    failures: int = 0
    shut_until: float = -1e9
    previous: tuple[float, float, float] = (-1e9, 0.0, 0.0)
    """When it was looked at last, the backlog then, and the one before."""
    done: int = 0
    lost: int = 0

    @property
    def speed(self) -> float:
        """Work units per second, by what it says, else by the scenario."""
        if self.beat is not None and self.beat.speed > 0:
            return self.beat.speed
        return 1.0 if self.described is None else self.described.speed

    @property
    def gpus(self) -> int:
        return 1 if self.beat is None else self.beat.gpus

    @property
    def ahead(self) -> int:
        """Tasks that it is sent beyond those that it works on: so many that it never waits, and finds some to draw
        together."""
        return max(AHEAD, 0 if self.beat is None else self.beat.together)

    def alive(self, now: float) -> bool:
        """Whether it was heard lately and takes tasks."""
        return self.beat is not None and not self.beat.draining and now - self.heard < STALE_S

    def usable(self, now: float) -> bool:
        """Alive, and not left alone after a failure. After that time one task tries it."""
        return self.alive(now) and now >= self.shut_until and not (self.failures and self.flights)

    def offers(self, model: str) -> bool:
        """Whether it has a model."""
        return self.beat is not None and (self.beat.models is None or model in self.beat.models)

    def backlog_s(self, now: float) -> float:
        """Seconds until a GPU is free, by what was sent and what it said of others.

        Exact for one GPU where service takes what was expected; for several the work is taken as evenly spread.
        """
        busy, ahead = 0, 0.0
        for flight in self.flights.values():
            busy += 1
            left = flight.work_s if flight.began is None else flight.work_s - (now - flight.began)
            # A task that takes longer than expected is about to end, as far as anybody knows.
            ahead += max(left, 0.05 * flight.work_s)
        foreign = 0.0 if self.beat is None else max(self.beat.foreign_s - (now - self.heard), 0.0)
        return foreign + (ahead / self.gpus if busy >= self.gpus else 0.0)

    def look(self, now: float, every_s: float) -> tuple[float, float]:
        """The backlog now, and the one of about `every_s` seconds ago."""
        backlog = self.backlog_s(now)
        when, newer, older = self.previous
        if now - when >= every_s:
            older = newer if now - when < 2 * every_s else backlog
            self.previous = (now, backlog, older)
        return backlog, older

    def send(self, flight: Flight, memory_of: Mapping[str, float]) -> None:
        """Counts a task that is sent here, and the model that comes with it."""
        self.flights[flight.task.id] = flight
        self.resident.pop(flight.task.model, None)
        self.resident[flight.task.model] = None
        room = 1.0 if self.beat is None else self.beat.memory_gb
        held = sum(memory_of.get(model, 0.0) for model in self.resident)
        for model in list(self.resident):
            if held <= room or model == flight.task.model:
                break
            del self.resident[model]
            held -= memory_of.get(model, 0.0)

    def succeed(self, flight: Flight, service_s: float) -> None:
        """A task came back done after so many seconds of service."""
        self.failures, self.shut_until = 0, -1e9
        self.done += 1
        if flight.service_s > 0 and service_s > 0:
            ratio = min(max(service_s / flight.service_s * flight.pace, _PACE[0]), _PACE[1])
            self.pace += _LEARNING * (ratio - self.pace)

    def fail(self, now: float) -> None:
        """It broke off, refused a connection or fell silent: leave it alone for a while, longer each time."""
        self.lost += 1
        if now < self.shut_until:
            return  # the same failure, seen by another task
        self.failures += 1
        self.shut_until = now + min(_BREAK_S[0] * 2 ** min(self.failures - 1, _MOST_DOUBLINGS), _BREAK_S[1])


class Fleet:
    """All servers, in the order of the scenario, later ones behind.

    Args:
        plant: servers and models.
        clock: monotonic, in seconds.
    """

    def __init__(self, plant: Plant, clock: Callable[[], float] = time.monotonic) -> None:
        self.plant, self._clock = plant, clock
        self.paused_s = 0.0
        """How long this process itself has stood still."""
        self._looked = clock()
        self.memory_of = {name: model.memory_gb for name, model in plant.models.items()}
        self.servers = {name: ServerState(name, server) for name, server in plant.servers.items()}

    def now(self) -> float:
        """The time. Who asks again only after a while has stood still (stopped, suspended, a machine without a core to
        spare) and has heard nobody meanwhile: that silence is none of the servers'."""
        now = self._clock()
        paused_s = now - self._looked - LOOK_EVERY_S
        self._looked = now
        if paused_s > _PAUSE_S:
            self.paused_s += paused_s
            for server in self.servers.values():
                server.heard += paused_s
        return now

    def listened_s(self) -> float:
        """The time without that in which this process stood still."""
        return self.now() - self.paused_s

    def hear(self, name: str, beat: Beat, now: float) -> ServerState:
        """Takes a heartbeat; a server that nobody knew joins.

        Raises:
            InputError: too many servers.
        """
        server = self.servers.get(name)
        if server is None:
            if len(self.servers) >= _MOST_SERVERS:
                raise InputError(
                    f"servers: {_MOST_SERVERS} are known, no more are taken; restart the gateway without the old ones"
                )
            server = self.servers[name] = ServerState(name, None)
        if not server.flights:
            server.resident = dict.fromkeys(beat.resident)
        if now - server.heard >= STALE_S:
            server.shut_until = -1e9  # it is back: one task may try it now
        server.beat, server.heard = beat, now
        return server

    def usable(self, model: str, now: float, without: Iterable[str] = ()) -> list[ServerState]:
        """Servers that may get a task of a model."""
        left_out = set(without)
        return [
            server
            for server in self.servers.values()
            if server.name not in left_out and server.usable(now) and server.offers(model)
        ]

    def state(self, model: str, now: float) -> Literal["ready", "none alive", "not offered"]:
        """Why a task of a model could not run now, or that it can."""
        alive = [server for server in self.servers.values() if server.alive(now)]
        if not alive:
            return "none alive"
        return "ready" if any(server.offers(model) for server in alive) else "not offered"

    def expect(self, task: Task, server: ServerState) -> Flight:
        """What a task is expected to take at a server."""
        model = self.plant.models.get(task.model)
        if model is None:  # a model that the scenario does not know: what tasks take here on average
            return Flight(task, task.upload_s(server.name), 0.0, server.pace * task.images / server.speed, server.pace)
        switch_s = 0.0 if task.model in server.resident else model.load_s
        work = model.work(task.images, task.steps, task.size_bit)
        return Flight(task, task.upload_s(server.name), switch_s, server.pace * work / server.speed, server.pace)


_MOST_SERVERS = 4096


def read_beat(content: object) -> Beat:
    """A heartbeat from its JSON.

    Raises:
        InputError: a field that is unknown or out of range, by name.
    """
    if not isinstance(content, dict):
        raise InputError("heartbeat: must be a JSON object")
    said = cast("dict[str, Any]", content)
    unknown = sorted(set(said) - set(Beat.__dataclass_fields__))
    if unknown:
        raise InputError(f"heartbeat: {str(unknown[0])[:40]!r} is no field")
    url = said.get("url")
    if url is not None and not _is_address(url):
        raise InputError("url: must be an http:// or https:// address, or null for a server that fetches its tasks")
    models = said.get("models")
    return Beat(
        url=url,
        resident=_names(said.get("resident", [])),
        models=None if models is None else _names(models),
        draining=said.get("draining") is True,
        speed=_speed(said),
        gpus=int(_number(said, "gpus", 1.0, 1.0, 64.0)),
        memory_gb=_number(said, "memory_gb", 1.0, 0.0, 1e6),
        foreign_s=_number(said, "foreign_s", 0.0, 0.0, 1e9),
        running=int(_number(said, "running", 0.0, 0.0, 1e6)),
        together=int(_number(said, "together", 1.0, 1.0, MOST_TOGETHER)),
    )


def _is_address(url: object) -> bool:
    if not isinstance(url, str) or len(url) > 200 or not url.isascii() or not url.isprintable() or " " in url:
        return False
    try:
        parts = urlsplit(url)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:  # no port, or brackets that do not close
        return False


def _speed(said: Mapping[str, Any]) -> float:
    """0 for one that does not know; so little that times would not be numbers any more is refused."""
    speed = _number(said, "speed", 0.0, 0.0, 1e9)
    if 0.0 < speed < _LEAST_SPEED:
        raise InputError(f"speed: must be 0, or a number from {_LEAST_SPEED:g} to 1e+09")
    return speed


def _number(said: Mapping[str, Any], name: str, default: float, low: float, high: float) -> float:
    value = said.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise InputError(f"{name}: must be a number from {low:g} to {high:g}")
    return float(value)


def _names(value: object) -> tuple[str, ...]:
    if not isinstance(value, list) or len(cast("list[Any]", value)) > 1024:
        raise InputError("resident, models: must be lists of names")
    return tuple(check_name(name, "model") for name in cast("list[Any]", value))
