"""Routes of devices: tasks in, results out, and what happens meanwhile."""

import asyncio
import io
import zipfile
import zlib
from collections.abc import AsyncIterator
from typing import Annotated, Any

from fastapi import FastAPI, Query, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from gmel.edge.bodies import read_json
from gmel.edge.gateway.gateway import MOST_BODY, MOST_WAIT_S, Gateway, RefusalError
from gmel.edge.gateway.schema import TASK_BODY, Name, Patience, answers, gives
from gmel.edge.ledger import Entry
from gmel.edge.task import FINAL, STATES, read_task
from gmel.scenario.errors import InputError

__all__ = ["add_tasks", "first_photo"]


def add_tasks(app: FastAPI, gateway: Gateway) -> None:
    """Adds the routes."""

    @app.post(
        "/v1/tasks",
        openapi_extra=TASK_BODY,
        responses=gives("accepted", 200, 202) | answers(404, 409, 429),
        status_code=202,
    )
    async def submit(request: Request, wait_s: Patience = 0.0) -> Response:  # pyright: ignore[reportUnusedFunction]
        """Accepts a task. 202 means that it is on disk; 200 that it was accepted before, or, with `wait_s`, that it has
        ended within that time."""
        caller = gateway.caller(request)
        task = read_task(await read_json(request, MOST_BODY))
        _check_wait(wait_s)
        entry, new = await gateway.accept(task, caller, request.headers.get("traceparent", ""))
        if wait_s > 0 and (ended := await gateway.ended(task.id, wait_s)) is not None:
            return JSONResponse({**_shown(gateway, ended), "new": new})
        return JSONResponse({"id": task.id, "state": entry.state, "new": new}, 202 if new else 200)

    @app.get("/v1/tasks", responses=gives("tasks"))
    async def find(  # pyright: ignore[reportUnusedFunction]
        request: Request,
        state: Annotated[str | None, Query(json_schema_extra={"enum": list(STATES)})] = None,
        device: str | None = None,
        before: Annotated[int | None, Query(json_schema_extra={"minimum": 0, "maximum": 2**63 - 1})] = None,
        limit: Annotated[int, Query(json_schema_extra={"minimum": 1, "maximum": 1000})] = 100,
    ) -> Response:
        """Tasks, the newest first. `next` is the `before` of the next page."""
        caller = gateway.caller(request)
        if state is not None and state not in STATES:
            raise InputError(f"state: must be one of {', '.join(STATES)}")
        if not 1 <= limit <= 1000:
            raise InputError("limit: must be from 1 to 1000")
        if before is not None and not 0 <= before < 2**63:
            raise InputError("before: must be a sequence number of a page before")
        if caller.role != "operator":
            device = caller.name if caller.role == "device" else ""
        entries = gateway.ledger.page(state, device, before, limit)
        rest = entries[-1].seq if len(entries) == limit else None
        return JSONResponse({"tasks": [_shown(gateway, entry) for entry in entries], "next": rest})

    @app.get("/v1/tasks/{task_id}", responses=gives("task") | answers(404))
    async def get(request: Request, task_id: Name, wait_s: Patience = 0.0) -> Response:  # pyright: ignore[reportUnusedFunction]
        """A task. With `wait_s` the answer comes when it has ended, or after that time."""
        _entry_for(gateway, request, task_id)
        _check_wait(wait_s)
        ended = await gateway.ended(task_id, wait_s)
        return JSONResponse(_shown(gateway, ended or _entry_for(gateway, request, task_id)))

    @app.delete("/v1/tasks/{task_id}", responses=gives("task") | answers(404))
    async def cancel(request: Request, task_id: Name) -> Response:  # pyright: ignore[reportUnusedFunction]
        """Cancels a task that has not ended; one that has stays as it is."""
        _entry_for(gateway, request, task_id)
        entry = await gateway.dispatcher.cancel(task_id)
        if entry is None:  # it was old, and has just left
            raise _not_here(gateway, task_id)
        return JSONResponse(_shown(gateway, entry))

    _add_results(app, gateway)
    _add_events(app, gateway)


def _add_results(app: FastAPI, gateway: Gateway) -> None:
    @app.get(
        "/v1/tasks/{task_id}/result",
        response_class=Response,
        responses=answers(404, 409, 410) | {200: {"content": {"*/*": {}}}},
    )
    async def result(request: Request, task_id: Name) -> Response:  # pyright: ignore[reportUnusedFunction]
        """What a task has made: a ZIP of photos, masks and the task."""
        entry = _entry_for(gateway, request, task_id)
        kind = (entry.record or {}).get("kind", "application/octet-stream")
        data = await asyncio.to_thread(gateway.result, entry)
        return Response(
            data, media_type=str(kind), headers={"ETag": f'"{entry.result}"', "Content-Disposition": "attachment"}
        )

    @app.get(
        "/v1/tasks/{task_id}/preview.png",
        response_class=Response,
        responses=answers(404, 409, 410) | {200: {"content": {"image/png": {}}}},
    )
    async def preview(request: Request, task_id: Name) -> Response:  # pyright: ignore[reportUnusedFunction]
        """The first photo that a task has made."""
        entry = _entry_for(gateway, request, task_id)
        data = await asyncio.to_thread(gateway.result, entry)
        photo = await asyncio.to_thread(first_photo, data)
        if photo is None:
            raise RefusalError(404, f"task {task_id}: its result holds no photo")
        return Response(photo, media_type="image/png", headers={"Cache-Control": "private, max-age=3600"})


def _add_events(app: FastAPI, gateway: Gateway) -> None:
    @app.get(
        "/v1/events", response_class=Response, responses={200: {"content": {"text/event-stream": {}}}} | answers(429)
    )
    async def events(request: Request) -> Response:  # pyright: ignore[reportUnusedFunction]
        """All that happens, as server-sent events."""
        gateway.operator(request)
        gateway.check_watchers()

        async def lines() -> AsyncIterator[str]:
            # Not before: who leaves at once never gets here, and nobody would take the queue away.
            watcher = gateway.watch()
            try:
                yield ": gmel\n\n"
                while True:
                    try:
                        line = await asyncio.wait_for(watcher.get(), 10.0)
                        yield f"data: {line}\n\n"
                    except TimeoutError:
                        yield ": still here\n\n"
            finally:
                gateway.leave(watcher)

        return StreamingResponse(lines(), media_type="text/event-stream", headers={"Cache-Control": "no-store"})


def _check_wait(wait_s: float) -> None:
    if not 0.0 <= wait_s <= MOST_WAIT_S:
        raise InputError(f"wait_s: must be from 0 to {MOST_WAIT_S:g}")


def _entry_for(gateway: Gateway, request: Request, task_id: str) -> Entry:
    """A task, for those whom it concerns."""
    caller = gateway.caller(request)
    entry = gateway.ledger.get(task_id)
    if entry is None or not caller.may("device", entry.task.device):
        raise _not_here(gateway, task_id)
    return entry


def _not_here(gateway: Gateway, task_id: str) -> RefusalError:
    days = gateway.settings.keep_days
    kept = f"; tasks are kept for {days:g} days after their end" if days > 0 else ""
    return RefusalError(404, f"task {task_id[:64]!r}: not here{kept}")


def _shown(gateway: Gateway, entry: Entry) -> dict[str, Any]:
    """An entry, with what is known of it beyond the ledger."""
    shown = entry.as_json()
    job = gateway.dispatcher.jobs.get(entry.task.id)
    if job is not None and entry.state not in FINAL:
        decision = job.decision
        shown |= {
            "stage": job.stage,
            "progress": job.progress,
            "server": None if decision is None else decision.server.name,
            "scores": {} if decision is None else decision.scores,
            "policy": None if decision is None else decision.policy,
            "fallback": None if decision is None else decision.fallback,
            "expected_s": None if decision is None else decision.expected_s,
        }
    elif (last := gateway.recent.decision(entry.task.id)) is not None:
        shown |= {key: last[key] for key in ("scores", "policy", "fallback", "expected_s")}
    return shown


def first_photo(data: bytes) -> bytes | None:
    """The first photo of a result; None where there is none that can be read: what servers send is not trusted."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            info = archive.getinfo("000.png")
            return archive.read(info) if info.file_size <= 64 * 2**20 else None
    # All that a damaged archive raises: its directory, its compressed data, an end too early, places before its start.
    except (zipfile.BadZipFile, zlib.error, EOFError, ValueError, KeyError, RuntimeError, NotImplementedError):
        return None
