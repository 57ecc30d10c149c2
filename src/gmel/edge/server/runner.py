"""The queue of an edge server: tasks one after the other on each of its GPUs, models in limited memory.

Idempotent by id: a task that is here, or was done here lately, is not run again. Tasks that follow one another, of the
same model and number of steps, may be drawn together.
"""

import asyncio
import math
import threading
import time
from collections import OrderedDict, deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from gmel.edge.server.inputs import AwayError
from gmel.edge.server.work import CancelledError, Loaded, Product, Several, Source, Tell
from gmel.edge.task import Task
from gmel.edge.traces import OFF, Traces, server_spans
from gmel.scenario.errors import InputError

__all__ = ["Run", "Runner"]

_KEPT_BYTES = 64 * 2**20
_KEPT = 4096
_TOLD_EVERY_S = 0.05
"""Steps may be much shorter; nobody looks closer."""
_LEARNING = 0.2
"""Weight of the newest task in what a photo of a model takes."""


@dataclass
class Run:
    """A task at this server."""

    task: Task
    attempt: int
    """0 for one that a device has sent itself, past the gateway."""
    queued: float
    began: float = 0.0
    """When a GPU took it."""
    ready: float = 0.0
    """When its model was in memory."""
    ended: float = 0.0
    product: Product | None = None
    error: str | None = None
    gone: bool = False
    """It was cancelled."""
    together: int = 0
    """Photos of all tasks that it is, or was, drawn with, its own among them."""
    closed: bool = False
    """Its end was told."""
    share: float = 0.0
    context: str = ""
    """The `traceparent` of the attempt that brought it."""
    stop: threading.Event = field(default_factory=threading.Event)
    watchers: "list[asyncio.Queue[dict[str, Any]]]" = field(default_factory=list["asyncio.Queue[dict[str, Any]]"])

    @property
    def over(self) -> bool:
        return self.product is not None or self.error is not None or self.gone

    def end(self) -> dict[str, Any]:
        """The last line of its story. Of tasks that were drawn together each has the service of all of them."""
        if self.gone:
            return {"event": "gone", "error": self.error or "cancelled"}
        times = {
            "wait_s": self.began - self.queued,
            "switch_s": self.ready - self.began,
            "service_s": self.ended - self.ready,
            "together": max(self.together, self.task.images),
        }
        if self.product is None:
            return {"event": "failed", "error": self.error, **times}
        return {"event": "done", "bytes": len(self.product.data), "kind": self.product.kind, **times}


class Runner:
    """See the module.

    Args:
        source: models.
        gpus: tasks at once.
        memory_gb: for models; the least recently used leave when a new one does not fit.
        most: tasks that may wait.
        together: photos of different tasks that are drawn together, at most; 1 for each task alone.
        traces: where their spans go.
    """

    def __init__(
        self,
        source: Source,
        gpus: int = 1,
        memory_gb: float = 16.0,
        most: int = 1000,
        together: int = 1,
        traces: Traces = OFF,
    ) -> None:
        self._traces = traces
        self.source, self.gpus, self.memory_gb, self.most, self.together = source, gpus, memory_gb, most, together
        self.runs: dict[str, Run] = {}
        self.draining = False
        self.loads = 0
        self.done = 0
        self._image_s: dict[str, float] = {}
        self._done: OrderedDict[str, Run] = OrderedDict()
        self._kept = 0
        self._waiting: deque[Run] = deque()
        self._news = asyncio.Condition()
        self._models: OrderedDict[str, Loaded] = OrderedDict()
        self._loading = asyncio.Lock()
        self._threads = ThreadPoolExecutor(gpus, thread_name_prefix="gpu")
        self._workers: list[asyncio.Task[None]] = []

    def start(self) -> None:
        """Begins to work."""
        self._workers = [asyncio.create_task(self._work()) for _ in range(self.gpus)]

    @property
    def resident(self) -> tuple[str, ...]:
        """Models in memory, the least recently used first."""
        return tuple(self._models)

    def backlog_s(self, direct: bool = False) -> float:
        """Seconds until a GPU is free, by what photos of each model have taken here; 0 of a model that was not run yet.

        Args:
            direct: count only the tasks that no gateway has sent.
        """
        now, busy, ahead = time.monotonic(), 0, 0.0
        for run in self.runs.values():
            busy += 1
            if direct and run.attempt > 0:
                continue
            whole = self._image_s.get(run.task.model, 0.0) * run.task.images
            # Of the time that tasks together have taken, each has had its share.
            had_s = (now - run.ready) * run.task.images / max(run.together, run.task.images)
            ahead += whole if run.began == 0.0 else max(whole - had_s, 0.0)
        return ahead / self.gpus if busy >= self.gpus else 0.0

    def find(self, task_id: str) -> Run | None:
        """A task that is here, or was done here lately."""
        return self.runs.get(task_id) or self._done.get(task_id)

    async def take(self, task: Task, attempt: int, context: str = "") -> Run:
        """Queues a task, or finds it. `context` is the `traceparent` of the attempt that brings it.

        Raises:
            InputError: full, draining, or without the model. These are no faults of the task.
        """
        found = self.find(task.id)
        if found is not None and found.task == task and not found.gone:
            return found
        if self.draining:
            raise InputError("draining: takes no more tasks")
        if len(self.runs) >= self.most:
            raise InputError(f"full: {self.most} tasks are here")
        names = self.source.names()
        if names is not None and task.model not in names:
            raise InputError(f"model {task.model!r}: not here")
        run = Run(task, attempt, time.monotonic(), context=context)
        self.runs[task.id] = run
        self._waiting.append(run)
        async with self._news:
            self._news.notify()
        return run

    def cancel(self, task_id: str) -> bool:
        """Cancels a task that has not ended."""
        run = self.runs.get(task_id)
        if run is None:
            return False
        run.gone = True
        run.stop.set()
        if run in self._waiting:
            self._waiting.remove(run)
            self._end(run)
        elif run.together > run.task.images:  # the others go on, and it does not wait for them
            self._end(run)
        return True

    async def drain(self) -> None:
        """Takes no more, and returns when all that is here has ended."""
        self.draining = True
        while self.runs:
            await asyncio.sleep(0.02)

    async def close(self) -> None:
        """Stops at once."""
        for run in self.runs.values():
            run.stop.set()
        for worker in self._workers:
            worker.cancel()
        await asyncio.gather(*self._workers, return_exceptions=True)
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _work(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            async with self._news:
                while not self._waiting:
                    await self._news.wait()
                run = self._waiting.popleft()
            run.began = run.ready = time.monotonic()
            try:
                model = await self._model(run)
            except Exception as error:  # a model must not stop the server
                self._fail(run, error)
                continue
            batch = [run] if run.gone else [run, *self._alike(run, model)]
            if len(batch) > 1 and await self._several(loop, batch, model):
                continue
            for each in batch:
                await self._alone(loop, each, model)

    def _alike(self, first: Run, model: Loaded) -> list[Run]:
        """Takes those that can be drawn with a task from the head of the queue."""
        found: list[Run] = []
        photos = first.task.images
        while self._waiting and isinstance(model, Several):
            task = self._waiting[0].task
            photos += task.images
            same = (task.model, task.steps, task.input) == (first.task.model, first.task.steps, first.task.input)
            if not same or photos > self.together:
                break
            found.append(self._waiting.popleft())
        return found

    async def _several(self, loop: asyncio.AbstractEventLoop, batch: list[Run], model: Loaded) -> bool:
        """Does tasks together; False where that did not work, and each has to be done alone."""
        assert isinstance(model, Several)
        now = time.monotonic()
        for run in batch:
            run.began, run.ready = run.began or now, now
            run.together = sum(each.task.images for each in batch)
            _tell(run, {"event": "running"})
        tells, stops = [_teller(loop, run) for run in batch], [run.stop for run in batch]
        tasks = [run.task for run in batch]
        try:
            products = await loop.run_in_executor(self._threads, model.run_several, tasks, tells, stops)
        except CancelledError:
            for run in batch:
                run.gone = True
                self._end(run)
            return True
        except Exception:  # one that cannot be done, or too little memory, is no fault of the others
            now = time.monotonic()
            for run in batch:
                run.together, run.began, run.ready = 0, now, now
            return False
        now = time.monotonic()
        for run, product in zip(batch, products, strict=True):
            if not run.gone:
                run.ended, run.product = now, product
            self._end(run)
        return True

    async def _alone(self, loop: asyncio.AbstractEventLoop, run: Run, model: Loaded) -> None:
        if run.gone:
            self._end(run)
            return
        run.ready = time.monotonic()
        _tell(run, {"event": "running"})
        try:
            product = await loop.run_in_executor(self._threads, model.run, run.task, _teller(loop, run), run.stop)
        except Exception as error:  # a task must not stop the server
            self._fail(run, error)
            return
        run.ended, run.product = time.monotonic(), product
        self._end(run)

    def _fail(self, run: Run, error: Exception) -> None:
        if isinstance(error, CancelledError):
            run.gone = True
        elif isinstance(error, AwayError):  # no fault of the task: it is to run elsewhere, or later
            run.gone, run.error = True, str(error)
        else:
            run.ended = time.monotonic()
            run.error = "out of memory" if isinstance(error, MemoryError) else f"{type(error).__name__}: {error}"[:500]
            if isinstance(error, InputError):
                run.error = str(error)
        self._end(run)

    async def _model(self, run: Run) -> Loaded:
        """The model of a task, from memory or the disk; one is loaded at a time."""
        name = run.task.model
        if name not in self._models:
            _tell(run, {"event": "loading"})
            async with self._loading:
                if name not in self._models:
                    loop = asyncio.get_running_loop()
                    model = await loop.run_in_executor(self._threads, self.source.load, name)
                    if model.memory_gb > self.memory_gb:
                        raise InputError(f"model {name!r}: takes {model.memory_gb:g} GB, here are {self.memory_gb:g}")
                    self.loads += 1
                    self._models[name] = model
                    while sum(each.memory_gb for each in self._models.values()) > self.memory_gb:
                        self._models.popitem(last=False)
        self._models.move_to_end(name)
        return self._models[name]

    def _end(self, run: Run) -> None:
        if run.closed:
            return
        run.closed = True
        if self.runs.get(run.task.id) is run:  # it may have been cancelled and sent again meanwhile
            del self.runs[run.task.id]
        if run.product is not None:
            self.done += 1
            each_s = (run.ended - run.ready) / max(run.together, run.task.images)
            before_s = self._image_s.get(run.task.model, each_s)
            self._image_s[run.task.model] = before_s + _LEARNING * (each_s - before_s)
            before = self._done.pop(run.task.id, None)
            if before is not None and before.product is not None:
                self._kept -= len(before.product.data)
            self._done[run.task.id] = run
            self._kept += len(run.product.data)
            while self._kept > _KEPT_BYTES or len(self._done) > _KEPT:
                _, old = self._done.popitem(last=False)
                self._kept -= 0 if old.product is None else len(old.product.data)
        self._trace(run)
        _tell(run, run.end())

    def _trace(self, run: Run) -> None:
        facts = {"error": run.error} if run.error else {"cancelled": True} if run.gone else {"images": run.task.images}
        ended = run.ended or time.monotonic()
        server_spans(self._traces, run.context, run.queued, run.began, run.ready, ended, **facts)


def _teller(loop: asyncio.AbstractEventLoop, run: Run) -> Tell:
    """Tells the loop of progress, from the thread that works; the end always."""
    told = -math.inf

    def tell(share: float) -> None:
        nonlocal told
        now = time.monotonic()
        if now - told >= _TOLD_EVERY_S or share >= 1.0:
            told = now
            loop.call_soon_threadsafe(_progress, run, share)

    return tell


def _progress(run: Run, share: float) -> None:
    run.share = share
    if not run.over:
        _tell(run, {"event": "progress", "share": round(share, 4)})


def _tell(run: Run, line: dict[str, Any]) -> None:
    for watcher in run.watchers:
        watcher.put_nowait(line)
