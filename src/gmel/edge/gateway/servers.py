"""Routes of servers: heartbeats, and the tasks of those that fetch them."""

import asyncio
import base64
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response

from gmel.edge.bodies import read_json
from gmel.edge.engines.engine import read_answer
from gmel.edge.engines.pull import MOST_MARK
from gmel.edge.fleet import read_beat
from gmel.edge.gateway.gateway import MOST_BODY, MOST_WAIT_S, Gateway
from gmel.edge.gateway.schema import BEAT_BODY, BRING_BODY, FETCH_BODY, HEAR_BODY, Name, answers, gives
from gmel.edge.task import check_name
from gmel.scenario.errors import InputError

__all__ = ["add_servers"]


def add_servers(app: FastAPI, gateway: Gateway) -> None:
    """Adds the routes."""

    @app.put("/v1/servers/{name}", openapi_extra=BEAT_BODY, responses=gives("beat"))
    async def beat(request: Request, name: Name) -> Response:  # pyright: ignore[reportUnusedFunction]
        """The heartbeat of a server, every second. The first one is how it joins."""
        gateway.server(request, name)
        said = read_beat(await read_json(request, MOST_BODY))
        server = gateway.fleet.hear(name, said, gateway.fleet.now())
        if said.draining:
            gateway.dispatcher.spare(server)
            gateway.pull.spare(name)
        return JSONResponse({"name": name, "tasks": len(server.flights)})

    @app.get("/v1/servers", responses=gives("servers"))
    async def servers(request: Request) -> Response:  # pyright: ignore[reportUnusedFunction]
        """What is known of each server."""
        gateway.caller(request)
        return JSONResponse({"servers": gateway.servers(gateway.fleet.now())})

    @app.get("/v1/plant", responses=gives("plant"))
    async def described(request: Request) -> Response:  # pyright: ignore[reportUnusedFunction]
        """The plant: servers and models, for devices and servers that need it."""
        gateway.caller(request)
        return JSONResponse(gateway.plant.as_json())

    @app.post("/v1/servers/{name}/fetch", openapi_extra=FETCH_BODY, responses=gives("fetched"))
    async def fetch(request: Request, name: Name) -> Response:  # pyright: ignore[reportUnusedFunction]
        """Tasks for a server that fetches them; answers when there are some, or after `wait_s`."""
        gateway.server(request, name)
        room, wait_s, mark = _asked(await read_json(request, MOST_BODY))
        # Whoever asks may die meanwhile; tasks that are given to nobody would be missed only after a while.
        fetching = asyncio.ensure_future(gateway.pull.fetch(name, room, wait_s, mark))
        leaving = asyncio.ensure_future(_gone(request))
        try:
            await asyncio.wait([fetching, leaving], return_when=asyncio.FIRST_COMPLETED)
            return JSONResponse(await fetching if fetching.done() else {"tasks": [], "cancelled": []})
        finally:
            fetching.cancel()
            leaving.cancel()

    @app.post("/v1/servers/{name}/tasks/{task_id}", openapi_extra=HEAR_BODY, responses=gives("wanted"))
    async def hear(request: Request, name: Name, task_id: Name) -> Response:  # pyright: ignore[reportUnusedFunction]
        """What a server says of a task that it has fetched."""
        gateway.server(request, name)
        check_name(task_id, "id")
        body = await read_json(request, MOST_BODY)
        event = body.pop("event", "beat")
        return JSONResponse({"wanted": gateway.pull.hear(name, task_id, str(event)[:20], body)})

    @app.put(
        "/v1/servers/{name}/tasks/{task_id}",
        openapi_extra=BRING_BODY,
        responses=gives("wanted") | answers(413),
    )
    async def bring(request: Request, name: Name, task_id: Name) -> Response:  # pyright: ignore[reportUnusedFunction]
        """The end of a task that a server has fetched."""
        gateway.server(request, name)
        check_name(task_id, "id")
        body = await read_json(request, 256 * 2**20)
        event, reason = body.get("event"), str(body.get("error", ""))[:500]
        if event not in ("done", "failed", "gone"):
            raise InputError("event: must be done, failed or gone")
        try:
            data = base64.b64decode(body.get("data", ""), validate=True)
            answer = read_answer(body, data if event == "done" else None)
        except (ValueError, TypeError) as error:
            raise InputError("data: must be base64, and times numbers of seconds") from error
        return JSONResponse({"wanted": gateway.pull.bring(name, task_id, None if event == "gone" else answer, reason)})


def _asked(body: dict[str, Any]) -> tuple[int, float, str]:
    """Room, seconds to wait and mark of a server that fetches."""
    room, wait_s, mark = body.get("room", 1), body.get("wait_s", 20.0), body.get("mark", "")
    if isinstance(room, float) and room.is_integer():
        room = int(room)
    if isinstance(room, bool) or not isinstance(room, int) or not 0 <= room <= 1000:
        raise InputError("room: must be a whole number from 0 to 1000")
    if isinstance(wait_s, bool) or not isinstance(wait_s, int | float) or not 0 <= wait_s <= MOST_WAIT_S:
        raise InputError(f"wait_s: must be a number from 0 to {MOST_WAIT_S:g}")
    if not isinstance(mark, str) or len(mark) > MOST_MARK:
        raise InputError(f"mark: must be up to {MOST_MARK} characters")
    return room, float(wait_s), mark


async def _gone(request: Request) -> None:
    """Returns when whoever asks is gone."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
