"""From an accepted task to its one result: decide, send, and send elsewhere when a server breaks.

Every accepted task is in exactly one place: in the lane of the server that was chosen for it, at that server, or parked
because no server can take it. A lane sends a few tasks ahead so that the server never waits; the others stay here, and
are decided anew at once when the server dies.
"""

import asyncio
import contextlib
import logging
import math
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from gmel.edge.deciding import Decider, Decision
from gmel.edge.engines.engine import Answer, Engine, LostError, RefusedError, SilentError
from gmel.edge.fleet import LOOK_EVERY_S, Fleet, Flight, ServerState
from gmel.edge.ledger import Entry, Ledger, LedgerError
from gmel.edge.metrics import Metrics
from gmel.edge.store import Store, name_of
from gmel.edge.task import CANCELLED, DONE, EXPIRED, FAILED, Task
from gmel.edge.task_record import Way, record_of
from gmel.edge.traces import CONTEXT, NOTHING, OFF, Span, Traces

__all__ = ["Dispatcher", "Job", "Tell"]

_MOST_ERRORS = 3
"""Failures of the task itself, each at another server where there is one, after which it has failed."""
_SMALL = 16 * 1024
"""Bytes of a result that the ledger keeps itself."""
_PATIENCE_S = 0.5
_LEAVING_S = 0.05
"""Between attempts to write what the disk does not take."""
_AGAIN_S = (0.25, 10.0)
"""How long a task waits that no server took or kept: the first time, and at most."""
_MOST_DOUBLINGS = 10
_LEASE_TIMES = 10.0
"""A task may take so many times what was expected of it and of those before it at its server, and `lease_s` more. The
next attempt may take twice as long, so that one that is only slow ends some time."""
_BEGUN = ("loading", "running", "progress")
"""Stages in which a server works on a task."""
_log = logging.getLogger("gmel.gateway")

Tell = Callable[[dict[str, Any]], None]
"""Is told of every change, for those who watch."""


@dataclass(eq=False)
class Job:
    """A task that has not ended."""

    entry: Entry
    """As it was accepted; once it is done, with its result."""
    accepted: float
    """Of the monotonic clock; before it began for a task of an earlier process."""
    attempt: int = 0
    errors: int = 0
    avoid: list[str] = field(default_factory=list[str])
    losses: int = 0
    """Servers that broke off while they ran it."""
    decision: Decision | None = None
    decided: float = 0.0
    flight: Flight | None = None
    running: "asyncio.Task[None] | None" = None
    progress: float = 0.0
    stage: str = "waiting"
    sent: float = 0.0
    arrived: float | None = None
    going: bool = False
    """Its attempt has begun, so that it can be broken off."""
    misses: int = 0
    """Times that no other server was there to take it."""
    not_before: float = -math.inf
    """Of the monotonic clock: it is not tried again before."""
    over: bool = False
    """Its end is being written: nobody sends it any more."""
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    span: Span = NOTHING

    @property
    def task(self) -> Task:
        return self.entry.task


class Dispatcher:
    """See the module."""

    def __init__(
        self,
        ledger: Ledger,
        store: Store,
        fleet: Fleet,
        decider: Decider,
        engine: Engine,
        metrics: Metrics,
        tell: Tell,
        lease_s: float = 60.0,
        traces: Traces = OFF,
        most_losses: int = 10,
    ) -> None:
        self._lease_s, self._traces, self._most_losses = lease_s, traces, most_losses
        self.ledger, self.store, self.fleet, self.decider, self.engine = ledger, store, fleet, decider, engine
        self.metrics, self._tell = metrics, tell
        self.jobs: dict[str, Job] = {}
        self.parked: deque[Job] = deque()
        self._lanes: dict[str, deque[Job]] = {}
        self._at: dict[str, int] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._sweeper: asyncio.Task[None] | None = None
        self.open = True
        self.unstored = 0
        """Bytes of results that the store has not taken yet."""
        self.writing = Counter[str]()
        """Results that lie in the store, or will, before the ledger knows of them."""
        self.leaving: set[str] = set()
        """Results that are being taken out of the store; who has made the same again waits until that is done."""

    def start(self) -> None:
        """Takes up every task that has no end, then watches over servers."""
        now, now_s, losses = time.monotonic(), time.time(), self.ledger.losses()
        for entry in self.ledger.unfinished():
            task = entry.task
            span = self._traces.begin("task", id=task.id, device=task.device, model=task.model, again=True)
            # No other clock goes on from one process to the next. One that was put back gives no more than the whole
            # deadline once more.
            self.take(entry, now - max(now_s - entry.accepted_s, 0.0), span, losses.get(task.id, 0))
        self._sweeper = asyncio.create_task(self._sweep())

    def take(self, entry: Entry, accepted: float, span: Span = NOTHING, losses: int = 0) -> Job:
        """A task that was accepted: decides on it and sends it.

        Args:
            entry: of the ledger.
            accepted: when, of the monotonic clock.
            span: of the task.
            losses: servers that broke off while they ran it, before this process.
        """
        job = Job(entry, accepted, entry.attempt, span=span, losses=losses)
        self.jobs[entry.task.id] = job
        self._place(job)
        return job

    async def cancel(self, task_id: str) -> Entry | None:
        """Cancels a task wherever it is; the entry as it is then, None for an id that is not here."""
        entry = await self.ledger.cancel(task_id)
        job = self.jobs.get(task_id)
        if entry is None or job is None or entry.state != CANCELLED or job.ended.is_set():
            return entry
        job.over = True
        running, decision = job.running, job.decision
        self._end(job, CANCELLED)
        if running is None:
            self._leave(job)
            return entry
        if job.going:  # one that has not begun sees that it is over, and gives its place back
            running.cancel()
        if decision is not None:
            await self.engine.cancel(decision.server, task_id)
        return entry

    async def close(self) -> None:
        """Stops sending. Tasks without an end are taken up at the next start."""
        self.open = False
        everything = [*self._tasks, *([self._sweeper] if self._sweeper else [])]
        for task in everything:
            task.cancel()
        await asyncio.gather(*everything, return_exceptions=True)

    def lane(self, server: str) -> int:
        """Tasks that wait here for a server."""
        return len(self._lanes.get(server, ()))

    def _place(self, job: Job, again: bool = False) -> None:
        """Decides, and puts the task into the lane of the server; or parks it.

        Args:
            job: the task.
            again: it was just refused or lost. Where only servers are left that had it, it waits for the next sweep.
        """
        now = self.fleet.now()
        if job.over or self._expired(job, now):
            return
        job.stage = "waiting"
        decision = None
        if not again or self.fleet.usable(job.task.model, now, job.avoid):
            decision = self._decide(job, now)
        elif again:
            wait_s = min(_AGAIN_S[0] * 2 ** min(job.misses, _MOST_DOUBLINGS), _AGAIN_S[1])
            job.misses, job.not_before = job.misses + 1, now + wait_s
        if decision is None:
            job.decision = job.flight = None
            self.parked.append(job)
            return
        job.decision, job.decided = decision, now
        job.flight = self.fleet.expect(job.task, decision.server)
        decision.server.send(job.flight, self.fleet.memory_of)
        self.metrics.decisions.labels(decision.server.name, decision.policy).inc()
        self._lanes.setdefault(decision.server.name, deque()).append(job)
        self._say(job, "decided", **decision.as_json())
        self._pump(decision.server)

    def _decide(self, job: Job, now: float) -> Decision | None:
        began, span = time.perf_counter(), self._traces.begin("decide", job.span)
        try:
            decision = self.decider.decide(job.task, now, now - job.accepted, job.avoid)
            if decision is not None:
                span.end(server=decision.server.name, policy=decision.policy, expected_s=decision.expected_s)
            return decision
        except Exception:  # a task that waits is better than one that is nowhere
            _log.exception("task %s: no decision", job.task.id)
            return None
        finally:
            self.metrics.decision_s.observe(time.perf_counter() - began)

    def spare(self, server: ServerState) -> None:
        """A server takes no more: what waits for it is decided anew."""
        self._abandon(server)

    def _pump(self, server: ServerState) -> None:
        if server.beat is not None and server.beat.draining:
            return
        lane = self._lanes.get(server.name)
        while lane and self.open and self._at.get(server.name, 0) < server.gpus + server.ahead:
            job = lane.popleft()
            self._at[server.name] = self._at.get(server.name, 0) + 1
            job.running = asyncio.create_task(self._attempt(job, server))
            self._tasks.add(job.running)
            job.running.add_done_callback(self._tasks.discard)

    def _leave(self, job: Job) -> None:
        """Takes a task out of wherever it waits, and off the count of its server."""
        if job.decision is None:
            with contextlib.suppress(ValueError):
                self.parked.remove(job)
            return
        server = job.decision.server
        server.flights.pop(job.task.id, None)
        with contextlib.suppress(ValueError, KeyError):
            self._lanes[server.name].remove(job)

    async def _attempt(self, job: Job, server: ServerState) -> None:
        """One try at one server, to whatever end."""
        assert job.flight is not None
        flight = job.flight
        answer: Answer | None = None
        lost, died = False, ""
        job.going = True
        try:
            if job.over or self._expired(job, time.monotonic()):
                return
            answer = await self._submit(job, server)
            server.succeed(flight, answer.own_s(job.task) if answer.data is not None else 0.0)
        except RefusedError as error:
            self._broke(job, server, str(error), "refused")
        except Exception as error:  # whatever an engine does, the task goes on
            if not isinstance(error, LostError):
                _log.exception("task %s at %s", job.task.id, server.name)
            lost = True
            died = _death(error, job)
            self._broke(job, server, str(error), "lost")
        finally:
            if server.flights.get(job.task.id) is flight:
                del server.flights[job.task.id]
            self._at[server.name] -= 1
            job.running, job.going = None, False
            if self.open:
                if lost:
                    self._abandon(server)
                self._pump(server)
        if job.over:
            return
        if answer is None:
            job.avoid = [*job.avoid, server.name][-16:]
            if died and await self._too_many(job, server, died):
                return
            self.ledger.release(job.task.id)
            self._place(job, again=True)
        else:
            await self._finish(job, server, answer)

    async def _too_many(self, job: Job, server: ServerState, reason: str) -> bool:
        """Counts a server that broke off while it ran a task; True where the task has an end now: one that takes down
        every server that it meets must not go round for ever."""
        job.losses += 1
        with contextlib.suppress(LedgerError):
            await self.ledger.lose(job.task.id)
        if job.losses >= self._most_losses and not job.over:
            times = f"{job.losses} servers" if job.losses > 1 else "a server"
            error = f"{times} broke off while running it, the last: {reason}"[:500]
            await self._write(job, FAILED, server=server.name, error=error)
        return job.over or job.ended.is_set()

    async def _submit(self, job: Job, server: ServerState) -> Answer:
        """Sends a task; whatever the server does, this ends."""
        job.attempt += 1
        job.sent, job.arrived = time.monotonic(), None
        lease_s = self._lease(job, server)
        self.ledger.lease(job.task.id, server.name, job.attempt, time.time() + lease_s)
        span = self._traces.begin("dispatch", job.span, server=server.name, attempt=job.attempt)
        CONTEXT.set(span.header)  # of this attempt alone: it is an asyncio task of its own
        trouble: str | None = "broken off"
        try:
            answer = await self._listened(job, server, lease_s)
            trouble = answer.error
            return answer
        except (LostError, RefusedError) as error:
            trouble = str(error)
            raise
        finally:
            span.end(trouble)

    async def _listened(self, job: Job, server: ServerState, lease_s: float) -> Answer:
        """The answer of a server within a lease, of which time in which this process stood still is no part."""
        ends, paused_s = self.fleet.listened_s() + lease_s, self.fleet.paused_s
        while True:
            try:
                async with asyncio.timeout(ends - self.fleet.listened_s()):
                    return await self.engine.submit(
                        server, job.task, job.attempt, lambda event, said: self._hear(job, event, said)
                    )
            except (TimeoutError, SilentError) as error:
                self.fleet.now()
                if self.fleet.paused_s > paused_s:  # it was us who did not listen; asked again, it goes on with it
                    paused_s = self.fleet.paused_s
                    continue
                if isinstance(error, SilentError):
                    raise
                with contextlib.suppress(Exception):
                    await self.engine.cancel(server, job.task.id)  # it may work on it still, for nobody
                raise SilentError(f"{server.name}: no end after {lease_s:.0f} s") from error

    def _lease(self, job: Job, server: ServerState) -> float:
        """Seconds after which a server that still speaks but does not come to an end is given up."""
        most = server.gpus + server.ahead
        before = sorted((flight.work_s for flight in server.flights.values()), reverse=True)[:most]
        return (self._lease_s + _LEASE_TIMES * sum(before)) * 2 ** min(job.attempt - 1, _MOST_DOUBLINGS)

    def _broke(self, job: Job, server: ServerState, reason: str, kind: str) -> None:
        if kind == "lost":
            server.fail(self.fleet.now())
        self.metrics.retries.labels(server.name, kind).inc()
        self._say(job, "retried", server=server.name, error=reason[:200])

    def _abandon(self, server: ServerState) -> None:
        """What waited for a server that broke is decided anew."""
        waiting = self._lanes.pop(server.name, deque())
        for job in waiting:
            server.flights.pop(job.task.id, None)
        for job in waiting:
            self._place(job)

    def _hear(self, job: Job, event: str, said: dict[str, Any]) -> None:
        now = time.monotonic()
        if job.arrived is None:
            job.arrived = now
        if event == "running" and job.flight is not None:
            job.flight.began = now
        if event == "loading" and job.flight is not None and job.flight.began is None:
            job.flight.began = now
        share = said.get("share")
        if isinstance(share, int | float) and 0.0 <= share <= 1.0:
            job.progress = float(share)
        job.stage = event
        self._say(job, event, share=job.progress)

    async def _finish(self, job: Job, server: ServerState, answer: Answer) -> None:
        if answer.data is None:
            job.errors += 1
            job.avoid = [*job.avoid, server.name][-16:]
            self.metrics.retries.labels(server.name, "failed").inc()
            if job.errors < _MOST_ERRORS:
                self._say(job, "retried", server=server.name, error=str(answer.error)[:200])
                self._place(job, again=True)
                return
            await self._write(job, FAILED, server=server.name, error=answer.error)
            return
        name, small = name_of(answer.data), len(answer.data) <= _SMALL
        self.writing[name] += 1
        span = self._traces.begin("store", job.span, bytes=len(answer.data))
        try:
            while name in self.leaving:
                await asyncio.sleep(_LEAVING_S)
            if not small:
                await self._store(job, answer.data)
            await self._write(
                job,
                DONE,
                server=server.name,
                result=name,
                result_bytes=len(answer.data),
                data=answer.data if small else None,
                record=self._record(job, server, answer),
            )
        finally:
            self.writing -= Counter([name])
            span.end()

    async def _store(self, job: Job, data: bytes) -> None:
        """Puts a result into the store, as often as it takes: until then its task is not done."""
        self.unstored += len(data)
        try:
            while self.open:
                try:
                    await asyncio.to_thread(self.store.put, data)
                    return
                except OSError as error:
                    self.metrics.disk_errors.inc()
                    self._say(job, "retried", error=f"store: {error}")
                    await asyncio.sleep(_PATIENCE_S)
        finally:
            self.unstored -= len(data)

    async def _write(self, job: Job, state: str, **how: Any) -> None:
        """Writes an end until the disk has taken it: the work is done, it would be a waste to lose it."""
        while self.open:
            now_s = time.time()
            try:
                if not await self.ledger.finish(job.task.id, state, now_s=now_s, **how):
                    self.metrics.duplicates.inc()
                    ended = self.ledger.get(job.task.id)
                    state = state if ended is None else ended.state
                elif state == DONE:
                    known = {name: value for name, value in how.items() if name != "data"}
                    job.entry = replace(job.entry, state=DONE, attempt=job.attempt, finished_s=now_s, **known)
                self._end(job, state, server=how.get("server"), error=how.get("error"))
                return
            except LedgerError:
                self.metrics.disk_errors.inc()
                await asyncio.sleep(_PATIENCE_S)

    def _end(self, job: Job, state: str, **facts: Any) -> None:
        if job.ended.is_set():  # cancelled while its result was written
            return
        self.jobs.pop(job.task.id, None)
        job.stage = state
        job.ended.set()
        latency_s = time.monotonic() - job.accepted
        job.span.end(None if state == DONE else state, state=state, attempts=job.attempt)
        self.metrics.ended.labels(state).inc()
        if state == DONE:
            self.metrics.latency_s.observe(latency_s)
            self.metrics.note_latency(latency_s, latency_s <= job.task.deadline_s)
        self._say(job, state, latency_s=latency_s, deadline_s=job.task.deadline_s, **facts)

    def _expired(self, job: Job, now: float) -> bool:
        """Ends a task whose deadline has passed where it is worth nothing afterwards."""
        if not job.task.expire or now - job.accepted <= job.task.deadline_s or job.over:
            return False
        if job.decision is not None:
            job.decision.server.flights.pop(job.task.id, None)
        job.over = True
        task = asyncio.create_task(self._write(job, EXPIRED))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return True

    def _record(self, job: Job, server: ServerState, answer: Answer) -> dict[str, Any]:
        decision = job.decision
        assert decision is not None
        way = Way(job.accepted, job.decided, job.sent, job.arrived, time.monotonic())
        how = (job.attempt, decision.policy, decision.version, decision.expected_s)
        row = record_of(job.task, server.name, answer, way, job.entry.accepted_s, *how)
        return {**row, "kind": answer.kind}

    async def _sweep(self) -> None:
        """Looks after servers that fell silent, and tasks that nobody could take."""
        while True:
            await asyncio.sleep(LOOK_EVERY_S)
            try:
                self._look_after()
            except Exception:  # without it tasks would wait for ever
                _log.exception("sweep")

    def _look_after(self) -> None:
        now = self.fleet.now()
        for server in list(self.fleet.servers.values()):
            if self._lanes.get(server.name) and not server.alive(now):
                self._abandon(server)
            self._pump(server)
        for _ in range(len(self.parked)):
            job = self.parked.popleft()
            try:
                if job.not_before <= now or self.fleet.usable(job.task.model, now, job.avoid):
                    self._place(job)
                elif not self._expired(job, now):
                    self.parked.append(job)
            except Exception:
                _log.exception("task %s: not placed", job.task.id)
                if job.decision is None:
                    self.parked.append(job)

    def _say(self, job: Job, event: str, **facts: Any) -> None:
        self._tell({"event": event, "id": job.task.id, "device": job.task.device, "model": job.task.model, **facts})


def _death(error: Exception, job: Job) -> str:
    """Why a server broke off while it worked on a task; empty where it may be alive, or had not begun."""
    if not isinstance(error, LostError) or isinstance(error, SilentError) or job.stage not in _BEGUN:
        return ""
    return str(error) or "broke off"
